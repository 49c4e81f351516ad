"""Startup of many processes, who is missing, what they exchange, and that they read, restore and stop together."""

import concurrent.futures
import json
import os
import pickle
import signal
import socket
import threading
import time
import types
from functools import partial

import numpy as np
import processes
import pytest
import quick_compiles
from char_model import CONFIG, mesh, params, verifier
from refusals import refused

from genrm_jax.data import packing, row_file
from genrm_jax.pytrees import KIND_VERIFY
from genrm_jax.runtime import distributed, lock, owner, rendezvous
from genrm_jax.runtime.errors import UserError
from genrm_jax.verifiers.base import TargetCounts


def test_invalid_settings_and_a_missing_cluster(monkeypatch):
  settings, two = partial(partial, distributed.Settings), {"num_processes": 2, "coordinator": "a:1"}
  refused(
    ("--distributed=auto", settings(auto=True, **two)),
    ("--process_id=2", settings(process_id=2, **two)),
    ("--num_processes=0", settings(num_processes=0)),
    ("--coordinator", settings(num_processes=2)),
    ("--num_processes", settings(coordinator="a:1")),
    ("--distributed_timeout_s", settings(timeout_s=0)),
  )
  for name in ("SLURM_JOB_ID", "OMPI_MCA_orte_hnp_uri", "TPU_SKIP_MDS_QUERY"):
    monkeypatch.delenv(name, raising=False)
  refused(("--coordinator", distributed.start, distributed.Settings(auto=True)))


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
  started, folder = pairs["stop"]
  processes.wait_for(lambda: all((folder / f"ready{i}").exists() for i in range(2)), started)
  for process in reversed(started):  # process 0 last: the other would not survive it
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == -signal.SIGTERM
  assert not (folder / "free" / lock.NAME).exists()


_HOST = """
import json
import os
import pathlib
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import tiny_run
from char_model import CONFIG, verifier
from jax.sharding import NamedSharding, PartitionSpec

from genrm_jax.data import row_file
from genrm_jax.model import gemma
from genrm_jax.pytrees import TrainState
from genrm_jax.runtime import distributed, sharding
from genrm_jax.training.checkpoint import Checkpoints
from genrm_jax.verifiers.base import TargetCounts

port, me, workdir, max_targets = int(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3]), int(sys.argv[4])
distributed.start(distributed.Settings(False, f"localhost:{port}", 2, me, 30))
mesh = sharding.make_mesh(data=2, tensor=2)
everywhere, split = sharding.replicated(mesh), NamedSharding(mesh, PartitionSpec("data"))
rows, read = row_file.RowFile(workdir / "train.npy"), []


def recorded(index):
  read.append(index.tolist())
  return row_file.RowFile.take(rows, index)


rows.take = recorded
order = rows.order(0, 0, 8)
batch = sharding.read_to_global(rows.take, order, sharding.batch_sharding(mesh))
whole = jax.jit(lambda tree: tree, out_shardings=everywhere)(batch)
jax.tree.map(np.testing.assert_array_equal, jax.device_get(whole), row_file.RowFile.take(rows, order))
params = jax.jit(lambda: gemma.init(CONFIG, jax.random.key(1)), out_shardings=everywhere)()
verifier("dpo").with_reference(rows, TargetCounts(max_targets, 1), params, CONFIG, mesh, 4)


def state(step):
  w = jax.jit(lambda: jax.random.normal(jax.random.key(step), (8, 4096)), out_shardings=split)()
  return TrainState(jax.jit(lambda: jnp.int32(step), out_shardings=everywhere)(), {"w": w}, {})


def damage_step_2(folder):
  files = [p for p in (folder / "2" / "state").rglob("ocdbt.process_1/d/*") if p.is_file()]
  assert files
  for path in files:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  if folder.name == "manifest":
    (folder / "2" / "manifest" / "metadata").write_text("{")


restored_from = []
target = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state(0))
for folder in (workdir / "cut", workdir / "manifest"):
  with Checkpoints(folder) as checkpoints:
    for step in (1, 2):
      checkpoints.save(state(step), {"run": "tiny"}, 1.0 / (3 - step))
  distributed.barrier()
  distributed.from_main(lambda: damage_step_2(folder))
  with Checkpoints(folder) as checkpoints:
    restored, _ = checkpoints.restore_newest(target, {"run": "tiny"}, {})
    distributed.barrier()
    kept = sorted(p.name for p in folder.iterdir())
    checkpoints.save(state(2), {"run": "tiny"}, 0.1)
  restored_from.append([int(restored.step), kept, sorted(p.name for p in folder.iterdir() if p.name.isdecimal())])
  distributed.barrier()
print(json.dumps([order.tolist(), read, restored_from]))


class SignalledInLastSave(Checkpoints):
  def wait(self):
    if self._saving == tiny_run.NUM_STEPS and me:
      os.kill(os.getpid(), signal.SIGTERM)
    super().wait()


tiny_run.loop.Checkpoints = SignalledInLastSave
tiny_run.train(workdir / "tiny", on=mesh)
print("went on")
"""


