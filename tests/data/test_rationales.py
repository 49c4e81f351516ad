"""Filters drop rationales that disagree or leak; ledgers add up; filters are compared; rows are as released."""

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrm_jax.data import rationales
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
  ]
  got = rationales.from_graders([_raw(i, text) for i, text, *_ in cases], CANDIDATES)
  assert [(r.text, r.verdict, r.why_dropped) for r in got] == [tuple(rest) for _, _, *rest in cases]
  assert all(r.kept is not bool(r.why_dropped) for r in got)
  right, wrong = rationales.ledger(got, CANDIDATES).values()
  assert right == {
    **{"all": 3, "kept": 1, "dropped: verdict disagrees with the label": 1, "dropped: empty": 1},
    **{"solutions": {"all": 1, "kept": 1}, "problems": {"all": 1, "kept": 1}},
    **{"share": {"all": 0.4286, "kept": 0.5}, "characters": {"median": 4, "p90": 4, "max": 4}},
  }
  assert wrong["dropped: no verdict"] == 1 and wrong["share"] == {"all": 0.5714, "kept": 0.5}


def test_a_program_writes_one_rationale_per_candidate():
  walk = LastLetter().rationale
  got = rationales.by_program([PROBLEM], CANDIDATES, walk)
  found = [(r.candidate_index, r.index, r.text, r.verdict, r.kept, r.source) for r in got]
  assert found == [(c.index, 0, *walk(PROBLEM, c.text), True, "program") for c in CANDIDATES]
  lies = rationales.by_program([PROBLEM], CANDIDATES, lambda problem, solution: ("all is well", True))
  assert [r.why_dropped for r in lies] == ["", "verdict disagrees with the label"]


def test_a_filter_with_an_older_reader():
  raw = _raw(0, "fine\nVerification: Is the answer correct? Yes")
  kept = [rationales.Filter(name)(raw, True).kept for name in ("exact-1", "lenient-1", "lenient-2")]
  assert kept == [False, False, True]
  assert rationales.Filter() == rationales.Filter("lenient-2", drop_leaks=False)
  assert rationales.from_graders([raw], CANDIDATES, rationales.Filter("lenient-1"))[0].why_dropped == "no verdict"
  got = rationales.Filter()(_raw(0, f"a\n{ASK} No\n\nanew\n{ASK} Yes"), True)
  assert (got.verdict, got.kept, got.why_dropped) == (None, False, "verdicts contradict each other")
  with pytest.raises(UserError, match=r"'lenient-9'.* exact-1"):
    rationales.Filter("lenient-9")


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
  disagrees = rationales.Filter(drop_leaks=True)(raw, False)
  assert disagrees.why_dropped == "verdict disagrees with the label"


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
