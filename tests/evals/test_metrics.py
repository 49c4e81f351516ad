"""Metrics against naive implementations and hand-computed values."""

import numpy as np
import pytest
from evals_data import NAN, score_of, toy_bank, vote
from hypothesis import given, settings
from hypothesis import strategies as st

from genrm_jax.evals import metrics
from genrm_jax.records import Score, Vote
from genrm_jax.runtime.errors import UserError


def naive_auc(values, labels) -> float:
  """Over all pairs, ties counting half; NaN without a pair."""
  pairs = [
    1.0 if good > bad else 0.5 if good == bad else 0.0
    for good in (value for value, label in zip(values, labels, strict=True) if label)
    for bad in (value for value, label in zip(values, labels, strict=True) if not label)
  ]
  return float(np.mean(pairs)) if pairs else NAN


weighted_labels = st.tuples(st.sampled_from([0.1, 0.2, 0.5, 0.9]), st.booleans(), st.integers(0, 3))


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(weighted_labels, min_size=1, max_size=20))
def test_auc_matches_all_pairs_with_weights(rows):
  values, labels, counts = (np.array(column) for column in zip(*rows, strict=True))
  weights = np.stack([np.ones(len(rows)), counts])
  wanted = [naive_auc(values, labels), naive_auc(np.repeat(values, counts), np.repeat(labels, counts))]
  np.testing.assert_allclose(metrics.auc(values, labels, weights), wanted, atol=1e-12)


def test_auc_within_problems_skips_problems_with_one_label():
  bank = toy_bank([[1, 0, 0], [1, 1], [0, 1, 1]])
  values = np.array([[0.5, 0.5, 0.1], [0.2, 0.3, NAN], [0.9, 0.1, NAN]])
  interval = metrics.bootstrap(metrics.auc_within(bank, values), seed=0)
  assert interval.value == pytest.approx(((0.5 + 1) / 2 + 0) / 2)  # the last candidate of p2 has no score


def test_undefined_metrics_are_none():
  bank, undefined = toy_bank([[1, 1]]), metrics.Interval(None, None, None)
  one_label, unscored = np.array([[0.1, 0.9]]), np.full((1, 2), NAN)
  for metric, values in (
    (metrics.auc_within, one_label),
    (metrics.balanced_rm_accuracy, one_label),
    (metrics.rm_accuracy, unscored),
  ):
    assert metrics.bootstrap(metric(bank, values), seed=0) == undefined
  assert metrics.auc_overall(bank, one_label, seed=0) == metrics.auc_overall(bank, unscored, seed=0) == undefined
  assert metrics.expected_calibration_error(bank, unscored) is None


def test_rm_accuracy_brier_and_ece_by_hand():
  bank = toy_bank([[1, 0, 0, 0], [1, 0]])
  values = np.array([[0.9, 0.5, 0.6, NAN], [0.2, 0.1, NAN, NAN]])
  wanted = {
    metrics.rm_accuracy: 3 / 5,
    metrics.balanced_rm_accuracy: (1 / 2 + 2 / 3) / 2,
    metrics.brier: (0.01 + 0.25 + 0.36 + 0.64 + 0.01) / 5,
    metrics.scored_share: 5 / 6,
  }
  for metric, value in wanted.items():
    assert metrics.bootstrap(metric(bank, values), seed=0, draws=10).value == pytest.approx(value), metric.__name__
  assert metrics.expected_calibration_error(bank, values) == pytest.approx((0.1 + 0.5 + 0.6 + 0.8 + 0.1) / 5)
  # A score of 1 falls into the last bin.
  assert metrics.expected_calibration_error(toy_bank([[1, 0]]), np.array([[1.0, 1.0]])) == pytest.approx(0.5)


def test_bootstrap_has_its_nominal_coverage():
  rng = np.random.default_rng(0)
  hits = 0
  for trial in range(300):
    interval = metrics.bootstrap(metrics.mean((rng.random(60) < 0.3).astype(float)), seed=trial, draws=500)
    hits += interval.low <= 0.3 <= interval.high
  assert 0.90 <= hits / 300 <= 0.98


