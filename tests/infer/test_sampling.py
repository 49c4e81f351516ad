"""Which tokens can be sampled, how often, and what a sample's key depends on."""

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refusals import refused

from genrm_jax.infer.sampling import SampleConfig, restrict, sample, sample_keys

# Ties at the top, in the middle and at the bottom of the first row; none in the second; only ties in the third.
LOGITS = np.array(
  [
    [2.0, -1.0, 2.0, 0.5, 0.5, 0.5, -1.0, -3.0],
    [0.1, 3.0, -2.0, 1.0, 2.2, -0.7, 0.4, -1.5],
    [0.0] * 8,
  ],
  np.float32,
)


def _kept(logits, temperature, top_k, top_p):
  """A token stays where fewer than k tokens are more likely, and these hold less than p of the mass; in float64."""
  kept = []
  for row in logits.astype(np.float64) / temperature:
    _, token, equal = np.unique(-row, return_inverse=True, return_counts=True)  # the most likely first
    counts = np.concatenate([[0], np.cumsum(equal)])[:-1]
    within = counts < (top_k or len(row))
    masses = np.where(within, equal * np.bincount(token, np.exp(row - row.max())) / equal, 0)
    before = np.cumsum(masses) - masses
    kept.append((within & (before < top_p * masses.sum()))[token])
  return np.array(kept)


@pytest.mark.parametrize("top_p", [1e-30, 0.2, 0.55, 0.9, 0.979, 0.999, 1.0])
@pytest.mark.parametrize(("top_k", "temperature"), [(0, 0.5), (0, 1.7), (1, 1.7), (4, 0.5), (100, 1.7)])
def test_top_k_and_top_p_keep_the_most_likely_tokens(top_k, temperature, top_p):
  got = np.asarray(restrict(jnp.asarray(LOGITS), SampleConfig(1, temperature, top_k, top_p)))
  kept = _kept(LOGITS, temperature, top_k, top_p)
  np.testing.assert_array_equal(np.isfinite(got), kept)
  np.testing.assert_allclose(got[kept], (LOGITS / temperature)[kept], rtol=1e-6)
  assert kept[np.arange(3), LOGITS.argmax(1)].all()


