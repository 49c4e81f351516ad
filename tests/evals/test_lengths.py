"""Score against length: Spearman's correlation against its definition, and bins that lose no solution."""

import dataclasses
import itertools

import numpy as np
import pytest
from evals_data import NAN, toy_bank
from hypothesis import given, settings
from hypothesis import strategies as st

from genrm_jax.evals import lengths, metrics

pairs = st.lists(st.tuples(st.integers(-4, 4), st.integers(0, 5), st.booleans()), min_size=2, max_size=12)


def spearman(x, y, mask) -> float | None:
  """Of one problem."""
  quantity = lengths.spearman_within(*(np.array([column]) for column in (x, y, mask)))
  return metrics.bootstrap(quantity, seed=0, draws=5).value


def naive_spearman(x, y) -> float:
  """The correlation of average ranks."""
  ranks = [[np.mean([rank for rank, other in enumerate(sorted(c)) if other == value]) for value in c] for c in (x, y)]
  return float(np.corrcoef(*ranks)[0, 1])


@settings(max_examples=100, deadline=None)
@given(drawn=pairs)
def test_spearman_is_the_correlation_of_average_ranks(drawn):
  x, y, mask = (np.array(column) for column in zip(*drawn, strict=True))
  if any(len(set(column[mask])) < 2 for column in (x, y)):
    assert spearman(x, y, mask) is None
    return
  rho = spearman(x, y, mask)
  assert rho == pytest.approx(naive_spearman(x[mask], y[mask]))
  # Only ranks within the mask matter.
  assert spearman(np.exp(x), y**3, mask) == pytest.approx(rho)
  assert spearman(np.where(mask, x, 99), y, mask) == pytest.approx(rho)


@settings(max_examples=100, deadline=None)
@given(pool=st.lists(st.integers(0, 30), min_size=1, max_size=40))
def test_bins_partition_the_solutions_in_order_of_length(pool):
  bank = toy_bank([[1] * len(pool), [0]])
  lengths_PC = np.zeros(bank.mask.shape, int)
  lengths_PC[0], lengths_PC[1, 0] = pool, pool[0]
  bins = lengths.bins_results(bank, lengths_PC, "tokens")
  assert sum(bins["right"]) == len(pool) and sum(bins["wrong"]) == 1
  distinct = lengths.length_bins(np.arange(10)[None] * 7, toy_bank([[1] * 10]).mask)
  assert distinct.tolist() == [[0, 0, 1, 1, 2, 2, 3, 3, 4, 4]]
  spans = list(zip(bins["shortest"], bins["longest"], strict=True))
  assert len(spans) <= lengths.NUM_BINS and all(low <= high for low, high in spans)
  assert all(before[1] < after[0] for before, after in itertools.pairwise(spans))
  assert spans[0][0] == min(pool) and spans[-1][1] == max(pool)


def test_mean_scores_by_label_and_length():
  bank = toy_bank([[1, 1, 0, 0], [1, 0]])
  scores = np.array([[0.8, 0.6, 0.3, NAN], [0.4, 0.2, NAN, NAN]])
  quantities = lengths.length_quantities(bank, scores, np.array([[1, 9, 1, 9], [1, 9, 0, 0]]))
  intervals = metrics.intervals(quantities, seed=0, draws=50)
  results = lengths.length_results({name: dataclasses.asdict(point) for name, point in intervals.items()})
  assert results["mean_score"]["right"]["value"] == pytest.approx([0.6, 0.6])
  assert results["mean_score"]["wrong"]["value"] == pytest.approx([0.3, 0.2])
  assert results["spearman"]["right"]["value"] == pytest.approx(-1)  # only the first problem has two
  assert results["spearman"]["wrong"]["value"] is None
