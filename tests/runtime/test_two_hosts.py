"""Two processes read only their own rows, and restore and stop together though one finds damage or is signalled."""

import json

import numpy as np
import processes
import quick_compiles
from char_model import CONFIG, mesh, params, verifier

from genrm_jax.data import packing, row_file
from genrm_jax.pytrees import KIND_VERIFY
from genrm_jax.verifiers.base import TargetCounts

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


def test_each_process_reads_its_own_rows_and_both_restore_the_same_step_and_stop_together(tmp_path):
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
