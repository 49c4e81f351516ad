"""Extracts, normalises and compares final answers to GSM8K problems.

The work per answer is bounded by construction, whatever the text: a statement is searched for in the last
`MAX_SOLUTION_CHARACTERS` of a solution, at most `MAX_ANSWER_CHARACTERS` of it are read, and a number has at most
`MAX_DIGITS`.
"""

import decimal
import fractions
import re

MAX_SOLUTION_CHARACTERS = 1 << 16
MAX_ANSWER_CHARACTERS = 200
MAX_DIGITS = 60  # with sign, separators and scale

ANSWER_IS = re.compile(r"\banswer is(?![a-z])\s*:?", re.IGNORECASE)
_MARK = "####"

_PLAIN_INTEGER = re.compile(r"\s*\$?(0|[1-9][0-9]{0,30})\.?\s*\Z")  # nearly all answers
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{2,3})*,[0-9]{3}(?![0-9])|[0-9]+)"
# A minus sign comes first, or between a space and a digit; between spaces it is an operator.
_SIGN = r"(?:(?:(?<![^(:])|(?<=[(:] ))-\s*|(?<=\s)-(?=[0-9.])|\bnegative\s+)?"
_NUMBER = re.compile(
  rf"(?P<sign>{_SIGN})(?:"
  rf"(?:(?P<whole>{_DIGITS})\s*(?:(?:and|&)\s+|\s))?(?P<top>{_DIGITS})\s*/\s*(?P<bottom>{_DIGITS})(?![0-9]|\.[0-9])"
  rf"|(?P<decimal>{_DIGITS}(?:\.[0-9]+)?|\.[0-9]+)"
  r"(?:(?P<scale>k\b|\s*(?:hundred|thousand|million|billion)\b))?)"
)
_SCALES = {"hundred": 10**2, "k": 10**3, "thousand": 10**3, "million": 10**6, "billion": 10**9}
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_WORD = re.compile(rf"({'|'.join(_WORDS)})(?: (?!half|third|quarter)[a-z]+)?")
# Next to a number, these make it part of something else: an operation, a variable, a fraction of a whole.
_NOT_PLAIN = re.compile(
  r"[+*^×÷√]|[a-z)] - |\b(?:half|halves)\b|\b(?:a|one) (?:third|quarter)\b|(?<![a-z'])[b-fjn-rt-z](?![a-z'])"
  r"|(?<![a-z'0-9])k(?![a-z'])"
)
_EDGES = " :;,*\"'"
_SENTENCE_END = re.compile(r"[.!?]+(?:\s|$)")
# A remark that explains an answer is no part of it: "9 (1 more than 8)", "4 inches because 3.998 is rounded".
_REMARK = re.compile(r"(?<=[a-z0-9.]) \((?:[^()]*[a-z][^()]*\)|[^()]*\)$)|,? (?:because|since|which|meaning|but) .*")
_MARKUP = (
  (re.compile(r"\{,\}"), ","),
  (re.compile(r"</?[a-z]{1,6}>"), ""),
  (re.compile(r"\\[dt]?frac\s*\{\s*([0-9,]+)\s*\}\s*\{\s*([0-9,]+)\s*\}"), r" \1/\2"),
  (re.compile(r"\\[dt]?frac\s*([0-9])([0-9])(?![0-9])"), r" \1/\2"),
  (re.compile(r"\\(?:boxed|text|mathbf|mathrm)\b\s*|\\[()\[\]!,;]|[{}`\\]"), " "),
  (re.compile(r"\*\*|(?<![a-z0-9])_+|_+(?![a-z0-9])"), ""),
  (re.compile(r"[$€£¥]"), ""),
  (re.compile(r"%|\b(?:percent|dollars?|usd)\b|¢"), " "),
  (re.compile(r"\A([0-9.]+)c\.?\Z"), r"\1"),
  (re.compile(r"[−–]"), "-"),
  (re.compile(r"’"), "'"),
  (re.compile(r"\b([0-9]{1,2}):00(?![0-9])"), r"\1"),
  (re.compile(r"\b([ap])\.m\b\.?"), r"\1m"),
)
_SPACED_THOUSANDS = re.compile(r"(?<![0-9.,/])[1-9][0-9]{0,2}(?: [0-9]{3})+(?![0-9/]|[.,][0-9]| ?/)")


def extract_answer(text: str) -> str | None:
  """The normalised answer after the last "The answer is", else after the last "####"; None where neither gives one."""
  end = text[-MAX_SOLUTION_CHARACTERS:]
  if stated := list(ANSWER_IS.finditer(end)):
    return normalise_answer(stated_line(end[stated[-1].end() :])) or None
  _, mark, rest = end.rpartition(_MARK)
  return (normalise_answer(stated_line(rest)) or None) if mark else None


