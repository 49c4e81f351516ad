"""Training rationales: written by a program or by graders, filtered, with a ledger of what was dropped."""

import collections
import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from genrm_jax.data import verdict_reading
from genrm_jax.records import Candidate, Problem, Rationale
from genrm_jax.text.prompts import RELEASED

LABELS = {True: "correct", False: "incorrect"}

DISAGREES = "verdict disagrees with the label"
ASKS_AGAIN = "asks for the verdict more than once"
EMPTY = "empty"
LEAK = "names the reference"

# How graders refer to the solution they were shown, in any case and markup: "**Expected Answer:**", "the expected
# steps", "Expected: 12". The words alone are no leak: a problem may be about an "expected profit".
_LEAK = re.compile(
  r"\bexpected[\s*_]*(?:final[\s*_]*)?(?:answer|solution|step|result|calculation|value)s?\b"
  r"|\bexpected(?: \w+)?(?:</?\w+>|[*_])*:|\breference (?:answer|solution)",
  re.IGNORECASE,
)


def by_program(
  problems: Sequence[Problem], candidates: Sequence[Candidate], write: Callable[[Problem, str], tuple[str, bool]]
) -> list[Rationale]:
  """One rationale per candidate from `write(problem, solution) -> (text, verdict)` (paper, section 3.3)."""
  problem_of = {p.id: p for p in problems}
  rationales = []
  for c in candidates:
    text, verdict = write(problem_of[c.problem_id], c.text)
    rationales.append(Rationale(c.problem_id, c.index, 0, text, verdict, "program", kept=True))
  return keep_agreeing(rationales, candidates)


@dataclasses.dataclass(frozen=True)
class Filter:
  """Turns a grader's raw text into a rationale for training, or says why not (paper, section 3.3 and appendix A).

  Attributes:
    reading: the reader of `verdict_reading.READERS` that finds the verdict.
    drop_leaks: whether rationales that name the reference solution are dropped. The authors kept them.
  """

  reading: str = verdict_reading.DEFAULT
  drop_leaks: bool = False

  def __post_init__(self) -> None:
    verdict_reading.get_reader(self.reading)

  @property
  def name(self) -> str:
    """A short name for tables."""
    return self.reading + ("+drop_leaks" if self.drop_leaks else "")

  def __call__(self, raw: Rationale, correct: bool) -> Rationale:
    """The rationale with its verdict, cut before the verdict question; kept if the verdict is the label `correct`."""
    text, verdict, why = verdict_reading.get_reader(self.reading)(raw.text)
    read = dataclasses.replace(raw, text=text, verdict=verdict)
    why = why or _why_dropped(read, correct) or (LEAK if self.drop_leaks and names_reference(text) else "")
    return dataclasses.replace(read, kept=not why, why_dropped=why)


def names_reference(text: str) -> bool:
  """Whether a rationale mentions a reference solution, which a verifier will not have."""
  return _LEAK.search(text) is not None


def from_graders(
  raw: Iterable[Rationale], candidates: Sequence[Candidate], keep: Filter | None = None
) -> list[Rationale]:
  """Applies the filter `keep` (None: the default one) to raw grader outputs, in order."""
  label, keep = _labels(candidates), keep or Filter()
  return [keep(r, label[r.problem_id, r.candidate_index]) for r in raw]


def keep_agreeing(rationales: Sequence[Rationale], candidates: Sequence[Candidate]) -> list[Rationale]:
  """Marks as dropped rationales that are empty, have no verdict, ask for it twice, or disagree with the label."""
  label = _labels(candidates)
  out = []
  for r in rationales:
    why = _why_dropped(r, label[r.problem_id, r.candidate_index])
    out.append(dataclasses.replace(r, kept=not why, why_dropped=why))
  return out


