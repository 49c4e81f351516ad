r"""Reads MATH500 problems and solutions to them from files, and grades the solutions.

For evaluation only: the paper's easy-to-hard generalisation (problems by Hendrycks et al. 2021, the 500 chosen by
Lightman et al. 2023). Both files hold one JSON object per line:

    {"problem": "...", "solution": "... \\boxed{7}.", "answer": "7", "subject": "...", "level": 2, "unique_id": "..."}
    {"problem": "...", "solution": "... The answer is 7."}
    {"unique_id": "...", "solution": "... $\\boxed{8}$", "correct": false}
"""

import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from genrm_jax.records import Candidate, Problem
from genrm_jax.runtime.errors import UserError
from genrm_jax.tasks import statements
from genrm_jax.tasks.math500.equality import MAX_CHARACTERS, plain
from genrm_jax.text.json_lines import json_object, shown

PathLike = str | os.PathLike[str]

# (right answer, answer) -> whether they are equal, None where the comparison failed; see equality.MathEqual.
Equal = Callable[[str, str], bool | None]

_TEXT, _LABEL, _LEVEL = (str,), (bool,), (str, int)
_PROBLEM = {"problem": _TEXT, "answer": _TEXT, "solution": _TEXT, "subject": _TEXT, "level": _LEVEL, "unique_id": _TEXT}
_SOLUTION = {"problem": _TEXT, "unique_id": _TEXT, "solution": _TEXT, "correct": _LABEL}


@dataclasses.dataclass(frozen=True)
class Solution:
  """A line of a file of solutions. `correct` is the label in the file, None where it has none."""

  problem_id: str
  text: str
  correct: bool | None


@dataclasses.dataclass(frozen=True)
class Graded:
  """A candidate, where its answer was found (see `read_answer`), and whether that is the right one (see `Equal`)."""

  candidate: Candidate
  where: str
  equal: bool | None


# ---------------------------------------------------------------------------------------------------------------------
# Files


def read_problems(path: PathLike) -> list[Problem]:
  """The problems in a file, in order; the id is `unique_id`, or else `math500/<line from 0>`.

  `problem` and `answer` are required. `subject` and `level` are dropped.

  Raises:
    UserError: no such file, no problem in it; or `path:line`, for a line that is no JSON object, a field that is
      missing, unknown or of the wrong type, an empty answer, or a repeated problem.
  """
  problems: list[Problem] = []
  seen: dict[str, str] = {}
  for number, (place, row) in enumerate(_rows(path, _PROBLEM, ("problem", "answer"))):
    answer = row["answer"].strip()
    if not plain(answer):
      raise UserError(f'{place}: "answer" is empty; give the right answer, or remove the line')
    problem_id = row.get("unique_id", f"math500/{number:05d}")
    for key in (problem_id, _folded(row["problem"])):
      if key in seen:
        raise UserError(f"{place}: the problem of {seen[key]} again ({key[:60]!r}); remove one of them")
      seen[key] = place
    problems.append(Problem(problem_id, "math500", "eval", row["problem"].strip(), answer, row.get("solution", "")))
  if not problems:
    raise UserError(f"{os.fspath(path)}: the file holds no problem; give one with a problem per line")
  return problems


def read_solutions(path: PathLike, problems: Sequence[Problem]) -> dict[str, list[Solution]]:
  """The solutions by problem id, in file order. A line names its problem by text or by id.

  Raises:
    UserError: as `read_problems`; a line that names no problem, an unknown one, or two; a problem without solutions.
  """
  by_text = {_folded(p.question): p.id for p in problems}
  ids = {p.id for p in problems}
  solutions: dict[str, list[Solution]] = {p.id: [] for p in problems}
  for place, row in _rows(path, _SOLUTION, ("solution",)):
    named = {}
    if "problem" in row:
      named["problem"] = by_text.get(_folded(row["problem"]))
    if "unique_id" in row:
      named["unique_id"] = row["unique_id"] if row["unique_id"] in ids else None
    if not named:
      raise UserError(f'{place}: no field "problem" or "unique_id"; say which problem the solution is to')
    for field, found in named.items():
      if found is None:
        raise UserError(
          f"{place}: a solution to an unknown problem ({field} {row[field][:60]!r}); remove the line, or give the file "
          "of problems that has it"
        )
    if len(set(named.values())) > 1:
      raise UserError(f'{place}: "problem" and "unique_id" are of two problems; correct one of them')
    problem_id = next(iter(named.values()))
    assert problem_id is not None
    solutions[problem_id].append(Solution(problem_id, row["solution"], row.get("correct")))
  check_all_solved(path, solutions)
  return solutions


def check_all_solved(path: PathLike, solutions: Mapping[str, Sequence[Solution]]) -> None:
  """Raises UserError if a problem has no solution."""
  without = [problem_id for problem_id, found in solutions.items() if not found]
  if without:
    raise UserError(
      f"{os.fspath(path)}: no solution to {without[0]!r}"
      f"{f' and {len(without) - 1} other problems' if len(without) > 1 else ''}; add some, or leave the problem out"
    )


def _folded(question: str) -> str:
  return " ".join(question.split())


