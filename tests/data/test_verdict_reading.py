"""Each version of the reader finds verdicts where graders put them, and never guesses."""

import gzip
import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrm_jax.data.verdict_reading import CONTRADICTION, NO_VERDICT, READERS, get_reader
from genrm_jax.runtime.errors import UserError

ASK = "Verification: Is the answer correct (Yes/No)?"
BODY = "2 + 2 is 4."
LENIENT = ("lenient-1", "lenient-2")


def test_unknown_readers():
  assert list(READERS) == ["exact-1", "lenient-1", "lenient-2"]
  with pytest.raises(UserError, match=r"'lenient'.* exact-1"):
    get_reader("lenient")


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(
  ("end", "verdict"), [("Yes", True), ("No", False), ("Yes.", True), ("No**", False), ("Yes\n\nQ: another\n", True)]
)
def test_every_reader_finds_the_exact_words(name, end, verdict):
  assert READERS[name](f"{BODY}\n\n{ASK} {end}") == (BODY, verdict, "")


@pytest.mark.parametrize("name", LENIENT)
@pytest.mark.parametrize(
  ("end", "verdict"),
  [
    (f"\n{ASK}\n\nNo", False),
    (f"\n\n**{ASK}** Yes", True),
    (f"\n\n{ASK} **No**.", False),
    (f"\n\n**Verification:** \n{ASK.removeprefix('Verification: ')} Yes", True),
    (f"\n\n{ASK} Yes\n\nQ: another problem\n{ASK} Yes", True),
    (f"\n\n{ASK}Yes", True),
    ("\n\n<b>Verification:</b> Is the answer correct (Yes/No)? <b>No</b>", False),
    ("\n\nVerification: Is the answer correct? (Yes/No) Yes", True),
  ],
)
def test_lenient_readers_allow_marks(name, end, verdict):
  assert READERS[name](BODY + end) == (BODY, verdict, "")
  assert READERS["exact-1"](f"{BODY}\n\n**{ASK}** Yes").verdict is None


@pytest.mark.parametrize(
  ("end", "verdict"),
  [
    ("\n\n**Verification: Is the answer correct? Yes**\n\n**Final Grade: Verification: Yes**", True),
    ("\n\nVerification: Is the answer correct?** No", False),
    ("\n\n_Verification: Is the answer correct (Yes/No)?_ **Yes**", True),
    ("\n\nVerification: Is the answer correct? Yes/No? No", False),
    ("\n\nVerification: Is the answer correct (Yes/Yes)? Yes", True),
    ("\n\n<b>Verification: Is the answer correct (<b>Yes/No</b>)?</b> <b>Yes</b>", True),
    (f"\n\n**Final Grade:** {ASK} No", False),
    (f"\n\n**Final Grade: {ASK} No**", False),
    (f"\n\n**Final Grade:**\n\n- **{ASK} No**", False),
    ("\n\n<b>Final Grade: </b>Verification: Is the answer correct (Yes/No)? <b>No</b>", False),
    (f"\n\n**Final Grade:**\n\n> {ASK} No", False),
    ("\n\n**Overall Verification:**\nIs the answer correct (Yes/No)? No", False),
  ],
)
def test_lenient_2_reads_and_cuts_more(end, verdict):
  assert READERS["lenient-2"](BODY + end) == (BODY, verdict, "")
  before = READERS["lenient-1"](BODY + end)
  assert before.verdict is None or before.text != BODY


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(
  "text",
  [
    *("", BODY, "Yes", f"{BODY}\n\n{ASK}", f"{ASK} Maybe", f"{ASK} Yesterday", f"{ASK} Nothing", f"{ASK} yes"),
    *(f"{BODY}\n\nVerification: Yes", f"{BODY}\n\nVerification: Is the answer correct (Yes"),
    *(f"{BODY}\n\n{ASK} Cannot be determined.", f"{BODY}\n\n{ASK} X, where X is either Yes or No."),
    "I wonder: Is the answer correct\nYes",
  ],
)
def test_no_verdict_is_guessed(name, text):
  assert READERS[name](f" {text}\n") == (text, None, NO_VERDICT)
  unanswered = f"{BODY}\n\nVerification: Is the answer correct? Yes/No"
  assert READERS["lenient-2"](unanswered) == (unanswered, None, NO_VERDICT)


