"""Tensors on their way to stacked, sharded parameters: places, dtypes, memory, and the checks before."""

import dataclasses
import gc
import time
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_params import random_params

from genrm_jax.checkpoints import hugging_face, tensor_map
from genrm_jax.checkpoints.tensor_map import CheckpointReader, check_size
from genrm_jax.model import gemma
from genrm_jax.model.config import get_config
from genrm_jax.runtime import memory, sharding
from genrm_jax.runtime.errors import UserError

CONFIG = get_config("tiny_gemma3", num_layers=3, embed_dim=24, ffw_dim=40)
TENSORS = hugging_face.tensors(CONFIG, "model.")


def _reader(read=lambda tensor: tensor):
  """A checkpoint in memory."""
  held = dict(tensor_map.unstack(random_params(CONFIG), TENSORS))
  return CheckpointReader("/models/gemma", CONFIG, TENSORS, lambda name: read(held[name]))


def _mesh():
  return sharding.make_mesh(data=2, fsdp=2, tensor=2)


@pytest.mark.parametrize("rules", [{}, {"embed": None, "vocab": ("data", "fsdp")}], ids=["default", "changed"])
def test_parameters_are_placed_by_the_rules_of_the_config(rules):
  config = get_config("tiny_gemma3", num_layers=3, embed_dim=24, ffw_dim=40, sharding=rules)
  params = tensor_map.place(_reader(), _mesh(), config)
  jax.tree.map(np.testing.assert_array_equal, params, random_params(CONFIG))
  want = sharding.param_shardings(gemma.param_specs(CONFIG), _mesh(), config.rules)
  jax.tree.map(lambda p, s: np.testing.assert_(p.sharding.is_equivalent_to(s, p.ndim)), params, want)
  assert params["layers"]["q"].addressable_shards[0].data.shape == (3, 24 if rules else 12, 2, 16)


def test_one_tensor_is_on_the_host_at_a_time():
  alive = []

  def read(tensor):
    # Of another dtype than the parameters, so that none of them can be a view of what was read.
    tensor = tensor.astype(np.float16)
    # The runtime releases a tensor some time after its copy is ready, when it next collects garbage.
    deadline = time.monotonic() + 10
    while (held := sum(name() is not None for name in alive)) > 1 and time.monotonic() < deadline:
      gc.collect()
      time.sleep(0.01)
    assert held <= 1, f"{held} tensors are held when the next is read"
    alive.append(weakref.ref(tensor))
    return tensor

  params = tensor_map.place(_reader(read), _mesh(), CONFIG)
  assert len(alive) == len(TENSORS)
  assert np.isfinite(params["layers"]["q"]).all()


def test_layers_are_written_in_place():
  target = jax.ShapeDtypeStruct((4, 64, 64), jnp.float32, sharding=sharding.replicated(_mesh()))
  make, write, layer_sharding = tensor_map._stacked(target)
  part = jax.device_put(np.ones((64, 64), np.float32), layer_sharding)
  memory_use = write.lower(make(), part, 1).compile().memory_analysis()
  assert memory_use.alias_size_in_bytes >= 4 * 64 * 64 * 4
  assert memory_use.temp_size_in_bytes < 4 * 64 * 64 * 4


def test_too_little_memory_is_reported_before_anything_is_read(monkeypatch):
  monkeypatch.setattr(memory, "available_host_bytes", lambda: 1000)
  read = []
  with pytest.raises(UserError, match=r"/models/gemma take .* the host"):
    tensor_map.place(_reader(read.append), _mesh(), CONFIG)
  assert not read


def test_shapes_and_sizes_are_checked():
  def found(**fields):
    return dataclasses.replace(get_config("gemma3_1b", **fields), name="mine")

  shapes, name = {tensor.name: tensor.shape for tensor in TENSORS}, "model.layers.1.mlp.up_proj.weight"
  tensor_map.check_shapes("/models/gemma", shapes | {"vision": (3,)}, TENSORS, CONFIG)
  with pytest.raises(UserError, match=rf"/models/gemma.*{name}.*\(24, 40\).*\(40, 24\)"):
    tensor_map.check_shapes("/models/gemma", shapes | {name: (24, 40)}, TENSORS, CONFIG)
  del shapes[name], shapes["model.norm.weight"]
  with pytest.raises(UserError, match=f"/models/gemma: 2 tensors .*missing.*{name}"):
    tensor_map.check_shapes("/models/gemma", shapes, TENSORS, CONFIG)

  assert check_size("path", found(dtype="bfloat16")) == get_config("gemma3_1b", dtype="bfloat16")
  for fields in ({"num_layers": 25}, {"embed_dim": 1024}, {"qk_norm": False}):
    assert check_size("path", found(**fields)).name == "mine", "an unknown size keeps its name"
  with pytest.raises(UserError, match=r"path: .*gemma3_1b.*vocab_size.*262208.*query_scale.*0.5.*0.0625"):
    check_size("path", found(vocab_size=262_208, query_scale=0.5))
  assert check_size("path", get_config("gemma2_9b", vocab_size=256_000)).vocab_size == 256_000, "as on the hub"