def test_quantities_are_independent_of_each_other_and_share_resamples():
  rng = np.random.default_rng(2)
  base = rng.random(50)
  alone = metrics.bootstrap(metrics.mean(base), seed=7)
  together = metrics.intervals({"noise": metrics.mean(rng.random(50)), "base": metrics.mean(base)}, seed=7)
  assert together["base"].value == alone.value
  assert together["base"].low == pytest.approx(alone.low, abs=1e-12)
  # Paired: a constant difference has no width, though both quantities vary.
  difference = metrics.bootstrap(metrics.mean((base + 0.1) - base), seed=7)
  assert difference.low == pytest.approx(0.1) and difference.high == pytest.approx(0.1)
  assert metrics.intervals({}, seed=0) == {}


def test_interval_of_auc_overall():
  rng = np.random.default_rng(3)
  bank = toy_bank((rng.random((40, 6)) < 0.5).astype(int).tolist())
  values = np.clip(bank.correct * 0.3 + rng.random(bank.mask.shape) * 0.7, 0, 1)
  interval = metrics.auc_overall(bank, values, seed=0)
  assert interval.value == pytest.approx(naive_auc(values.ravel(), bank.correct.ravel()))
  assert interval.low < interval.value < interval.high
  assert interval == metrics.auc_overall(bank, values, seed=0)


def table_of(votes: list[list[Vote]]) -> metrics.ScoreTable:
  """One problem whose candidates have these votes."""
  bank = toy_bank([[1] * len(votes)])
  return metrics.align_scores(bank, "v", [score_of(0, index, None, cast) for index, cast in enumerate(votes)])


def test_rules():
  table = table_of(
    [
      [vote("ok", 0.8), vote("forced", 0.4), vote("missing"), vote("truncated")],
      [vote("contradictory"), vote("missing")],
      [vote("forced", 0.3)],
      [vote("ok", 0.2), vote("truncated", 0.9)],  # a failed vote does not count even if it has a number
      [Vote("ok", 0.3, 0.1, 1), Vote("ok", 0.3, 0.6, 1)],  # a verdict depends on both probabilities
    ]
  )
  wanted = {
    "ok and forced votes": [0.6, NAN, 0.3, 0.2, 0.3],
    "ok votes only": [0.8, NAN, NAN, 0.2, 0.3],
    "failed votes count 0": [0.3, 0.0, 0.3, 0.1, 0.3],
    "share of Yes verdicts": [0.5, NAN, 0.0, 0.0, 0.5],
  }
  assert tuple(wanted) == metrics.RULES
  for rule, values in wanted.items():
    np.testing.assert_allclose(metrics.vote_values(table, rule)[0], values)


def test_groups_of_k_votes_are_disjoint():
  numbers = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
  table = table_of([[vote("ok", p) for p in numbers], [vote("ok", p) for p in numbers] + [vote("ok", 1.0)]])
  assert table.num_votes == 7
  np.testing.assert_allclose(metrics.values_of_k_votes(table, 3)[:, 0, 0], [0.2, 0.5])
  np.testing.assert_allclose(metrics.values_of_k_votes(table, 7)[:, 0, 1], [0.4])
  assert metrics.values_of_k_votes(table, 1).shape == (7, 1, 2)
  with pytest.raises(UserError, match="k=8"):
    metrics.values_of_k_votes(table, 8)


@pytest.mark.parametrize(
  ("scores", "message"),
  [
    *(([], "candidate 1"), ([score_of(0, 0, 0.5)], "two scores"), ([score_of(0, 1, 1.5)], "1.5")),
    *(([score_of(0, 1, NAN)], "nan"), ([Score("p0", 1, "v", 2, 0.5)], r"\[1, 2\]")),
    ([score_of(0, 1, 0.5), score_of(9, 0, 0.5)], "'p9'"),
    *(([score_of(0, 1, 0.5, [v])], word) for v, word in ((vote("fine", 0.5), "'fine'"), (vote("ok"), "p_yes"))),
  ],
)
def test_bad_scores_are_refused(scores, message):
  with pytest.raises(UserError, match=message):
    metrics.align_scores(toy_bank([[1, 0]]), "v", [score_of(0, 0, 0.5), *scores])
