"""False equations in the text of a solution: the slips that a calculator finds.

Only what is meant as arithmetic for certain is judged: plain numbers, joined by + - * / (also x, × and ÷), an equals
sign, a plain number. Brackets, units within, percentages and powers are passed over, so some slips are not seen.
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
# Before it, these make an equation the end of a longer one; after it, its right side is one, or is no plain number.
_LONGER_BEFORE = re.compile(
  r"(?:[-+*/×÷−^)%]|[0-9]|(?:[%0-9]|percent|half|thirds?|quarters?|ths?) of|(?:pl[iy]|vid)\w+ by"
  r"|\b(?:x|times|plus|minus))[ \t]*\Z"
)
_LONGER_AFTER = re.compile(r"\s*(?:[-+*/×÷−^(%]|x\b|r(?:emainder)?\b|percent\b|cents?\b|¢|[.,]?[0-9])", re.IGNORECASE)


def false_equations(text: str) -> list[str]:
  """The equations of a text that are not true, as they stand there.

  A result may be rounded to the decimals that it is shown with, up or down, where it cannot be shown in full.

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
  """Whether a number as it is shown is the value, or the value rounded to its decimals."""
  digits = shown.replace(",", "").replace("$", "").strip()
  unit = fractions.Fraction(1, 10 ** len(digits.partition(".")[2]))
  off = abs(fractions.Fraction(digits) - value)
  return off == 0 or (value % unit != 0 and off < unit)


def plant_slip(text: str, rng: random.Random) -> str | None:
  """The solution with a wrong result in its last equation, carried on to its end; None where none can be changed.

  A digit of the result is another one, there and wherever the same number stands after it: only arithmetic tells. A
  solution that has a false equation already is not changed.
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
