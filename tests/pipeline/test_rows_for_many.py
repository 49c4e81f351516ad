"""Two processes train on one file: each reads the rows that its own devices hold, and no others."""

import json

import jax
import numpy as np
import processes
import quick_compiles
from char_model import CONFIG, verifier

from genrm_jax.data import packing, row_file
from genrm_jax.model import gemma
from genrm_jax.pytrees import KIND_VERIFY
from genrm_jax.runtime import sharding
from genrm_jax.verifiers.base import TargetCounts

_READ = """
import json
import sys

import jax
import numpy as np
from char_model import CONFIG, verifier

from genrm_jax.data import row_file
from genrm_jax.model import gemma
from genrm_jax.runtime import distributed, sharding
from genrm_jax.verifiers.base import TargetCounts

port, me, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
distributed.start(distributed.Settings(False, f"localhost:{port}", 2, me, 30))
mesh = sharding.make_mesh(data=2, tensor=2)
everywhere = sharding.replicated(mesh)
rows, read = row_file.RowFile(path), []


def recorded(index):
  read.append(index.tolist())
  return row_file.RowFile.take(rows, index)


rows.take = recorded
order = rows.order(0, 0, 8)
batch = sharding.read_to_global(rows.take, order, sharding.batch_sharding(mesh))
whole = jax.jit(lambda tree: tree, out_shardings=everywhere)(batch)
jax.tree.map(np.testing.assert_array_equal, jax.device_get(whole), row_file.RowFile.take(rows, order))
params = jax.jit(lambda: gemma.init(CONFIG, jax.random.key(0)), out_shardings=everywhere)()
verifier("dpo").with_reference(rows, TargetCounts(int(sys.argv[4]), 1), params, CONFIG, mesh, 4)
print(json.dumps([order.tolist(), read]))
distributed.barrier()
"""


def _pairs():
  rng, examples = np.random.default_rng(0), []
  for i in range(10):
    ids = [rng.integers(3, CONFIG.vocab_size, 6 + i % 4).tolist() for _ in range(2)]
    examples.append(packing.pair(f"{i}", *(packing.sft_example(f"{i}", x[:3], x[3:], KIND_VERIFY) for x in ids)))
  return packing.pack(examples, 16)


def test_each_process_reads_the_rows_of_its_own_devices(tmp_path):
  rows, path = _pairs(), tmp_path / "train.npy"
  row_file.write(path, rows.num_rows, rows.take)
  assert rows.num_rows == 10
  env = {
    "XLA_FLAGS": f"{quick_compiles.XLA_FLAGS} --xla_force_host_platform_device_count=2",
    "PYTHONPATH": f"{processes.ROOT}:{processes.ROOT / 'tests' / 'helpers'}",
  }
  port = processes.free_port()
  started = processes.start([["-c", _READ, port, i, path, rows.max_targets] for i in range(2)], **env)
  found = []
  for code, out, error in processes.finish(started, timeout=120):
    assert code == 0, error
    found.append(json.loads(out.splitlines()[-1]))
  (order, (first, *others)), (same_order, (second, *more)) = found
  assert order == same_order == first + second and len(first) == 4
  assert others[:3] == [[0, 1], [4, 5], [8, 9]] and more == [[2, 3], [6, 7], [-1, -1]], "of a pass over all rows"
  assert [i for index in others[3:] for i in index] == list(range(10)), "the first writes the file anew"

  params = jax.jit(gemma.init, static_argnums=0)(CONFIG, jax.random.key(0))
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  want = verifier("dpo").with_reference(rows, TargetCounts(rows.max_targets, 1), params, CONFIG, mesh, 4)
  got = row_file.RowFile(path).take(np.arange(10))
  np.testing.assert_allclose(got.reference, want.data.reference, rtol=1e-5, atol=1e-6)
  assert (got.reference != 0).any() and not got.reference[rows.data.weights == 0].any()
