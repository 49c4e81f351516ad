"""Decoding with a cache against the whole sequence at once: lengths, padding, windows, copied rows, memory."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_params import random_params

from genrm_jax.model import cache as kv_cache
from genrm_jax.model import gemma
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
  assert not np.asarray(cache.v)[:, empty].any() and not np.asarray(cache.positions)[empty].any()
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


def test_rows_are_replaced_in_place_by_shorter_ones():
  config = get_config("tiny_gemma2")
  cache = jax.tree.map(lambda a: a - 1, kv_cache.init(config, 4, 64))
  prefixes = _count_up(kv_cache.init(config, 3, 48))
  want = jax.tree.map(np.array, cache)
  source = np.array([-1, 2, 0, 2], np.int32)
  for b in (1, 2, 3):
    want.k[:, b, :48], want.v[:, b, :48] = prefixes.k[:, source[b]], prefixes.v[:, source[b]]
    want.positions[b, :48], want.length[b] = prefixes.positions[source[b]], prefixes.length[source[b]]
  replace = jax.jit(functools.partial(kv_cache.replace_rows, rules=config.rules), donate_argnums=0)
  replace = replace.lower(cache, prefixes, source).compile()
  memory, cache_bytes = replace.memory_analysis(), cache.k.nbytes + cache.v.nbytes
  assert memory.alias_size_in_bytes >= cache_bytes and memory.temp_size_in_bytes < cache_bytes / 16
  jax.tree.map(np.testing.assert_array_equal, replace(cache, prefixes, source), want)


def test_copies_within_a_shard_need_no_communication():
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


def test_decode_updates_the_cache_in_place():
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
