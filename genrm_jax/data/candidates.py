"""Candidate solutions: graded, and chosen for training."""

from collections.abc import Sequence

import numpy as np

from genrm_jax.records import Candidate, Problem
from genrm_jax.runtime.errors import UserError
from genrm_jax.tasks.base import Task, checked_grade


def grade(problem: Problem, index: int, text: str, task: Task, source: str) -> Candidate:
  """A candidate as the task grades it."""
  graded = checked_grade(task, problem, text)
  return Candidate(problem.id, index, text, graded.answer, graded.correct, source)


def by_problem(candidates: Sequence[Candidate]) -> dict[str, list[Candidate]]:
  """Candidates by problem id, in order of first appearance."""
  pools: dict[str, list[Candidate]] = {}
  for c in candidates:
    pools.setdefault(c.problem_id, []).append(c)
  return pools


def distinct(candidates: Sequence[Candidate]) -> list[Candidate]:
  """The first candidate of each distinct text of a problem."""
  seen: dict[tuple[str, str], Candidate] = {}
  for c in candidates:
    seen.setdefault((c.problem_id, c.text), c)
  return list(seen.values())


def choose_pairs(candidates: Sequence[Candidate], max_pairs: int, seed: int) -> list[tuple[Candidate, Candidate]]:
  """Pairs of a correct and an incorrect solution to the same problem, for DPO.

  At most `max_pairs` per problem are drawn at random, without replacement, from the product of its distinct correct and
  its distinct incorrect solutions. A problem that lacks either gives none.
  """
  if max_pairs < 1:
    raise UserError(f"max_pairs must be 1 or more, not {max_pairs}")
  rng = np.random.default_rng(seed)
  pairs: list[tuple[Candidate, Candidate]] = []
  pools = by_problem(distinct(candidates)).values()
  for pool in pools:
    right, wrong = ([c for c in pool if c.correct is label] for label in (True, False))
    drawn = sorted(rng.permutation(len(right) * len(wrong))[:max_pairs])
    pairs.extend((right[i // len(wrong)], wrong[i % len(wrong)]) for i in drawn)
  if not pairs:
    raise UserError(
      f"DPO needs a correct and an incorrect solution to the same problem, but none of {len(pools)} problems has both; "
      "use a weaker or stronger generator, or more problems"
    )
  return pairs


def choose_for_training(
  candidates: Sequence[Candidate], max_per_label: int, balanced: bool, seed: int
) -> list[Candidate]:
  """At most `max_per_label` distinct correct and as many incorrect solutions per problem (paper, appendix A: 16).

  With `balanced`, the larger side is thinned at random until the whole set has as many correct as incorrect solutions.
  """
  rng = np.random.default_rng(seed)
  sides: dict[bool, list[Candidate]] = {True: [], False: []}
  for pool in by_problem(distinct(candidates)).values():
    for label, side in sides.items():
      same = [c for c in pool if c.correct is label]
      side.extend(same[i] for i in sorted(rng.permutation(len(same))[:max_per_label]))
  if not sides[True] or not sides[False]:
    raise UserError(
      f"training needs correct and incorrect solutions, but there are {len(sides[True])} correct and "
      f"{len(sides[False])} incorrect ones; use a weaker or stronger generator, or more problems"
    )
  if balanced:
    n = min(len(side) for side in sides.values())
    sides = {label: [side[i] for i in sorted(rng.permutation(len(side))[:n])] for label, side in sides.items()}
  return sides[True] + sides[False]
