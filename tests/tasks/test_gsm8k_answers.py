"""Answers are extracted and normalised in bounded work, whatever the text; false equations are found."""

import fractions
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrm_jax.tasks.gsm8k import answers
from genrm_jax.tasks.gsm8k.answers import extract_answer, normalise_answer, same_answer
from genrm_jax.tasks.gsm8k.arithmetic import false_equations, plant_slip

# A text with one number becomes that number; any other stays text.
NORMAL_FORMS = r"""
  72 -> 72 | 72 miles per hour -> 72 | **72**. -> 72 | 1,000,000 -> 1000000 | 16,80,000 -> 1680000 | 007 -> 7
  -0 -> 0 | 0.10 -> 0.1 | .5 -> 0.5 | $-80 -> -80 | -$80.00 -> -80 | −5 -> -5 | negative 5 -> -5 | a loss of -5 -> -5
  50% -> 50 | 50 percent -> 50 | 12.5 % -> 12.5 | 9 dollars -> 9 | <b>$9</b> -> 9 | 4 + 5 = 9 -> 9 | x = 9 -> 9
  Brad, by 9 books -> 9 | 5kg -> 5 | 5:00 p.m. -> 5 | 5:00pm -> 5 | $\boxed{1{,}440}$ -> 1440 | \boxed{14400} -> 14400
  \(20 + 46 = 66\) -> 66 | \frac{1}{4} -> 0.25 | 7/2 -> 3.5 | 3 1/2 -> 3.5 | 3 and 1/2 cups -> 3.5 | 4 / 6 -> 2/3
  -1/3 -> -1/3 | 10/5 -> 2 | 2 (rounded down to the nearest whole number) -> 2 | two times -> 2
  14 + 15 = 29 ounces -> 29 | 100% - 25% = 75% -> 75 | 90 thousand -> 90000 | $1.5 million -> 1500000
  40. Therefore, Greg travels 41 miles in 3 hours -> 40 | approximately 9.9 -> 9.9 | $115, $115, $115 -> 115
  €20 -> 20 | 6.5... -> 6.5 | 325 000 cars -> 325000 | 1 325 000. -> 1325000 | 2 & 2/3 -> 8/3 | \frac56 -> 5/6
  $144K -> 144000 | $144000 or $144K -> 144000 | 10c. -> 10 | four. -> 4
  4 inches because 3.998 is rounded up to 4 -> 4 | 12 students don’t know -> 12
  -$35, which means he is $35 short -> -35 | 14 kg (60 - 46) -> 14 | 8 (since he can't buy half a can) cans -> 8
  negative €55 -> -55 | 12 500/3 -> 536/3 | $115, $110, $115 -> 115, 110, 115
  Total cookies – 11 -> total cookies - 11 | 2c - 8 -> 2c - 8 | one half -> one half | no one -> no one
  1, 200 -> 1, 200 | 5 hours and 17 minutes -> 5 hours and 17 minutes | 14 or 15 -> 14 or 15 | 4x + 24 -> 4x + 24
  9x -> 9x | 7:08 PM -> 7:08 pm | 2 and a half -> 2 and a half | 2^10 -> 2^10 | 1/0 -> 1/0
  64 divided by 3 -> 64 divided by 3 | Cannot be   determined. -> cannot be determined
"""


@pytest.mark.parametrize(
  ("text", "answer"),
  [
    *(case.strip().split(" -> ") for case in re.split(r"[|\n]", NORMAL_FORMS.strip())),
    *[("  $1,234.50. ", "1234.5"), ("", ""), (" . ", "")],
    (f"1/{2**150}", f"0.{5**150:0150}"),
  ],
)
def test_normalise(text, answer):
  assert normalise_answer(text) == answer


@given(
  st.integers(-(10**15), 10**15),
  st.sampled_from(["{:d}", "${:,d}", "{:,d}.00", "{:d} miles.", "**{:,d}%**"]),
  st.decimals(-(10**9), 10**9, places=4),
  st.fractions(max_denominator=10**6),
)
def test_numbers_are_exact(integer, form, decimal, fraction):
  assert normalise_answer(form.format(integer)) == str(integer)
  shown = normalise_answer(f"${decimal:,}")
  assert fractions.Fraction(shown) == fractions.Fraction(decimal)
  assert same_answer(shown, f"{decimal}") and not same_answer(shown, f"{decimal + 1}")
  assert fractions.Fraction(normalise_answer(f"{fraction.numerator} / {fraction.denominator}")) == fraction


PARTS = [
  *"07.,/-–=$%*_^+:;(){}&<>'xkc\\ \nŉİ",
  *("12", "345", "1,000", "\\frac", "\\frac{1}{2}", "<b>", "</b>", "two", "half", "a.m.", "5:00", " million"),
  *(" and ", " because ", ", which ", "negative "),
]


@settings(max_examples=300, deadline=None)
@given(
  st.text()
  | st.lists(st.sampled_from(PARTS), max_size=12).map("".join)
  | st.from_regex(r"\A[-$]?[0-9 ,./]{0,12} ?[a-z %]{0,8}")
)
def test_any_text(text):
  once = normalise_answer(text)
  assert same_answer(text, text) == (once != "")
  assert extract_answer(text) is None or extract_answer(text) != ""
  assert normalise_answer(once) == once


