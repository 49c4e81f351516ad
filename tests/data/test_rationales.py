"""Filters drop rationales that disagree or leak; ledgers and filters are compared; graders see other solutions."""

import dataclasses
import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrm_jax.data import grading, rationales
from genrm_jax.records import Candidate, Problem, Rationale
from genrm_jax.runtime.errors import UserError
from genrm_jax.tasks.gsm8k.rows import BadRows, iter_critiques
from genrm_jax.tasks.last_letter import LastLetter
from genrm_jax.text.prompts import RELEASED

ASK = RELEASED.verdict_question
PROBLEM = Problem("p", "last_letter", "train", "3mike4dlih;", "eh", "DeEh;")
CANDIDATES = [Candidate("p", 0, "DeEh;", "eh", True, "test"), Candidate("p", 1, "DeEx;", "ex", False, "test")]


def _raw(index, text):
  return Rationale("p", index, 0, text, None, "test", kept=True)


def test_filter_keeps_what_agrees_and_says_why_not():
  cases = [
    (0, f"fine\n{ASK} Yes", "fine", True, ""),
    (0, f"wrong\n{ASK} No", "wrong", False, "verdict disagrees with the label"),
    (0, f"{ASK} Yes", "", True, "empty"),
    (1, f"fine\n{ASK} No", "fine", False, ""),
    (1, f"wrong\n{ASK} Yes", "wrong", True, "verdict disagrees with the label"),
    (1, "no end", "no end", None, "no verdict"),
    (1, f"{ASK} Hard to say.\n{ASK} No", f"{ASK} Hard to say.", False, "asks for the verdict more than once"),
    (1, text := f"a\n{ASK} No\n\nanew\n{ASK} Yes", text, None, "verdicts contradict each other"),
  ]
  got = rationales.from_graders([_raw(i, text) for i, text, *_ in cases], CANDIDATES)
  assert [(r.text, r.verdict, r.why_dropped) for r in got] == [tuple(rest) for _, _, *rest in cases]
  assert all(r.kept is not bool(r.why_dropped) for r in got)
  right, wrong = rationales.ledger(got, CANDIDATES).values()
  assert right == {
    **{"all": 3, "kept": 1, "dropped: verdict disagrees with the label": 1, "dropped: empty": 1},
    **{"solutions": {"all": 1, "kept": 1}, "problems": {"all": 1, "kept": 1}},
    **{"share": {"all": 0.375, "kept": 0.5}, "characters": {"median": 4, "p90": 4, "max": 4}},
  }
  assert wrong["dropped: no verdict"] == 1 and wrong["share"] == {"all": 0.625, "kept": 0.5}


def test_a_program_writes_one_rationale_per_candidate():
  walk = LastLetter().rationale
  got = rationales.by_program([PROBLEM], CANDIDATES, walk)
  found = [(r.candidate_index, r.index, r.text, r.verdict, r.kept, r.source) for r in got]
  assert found == [(c.index, 0, *walk(PROBLEM, c.text), True, "program") for c in CANDIDATES]
  lies = rationales.by_program([PROBLEM], CANDIDATES, lambda problem, solution: ("all is well", True))
  assert [r.why_dropped for r in lies] == ["", "verdict disagrees with the label"]


@pytest.mark.parametrize(
  ("text", "names"),
  [
    *((text, True) for text in ("This matches the Expected Answer.", "as the expected\nanswer says", "Expected: 12")),
    *((text, True) for text in ("**Expected** **Answer:** 12", "Expected time: 3 hours.", "the expected steps")),
    ("It is unlike the reference solution.", True),
    *((text, False) for text in ("Her expected profit is $5.", "As expected, it is 4.", "An unexpected answer.")),
  ],
)
def test_leaks_can_be_dropped(text, names):
  raw = _raw(0, f"{text}\n{ASK} Yes")
  assert rationales.Filter()(raw, True).kept
  got = rationales.Filter(drop_leaks=True)(raw, True)
  assert (got.kept, got.why_dropped) == ((False, "names the reference") if names else (True, ""))
  assert rationales.Filter(drop_leaks=True)(raw, False).why_dropped == "verdict disagrees with the label"


