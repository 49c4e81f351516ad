"""The gcloud commands of tpu_vm.sh."""

import shlex
import subprocess

import launchers
import pytest


@pytest.fixture
def bench(tmp_path):
  return launchers.bench_of(tmp_path, "tpu_vm.sh")


def printed(bench, *words, **settings):
  return [shlex.split(line) for line in bench.dry_run("tpu_vm.sh", *words, **settings).splitlines()]


def command_of(words):
  (text,) = (word.removeprefix("--command=") for word in words if word.startswith("--command="))
  return text


@pytest.mark.parametrize(
  "words, called, flags",
  [
    (("create",), "tpu-vm create verifier", {"--version=v2-alpha-tpuv5-lite"}),
    (("create", "--spot", "--type=v5p-16"), "tpu-vm create verifier", {"--spot", "--version=v2-alpha-tpuv5"}),
    (("create", "--type=v4-32", "--runtime=other"), "tpu-vm create verifier", {"--version=other"}),
    (
      ("create", "--queued", "--spot", "--", "--network=n"),
      "queued-resources create verifier",
      {"--runtime-version=v2-alpha-tpuv5-lite", "--node-id=verifier", "--spot", "--network=n"},
    ),
    (("delete", "--name=other", "--zone=z"), "tpu-vm delete other", {"--zone=z"}),  # options beat the environment
    (("delete", "--queued"), "queued-resources delete verifier", {"--force"}),
  ],
)
def test_create_and_delete(words, called, flags, bench):
  (found,) = printed(bench, *words)
  assert found[:6] == ["gcloud", "compute", "tpus", *called.split()] and flags <= set(found)


def test_install_sends_the_commit_to_all_workers(bench):
  archive, send, unpack = printed(bench, "install")
  (file,) = (word.removeprefix("--output=") for word in archive if word.startswith("--output="))
  assert archive[:4] == ["git", "-C", str(launchers.ROOT), "archive"] and archive[-1] == "HEAD"
  assert send[4:7] == ["scp", file, "verifier:genrm-jax.tar.gz"]
  assert "--worker=all" in send and "--worker=all" in unpack
  subprocess.run(["bash", "-nc", command_of(unpack)], check=True)
  assert "tar -xzf genrm-jax.tar.gz" in command_of(unpack) and command_of(unpack).endswith("worker.sh install")


@pytest.mark.parametrize("last, added", [("--workdir=/bucket/a b", ["--distributed=auto"]), ("--distributed=off", [])])
def test_run_starts_on_all_workers_that_find_each_other(last, added, bench):
  (words,) = printed(bench, "run", "r", "--", "python", "-m", "x", last)
  assert "--worker=all" in words
  start = ["bash", "genrm-jax/launch/worker.sh", "start", "r", "python", "-m", "x", last]
  assert shlex.split(command_of(words)) == [*start, *added]