N = 2_000_000
HUGE = {
  **{"digits": "9" * N, "a fraction": "1/" + "3" * N, "a decimal": "0." + "1" * N, "an exponent": "1e999999999"},
  **{"numbers": "9 " * N, "signs": "-" * N + "1", "thousands": "1,000" * N, "spaced thousands": "1 000" * N},
  **{"parentheses": "1 (" * N, "nested LaTeX": "\\frac{" * N + "1" + "}{2}" * N, "braces": "{" * N + "7" + "}" * N},
  **{"tags in tags": "<b" * N + ">" * N, "spaces": " " * N + "1", "letters that grow when folded": "ŉ" * N},
}


@pytest.mark.parametrize("text", HUGE.values(), ids=HUGE)
def test_the_work_for_an_answer_is_bounded(text, monkeypatch):
  looked_at, folded = [], answers._plain

  def plain(part):
    looked_at.append(len(part))
    return folded(part)

  monkeypatch.setattr(answers, "_plain", plain)
  limit = answers.MAX_ANSWER_CHARACTERS
  assert len(normalise_answer(text)) <= limit
  assert max(looked_at, default=0) <= limit and len(looked_at) <= limit
  is_out_of_reach = len(text) > answers.MAX_SOLUTION_CHARACTERS
  assert extract_answer(f"The answer is {text}") == (None if is_out_of_reach else normalise_answer(text))
  # What comes after makes no difference.
  assert normalise_answer(text) == normalise_answer(text[: limit + 1])


def test_only_the_end_and_whole_words_are_read():
  filling = "x" * answers.MAX_SOLUTION_CHARACTERS
  assert extract_answer("The answer is 7. " + filling) is None
  assert extract_answer(filling + " The answer is 7.") == extract_answer("The answer is 7. " + filling[30:]) == "7"
  words = "a" * (answers.MAX_ANSWER_CHARACTERS - 4)
  assert normalise_answer(f"{words} 12") == "12"
  assert normalise_answer(f"{words} 12345") == words, "half a number is not read"


FINAL_ANSWERS = r"""
  So 2 + 2 = 4. The answer is 4. -> 4 | The answer is 5. Wait. The answer is $1,004.00. -> 1004 | The answer is33. -> 33
  Thus the final answer is: **12** -> 12 | The answer is unknown. -> unknown | 48/2 = 24 @#### 24 -> 24
  The answer is @7 -> 7 | The answer is 300.@Final Answer: 301 -> 300 | #### 1@#### 1,200 -> 1200
  #### 1@The answer is 2. #### 3 -> 2 | The answer isn't known. #### 3 -> 3
"""  # "@" is a line break


def test_extract():
  for case in re.split(r"[|\n]", FINAL_ANSWERS.strip()):
    text, answer = case.strip().split(" -> ")
    assert extract_answer(text.replace("@", "\n")) == answer, text
  assert [extract_answer(text) for text in ("The answer is .", "####", "no answer here, 42", "")] == [None] * 4
  assert not any(same_answer(a, b) for a, b in [(None, None), (None, "1"), ("1", None), ("", ""), ("1", "2")])


@pytest.mark.parametrize(
  ("text", "found"),
  [
    ("So 48 / 2 = 24 and 48 + 24 = 62.", ["48 + 24 = 62"]),
    ("They pay $10 * 3 = $60.", ["$10 * 3 = $60"]),
    ("In total 1,200 / 3 - 100 = 200 eggs", ["1,200 / 3 - 100 = 200"]),
    *((f"and {text}", [text]) for text in ("14 + 3 = 18", "12 - 15 = 3", "0.1 + 0.2 = 0.4", "1 / 2 * 6 x 2 = 7")),
    *(("- 4 * 3 = 13", ["4 * 3 = 13"]), ("x = 40 + 50 = 80", ["40 + 50 = 80"]), ("2 × 3 = 8", ["2 × 3 = 8"])),
    ("48 / 2 = 24, 48 + 24 = 72", []),
    ("10 / 3 = 3.33 and 10 / 3 = 3 and 20 / 3 = 7", []),  # rounded to what is shown, down or up
    ("2 * (3 + 4) = 15, (1 + 2) * 3 + 4 = 15", []),  # brackets are not judged
    ("3 * 2 = 4 + 2 = 6", []),  # a right side that goes on
    ("20% of 50 * 2 = 20, half of 4 + 2 = 4, 6 multiplied by 2 + 1 = 18", []),  # the front is in words
    ("3/4 = 75%, 3 / 4 = 75 percent, 7 / 2 = 3 remainder 1, 1.5 + 1 = 250 cents", []),
    ("5 - 2x = 3, y + 3 = 9, 2^3 * 2 = 16, 5 / 0 = 0, 12 = 13", []),
  ],
)
def test_false_equations_are_found_and_nothing_else(text, found):
  assert false_equations(text) == found


def test_a_planted_slip_is_carried_on_and_found():
  text = "He has 6 * 5 = 30 apples and eats 4, so 30 - 4 = 26 are left. He sells 26.\nThe answer is 26."
  for seed in range(20):
    slipped = plant_slip(text, random.Random(seed))
    assert slipped is not None
    (equation,) = false_equations(slipped)
    said = equation.rpartition(" ")[2]
    assert equation.startswith("30 - 4 = ") and len(said) == 2
    assert slipped == text.replace("26", said)
  for text in ("The answer is 5.", "2 + 2 = 5", "2 + 3 = 5 * 2 = 10", "3 / 0 = 3"):
    assert plant_slip(text, random.Random(0)) is None
  slipped = plant_slip("1 + 1 = 2 of 20, 2.5, 12, 1,2 and 2", random.Random(0))
  assert slipped == f"1 + 1 = {slipped[8]} of 20, 2.5, 12, 1,2 and {slipped[8]}"