class Agreement:
  """How many of a solution's rationales there are, and how many of them have its label as their verdict."""

  def __init__(self, candidates: Sequence[Candidate]) -> None:
    self._label = _labels(candidates)
    self._counts: collections.Counter[tuple[str, int]] = collections.Counter()
    self._agreeing: collections.Counter[tuple[str, int]] = collections.Counter()

  def add(self, r: Rationale) -> None:
    """Counts a rationale, kept or not; one without a verdict does not agree. Those of other solutions do not count."""
    solution = r.problem_id, r.candidate_index
    self._counts[solution] += 1
    self._agreeing[solution] += r.verdict is not None and r.verdict is self._label.get(solution)

  def exceeds(self, share: float, candidate: Candidate) -> bool:
    """Whether more than this share of a solution's rationales agree (paper, appendix C: 1/2); 0 is always exceeded."""
    solution = candidate.problem_id, candidate.index
    return not share or self._agreeing[solution] > share * self._counts[solution]


def released_targets(rationale: str, verdict: bool) -> str:
  """A rationale, the verdict question and the verdict, as in the release's `critiques_*` files."""
  return rationale + RELEASED.render(RELEASED.conclude) + (RELEASED.yes if verdict else RELEASED.no)


def to_released(
  question: str, solution: str, rationale: str, verdict: bool, question_id: int, model_output_id: int
) -> dict[str, Any]:
  """A row in the format of the release's `critiques_*` files."""
  return {
    "inputs": RELEASED.render(RELEASED.solve, question=question) + solution + RELEASED.render(RELEASED.verify_cot),
    "targets": released_targets(rationale, verdict),
    "question_id": question_id,
    "model_output_id": model_output_id,
  }


class Ledger:
  """Counts filtered rationales by label: those kept, and those dropped by reason.

  `majority` counts the solutions of which more than half of the rationales agree with the label, and the rationales of
  these that are kept (paper, appendix C): what `min_agreement` 1/2 leaves to train GenRM-CoT on.
  """

  def __init__(self) -> None:
    self._rows: dict[str, _Row] = {name: _Row() for name in LABELS.values()}

  def add(self, rationale: Rationale, correct: bool) -> None:
    """Counts a rationale of a candidate with this label."""
    self._rows[LABELS[correct]].add(rationale, correct)

  def table(self) -> dict[str, dict[str, Any]]:
    """By label: counts, distinct problems and solutions, share of all rationales, lengths of the kept texts."""
    return {name: row.table(self._rows.values()) for name, row in self._rows.items()}

  def problems_with_both(self) -> dict[str, int]:
    """How many problems have rationales for correct and for incorrect solutions."""
    right, wrong = self._rows.values()
    return {
      name: len({p for p, _ in right.solutions(name)} & {p for p, _ in wrong.solutions(name)})
      for name in ("all", "kept")
    }


class _Row:
  """One label of a ledger."""

  def __init__(self) -> None:
    self.counts = collections.Counter({"all": 0, "kept": 0})
    self.of_solution: dict[tuple[str, int], list[int]] = {}  # its rationales: all, kept, agreeing
    self.characters: collections.Counter[int] = collections.Counter()

  def solutions(self, name: str) -> list[tuple[str, int]]:
    """The solutions with a rationale ("all"), or with one that is kept ("kept")."""
    return [solution for solution, (_, kept, _) in self.of_solution.items() if kept or name == "all"]

  def add(self, rationale: Rationale, correct: bool) -> None:
    counts = self.of_solution.setdefault((rationale.problem_id, rationale.candidate_index), [0, 0, 0])
    for at, counted in enumerate((True, rationale.kept, rationale.verdict is correct)):
      counts[at] += counted
    self.counts["all"] += 1
    if rationale.kept:
      self.counts["kept"] += 1
      self.characters[len(rationale.text)] += 1
    else:
      self.counts[f"dropped: {rationale.why_dropped}"] += 1

  def table(self, rows: Iterable["_Row"]) -> dict[str, Any]:
    totals = {name: sum(row.counts[name] for row in rows) for name in ("all", "kept")}
    found = {name: self.solutions(name) for name in ("all", "kept")}
    majority = [kept for num, kept, agreeing in self.of_solution.values() if 2 * agreeing > num]
    return {
      **dict(sorted(self.counts.items())),
      "solutions": {name: len(solutions) for name, solutions in found.items()},
      "problems": {name: len({p for p, _ in solutions}) for name, solutions in found.items()},
      "majority": {"solutions": len(majority), "kept": sum(majority)},
      "share": {name: round(self.counts[name] / n, 4) if n else None for name, n in totals.items()},
      "characters": length_statistics(self.characters),
    }


