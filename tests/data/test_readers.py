"""A user's own solutions are matched and graded; errors name line and field."""

import json

import pytest

from genrm_jax.data.readers import read_candidates
from genrm_jax.records import Problem
from genrm_jax.runtime.errors import UserError
from genrm_jax.tasks.gsm8k.task import GSM8K

QUESTIONS = ("How  many\na?", "How many b?", "Twice?", "Twice?")
PROBLEMS = [Problem(f"p{i}", "gsm8k", "train", q, "7") for i, q in enumerate(QUESTIONS)]
GOOD = {"question": "How many b?", "solution": "The answer is 7."}


def _read(tmp_path, *rows):
  path = tmp_path / "mine.jsonl"
  path.write_bytes(b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows))
  return read_candidates(path, PROBLEMS, GSM8K())


def test_lines_are_matched_graded_and_counted(tmp_path):
  rows, expected = zip(
    ({"question": " How many  a?", "solution": "The answer is $7.00."}, ("p0", 0, "7", True)),
    ({"problem_id": "p1", "solution": "The answer is 8."}, ("p1", 0, "8", False)),
    ({"problem_id": "p0", "solution": "The answer is 8."}, ("p0", 1, "8", False)),
    ({"problem_id": "p2", "solution": "Seven it is.", "correct": True}, ("p2", 0, None, True)),
    ({"question": "How many a?", "solution": "The answer is 7.", "correct": False}, ("p0", 2, "7", False)),
    strict=True,
  )
  found = _read(tmp_path, *rows)
  assert [(c.problem_id, c.index, c.answer, c.correct) for c in found] == list(expected)
  assert [c.text for c in found] == [row["solution"] for row in rows]
  assert {c.source for c in found} == {"mine.jsonl"}


@pytest.mark.parametrize(
  ("row", "message"),
  [
    *((line, "not JSON") for line in (b"{", b"", b"[" * 100_000, b"\xff")),
    ([1], "expected a JSON object"),
    (GOOD | {"label": 1}, 'unknown field "label"'),
    *((row, 'give one of the fields "question"') for row in (GOOD | {"problem_id": "p1"}, {"solution": "s"})),
    ({"problem_id": "p1"}, 'field "solution" is missing'),
    *((GOOD | {"solution": value}, 'field "solution" is ') for value in (" \n", None)),
    (GOOD | {"question": 3}, 'field "question" is 3'),
    (GOOD | {"question": "Who?" * 30}, r'field "question" is "Who\?.*\.\.\., none of'),
    (GOOD | {"question": "Twice?"}, 'field "question" is "Twice[?]", that of 2 problems'),
    ({"problem_id": "p9", "solution": "s"}, 'field "problem_id" is "p9", none of the 4 problems'),
    *((GOOD | {"correct": value}, 'field "correct" is ') for value in (1, None)),
  ],
)
def test_a_wrong_line_is_named(row, message, tmp_path):
  with pytest.raises(UserError, match=rf"mine\.jsonl:2: {message}"):
    _read(tmp_path, GOOD, row, GOOD)


def test_no_file_and_no_line(tmp_path):
  with pytest.raises(UserError, match=r"none\.jsonl: could not be read"):
    read_candidates(tmp_path / "none.jsonl", PROBLEMS, GSM8K())
  with pytest.raises(UserError, match=r"mine\.jsonl: no line"):
    _read(tmp_path)
