"""Pooling over seeds: known answers, pairing, and intervals with the right coverage when seeds differ."""

import numpy as np
import pytest

from experiments.studies import seeds
from genrm_jax.evals import metrics
from genrm_jax.evals.metrics import Quantity


def means(*columns):
  return {seed: metrics.mean(np.array(column, float)) for seed, column in enumerate(columns)}


def test_value_is_the_mean_over_seeds_and_undefined_where_one_is():
  pooled = seeds.pool({"a": means([1, 0, 0, 1], [1, 1, 1, 1, 1, 0])}, draws=500)["a"]
  assert pooled.by_seed == {0: 0.5, 1: 0.833333}
  # Seeds count equally, whatever their number of problems.
  assert pooled.value == pytest.approx((0.5 + 5 / 6) / 2, abs=1e-6)
  assert pooled.low < pooled.value < pooled.high
  empty = Quantity(((np.zeros(3), np.zeros(3)),))
  pooled = seeds.pool({"a": {0: metrics.mean(np.ones(3)), 1: empty}}, draws=100)["a"]
  assert (pooled.value, pooled.low, pooled.high, pooled.by_seed) == (None, None, None, {0: 1, 1: None})


def test_differences_are_paired_by_seed_and_problem():
  rng = np.random.default_rng(1)
  left = [rng.random(50) + shift for shift in (0, 5, 9)]
  right = [column - 0.25 for column in left]
  differences = [a - b for a, b in zip(left, right, strict=True)]
  found = seeds.pool({"left": means(*left), "difference": means(*differences)}, draws=500)
  assert found["left"].high - found["left"].low > 4
  assert (found["difference"].low, found["difference"].high) == (0.25, 0.25)


def test_ratios_and_averages_of_ratios():
  over, under = np.array([1.0, 0, 1, 1]), np.array([2.0, 1, 1, 1])
  both = Quantity(((over, under), (under, under)))
  found = seeds.pool({"ratio": {0: Quantity(((over, under),))}, "both": {0: both}, "last": {0: both}}, draws=300)
  assert found["ratio"].value == 0.6
  assert found["both"] == found["last"] and found["both"].value == 0.8
  assert found == seeds.pool({name: {0: both} for name in ("both", "last")}, draws=300) | {"ratio": found["ratio"]}
  assert found["both"].low == pytest.approx((found["ratio"].low + 1) / 2)


def test_intervals_cover_a_mean_that_seeds_scatter_around():
  rng, trials = np.random.default_rng(2), 150
  hits = {"two levels": 0, "problems only": 0}
  for _ in range(trials):
    columns = [rng.normal(3 + shift, 1, 40) for shift in rng.normal(0, 0.5, 10)]
    pooled = seeds.pool({"a": means(*columns)}, draws=300)["a"]
    alone = metrics.bootstrap(metrics.mean(np.concatenate(columns)), seed=0, draws=300)
    for name, interval in zip(hits, (pooled, alone), strict=True):
      hits[name] += interval.low <= 3 <= interval.high
  assert hits["two levels"] / trials > 0.88
  assert hits["problems only"] / trials < 0.75
