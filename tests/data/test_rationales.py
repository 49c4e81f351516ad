"""Disagreeing and leaking rationales are dropped, ledgers add up, filters are compared, rows are as released."""

import json
import math
import zipfile
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.studies import gsm8k_rationales
from genrm_jax.data import rationales
from genrm_jax.records import Candidate, Problem, Rationale
from genrm_jax.runtime.errors import UserError
from genrm_jax.tasks.gsm8k.rows import CritiqueRow, Place, PoolRow
from genrm_jax.tasks.last_letter import LastLetter

ASK = "Verification: Is the answer correct (Yes/No)?"
TASK = LastLetter()
PROBLEM = Problem("p", "last_letter", "train", "3mike4dlih;", "eh", "DeEh;")


def _candidate(index, text):
  answer = TASK.extract_answer(text)
  return Candidate("p", index, text, answer, answer == "eh", "test")


def _raw(index, text):
  return Rationale("p", index, 0, text, None, "test", kept=True)


CANDIDATES = [_candidate(0, "DeEh;"), _candidate(1, "DeEx;")]


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
    "correct": {
      "all": 3,
      "kept": 1,
      "dropped: verdict disagrees with the label": 1,
      "dropped: empty": 1,
      "solutions": {"all": 1, "kept": 1},
      "problems": {"all": 1, "kept": 1},
      "share": {"all": 0.4286, "kept": 0.5},
      "characters": {"median": 4, "p90": 4, "max": 4},
    },
    "incorrect": {
      "all": 4,
      "kept": 1,
      "dropped: verdict disagrees with the label": 1,
      "dropped: no verdict": 1,
      "dropped: asks for the verdict more than once": 1,
      "solutions": {"all": 1, "kept": 1},
      "problems": {"all": 1, "kept": 1},
      "share": {"all": 0.5714, "kept": 0.5},
      "characters": {"median": 4, "p90": 4, "max": 4},
    },
  }


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.sampled_from([f"x\n{ASK} Yes", f"x\n{ASK} No", f"{ASK} No", "x"]))))
def test_ledger_adds_up(raw):
  got = rationales.from_graders([_raw(i, text) for i, text in raw], CANDIDATES)
  table = rationales.ledger(got, CANDIDATES)
  assert sum(row["all"] for row in table.values()) == len(raw)
  assert sum(row["kept"] for row in table.values()) == sum(r.kept for r in got)
  for row in table.values():
    assert row["all"] == row["kept"] + sum(n for name, n in row.items() if name.startswith("dropped: "))


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


def test_a_filter_replays_an_older_reading():
  raw = _raw(0, "fine\nVerification: Is the answer correct? Yes")
  kept = [rationales.Filter(name)(raw, True).kept for name in ("exact-1", "lenient-1", "lenient-2")]
  assert kept == [False, False, True]
  assert rationales.Filter() == rationales.Filter("lenient-2", drop_leaks=False)
  assert rationales.from_graders([raw], CANDIDATES, rationales.Filter("lenient-1"))[0].why_dropped == "no verdict"


def test_contradicting_verdicts_are_a_reason_of_their_own():
  got = rationales.Filter()(_raw(0, f"a\n{ASK} No\n\nanew\n{ASK} Yes"), True)
  assert (got.verdict, got.kept, got.why_dropped) == (None, False, "verdicts contradict each other")


def test_an_unknown_reading_is_refused_before_anything_is_filtered():
  with pytest.raises(UserError, match=r"'lenient-9'; there are: exact-1, lenient-1, lenient-2"):
    rationales.Filter("lenient-9")


