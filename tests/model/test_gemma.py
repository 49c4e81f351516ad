"""What a model may see, proved by gradients; packing, dtypes, sharding, and the declaration of parameters."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genrm_jax.model import gemma
from genrm_jax.model.config import get_config
from genrm_jax.runtime import sharding

T = 20
TINY = ("tiny_gemma1", "tiny_gemma2", "tiny_gemma3")
forward = jax.jit(gemma.forward, static_argnums=1, static_argnames="remat")


@functools.cache
def _params(config):
  """Random weights with norm scales that are not zero, so that a norm in the wrong place shows."""
  rng = np.random.default_rng(0)

  def fill(path, spec):
    std = 0.1 if path[-1].key.endswith("norm") else config.embed_dim**-0.5
    return jnp.array(rng.normal(scale=std, size=spec.shape), config.param_dtype)

  return jax.tree_util.tree_map_with_path(fill, gemma.param_specs(config))


def _row(batch=1):
  """Rows without a repeated token: positions, and so input embeddings, can be told apart by their token."""
  tokens = np.stack([np.random.default_rng(b).permutation(128)[:T] for b in range(batch)]).astype(np.int32)
  return tokens, np.tile(np.arange(T, dtype=np.int32), (batch, 1)), np.ones((batch, T), np.int32)


@functools.partial(jax.jit, static_argnums=0)
def _jacobian(config, params, tokens, positions, segments):
  """d logits[t] / d row v of the embedding, in a random direction of the logits, as [t, v, D]."""

  def project(table):
    given = params | {"embedder": {"input_embedding": table}}
    x, _ = gemma.forward(given, config, tokens, positions, segments)
    # The output layer keeps its own copy of the table, or every gradient would pass through it as well.
    return gemma.unembed(params, config, x)[0] @ jnp.cos(jnp.arange(config.vocab_size))

  _, vjp = jax.vjp(project, params["embedder"]["input_embedding"])
  return jax.vmap(lambda cotangent: vjp(cotangent)[0])(jnp.eye(T))


def _influence(config, tokens, positions, segments):
  """|d logits[t] / d input[s]| as [t, s], for one row."""
  gradient = _jacobian(config, _params(config), tokens, positions, segments)
  return np.abs(np.asarray(gradient)).sum(-1)[:, tokens[0]]


@pytest.mark.parametrize("name", TINY)
def test_a_token_sees_its_own_segment_up_to_itself_and_all_of_it(name):
  tokens, _, _ = _row()
  segments = np.array([[1] * 8 + [2] * 10 + [0] * 2], np.int32)
  positions = np.concatenate([np.arange(8), np.arange(10) + 3, np.zeros(2)]).astype(np.int32)[None]
  got = _influence(get_config(name), tokens, positions, segments)[:18]
  same = (segments[0][:18, None] == segments[0][None, :]) & np.tri(18, T, dtype=bool)
  assert (got[~same] == 0).all()
  assert (got[same] > 0).all()


@pytest.mark.parametrize("name", ["tiny_gemma2", "tiny_gemma3"])
def test_local_layers_reach_no_further_than_their_windows(name):
  config = get_config(name, pattern=("local",), num_layers=2, window=4)
  got = _influence(config, *_row())
  back = np.arange(T)[:, None] - np.arange(T)[None, :]
  # Each of two layers looks 3 tokens back.
  reach = (back >= 0) & (back <= 6)
  assert (got[~reach] == 0).all()
  assert (got[reach] > 0).all()


def test_a_gap_in_positions_shrinks_windows_and_never_breaks_the_order():
  tokens, positions, segments = _row()
  gapped = positions + 5 * (positions >= 10)
  everything = np.tri(T, dtype=bool)
  got = _influence(get_config("tiny_gemma3"), tokens, gapped, segments)
  np.testing.assert_array_equal(got > 0, everything)
  got = _influence(get_config("tiny_gemma3", pattern=("local",), num_layers=2, window=4), tokens, gapped, segments)
  assert (got[10:, :10] == 0).all()
  # Going back in position (a gap of less than nothing) must not let a token see what follows it.
  got = _influence(get_config("tiny_gemma3"), tokens, positions[:, ::-1].copy(), segments)
  np.testing.assert_array_equal(got > 0, everything)


def test_positions_matter_by_their_distances_only():
  config = get_config("tiny_gemma3")
  tokens, positions, segments = _row()
  base, _ = forward(_params(config), config, tokens, positions, segments)
  shifted, _ = forward(_params(config), config, tokens, positions + 40, segments)
  gapped, _ = forward(_params(config), config, tokens, positions + 2 * (positions >= 10), segments)
  np.testing.assert_allclose(shifted, base, atol=2e-4)
  np.testing.assert_allclose(gapped[:, :10], base[:, :10], atol=1e-5)
  assert np.abs(gapped[:, 10:] - base[:, 10:]).max() > 0.1


@pytest.mark.parametrize("name", TINY)
def test_packed_segments_are_as_separate_sequences(name):
  config = get_config(name)
  tokens, positions, segments = _row(3)
  lengths = (9, 4, 7)
  packed = np.concatenate([tokens[b, :n] for b, n in enumerate(lengths)])[None]
  packed_positions = np.concatenate([np.arange(n) for n in lengths])[None]
  packed_segments = np.concatenate([np.full(n, b + 1) for b, n in enumerate(lengths)])[None]
  apart = [
    forward(_params(config), config, *(a[b : b + 1] for a in (tokens, positions, segments)))[0] for b in range(3)
  ]
  together, _ = forward(_params(config), config, packed, packed_positions, packed_segments)
  want = np.concatenate([apart[b][0, :n] for b, n in enumerate(lengths)])
  np.testing.assert_allclose(together[0], want, atol=2e-5)


@pytest.mark.parametrize("name", TINY)
def test_bfloat16_stays_near_float32(name):
  exact, fast = get_config(name), get_config(name, dtype="bfloat16", param_dtype="bfloat16")
  rows = _row()
  x, _ = forward(_params(exact), exact, *rows)
  params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), _params(exact))
  y, _ = forward(params, fast, *rows)
  want, got = gemma.unembed(_params(exact), exact, x), gemma.unembed(params, fast, y)
  assert y.dtype == jnp.bfloat16 and got.dtype == jnp.float32
  error = float(jnp.sqrt(jnp.mean((got - want) ** 2)) / jnp.std(want))
  assert 0 < error < 0.05, error


def test_logits_are_capped_and_take_any_leading_dims():
  config = get_config("tiny_gemma2", final_softcap=0.5)
  x = 10 * jax.random.normal(jax.random.key(0), (2, 3, 64))
  logits = gemma.unembed(_params(config), config, x)
  assert 0.4 < jnp.abs(logits).max() <= 0.5
  np.testing.assert_allclose(gemma.unembed(_params(config), config, x[1, 2]), logits[1, 2], atol=1e-5)


def test_remat_changes_memory_and_not_gradients():
  config = get_config("tiny_gemma1")
  rows = _row(2)

  def grad(remat):
    def loss(params):
      return jnp.sum(jnp.square(gemma.forward(params, config, *rows, remat=remat)[0][..., :3]))

    compiled = jax.jit(jax.grad(loss)).lower(_params(config)).compile()
    return compiled(_params(config)), compiled.memory_analysis().temp_size_in_bytes

  (kept, all_bytes), (by_dots, dots_bytes), (by_layer, layer_bytes) = map(grad, ("none", "dots", "layer"))
  assert layer_bytes < 0.7 * all_bytes and layer_bytes < dots_bytes < all_bytes
  for recomputed in (by_dots, by_layer):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), kept, recomputed)


def test_calls_of_one_shape_compile_once():
  config = get_config("tiny_gemma1")
  traces = []

  @jax.jit
  def run(*rows):
    traces.append(1)
    return gemma.forward(_params(config), config, *rows)[0]

  tokens, positions, segments = _row(2)
  first = run(tokens, positions, segments)
  second = run(tokens[::-1].copy(), positions + 1, 2 * segments)
  assert len(traces) == 1
  assert np.abs(first - second).max() > 0.1


def _loss(params, config, tokens, positions, segments):
  x, _ = gemma.forward(params, config, tokens, positions, segments)
  logits = gemma.unembed(params, config, x)
  return -jnp.mean(jax.nn.log_softmax(logits)[..., 3]), logits


def _mesh_and_shardings(config):
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  rules = config.rules
  return mesh, sharding.param_shardings(gemma.param_specs(config), mesh, rules)


@pytest.mark.parametrize("name", TINY)
def test_sharded_forward_is_the_unsharded_one(name):
  config = get_config(name)
  rows = _row(8)
  alone = [forward(_params(config), config, *(a[b : b + 1] for a in rows))[0] for b in range(8)]
  want = gemma.unembed(_params(config), config, jnp.concatenate(alone))
  mesh, shardings = _mesh_and_shardings(config)
  with jax.set_mesh(mesh):
    placed = jax.device_put(_params(config), shardings)
    _, got = jax.jit(_loss, static_argnums=1)(
      placed, config, *sharding.host_to_global(rows, sharding.batch_sharding(mesh))
    )
  # 8 rows over data x fsdp, the vocabulary over tensor.
  assert got.sharding.shard_shape(got.shape) == (2, T, config.vocab_size // 2)
  np.testing.assert_allclose(got, want, atol=5e-5)


def test_sharded_gradient_is_the_unsharded_one():
  config = get_config("tiny_gemma1")
  rows = _row(8)
  grad = jax.grad(_loss, has_aux=True)
  want, _ = jax.jit(grad, static_argnums=1)(_params(config), config, *rows)
  mesh, shardings = _mesh_and_shardings(config)
  with jax.set_mesh(mesh):
    step = jax.jit(grad, static_argnums=1, out_shardings=(shardings, None))
    placed = jax.device_put(_params(config), shardings)
    got, _ = step(placed, config, *sharding.host_to_global(rows, sharding.batch_sharding(mesh)))
  scale = max(float(jnp.abs(w).max()) for w in jax.tree.leaves(want))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), got, want)
  shard = got["layers"]["down"].addressable_shards[0].data
  assert shard.shape == (config.num_layers, config.ffw_dim // 2, config.embed_dim // 2)


@pytest.mark.parametrize("name", TINY)
def test_specs_are_the_parameters(name):
  config = get_config(name)
  specs, params = gemma.param_specs(config), jax.eval_shape(lambda key: gemma.init(config, key), jax.random.key(0))
  jax.tree.map(lambda spec, w: np.testing.assert_equal((spec.shape, len(spec.axes)), (w.shape, w.ndim)), specs, params)
  assert ("q_norm" in params["layers"]) == (name == "tiny_gemma3")
  assert ("post_ffw_norm" in params["layers"]) == (name != "tiny_gemma1")


def test_init_scale_and_keys():
  config = get_config("tiny_gemma1")
  init = jax.jit(gemma.init, static_argnums=0)
  one, same, other = (init(config, jax.random.key(seed))["layers"] for seed in (0, 0, 1))
  np.testing.assert_array_equal(one["q"], same["q"])
  assert not np.allclose(one["q"], other["q"])
  assert not np.allclose(one["gate"], one["up"]), "each parameter has a key of its own"
  for name, fan_in in (("q", 128), ("attn_out", 128), ("gate", 128), ("down", 256)):
    assert float(jnp.std(one[name])) == pytest.approx(1 / math.sqrt(fan_in), rel=0.03)
  assert not one["pre_ffw_norm"].any()
  # A parameter does not move when others come or go.
  normed = get_config("tiny_gemma1", post_norms=True)
  down = jax.jit(lambda key: gemma.init(normed, key)["layers"]["down"])(jax.random.key(0))
  np.testing.assert_array_equal(one["down"], down)
