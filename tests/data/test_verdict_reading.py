"""Each version of the reader finds verdicts where graders put them, and never guesses."""

import gzip
import itertools
import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrm_jax.data.verdict_reading import CONTRADICTION, NO_VERDICT, READERS, get_reader
from genrm_jax.runtime.errors import UserError

ASK = "Verification: Is the answer correct (Yes/No)?"
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
]


@pytest.mark.parametrize(
  ("names", "end", "verdict"),
  [
    *((list(READERS), f"\n\n{ASK} {end}", True) for end in ("Yes", "Yes.", "Yes\n\nQ: another\n")),
    *((list(READERS), f"\n\n{ASK} {end}", False) for end in ("No", "No**")),
    *((["lenient-1", "lenient-2"], *case) for case in MARKS),
    *((["lenient-2"], *case) for case in HEADINGS),
  ],
)
def test_each_reader_finds_verdicts_where_graders_put_them(names, end, verdict):
  for name, read in READERS.items():
    if name in names:
      assert read(BODY + end) == (BODY, verdict, "")
    elif name == "lenient-1":
      assert read(BODY + end).verdict is None or read(BODY + end).text != BODY
  assert READERS["exact-1"](f"{BODY}\n\n**{ASK}** Yes").verdict is None
  with pytest.raises(UserError, match=r"'lenient'.* exact-1"):
    get_reader("lenient")


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


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(READERS)), st.text(max_size=30), st.booleans())
def test_text_before_the_verdict_stays(name, body, verdict):
  got = READERS[name](f"{body}.\n\n{ASK} {'Yes' if verdict else 'No'}")
  assert got == (f"{body}.".strip(), verdict, "")


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
