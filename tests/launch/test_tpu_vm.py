"""The commands of tpu_vm.sh."""

import json
import shlex
import subprocess
import sys
import time

import launchers
import pytest

SETTINGS = {"TPU_NAME": "verifier", "TPU_ZONE": "us-west4-a", "TPU_PROJECT": "my-project", "TPU_TYPE": "v5litepod-8"}
COMMAND = ("python", "-m", "experiments.gsm8k", "--config=c.py:gemma_2b", "--workdir=/bucket/a b")
STEPS = [
  ("create",),
  ("create", "--spot"),
  ("create", "--queued", "--spot", "--", "--network=n", "--tags=a,b"),
  ("status",),
  ("status", "--queued"),
  ("install",),
  ("mount", "gs://bucket"),
  ("run", "r", "--", *COMMAND),
  ("runs",),
  ("logs", "r"),
  ("logs", "r", "--follow", "--worker=3", "--lines=7"),
  ("stop", "r"),
  ("ssh", "--", "df", "-h"),
  ("delete",),
  ("delete", "--queued"),
]


@pytest.fixture
def bench(tmp_path):
  return launchers.Bench(tmp_path, {**SETTINGS, "TMPDIR": str(tmp_path)})


def printed(bench, *words, **settings):
  """The words of each command that would be run."""
  return [shlex.split(line) for line in launchers.dry_run(bench, "tpu_vm.sh", *words, **settings).splitlines()]


@pytest.mark.parametrize("step", STEPS, ids=" ".join)
def test_what_is_printed_is_what_is_run(step, bench):
  called = launchers.check_printed_is_run(bench.stand_in("gcloud", "git"), "tpu_vm.sh", *step)
  for words in called:
    if words[0] == "gcloud":
      assert {"--zone=us-west4-a", "--project=my-project"} <= set(words)


@pytest.mark.parametrize("step", STEPS, ids=" ".join)
def test_a_dry_run_calls_nothing(step, bench):
  bench.stand_in("gcloud", "git", "ssh", "scp", code=97)
  done = bench.run("tpu_vm.sh", *step, "--dry-run") if "--" not in step else bench.run("tpu_vm.sh", "--dry-run", *step)
  assert done.returncode == 0 and done.stdout
  assert not bench.calls()


def test_create(bench):
  where = ["--zone=us-west4-a", "--project=my-project"]
  flags = ["--accelerator-type=v5litepod-8", "--version=v2-alpha-tpuv5-lite"]
  (words,) = printed(bench, "create")
  assert words == ["gcloud", "compute", "tpus", "tpu-vm", "create", "verifier", *flags, *where]
  assert printed(bench, "create", "--spot") == [[*words[:8], "--spot", *where]]
  (words,) = printed(bench, "create", "--queued", "--spot", "--", "--network=n")
  assert words[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "verifier"]
  assert {"--runtime-version=v2-alpha-tpuv5-lite", "--node-id=verifier", "--spot", "--network=n"} <= set(words)
  assert not any(word.startswith("--version") for word in words)


@pytest.mark.parametrize(
  "accelerator, runtime",
  [
    ("v3-8", "tpu-ubuntu2204-base"),
    ("v4-32", "tpu-ubuntu2204-base"),
    ("v5litepod-64", "v2-alpha-tpuv5-lite"),
    ("v5p-16", "v2-alpha-tpuv5"),
    ("v6e-8", "v2-alpha-tpuv6e"),
  ],
)
def test_the_software_goes_with_the_accelerator(accelerator, runtime, bench):
  (words,) = printed(bench, "create", f"--type={accelerator}")
  assert f"--accelerator-type={accelerator}" in words and f"--version={runtime}" in words
  (words,) = printed(bench, "create", f"--type={accelerator}", TPU_RUNTIME="other")
  assert "--version=other" in words


def test_an_unknown_accelerator_needs_its_software(bench):
  message = launchers.error_of(bench.run("tpu_vm.sh", "create", "--type=v9-8"))
  assert "--runtime=" in message and "TPU_RUNTIME" in message
  assert "--version=x" in printed(bench, "create", "--type=v9-8", "--runtime=x")[0]


def test_options_go_before_the_environment(bench):
  (words,) = printed(bench, "delete", "--name=other", "--zone=z", "--project=p")
  assert words == ["gcloud", "compute", "tpus", "tpu-vm", "delete", "other", "--quiet", "--zone=z", "--project=p"]


def test_the_queue_lets_its_machine_go(bench):
  (words,) = printed(bench, "delete", "--queued")
  assert words[3:6] == ["queued-resources", "delete", "verifier"] and {"--force", "--quiet"} <= set(words)


