"""A user's task is loaded by its import path, and each mistake in it is one message that names the task."""

import sys

import numpy as np
import pytest

from genrm_jax.records import Problem
from genrm_jax.runtime.errors import UserError
from genrm_jax.tasks import base

SUMS = """
from genrm_jax.records import Problem
from genrm_jax.tasks.base import Grade

class Sums:
  name, splits = "sums", ("train", "eval")
  helper = 3

  def __init__(self, num_problems=2, largest=9):
    self.num_problems, self.largest = num_problems, largest

  def problems(self, split, rng):
    drawn = rng.integers(0, self.largest + 1, (self.num_problems, 2)).tolist()
    return [Problem(f"sums/{split}/{i}", "sums", split, f"{a} + {b}", str(a + b)) for i, (a, b) in enumerate(drawn)]

  def grade(self, problem, text):
    answer = text.rpartition("= ")[2] or None
    return Grade(answer, answer == problem.answer)

  def rationale(self, problem, text):
    return "I added them.", self.grade(problem, text).correct
"""
PROBLEM = Problem("p", "sums", "eval", "1 + 2", "3")


@pytest.fixture
def load(tmp_path, monkeypatch):
  """Loads `Sums` from a module of the user's, after replacements in its text."""
  monkeypatch.syspath_prepend(tmp_path)

  def load(*changes, name="Sums", **options):
    text = SUMS
    for old, new in changes:
      assert old in text
      text = text.replace(old, new)
    (tmp_path / "my_sums.py").write_text(text)
    monkeypatch.delitem(sys.modules, "my_sums", raising=False)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return base.load_task(f"my_sums:{name}", options)

  return load


def test_a_task_outside_the_package(load):
  task = load(num_problems=3, largest=0)
  problems = base.checked_problems(task, "train", np.random.default_rng(0))
  assert [(p.id, p.question) for p in problems] == [(f"sums/train/{i}", "0 + 0") for i in range(3)]
  assert base.checked_grade(task, PROBLEM, "1 + 2 = 3") == base.Grade("3", True)
  assert base.checked_grade(task, PROBLEM, "") == base.Grade(None, False)
  write = base.optional_method(task, "rationale")
  assert write is not None and write(PROBLEM, "1 + 2 = 4") == ("I added them.", False)
  assert base.optional_method(task, "few_shot") is None and base.optional_method(task, "released") is None


@pytest.mark.parametrize("name", base.BUILT_IN)
def test_built_in_tasks_are_tasks(name):
  assert base.load_task(name, {}).name == name


@pytest.mark.parametrize(
  ("changes", "options", "said"),
  [
    ([("import Grade", "import Grad")], {}, "my_sums cannot be imported.*ImportError.*PYTHONPATH"),
    ([("class Sums:", "class Sums")], {}, "cannot be imported.*SyntaxError"),
    ([("class Sums", "class Products")], {}, "no class 'Sums'; it has Products"),
    ([("def grade", "def mark")], {}, r"no method grade\(\)"),
    ([("def problems", "def make")], {}, r"no method problems\(\)"),
    ([("helper = 3", "few_shot = 3")], {}, "few_shot is no method"),
    ([('"sums", ("train", "eval")', '3, ("train", "eval")')], {}, "`name` is 3"),
    ([('("train", "eval")', '("train", "test")')], {}, "`splits` is .*'test'.*in_distribution"),
    ([], {"smallest": 1}, "'smallest'.*options: num_problems, largest"),
    ([("num_problems=2", "num_problems")], {}, "'num_problems'.*options: num_problems, largest"),
  ],
)
def test_a_broken_task_is_one_message(changes, options, said, load):
  with pytest.raises(UserError, match=f"(?s)^task my_sums:Sums: .*{said}") as caught:
    load(*changes, **options)
  assert "\n" not in str(caught.value)


def test_names_that_are_no_tasks(load):
  with pytest.raises(
    UserError, match=r"unknown task 'sums'; the built-in tasks are last_letter.*package\.module:Class"
  ):
    base.load_task("sums", {})
  with pytest.raises(UserError, match=r"task no_such_module:Task: .* cannot be imported"):
    base.load_task("no_such_module:Task", {})
  with pytest.raises(UserError, match="no class ''"):
    load(name="")


@pytest.mark.parametrize(
  ("returned", "said"),
  [
    ("None", "returned NoneType None, expected a list"),
    ("[]", r"returned list \[\]"),
    ("['1 + 1']", "item 0 is str '1 \\+ 1', expected a Problem"),
    ("[Problem('p', 's', split, '1 + 1', 2)]", "`answer` of item 0 is int 2, expected a string"),
    ("2 * [Problem('p', 's', split, '1 + 1', '2')]", "2 problems have the id 'p'"),
  ],
)
def test_wrong_problems(returned, said, load):
  task = load(("return [Problem", f"return {returned}\n    return [Problem"))
  with pytest.raises(UserError, match=rf"task sums, problems\('eval'\): .*{said}"):
    base.checked_problems(task, "eval", np.random.default_rng(0))


@pytest.mark.parametrize(
  ("returned", "said"),
  [
    ("True", "returned bool True, expected a Grade"),
    ("('3', True)", "returned tuple"),
    ("Grade(3, True)", "`answer` is int 3"),
    ("Grade('3', 1)", "`correct` is int 1"),
    ("Grade(None, True)", "`correct` is True but `answer` is None"),
  ],
)
def test_wrong_grades(returned, said, load):
  task = load(("return Grade(", f"return {returned}\n    return Grade("))
  with pytest.raises(UserError, match=rf"task sums, grade\(\) of a solution to p: .*{said}"):
    base.checked_grade(task, PROBLEM, "3")


def test_a_split_that_the_task_lacks(load):
  with pytest.raises(UserError, match="no such split; its splits are train, eval"):
    base.checked_problems(load(), "val", np.random.default_rng(0))
