"""A run in the background of one machine, with real processes and real signals."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import launchers
import pytest

# Saves for a while when it is told to end, as a training does.
SAVES = """
import signal, sys, time
def save(*_):
  time.sleep(0.3)
  print("saved", flush=True)
  sys.exit(143)
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.fixture
def worker(tmp_path):
  """Calls worker.sh of a copy of launch/; what still runs in the end is killed."""
  folder = tmp_path / "genrm-jax"
  (folder / "launch").mkdir(parents=True)
  for script in ("common.sh", "worker.sh"):
    (folder / "launch" / script).write_bytes((launchers.LAUNCH / script).read_bytes())

  def call(*words: str) -> subprocess.CompletedProcess:
    command = ["bash", str(folder / "launch" / "worker.sh"), *words]
    return subprocess.run(command, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)

  call.logs = folder / "runs" / "logs"
  yield call
  for path in call.logs.glob("*.pid"):
    if "running" in call("status", path.stem).stdout:
      os.killpg(int(path.read_text()), signal.SIGKILL)


def wait_for(path: pathlib.Path, text: str = "") -> None:
  end = time.monotonic() + 30
  while not (path.exists() and text in path.read_text()):
    assert time.monotonic() < end, f"{path} never said {text!r}"
    time.sleep(0.02)


def test_a_run_ends_by_sigterm_and_is_started_again(worker):
  assert worker("status").stdout == ""
  assert worker("start", "a", sys.executable, "-c", SAVES).returncode == 0
  wait_for(worker.logs / "a.log", "ready\n")
  assert " a: running since" in worker("status").stdout
  again = worker("start", "a", "true")
  assert again.returncode == 1 and "stop it first" in again.stderr

  stopped = worker("stop", "a")
  assert stopped.returncode == 0 and "ended with 143" in stopped.stdout and "goes on" in stopped.stdout
  assert "saved\n" in (worker.logs / "a.log").read_text()

  assert worker("start", "a", "echo", "goes on").returncode == 0
  wait_for(worker.logs / "a.exit", "0")
  assert worker("status", "a").stdout.endswith(" a: ended with 0\n")
  assert (worker.logs / "a.log").read_text().count("ready\n") == 1  # the log of the first start is still there


def test_words_arrive_as_they_are(worker):
  words = ["it's", 'a "b"', "$HOME `id` \\", "", "* ?", "a;b\nc"]
  worker("start", "a", sys.executable, "-c", "import json, sys; print(json.dumps(sys.argv[1:]))", *words)
  wait_for(worker.logs / "a.exit", "0")
  assert json.loads((worker.logs / "a.log").read_text().splitlines()[-1]) == words


def test_the_exit_code_is_kept(worker):
  worker("start", "a", "sh", "-c", "exit 3")
  wait_for(worker.logs / "a.exit", "\n")
  assert worker("status", "a").stdout.endswith(" a: ended with 3\n")
  assert "ended with 3" in worker("stop", "a").stdout  # there is nothing to stop


def test_a_run_that_went_with_its_machine(worker):
  worker("start", "a", "sleep", "60")
  pid = worker.logs / "a.pid"
  os.killpg(int(pid.read_text()), signal.SIGKILL)
  end = time.monotonic() + 30
  while "running" in (told := worker("status", "a").stdout):
    assert time.monotonic() < end
  assert "gone without a word" in told
  pid.write_text(str(os.getpid()))  # after a restart the number is another process's
  assert "gone without a word" in worker("status", "a").stdout
  assert worker("start", "a", "true").returncode == 0


def test_a_run_that_does_not_end_is_told(worker):
  worker("start", "a", "sh", "-c", "trap '' TERM; echo ready; while :; do sleep 1; done")
  wait_for(worker.logs / "a.log", "\nready\n")
  stopped = worker("stop", "a", "1")
  assert stopped.returncode == 1 and "running" in stopped.stdout and "kill -KILL" in stopped.stderr


def test_exec_finds_the_environment_first(worker):
  program = worker.logs.parents[1] / ".venv" / "bin" / "python"
  program.parent.mkdir(parents=True)
  program.write_text("#!/bin/sh\necho of the environment")
  program.chmod(0o755)
  assert worker("exec", "python").stdout == "of the environment\n"


@pytest.mark.parametrize("words", [("start",), ("start", "a"), ("stop",), ("log",), ("mount",)])
def test_missing_words_are_named(words, worker):
  launchers.error_of(worker(*words))
