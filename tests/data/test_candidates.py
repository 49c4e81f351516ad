"""Grading, and the choice of solutions for training: capped, distinct, balanced."""

import collections

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from genrm_jax.data import candidates
from genrm_jax.errors import UserError
from genrm_jax.tasks.last_letter import LastLetter
from genrm_jax.types import Candidate, Problem

PROBLEMS = [Problem(f"p{i}", "last_letter", "train", f"{i}mike{i + 1}dlih;", "eh") for i in range(3)]


def _candidates(marks):
  """A pool from (problem, text, correct)."""
  return [Candidate(f"p{p}", i, f"text {t}", None, correct, "test") for i, (p, t, correct) in enumerate(marks)]


POOLS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6), st.booleans()), max_size=60).map(_candidates)


def test_sampled_solutions_are_asked_for_and_graded_in_order():
  asked = []

  def generate(problems, indices):
    asked.extend((p.id, i) for p, i in zip(problems, indices, strict=True))
    return [["3e4h;", "no list", "3e4x;"][i] for i in indices]

  got = candidates.sample_candidates(PROBLEMS, 3, LastLetter(), generate, "me")
  assert asked == [(f"p{p}", i) for p in range(3) for i in range(3)]
  assert [(c.problem_id, c.index) for c in got] == asked
  assert [(c.text, c.answer, c.correct, c.source) for c in got[3:6]] == [
    ("3e4h;", "eh", True, "me"),
    ("no list", None, False, "me"),
    ("3e4x;", "ex", False, "me"),
  ]


@given(POOLS)
@settings(max_examples=60, deadline=None)
def test_distinct_keeps_the_first_of_each_text_of_a_problem(pool):
  got = candidates.distinct(pool)
  texts = [(c.problem_id, c.text) for c in got]
  assert len(set(texts)) == len(texts) and set(texts) == {(c.problem_id, c.text) for c in pool}
  first = {}
  for c in reversed(pool):
    first[c.problem_id, c.text] = c.index
  assert [c.index for c in got] == sorted(first.values())


@settings(max_examples=150, deadline=None)
@given(POOLS, st.integers(1, 4), st.booleans(), st.integers(0, 2**31))
def test_choice_is_capped_distinct_and_balanced(pool, max_per_label, balanced, seed):
  distinct = candidates.distinct(pool)
  there = collections.Counter((c.problem_id, c.correct) for c in distinct)
  room = {label: sum(min(n, max_per_label) for (_, of), n in there.items() if of is label) for label in (True, False)}
  assume(room[True] and room[False])
  got = candidates.choose_for_training(pool, max_per_label, balanced, seed)
  indices = [c.index for c in got]
  assert len(set(indices)) == len(indices) and set(indices) <= {c.index for c in distinct}
  assert all(c is pool[c.index] for c in got)
  assert max(collections.Counter((c.problem_id, c.correct) for c in got).values()) <= max_per_label
  sizes = {label: sum(c.correct is label for c in got) for label in (True, False)}
  assert sizes == (dict.fromkeys(room, min(room.values())) if balanced else room)
  assert got == candidates.choose_for_training(pool, max_per_label, balanced, seed)


def test_choice_is_random_within_a_problem_and_over_problems():
  pool = _candidates([(p, t, t == 0) for p in range(4) for t in range(9)])
  chosen = [candidates.choose_for_training(pool, 2, True, seed) for seed in range(20)]
  wrong = collections.Counter(c.index for one in chosen for c in one if not c.correct)
  assert len(wrong) > 24, "of 32 wrong solutions nearly each is chosen by one of 20 seeds"


@pytest.mark.parametrize(
  ("label", "counts"), [(True, "2 correct and 0 incorrect"), (False, "0 correct and 2 incorrect")]
)
def test_choice_wants_both_labels(label, counts):
  with pytest.raises(UserError, match=counts):
    candidates.choose_for_training(_candidates([(0, 0, label), (1, 0, label)]), 16, True, 0)
