"""Lists that are numbered from 0 on instead are the same lists: the walk, the verdict and the label stay."""

import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrm_jax.records import Candidate
from genrm_jax.tasks.last_letter import LastLetter, read_list, renumber
from genrm_jax.tasks.word_sorting import WordSorting

TASKS = {"last_letter": LastLetter(), "word_sorting": WordSorting()}
CHARS = st.sampled_from("abc0123456789ABCJ;,.") | st.characters()


def _graded(task, problem, text, index=0):
  answer = task.extract_answer(text)
  return Candidate(problem.id, index, text, answer, task.same_answer(answer, problem.answer), "generator/4")


def _shift(text, by):
  counters = "0123456789", "ABCDEFGHIJ"
  for counter in counters:
    text = re.sub(f"[{counter}]", lambda found, c=counter: c[(c.index(found[0]) + by) % 10], text)
  return text


@pytest.mark.parametrize("name", TASKS)
@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5), st.data())
def test_walks_verdicts_and_labels_stay(name, seed, num_words, data):
  task = TASKS[name]
  problem = task.problem(np.random.default_rng(seed), num_words, "train", 0)
  words, first = read_list(problem.question)
  right, at = problem.reference, st.integers(0, len(problem.reference))
  solution = data.draw(
    st.one_of(
      st.just(right),
      st.builds(lambda i, c: right[:i] + c + right[i + 1 :], at, CHARS),
      st.builds(lambda i, c: right[:i] + c + right[i:], at, CHARS),
      st.builds(lambda i, n: right[:i] + right[i + n :], at, st.integers(1, 4)),
      st.builds(lambda by: _shift(right, by), st.integers(0, 9)),
      st.builds(lambda s: right[:-1] + s, st.text("ab0123456789;,.", max_size=4)),
    )
  )
  candidate = _graded(task, problem, solution, index=3)
  (moved,), (got,) = renumber([problem], [candidate])
  assert read_list(moved.question) == (words, 0) and moved.reference == _shift(right, -first)
  assert _graded(task, moved, moved.reference).correct
  assert (got.index, got.correct, got.source) == (3, candidate.correct, "generator/4")
  (text, verdict), (walk, same) = task.rationale(problem, solution), task.rationale(moved, got.text)
  assert same is verdict
  # Where a list ends with number 9, Last Letter's walk has no number for a further item; from 0 on it has one.
  if name == "word_sorting" or first + num_words < 10:
    assert walk == _shift(text, -first)


def test_each_problem_has_its_own_first_number_and_another_number_stays_wrong():
  make = np.random.default_rng(0)
  task = TASKS["word_sorting"]
  three = dataclasses.replace(task.problem(make, 2, "train", 0), id="p", question="3b4a;", answer="D4aE3b")
  seven = dataclasses.replace(three, id="q", question="7c;", answer="H7c", reference="H7c.")
  pool = [_graded(task, seven, "H7c."), _graded(task, three, "D3aC2b."), _graded(task, three, "D4aE3b.")]
  problems, moved = renumber([three, seven], pool)
  assert [p.question for p in problems] == ["0b1a;", "0c;"] and [p.answer for p in problems] == ["A1aB0b", "A0c"]
  assert [c.text for c in moved] == ["A0c.", "A0aJ9b.", "A1aB0b."]
  assert [c.answer for c in moved] == ["A0c", "A0aJ9b", "A1aB0b"]
  assert [c.correct for c in moved] == [True, False, True]
  again = {p.id: p for p in problems}
  assert [_graded(task, again[c.problem_id], c.text).correct for c in moved] == [True, False, True]
