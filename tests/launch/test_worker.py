"""Background runs with real processes and signals, on one machine and on two simulated workers."""

import json
import os
import shlex
import shutil
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
SAVING, READY = (sys.executable, "-c", SAVE), '\n["ready"'


# A gcloud that runs the command of `ssh` for workers 0 and 1, in a home of its own.
SSH = """#!/bin/bash
for word; do
  case $word in --worker=*) workers=${word#*=} ;; --command=*) command=${word#*=} ;; esac
done
for i in ${workers/all/0 1}; do cd "$HOME/$i" && bash -c "$command" || code=$?; done
exit $code
"""


@pytest.fixture
def worker(tmp_path):

  def call(*words):
    return launchers.run(["bash", str(tmp_path / "genrm-jax/launch/worker.sh"), *words], tmp_path)

  shutil.copytree(launchers.LAUNCH, tmp_path / "genrm-jax/launch")
  call.logs = tmp_path / "genrm-jax/runs/logs"
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
  assert "stop it first" in worker("start", "a", "true").stderr
  stopped = worker("stop", "a")
  assert stopped.returncode == 0 and "ended with 143" in stopped.stdout and "saved\n" in log.read_text()

  assert worker("start", "a", "sh", "-c", "exit 3").returncode == 0
  wait_for(has(worker.logs / "a.exit", "3\n"))
  assert worker("status", "a").stdout.endswith(" a: ended with 3\n")
  assert "ended with 3" in worker("stop", "a").stdout  # nothing to stop
  assert "saved\n" in log.read_text()  # logs of later starts are appended


def test_mistakes_are_refused_and_only_experiment_and_workdir_are_logged(worker, tmp_path):
  before = sorted(tmp_path.rglob("*"))
  for words in ("start ../../r true", "log ../r", "stop ../r", "status ../r", "start 'a b' true", "log", "mount -o"):
    done = worker(*shlex.split(words))
    assert done.returncode == 1 and not done.stdout and done.stderr.startswith("error: ")
  for words in (("stop", "r", "a[$(touch ../x)]"), ("install", "tpu] x"), ("log", "r", "/etc/passwd")):
    assert f"error: {words[-1]} is not" in worker(*words).stderr
  assert sorted(tmp_path.rglob("*")) == before
  for run, workdir in ("a", "--workdir='gs://b/r 1'"), ("b", "--workdir 'gs://b/r 1'"):
    words = f"start {run} env TOKEN=secret python -m experiments.gsm8k --config=c:secret {workdir}"
    assert worker(*shlex.split(words)).returncode == 0
    logged = (worker.logs / f"{run}.log").read_text()
    assert "experiments.gsm8k" in logged and "gs://b/r 1" in logged and "secret" not in logged


def test_killed_run_and_one_that_ignores_sigterm(worker):
  worker("start", "a", *SAVING)
  pid = worker.logs / "a.pid"
  os.killpg(int(pid.read_text()), signal.SIGKILL)
  wait_for(lambda: "running" not in worker("status", "a").stdout)
  assert " a: lost" in worker("status", "a").stdout
  pid.write_text(str(os.getpid()))  # after a reboot the number may belong to another process
  assert " a: lost" in worker("status", "a").stdout
  assert worker("start", "a", "true").returncode == 0

  worker("start", "b", "sh", "-c", "trap '' TERM; echo ready; while :; do sleep 1; done")
  wait_for(has(worker.logs / "b.log", "\nready\n"))
  stopped = worker("stop", "b", "1")
  assert stopped.returncode == 1 and "running" in stopped.stdout and "kill -KILL" in stopped.stderr


def test_tpu_launcher_starts_and_stops_two_workers(tmp_path):
  bench = launchers.Bench(tmp_path, HOME=str(tmp_path), **launchers.SETTINGS)
  bench.program("gcloud", SSH)
  homes = [shutil.copytree(launchers.LAUNCH, tmp_path / i / "genrm-jax/launch").parent for i in ("0", "1")]
  logs = [home / "runs/logs/r.log" for home in homes]
  assert bench.run("tpu_vm.sh", "run", "r", "--", *SAVING, *launchers.ODD_WORDS).returncode == 0
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
