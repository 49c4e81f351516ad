"""GSM8K: grade-school maths problems with a number for an answer (Cobbe et al., 2021), from files or TFDS.

The solutions and rationales that the paper's authors released for it are read by `gsm8k_released.py`.
"""

import dataclasses
import decimal
import fractions
import json
import os
import re
from typing import Any

from etils import epath

from genrm_jax.errors import UserError
from genrm_jax.types import Problem

PathLike = str | os.PathLike[str]

SPLITS = ("train", "test")
_FOLDERS = ("grade-school-math/grade_school_math/data", "grade_school_math/data", "")


@dataclasses.dataclass(frozen=True)
class GSM8K:
  """The task, as `tasks/base.py` wants it."""

  name: str = "gsm8k"

  def extract_answer(self, text: str) -> str | None:
    """See `extract_answer`."""
    return extract_answer(text)

  def same_answer(self, a: str | None, b: str | None) -> bool:
    """See `same_answer`."""
    return same_answer(a, b)


# ---------------------------------------------------------------------------------------------------------------------
# Problems


def read_problems(data_dir: PathLike, split: str) -> list[Problem]:
  """The problems of a split, in the order of its file; ids are `gsm8k/<split>/<line from 0>`.

  Args:
    data_dir: the folder that holds a clone of openai/grade-school-math, the clone, or the folder of the JSONL files.
    split: "train" or "test".

  Raises:
    UserError: unknown split, no file, or a line that is not a GSM8K problem.
  """
  path = _problems_path(data_dir, split)
  problems = []
  with path.open("rb") as lines:
    for number, line in enumerate(lines, start=1):
      place = f"{path}:{number}"
      row = json_object(line, place)
      problems.append(
        _problem(
          f"gsm8k/{split}/{number - 1:05d}",
          split,
          text_field(row, "question", place),
          text_field(row, "answer", place),
          place,
        )
      )
  return problems


def read_problems_tfds(split: str, data_dir: PathLike | None = None) -> list[Problem]:
  """The problems of a split from TensorFlow Datasets, without TensorFlow; ids are `gsm8k/<split>/tfds-<index>`.

  The order is that of the prepared dataset, not of the original file, hence the other ids.

  Args:
    split: "train" or "test".
    data_dir: where the dataset is, or will be, prepared; None for TFDS's own place.

  Raises:
    UserError: unknown split, TFDS is not installed, or the dataset can neither be found nor prepared.
  """
  _check_split(split)
  try:
    import importlib_resources  # noqa: F401  (TFDS needs it to read, and does not say so)
    from tensorflow_datasets.text.gsm8k import gsm8k as tfds_gsm8k
  except ImportError as e:
    raise UserError(
      f"reading GSM8K through TFDS needs a package that is not here ({e}); pip install 'genrm-jax[tfds]', or clone "
      "https://github.com/openai/grade-school-math and read its files"
    ) from e
  where = None if data_dir is None else os.fspath(data_dir)
  try:
    # By its class: the name "gsm8k" is found only where the data is prepared already, or with TensorFlow.
    builder = tfds_gsm8k.Gsm8k(data_dir=where, file_format="array_record")
    builder.download_and_prepare()
    source = builder.as_data_source(split=split)
    rows = [source[i] for i in range(len(source))]
  except Exception as e:  # whatever the network, the disk or a missing reader raises
    raise UserError(
      f"TFDS could not give gsm8k/{split} (data_dir={where}): {type(e).__name__}: {str(e)[:300]}; check the "
      "network and data_dir, or clone https://github.com/openai/grade-school-math and read its files"
    ) from e
  return [_tfds_problem(i, split, row) for i, row in enumerate(rows)]


def problem_key(question: str) -> str:
  """A question with its white space folded: by this the same problem is found in different releases."""
  return " ".join(question.split())


def _tfds_problem(index: int, split: str, row: dict[str, Any]) -> Problem:
  place = f"TFDS gsm8k/{split}, row {index}"
  texts = {k: v.decode() if isinstance(v, bytes) else v for k, v in row.items()}
  question, answer = text_field(texts, "question", place), text_field(texts, "answer", place)
  return _problem(f"gsm8k/{split}/tfds-{index:05d}", split, question, answer, place)


