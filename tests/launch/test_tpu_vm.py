"""The gcloud commands of tpu_vm.sh."""

import shlex
import subprocess

import launchers
import pytest


def printed(bench, *words, **settings):
  return [shlex.split(line) for line in bench.dry_run("tpu_vm.sh", *words, **settings).splitlines()]


@pytest.mark.parametrize(
  "words, called, flags",
  [
    (("create",), "tpu-vm create verifier", {"--version=v2-alpha-tpuv5-lite"}),
    (("create", "--spot", "--type=v5p-16"), "tpu-vm create verifier", {"--spot", "--version=v2-alpha-tpuv5"}),
    (("create", "--type=v4-32", "--runtime=other"), "tpu-vm create verifier", {"--version=other"}),
    (("create", "--queued"), "queued-resources create verifier", {"--runtime-version=v2-alpha-tpuv5-lite"}),
    (("create", "--queued", "--", "--tags=n"), "queued-resources create verifier", {"--node-id=verifier", "--tags=n"}),
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
  (command,) = (word.removeprefix("--command=") for word in unpack if word.startswith("--command="))
  subprocess.run(["bash", "-nc", command], check=True)
  assert "tar -xzf genrm-jax.tar.gz" in command and command.endswith("worker.sh install")