def _rows(
  path: PathLike, known: Mapping[str, tuple[type, ...]], required: Sequence[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
  """(path:line, object) of every line that is not blank."""
  try:
    lines = epath.Path(path).open("rb")
  except OSError as e:
    raise UserError(f"{os.fspath(path)}: could not be read: {e.strerror or e}; check the path") from e
  with lines:
    for number, line in enumerate(lines, start=1):
      if not line.strip():
        continue
      place = f"{os.fspath(path)}:{number}"
      row = json_object(line, place)
      _check_fields(row, known, required, place)
      yield place, row


def _check_fields(
  row: dict[str, Any], known: Mapping[str, tuple[type, ...]], required: Sequence[str], place: str
) -> None:
  for name in required:
    if name not in row:
      raise UserError(f'{place}: no field "{name}"; a line needs {", ".join(required)}')
  for name, value in row.items():
    if name not in known:
      raise UserError(f'{place}: unknown field "{name}"; a line may have {", ".join(known)}')
    if type(value) not in known[name]:
      wanted = " or ".join({str: "a string", int: "a whole number", bool: "true or false"}[t] for t in known[name])
      raise UserError(f'{place}: field "{name}" is {shown(value)}, expected {wanted}; correct the value')


# ---------------------------------------------------------------------------------------------------------------------
# Answers

# Where an answer was found, or why there is none.
BOXED, SAID, NOWHERE, EMPTY, UNBALANCED, TOO_LONG = (
  "in a box",
  'after "The answer is"',
  "nowhere",
  "in an empty box",
  "in a box without end",
  f"longer than {MAX_CHARACTERS:,} characters",
)

_FORMULA = re.compile(r"\$+((?:\\.|[^$\\])+)\$+|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_NEXT_FORMULA = re.compile(r"\s*((?:[a-z]+\s+){0,2}?)(,?\s*\b(?:or|and)\b|,)\s*(?=\$|\\[(\[])")
_UNIT = re.compile(r"\s*([a-z]+)")
_SENTENCE = re.compile(r"([^\n]+?)(?=[.!]?\s*(?:\n|\Z)|[.!]\s)")


def read_answer(text: str) -> tuple[str | None, str]:
  r"""The final answer of a solution and where it was found; None and why, where it has none.

  It is the content of the last `\boxed` or `\fbox`, else what follows the last "The answer is".

      "... so \boxed{\frac{1}{2}}."           -> ("\frac{1}{2}", BOXED)     "$\boxed 5$" -> ("5", BOXED)
      "... The final answer is $x = 2$."      -> ("x = 2", SAID)            "\boxed{5"   -> (None, UNBALANCED)
  """
  text = statements.first_turn(text)
  box = statements.last_box(text, MAX_CHARACTERS)
  if box is None:
    return _read_said(text)
  if box.content is None:
    return None, UNBALANCED if box.read_to_end else TOO_LONG
  return _found(box.content, BOXED, EMPTY)


def _read_said(text: str) -> tuple[str | None, str]:
  start = statements.after_answer_is(text)
  if start is None:
    return None, NOWHERE
  rest = text[start : start + MAX_CHARACTERS + 2].lstrip()
  sentence = _SENTENCE.match(rest)
  return _found(_formulas(rest) or (sentence[0] if sentence else ""), SAID, NOWHERE)


def _formulas(text: str) -> str:
  """The formula that a text begins with, together with those that are joined to it: "$5$ or $6$" is "5, 6"."""
  answer, at, units = "", 0, False
  while formula := _FORMULA.match(text, at):
    answer, at = answer + next(filter(None, formula.groups())).strip(), formula.end()
    following = _NEXT_FORMULA.match(text, at)
    unit = following[1].strip() if following else ""
    units |= bool(unit)
    if following is None:
      last = _UNIT.match(text, at) if units else None
      return f"{answer}\\text{{ {last[1]}}}" if last else answer
    answer, at = f"{answer}\\text{{ {unit} and }}" if unit else f"{answer}, ", following.end()
  return answer


def _found(answer: str, where: str, if_empty: str) -> tuple[str | None, str]:
  answer = answer.strip()
  if len(answer) > MAX_CHARACTERS:
    return None, TOO_LONG
  return (answer, where) if plain(answer) else (None, if_empty)


def grade(problem: Problem, solutions: Sequence[Solution], equal: Equal) -> list[Graded]:
  """The candidates of one problem. Equal answers get the same form, so that they vote together.

  Every answer is compared with the right one and, if it differs, with the earlier wrong ones. One that cannot be
  compared with the right one is incorrect and votes alone. A label in the file takes precedence over the comparison,
  whose result is reported beside it.
  """
  wrong: list[str] = []
  known: dict[str, tuple[str, bool | None]] = {}
  graded = []
  for index, solution in enumerate(solutions):
    answer, where = read_answer(solution.text)
    form: str | None = None
    same: bool | None = False
    if answer is not None:
      key = plain(answer)
      if key not in known:
        known[key] = _judged(problem.answer, answer, wrong, equal)
      form, same = known[key]
    correct = bool(same) if solution.correct is None else solution.correct
    graded.append(Graded(Candidate(problem.id, index, solution.text, form, correct, "file"), where, same))
  return graded


def _judged(right: str, answer: str, wrong: list[str], equal: Equal) -> tuple[str, bool | None]:
  """The form of an answer and whether it is right. A wrong answer with a new form is added to `wrong`."""
  same = equal(right, answer)
  if same:
    return right, True
  if same is None:
    return answer, None
  form = next((other for other in wrong if equal(other, answer)), None)
  if form is None:
    wrong.append(answer)
  return form or answer, False
