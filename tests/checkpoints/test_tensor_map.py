"""Tensors on their way to stacked, sharded parameters and back: places, dtypes, memory, and the checks before."""

import dataclasses
import gc
import time
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genrm_jax.checkpoints import hugging_face, tensor_map
from genrm_jax.checkpoints.tensor_map import Opened, Tensor
from genrm_jax.model import gemma
from genrm_jax.model.config import ModelConfig, get_config
from genrm_jax.runtime import memory, sharding
from genrm_jax.runtime.errors import UserError

CONFIG = get_config("tiny_gemma3", num_layers=3, embed_dim=24, ffw_dim=40)


def _params():
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda spec: rng.normal(size=spec.shape).astype(np.float32), gemma.param_specs(CONFIG))


def _opened(read=None):
  """A checkpoint that lies in memory."""
  tensors = hugging_face.tensors(CONFIG, "model.")
  held = dict(tensor_map.take(_params(), tensors))
  return Opened("/models/gemma", CONFIG, tensors, held.__getitem__ if read is None else lambda name: read(held[name]))


def _mesh():
  return sharding.make_mesh(data=2, fsdp=2, tensor=2)


def test_every_parameter_comes_to_its_place_sharded():
  params = tensor_map.place(_opened(), _mesh(), CONFIG)
  jax.tree.map(np.testing.assert_array_equal, params, _params())
  want = sharding.param_shardings(gemma.param_specs(CONFIG), _mesh())
  jax.tree.map(lambda p, s: np.testing.assert_(p.sharding.is_equivalent_to(s, p.ndim)), params, want)
  assert params["layers"]["q"].addressable_shards[0].data.shape == (3, 12, 2, 16)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_parameters_get_the_dtype_that_is_asked_for(dtype):
  opened = _opened(lambda tensor: tensor.astype(jnp.bfloat16))
  params = tensor_map.place(opened, _mesh(), ModelConfig.from_dict(CONFIG.to_dict() | {"param_dtype": dtype}))
  assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {dtype}
  rounded = jax.tree.map(lambda p: p.astype(jnp.bfloat16).astype(np.float32), _params())
  jax.tree.map(lambda p, want: np.testing.assert_array_equal(p.astype(jnp.float32), want), params, rounded)


def test_one_tensor_is_on_the_host_at_a_time():
  alive = []

  def read(tensor):
    # Of another dtype than the parameters, so that none of them can be a view of what was read.
    tensor = tensor.astype(np.float16)
    # The runtime lets go of a tensor a moment after its copy is ready, when it next collects its garbage.
    deadline = time.monotonic() + 10
    while (held := sum(name() is not None for name in alive)) > 1 and time.monotonic() < deadline:
      gc.collect()
      time.sleep(0.01)
    assert held <= 1, f"{held} tensors are held when the next is read"
    alive.append(weakref.ref(tensor))
    return tensor

  params = tensor_map.place(_opened(read), _mesh(), CONFIG)
  assert len(alive) == len(_opened().tensors)
  # The tensors are gone; the parameters are there.
  assert np.isfinite(params["layers"]["q"]).all()


def test_layers_are_written_in_place():
  target = jax.ShapeDtypeStruct((4, 64, 64), jnp.float32, sharding=sharding.replicated(sharding.make_mesh(data=8)))
  make, write, of_layer = tensor_map._stacked(target)
  part = jax.device_put(np.ones((64, 64), np.float32), of_layer)
  memory_use = write.lower(make(), part, 1).compile().memory_analysis()
  assert memory_use.alias_size_in_bytes >= 4 * 64 * 64 * 4
  assert memory_use.temp_size_in_bytes < 4 * 64 * 64 * 4


def test_too_little_memory_is_told_before_anything_is_read(monkeypatch):
  monkeypatch.setattr(memory, "available_host_bytes", lambda: 1000)
  read = []
  with pytest.raises(UserError, match=r"the parameters of /models/gemma take .* GiB on the host, which has .* free"):
    tensor_map.place(_opened(read.append), _mesh(), CONFIG)
  assert not read


def test_a_tensor_may_hold_several_parameters():
  def to_ours(theirs):
    return [theirs[0], theirs[1]]

  tensors = [
    Tensor(f"{layer}", (2, 3), (("layers/gate", layer), ("layers/up", layer)), to_ours, np.stack) for layer in (0, 1)
  ]
  params = {"layers": {"gate": np.arange(6.0).reshape(2, 3), "up": -np.arange(6.0).reshape(2, 3)}}
  got = dict(tensor_map.take(params, tensors))
  np.testing.assert_array_equal(got["1"], [[3, 4, 5], [-3, -4, -5]])
  jax.tree.map(
    np.testing.assert_array_equal, to_ours(got["0"]), [params["layers"]["gate"][0], params["layers"]["up"][0]]
  )


def test_parameters_without_a_place_are_refused_at_once():
  params = {**_params(), "lora": {"q": {"a": np.zeros(3)}}}
  with pytest.raises(UserError, match=r"1 parameters have no place .* lora/q/a; adapters"):
    tensor_map.take(params, hugging_face.tensors(CONFIG, "model."))


def test_shapes_are_checked():
  tensors = hugging_face.tensors(CONFIG, "model.")
  found = {tensor.name: tensor.shape for tensor in tensors}
  tensor_map.check_shapes("/models/gemma", found | {"vision": (3,)}, tensors, CONFIG)
  name = "model.layers.1.mlp.up_proj.weight"
  with pytest.raises(UserError, match=rf"/models/gemma: tensor {name} has shape \(24, 40\), .* \(40, 24\)"):
    tensor_map.check_shapes("/models/gemma", found | {name: (24, 40)}, tensors, CONFIG)
  del found[name], found["model.norm.weight"]
  with pytest.raises(UserError, match=f"/models/gemma: 2 tensors of a tiny_gemma3 are missing, the first is {name}"):
    tensor_map.check_shapes("/models/gemma", found, tensors, CONFIG)


def test_sizes_are_checked():
  def found(**fields):
    return dataclasses.replace(get_config("gemma3_1b", **fields), name="mine")

  assert tensor_map.check_size("here", found(dtype="bfloat16")) == get_config("gemma3_1b", dtype="bfloat16")
  for fields in ({"num_layers": 25}, {"embed_dim": 1024}, {"qk_norm": False}):
    assert tensor_map.check_size("here", found(**fields)).name == "mine", "a size of no table keeps its name"
  message = "here: 26 layers of width 1152 make it a gemma3_1b, but "
  with pytest.raises(UserError, match=message + "window is 1024 in the files and 512 in the table; it is not"):
    tensor_map.check_size("here", found(window=1024))
  with pytest.raises(UserError, match=message + "vocab_size is 262208 .*; query_scale is 0.5 in the files and 0.0625"):
    tensor_map.check_size("here", found(vocab_size=262_208, query_scale=0.5))
  # The hub's rows, and not more.
  assert tensor_map.check_size("here", get_config("gemma2_9b", vocab_size=256_000)).vocab_size == 256_000
  # A user's own tiny model is no released one, whatever it is called.
  own = dataclasses.replace(get_config("tiny_gemma2"), name="mine", head_dim=8)
  assert tensor_map.check_size("here", own) == own
