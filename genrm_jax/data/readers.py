"""Reads a user's own solutions to problems that are known, from JSON lines in a simple format or other tools' files.

{"question": "How many ...?", "solution": "... The answer is 7."}
{"problem_id": "gsm8k/train/00012", "solution": "...", "correct": true}

interchange/formats.py has the other formats.
"""

import collections
import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from genrm_jax.data import candidates
from genrm_jax.data.interchange import containers, formats, reading
from genrm_jax.records import Candidate, Problem
from genrm_jax.runtime.errors import UserError
from genrm_jax.runtime.progress import say
from genrm_jax.tasks.base import Task
from genrm_jax.tasks.math500 import problems as math500
from genrm_jax.text.json_lines import iter_objects, shown

PathLike = str | os.PathLike[str]

_UNKNOWN = "about none of the problems"
_FIELDS = ("question", "problem_id", "solution", "correct")


def read_candidates(path: PathLike, problems: Sequence[Problem], task: Task) -> list[Candidate]:
  """The solutions in a file as candidates; indices count those of each problem, in file order.

  Args:
    path: JSON lines with "solution", either "question" (white space is folded) or "problem_id", and optionally
      "correct", which overrides the grade by `task`. Or a file or folder in another format, of which solutions to
      other problems are counted and left out.
    problems: those that a line may refer to.
    task: grades the solutions.

  Raises:
    UserError: no such file, no line in it, or `path:line` for a line in another format or about none of `problems`.
  """
  if foreign := _foreign(path):
    return [
      _with_label(candidates.grade(problem, index, text, task, source), label)
      for problem, index, text, label, source in _solutions(foreign, problems)
    ]
  by_id = {p.id: p for p in problems}
  by_question = _by_question(problems)
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


def read_solutions(path: PathLike, problems: Sequence[Problem]) -> dict[str, list[math500.Solution]]:
  """The solutions to MATH500 problems by problem id; arguments and errors as for `math500.read_solutions`.

  The file may be in another format, as for `read_candidates`.
  """
  foreign = _foreign(path)
  if foreign is None:
    return math500.read_solutions(path, problems)
  solutions: dict[str, list[math500.Solution]] = {p.id: [] for p in problems}
  for problem, _, text, label, _ in _solutions(foreign, problems):
    solutions[problem.id].append(math500.Solution(problem.id, text, label))
  math500.check_all_solved(path, solutions)
  return solutions


def _foreign(path: PathLike) -> reading.Reader | None:
  """A reader of the file, None if its first row is in no format but perhaps in the simple one."""
  try:
    reader = reading.Reader(path)
  except UserError:
    if containers.kind_of(os.fspath(path)) != "lines":
      raise
    return None  # whoever reads the simple format says what is wrong
  return None if reader.format is formats.FORMATS["simple"] else reader


def _solutions(
  reader: reading.Reader, problems: Sequence[Problem]
) -> Iterator[tuple[Problem, int, str, bool | None, str]]:
  """Yields (problem, index, text, label, source) for each solution to one of the problems; the rest is counted.

  A row names its problem by its question, or by id if it has no question. Raises UserError if there is no solution.
  """
  by_id, by_question = {p.id: p for p in problems}, _by_question(problems)
  counts: collections.Counter[str] = collections.Counter()
  tally, repeated = reading.Tally(), set[tuple[str, str]]()
  for row, place, _ in reader.rows():
    same = by_question.get(_folded(row.question), [])
    problem = (same[0] if len(same) == 1 else None) if row.question else by_id.get(row.problem_id)
    key = place.file, row.problem_id
    if problem is None or (row.repeats and key in repeated):
      tally.add(_UNKNOWN if problem is None else reading.REPEATED, place)
      continue
    repeated.add(key)
    # Where a row repeats, its label is about what its filter extracted: the task grades.
    labels = () if row.repeats else row.labels
    for at, text in reading.usable(row, place, tally):
      yield problem, counts[problem.id], text, labels[at] if labels else None, place.file.rpartition("/")[2]
      counts[problem.id] += 1
  left_out = f"; skipped: {tally}" if tally.by_reason else ""
  if not counts:
    raise UserError(
      f"{os.fspath(reader.path)}: no solution to one of the {len(problems)} problems{left_out}; a row has the question "
      "as it is in the problem, or where its format has none the problem's id"
    )
  say(f"{sum(counts.values())} solutions of format {reader.format.name}{left_out}")


def _with_label(graded: Candidate, label: bool | None) -> Candidate:
  return graded if label is None else dataclasses.replace(graded, correct=label)


def _by_question(problems: Sequence[Problem]) -> dict[str, list[Problem]]:
  found: dict[str, list[Problem]] = {}
  for problem in problems:
    found.setdefault(_folded(problem.question), []).append(problem)
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
