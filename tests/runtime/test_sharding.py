"""Meshes, rules and their errors, and global arrays, on 8 virtual devices; memory of the host."""

import os
import platform
import subprocess
import sys
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from refusals import refused

from genrm_jax.model.config import get_config
from genrm_jax.runtime import memory, sharding
from genrm_jax.runtime.sharding import DEFAULT_RULES
from genrm_jax.training import sizes


def spec_of(shape, axes):
  return types.SimpleNamespace(shape=shape, axes=axes)


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh(data=2, fsdp=2, tensor=2)


def test_meshes_constraints_and_rules_that_cannot_be_kept(mesh):
  assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
  assert mesh.axis_types == (AxisType.Auto,) * 3
  assert dict(sharding.make_mesh(fsdp=-1, tensor=2).shape) == {"data": 1, "fsdp": 4, "tensor": 2}
  assert sharding.make_mesh(devices=jax.devices()[3:4]).devices.item() == jax.devices()[3]
  refused(
    ("4, is not the 8", partial(sharding.make_mesh, data=2, tensor=2)),
    ("3, does not divide", partial(sharding.make_mesh, fsdp=-1, tensor=3)),
    ("16, does not divide", partial(sharding.make_mesh, fsdp=-1, tensor=16)),
    ("at most one", partial(sharding.make_mesh, data=-1, fsdp=-1)),
    ("data=0", partial(sharding.make_mesh, data=0)),
  )
  x, axes = np.ones((8, 6, 4), np.float32), ("activation_batch", None, "activation_ffw")
  pinned = jax.jit(lambda x: sharding.constrain(x, axes, DEFAULT_RULES))
  with jax.set_mesh(mesh):
    assert pinned(x).sharding.spec == P(("data", "fsdp"), None, "tensor")
    free_axes = "activation_batch", None, sharding.FREE
    free = jax.jit(lambda x: sharding.constrain(pinned(x) * 2, free_axes, DEFAULT_RULES))
    assert free(x).sharding.spec == P(("data", "fsdp"), None, "tensor")
    other = jax.jit(lambda x: sharding.constrain(x, axes, {**DEFAULT_RULES, "activation_ffw": None}))
    assert other(x).sharding.is_equivalent_to(sharding.batch_sharding(mesh), 3)
    refused((r"Activation.*dimension 0 .* has size 3", pinned, np.ones((3, 6, 4))))
  assert sharding.constrain(x, ("no mesh", "is", "set"), DEFAULT_RULES) is x
  for shape, axes, rules, message in (
    ((8, 5), ("embed", "ffw"), {}, r"layers/w, shape \(8, 5\): dimension 1 \('ffw'\) has size 5.*tensor=2"),
    ((8, 1), ("embed", "kv_heads"), {}, r"dimension 1 \('kv_heads'\) has size 1.*tensor=2"),
    ((6,), ("activation_batch",), {}, r"dimension 0 .* has size 6.*data=2 x fsdp=2"),
    ((8, 8), ("heads", "ffw"), {}, r"'tensor' .* dimension 0 \('heads'\) and dimension 1 \('ffw'\)"),
    ((8,), ("embed",), {"embed": ("fsdp", "fsdp")}, "'fsdp' .* dimension 0"),
    ((8,), ("embde",), {}, "no rule .* 'embde'.*embed"),
    ((8,), ("embed",), {"embed": "expert"}, "'embed' names 'expert'; the mesh has data, fsdp, tensor"),
    ((8, 8), ("embed",), {}, "1 logical axes"),
  ):
    refused((message, sharding.param_shardings, {"layers": {"w": spec_of(shape, axes)}}, mesh, DEFAULT_RULES | rules))


