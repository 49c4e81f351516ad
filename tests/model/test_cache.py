"""Decoding with a cache against the whole sequence at once: lengths, padding, copied rows, memory; the TPU kernel."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_params import random_params

from genrm_jax.model import attention, gemma, layers
from genrm_jax.model import cache as kv_cache
from genrm_jax.model.config import get_config
from genrm_jax.pytrees import KVCache
from genrm_jax.runtime import sharding

T, MAX_LEN = 18, 20
PROMPTS = (3, 8, 5)  # the rows' lengths at prefill, which is 8 wide
POSITIONS = np.tile(np.arange(T, dtype=np.int32), (3, 1))
AXES = {"k": 1, "v": 1, "positions": 0, "length": 0}  # the axis of rows
forward = jax.jit(gemma.forward, static_argnums=1)
_params = functools.cache(random_params)


def _tokens(rows):
  return np.random.default_rng(0).integers(1, 128, (rows, T)).astype(np.int32)


def _full(config, tokens, positions):
  return forward(_params(config), config, tokens, positions, np.ones_like(tokens))[0]


def _prefill(config, tokens, positions):
  """Reads PROMPTS[b] tokens of each row, in a batch of width 8; padding that is no zero must leave no trace."""
  segments = (np.arange(8) < np.array(PROMPTS)[:, None]).astype(np.int32)
  padded = [np.where(segments, a[:, :8], 99) for a in (tokens, positions)]
  cache = kv_cache.init(config, len(PROMPTS), MAX_LEN)
  return forward(_params(config), config, *padded, segments, cache)


def _decode(config, cache, tokens, positions, start):
  """One token at a time from start[b]; rows that have read all their tokens get padding. Returns x and the cache."""
  place, rows, steps = np.array(start), np.arange(len(tokens)), []
  for _ in range(T - min(start)):
    live = (place < T).astype(np.int32)[:, None]
    index = np.minimum(place, T - 1)
    token = np.where(live, tokens[rows, index][:, None], 7)  # padding that is no zero must leave no trace
    x, cache = forward(_params(config), config, token, positions[rows, index][:, None], live, cache)
    steps.append(x[:, 0])
    place = place + live[:, 0]
  return np.stack(steps, axis=1), cache


@pytest.mark.parametrize("name", ["tiny_gemma1", "tiny_gemma2", "tiny_gemma3"])
def test_prefill_copy_and_decode_match_the_full_forward(name):
  config = get_config(name)
  start = np.repeat(PROMPTS, 2)
  tokens = np.repeat(_tokens(3), 2, axis=0)
  # Rows b0 b0 b1 b1 b2 b2; after the prompt the two copies of a row read different tokens.
  for row in range(6):
    tokens[row, start[row] :] = np.random.default_rng(row + 1).integers(1, 128, T - start[row])
  positions = np.repeat(POSITIONS, 2, axis=0)
  positions[2:4] += 4 * (np.arange(T) >= 6)  # a gap, inside the prompt of b1
  want = _full(config, tokens, positions)
  prompt, cache = _prefill(config, tokens[::2], positions[::2])
  np.testing.assert_array_equal(cache.length, PROMPTS)
  empty = np.arange(MAX_LEN) >= np.array(PROMPTS)[:, None]
  assert not np.asarray(cache.v).swapaxes(2, 3)[:, empty].any() and not np.asarray(cache.positions)[empty].any()
  # The copies overwrite rows that held other tokens.
  _, used = _prefill(config, tokens[3:], positions[3:])
  used = jax.tree.map(lambda a, axis: jnp.repeat(a, 2, axis), used, KVCache(**AXES))
  cache = kv_cache.replace_rows(used, cache, np.repeat(np.arange(3), 2), config.rules)
  rest, cache = _decode(config, cache, tokens, positions, start)
  for row, n in enumerate(start):
    np.testing.assert_allclose(prompt[row // 2, :n], want[row, :n], atol=5e-5)
    np.testing.assert_allclose(rest[row, : T - n], want[row, n:], atol=5e-5)
  assert np.abs(rest[0] - rest[1]).max() > 0.1
  np.testing.assert_array_equal(cache.length, [T] * 6)
  np.testing.assert_array_equal(cache.positions[:, :T], positions)


def _count_up(cache):
  return jax.tree.map(lambda a: jnp.arange(a.size, dtype=a.dtype).reshape(a.shape), cache)


def test_the_cache_is_updated_in_place_and_copied_without_communication():
  config = get_config("tiny_gemma2")
  cache = jax.tree.map(lambda a: a - 1, kv_cache.init(config, 4, 64))
  prefixes = _count_up(kv_cache.init(config, 3, 48))
  want = jax.tree.map(np.array, cache)
  source = np.array([-1, 2, 0, 2], np.int32)
  for b in (1, 2, 3):
    want.k[:, b, :, :48], want.v[:, b, :, :48] = prefixes.k[:, source[b]], prefixes.v[:, source[b]]
    want.positions[b, :48], want.length[b] = prefixes.positions[source[b]], prefixes.length[source[b]]
  replace = jax.jit(functools.partial(kv_cache.replace_rows, rules=config.rules), donate_argnums=0)
  replace = replace.lower(cache, prefixes, source).compile()
  memory, cache_bytes = replace.memory_analysis(), cache.k.nbytes + cache.v.nbytes
  assert memory.alias_size_in_bytes >= cache_bytes and memory.temp_size_in_bytes < cache_bytes / 16
  jax.tree.map(np.testing.assert_array_equal, replace(cache, prefixes, source), want)
  mesh, config = sharding.make_mesh(data=2, fsdp=2, devices=jax.devices()[:4]), get_config("tiny_gemma2")
  with jax.set_mesh(mesh):
    cache = kv_cache.pin(_count_up(kv_cache.init(config, 8, 48)), config.rules)
    (source,) = sharding.host_to_global((np.array([0, 0, 3, 3, 5, 4, 6, 7], np.int32),), sharding.batch_sharding(mesh))
    copy = jax.jit(functools.partial(kv_cache.copy_rows, num_shards=4, rules=config.rules))
    copy = copy.lower(cache, source).compile()
    new = copy(cache, source)
  assert not re.search("all-gather|all-reduce|all-to-all|collective-permute", copy.as_text())
  for name, axis in AXES.items():
    got, old = np.asarray(getattr(new, name)), np.asarray(getattr(cache, name))
    np.testing.assert_array_equal(got, np.take(old, np.asarray(source), axis=axis))
  config = get_config("tiny_gemma2", num_layers=8)
  params = _params(config)

  @functools.partial(jax.jit, donate_argnums=0)
  def step(cache, token):
    x, cache = gemma.forward(params, config, token, cache.length[:, None], jnp.ones_like(token), cache)
    return cache, jnp.argmax(gemma.unembed(params, config, x), axis=-1).astype(jnp.int32)

  cache, token = kv_cache.init(config, 4, 512), jnp.ones((4, 1), jnp.int32)
  cache_bytes = cache.k.nbytes + cache.v.nbytes
  memory = step.lower(cache, token).compile().memory_analysis()
  assert memory.alias_size_in_bytes >= cache_bytes
  # One layer's keys and values may be read out; a copy of the cache would be 8 times that.
  assert memory.temp_size_in_bytes < cache_bytes / 4


KB, KT, KH = 2, 256, 128


def test_attention_without_keys_is_finite_and_only_long_rows_of_wide_heads_on_tpus_use_the_kernel():
  q, (k, v) = jnp.ones((1, 3, 1, 4)), jnp.ones((2, 1, 1, 3, 4))
  mask = jnp.zeros((1, 3, 3), bool)
  value, grads = jax.value_and_grad(lambda *a: layers.attention(*a, mask, 2.0).sum(), argnums=(0, 1, 2))(q, k, v)
  assert np.isfinite(value) and all(np.isfinite(g).all() for g in grads)
  config = get_config("tiny_gemma2", head_dim=128)

  def lowered(num_tokens, platform):
    params = jax.eval_shape(lambda key: gemma.init(config, key), jax.random.key(0))
    rows = [jax.ShapeDtypeStruct((1, num_tokens), jnp.int32)] * 3
    forward = jax.jit(jax.grad(lambda p, *rows: gemma.forward(p, config, *rows, remat="dots")[0].sum()))
    return forward.trace(params, *rows).lower(lowering_platforms=(platform,)).as_text()

  assert "tpu_custom_call" in lowered(1024, "tpu")
  assert "tpu_custom_call" not in lowered(512, "tpu")
  assert "tpu_custom_call" not in lowered(1024, "cpu")


def _inputs(num_kv_heads):
  rng = np.random.default_rng(0)
  q, k, v = (rng.normal(size=(KB, KT, n, KH)).astype(np.float32) for n in (2, num_kv_heads, num_kv_heads))
  segments = np.array([[1] * 100 + [2] * 120 + [0] * 36, [1] * 30 + [2] * 226], np.int32)
  return q / KH**0.5, k, v, segments


def _plain(segments, window=None, softcap=None):
  starts = np.stack([[int(np.argmax(row == s)) for s in row] for row in segments])
  mask = layers.packed_mask(jnp.asarray(np.arange(KT) - starts), jnp.asarray(segments), window)
  return lambda q, k, v: layers.attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask, softcap)


def _loss(attend, segments, q, k, v):
  """Depends on all results except those at padding."""
  out = jnp.where((segments > 0)[..., None, None], attend(q, k, v), 0.0)
  return jnp.sum(jnp.sin(out) * jnp.cos(jnp.arange(out.size).reshape(out.shape))), out


@pytest.mark.parametrize(
  ("window", "softcap", "num_kv_heads"), [(None, None, 1), (40, 5.0, 2)], ids=["gemma_1", "gemma_2"]
)
def test_kernel_matches_plain_attention(window, softcap, num_kv_heads):
  q, k, v, segments = _inputs(num_kv_heads)
  options = {"window": window, "softcap": softcap, "rules": sharding.DEFAULT_RULES, "interpret": True}
  kernel = functools.partial(attention.splash_attention, segments_BT=segments, **options)
  grad = functools.partial(jax.grad, has_aux=True, argnums=(0, 1, 2))
  got, want = (
    jax.jit(grad(functools.partial(_loss, attend, segments)))(q, k, v)
    for attend in (kernel, _plain(segments, window, softcap))
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, want)


@pytest.mark.parametrize(("num_kv_heads", "heads", "batch"), [(1, "tensor", "data"), (2, "data", "tensor")])
def test_kernel_on_a_mesh(num_kv_heads, heads, batch):
  q, k, v, segments = _inputs(num_kv_heads)
  rules = {"activation_batch": batch, "activation_heads": heads}
  rules |= {"activation_kv_heads": heads} if num_kv_heads > 1 else {}
  rules = get_config("tiny_gemma2", num_kv_heads=num_kv_heads, sharding=rules).rules
  kernel = functools.partial(attention.splash_attention, window=None, softcap=None, rules=rules, interpret=True)
  with jax.set_mesh(sharding.make_mesh(data=2, tensor=2, devices=jax.devices()[:4])):
    got = jax.jit(kernel)(q, k, v, segments)
  assert got.sharding.shard_shape(got.shape) == (1, KT, 1, KH)
  np.testing.assert_allclose(
    np.asarray(got)[segments > 0], np.asarray(_plain(segments)(q, k, v))[segments > 0], atol=2e-5
  )