def _problem(problem_id: str, split: str, question: str, worked: str, place: str) -> Problem:
  """A problem from its question and the released solution, `... <<48/2=24>>24 ...\\n#### 72`."""
  steps, mark, final = worked.rpartition("####")
  answer = normalise_answer(final)
  if not mark or not answer:
    raise UserError(f'{place}: "answer" does not end in "#### <number>"; take the file from a fresh clone')
  steps = re.sub(r"<<.*?>>", "", steps).strip()
  # The solutions of the release end in these words, so a worked solution does too.
  reference = f"{steps}\nThe answer is {answer}."
  return Problem(problem_id, "gsm8k", split, question.strip(), answer, reference)


def _problems_path(data_dir: PathLike, split: str) -> epath.Path:
  _check_split(split)
  places = [epath.Path(data_dir) / folder / f"{split}.jsonl" for folder in _FOLDERS]
  found = next((p for p in places if p.exists()), None)
  if found is None:
    raise UserError(
      f"no GSM8K {split} problems; looked for {', '.join(str(p) for p in places)}; "
      f"git clone https://github.com/openai/grade-school-math {epath.Path(data_dir) / 'grade-school-math'}"
    )
  return found


def _check_split(split: str) -> None:
  if split not in SPLITS:
    raise UserError(f"GSM8K has no split {split!r}; it has {' and '.join(SPLITS)}")


def json_object(line: bytes, place: str) -> dict[str, Any]:
  """A line of someone else's JSONL file. Its `place` (path:line) goes into the error."""
  try:
    row = json.loads(line)
  except (ValueError, RecursionError) as e:
    raise UserError(f"{place}: not JSON ({e}); the file is damaged, take it from a fresh clone") from e
  if not isinstance(row, dict):
    raise UserError(f"{place}: expected a JSON object, found {type(row).__name__}; take the file from a fresh clone")
  return row


def text_field(row: dict[str, Any], name: str, place: str) -> str:
  """A field of such a line, or a UserError that names the place and the field."""
  value = row.get(name)
  if not isinstance(value, str):
    what = "no field" if name not in row else f"{type(value).__name__}, not text, in field"
    raise UserError(f'{place}: {what} "{name}"; is this the file it should be? Take it from a fresh clone')
  return value


# ---------------------------------------------------------------------------------------------------------------------
# Answers

_ANSWER_IS = re.compile(r"\banswer is(?![a-z])\s*:?", re.IGNORECASE)
_MARK = "####"
_MAX_ANSWER_CHARACTERS = 200  # what follows "The answer is" beyond this is no answer
_MAX_DIGITS = 60

_PLAIN_INTEGER = re.compile(r"\s*\$?(0|[1-9][0-9]{0,30})\.?\s*\Z")  # nearly all answers
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{2,3})*,[0-9]{3}(?![0-9])|[0-9]+)"
_SIGN = r"(?:(?<![^\s(=:])-\s*|\bnegative\s+)?"
_NUMBER = re.compile(
  rf"(?P<sign>{_SIGN})(?:"
  rf"(?:(?P<whole>{_DIGITS})\s*(?:and\s+|\s))?(?P<top>{_DIGITS})\s*/\s*(?P<bottom>{_DIGITS})(?![0-9]|\.[0-9])"
  rf"|(?P<decimal>{_DIGITS}(?:\.[0-9]+)?|\.[0-9]+)"
  r"(?:\s*(?P<scale>hundred|thousand|million|billion)\b)?)",
  re.IGNORECASE,
)
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9}
# Beside a number, these make it part of something else: an operation, a variable, a part of a whole.
_NOT_PLAIN = re.compile(
  r"[+*^×÷√]|\b(?:half|halves)\b|\b(?:a|one) (?:third|quarter)\b|(?:(?<![a-z'])[b-fj-kn-rt-z](?![a-z']))", re.IGNORECASE
)
_EDGES = " :;,*\"'"
_SENTENCE_END = re.compile(r"[.!?]+(?:\s|$)")
_MARKUP = (
  (re.compile(r"\{,\}"), ","),
  (re.compile(r"</?[a-z]{1,6}>", re.IGNORECASE), ""),
  (re.compile(r"\\[dt]?frac\s*\{\s*([0-9,]+)\s*\}\s*\{\s*([0-9,]+)\s*\}"), r" \1/\2"),
  (re.compile(r"\\(?:boxed|text|mathbf|mathrm)\b\s*|\\[()\[\]!,;]|[{}`\\]"), " "),
  (re.compile(r"\*\*|(?<![a-z0-9])_+|_+(?![a-z0-9])", re.IGNORECASE), ""),
  (re.compile(r"[$€£¥]"), ""),
  (re.compile(r"%|\b(?:percent|dollars?|usd)\b", re.IGNORECASE), " "),
  (re.compile(r"[−–]"), "-"),
  (re.compile(r"\b([0-9]{1,2}):00\b"), r"\1"),
  (re.compile(r"\b([ap])\.m\b\.?", re.IGNORECASE), r"\1m"),
)


