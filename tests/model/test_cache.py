"""Decoding with a cache against the whole sequence at once: lengths, padding, windows, copied rows, memory."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genrm_jax.model import cache as kv_cache
from genrm_jax.model import gemma
from genrm_jax.model.config import get_config
from genrm_jax.pytrees import KVCache
from genrm_jax.runtime import sharding

T, MAX_LEN = 18, 20
PROMPTS = (3, 8, 5)  # The rows' lengths at prefill, which is 8 wide.
VARIANTS = {
  "gemma1 mqa": ("tiny_gemma1", {}),
  "gemma1 mha": ("tiny_gemma1", {"num_kv_heads": 4}),
  "gemma2 gqa": ("tiny_gemma2", {}),
  "gemma3 gqa": ("tiny_gemma3", {}),
  "gemma3 mqa": ("tiny_gemma3", {"num_kv_heads": 1}),
}
forward = jax.jit(gemma.forward, static_argnums=1)


@functools.cache
def _params(config):
  rng = np.random.default_rng(0)
  std = config.embed_dim**-0.5
  return jax.tree.map(
    lambda spec: jnp.array(rng.normal(scale=std, size=spec.shape), config.param_dtype), gemma.param_specs(config)
  )


def _tokens(rows):
  return np.random.default_rng(0).integers(1, 128, (rows, T)).astype(np.int32)


def _prefill(config, tokens, positions, pad=0):
  """Reads PROMPTS[b] tokens of each row, in a batch of width 8, with `pad` as padding token and position."""
  segments = (np.arange(8) < np.array(PROMPTS)[:, None]).astype(np.int32)
  given = [np.where(segments, a[:, :8], pad) for a in (tokens, positions)]
  cache = kv_cache.init(config, len(PROMPTS), MAX_LEN)
  return forward(_params(config), config, *given, segments, cache)


def _decode(config, cache, tokens, positions, start):
  """One token at a time from start[b]; a row that has read all its tokens gets padding. Gives x and the cache."""
  at, rows, steps = np.array(start), np.arange(len(tokens)), []
  for _ in range(T - min(start)):
    live = (at < T).astype(np.int32)[:, None]
    index = np.minimum(at, T - 1)
    # A row that is done is fed rubbish, which must leave no trace.
    token = np.where(live, tokens[rows, index][:, None], 7)
    x, cache = forward(_params(config), config, token, positions[rows, index][:, None], live, cache)
    steps.append(x[:, 0])
    at = at + live[:, 0]
  return np.stack(steps, axis=1), cache


@pytest.mark.parametrize("variant", VARIANTS)
def test_prefill_copy_and_decode_are_the_full_forward(variant):
  name, overrides = VARIANTS[variant]
  config = get_config(name, **overrides)
  start = np.repeat(PROMPTS, 2)
  tokens = np.repeat(_tokens(3), 2, axis=0)
  # Rows b0 b0 b1 b1 b2 b2; after the prompt the two copies of a row read different tokens.
  for row in range(6):
    tokens[row, start[row] :] = np.random.default_rng(row + 1).integers(1, 128, T - start[row])
  positions = np.tile(np.arange(T, dtype=np.int32), (6, 1))
  positions[2:4] += 4 * (np.arange(T) >= 6)  # A gap, inside the prompt of b1.
  want, _ = forward(_params(config), config, tokens, positions, np.ones_like(tokens))
  prompt, cache = _prefill(config, tokens[::2], positions[::2])
  np.testing.assert_array_equal(cache.length, PROMPTS)
  # The copies take the places of rows that held other tokens.
  _, used = _prefill(config, tokens[3:], positions[3:])
  used = jax.tree.map(lambda a, axis: jnp.repeat(a, 2, axis), used, KVCache(1, 1, 0, 0))
  cache = kv_cache.replace_rows(used, cache, np.repeat(np.arange(3), 2))
  rest, cache = _decode(config, cache, tokens, positions, start)
  for row, n in enumerate(start):
    np.testing.assert_allclose(prompt[row // 2, :n], want[row, :n], atol=5e-5)
    np.testing.assert_allclose(rest[row, : T - n], want[row, n:], atol=5e-5)
  assert np.abs(rest[0] - rest[1]).max() > 0.1
  np.testing.assert_array_equal(cache.length, [T] * 6)
  np.testing.assert_array_equal(cache.positions[:, :T], positions)


def test_prefill_in_two_pieces():
  config = get_config("tiny_gemma3")
  tokens = _tokens(3)
  positions = np.tile(np.arange(T, dtype=np.int32), (3, 1))
  want, _ = forward(_params(config), config, tokens, positions, np.ones_like(tokens))
  _, cache = _prefill(config, tokens, positions)
  more = np.stack([tokens[b, start : start + 8] for b, start in enumerate(PROMPTS)])
  at = np.array(PROMPTS)[:, None] + np.arange(8, dtype=np.int32)
  x, _ = forward(_params(config), config, more, at, np.ones_like(more), cache)
  for b, start in enumerate(PROMPTS):
    np.testing.assert_allclose(x[b], want[b, start : start + 8], atol=3e-5)


def test_padding_leaves_no_trace():
  config = get_config("tiny_gemma2")
  tokens, positions = _tokens(3), np.tile(np.arange(T, dtype=np.int32), (3, 1))
  x, cache = _prefill(config, tokens, positions, pad=0)
  y, other = _prefill(config, tokens, positions, pad=99)
  for b, n in enumerate(PROMPTS):
    np.testing.assert_array_equal(x[b, :n], y[b, :n])
    assert np.abs(cache.k[:, b, :n]).min(axis=(0, 2, 3)).all()
  assert np.isfinite(x).all()
  jax.tree.map(np.testing.assert_array_equal, cache, other)
  empty = np.arange(MAX_LEN) >= np.array(PROMPTS)[:, None]
  assert not np.asarray(cache.v)[:, empty].any()
  assert not np.asarray(cache.positions)[empty].any()


def test_padding_may_reach_beyond_the_end():
  config = get_config("tiny_gemma1")
  tokens, positions = _tokens(3), np.tile(np.arange(T, dtype=np.int32), (3, 1))
  _, cache = _prefill(config, tokens, positions)
  rest = T - 2  # Row 1 holds 8 of 20 and is given 16 slots, 10 of them real.
  segments = np.tile(np.arange(rest) < 10, (3, 1)).astype(np.int32)
  given = np.stack([np.resize(tokens[b, n:], rest) for b, n in enumerate(PROMPTS)])
  at = np.array(PROMPTS)[:, None] + np.arange(rest, dtype=np.int32)
  x, after = forward(_params(config), config, given, at, segments, cache)
  want, _ = forward(_params(config), config, tokens, positions, np.ones_like(tokens))
  np.testing.assert_array_equal(after.length, np.array(PROMPTS) + 10)
  np.testing.assert_allclose(x[1, :10], want[1, 8:18], atol=3e-5)
  np.testing.assert_array_equal(after.k[:, 1, :8], cache.k[:, 1, :8])
  # Tokens that do not fit are lost, and the length says so.
  _, full = forward(_params(config), config, given, at, np.ones_like(segments), cache)
  np.testing.assert_array_equal(full.length, np.array(PROMPTS) + rest)
  np.testing.assert_array_equal(full.k[:, 1, :8], cache.k[:, 1, :8])


def test_cache_has_the_activation_dtype():
  config = get_config("tiny_gemma2", dtype="bfloat16")
  tokens = _tokens(2)
  cache = kv_cache.init(config, 2, MAX_LEN)
  positions = np.tile(np.arange(T, dtype=np.int32), (2, 1))
  x, after = forward(_params(config), config, tokens, positions, np.ones_like(tokens), cache)
  assert (x.dtype, cache.k.dtype, after.v.dtype) == (jnp.bfloat16,) * 3
  assert after.k.shape == (config.num_layers, 2, MAX_LEN, config.num_kv_heads, config.head_dim)


def test_write_touches_its_slots_only():
  buffer = jnp.full((2, 2, 4, 1, 2), 5.0)
  new = jnp.arange(1.0, 9.0).reshape(2, 2, 1, 2)
  got = np.asarray(kv_cache.write(buffer, new, jnp.int32(1), jnp.array([[0, 1], [3, 4]])))
  want = np.full((2, 2, 4, 1, 2), 5.0)
  want[1, 0, 0, 0], want[1, 0, 1, 0], want[1, 1, 3, 0] = [1, 2], [3, 4], [5, 6]
  np.testing.assert_array_equal(got, want)


def test_rows_are_replaced_in_place_by_shorter_ones():
  config = get_config("tiny_gemma2")
  cache, prefixes = kv_cache.init(config, 4, 64), kv_cache.init(config, 3, 48)
  cache = jax.tree.map(lambda a: a - 1, cache)
  prefixes = jax.tree.map(lambda a: jnp.arange(a.size, dtype=a.dtype).reshape(a.shape), prefixes)
  source = np.array([-1, 2, 0, 2], np.int32)
  replace = jax.jit(kv_cache.replace_rows, donate_argnums=0)
  memory = replace.lower(cache, prefixes, source).compile().memory_analysis()
  cache_bytes = cache.k.nbytes + cache.v.nbytes
  assert memory.alias_size_in_bytes >= cache_bytes and memory.temp_size_in_bytes < cache_bytes / 16
  new = replace(cache, prefixes, source)
  for name, axis in (("k", 1), ("v", 1), ("positions", 0), ("length", 0)):
    got, prefix = (np.moveaxis(np.asarray(getattr(c, name)), axis, 0) for c in (new, prefixes))
    for b in range(4):
      slots = (slice(None), slice(48))[: got.ndim - 1] if axis else (slice(48),)[: got.ndim - 1]
      old = np.full_like(got[b], -1)
      if source[b] >= 0:
        old[slots] = prefix[source[b]]
      np.testing.assert_array_equal(got[b], old)


def test_a_row_is_copied_to_others_of_its_shard():
  mesh = sharding.make_mesh(data=2, fsdp=2, devices=jax.devices()[:4])
  with jax.set_mesh(mesh):
    cache = kv_cache.init(get_config("tiny_gemma2"), 8, 48)
    cache = kv_cache.pin(jax.tree.map(lambda a: jnp.arange(a.size, dtype=a.dtype).reshape(a.shape), cache))
    source = sharding.host_to_global((np.array([0, 0, 3, 3, 5, 4, 6, 7], np.int32),), sharding.batch_sharding(mesh))[0]
    copy = jax.jit(kv_cache.copy_rows, static_argnames="num_shards").lower(cache, source, num_shards=4).compile()
    new = copy(cache, source)
  assert not re.search("all-gather|all-reduce|all-to-all|collective-permute", copy.as_text()), (
    "devices exchange nothing"
  )
  for name, axis in (("k", 1), ("v", 1), ("positions", 0), ("length", 0)):
    got, old = np.asarray(getattr(new, name)), np.asarray(getattr(cache, name))
    np.testing.assert_array_equal(got, np.take(old, np.asarray(source), axis=axis))


def test_decode_updates_the_cache_in_place_and_compiles_once():
  config = get_config("tiny_gemma2", num_layers=8)
  params = _params(config)
  traces = []

  def step(cache, token):
    traces.append(1)
    x, cache = gemma.forward(params, config, token, cache.length[:, None], jnp.ones_like(token), cache)
    return cache, jnp.argmax(gemma.unembed(params, config, x), axis=-1).astype(jnp.int32)

  step = jax.jit(step, donate_argnums=0)
  cache, token = kv_cache.init(config, 4, 512), jnp.ones((4, 1), jnp.int32)
  cache_bytes = cache.k.nbytes + cache.v.nbytes
  memory = step.lower(cache, token).compile().memory_analysis()
  assert memory.alias_size_in_bytes >= cache_bytes
  # One layer's keys and values may be read out; a copy of the cache would be 8 times that.
  assert memory.temp_size_in_bytes < cache_bytes / 4
  traces.clear()
  for _ in range(4):
    cache, token = step(cache, token)
  assert len(traces) <= 1
  np.testing.assert_array_equal(cache.length, [4] * 4)