def _drawn(logits, config, num, seed=7):
  """Samples of one distribution, as many rows as make the work for large vocabularies small."""
  keys = jax.random.split(jax.random.key(seed), (num // 2000, 2000))
  draw = jax.jit(partial(sample, config=config))
  return np.concatenate([np.ravel(draw(jnp.asarray(logits)[None], key[None])) for key in keys])


def _hard(size):
  logits = np.round(np.random.default_rng(size).normal(0, 2.5, size), 2).astype(np.float32)
  logits[1::2] = logits[-size // 8 :] = -np.inf
  return logits


@pytest.mark.parametrize(
  ("size", "settings"),
  [
    (8, {}),
    (8, {"top_k": 5, "top_p": 0.9}),
    (2048, {"top_k": 300}),
    (2048, {"top_p": 0.9}),
    (32_000, {"top_k": 900, "top_p": 0.7}),
    (256_128, {}),
    (256_128, {"top_p": 0.9}),
  ],
)
def test_frequencies_match_the_probabilities(size, settings):
  config = SampleConfig(1, temperature=0.8, **settings)
  logits, num = LOGITS[1] if size == 8 else _hard(size), 40_000
  kept = _kept(logits[None], config.temperature, config.top_k, config.top_p)[0] & np.isfinite(logits)
  counts = np.bincount(_drawn(logits, config, num), minlength=size)
  assert len(counts) == size and (counts[~kept] == 0).all()
  expected = np.where(kept, np.exp(logits.astype(np.float64) / config.temperature), 0)
  expected *= num / expected.sum()
  # Cells of at least 20 expected draws: likely tokens alone, the unlikely together with their neighbors.
  cell = np.floor(np.cumsum(expected) / 20)
  cells = [np.bincount(cell.astype(int), of, int(cell.max()) + 1) for of in (counts, expected)]
  observed, wanted = (of[cells[1] > 10] for of in cells)
  excess = ((observed - wanted) ** 2 / wanted).sum() - (len(wanted) - 1)
  assert abs(excess) < 4.5 * np.sqrt(2 * len(wanted)) and len(wanted) >= min(size, 100) // 20


def test_tokens_below_the_resolution_of_float32_are_sampled():
  """Half of the mass is spread over 250,000 tokens, in steps from 2e-8 to 4e-6 each, behind one likely token."""
  tail = np.repeat(np.geomspace(1, 200, 10), 25_000)
  logits = np.log(np.concatenate([[1.0], tail / tail.sum()])).astype(np.float32)
  drawn = _drawn(logits, SampleConfig(1), 40_000)
  counts = np.bincount((drawn + 24_999) // 25_000, minlength=11)
  expected = 20_000 * np.concatenate([[1], tail[::25_000] * 25_000 / tail.sum()])
  assert ((counts - expected) ** 2 / expected).sum() < 35.6  # 10 degrees of freedom: p = 1e-4
  assert len(set(drawn[drawn > 0].tolist())) > 17_000


@pytest.mark.parametrize("size", [6, 5000])
def test_where_only_the_best_tokens_can_be_sampled(size):
  rows = np.full((4, size), -np.inf, np.float32)
  rows[0] = np.random.default_rng(size).permutation(size) / size
  rows[1, 1::2] = 0.0
  rows[2:, 3] = 3.0
  rows[2] = np.where(rows[2] > 0, rows[2], -1e4)
  rows[3, 0] = -80.0  # of probability 0 in float32 at a temperature of 0.5
  keys = jax.random.split(jax.random.key(0), (4, 500))
  for settings, first in (
    ({"top_k": 1}, 0),
    ({"top_p": 1e-6}, 0),
    ({"temperature": 1e-6}, 0),
    ({"temperature": 0.5}, 2),
    ({"temperature": 0.5, "top_k": 4, "top_p": 0.999}, 2),
  ):
    drawn = np.asarray(jax.jit(partial(sample, config=SampleConfig(1, **settings)))(rows, keys))[first:]
    best = rows[first:] == rows[first:].max(axis=1, keepdims=True)
    assert np.take_along_axis(best, drawn, axis=1).all(), settings


def test_draws_from_small_vocabularies_are_those_of_one_cumulative_sum():
  """The committed results were made with these, so they do not change."""
  keys = jax.random.split(jax.random.key(2), (4, 500))
  for size in (102, 4096):
    logits = jax.random.normal(jax.random.key(size), (4, size)) * 3
    cdf = np.asarray(jnp.cumsum(jax.nn.softmax(logits / 0.7, axis=-1), axis=-1))
    uniform = np.asarray(jax.vmap(jax.vmap(jax.random.uniform))(keys)) * cdf[:, -1:]
    want = [np.searchsorted(row, numbers, side="right") for row, numbers in zip(cdf, uniform, strict=True)]
    draw = jax.jit(partial(sample, config=SampleConfig(1, temperature=0.7)))
    np.testing.assert_array_equal(draw(logits, keys), want)


@pytest.mark.parametrize("size", [8, 5000])
def test_each_sample_depends_on_its_own_key_only(size):
  keys = jax.random.split(jax.random.key(0), (16, 4))
  logits = jax.random.normal(jax.random.key(1), (16, size)) * 2
  draw = jax.jit(partial(sample, config=SampleConfig(1, top_k=6, top_p=0.9)))
  drawn = np.asarray(draw(logits, keys))
  assert len(set(drawn.ravel().tolist())) > 3
  order = np.random.default_rng(0).permutation(16)[:10]
  np.testing.assert_array_equal(draw(logits[order], keys[order, 1:3]), drawn[order, 1:3])


@pytest.mark.parametrize("copies", [1, 1000])
def test_tokens_of_probability_0_are_never_sampled(copies):
  # Also where the uniform number is 0 or just below 1.
  logits = jnp.asarray([[-jnp.inf, 0.0, -jnp.inf, -jnp.inf, -10.0, -jnp.inf] * copies])
  drawn = []
  with pytest.MonkeyPatch.context() as patch:
    for number in (0.0, 0.3, 1 - 2**-23):
      patch.setattr(jax.random, "uniform", lambda key, shape=(), number=number: jnp.full(shape, number, jnp.float32))
      draw = jax.jit(partial(sample, config=SampleConfig(1)))
      drawn.append(int(draw(logits, jax.random.split(jax.random.key(0), (1, 1)))[0, 0]))
  assert drawn[0] == 1 and drawn[1] % 6 == 1 and drawn[2] == 6 * copies - 2


def _key_data(*args):
  return [[tuple(key) for key in keys] for keys in np.asarray(jax.random.key_data(sample_keys(*args))).tolist()]


def test_keys_differ_by_seed_purpose_name_and_draw_and_not_by_batch():
  names = ["gsm8k/train/1", "gsm8k/train/2", "gsm8k/train/1/0", "", "plumless", "buckeroo"]  # the last two: one CRC-32
  settings = itertools.product((0, 1), ("generator", "grader", "vote"))
  keys = [key for seed, purpose in settings for of_name in _key_data(seed, purpose, names, 7) for key in of_name]
  assert len(set(keys)) == len(keys) == 2 * 3 * 6 * 7
  names = [f"p{i}" for i in range(12)]
  keys = dict(zip(names, _key_data(5, "vote", names, 4), strict=True))
  assert _key_data(5, "vote", names[::-1], 4) == [keys[name] for name in names[::-1]]
  for name in names[::3]:
    assert _key_data(5, "vote", [name], 2) == [keys[name][:2]]
  assert sample_keys(5, "vote", [], 4).shape == (0, 4)


def test_bad_settings():
  bad = {"max_new_tokens": (0,), "temperature": (-0.1, math.nan), "top_k": (-1,), "top_p": (0.0, 1.01, math.nan)}
  for name, values in bad.items():
    for value in values:
      refused(("bad sampling settings", partial(SampleConfig, **{"max_new_tokens": 1, name: value})))
