"""The gcloud commands of tpu_vm.sh."""

import shlex
import subprocess

import launchers
import pytest

SETTINGS = {"TPU_NAME": "verifier", "TPU_ZONE": "us-west4-a", "TPU_PROJECT": "project", "TPU_TYPE": "v5litepod-8"}
WHERE = ["--zone=us-west4-a", "--project=project"]


@pytest.fixture
def bench(tmp_path):
  return launchers.Bench(tmp_path, {**SETTINGS, "TMPDIR": str(tmp_path)})


def printed(bench, *words, **settings):
  return [shlex.split(line) for line in bench.dry_run("tpu_vm.sh", *words, **settings).splitlines()]


def command_of(words):
  (text,) = (word.removeprefix("--command=") for word in words if word.startswith("--command="))
  return text


def test_create(bench):
  flags = ["--accelerator-type=v5litepod-8", "--version=v2-alpha-tpuv5-lite"]
  (words,) = printed(bench, "create")
  assert words == ["gcloud", "compute", "tpus", "tpu-vm", "create", "verifier", *flags, *WHERE]
  assert printed(bench, "create", "--spot") == [[*words[:8], "--spot", *WHERE]]
  (words,) = printed(bench, "create", "--queued", "--spot", "--", "--network=n")
  assert words[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "verifier"]
  assert {"--runtime-version=v2-alpha-tpuv5-lite", "--node-id=verifier", "--spot", "--network=n"} <= set(words)
  assert not any(word.startswith("--version") for word in words)


RUNTIMES = {
  **dict.fromkeys(("v3-8", "v4-32"), "tpu-ubuntu2204-base"),
  **{"v5litepod-64": "v2-alpha-tpuv5-lite", "v5p-16": "v2-alpha-tpuv5", "v6e-8": "v2-alpha-tpuv6e"},
}


@pytest.mark.parametrize("accelerator, runtime", RUNTIMES.items())
def test_runtime_follows_from_the_accelerator(accelerator, runtime, bench):
  (words,) = printed(bench, "create", f"--type={accelerator}")
  assert f"--accelerator-type={accelerator}" in words and f"--version={runtime}" in words
  (words,) = printed(bench, "create", f"--type={accelerator}", TPU_RUNTIME="other")
  assert "--version=other" in words


def test_delete(bench):
  (words,) = printed(bench, "delete", "--name=other", "--zone=z", "--project=p")  # options override the environment
  assert words == ["gcloud", "compute", "tpus", "tpu-vm", "delete", "other", "--quiet", "--zone=z", "--project=p"]
  (words,) = printed(bench, "delete", "--queued")
  assert words[3:6] == ["queued-resources", "delete", "verifier"] and {"--force", "--quiet"} <= set(words)


def test_install_sends_the_commit_to_all_workers(bench):
  archive, send, unpack = printed(bench, "install")
  (file,) = (word.removeprefix("--output=") for word in archive if word.startswith("--output="))
  assert archive[:4] == ["git", "-C", str(launchers.ROOT), "archive"] and archive[-1] == "HEAD"
  assert send[:7] == ["gcloud", "compute", "tpus", "tpu-vm", "scp", file, "verifier:genrm-jax.tar.gz"]
  assert "--worker=all" in send and "--worker=all" in unpack
  subprocess.run(["bash", "-nc", command_of(unpack)], check=True)
  assert "tar -xzf genrm-jax.tar.gz" in command_of(unpack) and command_of(unpack).endswith("worker.sh install")


@pytest.mark.parametrize("last, added", [("--workdir=/bucket/a b", ["--distributed=auto"]), ("--distributed=off", [])])
def test_run_starts_on_all_workers_that_find_each_other(last, added, bench):
  (words,) = printed(bench, "run", "r", "--", "python", "-m", "x", last)
  assert "--worker=all" in words
  start = ["bash", "genrm-jax/launch/worker.sh", "start", "r", "python", "-m", "x", last]
  assert shlex.split(command_of(words)) == [*start, *added]
