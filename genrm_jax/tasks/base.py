"""The task interface, and how a task is found and checked.

A task is a class with one file to itself, in this package or anywhere on the import path:

    class Digits:
      name = "digits"
      splits = ("train", "val", "eval")

      def __init__(self, num_problems: int = 100):
        self.num_problems = num_problems

      def problems(self, split, rng):
        return [self._problem(split, i, *rng.integers(0, 10, 2)) for i in range(self.num_problems)]

      def grade(self, problem, text):
        answer = text.rpartition("The answer is ")[2].rstrip(".") or None
        return Grade(answer, answer == problem.answer)

      def _problem(self, split, i, a, b):
        return Problem(f"digits/{split}/{i}", "digits", split, f"{a} + {b} = ?", f"{a + b}", f"The answer is {a + b}.")

It is named in a config by its import path, `my_package.digits:Digits`. The other keys of `config.task` are the keyword
arguments of its constructor.
"""

import collections
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from genrm_jax.records import Candidate, Problem, Rationale
from genrm_jax.runtime import plugins
from genrm_jax.runtime.errors import UserError

SPLITS = ("generator", "train", "val", "eval", "in_distribution")
BUILT_IN = {
  "last_letter": "genrm_jax.tasks.last_letter:LastLetter",
  "word_sorting": "genrm_jax.tasks.word_sorting:WordSorting",
  "gsm8k": "genrm_jax.tasks.gsm8k.task:GSM8K",
}
REQUIRED_METHODS = ("problems", "grade")
OPTIONAL_METHODS = ("rationale", "few_shot", "first_solution", "edited", "released")


@dataclasses.dataclass(frozen=True)
class Grade:
  """What grading finds in a solution.

  Attributes:
    answer: the final answer, normalised; None where the solution gives none.
    correct: whether it is the right one.
  """

  answer: str | None
  correct: bool


@dataclasses.dataclass(frozen=True)
class Released:
  """Data that others released for a task, used in place of `Task.problems` and of sampled candidates.

  Attributes:
    problems: by split.
    candidates: graded, by split; a split that is left out has none.
    rationales: raw, as graders wrote them, for candidates of any split; may be read once.
    left_out: what was left out while reading, as a JSON-able object; complete once `rationales` has been read.
  """

  problems: Mapping[str, Sequence[Problem]]
  candidates: Mapping[str, Sequence[Candidate]]
  rationales: Iterator[Rationale]
  left_out: Callable[[], dict[str, Any]]


class Task(Protocol):
  """A family of problems and the way to grade solutions to them.

  A task may also have these methods; see `optional_method`:

  - `rationale(problem, text) -> (text, verdict)`: a program's verification of a solution, and whether it finds the
    solution correct. For training GenRM-CoT without a grader model (paper, section 3.3).
  - `few_shot(solve_template) -> str`: worked examples that precede the prompt for a base model. `solve_template` is the
    template for a solution, with `{question}` in it.
  - `first_solution(text) -> str`: the solution alone, cut where a base model starts to invent the next question.
  - `edited(problem, rng) -> str`: an incorrect solution, made from the problem's reference.
  - `released(seed) -> Released`: the data that others released, in place of sampled candidates.

  and an attribute `notes`, sentences that open the report.
  """

  @property
  def name(self) -> str:
    """The name that problems, reports and checkpoints carry."""

  @property
  def splits(self) -> Sequence[str]:
    """Those of `SPLITS` that the task has; "generator" trains the generator, and verifiers never see it."""

  def problems(self, split: str, rng: np.random.Generator) -> Sequence[Problem]:
    """The problems of a split, a pure function of the state of `rng`. Their ids differ across all splits."""

  def grade(self, problem: Problem, text: str) -> Grade:
    """Reads the final answer of a solution and compares it with the problem's."""


def load_task(name: str, options: Mapping[str, Any]) -> Task:
  """Constructs a task.

  Args:
    name: a key of `BUILT_IN`, or the import path `package.module:Class`.
    options: keyword arguments of the constructor.

  Raises:
    UserError: no such task, a module that cannot be imported, a class or method that is missing, unknown options, or
      unknown splits.
  """
  make, path = plugins.load_class(name, BUILT_IN, "task"), BUILT_IN.get(name, name)
  try:
    inspect.signature(make).bind(**options)
  except TypeError as e:
    known = ", ".join(inspect.signature(make).parameters) or "none"
    raise UserError(f"task {path}: {e}; config.task may set its options: {known}") from e
  task = make(**options)
  _check_interface(task, path)
  return task


def _check_interface(task: Any, path: str) -> None:
  for method in REQUIRED_METHODS:
    if not callable(getattr(task, method, None)):
      raise UserError(f"task {path}: no method {method}(); add it, see genrm_jax/tasks/base.py")
  for method in OPTIONAL_METHODS:
    if getattr(task, method, None) is not None and not callable(getattr(task, method)):
      raise UserError(f"task {path}: {method} is no method; see genrm_jax/tasks/base.py")
  name, splits = getattr(task, "name", None), getattr(task, "splits", None)
  if not isinstance(name, str) or not name:
    raise UserError(f"task {path}: `name` is {name!r}, expected a string; set it on the class")
  if not isinstance(splits, (tuple, list)) or not set(splits) <= set(SPLITS):
    raise UserError(f"task {path}: `splits` is {splits!r}, expected some of {', '.join(SPLITS)}; set it on the class")


def optional_method(task: Task, name: str) -> Callable[..., Any] | None:
  """One of the methods that a task may have, or None."""
  assert name in OPTIONAL_METHODS, name
  return getattr(task, name, None)


def checked_problems(task: Task, split: str, rng: np.random.Generator) -> list[Problem]:
  """The problems of a split. Raises UserError where the task returns anything else, none, or one id twice."""
  place = f"task {task.name}, problems({split!r})"
  if split not in task.splits:
    raise UserError(f"{place}: the task has no such split; its splits are {', '.join(task.splits)}")
  problems = task.problems(split, rng)
  if not isinstance(problems, (list, tuple)) or not problems:
    raise UserError(f"{place}: returned {_shown(problems)}, expected a list of Problem")
  for i, problem in enumerate(problems):
    if not isinstance(problem, Problem):
      raise UserError(f"{place}: item {i} is {_shown(problem)}, expected a Problem")
    for field in dataclasses.fields(Problem):
      value = getattr(problem, field.name)
      if not isinstance(value, str):
        raise UserError(f"{place}: `{field.name}` of item {i} is {_shown(value)}, expected a string")
  (problem_id, count), *_ = collections.Counter(p.id for p in problems).most_common(1)
  if count > 1:
    raise UserError(f"{place}: {count} problems have the id {problem_id!r}; number them")
  return list(problems)


def checked_grade(task: Task, problem: Problem, text: str) -> Grade:
  """The grade of a solution. Raises UserError where the task returns anything else, or no answer that is correct."""
  grade, place = task.grade(problem, text), f"task {task.name}, grade() of a solution to {problem.id}"
  if not isinstance(grade, Grade):
    raise UserError(f"{place}: returned {_shown(grade)}, expected a Grade")
  if grade.answer is not None and not isinstance(grade.answer, str):
    raise UserError(f"{place}: `answer` is {_shown(grade.answer)}, expected a string or None")
  if not isinstance(grade.correct, bool):
    raise UserError(f"{place}: `correct` is {_shown(grade.correct)}, expected True or False")
  if grade.correct and grade.answer is None:
    raise UserError(f"{place}: `correct` is True but `answer` is None; a solution without an answer is incorrect")
  return grade


def _shown(value: Any) -> str:
  text = repr(value)
  return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
