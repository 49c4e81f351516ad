"""Is a score of 0.8 right 8 times in 10? The bins of a reliability plot; and ties at the top, which a coin decides.

Axis letters: P problem, C candidate (padded).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from genrm_jax.evals.metrics import CALIBRATION_BINS, Quantity, calibration_bins
from genrm_jax.evals.selection import Bank

# Verifiers whose score is the likelihood of the solution, not the probability that it is right.
LIKELIHOODS = frozenset({"dpo"})


def reliability_quantities(bank: Bank, values_PC: np.ndarray) -> dict[str, Quantity]:
  """Share of right ones among the scored candidates of each bin that has any: `bin=0/right` to `bin=9/right`.

  The bins are those of the expected calibration error: ten of equal width.
  """
  binned = _binned(bank, values_PC)
  return {
    f"bin={index}/right": Quantity((((held & bank.correct).sum(axis=1), held.sum(axis=1)),))
    for index, held in enumerate(binned)
    if held.any()
  }


def reliability(bank: Bank, values_PC: np.ndarray, found: Mapping[str, Mapping[str, Any]]) -> dict[str, list]:
  """What a reliability plot shows, as lists over the ten bins; None for the figures of an empty bin.

  Args:
    bank: the candidates.
    values_PC: their scores, NaN for none.
    found: the intervals of `reliability_quantities`.

  Returns:
    count (candidates), score (their mean), right (the share of them that is right) with its interval, low and high.
  """
  columns: dict[str, list] = {"count": [], "score": [], "right": [], "low": [], "high": []}
  for index, held in enumerate(_binned(bank, values_PC)):
    columns["count"].append(int(held.sum()))
    columns["score"].append(float(values_PC[held].mean()) if held.any() else None)
    share = found.get(f"bin={index}/right", {})
    for key, of_share in (("right", "value"), ("low", "low"), ("high", "high")):
      columns[key].append(share.get(of_share))
  return columns


def _binned(bank: Bank, values_PC: np.ndarray) -> np.ndarray:
  """Which candidates have a score of each bin, `bool[bins, P, C]`."""
  scored = ~np.isnan(values_PC) & bank.mask
  bins = np.where(scored, calibration_bins(np.where(scored, values_PC, 0.0)), -1)
  return bins == np.arange(CALIBRATION_BINS)[:, None, None]


def ties(bank: Bank, values_PC: np.ndarray) -> dict[str, int]:
  """How often the best score of a pool is shared, so that Best-of-N with the whole pool picks one at random.

  Returns:
    pools: all of them.
    unscored: pools without any score; all candidates of such a pool tie.
    tied: pools whose best score several candidates share.
    candidates: how many share it in these, together; largest: the most in one.
    texts_differ: tied pools in which those are not all the same text.
    labels_differ: tied pools in which right and wrong ones are among those: the coin decides.
  """
  keys = np.where(np.isnan(values_PC) | ~bank.mask, -np.inf, values_PC)
  best = (keys == keys.max(axis=1, keepdims=True)) & bank.mask
  count = best.sum(axis=1)
  right = (best & bank.correct).sum(axis=1)
  tied = count > 1
  texts = [
    len({candidate.text for candidate, held in zip(pool, row, strict=False) if held})
    for pool, row in zip(bank.candidates, best, strict=True)
  ]
  return {
    "pools": len(count),
    "unscored": int((keys.max(axis=1) == -np.inf).sum()),
    "tied": int(tied.sum()),
    "candidates": int(count[tied].sum()),
    "largest": int(count[tied].max(initial=0)),
    "texts_differ": int((tied & (np.array(texts) > 1)).sum()),
    "labels_differ": int((tied & (right > 0) & (right < count)).sum()),
  }
