"""Adapters beside the matrices match adapters merged into them; what they add, and how they are declared."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from jaxprs import products
from random_params import random_params

from genrm_jax.model import gemma, lora
from genrm_jax.model.config import get_config
from genrm_jax.model.lora import LoraConfig
from genrm_jax.runtime import sharding
from genrm_jax.runtime.errors import UserError

ALL = tuple(lora.TARGETS)
B, T = 2, 10
ROWS = (
  np.random.default_rng(1).integers(128, size=(B, T)).astype(np.int32),
  np.tile(np.arange(T, dtype=np.int32), (B, 1)),
  np.ones((B, T), np.int32),
)
forward = jax.jit(gemma.forward, static_argnums=1)


@functools.cache
def _model(name="tiny_gemma2", **changes):
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
  got, want = _hidden(model, adapted), _hidden(model, merged)
  np.testing.assert_allclose(got, want, atol=2e-5)
  assert np.abs(got - _hidden(model, _params(model))).max() > 0.5


def test_each_matrix_gets_its_own_adapter_scaled_by_alpha_over_rank():
  model = _model(num_kv_heads=1)
  base, adapted = _params(model)["layers"], _params(model, ("k", "attn_out"))
  merged = lora.merge(adapted)["layers"]
  for name, inputs, outputs in (("k", 64, 16), ("attn_out", 64, 64)):
    a, b = (np.asarray(adapted["lora"][name][part], np.float64) for part in "ab")
    want = [a[layer].reshape(inputs, 3) @ b[layer].reshape(3, outputs) * 6 / 3 for layer in range(2)]
    got = np.asarray(merged[name] - base[name]).reshape(2, inputs, outputs)
    np.testing.assert_allclose(got, want, atol=1e-6)
  assert all(merged[name] is adapted["layers"][name] for name in base if name not in ("k", "attn_out"))


def test_merging_rounds_once():
  adapted = _params(_model(param_dtype="bfloat16"), ALL)
  exact = lora.merge({**adapted, "layers": jax.tree.map(lambda w: w.astype(jnp.float32), adapted["layers"])})
  got = lora.merge(adapted)["layers"]
  for name in ALL:
    assert got[name].dtype == jnp.bfloat16 and exact["layers"][name].dtype == jnp.float32
    np.testing.assert_array_equal(got[name], exact["layers"][name].astype(jnp.bfloat16))


@pytest.mark.parametrize("targets", [(), ("q", "down"), ALL], ids=len)
def test_only_targets_add_products(targets):
  """Without adapters, the program has 7 matrices and 2 products of attention."""
  model = _model()
  traced = jax.make_jaxpr(gemma.forward, static_argnums=1)(_params(model, targets), model, *ROWS)
  assert len(products(traced.jaxpr)) == 9 + 2 * len(targets)


def test_new_adapters():
  model = get_config("tiny_gemma1", num_layers=2, param_dtype="bfloat16")
  init, config = jax.jit(lora.init, static_argnums=(0, 1)), LoraConfig(32, 8.0, ALL)
  added = init(model, config, jax.random.key(0))
  np.testing.assert_array_equal(_hidden(model, {**_params(model), **added}), _hidden(model, _params(model)))
  one, other = added["lora"], init(model, config, jax.random.key(1))["lora"]
  assert not np.allclose(one["q"]["a"], other["q"]["a"])
  assert not np.allclose(one["gate"]["a"], one["up"]["a"]), "each adapter has its own key"
  for name, fan_in in (("q", 128), ("k", 128), ("attn_out", 128), ("gate", 128), ("down", 256)):
    assert float(jnp.std(one[name]["a"])) == pytest.approx(fan_in**-0.5, rel=0.05)
    assert not one[name]["b"].any()
  assert {str(a.dtype) for a in jax.tree.leaves(added)} == {"float32"}
  fewer = init(model, LoraConfig(32, 8.0, ("down",)), jax.random.key(0))
  np.testing.assert_array_equal(fewer["lora"]["down"]["a"], one["down"]["a"])
  assert fewer["lora_scale"] == 0.25 and list(fewer["lora"]) == ["down"]


def test_adapters_of_gemma_2b_are_as_small_and_as_sharded_as_they_should_be():
  model = get_config("gemma_2b")
  specs = lora.param_specs(model, LoraConfig(16, 32.0, ALL))
  # L * R * (in + out) of q, k and v, attn_out, gate and up and down: less than 1% of the model.
  sizes = (2048 + 2048) + 2 * (2048 + 256) + (2048 + 2048) + 3 * (2048 + 16_384)
  assert sum(math.prod(s.shape) for s in jax.tree.leaves(specs["lora"])) == 18 * 16 * sizes == 19_611_648
  shardings = sharding.param_shardings(specs, sharding.make_mesh(data=2, fsdp=2, tensor=2), model.rules)
  split = {name: tuple(shardings["lora"][name][part].spec for part in "ab") for name in ("q", "k", "attn_out", "down")}
  assert split == {
    "q": (P(None, "fsdp", None), P(None, None, "tensor", None)),
    "k": (P(None, "fsdp", None), P(None, None, None, None)),
    "attn_out": (P(None, "tensor", None, None), P(None, None, "fsdp")),
    "down": (P(None, "tensor", None), P(None, None, "fsdp")),
  }
  assert shardings["lora_scale"].is_fully_replicated


@pytest.mark.parametrize(
  ("changes", "named"),
  [
    (dict(rank=0), "rank"),
    (dict(rank=4.0), "rank"),
    (dict(alpha=0.0), "alpha"),
    (dict(alpha=float("nan")), "alpha"),
    (dict(targets=()), "targets.*attn_out"),
    (dict(targets=("q", "o")), "targets"),
    (dict(targets="q"), "targets"),
  ],
)
def test_bad_settings_are_refused(changes, named):
  with pytest.raises(UserError, match=named):
    LoraConfig(**{"rank": 4, "alpha": 8.0, "targets": ("q",), **changes})
