"""Finds false equations in the text of a solution: the slips that a calculator would catch.

Only what is certainly meant as arithmetic is judged: plain numbers joined by + - * / (also x, × and ÷), an equals sign,
and a plain number. Brackets, inner units, percentages and powers are skipped, so some slips go unnoticed.
"""

import fractions
import random
import re

_NUMBER = r"(?:\$\s?)?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,12})(?:\.[0-9]{1,9})?(?![0-9%])"
_OPERATOR = r"\s*[-+*/x×÷−]\s*"
_EQUATION = re.compile(
  rf"(?<![0-9.,])(?P<left>{_NUMBER}(?:{_OPERATOR}{_NUMBER}){{1,9}})\s*=\s*(?P<right>{_NUMBER})(?=(?P<after>.{{0,12}}))"
)
_PART = re.compile(r"[-+*/x×÷−]|[0-9.]+")
_BULLET = re.compile(r"(?:\A|\n)[ \t]*[-*+][ \t]*\Z")
# Before an equation, these make it the end of a longer one; after it, its right side goes on or is no plain number.
_LONGER_BEFORE = re.compile(
  r"(?:[-+*/×÷−^)%]|[0-9]|(?:[%0-9]|percent|half|thirds?|quarters?|ths?) of|(?:pl[iy]|vid)\w+ by"
  r"|\b(?:x|times|plus|minus))[ \t]*\Z"
)
_LONGER_AFTER = re.compile(r"\s*(?:[-+*/×÷−^(%]|x\b|r(?:emainder)?\b|percent\b|cents?\b|¢|[.,]?[0-9])", re.IGNORECASE)


def false_equations(text: str) -> list[str]:
  """The false equations of a text, verbatim.

  A result with too many decimals to write down may be rounded, up or down, to those that are shown.

      "48 / 2 = 24 and 48 + 24 = 62"  -> ["48 + 24 = 62"]      "10 / 3 = 3.33"  -> []      "2 * (3 + 4) = 9"  -> []
  """
  found = []
  for match in _EQUATION.finditer(text):
    before = text[max(0, match.start() - 20) : match.start()]
    is_bullet = _BULLET.search(before)
    if (_LONGER_BEFORE.search(before) and not is_bullet) or _LONGER_AFTER.match(match["after"]):
      continue
    value = _value(match["left"])
    if value is not None and not _shows(match["right"], value):
      found.append(f"{match['left']} = {match['right']}")
  return found


def _value(expression: str) -> fractions.Fraction | None:
  """The value of numbers joined by operators, products first; None where it divides by 0."""
  parts = _PART.findall(expression.replace(",", ""))
  total, product, sign = fractions.Fraction(0), fractions.Fraction(parts[0]), 1
  for operator, number in zip(parts[1::2], map(fractions.Fraction, parts[2::2]), strict=True):
    if operator in "*x×":
      product *= number
    elif operator in "/÷":
      if not number:
        return None
      product /= number
    else:
      total += sign * product
      product, sign = number, 1 if operator == "+" else -1
  return total + sign * product


def _shows(shown: str, value: fractions.Fraction) -> bool:
  """Whether a written number is the value, or the value rounded to the decimals shown."""
  digits = shown.replace(",", "").replace("$", "").strip()
  unit = fractions.Fraction(1, 10 ** len(digits.partition(".")[2]))
  off = abs(fractions.Fraction(digits) - value)
  return off == 0 or (value % unit != 0 and off < unit)


def plant_slip(text: str, rng: random.Random) -> str | None:
  """The solution with a wrong result in its last equation, carried through to the end; None where that is impossible.

  One digit of the result is changed, there and wherever the same number occurs later, so that only arithmetic reveals
  it. None as well for a solution that has a false equation already.
  """
  equations = list(_EQUATION.finditer(text))
  if not equations or false_equations(text):
    return None
  last = equations[-1]
  result = last["right"].strip("$ \n")
  value = _value(last["left"])
  if value is None or not _shows(result, value) or _LONGER_AFTER.match(last["after"]):
    return None
  places = [i for i, c in enumerate(result) if c.isdigit()]
  at = rng.choice(places)
  digit = rng.choice([d for d in "0123456789" if d != result[at] and (d != "0" or at > 0)])
  slipped = result[:at] + digit + result[at + 1 :]
  same = re.compile(rf"(?<![0-9.,]){re.escape(result)}(?![0-9]|[.,][0-9])")
  return text[: last.start("right")] + same.sub(slipped, text[last.start("right") :])
