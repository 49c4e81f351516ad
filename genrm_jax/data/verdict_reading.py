"""Finds the verdict in a grader's raw text, by named versions, so that a set of rationales can be reproduced.

The released graders were asked to end with the verdict question and "Yes" or "No". A reader returns the text before
that question and the verdict. A rule that would read old texts differently gets a new name; the old ones stay.

    exact-1    the question in exactly these characters, a space and the verdict; the first match counts
    lenient-1  marks of any kind (bold, tags, line breaks, a misplaced "?") around the words; the first match counts
    lenient-2  "(Yes/No)" may also be missing. A verdict after which the next step is verified ("Step 2: ... Yes",
               then "Step 3") belongs to that step and does not count. Of the others the first counts (what follows it
               restates it, explains it, or solves the problem anew); if they contradict each other, there is no
               verdict. A heading "Verification:" or "Final Grade:" that the cut would leave bare is cut as well: the
               opening one, which the prompt has just said (the authors cut it too), and the one right before the
               question.

No version guesses: a text that breaks off, or grades in other words ("Verification: Yes", "Cannot be determined"), has
no verdict. Nearly all texts without one were cut at the grader's token limit.
"""

import bisect
import re
import types
from collections.abc import Callable, Mapping
from typing import NamedTuple

from genrm_jax.runtime.errors import UserError
from genrm_jax.text.prompts import RELEASED

NO_VERDICT, CONTRADICTION = "no verdict", "verdicts contradict each other"

QUESTION = RELEASED.verdict_question.removeprefix("Verification: ")
_WORDS, _CHOICE = re.escape(QUESTION).removesuffix(r"\?").rsplit(r"\ ", 1)  # of the question: its words, "(Yes/No)"


class Located(NamedTuple):
  """The text before the verdict question, and the verdict; without a verdict the whole text, None, and why."""

  text: str
  verdict: bool | None
  why: str = ""


VerdictReader = Callable[[str], Located]

_EXACT_1 = re.compile(rf"(?:Verification: )?{re.escape(QUESTION)} (Yes|No)\b")
_MARKS_1 = r"(?:</?\w+>|\W)*"
_LENIENT_1 = re.compile(rf"\b{_WORDS}{_MARKS_1}{_CHOICE}{_MARKS_1}(Yes|No)\b")
_OPENING_1 = re.compile(r"(?:<\w+>|[\s*])*Verification:?(?:</?\w+>|[\s*])*$|(?:<\w+>|[\s*])+$")

# Possessive (*+): even a text of nothing but marks takes one pass.
_MARKS = r"(?:</?[A-Za-z]+>|[\W_])*+"
_LENIENT_2 = re.compile(
  rf"(?<![A-Za-z]){_WORDS}(?P<ask>{_MARKS})(?P<choice>Yes\s?/\s?(?:No|Yes)\b{_MARKS})?"
  r"(?P<verdict>Yes|No)\b(?!\s*/)"
)
_STEP = re.compile(r"^(?:</?[A-Za-z]+>|[^\w\n]|_)*+(?:Step\s+)?(\d{1,2})(?:[:)]|\.(?!\d)|\*\*|</)", re.MULTILINE)
_HEADING = re.compile(r"\s*+(?:<\w+>|[*_#]|[ \t])*Verification(?:</?\w+>|[*_: \t])*\n")
_LEAD = r"(?:^|\s)(?:</?\w+>|[\s*_#>-])*"  # what may precede a heading, from a space or line break on
_OPENING_2 = re.compile(
  rf"(?:{_LEAD}(?:(?:Final|Overall|Solution) )?(?:[Gg]rade|Verification)(?:</?\w+>|[\s*_:-])*)+$|{_LEAD}$"
)
_LONGEST_OPENING = 100  # characters; bounds the time of the cut


def _exact_1(text: str) -> Located:
  match = _EXACT_1.search(text)
  if not match:
    return Located(text.strip(), None, NO_VERDICT)
  return Located(text[: match.start()].strip(), match[1] == "Yes")


def _lenient_1(text: str) -> Located:
  match = _LENIENT_1.search(text)
  if not match:
    return Located(text.strip(), None, NO_VERDICT)
  opening = _OPENING_1.search(text, max(0, match.start() - 40), match.start())
  end = opening.start() if opening else match.start()
  return Located(text[:end].strip(), match[1] == "Yes")


def _lenient_2(text: str) -> Located:
  verdicts = [m for m in _LENIENT_2.finditer(text) if m["choice"] or "?" in m["ask"]]
  final = _after_the_last_step(text, verdicts)
  if not final:
    return Located(text.strip(), None, NO_VERDICT)
  if len({m["verdict"] for m in final}) > 1:
    return Located(text.strip(), None, CONTRADICTION)
  start = final[0].start()
  opening = _OPENING_2.search(text, max(0, start - _LONGEST_OPENING), start)
  end = opening.start() if opening else start
  heading = _HEADING.match(text, 0, end)
  return Located(text[heading.end() if heading else 0 : end].strip(), final[0]["verdict"] == "Yes")


def _after_the_last_step(text: str, verdicts: list[re.Match[str]]) -> list[re.Match[str]]:
  """The verdicts after which the numbering of steps does not continue (2, verdict, 3 continues)."""
  steps = list(_STEP.finditer(text)) if verdicts else []
  starts = [s.start() for s in steps]
  final = []
  for verdict in verdicts:
    after = bisect.bisect_left(starts, verdict.end())
    before = bisect.bisect_left(starts, verdict.start()) - 1
    continues = before >= 0 and after < len(steps) and int(steps[after][1]) == int(steps[before][1]) + 1
    if not continues:
      final.append(verdict)
  return final


READERS: Mapping[str, VerdictReader] = types.MappingProxyType(
  {"exact-1": _exact_1, "lenient-1": _lenient_1, "lenient-2": _lenient_2}
)
DEFAULT = "lenient-2"


def get_reader(name: str) -> VerdictReader:
  """The reader called `name`; UserError if there is none."""
  if name not in READERS:
    raise UserError(f"unknown reader of verdicts {name!r}; the readers are {', '.join(READERS)}")
  return READERS[name]
