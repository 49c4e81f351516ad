"""Metrics, reliability, ties and lengths against naive implementations and hand-computed values."""

import dataclasses
import itertools
from functools import partial

import numpy as np
import pytest
from evals_data import NAN, padded, score_of, toy_bank, vote
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused

from genrm_jax.evals import calibration, lengths, metrics
from genrm_jax.records import Score, Vote


def value_of(quantity) -> float | None:
  return metrics.bootstrap(quantity, seed=0, draws=5).value


def points_of(quantities) -> dict[str, dict]:
  intervals = metrics.intervals(quantities, seed=0, draws=50)
  return {name: dataclasses.asdict(interval) for name, interval in intervals.items()}


def naive_auc(values, labels) -> float:
  """Over all pairs, ties counting half; NaN without a pair."""
  sides = (
    [value for value, label in zip(values, labels, strict=True) if bool(label) is side] for side in (True, False)
  )
  pairs = [1.0 if good > bad else 0.5 if good == bad else 0.0 for good, bad in itertools.product(*sides)]
  return float(np.mean(pairs)) if pairs else NAN


weighted_labels = st.tuples(st.sampled_from([0.1, 0.2, 0.5, 0.9]), st.booleans(), st.integers(0, 3))


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(weighted_labels, min_size=1, max_size=20))
def test_auc_matches_all_pairs_with_weights(rows):
  values, labels, counts = (np.array(column) for column in zip(*rows, strict=True))
  weights = np.stack([np.ones(len(rows)), counts])
  wanted = [naive_auc(values, labels), naive_auc(np.repeat(values, counts), np.repeat(labels, counts))]
  np.testing.assert_allclose(metrics.auc(values, labels, weights), wanted, atol=1e-12)


def test_metrics_by_hand_and_undefined_ones():
  bank = toy_bank([[1, 0, 0, 0], [1, 0]])
  values = np.array([[0.9, 0.5, 0.6, NAN], [0.2, 0.1, NAN, NAN]])
  mixed = toy_bank([[1, 0, 0], [1, 1], [0, 1, 1]])  # the second has one label, the last candidate no score
  of_mixed = np.array([[0.5, 0.5, 0.1], [0.2, 0.3, NAN], [0.9, 0.1, NAN]])
  good, one_label, unscored = toy_bank([[1, 1]]), np.array([[0.1, 0.9]]), np.full((1, 2), NAN)
  for metric, wanted in (
    (metrics.rm_accuracy(bank, values), 3 / 5),
    (metrics.balanced_rm_accuracy(bank, values), (1 / 2 + 2 / 3) / 2),
    (metrics.brier(bank, values), (0.01 + 0.25 + 0.36 + 0.64 + 0.01) / 5),
    (metrics.scored_share(bank, values), 5 / 6),
    (metrics.auc_within(mixed, of_mixed), ((0.5 + 1) / 2 + 0) / 2),
    (metrics.auc_within(good, one_label), None),
    (metrics.balanced_rm_accuracy(good, one_label), None),
    (metrics.rm_accuracy(good, unscored), None),
  ):
    assert value_of(metric) == (wanted and pytest.approx(wanted))
  assert metrics.expected_calibration_error(good, unscored) is None
  rng, undefined = np.random.default_rng(3), metrics.Interval(None, None, None)
  bank = toy_bank((rng.random((40, 6)) < 0.5).astype(int).tolist())
  values = np.clip(bank.correct * 0.3 + rng.random(bank.mask.shape) * 0.7, 0, 1)
  auc = metrics.auc_overall(bank, values, seed=0)
  assert auc.value == pytest.approx(naive_auc(values.ravel(), bank.correct.ravel())) and auc.low < auc.value < auc.high
  assert metrics.auc_overall(good, one_label, seed=0) == metrics.auc_overall(good, unscored, seed=0) == undefined


def test_bootstrap_has_its_nominal_coverage():
  rng, hits = np.random.default_rng(0), 0
  for trial in range(300):
    interval = metrics.bootstrap(metrics.mean((rng.random(60) < 0.3).astype(float)), seed=trial, draws=500)
    hits += interval.low <= 0.3 <= interval.high
  assert 0.90 <= hits / 300 <= 0.98


