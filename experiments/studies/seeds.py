"""Figures over several runs of the whole pipeline: two-level intervals, over training seeds and over problems.

A figure of several seeds is the mean of the figures of each. One draw of the bootstrap takes as many seeds as there
are, with replacement, and for each of them as many of its problems, with replacement:

    runs        seed 0: p1 p2 p3      seed 1: q1 q2 q3
    one draw    seed 1: q1 q3 q3      seed 1: q2 q2 q3      the mean of the two figures

Each seed has problems of its own, so problems are nested in seeds. What is compared is compared on the same seeds and
the same problems: a paired difference is pooled like any other figure. From few seeds the spread over seeds is known
badly, and the interval is too narrow rather than too wide; hence the values of each seed stand beside it.
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
  """A figure over seeds with its interval, and the figure of each seed; None where it is not defined."""

  by_seed: Mapping[int, float | None]


def pool(
  quantities: Mapping[Key, Mapping[int, Quantity]],
  *,
  seed: int = 0,
  draws: int = metrics.BOOTSTRAP_DRAWS,
  level: float = metrics.LEVEL,
) -> dict[Key, Pooled]:
  """Pools many quantities, each given for some seeds; those of the same seeds and problems on the same resamples.

  With one seed the interval is over its problems only. A figure that some seed leaves undefined is undefined.
  """
  groups: dict[tuple[tuple[int, int], ...], list[Key]] = {}
  for key, of_seed in quantities.items():
    shape = tuple((at, len(of_seed[at].parts[0][0])) for at in sorted(of_seed))
    groups.setdefault(shape, []).append(key)
  pooled: dict[Key, Pooled] = {}
  for shape, keys in groups.items():
    figures = [[quantities[key][at] for key in keys] for at, _ in shape]
    points_SM, draws_DM = _resample(figures, seed, draws)
    for column, key in enumerate(keys):
      interval = metrics.percentiles(points_SM[:, column].mean(), draws_DM[:, column], level)
      by_seed = {at: _plain(points_SM[row, column]) for row, (at, _) in enumerate(shape)}
      value, low, high = map(_plain, dataclasses.astuple(interval))
      pooled[key] = Pooled(value, low, high, by_seed)
  return {key: pooled[key] for key in quantities}


def _resample(figures: list[list[Quantity]], seed: int, draws: int) -> tuple[np.ndarray, np.ndarray]:
  """The figures M of each seed S, `f64[S, M]`, and their means over the seeds of each draw, `f64[D, M]`."""
  num_seeds = len(figures)
  picks_DS = np.random.default_rng([seed, num_seeds]).integers(num_seeds, size=(draws, num_seeds))
  points, drawn_DSM = [], np.empty((draws, num_seeds, len(figures[0])))
  for index, of_seed in enumerate(figures):
    columns = np.stack([column for q in of_seed for pair in q.parts for column in pair], axis=1).astype(float)
    where = np.nonzero(picks_DS == index)
    chunks = metrics.resamples(len(columns), len(where[0]), [seed, num_seeds, index])
    drawn_DSM[where] = np.concatenate(
      [_figures(of_seed, counts @ columns) for counts in chunks] or [np.empty((0, len(of_seed)))]
    )
    points.append(_figures(of_seed, columns.sum(axis=0, keepdims=True))[0])
  return np.stack(points), drawn_DSM.mean(axis=1)


def _figures(quantities: list[Quantity], sums_RX: np.ndarray) -> np.ndarray:
  """Each row's figures, `f64[R, M]`, from its sums."""
  ratios = metrics.divide(sums_RX[:, 0::2], sums_RX[:, 1::2])
  lengths = np.array([len(quantity.parts) for quantity in quantities])
  return np.add.reduceat(ratios, np.cumsum(lengths) - lengths, axis=1) / lengths


def _plain(value: Any) -> float | None:
  """Rounded far below any interval, so that the last bits of a sum do not change a page."""
  return None if value is None or np.isnan(value) else round(float(value), 6)