def test_install_sends_what_is_committed_to_all_workers(bench):
  archive, send, unpack = printed(bench, "install")
  (file,) = (word.removeprefix("--output=") for word in archive if word.startswith("--output="))
  assert archive[:4] == ["git", "-C", str(launchers.ROOT), "archive"] and archive[-1] == "HEAD"
  assert send[:7] == ["gcloud", "compute", "tpus", "tpu-vm", "scp", file, "verifier:genrm-jax.tar.gz"]
  assert "--worker=all" in send and "--worker=all" in unpack
  (text,) = (word.removeprefix("--command=") for word in unpack if word.startswith("--command="))
  subprocess.run(["bash", "-nc", text], check=True)
  assert "tar -xzf genrm-jax.tar.gz" in text and text.endswith("worker.sh install")


def test_a_run_is_told_to_find_the_other_hosts(bench):
  def command_of(*words):
    (line,) = printed(bench, "run", "r", "--", *words)
    assert "--worker=all" in line
    (text,) = (word.removeprefix("--command=") for word in line if word.startswith("--command="))
    return shlex.split(text)

  start = ["bash", "genrm-jax/launch/worker.sh", "start", "r"]
  assert command_of(*COMMAND) == [*start, *COMMAND, "--distributed=auto"]
  assert command_of(*COMMAND, "--distributed=off") == [*start, *COMMAND, "--distributed=off"]


@pytest.mark.parametrize("missing", ["TPU_NAME", "TPU_ZONE", "TPU_PROJECT"])
@pytest.mark.parametrize("step", [("create",), ("install",), ("run", "r", "--", "true"), ("delete",)], ids=" ".join)
def test_a_missing_setting_is_named(step, missing, bench):
  bench.stand_in("gcloud", "git")
  message = launchers.error_of(bench.run("tpu_vm.sh", *step, **{missing: ""}))
  option = "--" + missing.removeprefix("TPU_").lower() + "="
  assert missing in message and option in message
  assert not any(other in message for other in SETTINGS if other != missing)
  assert not bench.calls()


def test_all_missing_settings_are_named_at_once(tmp_path):
  message = launchers.error_of(launchers.Bench(tmp_path).run("tpu_vm.sh", "create"))
  assert all(name in message for name in ("TPU_NAME", "TPU_ZONE", "TPU_PROJECT"))
  assert "TPU_TYPE" in launchers.error_of(launchers.Bench(tmp_path, SETTINGS).run("tpu_vm.sh", "create", TPU_TYPE=""))


@pytest.mark.parametrize(
  "words, told",
  [
    (("run",), "run RUN"),
    (("run", "r"), "--"),
    (("run", "a b", "--", "true"), "a b"),
    (("run", "../r", "--", "true"), "../r"),
    (("run", "r", "python", "-m", "x"), "-m"),
    (("run", "r", "--config=x"), "--config"),
    (("logs", "r", "--lines"), "--lines="),
    (("mount",), "mount BUCKET"),
    (("ssh", "df"), "ssh"),
    (("ssh",), "--"),
    (("delete", "other"), "delete"),
  ],
)
def test_wrong_words_end_with_one_message(words, told, bench):
  bench.stand_in("gcloud", "git")
  assert told in launchers.error_of(bench.run("tpu_vm.sh", *words))
  assert not bench.calls()


def test_a_run_from_start_to_stop_on_two_workers(bench):
  bench.workers()
  words = ["it's", 'a "b"', "$HOME `id` \\", "", "* ?", "a;b\nc"]
  code = "import json, sys, time; print(json.dumps(sys.argv[1:]), flush=True); time.sleep(60)"
  started = bench.run("tpu_vm.sh", "run", "r", "--", sys.executable, "-c", code, *words)
  assert started.returncode == 0, started.stderr
  try:
    for worker in ("0", "1"):
      end = time.monotonic() + 30
      while "]\n" not in bench.log(worker, "r"):
        assert time.monotonic() < end
        time.sleep(0.02)
      assert json.loads(bench.log(worker, "r").splitlines()[-1]) == [*words, "--distributed=auto"]
    assert bench.run("tpu_vm.sh", "runs").stdout.count(" r: running since") == 2
    assert bench.run("tpu_vm.sh", "run", "r", "--", "true").returncode == 1  # it runs already
    assert "distributed=auto" in bench.run("tpu_vm.sh", "logs", "r", "--worker=1", "--lines=1").stdout
  finally:
    stopped = bench.run("tpu_vm.sh", "stop", "r")
  assert stopped.stdout.count(" r: ended with 143") == 2
  assert bench.run("tpu_vm.sh", "ssh", "--worker=0", "--", "echo", "it's").stdout == "it's\n"


def test_gcloud_itself_knows_every_flag(bench, tmp_path):
  lines = [line for step in STEPS for line in launchers.dry_run(bench, "tpu_vm.sh", *step).splitlines()]
  commands = [line for line in lines if line.startswith("gcloud ")]
  wrong = commands[0].replace("--zone=", "--zone-of=")  # or it might say nothing of anything
  (refused,) = launchers.refused_by_gcloud([*commands, wrong], tmp_path)
  assert refused.startswith(wrong)
