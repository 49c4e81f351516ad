"""Grading, and the choice of solutions for training: capped, distinct, balanced."""

import collections

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from genrm_jax.data import candidates
from genrm_jax.records import Candidate, Problem
from genrm_jax.runtime.errors import UserError
from genrm_jax.tasks.last_letter import LastLetter

PROBLEMS = [Problem(f"p{i}", "last_letter", "train", f"{i}mike{i + 1}dlih;", "eh") for i in range(3)]


def _candidates(marks):
  """A pool from (problem, text, correct)."""
  return [Candidate(f"p{p}", i, f"text {t}", None, correct, "test") for i, (p, t, correct) in enumerate(marks)]


POOLS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6), st.booleans()), max_size=60).map(_candidates)


def test_solutions_are_sampled_and_graded_in_order():
  requests = []

  def generate(problems, indices):
    requests.extend((p.id, i) for p, i in zip(problems, indices, strict=True))
    return [["DeEh;", "no list", "DeEx;"][i] for i in indices]

  got = candidates.sample_candidates(PROBLEMS, 3, LastLetter(), generate, "me")
  assert requests == [(f"p{p}", i) for p in range(3) for i in range(3)]
  assert [(c.problem_id, c.index) for c in got] == requests
  assert [(c.text, c.answer, c.correct, c.source) for c in got[3:6]] == [
    ("DeEh;", "eh", True, "me"),
    ("no list", None, False, "me"),
    ("DeEx;", "ex", False, "me"),
  ]


@given(POOLS)
@settings(max_examples=60, deadline=None)
def test_distinct_keeps_the_first_of_each_text(pool):
  got = candidates.distinct(pool)
  texts = [(c.problem_id, c.text) for c in got]
  assert len(set(texts)) == len(texts) and set(texts) == {(c.problem_id, c.text) for c in pool}
  first = {}
  for c in reversed(pool):
    first[c.problem_id, c.text] = c.index
  assert [c.index for c in got] == sorted(first.values())


@settings(max_examples=80, deadline=None)
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


@settings(max_examples=80, deadline=None)
@given(POOLS, st.integers(1, 7), st.integers(0, 2**31))
def test_pairs_are_capped_distinct_and_of_one_problem(pool, max_pairs, seed):
  sides = collections.Counter((c.problem_id, c.correct) for c in candidates.distinct(pool))
  problems = {c.problem_id for c in pool}
  room = {p: min(max_pairs, sides[p, True] * sides[p, False]) for p in problems}
  assume(any(room.values()))
  got = candidates.choose_pairs(pool, max_pairs, seed)
  assert all(a.correct and not b.correct and a.problem_id == b.problem_id for a, b in got)
  assert len({(a.problem_id, a.text, b.text) for a, b in got}) == len(got)
  assert collections.Counter(a.problem_id for a, _ in got) == +collections.Counter(room)
  assert all(c is pool[c.index] for pair in got for c in pair)
  assert got == candidates.choose_pairs(pool, max_pairs, seed)


def test_choices_are_drawn_from_everything():
  pool = _candidates([(p, t, t < 3) for p in range(2) for t in range(7)])
  drawn = [candidates.choose_pairs(pool, 2, seed) for seed in range(40)]
  assert len({(a.index, b.index) for pairs in drawn for a, b in pairs}) > 22, "nearly each of 24 pairs"
  assert len(candidates.choose_pairs(pool, 99, 0)) == 24
  pool = _candidates([(p, t, t == 0) for p in range(4) for t in range(9)])
  drawn = [candidates.choose_for_training(pool, 2, True, seed) for seed in range(20)]
  assert len({c.index for chosen in drawn for c in chosen}) > 28, "nearly each of 36 solutions"


def test_choices_need_both_labels():
  pool = _candidates([(0, 0, True), (0, 1, True), (1, 2, False)])
  with pytest.raises(UserError, match=r"none of 2 problems has both"):
    candidates.choose_pairs(pool, 4, 0)
  with pytest.raises(UserError, match="max_pairs"):
    candidates.choose_pairs([*pool, *_candidates([(1, 3, True)])], 0, 0)
  for label, counts in ((True, "2 correct and 0 incorrect"), (False, "0 correct and 2 incorrect")):
    with pytest.raises(UserError, match=counts):
      candidates.choose_for_training(_candidates([(0, 0, label), (1, 0, label)]), 16, True, 0)