def test_ledger_counts_problems_and_solutions_once_and_by_label():
  book = rationales.Ledger()
  assert book.table()["correct"]["share"] == {"all": None, "kept": None}
  for problem, solution, kept, label in (
    *(("p", 0, True, True), ("p", 0, True, True), ("p", 1, False, True), ("q", 0, False, True)),
    *(("p", 2, True, False), ("q", 3, True, False)),
  ):
    book.add(Rationale(problem, solution, 0, "x", True, "test", kept, "" if kept else "empty"), label)
  right, wrong = book.table().values()
  assert (right["solutions"], right["problems"]) == ({"all": 3, "kept": 1}, {"all": 2, "kept": 1})
  assert right["share"] == {"all": 0.6667, "kept": 0.5}
  assert wrong["solutions"] == wrong["problems"] == {"all": 2, "kept": 2}
  assert book.problems_with_both() == {"all": 2, "kept": 1}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1))
def test_length_statistics_match_sorted_lengths(lengths):
  got, ordered = rationales.length_statistics(Counter(lengths)), sorted(lengths)
  at = {name: ordered[math.ceil(part * len(ordered) / 100) - 1] for name, part in (("median", 50), ("p90", 90))}
  assert got == {**at, "max": ordered[-1]}


def test_replay_shows_where_filters_differ():
  filters = [rationales.Filter(), rationales.Filter("lenient-1"), rationales.Filter(drop_leaks=True)]
  replay = rationales.Replay(filters, 1)
  texts = [
    f"same\n\n{ASK} Yes",
    *(f"{body}\nVerification: Is the answer correct? Yes" for body in "ab"),
    f"as the Expected Answer\n\n{ASK} Yes",
    f"**Verification:**\nheaded\n\n{ASK} Yes",
    f"**Verification:**\nheaded, but wrong\n\n{ASK} No",
  ]
  raw = [_raw(0, text) for text in texts]
  first = [replay.add(r, True)[0] for r in raw]
  assert [r.text for r in first] == ["same", "a", "b", "as the Expected Answer", "headed", "headed, but wrong"]
  differences = {"verdict Yes -> none": 2, "kept -> dropped": 2, "kept with another text": 1}
  assert replay.table() == {
    "lenient-1": {"correct": differences, "incorrect": {}},
    "lenient-2+drop_leaks": {"correct": {"kept -> dropped": 1}, "incorrect": {}},
  }
  [(of, before, after)] = replay.examples["lenient-1", "correct", "verdict Yes -> none"]
  assert (of, before.verdict, after.verdict) == (raw[1], True, None)
  kept = [book.table()["correct"]["kept"] for book in replay.ledgers.values()]
  assert kept == [5, 3, 4] and list(replay.ledgers) == ["lenient-2", "lenient-1", "lenient-2+drop_leaks"]


def test_rows_match_the_released_cot_set(data_dir):
  rebuilt = 0
  for question, solution, targets, correct, _ in iter_critiques(data_dir, "val", BadRows()):
    raw = Rationale("p", 0, 0, targets, None, "test", True)
    got = rationales.Filter("exact-1")(raw, correct)
    built = rationales.to_released(question, solution, got.text, correct, 3, 5)
    assert list(built) == ["inputs", "targets", "question_id", "model_output_id"]
    prompt = RELEASED.render(RELEASED.solve, question=question) + solution + RELEASED.render(RELEASED.verify_cot)
    assert built["inputs"] == prompt  # which test_prompts.py compares with the release
    # Identical but for white space around the rationale, and where the rationale poses the question before.
    rebuilt += built["targets"].split() == targets.split()
  assert rebuilt >= 250


# References for graders


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
