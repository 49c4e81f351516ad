"""Filters drop rationales that disagree or leak; each reader finds verdicts where graders put them, or none."""

import dataclasses
import gzip
import itertools
import json
import time
from functools import partial

import pytest
from refusals import refused

from genrm_jax.data import grading, rationales
from genrm_jax.data.verdict_reading import CONTRADICTION, NO_VERDICT, READERS, get_reader
from genrm_jax.records import Candidate, Problem, Rationale
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
    "majority": {"solutions": 1, "kept": 1},  # two of three verdicts are Yes, of which one has no text
    **{"share": {"all": 0.375, "kept": 0.5}, "characters": {"median": 4, "p90": 4, "max": 4}},
  }
  assert wrong["majority"] == {"solutions": 0, "kept": 0}, "two of five"
  assert wrong["dropped: no verdict"] == 1 and wrong["share"] == {"all": 0.625, "kept": 0.5}
  assert rationales.Ledger().table()["correct"]["share"] == {"all": None, "kept": None}
  keeps, drops = rationales.Filter(), rationales.Filter(drop_leaks=True)
  leaks = (
    *("This matches the Expected Answer.", "as the expected\nanswer says", "Expected: 12", "the expected steps"),
    *("**Expected** **Answer:** 12", "Expected time: 3 hours.", "It is unlike the reference solution."),
  )
  for text in (*leaks, "Her expected profit is $5.", "As expected, it is 4.", "An unexpected answer."):
    raw = _raw(0, f"{text}\n{ASK} Yes")
    assert keeps(raw, True).kept
    assert drops(raw, True).why_dropped == ("names the reference" if text in leaks else "")
    assert drops(raw, False).why_dropped == "verdict disagrees with the label"


def test_rationales_of_a_program_and_of_sampled_texts():
  walk = LastLetter().rationale
  got = rationales.by_program([PROBLEM], CANDIDATES, walk)
  found = [(r.candidate_index, r.index, r.text, r.verdict, r.kept, r.source) for r in got]
  assert found == [(c.index, 0, *walk(PROBLEM, c.text), True, "program") for c in CANDIDATES]
  lies = rationales.by_program([PROBLEM], CANDIDATES, lambda problem, solution: ("all is well", True))
  assert [r.why_dropped for r in lies] == ["", "verdict disagrees with the label"]
  graded, ask = [POOL[0], POOL[4], POOL[0]], RELEASED.render(RELEASED.conclude)
  texts = [f"fine{ask} Yes", f"wrong{ask} No", "breaks off"]
  got = rationales.from_graders(grading.as_rationales(graded, texts, "run/400", "reference"), POOL)
  assert [(r.candidate_index, r.index, r.text, r.why_dropped, r.source) for r in got] == [
    (index, at, text, why, "run/400/reference")
    for index, at, text, why in ((0, 0, "fine", ""), (4, 0, "wrong", ""), (0, 1, "breaks off", "no verdict"))
  ]
  refused(("way of grading 'both'", grading.as_rationales, graded, ["", "", ""], "run/400", "both"))


def test_rows_match_the_released_cot_set(data_dir):
  rebuilt = 0
  for question, solution, targets, correct, _ in iter_critiques(data_dir, "val", BadRows()):
    raw = Rationale("p", 0, 0, targets, None, "test", True)
    got = rationales.Filter("exact-1")(raw, correct)
    built = rationales.to_released(question, solution, got.text, correct, 3, 5)
    prompt = RELEASED.render(RELEASED.solve, question=question) + solution + RELEASED.render(RELEASED.verify_cot)
    assert built["inputs"] == prompt  # which test_prompts.py compares with the release
    # Identical but for white space around the rationale, and where the rationale poses the question before.
    rebuilt += built["targets"].split() == targets.split()
  assert rebuilt >= 250


def _candidate(index, text, correct=True, problem="p"):
  return Candidate(problem, index, text, "4", correct, "test")


POOL = [_candidate(0, "a"), _candidate(1, "b"), _candidate(2, "c"), _candidate(3, "a"), _candidate(4, "no", False)]


