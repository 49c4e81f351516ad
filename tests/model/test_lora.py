"""Adapters beside the matrices match adapters merged into them; what they add, and how they are declared."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_params import random_params
from refusals import refused

from genrm_jax.model import gemma, lora
from genrm_jax.model.config import get_config
from genrm_jax.model.lora import LoraConfig

ALL = tuple(lora.TARGETS)
TOKENS = np.random.default_rng(1).integers(128, size=(2, 10)).astype(np.int32)
ROWS = TOKENS, np.tile(np.arange(10, dtype=np.int32), (2, 1)), np.ones_like(TOKENS)
forward = jax.jit(gemma.forward, static_argnums=1)


@functools.cache
def _model(name="tiny_gemma3", **changes):
  return get_config(name, num_layers=2, **changes)


@functools.cache
def _params(model, targets=()):
  """Random weights, with adapters of rank 3 that change the model about as much as its own matrices do."""
  return random_params(model, std=0.1, adapters=LoraConfig(3, 6.0, targets) if targets else None)


def _hidden(model, params):
  return np.asarray(forward(params, model, *ROWS)[0])


@pytest.mark.parametrize("name", ["tiny_gemma1", "tiny_gemma3"])
def test_merged_adapters_match_separate_ones(name):
  model = _model(name)
  adapted = _params(model, ALL)
  merged = lora.merge(adapted)
  assert jax.tree.structure(merged) == jax.tree.structure(_params(model))
  got = _hidden(model, adapted)
  np.testing.assert_allclose(got, _hidden(model, merged), atol=2e-5)
  assert np.abs(got - _hidden(model, _params(model))).max() > 0.5


def test_merging_rounds_once():
  adapted = _params(_model(), ALL)
  half = adapted | {"layers": jax.tree.map(lambda w: w.astype(jnp.bfloat16), adapted["layers"])}
  exact = lora.merge(half | {"layers": jax.tree.map(lambda w: w.astype(jnp.float32), half["layers"])})
  jax.tree.map(lambda w, e: np.testing.assert_array_equal(w, e.astype(w.dtype)), lora.merge(half), exact)


def test_new_adapters_are_random_float32_and_do_not_change_the_model():
  model = _model("tiny_gemma1", param_dtype="bfloat16")
  init = jax.jit(lora.init, static_argnums=(0, 1))
  added = init(model, LoraConfig(32, 8.0, ALL), jax.random.key(0))
  np.testing.assert_array_equal(_hidden(model, {**_params(model), **added}), _hidden(model, _params(model)))
  assert {str(a.dtype) for a in jax.tree.leaves(added)} == {"float32"}
  one = added["lora"]
  assert not np.allclose(one["gate"]["a"], one["up"]["a"]), "each adapter has its own key"
  for name, fan_in in (("q", 128), ("attn_out", 128), ("down", 256)):
    assert float(jnp.std(one[name]["a"])) == pytest.approx(fan_in**-0.5, rel=0.05)
  fewer = init(model, LoraConfig(32, 8.0, ("down",)), jax.random.key(0))
  np.testing.assert_array_equal(fewer["lora"]["down"]["a"], one["down"]["a"])
  assert fewer["lora_scale"] == 0.25 and list(fewer["lora"]) == ["down"]


def test_bad_settings_are_refused():
  good = {"rank": 4, "alpha": 8.0, "targets": ("q",)}
  bad = {"rank": (0, 4.0), "alpha": (0.0, float("nan")), "targets": ((), ("q", "o"))}
  for name, values in bad.items():
    refused(*((name, lambda value: LoraConfig(**good | {name: value}), value) for value in values))  # noqa: B023
