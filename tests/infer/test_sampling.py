"""Which tokens may be drawn, how often each is, and what a rollout's key depends on."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genrm_jax.infer.sampling import SampleConfig, restrict, rollout_keys, sample
from genrm_jax.runtime.errors import UserError

# Ties at the top, in the middle and at the bottom; the second row has no tie, the third nothing else.
LOGITS = np.array(
  [
    [2.0, -1.0, 2.0, 0.5, 0.5, 0.5, -1.0, -3.0],
    [0.1, 3.0, -2.0, 1.0, 2.2, -0.7, 0.4, -1.5],
    [0.0] * 8,
  ],
  np.float32,
)


def _kept(logits, temperature, top_k, top_p):
  """A token stays where fewer than k tokens, with less than p of the mass, are likelier: for each rule by itself."""
  logits = logits.astype(np.float64) / temperature
  likelier = logits[:, None, :] > logits[:, :, None]  # [row, token, other]
  kept = likelier.sum(-1) < (top_k or logits.shape[1])
  probs = np.where(kept, np.exp(logits), 0)
  probs /= probs.sum(-1, keepdims=True)
  return kept & ((likelier * probs[:, None, :]).sum(-1) < top_p)


@pytest.mark.parametrize("top_p", [1e-30, 0.2, 0.55, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 2, 4, 8, 100])
def test_top_k_and_top_p_keep_the_likeliest(top_k, top_p):
  for temperature in (0.5, 1.7):
    got = np.asarray(restrict(jnp.asarray(LOGITS), SampleConfig(1, temperature, top_k, top_p)))
    kept = _kept(LOGITS, temperature, top_k, top_p)
    np.testing.assert_array_equal(np.isfinite(got), kept)
    np.testing.assert_allclose(got[kept], (LOGITS / temperature)[kept], rtol=1e-6)
    assert kept[np.arange(3), LOGITS.argmax(1)].all()


def test_top_p_looks_at_the_mass_that_top_k_leaves():
  logits = jnp.log(jnp.array([[0.4, 0.3, 0.2, 0.1]]))
  # Of the two that stay, the first has 4/7 of the mass: enough by itself for 0.5, not for 0.6.
  for top_p, kept in ((0.5, [True, False, False, False]), (0.6, [True, True, False, False])):
    got = restrict(logits, SampleConfig(1, top_k=2, top_p=top_p))
    np.testing.assert_array_equal(np.isfinite(got[0]), kept)


def test_temperature_0_takes_the_likeliest_whatever_the_key():
  for seed in range(3):
    keys = jax.random.split(jax.random.key(seed), (3, 2))
    got = sample(jnp.asarray(LOGITS), keys, SampleConfig(1, temperature=0, top_k=3, top_p=0.5))
    np.testing.assert_array_equal(got, np.stack([LOGITS.argmax(1)] * 2, axis=1))
    assert got.dtype == jnp.int32


@pytest.mark.parametrize(
  "config", [SampleConfig(1), SampleConfig(1, temperature=0.6), SampleConfig(1, temperature=1.5, top_k=5, top_p=0.9)]
)
def test_tokens_are_drawn_as_often_as_their_probability(config):
  n, logits = 20_000, LOGITS[1]
  keys = jax.random.split(jax.random.key(7), (n // 100, 100))
  drawn = np.ravel(sample(jnp.broadcast_to(logits, (n // 100, 8)), keys, config))
  kept = _kept(logits[None], config.temperature, config.top_k, config.top_p)[0]
  expected = np.where(kept, np.exp(logits.astype(np.float64) / config.temperature), 0)
  expected *= n / expected.sum()
  counts = np.bincount(drawn, minlength=8)
  assert (counts[~kept] == 0).all()
  chi_squared = (((counts - expected) ** 2)[kept] / expected[kept]).sum()
  assert chi_squared < 29.9  # 7 degrees of freedom at most: one seed in 10,000 exceeds it


def test_rows_draw_with_their_own_keys():
  keys = jax.random.split(jax.random.key(0), (16, 4))
  logits = jnp.broadcast_to(LOGITS[1], (16, 8))
  drawn = np.asarray(sample(logits, keys, SampleConfig(1)))
  assert len(set(drawn.ravel().tolist())) > 3
  order = np.random.default_rng(0).permutation(16)[:10]
  np.testing.assert_array_equal(sample(logits[:10], keys[order, 1:3], SampleConfig(1)), drawn[order, 1:3])


def test_a_token_without_probability_is_never_drawn():
  # The first, some in the middle and the last are impossible, whatever is drawn: also 0, and just below 1.
  logits = jnp.asarray([[-jnp.inf, 0.0, -jnp.inf, -jnp.inf, -10.0, -jnp.inf]])
  drawn = []
  with pytest.MonkeyPatch.context() as patch:
    for number in (0.0, 0.3, 1 - 2**-23):
      patch.setattr(jax.random, "uniform", lambda key, number=number: jnp.float32(number))
      drawn.append(int(sample(logits, jax.random.split(jax.random.key(0), (1, 1)), SampleConfig(1))[0, 0]))
  assert drawn == [1, 1, 4]


def _key_data(*args):
  return [tuple(row) for row in np.asarray(jax.random.key_data(rollout_keys(*args))).tolist()]


def test_a_key_is_of_seed_problem_candidate_and_vote():
  rows = list(itertools.product(("gsm8k/train/1", "gsm8k/train/2", ""), (0, 1, 7), (0, 1, 7)))
  keys = [key for seed in (0, 1) for key in _key_data(seed, *zip(*rows, strict=True))]
  assert len(set(keys)) == len(keys) == 2 * 27


def test_a_key_is_of_nothing_else():
  rows = list(itertools.product(("a", "b"), range(3), range(4)))
  keys = dict(zip(rows, _key_data(5, *zip(*rows, strict=True)), strict=True))
  shuffled = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
  assert _key_data(5, *zip(*shuffled, strict=True)) == [keys[row] for row in shuffled]
  for row in rows[::7]:
    assert _key_data(5, *zip(row, strict=True)) == [keys[row]]


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
