"""Reads a user's own solutions from JSON lines in a simple format.

{"question": "How many ...?", "solution": "... The answer is 7."}
{"problem_id": "gsm8k/train/00012", "solution": "...", "correct": true}
"""

import collections
import os
from collections.abc import Sequence
from typing import Any

from etils import epath

from genrm_jax.data import candidates
from genrm_jax.records import Candidate, Problem
from genrm_jax.runtime.errors import UserError
from genrm_jax.tasks.base import Task
from genrm_jax.text.json_lines import iter_objects, shown

PathLike = str | os.PathLike[str]

_FIELDS = ("question", "problem_id", "solution", "correct")


def read_candidates(path: PathLike, problems: Sequence[Problem], task: Task) -> list[Candidate]:
  """The solutions in a file as candidates; indices count those of each problem, in file order.

  Args:
    path: JSON lines with "solution", either "question" (white space is folded) or "problem_id", and optionally
      "correct", which overrides the grade by `task`.
    problems: those that a line may refer to.
    task: grades the solutions.

  Raises:
    UserError: no such file, no line in it, or `path:line` for a line in another format or about none of `problems`.
  """
  by_id = {p.id: p for p in problems}
  by_question: dict[str, list[Problem]] = {}
  for problem in problems:
    by_question.setdefault(_folded(problem.question), []).append(problem)
  counts: collections.Counter[str] = collections.Counter()
  source = epath.Path(path).name
  found = []
  for row, place in iter_objects(path):
    if unknown := [name for name in row if name not in _FIELDS]:
      raise UserError(f'{place}: unknown field "{unknown[0]}"; a line has {", ".join(_FIELDS)}')
    problem = _problem(row, by_id, by_question, place)
    solution = _text(row, "solution", place)
    graded = candidates.grade(problem, counts[problem.id], solution, task, source)
    correct = row.get("correct", graded.correct)
    if not isinstance(correct, bool):
      raise UserError(f'{place}: field "correct" is {shown(correct)}, expected true or false; correct or remove it')
    counts[problem.id] += 1
    found.append(Candidate(problem.id, graded.index, solution, graded.answer, correct, source))
  if not found:
    raise UserError(f'{os.fspath(path)}: no line; each is an object with "question" or "problem_id", and "solution"')
  return found


def _problem(
  row: dict[str, Any], by_id: dict[str, Problem], by_question: dict[str, list[Problem]], place: str
) -> Problem:
  if ("question" in row) == ("problem_id" in row):
    raise UserError(f'{place}: give one of the fields "question" and "problem_id"')
  if "problem_id" in row:
    problem = by_id.get(name := _text(row, "problem_id", place))
    if problem is None:
      raise UserError(
        f'{place}: field "problem_id" is {shown(name)}, none of the {len(by_id)} problems; give an id of theirs'
      )
    return problem
  same = by_question.get(_folded(question := _text(row, "question", place)), [])
  if len(same) != 1:
    what = f"that of {len(same)} problems; give its problem_id" if same else f"none of the {len(by_id)} problems'"
    raise UserError(f'{place}: field "question" is {shown(question)}, {what}')
  return same[0]


def _text(row: dict[str, Any], name: str, place: str) -> str:
  value = row.get(name)
  if not isinstance(value, str) or not value.strip():
    what = shown(value) if name in row else "missing"
    raise UserError(f'{place}: field "{name}" is {what}, expected a string that is not empty; correct it')
  return value


def _folded(question: str) -> str:
  return " ".join(question.split())
