r"""Answers that differ for certain although math-verify calls them equal.

It drops the bases of numbers, what follows the first unit, and the case of letters, and it reads names of angles as
products. Each guard knows one such kind and says nothing of other answers.
"""

import fractions
import re

_TEXT = re.compile(r"\\(?:text|textrm|textbf|mbox|mathrm|operatorname)\s*\{([^{}]*)\}")
SPACE = r"\\[,;:! ]|\\q?quad(?![a-zA-Z])|\\?\$|~|\\(?:left|right)(?![a-zA-Z])|\s"  # what is not seen, or a space
_SPACES = re.compile(f"(?:{SPACE})+")
_BASED = re.compile(r"([0-9A-Z]+)(?:\.([0-9A-Z]+))?_\{?([0-9]{1,2})\}?")
_ANGLE = re.compile(r"\\(?:measured)?angle[\s{~]*((?:[A-Za-z]'*){3})(?![A-Za-z])")
_NAME = re.compile(r"\\([a-zA-Z]+)|([a-zA-Z]+)")
_GREEK = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau upsilon phi chi psi"
_COMMANDS = frozenset([*_GREEK.split(), "omega"])
_MERIDIEM = re.compile(r"[0-9]\s*([ap])\.?\s*m\b", re.IGNORECASE)
# Texts, the name of what an answer is, times of day, and the constant of integration.
_NO_VARIABLES = re.compile(rf"{_TEXT.pattern}|\A\s*[a-zA-Z]\s*=(?!=)|(?i:{_MERIDIEM.pattern})|\+\s*[cC]\s*\Z")

_INCH = fractions.Fraction("25.4")
_OUNCE = fractions.Fraction("28.349523125")
# Units by dimension, and their size in the smallest one; the first dimension that has all units of an answer counts.
_DIMENSIONS: tuple[dict[str, int | fractions.Fraction], ...] = (
  {"second s sec": 1, "minute min": 60, "hour h hr": 3600, "day": 86400, "week": 604800},
  {"month": 1, "year yr": 12},
  {"second ''": 1, "minute '": 60, "degree": 3600},
  {
    **{"millimeter millimetre mm": 1, "centimeter centimetre cm": 10, "meter metre m": 1000, "kilometer km": 10**6},
    **{"inch in ''": _INCH, "foot ft feet '": 12 * _INCH, "yard yd": 36 * _INCH, "mile mi": 63360 * _INCH},
  },
  {"gram g": 1, "kilogram kg": 1000, "ounce oz": _OUNCE, "pound lb": 16 * _OUNCE},
  {"milliliter ml": 1, "liter litre l": 1000},
  {"cup": 1, "pint": 2, "quart": 4, "gallon": 16},
  {"cent": 1, "dollar": 100},
)
_SIZES = tuple(
  {name: fractions.Fraction(size) for names, size in units.items() for name in names.split()} for units in _DIMENSIONS
)
_NAMES = frozenset().union(*_SIZES)
_NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]+|/[1-9][0-9]*)?")
_MEASURED = re.compile(r"\s*(?:(?:,|and)\s*)?([0-9]+(?:\.[0-9]+|/[1-9][0-9]*)?)\s*([a-z]+|''?)\.?")

Units = list[tuple[fractions.Fraction, str]]


def certainly_differ(a: str, b: str) -> bool:
  """Whether two answers in LaTeX differ for certain: in base, measure, time of day, angle, or case of their letters."""
  return any(guard(a, b) for guard in (_bases_differ, _measures_differ, _angles_differ, _letters_differ))


def _bases_differ(a: str, b: str) -> bool:
  """Whether both are numbers in a base, of different values: 101_2 and 101_3."""
  left, right = _based(a), _based(b)
  return left is not None and right is not None and left != right


def _based(answer: str) -> fractions.Fraction | None:
  match = _BASED.fullmatch(_SPACES.sub("", answer).rstrip("."))
  if match is None:
    return None
  whole, part, base = match[1], match[2] or "", int(match[3])
  try:
    return fractions.Fraction(int(whole + part, base), base ** len(part))
  except ValueError:  # a digit that the base does not have
    return None


