"""A user's task is loaded by its import path, and each mistake in it is one message that names the task."""

import sys
from functools import partial

import numpy as np
import pytest
from refusals import refused

from genrm_jax.records import Problem
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


def test_a_broken_task_is_one_message(load):
  refused((r"'sums'.*last_letter.*package\.module:Class", base.load_task, "sums", {}))
  for said, changes, options in (
    ("my_sums.*ImportError.*PYTHONPATH", [("import Grade", "import Grad")], {}),
    ("my_sums.*SyntaxError", [("class Sums:", "class Sums")], {}),
    ("no class .*Sums.*it has Products", [("class Sums", "class Products")], {}),
    (r"no method grade\(\)", [("def grade", "def mark")], {}),
    (r"no method problems\(\)", [("def problems", "def make")], {}),
    ("few_shot is no method", [("helper = 3", "few_shot = 3")], {}),
    ("`name` is 3", [('"sums", ("train", "eval")', '3, ("train", "eval")')], {}),
    ("`splits` is .*'test'.*in_distribution", [('("train", "eval")', '("train", "test")')], {}),
    ("'smallest'.*num_problems, largest", [], {"smallest": 1}),
    ("'num_problems'.*num_problems, largest", [("num_problems=2", "num_problems")], {}),
  ):
    refused((rf"^task '?my_sums:Sums'?: .*{said}.*\Z", partial(load, *changes, **options)))


@pytest.mark.parametrize(
  ("before", "returned", "said"),
  [
    *(("return [Problem", *case) for case in (("None", "NoneType None"), ("[]", r"list \[\]"))),
    ("return [Problem", "['1 + 1']", "item 0 is str '1 \\+ 1'"),
    ("return [Problem", "[Problem('p', 's', split, '1 + 1', 2)]", "`answer` of item 0 is int 2"),
    ("return [Problem", "2 * [Problem('p', 's', split, '1 + 1', '2')]", "2 problems have the id 'p'"),
    *(("return Grade(", *case) for case in (("True", "bool True"), ("('3', True)", "tuple"))),
    *(
      ("return Grade(", *case) for case in (("Grade(3, True)", "`answer` is int 3"), ("Grade('3', 1)", "`correct` is"))
    ),
    ("return Grade(", "Grade(None, True)", "`correct` is True but `answer` is None"),
  ],
)
def test_wrong_return_values_are_named(before, returned, said, load):
  task = load((before, f"return {returned}\n    {before}"))
  problems = partial(base.checked_problems, task, rng=np.random.default_rng(0))
  refused(("no such split; its splits are train, eval", problems, "val"))
  if "Problem" in before:
    refused((rf"task sums, problems\(.*{said}", problems, "eval"))
  else:
    refused((rf"task sums, grade\(.*{said}", base.checked_grade, task, PROBLEM, "3"))
