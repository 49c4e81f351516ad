"""Reliability bins and ties, against their definitions."""

import dataclasses

import numpy as np
import pytest
from evals_data import NAN, padded, toy_bank
from hypothesis import given, settings
from hypothesis import strategies as st

from genrm_jax.evals import calibration, metrics, selection

values = st.sampled_from([0.0, 0.05, 0.1, 0.3, 0.35, 0.999, 1.0, NAN])
pools = st.lists(st.lists(st.tuples(st.booleans(), values), min_size=1, max_size=6), min_size=1, max_size=5)


def bank_and_values(drawn):
  return toy_bank([[label for label, _ in pool] for pool in drawn]), padded([[v for _, v in pool] for pool in drawn])


def reliability_of(bank, scores):
  intervals = metrics.intervals(calibration.reliability_quantities(bank, scores), seed=0, draws=50)
  return calibration.reliability(bank, scores, {name: dataclasses.asdict(it) for name, it in intervals.items()})


@settings(max_examples=40, deadline=None)
@given(drawn=pools)
def test_bins_partition_the_scores_and_add_up_to_the_ece(drawn):
  bank, scores = bank_and_values(drawn)
  bins = reliability_of(bank, scores)
  scored = ~np.isnan(scores)
  assert sum(bins["count"]) == scored.sum()
  filled = [at for at, count in enumerate(bins["count"]) if count]
  if filled:
    gaps = [bins["count"][at] * abs(bins["score"][at] - bins["right"][at]) for at in filled]
    assert sum(gaps) / scored.sum() == pytest.approx(metrics.expected_calibration_error(bank, scores))
    correct = sum(bins["count"][at] * bins["right"][at] for at in filled)
    assert correct == pytest.approx((bank.correct & scored).sum())
  for at in range(10):
    if at in filled:
      assert at / 10 - 1e-9 <= bins["score"][at] <= (at + 1) / 10
    else:
      assert all(bins[key][at] is None for key in ("score", "right", "low", "high"))


@settings(max_examples=100, deadline=None)
@given(drawn=pools)
def test_ties_with_both_labels_are_where_best_of_n_is_uncertain(drawn):
  bank, scores = bank_and_values(drawn)
  counts = calibration.ties(bank, scores)
  accuracy = selection.best_of_n(bank, scores, bank.mask.shape[1])
  assert counts["labels_differ"] == ((accuracy > 1e-9) & (accuracy < 1 - 1e-9)).sum()
  assert counts["labels_differ"] <= counts["tied"] <= counts["pools"] == len(drawn)
  assert counts["unscored"] == sum(all(np.isnan(value) for _, value in pool) for pool in drawn)
  tops = [[key for key in keys if key == max(keys)] for keys in [[-1 if v != v else v for _, v in p] for p in drawn]]
  sizes = [len(top) for top in tops if len(top) > 1]
  assert (counts["candidates"], counts["largest"]) == (sum(sizes), max(sizes, default=0))


def test_ties_between_identical_texts():
  bank = toy_bank([[0, 0, 0]] * 3)
  texts = ["aab", "abb", "abc"]
  pools = [
    [dataclasses.replace(c, text=t) for c, t in zip(*row, strict=True)]
    for row in zip(bank.candidates, texts, strict=True)
  ]
  scores = np.array([[0.9, 0.9, 0.1], [0.7, 0.7, 0.7], [0.3, 0.2, 0.1]])
  counts = calibration.ties(dataclasses.replace(bank, candidates=pools), scores)
  keys = "pools", "unscored", "tied", "candidates", "largest", "texts_differ", "labels_differ"
  assert counts == dict(zip(keys, (3, 0, 2, 5, 3, 1, 0), strict=True))
