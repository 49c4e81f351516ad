"""Startup of many processes, and what they exchange."""

import concurrent.futures
import json
import signal
import socket

import processes
import pytest

from genrm_jax.runtime import distributed, rendezvous
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


# Rendezvous. Callers are queued in the backlog before process 0 calls the roll, so that no result depends on timing.


def roll_call(greetings, num_processes, timeout_s=60.0):
  """Returns what process 0 finds wrong, and the answer to each greeting (b"": the caller stays silent)."""
  with rendezvous.listen(0, len(greetings) + num_processes) as server:
    address = "localhost", server.getsockname()[1]
    callers = [socket.create_connection(address, timeout=60) for _ in greetings]
    for caller, greeting in zip(callers, greetings, strict=True):
      caller.sendall(greeting)
    problem = rendezvous.call_roll(server, num_processes, timeout_s)
  answers = [caller.makefile().readline().strip() for caller in callers]
  for caller in callers:
    caller.close()
  return problem, answers


def test_all_processes_join():
  port = processes.free_port()
  with concurrent.futures.ThreadPoolExecutor(3) as pool:
    list(pool.map(lambda i: rendezvous.wait_for_all(f"localhost:{port}", 3, i, 120), (2, 1, 0)))


@pytest.mark.parametrize(
  ("greetings", "message"),
  [([b"2\n"], "missing: 1, 3"), *((wrong, "--process_id") for wrong in ([b"1\n", b"1\n"], [b"4\n"], [b"0\n"]))],
)
def test_all_callers_learn_what_is_wrong(greetings, message):
  problem, answers = roll_call(greetings, num_processes=4, timeout_s=1.0 if "missing" in message else 60.0)
  assert message in problem and answers == [problem] * len(greetings)


def test_strangers_are_ignored(monkeypatch):
  monkeypatch.setattr(rendezvous, "_SECONDS_FOR_GREETING", 0.1)
  problem, answers = roll_call([b"GET / HTTP/1.1\n", b"", b"2\n", b"1\n"], 3)
  assert problem == "" and answers == ["", "", "all", "all"]


@pytest.mark.parametrize("coordinator", ["localhost", "localhost:", ":80", "a:b"])
def test_malformed_coordinator(coordinator):
  with pytest.raises(UserError, match=f"--coordinator={coordinator} "):
    rendezvous.wait_for_all(coordinator, 2, 0, 1)


def test_unusable_port():
  with socket.socket() as taken:
    taken.bind(("", 0))
    port = taken.getsockname()[1]
    with pytest.raises(UserError, match="process 1 cannot reach process 0"):  # nothing listens yet
      rendezvous.wait_for_all(f"localhost:{port}", 3, 1, 0.1)
    taken.listen()
    with pytest.raises(UserError, match=f"port {port}.*--coordinator"):
      rendezvous.wait_for_all(f"localhost:{port}", 3, 0, 1)


# Two processes. Each writes what it learned to a file of its own: native libraries share stdout.

_CHILD = """
import json, os, pathlib, signal, sys, time
import numpy as np
from genrm_jax.runtime import distributed
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
  "sums": [int(a.sum()) for a in distributed.exchange(np.arange(700_000 + process_id))],
  "from_main": distributed.from_main(lambda: f"from {process_id}"),
  "failure": error_of(distributed.from_main, fail),
  "different": error_of(distributed.check_same, "the config", str(process_id)),
  "same": error_of(distributed.check_same, "the config", "a"),
}
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
"""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
  """Two processes for each action, and their folder. They mostly wait, so they do it side by side."""
  started = {}
  for action in ("stay", "leave", "stop", "lose"):
    port, folder = processes.free_port(), tmp_path_factory.mktemp(action)
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
    assert "process 1" in learned.pop("different")
    assert learned == {"from_main": "from 0", "failure": "no such file", "same": None}


def test_processes_that_leave_together_all_get_to_report(pairs):
  started, folder = pairs["leave"]
  assert [code for code, *_ in processes.finish(started)] == [1, 1]
  assert len(list(folder.iterdir())) == 2


def test_sigterm_ends_a_process_outside_of_training(pairs):
  started, folder = pairs["stop"]
  processes.wait_for(lambda: all((folder / f"ready{i}").exists() for i in range(2)), started)
  for process in reversed(started):  # process 0 last: the other would not survive it
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == -signal.SIGTERM


def test_lost_process_ends_the_other(pairs):
  (code, *_), (lost_code, *_) = processes.finish(pairs["lose"][0])
  assert lost_code == 1 and code not in (0, 1)