def extract_answer(text: str) -> str | None:
  """The normalised answer after the last "The answer is", else after the last "####"; None where neither gives one."""
  for match in reversed(list(_ANSWER_IS.finditer(text))):
    return normalise_answer(_first_line(text[match.end() :])) or None
  _, mark, rest = text.rpartition(_MARK)
  return (normalise_answer(_first_line(rest)) or None) if mark else None


def normalise_answer(text: str) -> str:
  """The one form of an answer that equal answers share; "" where there is nothing.

  A text with one number in it (or one number several times) is that number: without currency, thousands separators,
  percent sign, units, markup; of an equation, what stands after the last "="; "3 1/2" and "7/2" are 3.5, "1/3" stays a
  fraction. Anything else ("5 hours and 17 minutes", "9 or 10", "x + 9", "7:08 pm") is folded text: lower case, no
  white space around, no period at the end.

      "$1,234.50." -> "1234.5"   "**72** miles" -> "72"   "4 + 5 = 9" -> "9"   "50%" -> "50"   "2 thousand" -> "2000"
  """
  if integer := _PLAIN_INTEGER.match(text):
    return integer[1]
  plain = _plain(text)
  value = _value(plain)
  return _shown(value) if value is not None else plain


def same_answer(a: str | None, b: str | None) -> bool:
  """Whether two answers are the same after normalisation; None and "" are the same as nothing."""
  if a is None or b is None:
    return False
  left = normalise_answer(a)
  return left != "" and left == normalise_answer(b)


def _first_line(text: str) -> str:
  return next((line for line in text[:_MAX_ANSWER_CHARACTERS].splitlines() if line.strip()), "")


def _plain(text: str) -> str:
  """Without markup, currency and case; white space folded."""
  for pattern, instead in _MARKUP:
    text = pattern.sub(instead, text)
  return " ".join(text.split()).casefold().rstrip(_EDGES + ".").lstrip(_EDGES)


def _value(plain: str) -> fractions.Fraction | None:
  """The one number that a plain text states, None where it states none or several."""
  sentence = _SENTENCE_END.split(plain, maxsplit=1)[0]
  for part in (sentence, plain):
    stated = part.rpartition("=")[2]
    if not any(c in "0123456789" for c in stated):
      continue
    if _NOT_PLAIN.search(stated):
      return None
    values = {_number(m) for m in _NUMBER.finditer(stated) if not _is_within_word(stated, m)}
    left = _NUMBER.sub(" ", stated)
    if len(values) == 1 and not re.search(r"[0-9]:|:[0-9]", stated) and not any(c in "0123456789" for c in left):
      return values.pop()
    return None
  return None


def _is_within_word(text: str, match: re.Match[str]) -> bool:
  """Whether a number is the tail of a word, as in "co2"."""
  return match.start() > 0 and text[match.start() - 1].isalpha() and match["sign"] == ""


def _number(match: re.Match[str]) -> fractions.Fraction | None:
  """The value of a match of `_NUMBER`; None where it has none (x/0) or too many digits to be meant."""
  if len(match[0]) > _MAX_DIGITS:
    return None
  digits = {k: v.replace(",", "") for k, v in match.groupdict().items() if v and k not in ("sign", "scale")}
  if "decimal" in digits:
    value = fractions.Fraction(digits["decimal"]) * _SCALES.get((match["scale"] or "").lower(), 1)
  elif int(digits["bottom"]) == 0:
    return None
  else:
    value = int(digits.get("whole", "0")) + fractions.Fraction(int(digits["top"]), int(digits["bottom"]))
  return -value if match["sign"].strip() else value


def _shown(value: fractions.Fraction) -> str:
  """Digits where they end, else a fraction in lowest terms."""
  rest = value.denominator
  for prime in (2, 5):
    while rest % prime == 0:
      rest //= prime
  if rest != 1:
    return f"{value.numerator}/{value.denominator}"
  with decimal.localcontext(prec=4 * _MAX_DIGITS):
    digits = f"{decimal.Decimal(value.numerator) / value.denominator:f}"
  return digits.rstrip("0").rstrip(".") if "." in digits else digits
