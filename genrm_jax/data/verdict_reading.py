"""Where in a grader's raw text its verdict is: named versions, so that a set of rationales can be made again.

The released graders were asked to end in `Verification: Is the answer correct (Yes/No)? X`. A reading gives the text
before that question and the verdict. A rule that reads old texts otherwise gets a new name; the old ones stay.

    exact-1    the question in these very characters, a space and the verdict; the first such place counts
    lenient-1  marks of any kind (bold, tags, line breaks, a misplaced "?") around the words; the first place counts
    lenient-2  "(Yes/No)" may also be missing ("Is the answer correct? Yes"). A verdict after which the next step is
               verified ("Step 2: ... Yes" and then "Step 3") is that step's and does not count. Of those left the first
               one counts (what follows it restates it, explains it, or solves the problem anew), and there is no
               verdict where they contradict each other. A heading "Verification:" or "Final Grade:" that the cut would
               leave bare is cut as well: the opening one, which the prompt has just said (the authors cut it too), and
               the one right before the question.

No version guesses: a text that breaks off, or grades in other words ("Verification: Yes", "Cannot be determined"), has
no verdict. Nearly all texts without one broke off at the grader's token limit.
"""

import bisect
import re
import types
from collections.abc import Callable, Mapping
from typing import NamedTuple

from genrm_jax.runtime.errors import UserError
from genrm_jax.text.prompts import get_format

NO_VERDICT, CONTRADICTION = "no verdict", "verdicts contradict each other"

QUESTION = get_format("genrm").verdict_question.strip().removeprefix("Verification: ")


class Located(NamedTuple):
  """The text before the verdict question, and the verdict. Without one: the whole text, None, and why."""

  text: str
  verdict: bool | None
  why: str = ""


Reading = Callable[[str], Located]

_EXACT_1 = re.compile(rf"(?:Verification: )?{re.escape(QUESTION)} (Yes|No)\b")
_MARKS_1 = r"(?:</?\w+>|\W)*"
_LENIENT_1 = re.compile(rf"\bIs the answer correct{_MARKS_1}\(Yes/No\){_MARKS_1}(Yes|No)\b")
_OPENING_1 = re.compile(r"(?:<\w+>|[\s*])*Verification:?(?:</?\w+>|[\s*])*$|(?:<\w+>|[\s*])+$")

# Possessive (*+), so that no text of marks alone takes more than one pass.
_MARKS = r"(?:</?[A-Za-z]+>|[\W_])*+"
_LENIENT_2 = re.compile(
  rf"(?<![A-Za-z])Is the answer correct(?P<ask>{_MARKS})(?P<choice>Yes\s?/\s?(?:No|Yes)\b{_MARKS})?"
  r"(?P<verdict>Yes|No)\b(?!\s*/)"
)
_STEP = re.compile(r"^(?:</?[A-Za-z]+>|[^\w\n]|_)*+(?:Step\s+)?(\d{1,2})(?:[:)]|\.(?!\d)|\*\*|</)", re.MULTILINE)
_HEADING = re.compile(r"\s*+(?:<\w+>|[*_#]|[ \t])*Verification(?:</?\w+>|[*_: \t])*\n")
_LEAD = r"(?:^|\s)(?:</?\w+>|[\s*_#>-])*"  # what may stand before a heading, from a space or line break on
_OPENING_2 = re.compile(
  rf"(?:{_LEAD}(?:(?:Final|Overall|Solution) )?(?:[Gg]rade|Verification)(?:</?\w+>|[\s*_:-])*)+$|{_LEAD}$"
)
_LONGEST_OPENING = 100  # characters; a bound on the time that the cut takes


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
  asked = [m for m in _LENIENT_2.finditer(text) if m["choice"] or "?" in m["ask"]]
  final = _after_the_last_step(text, asked)
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
  """The verdicts after which the count of numbered steps does not go on (2, verdict, 3 goes on)."""
  steps = list(_STEP.finditer(text)) if verdicts else []
  starts = [s.start() for s in steps]
  final = []
  for verdict in verdicts:
    after = bisect.bisect_left(starts, verdict.end())
    before = bisect.bisect_left(starts, verdict.start()) - 1
    goes_on = before >= 0 and after < len(steps) and int(steps[after][1]) == int(steps[before][1]) + 1
    if not goes_on:
      final.append(verdict)
  return final


READINGS: Mapping[str, Reading] = types.MappingProxyType(
  {"exact-1": _exact_1, "lenient-1": _lenient_1, "lenient-2": _lenient_2}
)
DEFAULT = "lenient-2"


def get_reading(name: str) -> Reading:
  """The reading called `name`; UserError if there is none."""
  if name not in READINGS:
    raise UserError(f"unknown reading of verdicts {name!r}; there are: {', '.join(READINGS)}")
  return READINGS[name]