@pytest.mark.parametrize(
  ("text", "names"),
  [
    ("This matches the Expected Answer.", True),
    ("as the expected\nanswer says", True),
    ("**Expected** **Answer:** 12", True),
    ("it follows the expected steps", True),
    ("Expected: 12", True),
    ("Expected time: 3 hours. Solution: 4 hours.", True),
    ("It is unlike the reference solution.", True),
    ("Her expected profit is $5.", False),
    ("As expected, the answer is 4.", False),
    ("An unexpected answer.", False),
  ],
)
def test_leaks_are_dropped_where_asked(text, names):
  raw = _raw(0, f"{text}\n{ASK} Yes")
  assert rationales.Filter()(raw, True).kept
  got = rationales.Filter(drop_leaks=True)(raw, True)
  assert (got.kept, got.why_dropped) == ((False, "names the reference") if names else (True, ""))


def test_a_leak_is_told_only_of_what_would_be_kept():
  got = rationales.Filter(drop_leaks=True)(_raw(0, f"The Expected Answer is 4.\n{ASK} No"), True)
  assert got.why_dropped == "verdict disagrees with the label"


def _row(problem, solution, kept, length):
  return Rationale(problem, solution, 0, "x" * length, True, "test", kept, "" if kept else "empty")


def test_ledger_counts_problems_and_solutions_once_and_by_label():
  book = rationales.Ledger()
  for r in (_row("p", 0, True, 1), _row("p", 0, True, 2), _row("p", 1, False, 9), _row("q", 0, False, 9)):
    book.add(r, True)
  for r in (_row("p", 2, True, 3), _row("q", 3, True, 4)):
    book.add(r, False)
  right, wrong = book.table().values()
  assert right["solutions"] == {"all": 3, "kept": 1}
  assert right["problems"] == {"all": 2, "kept": 1}
  assert right["share"] == {"all": 0.6667, "kept": 0.5}
  assert wrong["solutions"] == wrong["problems"] == {"all": 2, "kept": 2}
  assert book.problems_with_both() == {"all": 2, "kept": 1}


def test_an_empty_ledger_divides_by_nothing():
  assert rationales.ledger([], [])["correct"] == {
    "all": 0,
    "kept": 0,
    "solutions": {"all": 0, "kept": 0},
    "problems": {"all": 0, "kept": 0},
    "share": {"all": None, "kept": None},
    "characters": {},
  }


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1))
def test_length_statistics_are_those_of_the_sorted_lengths(lengths):
  got, ordered = rationales.length_statistics(Counter(lengths)), sorted(lengths)
  at = {name: ordered[math.ceil(part * len(ordered) / 100) - 1] for name, part in (("median", 50), ("p90", 90))}
  assert got == {**at, "max": ordered[-1]}


def test_replay_tells_where_filters_differ():
  replay = rationales.Replay(
    [rationales.Filter(), rationales.Filter("lenient-1"), rationales.Filter(drop_leaks=True)], 1
  )
  texts = [
    f"same\n\n{ASK} Yes",
    "a\nVerification: Is the answer correct? Yes",
    "b\nVerification: Is the answer correct? Yes",
    f"as the Expected Answer\n\n{ASK} Yes",
    f"**Verification:**\nheaded\n\n{ASK} Yes",
    f"**Verification:**\nheaded, but wrong\n\n{ASK} No",
  ]
  raw = [_raw(0, text) for text in texts]
  first = [replay.add(r, True)[0] for r in raw]
  assert [r.text for r in first] == ["same", "a", "b", "as the Expected Answer", "headed", "headed, but wrong"]
  assert replay.table() == {
    "lenient-1": {
      "correct": {"verdict Yes -> none": 2, "kept -> dropped": 2, "kept with another text": 1},
      "incorrect": {},
    },
    "lenient-2+drop_leaks": {"correct": {"kept -> dropped": 1}, "incorrect": {}},
  }
  [(of, before, after)] = replay.examples["lenient-1", "correct", "verdict Yes -> none"]
  assert (of, before.verdict, after.verdict) == (raw[1], True, None)
  assert {name: book.table()["correct"]["kept"] for name, book in replay.ledgers.items()} == {
    "lenient-2": 5,
    "lenient-1": 3,
    "lenient-2+drop_leaks": 4,
  }


