"""What is computed in float32 and what in the activations' dtype; the dtype of storage changes no logit."""

import functools

import char_model
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_steps
from jaxprs import equations, products
from random_params import random_params

from genrm_jax.model import cache as kv_cache
from genrm_jax.model import gemma, lora
from genrm_jax.model.config import get_config
from genrm_jax.pytrees import TokenBatch
from genrm_jax.training import optim
from genrm_jax.verifiers.base import TargetCounts, sft_loss

B, T, PREFIX = 2, 12, 5
VOCAB, FFW, RANK = 40, 48, 3  # unique sizes, which identify arrays by their shapes
# bfloat16 would round the scale of the adapters.
LORA = lora.LoraConfig(rank=RANK, alpha=5.0, targets=tuple(lora.TARGETS))
# Where a result in bfloat16 would be wrong and not only rounded: long sums, differences, and steep functions.
STEEP = {"exp", "exp2", "log", "log1p", "logistic", "tanh", "erf", "rsqrt", "sqrt", "pow", "sin", "cos"}
IN_FLOAT32 = STEEP | {"div", "sub", "reduce_sum", "reduce_max", "cumsum", "square"}


def _config(dtype="bfloat16", param_dtype="float32"):
  """All that any Gemma has: both kinds of layers, soft-caps, norms of queries and keys, post norms."""
  sizes = dict(num_layers=2, embed_dim=32, head_dim=8, vocab_size=VOCAB, ffw_dim=FFW)
  caps = dict(attn_softcap=50.0, final_softcap=30.0)
  return get_config("tiny_gemma3", pattern=("local", "global"), **sizes, **caps, dtype=dtype, param_dtype=param_dtype)


@functools.cache
def _params(dtype):
  """(plain, adapted) parameters with values that both dtypes hold exactly; adapters are float32."""
  params = random_params(_config(param_dtype="bfloat16"), adapters=LORA)
  adapters = {name: params.pop(name) for name in ("lora", "lora_scale")}
  params = jax.tree.map(lambda w: w.astype(dtype), params)
  return params, {**params, **adapters}


def _batch():
  """Large positions: RoPE angles rounded to bfloat16 would be off by whole turns."""
  tokens = np.random.default_rng(1).integers(VOCAB, size=(B, T + 1)).astype(np.int32)
  ones = np.ones((B, T), np.int32)
  positions = np.tile(np.arange(T, dtype=np.int32) + 3000, (B, 1))
  return TokenBatch(tokens[:, :-1], tokens[:, 1:], np.ones((B, T), np.float32), positions, ones, ones)


def _operands(equation):
  return [v.aval for v in equation.invars if jnp.issubdtype(v.aval.dtype, jnp.floating)]


LOSSES = {
  "sft": lambda config: sft_loss(config, 4, 0.5),
  "orm": lambda config: char_model.verifier("orm").loss(config, TargetCounts(4, 0), "none"),
}


@pytest.mark.parametrize(("name", "adapted"), [("sft", False), ("sft", True), ("orm", True)])
def test_products_are_bfloat16_and_steep_functions_float32(name, adapted):
  loss, params = LOSSES[name](_config()), _params("float32")[adapted]
  traced, out = jax.make_jaxpr(loss, return_shape=True)(params, _batch())
  assert {str(a.dtype) for a in jax.tree.leaves(out)} == {"float32"}, "the loss and its sums"
  assert len(products(traced.jaxpr)) == 7 + 2 + 1 + 2 * 7 * adapted
  seen = set()
  for equation in equations(traced.jaxpr):
    primitive, operands = equation.primitive.name, _operands(equation)
    dtypes = {str(a.dtype) for a in operands}
    (out, *_) = [v.aval for v in equation.outvars]
    if primitive == "dot_general":
      assert dtypes == {"bfloat16"}, equation
      assert out.dtype == "float32", equation
    elif primitive in IN_FLOAT32 and operands:
      is_gelu = primitive == "tanh" and out.shape[-1] == FFW  # of an activation, in its dtype, as in the reference
      assert dtypes == {"bfloat16" if is_gelu else "float32"}, equation
    seen.add((primitive, out.shape[-1:]))
  # Not vacuous: it has seen soft-caps, softmax, norms, angles and the loss.
  assert {("tanh", (T,)), ("tanh", (FFW,)), ("exp", (T,)), ("rsqrt", (1,)), ("cos", (4,))} <= seen
  assert ({("tanh", (1,)), ("log1p", (4,))} if name == "orm" else {("tanh", (VOCAB,)), ("log", (4,))}) <= seen

  backward = jax.make_jaxpr(lambda p: jax.grad(lambda p: loss(p, _batch())[0])(p))(params)
  assert len(products(backward.jaxpr)) == 3 * (7 + 2 + 1 + 2 * 7 * adapted)
  for product in products(backward.jaxpr):
    assert {str(a.dtype) for a in _operands(product)} == {"bfloat16"}, product


