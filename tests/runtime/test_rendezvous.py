"""Startup of many processes: who is missing, and callers that are none of them."""

import concurrent.futures
import socket
import threading
import time

import processes
import pytest

from genrm_jax.runtime import rendezvous
from genrm_jax.runtime.errors import UserError


def roll_call(greetings, num_processes, timeout_s=60.0):
  """What process 0 finds wrong, and the lines that answer each greeting. The callers are queued before it begins."""
  with rendezvous.listen("localhost", 0, len(greetings)) as server:
    callers = [socket.create_connection(server.getsockname(), timeout=60) for _ in greetings]
    for caller, greeting in zip(callers, greetings, strict=True):
      caller.sendall(greeting)
    problem = rendezvous.call_roll(server, num_processes, timeout_s)
  answers = []
  for caller in callers:
    with caller:
      try:
        answers.append(caller.makefile().read().splitlines())
      except ConnectionError:  # dropped before all was read
        answers.append([])
  return problem, answers


def greeting(number, num_processes=3):
  return f"genrm-jax {number} of {num_processes}\n".encode()


def test_all_processes_join():
  port = processes.free_port()
  with concurrent.futures.ThreadPoolExecutor(3) as pool:
    bound = list(pool.map(lambda i: rendezvous.wait_for_all(f"localhost:{port}", 3, i, 120), (2, 1, 0)))
  assert bound[2] == f"127.0.0.1:{port}"


def test_strangers_hold_up_nobody():
  http, endless, other = b"GET / HTTP/1.1\r\n\r\n", b"x" * 100_000, b"\x80\x04K\x01.\n"
  strangers = [*[b""] * 300, http, endless, other, b"1\n", b"genrm-jax 1", greeting(1) * 2, greeting(-1), greeting("١")]
  start = time.monotonic()
  problem, answers = roll_call([*strangers, greeting(2), greeting(1)], 3)
  assert time.monotonic() - start < 5
  assert problem == "" and answers == [[]] * len(strangers) + [["joined", "all"]] * 2


def test_slow_strangers_are_dropped(monkeypatch):
  monkeypatch.setattr(rendezvous, "_SECONDS_FOR_GREETING", 0.2)
  with rendezvous.listen("localhost", 0, 2) as server, socket.create_connection(server.getsockname()) as caller:
    roll = threading.Thread(target=rendezvous.call_roll, args=(server, 2, 60.0))
    roll.start()
    with pytest.raises(ConnectionError):
      for byte in greeting(1, 2) * 100:  # each byte comes in time
        caller.sendall(bytes([byte]))
        time.sleep(0.1)
    assert rendezvous.join("localhost", server.getsockname()[1], 2, 1, 60.0) == ""
    roll.join()


@pytest.mark.parametrize("wrong", [greeting(2), greeting(3), greeting(0), greeting(1, 2)])
def test_a_wrong_number_is_refused_alone(wrong):
  problem, answers = roll_call([greeting(2), wrong, greeting(1)], 3)
  assert problem == "" and answers[::2] == [["joined", "all"]] * 2
  ((answer,),) = answers[1:2]
  assert ("--num_processes=2" if b"of 2" in wrong else "--process_id") in answer and answer.startswith("error: ")


def test_all_learn_who_is_missing():
  problem, answers = roll_call([greeting(2, 4), greeting(2, 4)], 4, timeout_s=1.0)
  assert "missing: 1, 3" in problem and "2 was used twice" in problem and answers[0] == ["joined", f"error: {problem}"]
  with rendezvous.listen("localhost", 0, 3) as server:
    with socket.create_connection(server.getsockname()) as ended:
      ended.sendall(greeting(1))
    assert "missing: 1, 2" in rendezvous.call_roll(server, 3, 0.5)


@pytest.mark.parametrize("coordinator", ["localhost", "localhost:", ":80", "a:b", "a:²", "a:65536"])
def test_malformed_coordinator(coordinator):
  with pytest.raises(UserError, match=f"--coordinator={coordinator} "):
    rendezvous.wait_for_all(coordinator, 2, 0, 1)


def test_addresses_to_listen_on(monkeypatch):
  resolved = {"here": "127.0.0.3", "debian": "127.0.1.1", "forwarded": "192.0.2.1"}
  find = socket.getaddrinfo
  monkeypatch.setattr(socket, "getaddrinfo", lambda host, *a, **k: find(resolved.get(host, host), *a, **k))
  names = {"localhost": "127.0.0.1", "127.0.0.3": "127.0.0.3", "debian": "0.0.0.0", "forwarded": "0.0.0.0"}
  for name, address in names.items():
    with rendezvous.listen(name, 0, 2) as server:
      assert server.getsockname()[0] == address
  with pytest.raises(UserError, match=r"nowhere\.invalid"):
    rendezvous.listen("nowhere.invalid", 0, 2)


def test_unusable_port(monkeypatch):
  monkeypatch.setattr(rendezvous, "_SECONDS_FOR_GREETING", 0.1)
  with socket.socket() as taken:
    taken.bind(("", 0))
    port = taken.getsockname()[1]

    def error(process_id):
      with pytest.raises(UserError) as e:
        rendezvous.wait_for_all(f"localhost:{port}", 3, process_id, 0.1)
      return str(e.value)

    assert "process 1 cannot reach process 0" in error(1)  # nothing listens yet
    taken.listen()
    assert "process 1 cannot reach process 0" in error(1)  # what listens does not answer
    assert f"port {port}" in error(0) and "--coordinator" in error(0)