def test_quantities_are_independent_of_each_other_and_share_resamples():
  rng = np.random.default_rng(2)
  base = rng.random(50)
  alone = metrics.bootstrap(metrics.mean(base), seed=7)
  together = metrics.intervals({"noise": metrics.mean(rng.random(50)), "base": metrics.mean(base)}, seed=7)
  assert dataclasses.astuple(together["base"]) == pytest.approx(dataclasses.astuple(alone), abs=1e-12)
  # Paired: a constant difference has no width, though both quantities vary.
  difference = metrics.bootstrap(metrics.mean((base + 0.1) - base), seed=7)
  assert difference.low == pytest.approx(0.1) and difference.high == pytest.approx(0.1)
  assert metrics.intervals({}, seed=0) == {}


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
      [vote("ok", 1.0), vote("ok", 0.4), vote("ok", 0.4), vote("missing")],  # the mean says Yes, the majority No
    ]
  )
  wanted = {
    "ok and forced votes": [0.6, NAN, 0.3, 0.2, 0.3, 0.6],
    "ok votes only": [0.8, NAN, NAN, 0.2, 0.3, 0.6],
    "failed votes count 0": [0.3, 0.0, 0.3, 0.1, 0.3, 0.45],
    "share of Yes verdicts": [0.5, NAN, 0.0, 0.0, 0.5, 1 / 3],
    "majority verdict": [0.5, NAN, 0.0, 0.0, 0.5, 0.0],
  }
  assert tuple(wanted) == metrics.RULES
  for rule, values in wanted.items():
    np.testing.assert_allclose(metrics.vote_values(table, rule)[0], values)


def test_groups_of_k_votes_are_disjoint():
  votes = [vote("ok", p / 10) for p in range(1, 8)]
  table = table_of([votes, [*votes, vote("ok", 1.0)]])
  assert table.num_votes == 7
  np.testing.assert_allclose(metrics.values_of_k_votes(table, 3)[:, 0, 0], [0.2, 0.5])
  np.testing.assert_allclose(metrics.values_of_k_votes(table, 7)[:, 0, 1], [0.4])
  assert metrics.values_of_k_votes(table, 1).shape == (7, 1, 2)
  refused(("k=8", metrics.values_of_k_votes, table, 8))


def test_bad_scores_are_refused():
  align = partial(metrics.align_scores, toy_bank([[1, 0]]), "v")
  first, second = score_of(0, 0, 0.5), score_of(0, 1, 0.5)
  refused(
    *(("candidate 1", align, [first]), ("two scores", align, [first, first])),
    *((repr(value), align, [first, score_of(0, 1, value)]) for value in (1.5, NAN)),
    (r"\[1, 2\]", align, [first, Score("p0", 1, "v", 2, 0.5)]),
    ("'p9'", align, [first, second, score_of(9, 0, 0.5)]),
    ("'fine'", align, [first, score_of(0, 1, 0.5, [vote("fine", 0.5)])]),
    ("p_yes", align, [first, score_of(0, 1, 0.5, [vote("ok")])]),
  )


scores_of_one = st.sampled_from([0.0, 0.05, 0.1, 0.3, 0.35, 0.999, 1.0, NAN])
candidates = st.lists(st.tuples(st.booleans(), scores_of_one, st.sampled_from("ab")), min_size=1, max_size=6)


def bank_and_values(drawn):
  """Pools of (label, score, text)."""
  bank = toy_bank([[label for label, _, _ in pool] for pool in drawn])
  texts = [
    [dataclasses.replace(c, text=text) for c, (_, _, text) in zip(row, pool, strict=True)]
    for row, pool in zip(bank.candidates, drawn, strict=True)
  ]
  return dataclasses.replace(bank, candidates=texts), padded([[v for _, v, _ in pool] for pool in drawn])


