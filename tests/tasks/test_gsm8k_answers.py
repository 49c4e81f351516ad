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

# A text that states one number becomes that number.
NUMBERS = {
  "72": r"""72 | 72 miles per hour | **72**. | $72 | 72% | <b>$72</b> | 4 + 68 = 72 | x = 72 | Brad, by 72 books
    (72) | +72 | +$72 | 72 (rounded down to the nearest whole number)
    72. Therefore, Greg travels 41 miles in 3 hours | about 72 | 72$ | $72, $72, $72 | $72 or 72 dollars
    \(20 + 52 = 72\) | seventy-two | 72 percent | 72 % | 72.00 | 072 | 72kg | ７２ | ٧٢
    72 inches because 71.998 is rounded up to 72 | 72 students don’t know | 72 (since he can't buy half a can) cans
    7\u200b2 | 72 kg (100 - 28) | 72 - that is all | 72: that is all | seventy two (72) | ७२。 | $$72$$
    \text{72 eggs} | $\$72$ | 72... | \emph{72} | 72\% | that one of them has 72 | the first two days is 72
    a change of +72 | US$72 | that 72 2-inch squares fit
  """,
  "18": r"""18 T-shirts | 18 °F | 18°C | 18 F | 18 degrees C | 18℃ | 18^\circ | 90/5 | 18 e-books | 18 x-rays
    18 half-gallons | 18 m^2 | 18m² | $18\text{ m}^{2}$ | 18 cm3 | 18 m/s^2 | 18 J | 18 V | 18W | 18 N. | 18L
    18 km/h | 18 U.S. dollars | 18 24-packs | 18 M&Ms | 18 100-watt bulbs | 18 100-dollar bills | 18 500 ml bottles
    18 light-years | eighteen | A$18 | C$18 | HK$18 | USD18 | 18USD | EUR 18 | Rs.18 | Rs. 18 | ₹18 | 18€ | 18:00""",
  "-5": r"""-5 | −5 | －5 | ‑5 | –5 | -$5 | $-5 | −US$5 | minus 5 degrees | minus five | negative 5 | -€5
    negative €5 | - 5 | -10/2 | a loss of -5 | a change of minus 5 | -5, which means he is $5 short
    -5 (negative five)""",
  "3.5": r"""3½ hours | 3 ½ | 7/2 | 3 1/2 | 3 and 1/2 cups | 3 and a half | three and a half hours | 3 and half feet
    \frac72 | ٣٫٥""",
  "0.5": r"½ | .5 | \frac{1}{2} | half | one half | half an hour | one-half | ⁵⁄₁₀ | 5 tenths",
  "8/3": r"2 & 2/3 | 2⅔ | 2 and two-thirds hours | 8 / 3 | eight thirds | 16/6",
  "-1/3": "-1/3 | -⅓ | minus one third",
  "0": "-0 | zero | zero dollars since he has used the entire budget",
  "100": "one hundred | a hundred | 100¢ | one hundred dollars | 100c.",
  "2000": "two thousand | 2k | 2K | 2 thousand | twenty hundred | $2 thousand",
  "2000000": r"""two million | 2M | 2 mil | $2m | $2 million | 2,000,000 | 2 000 000 | $2000K or $2M | 20 lakh
    4/2 million""",
  "1.5": "1 1/2 | one and a half | 1 and a half",
  "48": "4 dozen | four dozen eggs | forty-eight | 48 eggs",
  "6": "half a dozen | six. | two times 3 = 6",
  "125000": "125 000 cars | one hundred and twenty-five thousand | 1,25,000 | 125 thousand | 1.25 lakh",
  "1234567": r"""one million, two hundred thirty-four thousand five hundred and sixty-seven | 12,34,567
    1 234 567 km driven""",
  "3500000000": "$3.5bn | 3.5 billion | $3.5B | three and a half billion",
  "536/3": "12 500/3",
}
# Any other text stays text: an operation, a variable, a ratio, several quantities, what may be read in two ways.
TEXTS = r"""
  5 hours and 17 minutes | five hours and 17 minutes | 2 hours and ten minutes | 14 or 15 | 5 to 10 | 5-10 | 1, 200
  5 and six | 4x + 24 | 9x | 2c - 8 | total cookies - 11 | 2 - m / 2 | 5 + 3 | 5 * 3 | 5 plus tax | 10 minus 5 | 30-x
  24n cans | 2^10 | 5-5 | 5:5 | 10 squared | √16 | sqrt(16) | \sqrt 16 | 3\pi | 3 pi | twice 5 | half of 12
  3/4 of a million | 40% of a dozen | 5 x^2 | 1/0 | 1/2/3 | 3.5/2 | 1.234,50 | 12,5 | 1'234 | 1 234,56 | 1e5 | 101_2
  1h30 | 7:08 pm | 3:2 | ±5 | —5 | 5 below zero | 5万 | hundreds | a few hundred | one fifty | nineteen eighty-four
  three quarters | 8 quarters of an hour | a million and a half | 64 divided by 3 | no one | one of them | one or two
  58 and third | 2 b | 五 | choices f (450) and g (470) | 3 500 ml water
"""
FOLDED = {
  "Cannot be   determined.": "cannot be determined",
  "2 $100 bills": "2, 100 bills",
  "10²": "10^2",
  "2**10": "2^10",
}


