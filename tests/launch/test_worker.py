"""Background runs with real processes and signals, on one machine and on two simulated workers."""

import json
import os
import shlex
import signal
import sys

import launchers
import pytest
from processes import wait_for

# Saves on SIGTERM, as a training does.
SAVE = """
import json, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.3), print("saved", flush=True), sys.exit(143)))
print(json.dumps(["ready", *sys.argv[1:]]), flush=True)
while True:
  signal.pause()
"""
SAVING = (sys.executable, "-c", SAVE)
READY = '\n["ready"'


@pytest.fixture
def worker(tmp_path):
  """Calls a copy of worker.sh; kills what still runs afterwards."""

  def call(*words):
    return launchers.run(["bash", str(tmp_path / "genrm-jax/launch/worker.sh"), *words], tmp_path)

  call.logs = launchers.install_worker(tmp_path)
  yield call
  for path in call.logs.glob("*.pid"):
    if "running" in call("status", path.stem).stdout:
      os.killpg(int(path.read_text()), signal.SIGKILL)


def has(path, text):
  return lambda: path.exists() and text in path.read_text()


def test_stop_and_start_again(worker):
  log = worker.logs / "a.log"
  assert worker("status").stdout == ""
  assert worker("start", "a", *SAVING).returncode == 0
  wait_for(has(log, READY))
  assert " a: running since" in worker("status").stdout
  again = worker("start", "a", "true")
  assert again.returncode == 1 and "stop it first" in again.stderr
  stopped = worker("stop", "a")
  assert stopped.returncode == 0 and "ended with 143" in stopped.stdout and "saved\n" in log.read_text()

  assert worker("start", "a", "sh", "-c", "exit 3").returncode == 0
  wait_for(has(worker.logs / "a.exit", "3\n"))
  assert worker("status", "a").stdout.endswith(" a: ended with 3\n")
  assert "ended with 3" in worker("stop", "a").stdout  # nothing to stop
  assert "saved\n" in log.read_text()  # logs of later starts are appended


def test_only_experiment_and_workdir_are_logged(worker):
  for i, workdir in enumerate((["--workdir=gs://b/r 1"], ["--workdir", "gs://b/r 1"])):
    command = ["env", "TOKEN=hf_secret", "python", "-m", "experiments.gsm8k", "--config=c:hf_secret", *workdir]
    assert worker("start", f"r{i}", *command).returncode == 0
    line = (worker.logs / f"r{i}.log").read_text().splitlines()[0]
    assert "experiments.gsm8k" in line and "gs://b/r 1" in line and "secret" not in line


def test_refused(worker, tmp_path):
  before = sorted(tmp_path.rglob("*"))
  for words in ("start ../../r true", "log ../r", "stop ../r", "status ../r", "start 'a b' true", "log", "mount -o"):
    done = worker(*shlex.split(words))
    assert done.returncode == 1 and not done.stdout and done.stderr.startswith("error: ")
  for words in (("stop", "r", "a[$(touch ../x)]"), ("install", "tpu] x"), ("log", "r", "/etc/passwd")):
    assert f"error: {words[-1]} is not" in worker(*words).stderr
  assert sorted(tmp_path.rglob("*")) == before


def test_killed_run(worker):
  worker("start", "a", *SAVING)
  pid = worker.logs / "a.pid"
  os.killpg(int(pid.read_text()), signal.SIGKILL)
  wait_for(lambda: "running" not in worker("status", "a").stdout)
  assert " a: lost" in worker("status", "a").stdout
  pid.write_text(str(os.getpid()))  # after a reboot the number may belong to another process
  assert " a: lost" in worker("status", "a").stdout
  assert worker("start", "a", "true").returncode == 0


def test_run_that_ignores_sigterm(worker):
  worker("start", "a", "sh", "-c", "trap '' TERM; echo ready; while :; do sleep 1; done")
  wait_for(has(worker.logs / "a.log", "\nready\n"))
  stopped = worker("stop", "a", "1")
  assert stopped.returncode == 1 and "running" in stopped.stdout and "kill -KILL" in stopped.stderr


def test_tpu_launcher_starts_and_stops_two_workers(tmp_path):
  bench = launchers.Bench(tmp_path, **launchers.SETTINGS)
  logs = [folder / "r.log" for folder in bench.workers()]
  started = bench.run("tpu_vm.sh", "run", "r", "--", *SAVING, *launchers.ODD_WORDS)
  assert started.returncode == 0, started.stderr
  try:
    for log in logs:
      wait_for(has(log, READY))
      assert json.loads(log.read_text().splitlines()[-1]) == ["ready", *launchers.ODD_WORDS, "--distributed=auto"]
    assert bench.run("tpu_vm.sh", "runs").stdout.count(" r: running since") == 2
    assert bench.run("tpu_vm.sh", "run", "r", "--", "true").returncode == 1  # already running
    assert "distributed=auto" in bench.run("tpu_vm.sh", "logs", "r", "--worker=1", "--lines=1").stdout
  finally:
    stopped = bench.run("tpu_vm.sh", "stop", "r")
  assert stopped.stdout.count(" r: ended with 143") == 2
  assert bench.run("tpu_vm.sh", "ssh", "--worker=0", "--", "echo", "it's").stdout == "it's\n"
