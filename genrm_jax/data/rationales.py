"""Training rationales: written by a program or released by others, filtered, with a ledger of what was dropped."""

import collections
import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

from genrm_jax.types import Candidate, Problem, Rationale

# The released grader was asked to end in "Verification: Is the answer correct (Yes/No)? X". Marks of any kind (bold,
# tags, line breaks, a misplaced question mark) are allowed around the words.
_QUESTION = "Is the answer correct (Yes/No)?"
_MARKS = r"(?:</?\w+>|\W)*"
_VERDICT = re.compile(rf"\bIs the answer correct{_MARKS}\(Yes/No\){_MARKS}(Yes|No)\b")
_OPENING = re.compile(r"(?:<\w+>|[\s*])*Verification:?(?:</?\w+>|[\s*])*$|(?:<\w+>|[\s*])+$")


def by_program(
  problems: Sequence[Problem], candidates: Sequence[Candidate], write: Callable[[Problem, str], tuple[str, bool]]
) -> list[Rationale]:
  """One rationale a candidate from `write(problem, solution) -> (text, verdict)` (paper, section 3.3)."""
  problem_of = {p.id: p for p in problems}
  rationales = []
  for c in candidates:
    text, verdict = write(problem_of[c.problem_id], c.text)
    rationales.append(Rationale(c.problem_id, c.index, 0, text, verdict, "program", kept=True))
  return keep_agreeing(rationales, candidates)


def locate_verdict(text: str) -> tuple[str, bool | None]:
  """A grader's text up to its final verdict question, and the verdict (None, with the whole text, if there is none).

  What follows the first verdict is cut off: graders go on to other problems.
  """
  match = _VERDICT.search(text)
  if not match:
    return text.strip(), None
  opening = _OPENING.search(text, max(0, match.start() - 40), match.start())
  end = opening.start() if opening else match.start()
  return text[:end].strip(), match.group(1) == "Yes"


def from_graders(raw: Sequence[Rationale], candidates: Sequence[Candidate]) -> list[Rationale]:
  """Raw grader outputs with their verdicts located and the filter applied (paper, section 3.3 and appendix A)."""
  read = []
  for r in raw:
    text, verdict = locate_verdict(r.text)
    read.append(dataclasses.replace(r, text=text, verdict=verdict))
  return keep_agreeing(read, candidates)


def keep_agreeing(rationales: Sequence[Rationale], candidates: Sequence[Candidate]) -> list[Rationale]:
  """Drops rationales that are empty, have no verdict or ask for it twice, or whose verdict disagrees with the label."""
  label = {(c.problem_id, c.index): c.correct for c in candidates}
  out = []
  for r in rationales:
    if r.verdict is None:
      why = "no verdict"
    elif r.verdict != label[r.problem_id, r.candidate_index]:
      why = "verdict disagrees with the label"
    elif _QUESTION in r.text:
      why = "asks for the verdict more than once"
    elif not r.text:
      why = "empty"
    else:
      why = ""
    out.append(dataclasses.replace(r, kept=not why, why_dropped=why))
  return out


def ledger(rationales: Sequence[Rationale], candidates: Sequence[Candidate]) -> dict[str, Any]:
  """Counts by label: all, kept, and dropped by reason."""
  label = {(c.problem_id, c.index): c.correct for c in candidates}
  table: dict[str, collections.Counter[str]] = {"correct": collections.Counter(), "incorrect": collections.Counter()}
  for r in rationales:
    row = table["correct" if label[r.problem_id, r.candidate_index] else "incorrect"]
    row["all"] += 1
    row["kept" if r.kept else f"dropped: {r.why_dropped}"] += 1
  return {name: dict(sorted(row.items())) for name, row in table.items()}