def test_references_are_other_correct_solutions_or_the_problems_own():
  drawn = [grading.choose_references(POOL, "own", seed=1, draw=draw) for draw in range(20)]
  for chosen in drawn:
    assert all(reference in {"a", "b", "c"} - {c.text} for c, reference in zip(POOL, chosen, strict=True))
  assert {chosen[4] for chosen in drawn} == {"a", "b", "c"}
  many = [_candidate(i, f"solution {i}") for i in range(40)]
  chosen = grading.choose_references(many, "own", seed=3)
  assert grading.choose_references(many[::-1], "own", seed=3) == chosen[::-1] and len(set(chosen)) > 15
  others = [dataclasses.replace(c, problem_id="q") for c in many]
  for pool, seed, draw in ((many, 4, 0), (many, 3, 1), (others, 3, 0)):
    other = grading.choose_references(pool, "own", seed=seed, draw=draw)
    assert sum(a != b for a, b in zip(chosen, other, strict=True)) > 20
  alone = [_candidate(0, "a"), _candidate(1, "a"), _candidate(2, "no", False)]
  assert grading.choose_references(alone, "own", seed=0) == ["own", "own", "a"]
  refused(("no reference solution for candidate 0 of p", partial(grading.choose_references, alone, "", seed=0)))


BODY = "2 + 2 is 4."
MARKS = [  # beside or within the question
  (f"\n{ASK}\n\nNo", False),
  (f"\n\n**{ASK}** Yes", True),
  (f"\n\n{ASK} **No**.", False),
  (f"\n\n**Verification:** \n{ASK.removeprefix('Verification: ')} Yes", True),
  (f"\n\n{ASK} Yes\n\nQ: another problem\n{ASK} Yes", True),
  (f"\n\n{ASK}Yes", True),
  ("\n\n<b>Verification:</b> Is the answer correct (Yes/No)? <b>No</b>", False),
  ("\n\nVerification: Is the answer correct? (Yes/No) Yes", True),
]
HEADINGS = [  # and other forms of the question
  *((f"\n\n**Final Grade:**{end} No", False) for end in (f" {ASK}", f"\n\n- **{ASK}", f"\n\n> {ASK}")),
  (f"\n\n**Final Grade: {ASK} No**", False),
  ("\n\n<b>Final Grade: </b>Verification: Is the answer correct (Yes/No)? <b>No</b>", False),
  ("\n\n**Overall Verification:**\nIs the answer correct (Yes/No)? No", False),
  ("\n\nVerification: Is the answer correct?** No", False),
  ("\n\nVerification: Is the answer correct? Yes/No? No", False),
  ("\n\nVerification: Is the answer correct (Yes/Yes)? Yes", True),
  ("\n\n**Verification: Is the answer correct? Yes**\n\n**Final Grade: Verification: Yes**", True),
  ("\n\n_Verification: Is the answer correct (Yes/No)?_ **Yes**", True),
  ("\n\n<b>Verification: Is the answer correct (<b>Yes/No</b>)?</b> <b>Yes</b>", True),
]


def test_each_reader_finds_verdicts_where_graders_put_them():
  for names, end, verdict in (
    *((list(READERS), f"\n\n{ASK} {end}", True) for end in ("Yes", "Yes.", "Yes\n\nQ: another\n")),
    *((list(READERS), f"\n\n{ASK} {end}", False) for end in ("No", "No**")),
    *((["lenient-1", "lenient-2"], *case) for case in MARKS),
    *((["lenient-2"], *case) for case in HEADINGS),
  ):
    for name in names:
      assert READERS[name](BODY + end) == (BODY, verdict, "")
    if names == ["lenient-2"]:
      assert READERS["lenient-1"](BODY + end).verdict is None or READERS["lenient-1"](BODY + end).text != BODY
  assert READERS["exact-1"](f"{BODY}\n\n**{ASK}** Yes").verdict is None
  refused((r"'lenient'.* exact-1", get_reader, "lenient"))


