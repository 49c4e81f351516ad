"""The only number that a plain English sentence states.

What stands beside a quantity may spoil it: an operation, a variable, a ratio. Then, as where there are several
quantities, the sentence states no number: none is better than a wrong one.
"""

import fractions

from genrm_jax.tasks.gsm8k.markup import CURRENCY
from genrm_jax.tasks.gsm8k.quantities import (
  BEFORE_SIGN,
  DENOMINATORS,
  END,
  MEASURES,
  SCALES,
  SMALL,
  Quantity,
  Sentence,
  is_end,
  joins_next,
  read_quantity,
  words,
)

# Before a number in words that is the answer, and not part of a remark.
_LEADING = BEFORE_SIGN | words("equals roughly nearly almost just least most a total equal simply now over")
_JOINING = ("and", "or", "&", ",")  # after one, a number in words is a further quantity
_OPERATIONS = frozenset("+*^×÷√±∓·⋅∙∗\\π∑∞")
_OPERATION_WORDS = words("sqrt pi log ln sin cos tan exp factorial minus plus")
_MULTIPLIERS = ("twice", "thrice", "double", "triple", "quadruple", "root")
_UNIT_LETTERS = "aghilms"  # and the article, and "I"
_UNIT_CAPITALS = "VWJACFN"  # volts and so on, right after a number
_DEGREES = ("°", "degree", "degrees")


def read_number(text: str) -> fractions.Fraction | None:
  """The number that a sentence states; None where it states none or several, or where what it means is unclear."""
  sentence = Sentence(text)
  found: list[Quantity] = []
  i = 0
  while i < len(sentence.tokens):
    if quantity := read_quantity(sentence, i):
      found.append(quantity)
      i = quantity.end
    elif _spoils(sentence, i):
      return None
    else:
      i += 1
  if any(q.in_digits for q in found):
    found = [q for q in found if q.in_digits or q.has_scale or _is_stated(sentence, q)]
    if len(found) > 1:
      found = [q for q in found if not _is_adjective(sentence, q)] or found
  elif not found or not _leads(sentence, found[0].start) or _is_pronoun(sentence, found[0]):
    return None
  values = {q.value for q in found}
  return values.pop() if len(values) == 1 else None


def _is_stated(s: Sentence, q: Quantity) -> bool:
  """Whether a number in words, beside digits, is a separate quantity: "five hours and 17 minutes"."""
  before = s[q.start - 1].lower
  return _leads(s, q.start) or before in _JOINING or (before == "to" and s[q.start - 2].kind == "number")


def _leads(s: Sentence, i: int) -> bool:
  return all(s[k].lower in _LEADING or s[k].kind is None for k in range(i))


def _is_adjective(s: Sentence, q: Quantity) -> bool:
  """Whether a quantity describes a noun that another one counts: "5 100-watt bulbs", "3 500 ml bottles"."""
  counted = s[q.start - 1].kind == "number" and s[q.end].lower in MEASURES and s[q.end + 1].lower.endswith("s")
  return joins_next(s, q.end - 1) or counted


def _is_pronoun(s: Sentence, q: Quantity) -> bool:
  """Whether "one" may stand for a thing: it is a number only if at most one noun follows."""
  return s[q.start].lower == "one" and q.end == q.start + 1 and (s[q.end].lower == "of" or s[q.end + 1] is not END)


def _spoils(s: Sentence, i: int) -> bool:
  """Whether a token outside of the quantities makes the sentence state no plain number."""
  token, before, after = s[i], s[i - 1], s[i + 1]
  if token.kind == "word":
    return _word_spoils(s, i)
  if token.kind == "number":  # within a word or a power: "20 cm2", but not "1h30"
    return before.kind == "word" and before.touches and s[i - 2].kind == "number" and token.text not in ("2", "3")
  if token.text == "^":  # unless of a unit: "18 m^2"
    return before.kind != "word" or (after.kind != "number" and after.text != "-")
  if token.text == "-":
    spaced = not token.touches and not after.touches
    operand = before.text == ")" or before.kind == "word" or (len(after.text) == 1 and after.kind == "word")
    return before.kind == after.kind == "number" or (spaced and operand)
  if token.text in ("/", ":"):
    return after.kind == "number" and (token.text == "/" or before.kind == "number")
  if token.text == "—":  # a minus sign, or a dash
    return after.kind == "number" and after.touches and not token.touches
  return token.text in _OPERATIONS


def _word_spoils(s: Sentence, i: int) -> bool:
  word, before, after = s[i].lower, s[i - 1], s[i + 1]
  if len(word) == 1:
    return _is_variable(s, i)
  if word in _OPERATION_WORDS or word in SCALES:
    return True
  if word in ("half", "halves"):
    return not joins_next(s, i)
  if word in DENOMINATORS:  # "58 and third"
    return before.lower == "and"
  if word in _MULTIPLIERS:
    return after.kind == "number" or after.text == CURRENCY or (word == "root" and after.lower == "of")
  if word in ("squared", "cubed"):
    return before.kind == "number" or before.lower in SMALL
  if word in ("below", "under"):
    return after.lower in ("zero", "freezing")
  return not word.isascii() and any(c.isnumeric() for c in word)  # such as Chinese numbers


def _is_variable(s: Sentence, i: int) -> bool:
  """Whether a single letter is no article, unit, or part of a compound or an abbreviation."""
  token, before, after = s[i], s[i - 1], s[i + 1]
  if token.lower in _UNIT_LETTERS or before.lower in _DEGREES or joins_next(s, i):
    return False
  hyphened = before.text == "-" and before.touches and token.touches and s[i - 2].kind == "word"
  if hyphened and len(s[i - 2].text) > 1:  # "vitamin-C"
    return False
  if (before.text == "." and token.touches) or (after.text == "." and after.touches and s[i + 2].touches):  # "U.S."
    return False
  if before.kind != "number":
    return True
  if token.lower == "c" and token.touches and i == 1 and after is END:  # cents
    return False
  ends = is_end(s, i + 1) or after.text == "/" or after.lower == "per"
  return not (token.text in _UNIT_CAPITALS and ends) or (token.text == "N" and token.touches)
