"""Metrics pooled over several runs of the whole pipeline: two-level intervals, over training seeds and over problems.

The pooled value is the mean over seeds. One bootstrap draw resamples the seeds with replacement, and for each of them
its problems with replacement:

    runs        seed 0: p1 p2 p3      seed 1: q1 q2 q3
    one draw    seed 1: q1 q3 q3      seed 1: q2 q2 q3      the mean of the two

Each seed has its own problems, so problems are nested in seeds. Comparisons are paired: a difference taken per seed and
problem is pooled like any other metric. A few seeds say little about the spread over seeds, and the interval tends to
be too narrow; hence the value of each seed is kept beside it.
"""

import dataclasses
from collections.abc import Hashable, Mapping
from typing import Any, TypeVar

import numpy as np

from genrm_jax.evals import metrics
from genrm_jax.evals.metrics import Quantity

Key = TypeVar("Key", bound=Hashable)


@dataclasses.dataclass(frozen=True)
class Pooled(metrics.Interval):
  """A metric over seeds with its interval, and its value for each seed; None where undefined."""

  by_seed: Mapping[int, float | None]


def pool(
  quantities: Mapping[Key, Mapping[int, Quantity]],
  *,
  seed: int = 0,
  draws: int = metrics.BOOTSTRAP_DRAWS,
  level: float = metrics.LEVEL,
) -> dict[Key, Pooled]:
  """Pools many quantities, each given by seed; those with the same seeds and problems share their resamples.

  With one seed the interval is over its problems only. A metric that is undefined for one seed is undefined.
  """
  groups: dict[tuple[tuple[int, int], ...], list[Key]] = {}
  for key, by_seed in quantities.items():
    shape = tuple((at, len(by_seed[at].parts[0][0])) for at in sorted(by_seed))
    groups.setdefault(shape, []).append(key)
  pooled: dict[Key, Pooled] = {}
  for shape, keys in groups.items():
    quantities_SM = [[quantities[key][at] for key in keys] for at, _ in shape]
    points_SM, draws_DM = _resample(quantities_SM, seed, draws)
    for column, key in enumerate(keys):
      interval = metrics.percentiles(points_SM[:, column].mean(), draws_DM[:, column], level)
      values = {at: _plain(points_SM[row, column]) for row, (at, _) in enumerate(shape)}
      value, low, high = map(_plain, dataclasses.astuple(interval))
      pooled[key] = Pooled(value, low, high, values)
  return {key: pooled[key] for key in quantities}


def _resample(quantities_SM: list[list[Quantity]], seed: int, draws: int) -> tuple[np.ndarray, np.ndarray]:
  """The M metrics of each of S seeds, `f64[S, M]`, and their means over the seeds of each draw, `f64[D, M]`."""
  num_seeds = len(quantities_SM)
  picks_DS = np.random.default_rng([seed, num_seeds]).integers(num_seeds, size=(draws, num_seeds))
  points, drawn_DSM = [], np.empty((draws, num_seeds, len(quantities_SM[0])))
  for index, quantities_M in enumerate(quantities_SM):
    columns = np.stack([column for q in quantities_M for pair in q.parts for column in pair], axis=1).astype(float)
    where = np.nonzero(picks_DS == index)
    chunks = metrics.resamples(len(columns), len(where[0]), [seed, num_seeds, index])
    drawn_DSM[where] = np.concatenate(
      [_values(quantities_M, counts @ columns) for counts in chunks] or [np.empty((0, len(quantities_M)))]
    )
    points.append(_values(quantities_M, columns.sum(axis=0, keepdims=True))[0])
  return np.stack(points), drawn_DSM.mean(axis=1)


def _values(quantities: list[Quantity], sums_RX: np.ndarray) -> np.ndarray:
  """The values of the quantities, `f64[R, M]`, from each row of sums."""
  ratios = metrics.divide(sums_RX[:, 0::2], sums_RX[:, 1::2])
  lengths = np.array([len(quantity.parts) for quantity in quantities])
  return np.add.reduceat(ratios, np.cumsum(lengths) - lengths, axis=1) / lengths


def _plain(value: Any) -> float | None:
  """Rounded far below any interval, so that the last bits of a sum cannot change a page."""
  return None if value is None or np.isnan(value) else round(float(value), 6)
