"""Tensors on their way to stacked, sharded parameters: places, memory, and the sizes that they must have."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_params import random_params

from genrm_jax.checkpoints import hugging_face, tensor_map
from genrm_jax.checkpoints.tensor_map import CheckpointReader, check_size
from genrm_jax.model import gemma
from genrm_jax.model.config import get_config
from genrm_jax.runtime import sharding
from genrm_jax.runtime.errors import UserError

CONFIG = get_config("tiny_gemma3", num_layers=3, embed_dim=24, ffw_dim=40)
TENSORS = hugging_face.tensors(CONFIG, "model.")


def _mesh():
  return sharding.make_mesh(data=2, fsdp=2, tensor=2)


@pytest.mark.parametrize("rules", [{}, {"embed": None, "vocab": ("data", "fsdp")}], ids=["default", "changed"])
def test_parameters_are_placed_by_the_rules_of_the_config(rules):
  config = get_config("tiny_gemma3", num_layers=3, embed_dim=24, ffw_dim=40, sharding=rules)
  held = dict(tensor_map.unstack(random_params(CONFIG), TENSORS))
  params = tensor_map.place(CheckpointReader("in memory", CONFIG, TENSORS, held.get), _mesh(), config)
  jax.tree.map(np.testing.assert_array_equal, params, random_params(CONFIG))
  want = sharding.param_shardings(gemma.param_specs(CONFIG), _mesh(), config.rules)
  jax.tree.map(lambda p, s: np.testing.assert_(p.sharding.is_equivalent_to(s, p.ndim)), params, want)
  assert params["layers"]["q"].addressable_shards[0].data.shape == (3, 24 if rules else 12, 2, 16)


def test_layers_are_written_in_place():
  target = jax.ShapeDtypeStruct((4, 64, 64), jnp.float32, sharding=sharding.replicated(_mesh()))
  make, write, layer_sharding = tensor_map._stacked(target)
  part = jax.device_put(np.ones((64, 64), np.float32), layer_sharding)
  memory_use = write.lower(make(), part, 1).compile().memory_analysis()
  assert memory_use.alias_size_in_bytes >= 4 * 64 * 64 * 4
  assert memory_use.temp_size_in_bytes < 4 * 64 * 64 * 4


def test_files_of_a_released_size_must_match_it():
  def found(**fields):
    return dataclasses.replace(get_config("gemma3_1b", **fields), name="mine")

  assert check_size("path", found(dtype="bfloat16")) == get_config("gemma3_1b", dtype="bfloat16")
  for fields in ({"num_layers": 25}, {"embed_dim": 1024}, {"qk_norm": False}):
    assert check_size("path", found(**fields)).name == "mine", "an unknown size keeps its name"
  with pytest.raises(UserError, match=r"path: .*gemma3_1b, but query_scale is 0.5.*0.0625"):
    check_size("path", found(vocab_size=262_208, query_scale=0.5))