def length_statistics(counts: collections.Counter[int]) -> dict[str, int]:
  """Median, 90th percentile and maximum of lengths, given how often each occurs; {} if there are none.

  A percentile p is the smallest length that at least p% of the texts do not exceed.
  """
  total, seen = sum(counts.values()), 0
  found: dict[str, int] = {}
  for length in sorted(counts):
    seen += counts[length]
    for name, percent in (("median", 50), ("p90", 90), ("max", 100)):
      if 100 * seen >= percent * total:
        found.setdefault(name, length)
  return found


def ledger(rationales: Iterable[Rationale], candidates: Sequence[Candidate]) -> dict[str, dict[str, Any]]:
  """The table of a `Ledger` over these rationales."""
  label, book = _labels(candidates), Ledger()
  for r in rationales:
    book.add(r, label[r.problem_id, r.candidate_index])
  return book.table()


class Replay:
  """Applies several filters to the same raw rationales: one ledger per filter, and how each differs from the first."""

  def __init__(self, filters: Sequence[Filter], max_examples: int = 3) -> None:
    """Keeps `max_examples` per filter, label and kind of difference."""
    self.ledgers = {f.name: Ledger() for f in filters}
    self.examples: dict[tuple[str, str, str], list[tuple[Rationale, Rationale, Rationale]]] = {}
    self._filters, self._max_examples = tuple(filters), max_examples
    self._counts: dict[str, dict[str, collections.Counter[str]]] = {
      f.name: {name: collections.Counter() for name in LABELS.values()} for f in filters[1:]
    }

  def add(self, raw: Rationale, correct: bool) -> list[Rationale]:
    """Filters a rationale; returns the result of each filter, in order."""
    results = [f(raw, correct) for f in self._filters]
    for f, result in zip(self._filters, results, strict=True):
      self.ledgers[f.name].add(result, correct)
    for f, other in zip(self._filters[1:], results[1:], strict=True):
      for kind in _differences(results[0], other):
        self._counts[f.name][LABELS[correct]][kind] += 1
        examples = self.examples.setdefault((f.name, LABELS[correct], kind), [])
        if len(examples) < self._max_examples:
          examples.append((raw, results[0], other))
    return results

  def table(self) -> dict[str, dict[str, dict[str, int]]]:
    """Filter -> label -> kind of difference from the first filter -> number of rationales."""
    return {
      name: {label: dict(sorted(counts.items())) for label, counts in row.items()} for name, row in self._counts.items()
    }


def _differences(first: Rationale, other: Rationale) -> list[str]:
  kinds = []
  if first.verdict != other.verdict:
    words = {True: "Yes", False: "No", None: "none"}
    kinds.append(f"verdict {words[first.verdict]} -> {words[other.verdict]}")
  if first.kept != other.kept:
    kinds.append("kept -> dropped" if first.kept else "dropped -> kept")
  elif first.kept and first.text != other.text:
    kinds.append("kept with another text")
  return kinds


def _why_dropped(r: Rationale, correct: bool) -> str:
  if r.verdict is None:
    return verdict_reading.NO_VERDICT
  if r.verdict != correct:
    return DISAGREES
  if verdict_reading.QUESTION in r.text:
    return ASKS_AGAIN
  return "" if r.text else EMPTY


def _labels(candidates: Sequence[Candidate]) -> dict[tuple[str, int], bool]:
  return {(c.problem_id, c.index): c.correct for c in candidates}
