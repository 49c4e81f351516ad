"""Quantities in a plain English sentence, in digits or words.

quantity = {sign | currency} (number | half) [fraction] scale*
number   = group scale* {["and" | ","] group scale*}, with falling scales: "two million 300 thousand and five"
group    = digits | a mixed fraction | words below a thousand
fraction = ["and"] a numerator and a denominator in words: "2 and a half", "two thirds"
"""

import fractions
import re
from typing import NamedTuple

from genrm_jax.tasks.gsm8k.markup import CURRENCY

MAX_DIGITS = 60  # of a number
_MAX_SCALE = 10**24

_ONES = (
  "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
SMALL = {
  **{word: i for i, word in enumerate([*_ONES.split(), "eighteen", "nineteen"])},
  **{word: 10 * i for i, word in enumerate(_TENS.split(), start=2)},
}
_WHOLE_SCALES = {
  **{"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12},
  **{"dozen": 12, "lakh": 10**5, "crore": 10**7},
}
SCALES = {
  **_WHOLE_SCALES,
  **{f"{word}s": scale for word, scale in _WHOLE_SCALES.items()},
  **{"grand": 10**3, "mil": 10**6, "mn": 10**6, "mln": 10**6, "bn": 10**9, "bln": 10**9, "tn": 10**12, "trn": 10**12},
}
_MONEY_SCALES = {"m": 10**6, "mm": 10**6, "b": 10**9, "t": 10**12}  # of anything else, m is a metre
_MONEY = (CURRENCY, "dollar", "dollars", "euro", "euros", "pounds", "rupees", "usd", "eur", "gbp", "inr")
_PARTS = "third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth"
DENOMINATORS = {
  **{"half": 2, "quarter": 4, **{word: i for i, word in enumerate(_PARTS.split(), start=3)}},
  **{"fifteenth": 15, "sixteenth": 16, "twentieth": 20, "hundredth": 100, "thousandth": 1000},
}
_ARTICLES = ("a", "an")
_SIGNS = {"-": -1, "minus": -1, "negative": -1, "+": 1, "plus": 1, "positive": 1}


def words(text: str) -> frozenset[str]:
  """The words of a text."""
  return frozenset(text.split())


BEFORE_SIGN = words("is of to at be by about around approximately was exactly only or and therefore")
MEASURES = words(
  "ml l cl dl liter litre g kg mg gram oz ounce lb pound watt w kw volt mah mb gb tb m cm mm km meter metre inch foot"
  " ft yard mile gallon quart pint calorie page piece dollar cent euro acre seat"
)
_PREPOSITIONS = words("per each of in for and or on at to with by from over under a an the is are")

_TOKEN = re.compile(
  r"(?P<number>[0-9]{1,3}(?:,[0-9]{2,3})*,[0-9]{3}(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
  r"|(?P<word>[^\W\d_]+(?:'[^\W\d_]+)*)|\S"
)


class Token(NamedTuple):
  """A number in digits, a word or a mark."""

  kind: str | None  # "number", "word", None for a mark
  text: str
  lower: str
  start: int
  end: int
  touches: bool  # the token before it


END = Token(None, "", "", 0, 0, False)


class Sentence:
  """The tokens of a sentence; beyond its ends all are `END`."""

  def __init__(self, text: str):
    self.tokens: list[Token] = []
    end = -1
    for match in _TOKEN.finditer(text):
      part, start, before = match[0], match.start(), end
      end = match.end()
      self.tokens.append(Token(match.lastgroup, part, part.lower(), start, end, start == before))

  def __getitem__(self, i: int) -> Token:
    return self.tokens[i] if 0 <= i < len(self.tokens) else END


class Quantity(NamedTuple):
  """A quantity and the tokens that it spans. The value is None where it is too long, infinite, or not to be told."""

  value: fractions.Fraction | None
  start: int
  end: int
  in_digits: bool
  has_scale: bool


Value = fractions.Fraction | None


def read_quantity(s: Sentence, start: int) -> Quantity | None:
  """The quantity that begins at a token, None where none does."""
  i, sign, money = start, 0, False
  while (mark := s[i].lower) == CURRENCY or mark in _SIGNS:
    if mark == CURRENCY:
      money = True
    elif sign or not _is_sign(s, i):
      return None
    else:
      sign = _SIGNS[mark]
    i += 1
  read = _part(s, i, money) or _number(s, i, money)
  if read is None:
    return None
  value, end = read
  has_scale = any(s[k].lower in SCALES for k in range(i, end))
  if not has_scale:
    value, end = _with_fraction(s, value, end)
    factor, end = _factor(s, end, money)
    value, has_scale = None if value is None else value * factor, factor > 1
  elif s[end].lower == "and" and _denominator(s, end + 2)[0]:  # "a million and a half"
    value = None
  value = None if value is None else value * (sign or 1)
  return Quantity(value, start, end, any(s[k].kind == "number" for k in range(i, end)), has_scale)


def _is_sign(s: Sentence, i: int) -> bool:
  """Whether a sign belongs to the number after it, and is no operation."""
  sign, before, after = s[i], s[i - 1], s[i + 1]
  if sign.lower in ("negative", "positive") or i == 0 or before.text in ("(", ":", CURRENCY):
    return True
  if sign.lower == "-":
    return after.touches and not sign.touches
  return before.lower in BEFORE_SIGN


def _part(s: Sentence, i: int, money: bool) -> tuple[Value, int] | None:
  """A half, or a part with an article: "half", "half a dozen", "a third"."""
  at = i + (s[i].lower in _ARTICLES)
  bottom, word, after = DENOMINATORS.get(s[at].lower), s[at].lower, s[at + 1]
  if bottom is None or joins_next(s, at):
    return None
  if word != "half":
    return (fractions.Fraction(1, bottom), at + 1) if at > i and word != "quarter" and is_end(s, at + 1) else None
  if after.lower == "of" or after.kind == "number" or after.lower in SMALL:
    return None
  factor, end = _factor(s, at + 1 + (after.lower in _ARTICLES), money)
  return fractions.Fraction(factor, 2), end if factor > 1 else at + 1


def _number(s: Sentence, i: int, money: bool) -> tuple[Value, int] | None:
  total: Value = None
  least, end = 0, i
  while group := _group(s, end + (total is not None and s[end].lower in ("and", ","))):
    value, after, in_digits = group
    factor, after = _factor(s, after, money)
    if value is None:
      return (None, after) if total is None else (total, end)
    if total is not None and (value * factor >= least or (in_digits and factor == 1)):
      break
    total, least, end = (total or 0) + value * factor, factor, after
    if factor in (1, _WHOLE_SCALES["dozen"]):
      break
  return None if total is None else (total, end)


def _group(s: Sentence, i: int) -> tuple[Value, int, bool] | None:
  """A number without scales, where it ends, and whether it is in digits."""
  if s[i].kind == "number":
    return None if is_within_word(s, i) else (*_literal(s, i), True)
  if s[i].lower in _ARTICLES and s[i + 1].lower in _WHOLE_SCALES:
    return fractions.Fraction(1), i + 1, False
  below = _below_hundred(s, i)
  if below is None:
    return None
  value, end = below
  if s[end].lower == "hundred":
    value, end = 100 * value, end + 1
    if after := _below_hundred(s, end + (s[end].lower == "and")):
      value, end = value + after[0], after[1]
  return fractions.Fraction(value), end, False


def _below_hundred(s: Sentence, i: int) -> tuple[int, int] | None:
  value = SMALL.get(s[i].lower)
  if value is None:
    return None
  unit = _after_hyphen(s, i + 1)
  if value >= 20 and 1 <= SMALL.get(s[unit].lower, 0) <= 9:
    return value + SMALL[s[unit].lower], unit + 1
  return value, i + 1


def _literal(s: Sentence, i: int) -> tuple[Value, int]:
  """A number in digits: with spaced thousands, a fraction, or a mixed fraction."""
  digits, end = s[i].text.replace(",", ""), i + 1
  while _is_spaced_thousand(s, i, end):
    digits, end = digits + s[end].text, end + 1
  if len(digits) > MAX_DIGITS:
    return None, end
  whole = fractions.Fraction(digits)
  if end == i + 1 and (ratio := _ratio(s, i)):
    return ratio
  top = end + (s[end].lower in ("and", "&"))
  if whole.denominator == 1 and not s[top].touches and (ratio := _ratio(s, top)):
    value, end = ratio
    return None if value is None else whole + value, end
  return whole, end


def _ratio(s: Sentence, i: int) -> tuple[Value, int] | None:
  """The fraction "a / b" at a token."""
  top, bottom = s[i].text.replace(",", ""), s[i + 2].text.replace(",", "")
  if s[i + 1].text != "/" or not (top.isdecimal() and bottom.isdecimal()):
    return None
  if len(top + bottom) > MAX_DIGITS or int(bottom) == 0:
    return None, i + 3
  return fractions.Fraction(int(top), int(bottom)), i + 3


def _is_spaced_thousand(s: Sentence, first: int, i: int) -> bool:
  """Whether three digits continue a number: "12 500", but not "5 100-watt bulbs" or "3 500 ml bottles"."""
  token, after = s[i], s[i + 1]
  if not re.fullmatch("[0-9]{3}", token.text) or not re.fullmatch("[1-9][0-9]{0,2}", s[first].text):
    return False
  if token.start != s[i - 1].end + 1 or after.text == "/" or (after.touches and after.text in ("-", ",", "'")):
    return False
  measures_noun = after.lower in MEASURES and s[i + 2].kind == "word" and s[i + 2].lower not in _PREPOSITIONS
  return token.text == "000" or i > first + 1 or not measures_noun


def _factor(s: Sentence, i: int, money: bool) -> tuple[int, int]:
  """The product of the scales from a token on, and where they end."""
  product = 1
  while product < _MAX_SCALE and (scale := _scale(s, i, money)):
    product, i = product * scale, i + 1
  return product, i


def _scale(s: Sentence, i: int, money: bool) -> int | None:
  token = s[i]
  if token.lower in SCALES:
    return SCALES[token.lower]
  if s[i + 1].touches and s[i + 1].text in ("-", "&"):  # "M&Ms"
    return None
  if token.text == "M":
    return SCALES["million"]
  if token.lower == "k" and token.touches:
    return SCALES["thousand"]
  return _MONEY_SCALES.get(token.lower) if money or s[i + 1].lower in _MONEY else None


def _with_fraction(s: Sentence, value: Value, i: int) -> tuple[Value, int]:
  """The value together with the fraction in words that follows it, and where that ends."""
  if value is None:
    return value, i
  if s[i].lower == "and":
    one = s[i + 1].lower in (*_ARTICLES, "one", "half")
    top = 1 if one else _small(s[i + 1])
    bottom, end = _denominator(s, _after_hyphen(s, i + 1 + (s[i + 1].lower != "half")))
    return (value + fractions.Fraction(top, bottom), end) if top and bottom else (value, i)
  bottom, end = _denominator(s, _after_hyphen(s, i))
  hyphen, word = end == i + 2, s[end - 1].lower
  if bottom is None or value.denominator != 1 or joins_next(s, end - 1):
    return value, i
  if not word.endswith(("s", "ves")) and not (value == 1 and (hyphen or word == "half" or is_end(s, end))):
    return value, i  # "3 fifth graders"
  if word.startswith("quarter") and not hyphen:  # "25 quarters" are coins; "three quarters" may be either
    return (value if s[i - 1].kind == "number" and s[end].lower != "of" else None), end
  return value / bottom, end


def _small(token: Token) -> int | None:
  return int(token.text) if re.fullmatch("[0-9]{1,3}", token.text) else SMALL.get(token.lower)


def _denominator(s: Sentence, i: int) -> tuple[int | None, int]:
  word = s[i].lower
  return DENOMINATORS.get("half" if word == "halves" else word.removesuffix("s")), i + 1


def _after_hyphen(s: Sentence, i: int) -> int:
  return i + 1 if s[i].text == "-" and s[i].touches and s[i + 1].touches else i


# ---------------------------------------------------------------------------------------------------------------------
# Neighbours


def is_end(s: Sentence, i: int) -> bool:
  """Whether a phrase ends before a token."""
  return s[i] is END or s[i].text in tuple(".,;:)!?") or s[i].lower == "of"


def joins_next(s: Sentence, i: int) -> bool:
  """Whether a hyphen joins a token to a word of two letters or more: "T-shirt", "100-watt"."""
  hyphen, word = s[i + 1], s[i + 2]
  return hyphen.text == "-" and hyphen.touches and word.touches and word.kind == "word" and len(word.text) > 1


def is_within_word(s: Sentence, i: int) -> bool:
  """Whether a number in digits is the tail of a word, as in "co2" and "covid-19", or a power."""
  token, before = s[i], s[i - 1]
  if before.text == "^" or (before.text == "-" and s[i - 2].text == "^"):
    return True
  joined = before.text in ("-", "_") and before.touches and s[i - 2].kind == "word"
  return token.touches and (before.kind == "word" or joined)