def _logits(dtype, param_dtype, prepare=lambda params, config: params):
  """Logits of all tokens, in one pass, and by prefill and single steps; checks the dtypes on the way."""
  config, batch = _config(dtype, param_dtype), _batch()

  @jax.jit
  def run(params):
    whole, _ = gemma.forward(params, config, batch.tokens, batch.positions, batch.segments)

    def read(cache, tokens_BT, positions_BT):
      x_BTD, cache = gemma.forward(params, config, tokens_BT, positions_BT, jnp.ones_like(tokens_BT), cache=cache)
      return cache, x_BTD

    cache, first = read(kv_cache.init(config, B, T), batch.tokens[:, :PREFIX], batch.positions[:, :PREFIX])
    one_by_one = (a[:, PREFIX:].T[..., None] for a in (batch.tokens, batch.positions))
    cache, rest = jax.lax.scan(lambda cache, given: read(cache, *given), cache, tuple(one_by_one))
    cached = jnp.concatenate([first, rest[:, :, 0].swapaxes(0, 1)], axis=1)
    return whole, cached, cache.k, gemma.unembed(params, config, whole), gemma.unembed(params, config, cached)

  params = prepare(jax.tree.map(jnp.copy, _params(param_dtype)[1]), config)
  whole, cached, keys, *logits = run(params)
  assert {str(a.dtype) for a in (whole, cached)} == {dtype}
  assert keys.dtype == ("uint16" if dtype == "bfloat16" else dtype)
  assert {str(a.dtype) for a in logits} == {"float32"}
  return np.asarray(logits), params


def test_bfloat16_rounds_the_logits_and_storing_or_casting_parameters_changes_none():
  (exact, cached), _ = _logits("float32", "float32")
  np.testing.assert_allclose(cached, exact, atol=1e-5 * np.std(exact))
  got, _ = _logits("bfloat16", "float32")
  for one in got:
    assert 1e-3 < np.sqrt(np.mean((one - exact) ** 2)) / np.std(exact) < 0.015
  np.testing.assert_array_equal(_logits("bfloat16", "bfloat16")[0], got)
  ahead, used = _logits("bfloat16", "float32", gemma.as_used)
  np.testing.assert_array_equal(ahead, got)
  kept = {path[-1].key for path, w in jax.tree.leaves_with_path(used) if w.dtype == jnp.float32}
  mask = jax.tree.leaves_with_path(gemma.norm_mask(_config(), LORA))
  assert kept == {path[-1].key for path, is_norm in mask if is_norm} | {"a", "b", "lora_scale"}


def test_a_training_step_of_float32_adapters_beside_bfloat16_keeps_every_dtype():
  params = _params("bfloat16")[1]
  optimizer = optim.OptimConfig(learning_rate=1e-2, num_steps=9)
  shapes, loss_fn = jax.eval_shape(lambda p: p, params), LOSSES["sft"](_config())
  train_step, state, *_ = train_steps.prepare(_config(), shapes, loss_fn, char_model.mesh(), optimizer, LORA)
  after, sums = jax.eval_shape(train_step, state, _batch())
  assert {str(a.dtype) for a in jax.tree.leaves((sums, after.params))} == {"float32"}
  jax.tree.map(lambda a, b: np.testing.assert_equal((a.dtype, a.shape), (b.dtype, b.shape)), after, state)