def _pairs():
  rng, examples = np.random.default_rng(0), []
  for i in range(10):
    ids = [rng.integers(3, CONFIG.vocab_size, 6 + i % 4).tolist() for _ in range(2)]
    examples.append(packing.pair(f"{i}", *(packing.sft_example(f"{i}", x[:3], x[3:], KIND_VERIFY) for x in ids)))
  return packing.pack(examples, 16)


@pytest.mark.one_python
def test_each_process_reads_its_own_rows_and_both_restore_the_same_step_and_stop_together(pairs, tmp_path):
  """The pair that waits for a lost heartbeat waits beside this test."""
  rows, path = _pairs(), tmp_path / "train.npy"
  row_file.write(path, rows.num_rows, rows.take)
  assert rows.num_rows == 10
  env = {
    "XLA_FLAGS": f"{quick_compiles.XLA_FLAGS} --xla_force_host_platform_device_count=2",
    "PYTHONPATH": f"{processes.ROOT}:{processes.ROOT / 'tests' / 'helpers'}",
  }
  port = processes.free_port()
  started = processes.start([["-c", _HOST, port, i, tmp_path, rows.max_targets] for i in range(2)], **env)
  done = processes.finish(started, timeout=240)
  assert [code for code, _, _ in done] == [143, 143], [error for _, _, error in done]
  (order, (first, *others), restored), (same_order, (second, *more), also_restored) = (
    json.loads(out.splitlines()[-1]) for _, out, _ in done
  )
  assert order == same_order == first + second and len(first) == 4
  assert others[:3] == [[0, 1], [4, 5], [8, 9]] and more == [[2, 3], [6, 7], [-1, -1]], "of a pass over all rows"
  assert [i for index in others[3:] for i in index] == list(range(10)), "the first writes the file anew"
  want = verifier("dpo").with_reference(rows, TargetCounts(rows.max_targets, 1), params(), CONFIG, mesh(), 4)
  got = row_file.RowFile(path).take(np.arange(10))
  np.testing.assert_allclose(got.reference, want.data.reference, rtol=1e-5, atol=1e-6)
  assert (got.reference != 0).any() and not got.reference[rows.data.weights == 0].any()
  # Only the second process reads the data file that is cut.
  assert restored == also_restored == [[1, ["1", "2.damaged"], ["2"]]] * 2
  assert [error.count("/2 is damaged") for _, _, error in done] == [2, 0]


def test_lost_process_ends_the_other(pairs):
  (code, *_), (lost_code, *_) = processes.finish(pairs["lose"][0])
  assert lost_code == 1 and code not in (0, 1)


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
  problem, answers = roll_call([greeting(2, 4), greeting(2, 4)], 4, timeout_s=1.0)
  assert "missing: 1, 3" in problem and "2 was used twice" in problem and answers[0] == ["joined", f"error: {problem}"]
  with rendezvous.listen("localhost", 0, 3) as server:
    with socket.create_connection(server.getsockname()) as ended:
      ended.sendall(greeting(1))
    assert "missing: 1, 2" in rendezvous.call_roll(server, 3, 0.5)


def test_strangers_hold_up_nobody(monkeypatch):
  http, endless, other = b"GET / HTTP/1.1\r\n\r\n", b"x" * 100_000, b"\x80\x04K\x01.\n"
  strangers = [*[b""] * 300, http, endless, other, b"1\n", b"genrm-jax 1", greeting(1) * 2, greeting(-1), greeting("١")]
  start = time.monotonic()
  problem, answers = roll_call([*strangers, greeting(2), greeting(1)], 3)
  assert time.monotonic() - start < 5
  assert problem == "" and answers == [[]] * len(strangers) + [["joined", "all"]] * 2
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


@pytest.mark.parametrize("coordinator", ["localhost", "localhost:", ":80", "a:b", "a:²", "a:65536"])
def test_malformed_coordinator(coordinator):
  refused((f"--coordinator={coordinator} ", rendezvous.wait_for_all, coordinator, 2, 0, 1))


def test_addresses_to_listen_on(monkeypatch):
  resolved = {"here": "127.0.0.3", "debian": "127.0.1.1", "forwarded": "192.0.2.1"}
  find = socket.getaddrinfo
  monkeypatch.setattr(socket, "getaddrinfo", lambda host, *a, **k: find(resolved.get(host, host), *a, **k))
  names = {"localhost": "127.0.0.1", "127.0.0.3": "127.0.0.3", "debian": "0.0.0.0", "forwarded": "0.0.0.0"}
  for name, address in names.items():
    with rendezvous.listen(name, 0, 2) as server:
      assert server.getsockname()[0] == address
  refused((r"nowhere\.invalid", rendezvous.listen, "nowhere.invalid", 0, 2))


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
