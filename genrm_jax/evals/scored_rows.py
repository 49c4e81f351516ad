"""Rows of a suite with their scores: figures over rows, and how each solution is judged by its score alone.

A suite's own figure may need several scores of a row (which of four is best?), so it is a function of what rows add up
to (`Figure`). All figures of a suite are resampled together, over problems: rows with the same problem stay together.

Axis letters: R row, M column of sums, P problem, C candidate (padded), X solution.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from genrm_jax.evals import metrics
from genrm_jax.evals.selection import make_bank
from genrm_jax.records import Candidate, Problem

_SEED = 0
_ALL = ("all", "all")  # stands for no tag


@dataclasses.dataclass(frozen=True)
class Solution:
  """What is scored. `tags` are shown apart, by name and value: {"generator": "..."}."""

  question: str
  text: str
  correct: bool
  tags: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class SuiteRow:
  """One row of a suite.

  Attributes:
    id: "" if rows have none.
    problem: rows with the same are resampled together.
    group: the part of the suite for which the authors report a separate figure.
    solutions: in the order that the suite's figure expects.
    process_correct: whether all steps are right, where that is not what `Solution.correct` says.
  """

  id: str
  problem: str
  group: str
  solutions: tuple[Solution, ...]
  process_correct: bool | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class ScoredRows:
  """Rows and, for each, the scores of its solutions, NaN where there is none."""

  rows: Sequence[SuiteRow]
  values: Sequence[np.ndarray]

  @property
  def complete_R(self) -> np.ndarray:
    """Whether all solutions of a row have a score."""
    return np.array([not np.isnan(values).any() for values in self.values])

  def each(self, function: Callable[[SuiteRow, np.ndarray], float]) -> np.ndarray:
    """The function of each row and its scores, `f64[R]`."""
    return np.array([function(row, values) for row, values in zip(self.rows, self.values, strict=True)], float)


# ---- Figures ----


@dataclasses.dataclass(frozen=True, eq=False)
class Figure:
  """A function of sums over rows.

  Attributes:
    sums_RM: what each row adds.
    value: from sums `f64[..., M]` to the figure `f64[...]`, NaN where undefined.
    rows_R: the rows that the figure is about.
  """

  sums_RM: np.ndarray
  value: Callable[[np.ndarray], np.ndarray]
  rows_R: np.ndarray


def share(hits_R: np.ndarray, rows_R: np.ndarray, counts_R: np.ndarray | None = None) -> Figure:
  """The sum of hits over that of `counts_R` (1 per row), both over the chosen rows."""
  counts_R = np.ones(len(rows_R)) if counts_R is None else counts_R
  sums = np.where(rows_R[:, None], np.stack([hits_R, counts_R], axis=1), 0.0)
  return Figure(sums, lambda s: metrics.divide(s[..., 0], s[..., 1]), rows_R)


def combined(figures: Sequence[Figure], function: Callable[..., np.ndarray]) -> Figure:
  """A function of the values of figures."""
  ends = np.cumsum([figure.sums_RM.shape[1] for figure in figures])[:-1]

  def value(sums: np.ndarray) -> np.ndarray:
    parts = np.split(sums, ends, axis=-1)
    return function(*(figure.value(part) for figure, part in zip(figures, parts, strict=True)))

  rows = np.any(np.stack([figure.rows_R for figure in figures]), axis=0)
  return Figure(np.concatenate([figure.sums_RM for figure in figures], axis=1), value, rows)


def average(figures: Sequence[Figure]) -> Figure:
  return combined(figures, lambda *values: np.mean(values, axis=0))


def harmonic_mean(a: Figure, b: Figure) -> Figure:
  """F1 of two shares, 0 if both are 0."""
  return combined([a, b], lambda x, y: np.where(x + y == 0, 0.0, metrics.divide(2 * x * y, x + y)))


def by_group(scored: ScoredRows, figure: Callable[[np.ndarray], Figure]) -> dict[str, Figure]:
  """The figure of all rows, then that of each group; `figure` gets a mask, `bool[R]`."""
  groups = np.array([row.group for row in scored.rows])
  return {"all": figure(groups == groups)} | {str(group): figure(groups == group) for group in np.unique(groups)}


def summaries(scored: ScoredRows, figures: Mapping[Any, Figure]) -> dict[Any, dict[str, Any]]:
  """Each figure with its interval over problems.

  Returns:
    value, low, high: the figure and its 95% interval; None where undefined.
    rows: how many it is about.
    scored_rows: those of which all solutions have a score.
    value_of_scored: the figure over these alone; None where undefined.
  """
  if not figures:
    return {}
  numbers: dict[str, int] = {}
  problem_R = np.array([numbers.setdefault(row.problem, len(numbers)) for row in scored.rows])
  ends = np.cumsum([figure.sums_RM.shape[1] for figure in figures.values()])[:-1]
  sums_RM = np.concatenate([figure.sums_RM for figure in figures.values()], axis=1)
  sums_PM = np.zeros((len(numbers), sums_RM.shape[1]))
  np.add.at(sums_PM, problem_R, sums_RM)
  draws = np.concatenate(
    [counts @ sums_PM for counts in metrics.resamples(len(sums_PM), metrics.BOOTSTRAP_DRAWS, _SEED)]
  )
  complete = scored.complete_R
  found = {}
  for (name, figure), drawn in zip(figures.items(), np.split(draws, ends, axis=1), strict=True):
    point = float(figure.value(figure.sums_RM.sum(axis=0)))
    of_scored = float(figure.value(figure.sums_RM[complete].sum(axis=0)))
    found[name] = dataclasses.asdict(metrics.percentiles(point, figure.value(drawn), metrics.LEVEL)) | {
      "rows": int(figure.rows_R.sum()),
      "scored_rows": int((figure.rows_R & complete).sum()),
      "value_of_scored": None if np.isnan(of_scored) else of_scored,
    }
  return found


# ---- Each solution by its score alone. Solutions without a score are left out, except of the coverage. ----


def _distinct(scored: ScoredRows, tag: tuple[str, str] | None = None) -> list[tuple[int, Solution, float]]:
  """(row, solution, score) of each solution that has the tag; equal ones to a problem, from equal sources, once."""
  found: dict[Any, tuple[int, Solution, float]] = {}
  for index, (row, values) in enumerate(zip(scored.rows, scored.values, strict=True)):
    for solution, value in zip(row.solutions, values, strict=True):
      if tag is None or solution.tags.get(tag[0]) == tag[1]:
        key = (row.problem, solution.question, solution.text, solution.correct, solution.tags.get("generator"))
        found.setdefault(key, (index, solution, float(value)))
  return list(found.values())


def verification(scored: ScoredRows, is_probability: bool) -> dict[str, Any]:
  """AUC, calibration and coverage over the distinct solutions.

  Args:
    scored: the rows.
    is_probability: whether a score is a probability of correctness; else it has no calibration.
  """
  entries = _distinct(scored)
  problems = list(dict.fromkeys(scored.rows[row].problem for row, _, _ in entries))
  number = {problem: str(index) for index, problem in enumerate(problems)}
  pools: list[list[float]] = [[] for _ in problems]
  candidates = []
  for row, solution, value in entries:
    pool = number[scored.rows[row].problem]
    candidates.append(Candidate(pool, len(pools[int(pool)]), solution.text, None, solution.correct, ""))
    pools[int(pool)].append(value)
  bank = make_bank([Problem(name, "suite", "eval", "", "") for name in number.values()], candidates)
  values_PC = np.full(bank.mask.shape, np.nan)
  values_PC[bank.mask] = np.concatenate(pools)
  quantities = {"auc_within_problems": metrics.auc_within(bank, values_PC)}
  quantities["coverage"] = metrics.scored_share(bank, values_PC)
  if is_probability:
    quantities["brier"] = metrics.brier(bank, values_PC)
  intervals = metrics.intervals(quantities, seed=_SEED)
  return {
    "problems": len(problems),
    "problems_with_both_labels": int(quantities["auc_within_problems"].parts[0][1].sum()),
    "solutions": len(entries),
    "correct": int(bank.correct.sum()),
    "scored": int((~np.isnan(values_PC)).sum()),
    "auc": dataclasses.asdict(metrics.auc_overall(bank, values_PC, seed=_SEED)),
    **{name: dataclasses.asdict(interval) for name, interval in intervals.items()},
    "ece": metrics.expected_calibration_error(bank, values_PC) if is_probability else None,
  }


def rates(scored: ScoredRows, is_probability: bool) -> dict[tuple[str, str, str], Figure]:
  """By (tag, value, rate): true positives, true negatives (at the threshold 0.5) and coverage of distinct solutions."""
  tags = sorted({tag for row in scored.rows for solution in row.solutions for tag in solution.tags.items()})
  found = {}
  for tag in [_ALL, *tags]:
    entries = _distinct(scored, None if tag is _ALL else tag)
    row_X = np.array([row for row, _, _ in entries])
    correct_X, value_X = np.array([s.correct for _, s, _ in entries]), np.array([value for _, _, value in entries])
    scored_X, above_X = ~np.isnan(value_X), value_X > metrics.THRESHOLD

    def of_rows(hits_X: np.ndarray, counted_X: np.ndarray, row_X: np.ndarray = row_X) -> Figure:
      hits, counts = (np.bincount(row_X, mask, len(scored.rows)) for mask in (hits_X & counted_X, counted_X))
      return share(hits, counts > 0, counts)

    if is_probability:
      found[*tag, "true_positive_rate"] = of_rows(above_X, scored_X & correct_X)
      found[*tag, "true_negative_rate"] = of_rows(~above_X, scored_X & ~correct_X)
    found[*tag, "coverage"] = of_rows(scored_X, np.ones(len(entries), bool))
  return found
