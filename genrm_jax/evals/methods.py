"""The ways to select a solution that a report compares, and how many solutions each needs to match another."""

import bisect
import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from genrm_jax.evals import metrics, selection

WEIGHTED, MAJORITY = "weighted_self_consistency", "majority_verdict"
ORACLE, SELF_CONSISTENCY = "oracle", "self_consistency"
RESERVED = ("pass1", SELF_CONSISTENCY, ORACLE, WEIGHTED, MAJORITY)  # names of methods, which no verifier may have

_SAME = 1e-9  # two accuracies that differ by less are equal


class Methods:
  """The accuracy of each problem by method and number of candidates, `methods(name, n) -> f64[P]`, computed once each.

  oracle, self_consistency              without a verifier
  VERIFIER                              Best-of-N by its score
  weighted_self_consistency/VERIFIER    an answer weighs the sum of its `top_scores` best scores, or of all (0)
  majority_verdict/VERIFIER             Best-of-N by the majority of the verdicts of its votes, if it has several
  """

  def __init__(
    self, bank: selection.Bank, tables: Mapping[str, metrics.ScoreTable], *, top_scores: int, seed: int
  ) -> None:
    several = [name for name, table in tables.items() if table.num_votes > 1]
    majority = {name: metrics.vote_values(tables[name], metrics.MAJORITY_RULE) for name in several}
    subsets = functools.lru_cache(maxsize=8)(lambda n: selection.draw_subsets(bank, n, seed=seed))

    def vote(values_PC: np.ndarray | None, n: int) -> np.ndarray:
      return selection.self_consistency(bank, subsets(n), values_PC, top_scores)

    partial, best_of_n = functools.partial, selection.best_of_n
    self._methods: dict[str, Callable[[int], np.ndarray]] = {
      ORACLE: partial(selection.oracle, bank),
      SELF_CONSISTENCY: partial(vote, None),
      **{name: partial(best_of_n, bank, table.values) for name, table in tables.items()},
      **{f"{MAJORITY}/{name}": partial(best_of_n, bank, values) for name, values in majority.items()},
      **{f"{WEIGHTED}/{name}": partial(vote, table.values) for name, table in tables.items()},
    }
    self._known: dict[tuple[str, int], np.ndarray] = {}
    self.names = tuple(self._methods)

  def __call__(self, name: str, n: int) -> np.ndarray:
    if (name, n) not in self._known:
      self._known[name, n] = self._methods[name](n)
    return self._known[name, n]


def solutions_to_match(methods: Methods, names: Sequence[str], ns: Sequence[int]) -> dict[str, dict[str, int | None]]:
  """How few solutions a method needs to be as accurate as another with the largest n (paper, section 4.1, figure 8).

  A method's curve is assumed to cross a level once between neighbours in `ns`, where the crossing is bisected.

  Args:
    methods: the accuracies.
    names: of the methods to compare.
    ns: numbers of candidates, ascending.

  Returns:
    method -> other method -> number of solutions, None if not even the largest n suffices.
  """
  ladder = sorted({1, *ns})

  def fewest(name: str, level: float) -> int | None:
    def reaches(n: int) -> bool:
      return methods(name, n).mean() >= level - _SAME

    at = next((at for at, n in enumerate(ladder) if reaches(n)), None)
    if at is None:
      return None
    between = range(ladder[at - 1] + 1 if at else 1, ladder[at])
    return between.start + bisect.bisect_left(between, True, key=reaches)

  levels = {name: methods(name, ladder[-1]).mean() for name in names}
  return {name: {other: fewest(name, levels[other]) for other in names if other != name} for name in names}