def _measures_differ(a: str, b: str) -> bool:
  """Whether measures of one dimension differ, a measure in several units and a number, or times of day."""
  halves = [[half.lower() for half in _MERIDIEM.findall(_TEXT.sub(r" \1", answer))] for answer in (a, b)]
  if all(halves) and halves[0] != halves[1]:
    return True
  left, right = _units(a), _units(b)
  if left and right:
    return _amounts_differ(left, right)
  for units, answer in ((left, b), (right, a)):
    if len(units) > 1 and (number := _number(answer)) is not None:
      sizes = _sizes(units)
      if sizes is None:  # "3 apples and 4 pears"
        return all(n != 0 for n, _ in units)
      return all(number != _total(units, sizes) / sizes[name] for _, name in units)
  return False


def _amounts_differ(left: Units, right: Units) -> bool:
  if sizes := _sizes([*left, *right]):
    return _total(left, sizes) != _total(right, sizes)
  names, others = ({name for _, name in units} for units in (left, right))
  sums = [{name: sum(n for n, other in units if other == name) for name in names | others} for units in (left, right)]
  return (names <= others or others <= names) and sums[0] != sums[1]


def _sizes(units: Units) -> dict[str, fractions.Fraction] | None:
  """The sizes of all units, None where no dimension has them all."""
  return next((sizes for sizes in _SIZES if all(name in sizes for _, name in units)), None)


def _total(units: Units, sizes: dict[str, fractions.Fraction]) -> fractions.Fraction:
  return sum((number * sizes[name] for number, name in units), fractions.Fraction(0))


def _units(answer: str) -> Units:
  """The numbers and the units, or other nouns, of "3 feet and 4 inches"; empty if the answer is anything else."""
  text = _TEXT.sub(r" \1 ", answer.replace("^\\circ", " degree ").replace("^{\\circ}", " degree "))
  text = _SPACES.sub(" ", text.replace("\\prime", "'").replace('"', "''").replace("^{'}", "'")).strip().lower()
  units, at = [], 0
  while at < len(text):
    match = _MEASURED.match(text, at)
    if match is None:
      return []
    name = match[2] if match[2] in _NAMES else re.sub("(?<=ch)es$|s$", "", match[2])
    units.append((fractions.Fraction(match[1]), name))
    at = match.end()
  return units


def _number(answer: str) -> fractions.Fraction | None:
  digits = _SPACES.sub("", answer).replace("{,}", "").replace(",", "")
  return fractions.Fraction(digits) if _NUMBER.fullmatch(digits) else None


def _angles_differ(a: str, b: str) -> bool:
  r"""Whether both name as many angles, but other ones: \angle ABC and \angle ACB, while \angle CBA is \angle ABC."""
  left, right = (sorted(_angle(re.findall("[A-Za-z]'*", name)) for name in _ANGLE.findall(text)) for text in (a, b))
  return len(left) == len(right) and left != right


def _angle(points: list[str]) -> tuple[str, ...]:
  first, middle, last = points
  return (middle, *sorted((first, last)))


def _letters_differ(a: str, b: str) -> bool:
  r"""Whether one has a letter that the other has only in the other case, outside of texts: 2x and 2X, \pi and \Pi."""
  units = [*_units(a), *_units(b)]
  if units and all(len(unit) > 1 for _, unit in units):  # "5 KM"
    return False
  left, right = _letters(a), _letters(b)
  return any(name[0].swapcase() + name[1:] in right - left for name in left - right)


def _letters(answer: str) -> set[str]:
  names = set()
  for command, letters in _NAME.findall(_NO_VARIABLES.sub(" ", answer)):
    if command.lower() in _COMMANDS:
      names.add(command)
    if len(letters) > 1 and letters[1:].islower():  # a word; it may begin a sentence
      letters = letters.lower()
    names.update(letters)
  return names
