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
  """Loads `Sums` from a user's module, after replacements in its text."""
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.setattr(sys, "dont_write_bytecode", True)

  def load(*changes, **options):
    text = SUMS
    for old, new in changes:
      assert old in text
      text = text.replace(old, new)
    (tmp_path / "my_sums.py").write_text(text)
    monkeypatch.delitem(sys.modules, "my_sums", raising=False)
    return base.load_task("my_sums:Sums", options)

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
  assert [base.load_task(name, {}).name for name in base.BUILT_IN] == list(base.BUILT_IN)


@pytest.mark.parametrize(
  ("changes", "options", "said"),
  [
    ([("import Grade", "import Grad")], {}, "my_sums.*ImportError.*PYTHONPATH"),
    ([("class Sums:", "class Sums")], {}, "my_sums.*SyntaxError"),
    ([("class Sums", "class Products")], {}, "no class .*Sums.*it has Products"),
    ([("def grade", "def mark")], {}, r"no method grade\(\)"),
    ([("def problems", "def make")], {}, r"no method problems\(\)"),
    ([("helper = 3", "few_shot = 3")], {}, "few_shot is no method"),
    ([('"sums", ("train", "eval")', '3, ("train", "eval")')], {}, "`name` is 3"),
    ([('("train", "eval")', '("train", "test")')], {}, "`splits` is .*'test'.*in_distribution"),
    ([], {"smallest": 1}, "'smallest'.*num_problems, largest"),
    ([("num_problems=2", "num_problems")], {}, "'num_problems'.*num_problems, largest"),
  ],
)
def test_a_broken_task_is_one_message(changes, options, said, load):
  with pytest.raises(UserError, match=f"(?s)^task '?my_sums:Sums'?: .*{said}") as caught:
    load(*changes, **options)
  assert "\n" not in str(caught.value)
  with pytest.raises(UserError, match=r"'sums'.*last_letter.*package\.module:Class"):
    base.load_task("sums", {})


@pytest.mark.parametrize(
  ("method", "returned", "said"),
  [
    ("problems", "None", "NoneType None"),
    ("problems", "[]", r"list \[\]"),
    ("problems", "['1 + 1']", "item 0 is str '1 \\+ 1'"),
    ("problems", "[Problem('p', 's', split, '1 + 1', 2)]", "`answer` of item 0 is int 2"),
    ("problems", "2 * [Problem('p', 's', split, '1 + 1', '2')]", "2 problems have the id 'p'"),
    ("grade", "True", "bool True"),
    ("grade", "('3', True)", "tuple"),
    ("grade", "Grade(3, True)", "`answer` is int 3"),
    ("grade", "Grade('3', 1)", "`correct` is int 1"),
    ("grade", "Grade(None, True)", "`correct` is True but `answer` is None"),
  ],
)
def test_wrong_return_values_are_named(method, returned, said, load):
  before = {"problems": "return [Problem", "grade": "return Grade("}[method]
  task = load((before, f"return {returned}\n    {before}"))
  with pytest.raises(UserError, match=rf"task sums, {method}\(.*{said}"):
    if method == "grade":
      base.checked_grade(task, PROBLEM, "3")
    else:
      base.checked_problems(task, "eval", np.random.default_rng(0))
  with pytest.raises(UserError, match="no such split; its splits are train, eval"):
    base.checked_problems(task, "val", np.random.default_rng(0))