@pytest.mark.parametrize(
  "heading", ["**Verification:**\n\n", "Verification:\n", "<b>Verification:</b>\n", "# Verification\n"]
)
def test_the_opening_heading_is_cut_where_it_stands_alone(heading):
  read = READERS["lenient-2"]
  assert read(f"{heading}Step 1: 4 is 4.\n\n{ASK} Yes").text == "Step 1: 4 is 4."
  assert READERS["lenient-1"](f"{heading}Step 1: 4 is 4.\n\n{ASK} Yes").text == f"{heading}Step 1: 4 is 4."
  for other in ("**Solution Verification:**\n\nStep 1", "Verification: all is well"):
    assert read(f"{other}\n\n{ASK} Yes").text == other
  for last in ("**Correct.**", "<b>Correct</b>", "**Expected Answer:** 12", "(Correct)"):
    assert read(f"{last}\n\n**{ASK} Yes**").text == last


def test_the_verdict_of_a_step_is_not_the_answers():
  steps = f"Step 1: 2 + 2 = 4\n**{ASK} Yes**\n\nStep 2: 4 + 4 = 9\n**{ASK} No**\n\nStep 3: so 9"
  text = f"{steps}\n\n**Final Grade:** {ASK} No"
  assert READERS["lenient-2"](text) == (steps, False, "")
  assert READERS["lenient-2"](steps) == (steps, None, NO_VERDICT)
  numbered = text.replace("Step ", "").replace(": ", ". ", 1)
  assert READERS["lenient-2"](numbered).verdict is False
  assert READERS["lenient-1"](text).verdict is True  # the old version takes the first


def test_a_solution_begun_anew_does_not_continue_the_steps():
  text = f"Step 1: 4\n\nStep 2: 9\n\n{ASK} No\n\nCorrect solution:\nStep 1: 4\nStep 2: 8"
  assert READERS["lenient-2"](text) == ("Step 1: 4\n\nStep 2: 9", False, "")
  for after in ("Step 4: as it should be", "Step 2: 8", "Step 1: 4"):
    assert READERS["lenient-2"](f"Step 1: 4\n\nStep 2: 9\n\n{ASK} No\n\n{after}").verdict is False
  assert READERS["lenient-2"](f"{BODY}\n\n{ASK} No\n\nStep 2: 9\n\nStep 1: 4").verdict is False
  # Verdicts that contradict each other.
  text = f"Step 1: 9\n\n{ASK} No\n\nCorrected solution:\nStep 1: 8\n\n{ASK} Yes"
  assert READERS["lenient-2"](text) == (text, None, CONTRADICTION)
  assert READERS["lenient-1"](text).verdict is False


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(READERS)), st.text(max_size=30), st.booleans())
def test_text_before_the_verdict_stays(name, body, verdict):
  got = READERS[name](f"{body}.\n\n{ASK} {'Yes' if verdict else 'No'}")
  assert got == (f"{body}.".strip(), verdict, "")


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(
  "piece",
  ["\n", "*", "<b>", "<_>", "Is the answer correct ", "Is the answer correct? ", "1.", "\n1. ", "- ", f"\n1. {ASK} No"],
)
def test_hostile_texts_take_linear_time(name, piece):
  start = time.process_time()
  for text in (piece * 20_000, f"{piece * 20_000}{ASK} Yes", f"Is the answer correct?{piece * 20_000}Yes"):
    READERS[name](text)
  assert time.process_time() - start < 5


def test_shares_of_the_released_pool(data_dir):
  folder = data_dir / "genrm-critiques/critiques/data_collection"
  least = {"correct": (0.76, 0.955, 0.97), "incorrect": (0.60, 0.91, 0.925)}
  for label, bounds in least.items():
    path = folder / f"critique_gen_{label}_solutions_round_0_shard_0.jsonl.gz"
    if not path.exists():
      pytest.skip(f"no raw pool: {path}")
    with gzip.open(path) as lines:
      texts = [json.loads(line)["verifier_output"] for line, _ in zip(lines, range(3000), strict=False)]
    shares = [sum(read(t).verdict is not None for t in texts) / len(texts) for read in READERS.values()]
    assert sorted(shares) == shares
    for share, bound in zip(shares, bounds, strict=True):
      assert bound - 0.02 < share < bound + 0.035
