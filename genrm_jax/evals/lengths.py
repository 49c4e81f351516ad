"""Does a verifier go by the length of a solution? Scores against length, for right and for wrong solutions apart.

Right and wrong ones apart, because they may differ in length: among all, a good verifier's scores go with length too.

Axis letters: P problem, C candidate (padded).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from genrm_jax.evals.metrics import Quantity, divide
from genrm_jax.evals.selection import Bank

NUM_BINS = 5
SIDES = ("right", "wrong")


def characters(bank: Bank) -> np.ndarray:
  """The length of each solution in characters: `i64[P, C]`, 0 in the padding."""
  lengths = np.zeros(bank.mask.shape, int)
  lengths[bank.mask] = [len(candidate.text) for pool in bank.candidates for candidate in pool]
  return lengths


def length_bins(lengths_PC: np.ndarray, mask_PC: np.ndarray) -> np.ndarray:
  """The fifth of the candidates, by length, that each belongs to: `i64[P, C]`, -1 in the padding.

  Equal lengths stay together, so bins differ in size and there may be fewer than five. They are numbered from 0.
  """
  lengths = lengths_PC[mask_PC]
  edges = np.unique(np.quantile(lengths, np.arange(1, NUM_BINS) / NUM_BINS, method="inverted_cdf"))
  bins = np.full(mask_PC.shape, -1)
  bins[mask_PC] = np.unique(np.searchsorted(edges, lengths), return_inverse=True)[1]
  return bins


def bins_results(bank: Bank, lengths_PC: np.ndarray, unit: str) -> dict[str, Any]:
  """The bins of length: unit, and as lists over bins the shortest, the longest, and how many are right and wrong."""
  bins = length_bins(lengths_PC, bank.mask)
  held = [bins == index for index in range(bins.max() + 1)]
  return {
    "unit": unit,
    "shortest": [int(lengths_PC[it].min()) for it in held],
    "longest": [int(lengths_PC[it].max()) for it in held],
    "right": [int((it & bank.correct).sum()) for it in held],
    "wrong": [int((it & ~bank.correct).sum()) for it in held],
  }


def length_quantities(bank: Bank, values_PC: np.ndarray, lengths_PC: np.ndarray) -> dict[str, Quantity]:
  """Mean scores by bin of length, `length=0/right`, rank correlations, `spearman/right`; also for wrong ones."""
  scored = ~np.isnan(values_PC) & bank.mask
  bins = length_bins(lengths_PC, bank.mask)
  values = np.where(scored, values_PC, 0.0)
  quantities = {}
  for side, among in zip(SIDES, (scored & bank.correct, scored & ~bank.correct), strict=True):
    for index in range(bins.max() + 1):
      held = among & (bins == index)
      quantities[f"length={index}/{side}"] = Quantity((((values * held).sum(axis=1), held.sum(axis=1)),))
    quantities[f"spearman/{side}"] = spearman_within(values, lengths_PC, among)
  return quantities


def length_results(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
  """What `length_quantities` found, from its intervals.

  Returns:
    {"spearman": {"right": INTERVAL, "wrong": INTERVAL}, "mean_score": {"right": {"value": [...], "low": [...],
    "high": [...]}, "wrong": ...}}, the lists over bins of length, None where there is nothing in a bin.
  """
  by_side = {
    side: [it for name, it in found.items() if name.startswith("length=") and name.endswith(side)] for side in SIDES
  }
  return {
    "spearman": {side: found[f"spearman/{side}"] for side in SIDES},
    "mean_score": {
      side: {key: [it[key] for it in points] for key in ("value", "low", "high")} for side, points in by_side.items()
    },
  }


def spearman_within(x_PC: np.ndarray, y_PC: np.ndarray, among_PC: np.ndarray) -> Quantity:
  """Spearman's rank correlation of x and y among some candidates of a problem, averaged over problems.

  Problems in which x or y does not vary have none and are left out.
  """
  x, y = (_centred_ranks(values, among_PC) for values in (x_PC, y_PC))
  spread = np.sqrt((x**2).sum(axis=1) * (y**2).sum(axis=1))
  rho = divide((x * y).sum(axis=1), spread)
  known = ~np.isnan(rho)
  return Quantity(((np.where(known, rho, 0.0), known),))


def _centred_ranks(values_PC: np.ndarray, among_PC: np.ndarray) -> np.ndarray:
  """Ranks within each row less their mean, tied values at the mean of their ranks; 0 outside of the mask."""
  above = (values_PC[:, :, None] > values_PC[:, None, :]) & among_PC[:, None, :]
  below = (values_PC[:, :, None] < values_PC[:, None, :]) & among_PC[:, None, :]
  # The mean of these ranks is 0: each pair adds to one what it takes from the other.
  return np.where(among_PC, (above.sum(axis=2) - below.sum(axis=2)) / 2, 0.0)
