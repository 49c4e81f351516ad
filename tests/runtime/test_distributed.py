"""Processes that find each other, or say who is missing; what one knows, all get."""

import concurrent.futures
import signal
import socket
import time

import processes
import pytest

from genrm_jax.runtime import distributed, rendezvous
from genrm_jax.runtime.errors import UserError


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"auto": True, "num_processes": 2, "coordinator": "a:1"}, "leave them out"),
    ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "--process_id=2 of --num_processes=2"),
    ({"num_processes": 0}, "--num_processes=0"),
    ({"num_processes": 2}, "belong together"),
    ({"coordinator": "a:1"}, "belong together"),
    ({"timeout_s": 0}, "must be 1 or more, not 0"),
  ],
)
def test_settings_that_cannot_be(settings, message):
  with pytest.raises(UserError, match=message):
    distributed.Settings(**settings)


def test_no_cluster_is_an_error_with_the_remedy(monkeypatch):
  for name in ("SLURM_JOB_ID", "OMPI_MCA_orte_hnp_uri", "TPU_SKIP_MDS_QUERY"):
    monkeypatch.delenv(name, raising=False)
  with pytest.raises(UserError, match=r"found no cluster .* --coordinator=HOST:PORT"):
    distributed.start(distributed.Settings(auto=True))


def test_one_process_asks_nobody():
  distributed.start(distributed.Settings())
  assert (distributed.num_processes(), distributed.process_index(), distributed.is_main()) == (1, 0, True)
  assert distributed.share_out(lambda index: [i * i for i in index], 4) == [0, 1, 4, 9]
  assert distributed.exchange("a") == ["a"]
  assert distributed.from_main(lambda: 3) == 3
  distributed.check_same("it", "a")
  distributed.barrier()


# --- the roll call


def _call(port, process_id, num_processes=3, timeout_s=2.0):
  """What a process learns: "" or the error."""
  try:
    rendezvous.wait_for_all(f"localhost:{port}", num_processes, process_id, timeout_s)
  except UserError as e:
    return str(e)
  return ""


def _calls(ids, before=lambda port: None, **settings):
  port = processes.free_port()
  with concurrent.futures.ThreadPoolExecutor(len(ids) + 1) as pool:
    early = pool.submit(before, port)
    answers = list(pool.map(lambda i: _call(port, i, **settings), ids))
    early.result()
  return answers


def test_all_go_on_when_all_are_there():
  assert _calls([2, 1, 0], timeout_s=20) == ["", "", ""]


def test_those_that_came_learn_who_did_not():
  for answer in _calls([0, 2]):
    assert "2 of 3 processes were seen; missing: 1. Check that the same command runs on every host" in answer


def test_two_with_one_number_are_named():
  for answer in _calls([0, 1, 1], timeout_s=20):
    assert "two processes call themselves 1" in answer


def test_nobody_listens():
  (answer,) = _calls([1], timeout_s=1)
  assert "process 1 does not reach process 0 (Connection refused). Check that it runs, --coordinator" in answer


def test_a_port_that_is_taken():
  with socket.socket() as taken:
    taken.bind(("", 0))
    taken.listen()
    assert f"cannot listen at port {taken.getsockname()[1]}" in _call(taken.getsockname()[1], 0)


@pytest.mark.parametrize("coordinator", ["localhost", "localhost:", ":80", "a:b"])
def test_a_coordinator_is_a_host_and_a_port(coordinator):
  with pytest.raises(UserError, match=f"--coordinator={coordinator} is not HOST:PORT"):
    rendezvous.wait_for_all(coordinator, 2, 0, 1)


def test_strangers_are_not_counted():
  def knock(port):
    for _ in range(40):
      try:
        with socket.create_connection(("localhost", port), timeout=1) as s:
          s.sendall(b"GET / HTTP/1.1\n")
          return
      except OSError:
        time.sleep(0.05)

  assert _calls([0, 1, 2], before=knock, timeout_s=20) == ["", "", ""]


# --- two real processes

_TALK = """
import os
import signal
import sys
import time

import numpy as np
from genrm_jax import distributed
from genrm_jax.runtime.errors import UserError

def refused(call):
  try:
    call()
  except UserError as e:
    return str(e)
  return "nothing was refused"

port, me = int(sys.argv[1]), int(sys.argv[2])
distributed.start(distributed.Settings(False, f"localhost:{port}", 2, me, 30))

def fail():
  assert distributed.is_main(), "only process 0 may be here"
  raise UserError("no such file")

large = np.arange(700_000 + me)
print(distributed.process_index(), distributed.num_processes())
print([int(a.sum()) for a in distributed.exchange(large)])
print(distributed.from_main(lambda: f"from {me}"), refused(lambda: distributed.from_main(fail)))
print(distributed.share_out(lambda index: [(i, me) for i in index], 5), distributed.share_out(lambda index: [], 0))
print(refused(lambda: distributed.check_same("the config", "a" if me else "b")))
distributed.check_same("the config", "a")
distributed.barrier()
if sys.argv[3] == "lose" and me == 1:
  distributed.leave(1)
if sys.argv[3] == "stop":
  with distributed.sigterm_remembered():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.2)
  print("still there", flush=True)
  os.kill(os.getpid(), signal.SIGTERM)
print("at the end", flush=True)
distributed.barrier()
"""


def _talk(how):
  port = processes.free_port()
  return processes.finish(processes.start([["-c", _TALK, port, i, how] for i in range(2)]), timeout=120)


def test_two_processes_know_the_same():
  (code, first, error), (other_code, second, other_error) = _talk("stay")
  assert (code, other_code) == (0, 0), error + other_error
  sums = [n * (n - 1) // 2 for n in (700_000, 700_001)]
  shared = [(0, 0), (1, 1), (2, 0), (3, 1), (4, 0)]
  for me, told in enumerate((first, second)):
    assert told.splitlines() == [
      f"{me} 2",
      str(sums),
      "from 0 no such file",
      f"{shared} []",
      "the config of process 1 differs from that of process 0: give all the same",
      "at the end",
    ]


def test_sigterm_ends_a_process_that_does_not_train():
  for code, told, error in _talk("stop"):
    assert code == -signal.SIGTERM, error
    assert told.splitlines()[-1] == "still there"


def test_nobody_waits_for_a_process_that_is_gone():
  (code, _, error), (other_code, *_) = _talk("lose")
  assert other_code == 1
  assert code not in (0, 1) and "another task died" in error
