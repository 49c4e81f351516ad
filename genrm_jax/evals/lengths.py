"""Does a verifier judge solutions by length? Scores against length, separately for correct and incorrect solutions.

Separately, because their lengths may differ: then a good verifier's scores go with length over all solutions, too.

Axis letters: P problem, C candidate (padded).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from genrm_jax.evals.metrics import Quantity, divide
from genrm_jax.evals.selection import Bank

NUM_BINS = 5
SIDES = ("right", "wrong")  # as the results spell them


def characters(bank: Bank) -> np.ndarray:
  """Length of each solution in characters, `i64[P, C]`, 0 in the padding."""
  lengths = np.zeros(bank.mask.shape, int)
  lengths[bank.mask] = [len(candidate.text) for pool in bank.candidates for candidate in pool]
  return lengths


def length_bins(lengths_PC: np.ndarray, mask_PC: np.ndarray) -> np.ndarray:
  """The quintile of length that each candidate falls into, `i64[P, C]`, numbered from 0; -1 in the padding.

  Equal lengths share a bin, so bins differ in size and there may be fewer than five.
  """
  lengths = lengths_PC[mask_PC]
  edges = np.unique(np.quantile(lengths, np.arange(1, NUM_BINS) / NUM_BINS, method="inverted_cdf"))
  bins = np.full(mask_PC.shape, -1)
  bins[mask_PC] = np.unique(np.searchsorted(edges, lengths), return_inverse=True)[1]
  return bins


def bins_results(bank: Bank, lengths_PC: np.ndarray, unit: str) -> dict[str, Any]:
  """The length bins: unit, and per bin the shortest and longest length and the number of right and wrong solutions."""
  bins = length_bins(lengths_PC, bank.mask)
  members = [bins == index for index in range(bins.max() + 1)]
  return {
    "unit": unit,
    "shortest": [int(lengths_PC[in_bin].min()) for in_bin in members],
    "longest": [int(lengths_PC[in_bin].max()) for in_bin in members],
    "right": [int((in_bin & bank.correct).sum()) for in_bin in members],
    "wrong": [int((in_bin & ~bank.correct).sum()) for in_bin in members],
  }


def length_quantities(bank: Bank, values_PC: np.ndarray, lengths_PC: np.ndarray) -> dict[str, Quantity]:
  """Mean score by length bin, `length=0/right`, and rank correlation, `spearman/right`; the same with `wrong`."""
  scored = ~np.isnan(values_PC) & bank.mask
  bins = length_bins(lengths_PC, bank.mask)
  values = np.where(scored, values_PC, 0.0)
  quantities = {}
  for side, mask in zip(SIDES, (scored & bank.correct, scored & ~bank.correct), strict=True):
    for index in range(bins.max() + 1):
      in_bin = mask & (bins == index)
      quantities[f"length={index}/{side}"] = Quantity((((values * in_bin).sum(axis=1), in_bin.sum(axis=1)),))
    quantities[f"spearman/{side}"] = spearman_within(values, lengths_PC, mask)
  return quantities


def length_results(intervals: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
  """The intervals of `length_quantities`, rearranged.

  Returns:
    {"spearman": {"right": INTERVAL, "wrong": INTERVAL}, "mean_score": {"right": {"value": [...], "low": [...],
    "high": [...]}, "wrong": ...}}, each list over length bins, None where a bin is empty.
  """
  by_side = {
    side: [point for name, point in intervals.items() if name.startswith("length=") and name.endswith(side)]
    for side in SIDES
  }
  return {
    "spearman": {side: intervals[f"spearman/{side}"] for side in SIDES},
    "mean_score": {
      side: {key: [point[key] for point in points] for key in ("value", "low", "high")}
      for side, points in by_side.items()
    },
  }


def spearman_within(x_PC: np.ndarray, y_PC: np.ndarray, mask_PC: np.ndarray) -> Quantity:
  """Spearman's rank correlation of x and y over the masked candidates of a problem, averaged over problems.

  Problems in which x or y is constant have no correlation and are left out.
  """
  x, y = (_centred_ranks(values, mask_PC) for values in (x_PC, y_PC))
  spread = np.sqrt((x**2).sum(axis=1) * (y**2).sum(axis=1))
  rho = divide((x * y).sum(axis=1), spread)
  known = ~np.isnan(rho)
  return Quantity(((np.where(known, rho, 0.0), known),))


def _centred_ranks(values_PC: np.ndarray, mask_PC: np.ndarray) -> np.ndarray:
  """Ranks within each row minus their mean; ties get their mean rank; 0 outside the mask."""
  above = (values_PC[:, :, None] > values_PC[:, None, :]) & mask_PC[:, None, :]
  below = (values_PC[:, :, None] < values_PC[:, None, :]) & mask_PC[:, None, :]
  # These ranks have mean 0: each pair adds to one of its two what it subtracts from the other.
  return np.where(mask_PC, (above.sum(axis=2) - below.sum(axis=2)) / 2, 0.0)