@pytest.mark.parametrize(("rule", "shards"), [(("data", "fsdp"), 4), ("tensor", 2), (None, 1)])
def test_host_to_global(mesh, rule, shards):
  batch = sharding.batch_sharding(mesh, {**DEFAULT_RULES, "activation_batch": rule})
  assert sharding.num_shards(batch) == shards
  rows = {"tokens": np.arange(24, dtype=np.int32).reshape(8, 3), "length": np.arange(8, dtype=np.int32)}
  got = sharding.host_to_global(rows, batch)
  jax.tree.map(np.testing.assert_array_equal, got, rows)
  size = 8 // shards
  shapes = {(shard.data.shape, shard.index[0].start or 0) for shard in got["tokens"].addressable_shards}
  assert shapes == {((size, 3), start) for start in range(0, 8, size)}
  if shards > 1:
    message = rf"tokens: shape \(7, 3\).* {shards} batch shards"
    refused((message, sharding.host_to_global, {"tokens": np.zeros((7, 3))}, batch))


_FAULTS = """
import resource, sys
import numpy as np
from genrm_jax.runtime import memory

def faults():
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  np.empty(5 << 26)[: 1 << 26 : 512] = 1  # of 2.5 GiB: glibc's threshold for trimming is at most 2 GiB
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if sys.argv[1] == "keep":
  memory.keep_freed_memory()
faults()
print(faults())
"""


@pytest.mark.one_python
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is a function of glibc")
def test_freed_memory_is_kept_for_the_next_call():
  environ = os.environ | {"JAX_PLATFORMS": "cpu"}
  commands = ([sys.executable, "-c", _FAULTS, keep] for keep in ("leave", "keep"))
  without, kept = (int(subprocess.check_output(command, env=environ)) for command in commands)
  assert without > 200 and kept < without / 10


def test_cpu_devices_share_the_memory_of_the_host(monkeypatch):
  """16,000 bytes: 4,000 in quarters, 4 copies of 1,000, and 8,000 on the host."""
  monkeypatch.setattr(memory, "available_host_bytes", lambda: available)
  quarters = sharding.batch_sharding(sharding.make_mesh(data=4, devices=jax.devices()[:4]))
  arrays = {
    "x": jax.ShapeDtypeStruct((1000,), jnp.float32, sharding=quarters),
    "whole": jax.ShapeDtypeStruct((250,), jnp.float32, sharding=sharding.replicated(quarters.mesh)),
    "y": jax.ShapeDtypeStruct((4000,), jnp.bfloat16),
  }
  available = 16_000
  memory.check_fits("they", arrays)
  available = 15_999
  refused((r"they take .* the host", memory.check_fits, "they", arrays))


def test_a_program_that_does_not_fit_is_refused_with_the_remedy(monkeypatch):
  """A step with buffers of at least 400 MB: the product of two matrices of 10,000 x 10,000 floats is temporary."""
  step = jax.jit(lambda x: jnp.sum(jnp.sin(x[:, None] * x[None]) @ jnp.cos(x)))
  program = step.lower(jax.ShapeDtypeStruct((10_000,), jnp.float32)).compile()
  temporary = program.memory_analysis().temp_size_in_bytes
  monkeypatch.setattr(memory, "available_host_bytes", lambda: available)
  available = 2 * jax.local_device_count() * max(temporary, 1)
  memory.prepare_for("it", program, jax.devices()[0], "set remat")
  available = temporary // 2
  refused(
    (r"it take .* GiB on the host, .*; set remat", memory.prepare_for, "it", program, jax.devices()[0], "set remat")
  )


def test_steps_are_made_small_by_size_alone():
  model = get_config("tiny_gemma1", vocab_size=32_000, num_layers=4, embed_dim=384, ffw_dim=1536)
  for (batch_size, row_length, shards), parts in {
    (16, 512, 1): 4,
    (8, 64, 2): 1,
    (16, 512, 8): 2,
    (6, 2048, 1): 6,
  }.items():
    assert sizes.num_micro_batches(model, batch_size, row_length, shards) == parts
    assert batch_size % (parts * shards) == 0
  assert [sizes.remat(model, rows, 512) for rows in (2, 12, 512)] == ["none", "dots", "layer"]
