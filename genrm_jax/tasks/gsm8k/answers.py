"""Extracts, normalises and compares final answers to GSM8K problems.

The work per answer is bounded by construction, whatever the text: a statement is searched for in the last
`MAX_SOLUTION_CHARACTERS` of a solution, at most `MAX_ANSWER_CHARACTERS` of it are read, and a number has at most
`MAX_DIGITS`.
"""

import decimal
import fractions
import re

from genrm_jax.tasks import statements
from genrm_jax.tasks.gsm8k.markup import CURRENCY, plain
from genrm_jax.tasks.gsm8k.numbers import read_number
from genrm_jax.tasks.gsm8k.quantities import MAX_DIGITS

MAX_SOLUTION_CHARACTERS = 1 << 16
MAX_ANSWER_CHARACTERS = 200

_LABEL = re.compile(
  r"^[^\w\n]{0,9}(?:the |my )?(?:final )?answer[*_ ]{0,4}[:=][*_ ]{0,4}(?=[^\s*_])", re.IGNORECASE | re.MULTILINE
)
# Lines between which a formula or code stands.
_FENCE = re.compile(r"\W*(?:\\(?:begin|end)\{[a-z]+\*?\}|latex|math|text|</?[a-z]{1,10}>)?\W*\Z")
_BULLET = re.compile(r"\s*[-*•]\s+")

_PLAIN_INTEGER = re.compile(r"\s*\$?(0|[1-9][0-9]{0,30})\.?\s*\Z")  # nearly all answers
_SENTENCE_END = re.compile(r"[.!?]+(?:\s|$)")
# A remark that explains an answer is no part of it: "9 (1 more than 8)", "4 inches because 3.998 is rounded".
_REMARK = re.compile(
  r"(?<=[a-z0-9.]) \((?:[^()]*[a-z][^()]*\)|[^()]*\)$)|,? (?:because|since|which|meaning|but) .*", re.IGNORECASE
)
_CURRENCY_BETWEEN = re.compile(rf"(?<=[0-9])\s*{CURRENCY}\s*(?=[0-9])")


def extract_answer(text: str) -> str | None:
  """The normalised answer that a solution states; None where it states none.

  It follows the last "The answer is", else the last "####", else stands in the last box, else is a number after the
  last "Answer:". A number in a later one of these overrules what is no number, and in a later box any statement.
  """
  text = statements.first_turn(text[-MAX_SOLUTION_CHARACTERS:])
  best, is_number, end = "", False, -1
  for find in (_said, _marked, _boxed, _labelled):
    if is_number and find != _boxed:
      continue
    start, stated = find(text)
    if stated and start > end:
      answer, may_overrule = _normalised(stated)
      if answer and (may_overrule or (not best and find != _labelled)):
        best, is_number = answer, may_overrule
        end = start + len(_SENTENCE_END.split(stated, maxsplit=1)[0]) * is_number
  return best or None


def _said(text: str) -> tuple[int, str]:
  """The line after the last "The answer is", and where it begins; "" where there is none."""
  start = statements.after_answer_is(text)
  return (-1, "") if start is None else (start, stated_line(text[start:]))


def _marked(text: str) -> tuple[int, str]:
  before, mark, after = text.rpartition("####")
  return len(before + mark), stated_line(after) if mark else ""


def _boxed(text: str) -> tuple[int, str]:
  box = statements.last_box(text, MAX_ANSWER_CHARACTERS) if "\\" in text else None
  return (box.start, box.content or "") if box else (-1, "")


def _labelled(text: str) -> tuple[int, str]:
  match = statements.last_match(_LABEL, text)
  return (match.end(), stated_line(text[match.end() :])) if match else (-1, "")


def normalise_answer(text: str) -> str:
  """The normal form that equal answers share; "" for an empty answer.

  A text that states one number (see numbers.py) becomes that number, without currency, thousands separators, percent
  sign, units, markup and remarks; of an equation, the side after the last "=" counts. "3 1/2" and "7/2" become 3.5,
  "1/3" stays a fraction. Any other text ("5 hours and 17 minutes", "9 or 10", "x + 9", "7:08 pm") is folded: lower
  case, stripped, without a final period. Only the words within the first `MAX_ANSWER_CHARACTERS` are read.

      "$1,234.50." -> "1234.5"   "**72** miles" -> "72"   "4 + 5 = 9" -> "9"   "50%" -> "50"   "2 thousand" -> "2000"
      "12 500" -> "12500"   "4 (3.998, rounded)" -> "4"   "3½" -> "3.5"   "minus two" -> "-2"   "5 T-shirts" -> "5"
  """
  return _normalised(text)[0]


def _normalised(text: str) -> tuple[str, bool]:
  """The normal form, and whether it is a number."""
  text = _whole_words(text)
  if integer := _PLAIN_INTEGER.match(text):
    return integer[1], True
  before = None
  while text != before:  # until it is its own normal form
    before, folded = text, _whole_words(plain(text))
    value = _value(folded)
    if value is not None:
      return _shown(value), True
    text = _whole_words(_CURRENCY_BETWEEN.sub(", ", folded).replace(CURRENCY, "").casefold())
  return text, False


def same_answer(a: str | None, b: str | None) -> bool:
  """Whether two answers are the same after normalisation; None and "" equal nothing, not even themselves."""
  if a is None or b is None:
    return False
  left = normalise_answer(a)
  return left != "" and left == normalise_answer(b)


def stated_line(text: str) -> str:
  """The first line of `text` with more than marks in it, as far as an answer is read; later lines without a bullet."""
  for i, line in enumerate(_whole_words(text).splitlines()):
    if not _FENCE.match(line):
      return _BULLET.sub("", line, count=1) if i else line
  return ""


def _whole_words(text: str) -> str:
  """The whole words within the first `MAX_ANSWER_CHARACTERS`: half a number would be a different number."""
  if len(text) <= MAX_ANSWER_CHARACTERS:
    return text
  if text[MAX_ANSWER_CHARACTERS].isspace():
    return text[:MAX_ANSWER_CHARACTERS]
  head = text[:MAX_ANSWER_CHARACTERS]
  return head[: max((i for i, c in enumerate(head) if c.isspace()), default=0)]


def _value(text: str) -> fractions.Fraction | None:
  """The only number that a plain text states; None where it states none or several."""
  bare = _REMARK.sub("", text)
  bare = bare if _has_digit(bare) or not _has_digit(text) else text
  sentence = _SENTENCE_END.split(bare, maxsplit=1)[0]
  sides = (part.rpartition("=")[2] for part in (sentence, bare))
  return read_number(next((side for side in sides if _has_digit(side)), sentence))


def _has_digit(text: str) -> bool:
  return any(c in "0123456789" for c in text)


def _shown(value: fractions.Fraction) -> str:
  """A decimal where it terminates, else a fraction in lowest terms."""
  rest = value.denominator
  for prime in (2, 5):
    while rest % prime == 0:
      rest //= prime
  if rest != 1:
    return f"{value.numerator}/{value.denominator}"
  with decimal.localcontext(prec=4 * MAX_DIGITS):
    digits = f"{decimal.Decimal(value.numerator) / value.denominator:f}"
  return digits.rstrip("0").rstrip(".") if "." in digits else digits
