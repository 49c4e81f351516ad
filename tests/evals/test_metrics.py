"""Metrics against slow and plain versions of themselves."""

import numpy as np
import pytest
from evals_data import score_of, toy_bank, vote
from hypothesis import given, settings
from hypothesis import strategies as st

from genrm_jax.evals import metrics
from genrm_jax.records import Score, Vote
from genrm_jax.runtime.errors import UserError

NAN = float("nan")


def naive_auc(values, right) -> float:
  """By all pairs, ties half; NaN without a pair."""
  pairs = [
    1.0 if good > bad else 0.5 if good == bad else 0.0
    for good in (value for value, is_right in zip(values, right, strict=True) if is_right)
    for bad in (value for value, is_right in zip(values, right, strict=True) if not is_right)
  ]
  return float(np.mean(pairs)) if pairs else NAN


@settings(max_examples=100, deadline=None)
@given(
  rows=st.lists(
    st.tuples(st.sampled_from([0.1, 0.2, 0.5, 0.9]), st.booleans(), st.integers(0, 3)), min_size=1, max_size=20
  )
)
def test_auc_equals_all_pairs_also_when_weighted(rows):
  values, right, counts = (np.array(column) for column in zip(*rows, strict=True))
  weights = np.stack([np.ones(len(rows)), counts])
  found = metrics.auc(values, right, weights)
  wanted = [naive_auc(values, right), naive_auc(np.repeat(values, counts), np.repeat(right, counts))]
  np.testing.assert_allclose(found, wanted, atol=1e-12)


def test_auc_within_problems_leaves_out_problems_of_one_label():
  bank = toy_bank([[1, 0, 0], [1, 1], [0, 1, 1]])
  values = np.array([[0.5, 0.5, 0.1], [0.2, 0.3, NAN], [0.9, 0.1, NAN]])
  interval = metrics.bootstrap(metrics.auc_within(bank, values), seed=0)
  assert interval.value == pytest.approx(((0.5 + 1) / 2 + 0) / 2)  # the last candidate of p2 has no score


def test_figures_without_anything_to_count_are_none():
  bank, nothing = toy_bank([[1, 1]]), metrics.Interval(None, None, None)
  values = np.array([[0.1, 0.9]])
  assert metrics.bootstrap(metrics.auc_within(bank, values), seed=0) == nothing
  assert metrics.bootstrap(metrics.balanced_rm_accuracy(bank, values), seed=0) == nothing
  assert metrics.auc_overall(bank, values, seed=0) == nothing
  unscored = np.full((1, 2), NAN)
  assert metrics.bootstrap(metrics.rm_accuracy(bank, unscored), seed=0) == nothing
  assert metrics.auc_overall(bank, unscored, seed=0) == nothing
  assert metrics.expected_calibration_error(bank, unscored) is None


def test_rm_accuracy_brier_and_ece_by_hand():
  bank = toy_bank([[1, 0, 0, 0], [1, 0]])
  values = np.array([[0.9, 0.5, 0.6, NAN], [0.2, 0.1, NAN, NAN]])
  figures = {
    "plain": metrics.rm_accuracy(bank, values),
    "balanced": metrics.balanced_rm_accuracy(bank, values),
    "brier": metrics.brier(bank, values),
    "scored": metrics.scored_share(bank, values),
  }
  found = {name: it.value for name, it in metrics.intervals(figures, seed=0).items()}
  assert found["plain"] == pytest.approx(3 / 5)
  assert found["balanced"] == pytest.approx((1 / 2 + 2 / 3) / 2)
  assert found["brier"] == pytest.approx((0.01 + 0.25 + 0.36 + 0.64 + 0.01) / 5)
  assert found["scored"] == pytest.approx(5 / 6)
  assert metrics.expected_calibration_error(bank, values) == pytest.approx((0.1 + 0.5 + 0.6 + 0.8 + 0.1) / 5)


def test_a_score_of_one_is_in_the_last_bin():
  assert metrics.expected_calibration_error(toy_bank([[1, 0]]), np.array([[1.0, 1.0]])) == pytest.approx(0.5)


def test_bootstrap_covers_the_truth_about_as_often_as_it_says():
  rng = np.random.default_rng(0)
  hits = 0
  for trial in range(300):
    interval = metrics.bootstrap(metrics.mean((rng.random(60) < 0.3).astype(float)), seed=trial, draws=500)
    hits += interval.low <= 0.3 <= interval.high
  assert 0.90 <= hits / 300 <= 0.98