@settings(max_examples=40, deadline=None)
@given(drawn=st.lists(candidates, min_size=1, max_size=5))
def test_bins_partition_the_scores_and_add_up_to_the_ece(drawn):
  bank, scores = bank_and_values(drawn)
  bins = calibration.reliability(bank, scores, points_of(calibration.reliability_quantities(bank, scores)))
  scored = [(min(int(v * 10 + 1e-9), 9), v, label) for pool in drawn for label, v, _ in pool if v == v]
  gap = 0.0
  for at in range(10):
    members = [(value, label) for place, value, label in scored if place == at]
    assert bins["count"][at] == len(members)
    if members:
      score, right = np.mean(members, axis=0)
      assert (bins["score"][at], bins["right"][at]) == pytest.approx((score, right))
      gap += len(members) * abs(score - right) / len(scored)
    else:
      assert all(bins[key][at] is None for key in ("score", "right", "low", "high"))
  assert metrics.expected_calibration_error(bank, scores) == (pytest.approx(gap) if scored else None)


@settings(max_examples=100, deadline=None)
@given(drawn=st.lists(candidates, min_size=1, max_size=5))
def test_ties_match_their_definition(drawn):
  keyed = [[(-1 if v != v else v, label, text) for label, v, text in pool] for pool in drawn]
  tops = [[one for one in pool if one[0] == max(pool)[0]] for pool in keyed]
  tied = [top for top in tops if len(top) > 1]
  assert calibration.ties(*bank_and_values(drawn)) == {
    "pools": len(drawn),
    "unscored": sum(top[0][0] == -1 for top in tops),
    "tied": len(tied),
    "candidates": sum(map(len, tied)),
    "largest": max(map(len, tied), default=0),
    "texts_differ": sum(len({text for _, _, text in top}) > 1 for top in tied),
    "labels_differ": sum(len({label for _, label, _ in top}) > 1 for top in tied),
  }


def naive_spearman(x, y) -> float:
  """The correlation of average ranks."""
  ranks = [[np.mean([rank for rank, other in enumerate(sorted(c)) if other == value]) for value in c] for c in (x, y)]
  return float(np.corrcoef(*ranks)[0, 1])


@settings(max_examples=100, deadline=None)
@given(drawn=st.lists(st.tuples(st.integers(-4, 4), st.integers(0, 5), st.booleans()), min_size=2, max_size=12))
def test_spearman_is_the_correlation_of_average_ranks(drawn):
  x, y, mask = (np.array(column) for column in zip(*drawn, strict=True))
  rho = value_of(lengths.spearman_within(x[None], y[None], mask[None]))
  is_constant = any(len(set(column[mask])) < 2 for column in (x, y))
  assert rho == (None if is_constant else pytest.approx(naive_spearman(x[mask], y[mask])))


@settings(max_examples=100, deadline=None)
@given(pool=st.lists(st.integers(0, 30), min_size=1, max_size=40))
def test_length_bins_partition_the_solutions_in_order(pool):
  bank = toy_bank([[1] * len(pool), [0]])
  lengths_PC = np.zeros(bank.mask.shape, int)
  lengths_PC[0], lengths_PC[1, 0] = pool, pool[0]
  bins = lengths.bins_results(bank, lengths_PC, "tokens")
  assert sum(bins["right"]) == len(pool) and sum(bins["wrong"]) == 1
  spans = list(zip(bins["shortest"], bins["longest"], strict=True))
  assert len(spans) <= lengths.NUM_BINS and all(low <= high for low, high in spans)
  assert all(before[1] < after[0] for before, after in itertools.pairwise(spans))
  assert spans[0][0] == min(pool) and spans[-1][1] == max(pool)
  distinct = lengths.length_bins(np.arange(10)[None] * 7, toy_bank([[1] * 10]).mask)
  assert distinct.tolist() == [[0, 0, 1, 1, 2, 2, 3, 3, 4, 4]]


def test_mean_scores_by_label_and_length():
  bank = toy_bank([[1, 1, 0, 0], [1, 0]])
  scores = np.array([[0.8, 0.6, 0.3, NAN], [0.4, 0.2, NAN, NAN]])
  quantities = lengths.length_quantities(bank, scores, np.array([[1, 9, 1, 9], [1, 9, 0, 0]]))
  results = lengths.length_results(points_of(quantities))
  assert results["mean_score"]["right"]["value"] == pytest.approx([0.6, 0.6])
  assert results["mean_score"]["wrong"]["value"] == pytest.approx([0.3, 0.2])
  # Only the first problem has two correct solutions with scores.
  assert [results["spearman"][side]["value"] for side in ("right", "wrong")] == [pytest.approx(-1), None]
