"""The lock on a workdir, between processes and, by made-up owners, between machines."""

import json
import os
import signal
import threading
import time

import gcs_emulator
import processes
import pytest
from etils import epath

from genrm_jax.runtime import lock, owner
from genrm_jax.runtime.errors import UserError

# Many processes start at once. Each says whether it got the lock; the one that did keeps it until all have answered.
_RACE = """
import os, sys
from etils import epath
from genrm_jax.runtime import lock
from genrm_jax.runtime.errors import UserError

lock._STALE_S, lock._BEAT_S = 3.0, 0.2
for path in sys.argv[2:]:
  file = epath.Path(path) / lock.NAME
  if path.endswith("/unnamed"):  # its owner was killed before it could write who it is
    file.parent.mkdir(exist_ok=True)
    file.write_text("{}" if "://" in path else "")
  (begin, go), (answers, answer), (until, end) = os.pipe(), os.pipe(), os.pipe()
  children = []
  for _ in range(int(sys.argv[1])):
    if not (pid := os.fork()):
      os.close(go), os.close(end)
      os.read(begin, 1)
      try:
        with lock.hold(epath.Path(path)):
          os.write(answer, b"+")
          os.read(until, 1)
      except UserError as e:
        os.write(answer, b"-" if " is in use by pid " in str(e) else b"?")
      os._exit(0)
    children.append(pid)
  os.close(go)
  print(b"".join(sorted(os.read(answers, 1) for _ in children)).decode())
  os.close(end)
  assert not any(os.waitpid(pid, 0)[1] for pid in children) and not file.exists()
"""
_HOLD = """
import sys, time
from etils import epath
from genrm_jax.runtime import lock

with lock.hold(epath.Path(sys.argv[1])):
  (epath.Path(sys.argv[1]) / "held").touch()
  time.sleep(600)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  monkeypatch.setattr(lock, "_BEAT_S", 0.05)
  monkeypatch.setattr(lock, "_STALE_S", 1.0)


def left_by(path, **changes):
  found = {**owner.this_process(), "beat": 3, **changes}
  path.mkdir(exist_ok=True)
  (path / lock.NAME).write_text(json.dumps(found))
  return found


def error_of(path):
  with pytest.raises(UserError) as e, lock.hold(epath.Path(path)):
    pass
  return str(e.value)


ELSEWHERE = {"machine": "of another", "host": "elsewhere", "since": "2199-01-01 00:00:00 UTC"}


def test_exactly_one_gets_it(tmp_path):
  pytest.importorskip("gcsfs")
  left_by(tmp_path / "dead", pid=2**22 + 1)
  left_by(tmp_path / "silent", **ELSEWHERE)
  folders, objects = [tmp_path / name for name in ("dead", "silent", "unnamed", "new/w")], "gs://bucket/unnamed"
  with gcs_emulator.running() as emulator:
    started = processes.start(
      [["-c", _RACE, 20, *folders], ["-c", _RACE, 5, objects, objects + "/w"]], **emulator.environ
    )
    (code, out, error), (gs_code, gs_out, gs_error) = processes.finish(started)
  assert (code, out) == (0, 4 * ("+" + 19 * "-" + "\n")), error
  assert (gs_code, gs_out) == (0, 2 * "+----\n"), gs_error


def test_processes_that_end(tmp_path):
  for number in (signal.SIGTERM, signal.SIGKILL):
    (holder,) = processes.start([["-c", _HOLD, tmp_path]])
    processes.wait_for((tmp_path / "held").exists, [holder])
    assert f"{tmp_path} is in use by pid {holder.pid} on host {os.uname().nodename} (user " in error_of(tmp_path)
    holder.send_signal(number)
    assert holder.wait(60) == -number and (tmp_path / lock.NAME).exists() == (number == signal.SIGKILL)
    processes.finish([holder])
    (tmp_path / "held").unlink()
  start = time.monotonic()
  with lock.hold(epath.Path(tmp_path)):
    assert time.monotonic() - start < 0.5
    assert "is in use by pid" in error_of(tmp_path)
  with pytest.raises(ZeroDivisionError), lock.hold(epath.Path(tmp_path)):
    _ = 1 / 0
  left_by(tmp_path, started="1")  # the number of a process that has ended was reused
  with lock.hold(epath.Path(tmp_path)):
    lock.check()
  assert not list(tmp_path.iterdir())


def test_another_machine(tmp_path):
  """Its counter decides, whatever its clock says."""
  alive, left = threading.Event(), left_by(tmp_path, **ELSEWHERE)

  def beat():
    while not alive.wait(0.3):
      left_by(tmp_path, **{**left, "beat": time.monotonic_ns()})

  thread = threading.Thread(target=beat)
  thread.start()
  assert "on host elsewhere" in error_of(tmp_path)
  alive.set()
  thread.join()
  start = time.monotonic()
  with lock.hold(epath.Path(tmp_path)):
    assert time.monotonic() - start > 0.9
    beats = [json.loads((tmp_path / lock.NAME).read_text())["beat"] for _ in range(2) if not time.sleep(0.3)]
    assert beats[1] > beats[0] > lock._FIRST_BEAT


@pytest.mark.parametrize("by", ["taken over by pid 7 on host elsewhere", "removed"])
def test_a_lost_lock_ends_the_run(by, tmp_path, monkeypatch):
  def lose():
    if by == "removed":
      (tmp_path / lock.NAME).unlink()
    else:
      left_by(tmp_path, pid=7, token="another", **ELSEWHERE)

  wrote = []
  with pytest.raises(UserError, match=by), lock.hold(epath.Path(tmp_path)):
    lose()
    for _ in range(600):
      try:
        time.sleep(0.1)
      except Exception:
        wrote.append("more")
    wrote.append("at the end")
  monkeypatch.setattr(lock, "_BEAT_S", 60)
  lock_file = tmp_path / lock.NAME
  lock_file.unlink(missing_ok=True)
  with pytest.raises(UserError, match=by), lock.hold(epath.Path(tmp_path)):
    lock.check()
    lose()
    lock.check()
    wrote.append("after the check")
  assert not wrote and lock_file.exists() == (by != "removed")
