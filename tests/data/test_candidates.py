"""Solutions are chosen for training, and read from a user's file, whose errors are named."""

import collections
import json

from hypothesis import assume, given, settings
from hypothesis import strategies as st
from refusals import refused

from genrm_jax.data import candidates
from genrm_jax.data.readers import read_candidates
from genrm_jax.records import Candidate, Problem
from genrm_jax.tasks.gsm8k.task import GSM8K


def _candidates(marks):
  """A pool from (problem, text, correct)."""
  return [Candidate(f"p{p}", i, f"text {t}", None, correct, "test") for i, (p, t, correct) in enumerate(marks)]


POOLS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6), st.booleans()), max_size=60).map(_candidates)


@settings(max_examples=80, deadline=None)
@given(POOLS, st.integers(1, 4), st.booleans(), st.integers(0, 2**31))
def test_choice_is_capped_distinct_and_balanced(pool, max_per_label, balanced, seed):
  first = {(c.problem_id, c.text): c for c in reversed(pool)}
  distinct = candidates.distinct(pool)
  assert distinct == sorted(first.values(), key=lambda c: c.index)
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


def test_choices_are_drawn_from_everything_and_need_both_labels():
  pool = _candidates([(p, t, t < 3) for p in range(2) for t in range(7)])
  drawn = [candidates.choose_pairs(pool, 2, seed) for seed in range(40)]
  assert len({(a.index, b.index) for pairs in drawn for a, b in pairs}) > 22, "nearly each of 24 pairs"
  assert len(candidates.choose_pairs(pool, 99, 0)) == 24
  pool = _candidates([(p, t, t == 0) for p in range(4) for t in range(9)])
  drawn = [candidates.choose_for_training(pool, 2, True, seed) for seed in range(20)]
  assert len({c.index for chosen in drawn for c in chosen}) > 28, "nearly each of 36 solutions"
  right, wrong = _candidates([(0, 0, True), (1, 1, True)]), _candidates([(2, 2, False)])
  refused(
    ("none of 3 problems has both", candidates.choose_pairs, [*right, *wrong], 4, 0),
    ("2 correct and 0 incorrect", candidates.choose_for_training, right, 16, True, 0),
    ("0 correct and 1 incorrect", candidates.choose_for_training, wrong, 16, True, 0),
  )


QUESTIONS = ("How  many\na?", "How many b?", "Twice?", "Twice?")
OF_USER = [Problem(f"p{i}", "gsm8k", "train", q, "7") for i, q in enumerate(QUESTIONS)]
GOOD = {"question": "How many b?", "solution": "The answer is 7."}


def _read(tmp_path, *rows):
  path = tmp_path / "mine.jsonl"
  path.write_bytes(b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows))
  return read_candidates(path, OF_USER, GSM8K())


def test_lines_are_matched_graded_and_counted(tmp_path):
  rows, expected = zip(
    ({"question": " How many  a?", "solution": "The answer is $7.00."}, ("p0", 0, "7", True)),
    ({"problem_id": "p1", "solution": "Twice: \\boxed{8}."}, ("p1", 0, "8", False)),
    ({"problem_id": "p1", "solution": "No: $\\boxed{7}$"}, ("p1", 1, "7", True)),
    ({"problem_id": "p0", "solution": "The answer is 8."}, ("p0", 1, "8", False)),
    ({"problem_id": "p2", "solution": "Seven it is.", "correct": True}, ("p2", 0, None, True)),
    ({"question": "How many a?", "solution": "The answer is 7.", "correct": False}, ("p0", 2, "7", False)),
    strict=True,
  )
  found = _read(tmp_path, *rows)
  assert [(c.problem_id, c.index, c.answer, c.correct) for c in found] == list(expected)
  assert [c.text for c in found] == [row["solution"] for row in rows]
  assert {c.source for c in found} == {"mine.jsonl"}


def test_a_wrong_line_or_file_is_named(tmp_path):
  for row, message in (
    *((line, "not JSON") for line in (b"{", b"[" * 100_000, b"\xff", b'{"solution": NaN}')),
    ([1], "expected a JSON object"),
    *((GOOD | {f: "half \ud83d"}, f'field "{f}" has half of a surrogate pair') for f in ("solution", "question")),
    (GOOD | {"label": 1}, 'unknown field "label"'),
    *((row, 'give one of the fields "question"') for row in (GOOD | {"problem_id": "p1"}, {"solution": "s"})),
    ({"problem_id": "p1"}, 'field "solution" is missing'),
    *((GOOD | {"solution": value}, 'field "solution" is ') for value in (" \n", None)),
    (GOOD | {"question": 3}, 'field "question" is 3'),
    (GOOD | {"question": "Who?" * 30}, r'field "question" is "Who\?.*\.\.\., none of'),
    (GOOD | {"question": "Twice?"}, 'field "question" is "Twice[?]", that of 2 problems'),
    ({"problem_id": "p9", "solution": "s"}, 'field "problem_id" is "p9", none of the 4 problems'),
    *((GOOD | {"correct": value}, 'field "correct" is ') for value in (1, None)),
  ):
    refused((rf"mine\.jsonl:3: {message}", _read, tmp_path, GOOD, b" ", row, GOOD))
  assert len(_read(tmp_path, GOOD, b"", GOOD, b"\t", b"")) == 2, "blank lines are skipped"
  for path, shown in ((tmp_path / "none.jsonl", r"none\.jsonl"), (tmp_path, ""), (f"{tmp_path}/\0", "\0")):
    refused((f"{shown}: could not be read", read_candidates, path, OF_USER, GSM8K()))
  refused((r"mine\.jsonl: no line", _read, tmp_path))
