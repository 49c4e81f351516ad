"""References are other correct solutions, chosen reproducibly; graders' texts become records."""

import dataclasses

import pytest

from genrm_jax.data import grading, rationales
from genrm_jax.records import Candidate
from genrm_jax.runtime.errors import UserError
from genrm_jax.text.prompts import RELEASED


def _candidate(index, text, correct=True, problem="p"):
  return Candidate(problem, index, text, "4", correct, "test")


POOL = [_candidate(0, "a"), _candidate(1, "b"), _candidate(2, "c"), _candidate(3, "a"), _candidate(4, "no", False)]


def test_references_are_other_correct_solutions_or_the_problems_own():
  drawn = [grading.choose_references(POOL, "own", seed=1, draw=draw) for draw in range(20)]
  for chosen in drawn:
    assert all(reference in {"a", "b", "c"} - {c.text} for c, reference in zip(POOL, chosen, strict=True))
  assert {chosen[4] for chosen in drawn} == {"a", "b", "c"}
  alone = [_candidate(0, "a"), _candidate(1, "a"), _candidate(2, "no", False)]
  assert grading.choose_references(alone, "own", seed=0) == ["own", "own", "a"]
  with pytest.raises(UserError, match="no reference solution for candidate 0 of p"):
    grading.choose_references(alone, "", seed=0)


def test_references_depend_on_seed_draw_and_candidate_only():
  many = [_candidate(i, f"solution {i}") for i in range(40)]
  chosen = grading.choose_references(many, "own", seed=3)
  assert grading.choose_references(many[::-1], "own", seed=3) == chosen[::-1] and len(set(chosen)) > 15
  others = [dataclasses.replace(c, problem_id="q") for c in many]
  for pool, seed, draw in ((many, 4, 0), (many, 3, 1), (others, 3, 0)):
    other = grading.choose_references(pool, "own", seed=seed, draw=draw)
    assert sum(a != b for a, b in zip(chosen, other, strict=True)) > 20


def test_sampled_texts_become_records_for_a_filter():
  graded, ask = [POOL[0], POOL[4], POOL[0]], RELEASED.render(RELEASED.conclude)
  raw = grading.as_rationales(graded, [f"fine{ask} Yes", f"wrong{ask} No", "breaks off"], "run/400", "reference")
  assert [(r.problem_id, r.candidate_index, r.index) for r in raw] == [("p", 0, 0), ("p", 4, 0), ("p", 0, 1)]
  assert {(r.source, r.verdict) for r in raw} == {("run/400/reference", None)}
  got = rationales.from_graders(raw, POOL)
  assert [(r.text, r.why_dropped) for r in got] == [("fine", ""), ("wrong", ""), ("breaks off", "no verdict")]
  with pytest.raises(UserError, match="way of grading 'both'"):
    grading.as_rationales(graded, ["", "", ""], "run/400", "both")
