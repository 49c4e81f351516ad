"""Graders are asked in the release's words, with another correct solution as the reference; answers become records."""

import dataclasses
import gzip
import itertools
import json

import pytest

from genrm_jax.data import grading, rationales
from genrm_jax.records import Candidate
from genrm_jax.runtime.errors import UserError
from genrm_jax.text.prompts import get_format


def _candidate(index, text, correct=True, problem="p"):
  return Candidate(problem, index, text, "4", correct, "test")


POOL = [_candidate(0, "a"), _candidate(1, "b"), _candidate(2, "c"), _candidate(3, "a"), _candidate(4, "no", False)]


@pytest.mark.parametrize("label", ["correct", "incorrect"])
def test_reference_prompt_is_the_released_one(data_dir, label):
  path = data_dir / f"genrm-critiques/critiques/data_collection/critique_gen_{label}_solutions_round_0_shard_0.jsonl.gz"
  if not path.exists():
    pytest.skip(f"no raw pool: {path}")
  with gzip.open(path) as lines:
    for line in itertools.islice(lines, 500):
      row = json.loads(line)
      reference = row["verifier_prompt"].rpartition("\nExpected Answer: ")[2]
      assert grading.reference_prompt(row["question"], reference, row["model_output"]) == row["verifier_prompt"]


def test_braces_in_a_text_are_no_slots():
  got = grading.reference_prompt("{solution}", "{question}", "{x}")
  assert got.endswith("Question: {solution}\nSolution: {x}\nExpected Answer: {question}")
  assert "{question}A:" not in grading.plain_prompt("{solution}", "s", get_format("genrm"))


def test_plain_prompt_asks_as_at_test_time_and_shows_no_reference():
  assert grading.plain_prompt("How many?", "It is 4.", get_format("genrm_short")) == (
    "Q: How many?\nA: Let's think step by step.\nIt is 4.\nVerification: Let's verify step by step.\n"
  )


def test_references_are_other_correct_solutions():
  for draw in range(20):
    chosen = grading.choose_references(POOL, "own", seed=1, draw=draw)
    for c, reference in zip(POOL, chosen, strict=True):
      assert reference in {"a", "b", "c"} - {c.text}
  everything = {grading.choose_references(POOL, "own", seed=1, draw=d)[4] for d in range(20)}
  assert everything == {"a", "b", "c"}


def test_references_hang_on_seed_draw_and_candidate_alone():
  many = [_candidate(i, f"solution {i}") for i in range(40)]
  chosen = grading.choose_references(many, "own", seed=3)
  assert grading.choose_references(many[::-1], "own", seed=3) == chosen[::-1]
  for other in (
    grading.choose_references(many, "own", seed=4),
    grading.choose_references(many, "own", seed=3, draw=1),
    grading.choose_references([dataclasses.replace(c, problem_id="q") for c in many], "own", seed=3),
  ):
    assert sum(a != b for a, b in zip(chosen, other, strict=True)) > 20
  assert len(set(chosen)) > 15


def test_without_another_correct_solution_the_problems_own_is_taken():
  alone = [_candidate(0, "a"), _candidate(1, "a"), _candidate(2, "no", False)]
  assert grading.choose_references(alone, "own", seed=0) == ["own", "own", "a"]
  with pytest.raises(UserError, match="no reference solution for candidate 0 of p"):
    grading.choose_references(alone, "", seed=0)


def test_sampled_texts_become_records_that_a_filter_takes():
  ask = "Verification: Is the answer correct (Yes/No)?"
  graded = [POOL[0], POOL[4], POOL[0]]
  raw = grading.as_rationales(
    graded, [f"fine\n\n{ask} Yes", f"wrong\n\n{ask} No", "breaks off"], "run/400", "reference"
  )
  assert [(r.problem_id, r.candidate_index, r.index) for r in raw] == [("p", 0, 0), ("p", 4, 0), ("p", 0, 1)]
  assert {(r.source, r.verdict) for r in raw} == {("run/400/reference", None)}
  got = rationales.from_graders(raw, POOL)
  assert [(r.text, r.why_dropped) for r in got] == [("fine", ""), ("wrong", ""), ("breaks off", "no verdict")]
  with pytest.raises(UserError, match="way of grading 'both'"):
    grading.as_rationales(graded, ["", "", ""], "run/400", "both")