def test_bootstrap_has_the_width_of_the_normal_interval():
  values = np.random.default_rng(1).normal(size=400)
  interval = metrics.bootstrap(metrics.mean(values), seed=0)
  assert interval.value == pytest.approx(values.mean())
  assert interval.high - interval.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.05)


def test_quantities_do_not_depend_on_their_company_and_share_resamples():
  rng = np.random.default_rng(2)
  base = rng.random(50)
  alone = metrics.bootstrap(metrics.mean(base), seed=7)
  together = metrics.intervals({"noise": metrics.mean(rng.random(50)), "base": metrics.mean(base)}, seed=7)
  assert together["base"].value == alone.value
  assert together["base"].low == pytest.approx(alone.low, abs=1e-12)
  # Paired: a shift that is the same for every problem has no width, though both figures vary.
  difference = metrics.bootstrap(metrics.mean((base + 0.1) - base), seed=7)
  assert difference.low == pytest.approx(0.1) and difference.high == pytest.approx(0.1)
  assert metrics.intervals({}, seed=0) == {}


def test_auc_overall_interval_holds_its_point_and_is_seeded():
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
    ]
  )
  wanted = {
    "ok and forced votes": [0.6, NAN, 0.3],
    "ok votes only": [0.8, NAN, NAN],
    "failed votes count 0": [0.3, 0.0, 0.3],
    "share of Yes verdicts": [0.5, NAN, 0.0],
  }
  assert tuple(wanted) == metrics.RULES
  for rule, values in wanted.items():
    np.testing.assert_allclose(metrics.vote_values(table, rule)[0], values)


def test_a_failed_vote_does_not_count_though_it_carries_a_number():
  np.testing.assert_allclose(
    metrics.vote_values(table_of([[vote("ok", 0.2), vote("truncated", 0.9)]]), metrics.RULES[0]), 0.2
  )


def test_verdict_is_by_both_probabilities():
  table = table_of([[Vote("ok", 0.3, 0.1, 1), Vote("ok", 0.3, 0.6, 1)]])
  np.testing.assert_allclose(metrics.vote_values(table, "share of Yes verdicts"), 0.5)


def test_groups_of_k_votes_are_disjoint_and_leave_the_rest_out():
  numbers = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
  table = table_of([[vote("ok", p) for p in numbers], [vote("ok", p) for p in numbers] + [vote("ok", 1.0)]])
  assert table.num_votes == 7
  np.testing.assert_allclose(metrics.values_of_k_votes(table, 3)[:, 0, 0], [0.2, 0.5])
  np.testing.assert_allclose(metrics.values_of_k_votes(table, 7)[:, 0, 1], [0.4])
  assert metrics.values_of_k_votes(table, 1).shape == (7, 1, 2)
  with pytest.raises(UserError, match="k=8"):
    metrics.values_of_k_votes(table, 8)


def test_scores_without_votes_are_fine():
  table = metrics.align_scores(toy_bank([[1, 0]]), "orm", [score_of(0, 0, 0.5), score_of(0, 1, None)])
  assert table.num_votes == 0
  np.testing.assert_array_equal(table.values, [[0.5, NAN]])
  assert np.isnan(metrics.vote_values(table, metrics.RULES[0])).all()


@pytest.mark.parametrize(
  ("scores", "message"),
  [
    ([score_of(0, 0, 0.5)], "candidate 1: there is no score"),
    ([score_of(0, 0, 0.5), score_of(0, 0, 0.5)], "two scores for candidate 0"),
    ([score_of(0, 0, 0.5), score_of(0, 1, 0.5), score_of(9, 0, 0.5)], "unknown candidate: 0 of problem 'p9'"),
    ([score_of(0, 0, 0.5), score_of(0, 1, 1.5)], "1.5 is not within 0 to 1"),
    ([score_of(0, 0, 0.5), score_of(0, 1, NAN)], "nan is not within 0 to 1"),
    ([score_of(0, 0, 0.5), score_of(0, 1, 0.5, [vote("fine", 0.5)])], "'fine'"),
    ([score_of(0, 0, 0.5), score_of(0, 1, 0.5, [vote("ok")])], "has no p_yes"),
    ([score_of(0, 0, 0.5), Score("p0", 1, "v", 2, 0.5)], r"several training steps are mixed: \[1, 2\]"),
  ],
)
def test_bad_scores_are_named(scores, message):
  with pytest.raises(UserError, match=message):
    metrics.align_scores(toy_bank([[1, 0]]), "v", scores)