def normalise_answer(text: str) -> str:
  """The normal form that equal answers share; "" for an empty answer.

  A text with one number in it (or one number several times) becomes that number, without currency, thousands
  separators, percent sign, units, markup and remarks; of an equation, the side after the last "=" counts. "3 1/2" and
  "7/2" become 3.5, "1/3" stays a fraction. Any other text ("5 hours and 17 minutes", "9 or 10", "x + 9", "7:08 pm") is
  folded: lower case, stripped, without a final period. Only the words within the first `MAX_ANSWER_CHARACTERS` are
  read.

      "$1,234.50." -> "1234.5"   "**72** miles" -> "72"   "4 + 5 = 9" -> "9"   "50%" -> "50"   "2 thousand" -> "2000"
      "12 500" -> "12500"   "4 (3.998, rounded)" -> "4"   "2 & 2/3" -> "8/3"   "two times" -> "2"
  """
  text = _whole_words(text)
  if integer := _PLAIN_INTEGER.match(text):
    return integer[1]
  plain = _whole_words(text.casefold())
  while (cleaned := _plain(plain)) != plain:  # removing markup may reveal more of it; each round shortens the text
    plain = cleaned
  value = _value(plain)
  return _shown(value) if value is not None else plain


def same_answer(a: str | None, b: str | None) -> bool:
  """Whether two answers are the same after normalisation; None and "" equal nothing, not even themselves."""
  if a is None or b is None:
    return False
  left = normalise_answer(a)
  return left != "" and left == normalise_answer(b)


def stated_line(text: str) -> str:
  """The first line of `text` that is not blank, as far as an answer is read."""
  return next((line for line in _whole_words(text).splitlines() if line.strip()), "")


def _whole_words(text: str) -> str:
  """The whole words within the first `MAX_ANSWER_CHARACTERS`: half a number would be a different number."""
  if len(text) <= MAX_ANSWER_CHARACTERS:
    return text
  if text[MAX_ANSWER_CHARACTERS].isspace():
    return text[:MAX_ANSWER_CHARACTERS]
  head = text[:MAX_ANSWER_CHARACTERS]
  return head[: max((i for i, c in enumerate(head) if c.isspace()), default=0)]


def _plain(text: str) -> str:
  """The text without markup and currency, with white space folded."""
  for pattern, instead in _MARKUP:
    text = pattern.sub(instead, text)
  text = _SPACED_THOUSANDS.sub(lambda m: m[0].replace(" ", ""), " ".join(text.split()))
  return text.rstrip(_EDGES + ".").lstrip(_EDGES)


def _value(plain: str) -> fractions.Fraction | None:
  """The only number that a plain text states; None where it states none or several."""
  if word := _WORD.fullmatch(plain):
    return fractions.Fraction(_WORDS.index(word[1]))
  bare = _REMARK.sub("", plain)
  bare = bare if _has_digit(bare) else plain
  sentence = _SENTENCE_END.split(bare, maxsplit=1)[0]
  stated = next((s for part in (sentence, bare) if _has_digit(s := part.rpartition("=")[2].lstrip())), None)
  if stated is None or _NOT_PLAIN.search(stated) or re.search(r"[0-9]:|:[0-9]", stated):
    return None
  values = {_number(m) for m in _NUMBER.finditer(stated) if not _is_within_word(stated, m)}
  return values.pop() if len(values) == 1 and not _has_digit(_NUMBER.sub(" ", stated)) else None


def _has_digit(text: str) -> bool:
  return any(c in "0123456789" for c in text)


def _is_within_word(text: str, match: re.Match[str]) -> bool:
  """Whether a number is the tail of a word, as in "co2"."""
  return match.start() > 0 and text[match.start() - 1].isalpha() and match["sign"] == ""


def _number(match: re.Match[str]) -> fractions.Fraction | None:
  """The value of a match of `_NUMBER`; None for x/0 and for more than `MAX_DIGITS`."""
  if len(match[0]) > MAX_DIGITS:
    return None
  digits = {k: v.replace(",", "") for k, v in match.groupdict().items() if v and k not in ("sign", "scale")}
  if "decimal" in digits:
    value = fractions.Fraction(digits["decimal"]) * _SCALES.get((match["scale"] or "").strip(), 1)
  elif int(digits["bottom"]) == 0:
    return None
  else:
    value = int(digits.get("whole", "0")) + fractions.Fraction(int(digits["top"]), int(digits["bottom"]))
  return -value if match["sign"].strip() else value


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
