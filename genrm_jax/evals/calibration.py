"""Calibration: the bins of a reliability plot, and ties for the best score, which Best-of-N breaks at random.

Axis letters: P problem, C candidate (padded).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from genrm_jax.evals.metrics import CALIBRATION_BINS, Quantity, calibration_bins
from genrm_jax.evals.selection import Bank

_LIKELIHOODS_BEFORE = ("dpo",)  # for results written before they listed their likelihoods


def likelihoods(results: Mapping[str, Any]) -> frozenset[str]:
  """The verifiers of these results whose score is a likelihood, not a probability of correctness."""
  return frozenset(results.get("likelihoods", _LIKELIHOODS_BEFORE))


def reliability_quantities(bank: Bank, values_PC: np.ndarray) -> dict[str, Quantity]:
  """Share of correct candidates in each non-empty bin, `bin=0/right` to `bin=9/right`.

  The bins are those of the expected calibration error: ten of equal width.
  """
  return {
    f"bin={index}/right": Quantity((((in_bin & bank.correct).sum(axis=1), in_bin.sum(axis=1)),))
    for index, in_bin in enumerate(_binned(bank, values_PC))
    if in_bin.any()
  }


def reliability(bank: Bank, values_PC: np.ndarray, intervals: Mapping[str, Mapping[str, Any]]) -> dict[str, list]:
  """The data of a reliability plot, as lists over the ten bins; None where a bin is empty.

  Args:
    bank: the candidates.
    values_PC: their scores, NaN where there is none.
    intervals: of `reliability_quantities`.

  Returns:
    count (candidates), score (their mean), right (the share that is correct) and its interval, low and high.
  """
  columns: dict[str, list] = {"count": [], "score": [], "right": [], "low": [], "high": []}
  for index, in_bin in enumerate(_binned(bank, values_PC)):
    columns["count"].append(int(in_bin.sum()))
    columns["score"].append(float(values_PC[in_bin].mean()) if in_bin.any() else None)
    share = intervals.get(f"bin={index}/right", {})
    for column, key in (("right", "value"), ("low", "low"), ("high", "high")):
      columns[column].append(share.get(key))
  return columns


def _binned(bank: Bank, values_PC: np.ndarray) -> np.ndarray:
  """Membership of each scored candidate in each bin, `bool[bins, P, C]`."""
  scored = ~np.isnan(values_PC) & bank.mask
  bins = np.where(scored, calibration_bins(np.where(scored, values_PC, 0.0)), -1)
  return bins == np.arange(CALIBRATION_BINS)[:, None, None]


def ties(bank: Bank, values_PC: np.ndarray) -> dict[str, int]:
  """How often several candidates share the best score of a pool, so that Best-of-N picks one of them at random.

  Returns:
    pools: number of pools.
    unscored: pools without any score; all candidates of such a pool tie.
    tied: pools in which several candidates share the best score.
    candidates: how many candidates these ties involve in all; largest: the most in one pool.
    texts_differ: tied pools whose tied candidates have more than one text.
    labels_differ: tied pools with both correct and incorrect candidates in the tie: chance decides.
  """
  keys = np.where(np.isnan(values_PC) | ~bank.mask, -np.inf, values_PC)
  best = (keys == keys.max(axis=1, keepdims=True)) & bank.mask
  count = best.sum(axis=1)
  correct = (best & bank.correct).sum(axis=1)
  tied = count > 1
  texts = [
    len({candidate.text for candidate, is_best in zip(pool, row, strict=False) if is_best})
    for pool, row in zip(bank.candidates, best, strict=True)
  ]
  return {
    "pools": len(count),
    "unscored": int((keys.max(axis=1) == -np.inf).sum()),
    "tied": int(tied.sum()),
    "candidates": int(count[tied].sum()),
    "largest": int(count[tied].max(initial=0)),
    "texts_differ": int((tied & (np.array(texts) > 1)).sum()),
    "labels_differ": int((tied & (correct > 0) & (correct < count)).sum()),
  }