@pytest.mark.parametrize("name", READERS)
def test_no_verdict_is_guessed(name):
  for text in (
    *("", BODY, "Yes", f"{BODY}\n\n{ASK}", f"{ASK} Maybe", f"{ASK} Yesterday", f"{ASK} Nothing", f"{ASK} yes"),
    *(f"{BODY}\n\nVerification: Yes", f"{BODY}\n\nVerification: Is the answer correct (Yes"),
    *(f"{BODY}\n\n{ASK} Cannot be determined.", f"{BODY}\n\n{ASK} X, where X is either Yes or No."),
    "I wonder: Is the answer correct\nYes",
  ):
    assert READERS[name](f" {text}\n") == (text, None, NO_VERDICT)
  unanswered = f"{BODY}\n\nVerification: Is the answer correct? Yes/No"
  assert READERS["lenient-2"](unanswered) == (unanswered, None, NO_VERDICT)


def test_the_opening_heading_is_cut_where_it_stands_alone():
  read, old = READERS["lenient-2"], READERS["lenient-1"]
  for heading in ("**Verification:**\n\n", "Verification:\n", "<b>Verification:</b>\n", "# Verification\n"):
    text = f"{heading}Step 1: 4 is 4."
    assert read(f"{text}\n\n{ASK} Yes").text == "Step 1: 4 is 4." and old(f"{text}\n\n{ASK} Yes").text == text
  for other in ("**Solution Verification:**\n\nStep 1", "Verification: all is well"):
    assert read(f"{other}\n\n{ASK} Yes").text == other
  for last in ("**Correct.**", "<b>Correct</b>", "**Expected Answer:** 12", "(Correct)"):
    assert read(f"{last}\n\n**{ASK} Yes**").text == last
  read, old = READERS["lenient-2"], READERS["lenient-1"]  # the old version takes the first
  steps = f"Step 1: 2 + 2 = 4\n**{ASK} Yes**\n\nStep 2: 4 + 4 = 9\n**{ASK} No**\n\nStep 3: so 9"
  text = f"{steps}\n\n**Final Grade:** {ASK} No"
  assert read(text) == (steps, False, "") and old(text).verdict is True
  assert read(steps) == (steps, None, NO_VERDICT)
  assert read(text.replace("Step ", "").replace(": ", ". ", 1)).verdict is False
  # A solution begun anew does not continue the steps.
  body = f"Step 1: 4\n\nStep 2: 9\n\n{ASK} No\n\n"
  assert read(f"{body}Correct solution:\nStep 1: 4\nStep 2: 8") == ("Step 1: 4\n\nStep 2: 9", False, "")
  for after in ("Step 4: as it should be", "Step 2: 8", "Step 1: 4"):
    assert read(body + after).verdict is False
  assert read(f"{BODY}\n\n{ASK} No\n\nStep 2: 9\n\nStep 1: 4").verdict is False
  # Verdicts that contradict each other.
  text = f"Step 1: 9\n\n{ASK} No\n\nCorrected solution:\nStep 1: 8\n\n{ASK} Yes"
  assert read(text) == (text, None, CONTRADICTION) and old(text).verdict is False


@pytest.mark.parametrize("name", READERS)
def test_hostile_texts_take_linear_time(name):
  start = time.process_time()
  for piece in (
    *("\n", "*", "<b>", "<_>", "Is the answer correct ", "Is the answer correct? "),
    *("1.", "\n1. ", "- ", f"\n1. {ASK} No"),
  ):
    for text in (piece * 20_000, f"{piece * 20_000}{ASK} Yes", f"Is the answer correct?{piece * 20_000}Yes"):
      READERS[name](text)
  assert time.process_time() - start < 20


def test_shares_of_the_released_pool(data_dir):
  folder = data_dir / "genrm-critiques/critiques/data_collection"
  least = {"correct": (0.76, 0.955, 0.97), "incorrect": (0.60, 0.91, 0.925)}
  for label, bounds in least.items():
    path = folder / f"critique_gen_{label}_solutions_round_0_shard_0.jsonl.gz"
    if not path.exists():
      pytest.skip(f"no raw pool: {path}")
    with gzip.open(path) as lines:
      texts = [json.loads(line)["verifier_output"] for line in itertools.islice(lines, 3000)]
    shares = [sum(read(t).verdict is not None for t in texts) / len(texts) for read in READERS.values()]
    assert sorted(shares) == shares
    for share, bound in zip(shares, bounds, strict=True):
      assert bound - 0.02 < share < bound + 0.035