def test_rows_are_those_of_the_released_cot_set(data_dir):
  rebuilt = 0
  for row in _released_rows(data_dir):
    inputs, targets = row["inputs"], row["targets"]
    question, _, rest = inputs.partition("\n\nQ: ")[2].partition("\nA: Let's think step by step.\n")
    solution = rest.rpartition("\nVerification: Let's verify step by step.")[0]
    raw = Rationale("p", 0, 0, targets, None, "test", True)
    correct = targets.endswith(" Yes")
    got = rationales.Filter("exact-1")(raw, correct)
    built = rationales.to_released(question, solution, got.text, correct, row["question_id"], row["model_output_id"])
    assert list(built) == list(row)
    assert built["inputs"] == inputs
    # Cut and put together again, but for the white space around the rationale and questions that it asks before.
    rebuilt += built["targets"].split() == targets.split()
  assert rebuilt >= 250


def _released_rows(data_dir):
  folder = data_dir / "genrm-critiques/critiques"
  paths = sorted(folder.glob("critiques_*_val.zip"))
  if not paths:
    pytest.skip(f"no released CoT validation files in {folder}")
  for path in paths:
    with zipfile.ZipFile(path) as archive:
      [name] = [n for n in archive.namelist() if n.endswith(".jsonl") and not n.startswith("__MACOSX")]
      for line in archive.read(name).splitlines():
        yield json.loads(line)


def test_the_pool_is_measured_beside_the_released_set(capsys):
  def row(question, solution, text, correct, line):
    return PoolRow(question, solution, line, "4", "4" if correct else "5", correct, text, 0, Place("shard", line))

  def released(question, solution, text, verdict):
    return CritiqueRow(question, solution, f"{text}\n\n{ASK} {verdict}", verdict == "Yes", Place("val", 1))

  pool = [
    row("How  many?", "four", f"**Verification:**\n\nfour\nis right\n\n**Final Grade:** {ASK} Yes", True, 1),
    row("How many?", "four", "fine\nVerification: Is the answer correct? Yes", True, 2),
    row("How many?", "five", f"as the Expected Answer\n\n{ASK} No", False, 3),
    row("How much?", "six", f"six\n\n{ASK} No", True, 4),
  ]
  known = [
    released("How many?", "four", "\nfour is right", "Yes"),
    released("How many?", "4", "another", "Yes"),
    released("Who?", "Ada", "Expected Answer: Bo", "No"),
  ]
  found, replay = gsm8k_rationales.measure(pool, known)
  assert found["rationales"] == 4
  right, wrong, both = found["ledgers"]["lenient-2"].values()
  assert (right["all"], right["kept"], right["dropped: verdict disagrees with the label"]) == (3, 2, 1)
  assert (right["solutions"], right["problems"]) == ({"all": 2, "kept": 1}, {"all": 2, "kept": 1})
  assert wrong["kept"] == 1
  assert both == {"all": 1, "kept": 1}
  assert found["ledgers"]["lenient-2+drop_leaks"]["incorrect"]["kept"] == 0
  ours, theirs, search = found["released_validation"].values()
  assert search == {
    "correct": {"rows": 2, "problem in the pool": 2, "solution in the pool": 1, "rationale in the pool": 1},
    "incorrect": {"rows": 1, "problem in the pool": 0, "solution in the pool": 0, "rationale in the pool": 0},
  }
  assert [(table["rows"], table["starts with a line break"]) for table in (ours["correct"], theirs["correct"])] == [
    (2, 0),
    (2, 0.5),
  ]
  for label, n in (("correct", 2), ("incorrect", 1)):
    assert ours[label]["rows"] == n
    assert ours[label]["ends in the verdict question and the verdict"] == 1
    assert ours[label]["verdict is the label"] == ours[label]["empty line before the question"] == 1
    assert ours[label]["heading 'Final Grade' before the question"] == 0
  assert theirs["incorrect"]["names the reference"] == ours["incorrect"]["names the reference"] == 1
  gsm8k_rationales.show(found, replay)
  printed = capsys.readouterr().out
  assert "shard:2; kept -> no verdict" in printed
  assert "verdict Yes -> none 1" in printed
