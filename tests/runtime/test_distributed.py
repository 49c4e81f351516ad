"""Startup of many processes, and what they exchange."""

import json
import os
import pickle
import signal
import types

import processes
import pytest

from genrm_jax.runtime import distributed, lock, owner
from genrm_jax.runtime.errors import UserError


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"auto": True, "num_processes": 2, "coordinator": "a:1"}, "--distributed=auto"),
    ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "--process_id=2"),
    ({"num_processes": 0}, "--num_processes=0"),
    ({"num_processes": 2}, "--coordinator"),
    ({"coordinator": "a:1"}, "--num_processes"),
    ({"timeout_s": 0}, "--distributed_timeout_s"),
  ],
)
def test_invalid_settings(settings, message):
  with pytest.raises(UserError, match=message):
    distributed.Settings(**settings)


def test_missing_cluster(monkeypatch):
  for name in ("SLURM_JOB_ID", "OMPI_MCA_orte_hnp_uri", "TPU_SKIP_MDS_QUERY"):
    monkeypatch.delenv(name, raising=False)
  with pytest.raises(UserError, match="--coordinator"):
    distributed.start(distributed.Settings(auto=True))


def test_single_process():
  distributed.start(distributed.Settings())
  assert (distributed.num_processes(), distributed.process_index(), distributed.is_main()) == (1, 0, True)
  assert distributed.exchange("a") == ["a"]
  assert distributed.from_main(lambda: 3) == 3
  distributed.check_same("the config", "a")
  distributed.barrier()


def test_values_from_the_network_are_data(tmp_path, monkeypatch):
  class Attack:
    def __reduce__(self):
      return os.mkdir, (str(tmp_path / "ran"),)

  store = {"a/num_chunks": b"1", "a/0": pickle.dumps(Attack())}
  read = types.SimpleNamespace(blocking_key_value_get_bytes=lambda key, timeout_in_ms: store[key])
  monkeypatch.setattr(distributed, "_client", lambda: read)
  with pytest.raises(ValueError):
    distributed._get("a")
  assert not (tmp_path / "ran").exists()
  for value in ((1, 2), {1: "a"}, b"a"):  # JSON would not return them as they are
    with pytest.raises(TypeError):
      distributed._put("b", value)


# Two processes. Each writes what it learned to a file of its own: native libraries share stdout.

_CHILD = """
import contextlib, json, os, pathlib, signal, socket, sys, time
from genrm_jax.runtime import distributed, lock
from genrm_jax.runtime.errors import UserError

port, process_id, action, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], pathlib.Path(sys.argv[4])
if action == "lose":
  distributed._HEARTBEAT_S = 15
distributed.start(distributed.Settings(False, f"localhost:{port}", 2, process_id, 300))

def error_of(call, *args):
  try:
    call(*args)
  except UserError as e:
    return str(e)

def fail():
  assert distributed.is_main()
  raise UserError("no such file")

learned = {
  "sums": [sum(numbers) for numbers in distributed.exchange(list(range(700_000 + process_id)))],
  "from_main": distributed.from_main(lambda: f"from {process_id}"),
  "failure": error_of(distributed.from_main, fail),
  "different": error_of(distributed.check_same, "the config", str(process_id)),
  "same": error_of(distributed.check_same, "the config", "a"),
}
learned["locked"] = error_of(contextlib.ExitStack().enter_context, lock.hold(folder / "locked"))
held = contextlib.ExitStack()
held.enter_context(lock.hold(folder / "free"))
holder = json.loads((folder / "free" / lock.NAME).read_text())["pid"]
learned["holds"] = holder == os.getpid()
with socket.socket() as elsewhere:
  elsewhere.bind(("127.0.0.2", port))  # the service listens at the coordinator's address only
distributed.barrier()
if action == "lose" and process_id == 1:
  distributed.leave(1)
if action == "leave":
  time.sleep(process_id)  # process 0 would be gone before, if it did not wait
  (folder / str(process_id)).touch()
  distributed.leave(1)
if action == "stop":
  with distributed.deferred_sigterm():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.2)  # long enough to die in, if it were not deferred
(folder / str(process_id)).write_text(json.dumps(learned))
if action == "stop":
  (folder / f"ready{process_id}").touch()
  signal.pause()
distributed.barrier()
held.close()
"""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
  """Two processes for each action, and their folder. They mostly wait, so they do it side by side."""
  started = {}
  for action in ("stay", "leave", "stop", "lose"):
    port, folder = processes.free_port(), tmp_path_factory.mktemp(action)
    (folder / "locked").mkdir()
    (folder / "locked" / lock.NAME).write_text(json.dumps(owner.this_process()))
    started[action] = processes.start([["-c", _CHILD, port, i, action, folder] for i in range(2)]), folder
  yield started
  for pair, _ in started.values():
    for process in pair:
      process.kill()


def test_two_processes_agree(pairs):
  started, folder = pairs["stay"]
  for process_id, (code, _, error) in enumerate(processes.finish(started)):
    assert code == 0, error
    learned = json.loads((folder / str(process_id)).read_text())
    assert learned.pop("sums") == [n * (n - 1) // 2 for n in (700_000, 700_001)]
    assert "process 1" in learned.pop("different") and f"in use by pid {os.getpid()} " in learned.pop("locked")
    assert learned.pop("holds") == (process_id == 0)
    assert learned == {"from_main": "from 0", "failure": "no such file", "same": None}


def test_processes_that_leave_together_all_get_to_report(pairs):
  started, folder = pairs["leave"]
  assert [code for code, *_ in processes.finish(started)] == [1, 1]
  assert {"0", "1"} <= {path.name for path in folder.iterdir()}


def test_sigterm_ends_a_process_outside_of_training(pairs):
  started, folder = pairs["stop"]
  processes.wait_for(lambda: all((folder / f"ready{i}").exists() for i in range(2)), started)
  for process in reversed(started):  # process 0 last: the other would not survive it
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == -signal.SIGTERM
  assert not (folder / "free" / lock.NAME).exists()


def test_lost_process_ends_the_other(pairs):
  (code, *_), (lost_code, *_) = processes.finish(pairs["lose"][0])
  assert lost_code == 1 and code not in (0, 1)
