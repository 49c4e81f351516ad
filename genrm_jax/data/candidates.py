"""Candidate solutions: sampled from a generator model, graded, and chosen for training."""

from collections.abc import Callable, Sequence

import numpy as np

from genrm_jax.records import Candidate, Problem
from genrm_jax.runtime.errors import UserError
from genrm_jax.tasks.base import Task

# (problems, candidate indices) -> one text each, and whether it ended by itself.
Generate = Callable[[Sequence[Problem], Sequence[int]], list[str]]


def grade(problem: Problem, index: int, text: str, task: Task, source: str) -> Candidate:
  """A candidate with its answer read and compared with the problem's."""
  answer = task.extract_answer(text)
  return Candidate(problem.id, index, text, answer, task.same_answer(answer, problem.answer), source)


def sample_candidates(
  problems: Sequence[Problem], num_candidates: int, task: Task, generate: Generate, source: str
) -> list[Candidate]:
  """`num_candidates` graded solutions to each problem."""
  repeated = [p for p in problems for _ in range(num_candidates)]
  indices = [i for _ in problems for i in range(num_candidates)]
  texts = generate(repeated, indices)
  return [grade(p, i, t, task, source) for p, i, t in zip(repeated, indices, texts, strict=True)]


def by_problem(candidates: Sequence[Candidate]) -> dict[str, list[Candidate]]:
  """Candidates of each problem, in order of first appearance."""
  pools: dict[str, list[Candidate]] = {}
  for c in candidates:
    pools.setdefault(c.problem_id, []).append(c)
  return pools


def distinct(candidates: Sequence[Candidate]) -> list[Candidate]:
  """The first candidate of every distinct text of a problem: what is worth a verifier's time."""
  seen: dict[tuple[str, str], Candidate] = {}
  for c in candidates:
    seen.setdefault((c.problem_id, c.text), c)
  return list(seen.values())


def choose_pairs(candidates: Sequence[Candidate], max_pairs: int, seed: int) -> list[tuple[Candidate, Candidate]]:
  """Pairs of a correct and an incorrect solution to the same problem, for DPO.

  They are drawn at random, without replacement, from the product of a problem's distinct correct and distinct incorrect
  solutions. A problem without both gives none.

  Args:
    candidates: graded candidates.
    max_pairs: of a problem.
    seed: of the random choice.
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
  """At most `max_per_label` distinct correct and as many incorrect solutions a problem (paper, appendix A).

  Args:
    candidates: graded candidates.
    max_per_label: the paper's 16.
    balanced: as many correct as incorrect ones over the whole set: the larger side is thinned at random.
    seed: of the random choice.
  """
  rng = np.random.default_rng(seed)
  sides: dict[bool, list[Candidate]] = {True: [], False: []}
  for pool in by_problem(distinct(candidates)).values():
    for label, side in sides.items():
      mine = [c for c in pool if c.correct is label]
      side.extend(mine[i] for i in sorted(rng.permutation(len(mine))[:max_per_label]))
  if not sides[True] or not sides[False]:
    raise UserError(
      f"training needs correct and incorrect solutions, but there are {len(sides[True])} correct and "
      f"{len(sides[False])} incorrect ones; use a weaker or stronger generator, or more problems"
    )
  if balanced:
    n = min(len(side) for side in sides.values())
    sides = {label: [side[i] for i in sorted(rng.permutation(len(side))[:n])] for label, side in sides.items()}
  return sides[True] + sides[False]
