"""Score against length: Spearman's correlation against its definition, and bins that lose no solution."""

import itertools

import numpy as np
import pytest
from evals_data import toy_bank
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from genrm_jax.evals import lengths, metrics

pairs = st.lists(st.tuples(st.integers(-4, 4), st.integers(0, 5), st.booleans()), min_size=2, max_size=12)


def spearman(x, y, among) -> float | None:
  """Of one problem."""
  quantity = lengths.spearman_within(*(np.array([column]) for column in (x, y, among)))
  return metrics.bootstrap(quantity, seed=0, draws=5).value


def naive(x, y) -> float:
  """The correlation of average ranks."""
  ranks = [[np.mean([rank for rank, other in enumerate(sorted(c)) if other == value]) for value in c] for c in (x, y)]
  return float(np.corrcoef(*ranks)[0, 1])


@settings(max_examples=100, deadline=None)
@given(drawn=pairs)
def test_spearman_is_the_correlation_of_average_ranks(drawn):
  x, y, among = (np.array(column) for column in zip(*drawn, strict=True))
  inside = x[among], y[among]
  if any(len(set(column)) < 2 for column in inside):
    assert spearman(x, y, among) is None
    return
  found = spearman(x, y, among)
  assert found == pytest.approx(naive(*inside))
  # Ranks are all that counts, and what is not among them does not.
  assert spearman(np.exp(x), y**3, among) == pytest.approx(found)
  assert spearman(-x, y, among) == pytest.approx(-found)
  assert spearman(np.where(among, x, 99), y, among) == pytest.approx(found)


@given(x=st.lists(st.floats(-5, 5), min_size=2, max_size=8, unique=True))
def test_spearman_of_what_rises_together_is_1(x):
  assume(len(set(np.arctan(x))) == len(x))
  assert spearman(np.array(x), np.arctan(x), np.ones(len(x), bool)) == pytest.approx(1)


def test_spearman_is_averaged_over_the_problems_that_have_one():
  x = np.array([[1, 2, 3], [1, 2, 3], [1, 1, 1]])
  y = np.array([[1, 2, 3], [3, 1, 2], [1, 2, 3]])
  found = metrics.bootstrap(lengths.spearman_within(x, y, np.ones((3, 3), bool)), seed=0, draws=5)
  assert found.value == pytest.approx((1 - 0.5) / 2)


@settings(max_examples=100, deadline=None)
@given(pool=st.lists(st.integers(0, 30), min_size=1, max_size=40))
def test_bins_hold_every_solution_once_in_order_of_length(pool):
  bank = toy_bank([[1] * len(pool), [0]])
  of_all = np.zeros(bank.mask.shape, int)
  of_all[0], of_all[1, 0] = pool, pool[0]
  bins = lengths.bins_results(bank, of_all, "tokens")
  assert sum(bins["right"]) == len(pool) and sum(bins["wrong"]) == 1
  spans = list(zip(bins["shortest"], bins["longest"], strict=True))
  assert len(spans) <= lengths.NUM_BINS and all(low <= high for low, high in spans)
  assert all(before[1] < after[0] for before, after in itertools.pairwise(spans))
  assert spans[0][0] == min(pool) and spans[-1][1] == max(pool)


def test_bins_of_different_lengths_are_fifths():
  bank = toy_bank([[1] * 10])
  bins = lengths.length_bins(np.arange(10)[None] * 7, bank.mask)
  assert bins.tolist() == [[0, 0, 1, 1, 2, 2, 3, 3, 4, 4]]


def test_mean_scores_are_of_one_label_and_one_length():
  bank = toy_bank([[1, 1, 0, 0], [1, 0]])
  of_all = np.array([[1, 9, 1, 9], [1, 9, 0, 0]])
  scores = np.array([[0.8, 0.6, 0.3, float("nan")], [0.4, 0.2, float("nan"), float("nan")]])
  found = {
    name: {"value": it.value, "low": it.low, "high": it.high}
    for name, it in metrics.intervals(lengths.length_quantities(bank, scores, of_all), seed=0, draws=50).items()
  }
  told = lengths.length_results(found)
  assert told["mean_score"]["right"]["value"] == pytest.approx([0.6, 0.6])
  assert told["mean_score"]["wrong"]["value"] == pytest.approx([0.3, 0.2])
  assert told["spearman"]["right"]["value"] == pytest.approx(-1)  # of the first problem, the only one that has two
  assert told["spearman"]["wrong"]["value"] is None
