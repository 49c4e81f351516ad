"""Which tokens can be sampled, how often, and what a sample's key depends on."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genrm_jax.infer.sampling import SampleConfig, restrict, sample, sample_keys
from genrm_jax.runtime.errors import UserError

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
  """A token stays where fewer than k tokens are more likely, and these hold less than p of the mass."""
  logits = logits.astype(np.float64) / temperature
  greater = logits[:, None, :] > logits[:, :, None]  # [row, token, other]
  kept = greater.sum(-1) < (top_k or logits.shape[1])
  probs = np.where(kept, np.exp(logits), 0)
  probs /= probs.sum(-1, keepdims=True)
  return kept & ((greater * probs[:, None, :]).sum(-1) < top_p)


@pytest.mark.parametrize("top_p", [1e-30, 0.2, 0.55, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 2, 4, 8, 100])
def test_top_k_and_top_p_keep_the_most_likely_tokens(top_k, top_p):
  for temperature in (0.5, 1.7):
    got = np.asarray(restrict(jnp.asarray(LOGITS), SampleConfig(1, temperature, top_k, top_p)))
    kept = _kept(LOGITS, temperature, top_k, top_p)
    np.testing.assert_array_equal(np.isfinite(got), kept)
    np.testing.assert_allclose(got[kept], (LOGITS / temperature)[kept], rtol=1e-6)
    assert kept[np.arange(3), LOGITS.argmax(1)].all()


def test_top_p_counts_the_mass_that_top_k_leaves():
  logits = jnp.log(jnp.array([[0.4, 0.3, 0.2, 0.1]]))
  # Of the two that top-k keeps, the first has 4/7 of the mass: enough for 0.5, not for 0.6.
  for top_p, kept in ((0.5, [True, False, False, False]), (0.6, [True, True, False, False])):
    got = restrict(logits, SampleConfig(1, top_k=2, top_p=top_p))
    np.testing.assert_array_equal(np.isfinite(got[0]), kept)


def test_temperature_0_is_greedy_for_every_key():
  for seed in range(3):
    keys = jax.random.split(jax.random.key(seed), (3, 2))
    got = sample(jnp.asarray(LOGITS), keys, SampleConfig(1, temperature=0, top_k=3, top_p=0.5))
    np.testing.assert_array_equal(got, np.stack([LOGITS.argmax(1)] * 2, axis=1))
    assert got.dtype == jnp.int32


@pytest.mark.parametrize(
  "config", [SampleConfig(1), SampleConfig(1, temperature=0.6), SampleConfig(1, temperature=1.5, top_k=5, top_p=0.9)]
)
def test_frequencies_match_the_probabilities(config):
  n, logits = 20_000, LOGITS[1]
  keys = jax.random.split(jax.random.key(7), (n // 100, 100))
  drawn = np.ravel(sample(jnp.broadcast_to(logits, (n // 100, 8)), keys, config))
  kept = _kept(logits[None], config.temperature, config.top_k, config.top_p)[0]
  expected = np.where(kept, np.exp(logits.astype(np.float64) / config.temperature), 0)
  expected *= n / expected.sum()
  counts = np.bincount(drawn, minlength=8)
  assert (counts[~kept] == 0).all()
  chi_squared = (((counts - expected) ** 2)[kept] / expected[kept]).sum()
  assert chi_squared < 29.9  # at most 7 degrees of freedom: p = 1e-4


def test_each_sample_depends_on_its_own_key_only():
  keys = jax.random.split(jax.random.key(0), (16, 4))
  logits = jnp.broadcast_to(LOGITS[1], (16, 8))
  drawn = np.asarray(sample(logits, keys, SampleConfig(1)))
  assert len(set(drawn.ravel().tolist())) > 3
  order = np.random.default_rng(0).permutation(16)[:10]
  np.testing.assert_array_equal(sample(logits[:10], keys[order, 1:3], SampleConfig(1)), drawn[order, 1:3])


def test_tokens_of_probability_0_are_never_sampled():
  # Also where the uniform number is 0 or just below 1.
  logits = jnp.asarray([[-jnp.inf, 0.0, -jnp.inf, -jnp.inf, -10.0, -jnp.inf]])
  drawn = []
  with pytest.MonkeyPatch.context() as patch:
    for number in (0.0, 0.3, 1 - 2**-23):
      patch.setattr(jax.random, "uniform", lambda key, number=number: jnp.float32(number))
      drawn.append(int(sample(logits, jax.random.split(jax.random.key(0), (1, 1)), SampleConfig(1))[0, 0]))
  assert drawn == [1, 1, 4]


def _key_data(*args):
  """Keys as nested tuples, [n][num_samples]."""
  return [[tuple(key) for key in keys] for keys in np.asarray(jax.random.key_data(sample_keys(*args))).tolist()]


def test_keys_differ_by_seed_purpose_name_and_draw():
  names = ["gsm8k/train/1", "gsm8k/train/2", "gsm8k/train/1/0", "", "plumless", "buckeroo"]  # the last two: one CRC-32
  settings = itertools.product((0, 1), ("generator", "grader", "vote"))
  keys = [key for seed, purpose in settings for of_name in _key_data(seed, purpose, names, 7) for key in of_name]
  assert len(set(keys)) == len(keys) == 2 * 3 * 6 * 7


def test_keys_do_not_depend_on_the_batch():
  names = [f"p{i}" for i in range(12)]
  keys = dict(zip(names, _key_data(5, "vote", names, 4), strict=True))
  assert _key_data(5, "vote", names[::-1], 4) == [keys[name] for name in names[::-1]]
  for name in names[::3]:
    assert _key_data(5, "vote", [name], 2) == [keys[name][:2]]
  assert sample_keys(5, "vote", [], 4).shape == (0, 4)


def test_streams_of_different_purposes_are_unrelated():
  """A solution and its first rationale are sampled with different numbers, even under one name."""
  names = [f"p{i}" for i in range(500)]
  purposes = ("generator", "grader", "vote")
  uniforms = [np.ravel(jax.vmap(jax.vmap(jax.random.uniform))(sample_keys(0, p, names, 4))) for p in purposes]
  correlations = np.corrcoef(uniforms)[np.triu_indices(3, 1)]
  assert np.abs(correlations).max() < 4 / np.sqrt(2000)


@pytest.mark.parametrize(
  "settings",
  [
    {"max_new_tokens": 0},
    {"temperature": -0.1},
    {"top_k": -1},
    {"top_p": 0.0},
    {"top_p": 1.01},
    {"temperature": float("nan")},
    {"top_p": float("nan")},
  ],
)
def test_bad_settings(settings):
  with pytest.raises(UserError, match="bad sampling settings"):
    SampleConfig(**{"max_new_tokens": 1} | settings)