def _split(cases):
  return [case for part in re.split(r"[|\n]", cases) if (case := part.strip())]


def test_normal_forms():
  forms = {text: number for number, texts in NUMBERS.items() for text in _split(texts)}
  expected = forms | {text: text for text in _split(TEXTS)} | FOLDED | {"  $1,234.50. ": "1234.5", "": "", " . ": ""}
  expected[f"1/{2**150}"] = f"0.{5**150:0150}"
  assert {text: normalise_answer(text.replace("\\u200b", "\u200b")) for text in expected} == expected


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
  *(" and ", " because ", ", which ", "negative ", "½", "²", "₂", "⁄", "minus ", "¤", "$1", "dozen", " hundred", "ten"),
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
  looked_at, plain = [], answers.plain

  def count(part):
    looked_at.append(len(part))
    return plain(part)

  monkeypatch.setattr(answers, "plain", count)
  limit = answers.MAX_ANSWER_CHARACTERS
  assert len(normalise_answer(text)) <= limit
  assert max(looked_at, default=0) <= limit and len(looked_at) <= limit
  is_out_of_reach = len(text) > answers.MAX_SOLUTION_CHARACTERS
  assert extract_answer(f"The answer is {text}") == (None if is_out_of_reach else normalise_answer(text))
  # What comes after makes no difference.
  assert normalise_answer(text) == normalise_answer(text[: limit + 1])


FINAL_ANSWERS = r"""
  So 2 + 2 = 4. The answer is 4. -> 4 | The answer is 5. Wait. The answer is $1,004.00. -> 1004
  The answer is33. -> 33 | Thus the final answer is: **12** -> 12 | The answer is unknown. -> unknown
  48/2 = 24 @#### 24 -> 24 | The answer is @7 -> 7 | The answer is 300.@Final Answer: 301 -> 300
  #### 1@#### 1,200 -> 1200 | #### 1@The answer is 2. #### 3 -> 2 | The answer isn't known. #### 3 -> 3
  The **answer** is 4 -> 4 | The answer is@$$@18@$$ -> 18 | The answer is:@@\[@\boxed{18}@\] -> 18
  The answer is@```@18@``` -> 18 | The answer is@<b>@18@</b> -> 18
  The answer is@\begin{align*}@x = 18@\end{align*} -> 18 | The answer is:@@- 18 eggs -> 18 | The answer is:@-18 -> -18
  So \boxed{7}. -> 7 | \boxed{3}, no: $\boxed{\frac{1}{2}}$ -> 0.5 | \[\boxed{@18@}\] -> 18
  \boxed{5} The answer is 6 -> 6 | The answer is 5. Wait: \boxed{6} -> 6
  The answer is \boxed{18} million -> 18000000 | $\boxed 5$ -> 5 | The answer is below.@#### 18 -> 18
  The answer is as follows. \boxed{18} -> 18 | #### Step 2@So \boxed{9} eggs. -> 9
  #### 5@The answer is unknown -> unknown | 3 + 4 = 7@**Answer:** 7 -> 7 | Final answer: $7 -> 7 | Answer = 7 -> 7
  The answer is 18<end_of_turn>@<start_of_turn>user@The answer is 5 -> 18 | The answer is 18.<|im_end|> -> 18
  <pad><bos>The answer is 18</s></s> -> 18 | The answer is <|begin_of_box|>18<|end_of_box|> -> 18
  \boxed{18}<|eot_id|> -> 18
  The answer is 18<｜end▁of▁sentence｜> 5 -> 18
"""  # "@" is a line break


def test_extract():
  cases = [case.split(" -> ") for case in re.split(r"(?<=[\w]) \| |\n", FINAL_ANSWERS) if case.strip()]
  assert len(cases) > 35
  for text, answer in cases:
    assert extract_answer(text.strip().replace("@", "\n")) == answer, text
  for text in (
    "The answer is .",
    "####",
    "no answer, 42",
    "",
    "**Answer:**\n6 / 3 = 2",
    "Answer: see above",
    "\\boxed{}",
  ):
    assert extract_answer(text) is None, text
  assert not any(same_answer(a, b) for a, b in [(None, None), (None, "1"), ("1", None), ("", ""), ("1", "2")])
  filling = "x" * answers.MAX_SOLUTION_CHARACTERS
  assert extract_answer("The answer is 7. " + filling) is None
  assert extract_answer(filling + " The answer is 7.") == extract_answer("The answer is 7. " + filling[30:]) == "7"
  words = "a" * (answers.MAX_ANSWER_CHARACTERS - 4)
  assert normalise_answer(f"{words} 12") == "12"
  assert normalise_answer(f"{words} 12345") == words, "half a number is not read"


def test_false_equations_are_found_and_nothing_else():
  for text, found in (
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
  ):
    assert false_equations(text) == found, text


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
