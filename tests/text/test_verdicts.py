"""Where the verdict of a rationale is read, and the states of rationales without one."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from genrm_jax.text.prompts import Prompter, make_format
from genrm_jax.text.tokenizer import CharTokenizer
from genrm_jax.text.verdicts import VerdictLocation, read_rationale

CHAR = CharTokenizer()
FORM = make_format("genrm")
ASK, ASKED = FORM.render(FORM.conclude), FORM.verdict_question  # with the empty line before it, and without
CHAR_TEXT = st.lists(
  st.sampled_from([*"abz?.(/)V ", "\n", " Yes", " No", "\n\nVerification: Is", ASKED[:-1], ASKED[1:]]), max_size=12
).map("".join)
ANY_TEXT = st.lists(
  st.characters(exclude_categories=["Cs"])
  | st.sampled_from([" Yes", "\n", "\n\n", "漢", "🙂", "▁", ASKED[:-1], ASK[:9]]),
  max_size=12,
).map("".join)


@pytest.fixture(params=["char", "sentencepiece", "chat"])
def prompter(request, trained, gemma):
  if request.param == "chat":
    return Prompter(gemma, make_format("genrm_chat"))
  return Prompter(CHAR if request.param == "char" else trained, FORM)


def _check(prompter, text, correct, n):
  question, conclude = prompter.format.verdict_question, prompter.format.render(prompter.format.conclude)
  assume(question not in text)
  # A rationale that training would supervise reads as "ok", at the verdict.
  ids = prompter.rationale(text, correct)
  for written in (ids, ids[:-1]):
    reading = read_rationale(written, prompter, room=0)
    assert reading == VerdictLocation("ok", verdict_index=len(ids) - 2)
    assert ids[reading.verdict_index] == prompter.verdict_id(correct)
  # Cut anywhere before the verdict, it is completed so that it ends with the question, posed once.
  cut = ids[:-2][:n]
  reading = read_rationale(cut, prompter, room=1000)
  assert reading.state == "forced" and reading.verdict_index is None
  completed = prompter.tokenizer.decode([*cut, *reading.suffix])
  assert completed.endswith(conclude) and completed.count(question) == 1
  if n > len(prompter.tokenizer.encode(text)) and not text.endswith("\n"):
    assert completed == text + conclude


@pytest.mark.parametrize("name", ["genrm", "compact"])
def test_what_training_writes_is_read_at_the_verdict_and_completed_where_it_is_cut(name, trained):
  with_characters, with_pieces = (Prompter(tokenizer, make_format(name)) for tokenizer in (CHAR, trained))

  @settings(max_examples=150, deadline=None)
  @given(CHAR_TEXT, ANY_TEXT, st.booleans(), st.integers(0, 60))
  def check(characters, anything, correct, n):
    for prompter, text in ((with_characters, characters), (with_pieces, anything)):
      _check(prompter, text.replace("?", "") if name == "compact" else text, correct, n)

  check()


def _read(prompter, text, room=1000):
  """Reads a text in which a final "$" is the end mark."""
  ids = prompter.tokenizer.encode(text.removesuffix("$"))
  return read_rationale([*ids, prompter.end_id] if text.endswith("$") else ids, prompter, room)


@pytest.mark.parametrize(
  ("text", "state"),
  [
    (f"1 + 1 = 2.{ASK} Yes$", "ok"),
    (f"1 + 1 = 2.{ASK} No", "ok"),
    (f"{ASKED} No$", "ok"),  # no empty line before the question
    (f"**Grade:** {ASKED} Maybe$", "ok"),  # p(Yes) stands there all the same
    (f"a{ASK}$", "ok"),
    (f"a{ASK} Yes b{ASK} Yes$", "ok"),
    (f"a{ASK} No\n{ASKED}", "ok"),  # the second one is not answered
    (f"a{ASK} Yes b{ASK} No$", "contradictory"),
    (f"a{ASK} No\n{ASKED} Yes c", "contradictory"),
    (f"a{ASK}", "forced"),
    ("1 + 1 = 2.", "forced"),
    ("", "forced"),
    ("1 + 1 = 2.$", "missing"),
    ("$", "missing"),
    (f"a{ASK[:-1]}$", "missing"),
    ("Is the answer correct (Yes/No)? Yes$", "missing"),
  ],
)
def test_states(prompter, text, state):
  reading = _read(prompter, text)
  assert reading.state == state
  assert (reading.verdict_index is not None) == (state == "ok")
  if state == "ok":
    before = text[: text.index(ASKED) + len(ASKED)]
    ids = [*prompter.tokenizer.encode(text.removesuffix("$")), prompter.end_id]
    assert prompter.tokenizer.decode(ids[: reading.verdict_index]) == before
    assert prompter.tokenizer.decode(ids[: reading.verdict_index + 1]) != before or text == before + "$"
  assert bool(reading.suffix) == (state == "forced" and ASKED not in text)


@pytest.mark.parametrize("cut", [0, 1, 2, 3, 20, len(ASK) - 1])
def test_the_suffix_is_the_rest_of_the_question(prompter, cut):
  rest = tuple(prompter.tokenizer.encode(ASK[cut:]))
  text = "1 + 1 = 2." + ASK[:cut]
  assert _read(prompter, text) == VerdictLocation("forced", suffix=rest)
  assert _read(prompter, text, room=len(rest)) == VerdictLocation("forced", suffix=rest)
  assert _read(prompter, text, room=len(rest) - 1) == VerdictLocation("truncated")
  assert _read(prompter, "1 + 1 = 2." + ASK, room=0) == VerdictLocation("forced")
  if not cut:  # the same tokens as in training
    assert [*prompter.tokenizer.encode(text), *rest] == prompter.rationale(text, True)[:-2]


def test_a_chat_ends_with_its_turn(gemma):
  chat, other = Prompter(gemma, make_format("genrm_chat")), Prompter(gemma, FORM)
  assert chat.end_id != other.end_id == gemma.eos_id
  for prompter, state in ((chat, "missing"), (other, "forced")):
    assert read_rationale([*gemma.encode("1 + 1 = 2."), chat.end_id], prompter, room=1000).state == state
