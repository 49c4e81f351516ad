"""Verdicts are found where graders put them, disagreeing rationales are dropped, and the ledger adds up."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrm_jax.data import rationales
from genrm_jax.tasks.last_letter import LastLetter
from genrm_jax.types import Candidate, Problem, Rationale

ASK = "Verification: Is the answer correct (Yes/No)?"
TASK = LastLetter()
PROBLEM = Problem("p", "last_letter", "train", "3mike4dlih;", "eh", "DeEh;")


def _candidate(index, text):
  answer = TASK.extract_answer(text)
  return Candidate("p", index, text, answer, answer == "eh", "test")


def _raw(index, text):
  return Rationale("p", index, 0, text, None, "test", kept=True)


CANDIDATES = [_candidate(0, "DeEh;"), _candidate(1, "DeEx;")]


@pytest.mark.parametrize(
  ("end", "verdict"),
  [
    (f"\n\n{ASK} Yes", True),
    (f"\n\n{ASK} No", False),
    (f"\n{ASK}\n\nNo", False),
    (f"\n\n**{ASK}** Yes", True),
    (f"\n\n{ASK} **No**.", False),
    (f"\n\n**Verification:** \n{ASK.removeprefix('Verification: ')} Yes", True),
    (f"\n\n{ASK} Yes\n\nQ: another problem\n{ASK} No", True),
    (f"\n\n{ASK}Yes", True),
    ("\n\n<b>Verification:</b> Is the answer correct (Yes/No)? <b>No</b>", False),
    ("\n\nVerification: Is the answer correct? (Yes/No) Yes", True),
  ],
)
def test_verdict_is_located_and_what_follows_is_cut(end, verdict):
  assert rationales.locate_verdict("2 + 2 is 4." + end) == ("2 + 2 is 4.", verdict)


@pytest.mark.parametrize(
  "text", ["", "2 + 2 is 4.", f"2.\n\n{ASK}", f"{ASK} Maybe", f"{ASK} Yesterday", f"{ASK} Nothing", f"{ASK} yes", "Yes"]
)
def test_no_verdict(text):
  assert rationales.locate_verdict(f" {text}\n") == (text, None)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=30), st.booleans(), st.text(max_size=30))
def test_text_before_the_verdict_stays(body, verdict, after):
  got = rationales.locate_verdict(f"{body}.\n\n{ASK} {'Yes' if verdict else 'No'}\n{after}")
  assert got == (f"{body}.".strip(), verdict)


def test_filter_keeps_what_agrees_and_says_why_not():
  raw = [
    _raw(0, f"fine\n{ASK} Yes"),
    _raw(0, f"wrong\n{ASK} No"),
    _raw(0, f"{ASK} Yes"),
    _raw(1, f"fine\n{ASK} No"),
    _raw(1, f"wrong\n{ASK} Yes"),
    _raw(1, "no end"),
    _raw(1, f"{ASK} Hard to say.\n{ASK} No"),
  ]
  got = rationales.from_graders(raw, CANDIDATES)
  assert [(r.text, r.verdict, r.kept, r.why_dropped) for r in got] == [
    ("fine", True, True, ""),
    ("wrong", False, False, "verdict disagrees with the label"),
    ("", True, False, "empty"),
    ("fine", False, True, ""),
    ("wrong", True, False, "verdict disagrees with the label"),
    ("no end", None, False, "no verdict"),
    (f"{ASK} Hard to say.", False, False, "asks for the verdict more than once"),
  ]
  assert rationales.ledger(got, CANDIDATES) == {
    "correct": {"all": 3, "kept": 1, "dropped: verdict disagrees with the label": 1, "dropped: empty": 1},
    "incorrect": {
      "all": 4,
      "kept": 1,
      "dropped: verdict disagrees with the label": 1,
      "dropped: no verdict": 1,
      "dropped: asks for the verdict more than once": 1,
    },
  }


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.sampled_from([f"x\n{ASK} Yes", f"x\n{ASK} No", f"{ASK} No", "x"]))))
def test_ledger_adds_up(raw):
  got = rationales.from_graders([_raw(i, text) for i, text in raw], CANDIDATES)
  table = rationales.ledger(got, CANDIDATES)
  assert sum(row.get("all", 0) for row in table.values()) == len(raw)
  assert sum(row.get("kept", 0) for row in table.values()) == sum(r.kept for r in got)
  for row in table.values():
    assert row.get("all", 0) == sum(n for name, n in row.items() if name != "all")


def test_program_writes_one_rationale_a_candidate_in_order():
  got = rationales.by_program([PROBLEM], CANDIDATES, TASK.rationale)
  assert [(r.problem_id, r.candidate_index, r.index, r.verdict, r.kept) for r in got] == [
    ("p", 0, 0, True, True),
    ("p", 1, 0, False, True),
  ]
  assert got[0].text == TASK.rationale(PROBLEM, "DeEh;")[0]
  assert got[0].source == "program"


def test_a_lying_program_is_dropped():
  got = rationales.by_program([PROBLEM], CANDIDATES, lambda problem, solution: ("all is well", True))
  assert [r.kept for r in got] == [True, False]
  assert got[1].why_dropped == "verdict disagrees with the label"
