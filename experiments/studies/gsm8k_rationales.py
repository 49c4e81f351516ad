"""What the filter of rationales does to the raw pool that the paper's authors released, and how that compares.

    python -m experiments.studies.gsm8k_rationales --data_dir=DIR [--rounds=0,1,2,3] [--out=FILE]

DIR holds a clone of genrm-star/genrm-critiques. Told are the ledger of each filter (a reading of verdicts, with and
without dropping rationales that name the reference), where the filters differ from the first on the same texts, and how
what the first keeps looks beside the released validation files of the CoT set. The pool is read once, as a stream.
"""

import argparse
import collections
import re
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

from genrm_jax.data import jsonl as store
from genrm_jax.data import rationales, verdict_reading
from genrm_jax.data.rationales import LABELS, Filter
from genrm_jax.records import Rationale
from genrm_jax.runtime.errors import UserError, one_message
from genrm_jax.runtime.progress import say
from genrm_jax.tasks.gsm8k.problems import problem_key
from genrm_jax.tasks.gsm8k.rows import BadRows, CritiqueRow, PoolRow, iter_critiques, iter_pool
from genrm_jax.text.prompts import RELEASED

FILTERS = (
  Filter("lenient-2"),
  Filter("lenient-2", drop_leaks=True),
  Filter("lenient-1"),
  Filter("lenient-1", drop_leaks=True),
  Filter("exact-1"),
  Filter("exact-1", drop_leaks=True),
)
_ASK = RELEASED.verdict_question
_SAY_EVERY = 20_000  # rows
_SHOWN = 160  # characters of an example, from its end


class Shape:
  """Where things stand in the targets of a CoT set, and how long they are."""

  def __init__(self) -> None:
    self._counts: dict[str, collections.Counter[str]] = {name: collections.Counter() for name in LABELS.values()}
    self._characters: dict[str, collections.Counter[int]] = {name: collections.Counter() for name in LABELS.values()}

  def add(self, targets: str, correct: bool) -> None:
    """Counts a row of the set."""
    body, asked, end = targets.rpartition(_ASK)
    last_line = (body.strip().splitlines() or [""])[-1]
    seen = {
      "ends in the verdict question and the verdict": bool(asked) and end in (RELEASED.yes, RELEASED.no),
      "verdict is the label": end == (RELEASED.yes if correct else RELEASED.no),
      "question on a line of its own": body[-1:] in ("\n", ""),
      "empty line before the question": body.endswith("\n\n"),
      "heading 'Final Grade' before the question": bool(re.search(r"\bfinal grade\W*$", last_line, re.IGNORECASE)),
      "question asked before": verdict_reading.QUESTION in body,
      "starts with a line break": targets[:1] == "\n",
      "starts with a heading 'Verification:'": bool(
        re.match(r"\s*(?:\*\*|<b>)?Verification(?:\*\*|</b>|:)*\n", targets)
      ),
      "starts with a heading 'Solution Verification'": bool(re.match(r"\W*(?:b>)?Solution Verification", targets)),
      "names the reference": rationales.names_reference(targets),
    }
    self._counts[LABELS[correct]].update({"rows": 1, **{name: int(value) for name, value in seen.items()}})
    self._characters[LABELS[correct]][len(targets)] += 1

  def table(self) -> dict[str, dict[str, Any]]:
    """For each label: the number of rows, shares of these, and lengths in characters."""
    table = {}
    for label, counts in self._counts.items():
      n = counts["rows"]
      shares = {name: round(count / n, 4) for name, count in counts.items() if name != "rows"}
      table[label] = {"rows": n, **shares, "characters": rationales.length_statistics(self._characters[label])}
    return table


class Search:
  """Looks for the released rationales in the raw pool."""

  def __init__(self, released: Iterable[CritiqueRow]) -> None:
    self._wanted: dict[str, list[tuple[str, str, bool]]] = {}
    for row in released:
      solution, body = _folded(row.solution), _folded(row.rationale.rpartition(_ASK)[0])
      self._wanted.setdefault(problem_key(row.question), []).append((solution, body, row.correct))
    self._found: dict[str, set[tuple[str, int]]] = {
      name: set() for name in ("problem in the pool", "solution in the pool", "rationale in the pool")
    }

  def add(self, row: PoolRow) -> None:
    """Compares a row of the pool with the released rationales for its problem; white space is folded."""
    key = problem_key(row.question)
    for i, (solution, body, _) in enumerate(self._wanted.get(key, ())):
      self._found["problem in the pool"].add((key, i))
      if solution == _folded(row.solution):
        self._found["solution in the pool"].add((key, i))
      if body in _folded(row.rationale):
        self._found["rationale in the pool"].add((key, i))

  def table(self) -> dict[str, dict[str, int]]:
    """For each label: how many released rationales there are, and of how many what was found."""
    places = {(key, i): row[2] for key, rows in self._wanted.items() for i, row in enumerate(rows)}
    return {
      name: {
        "rows": sum(label == correct for label in places.values()),
        **{what: sum(places[place] == correct for place in found) for what, found in self._found.items()},
      }
      for correct, name in LABELS.items()
    }


class Numbers:
  """Rows of the pool as records: problems are numbered as they come, solutions known by their text."""

  def __init__(self) -> None:
    self._ids: dict[str, str] = {}

  def record(self, row: PoolRow) -> Rationale:
    """The raw rationale of a row; its source is the place of the row."""
    problem = self._ids.setdefault(problem_key(row.question), str(len(self._ids)))
    solution = zlib.crc32(row.solution.encode())
    return Rationale(problem, solution, row.round, row.rationale, None, str(row.place), kept=True)


def measure(rows: Iterable[PoolRow], released: Sequence[CritiqueRow]) -> tuple[dict[str, Any], rationales.Replay]:
  """Everything that is written down, and the replay with its examples."""
  numbers, replay, search = Numbers(), rationales.Replay(FILTERS), Search(released)
  ours, theirs = Shape(), Shape()
  for critique in released:
    theirs.add(critique.rationale, critique.correct)
  count = 0
  for count, row in enumerate(rows, start=1):
    first = replay.add(numbers.record(row), row.correct)[0]
    search.add(row)
    if first.kept:
      ours.add(rationales.released_targets(first.text, row.correct), row.correct)
    if count % _SAY_EVERY == 0:
      say(f"{count:,} rationales read")
  found = {
    "rationales": count,
    "ledgers": {n: {**b.table(), "problems_with_both": b.problems_with_both()} for n, b in replay.ledgers.items()},
    f"differences from {FILTERS[0].name}": replay.table(),
    "released_validation": {"ours": ours.table(), "theirs": theirs.table(), "theirs in the pool": search.table()},
  }
  return found, replay


def show(found: dict[str, Any], replay: rationales.Replay) -> None:
  """Prints the tables, and the examples, which stay out of the file: they are the release's texts."""
  for name, table in found["ledgers"].items():
    print(f"\nledger of {name}; problems with both labels: {table['problems_with_both']}")
    for label in LABELS.values():
      print(f"  {label}: {_in_words(table[label])}")
  print(f"\nwhat differs from {FILTERS[0].name}")
  for name, table in replay.table().items():
    for label, counts in table.items():
      print(f"  {name}, {label}: {_in_words(counts)}")
  for (name, label, kind), examples in replay.examples.items():
    print(f"\n{name}, {label}: {kind}")
    for raw, first, other in examples:
      print(f"  {raw.source}; {_outcome(first)} -> {_outcome(other)}")
      print(f"    raw text ends in {raw.text[-_SHOWN:]!r}")
  print("\nthe CoT set made from this pool, and the released validation files")
  for who, table in found["released_validation"].items():
    for label, counts in table.items():
      print(f"  {who}, {label}: {_in_words(counts)}")


def _in_words(counts: dict[str, Any]) -> str:
  return "; ".join(f"{name} {count}" for name, count in counts.items())


def _outcome(r: Rationale) -> str:
  return "kept" if r.kept else r.why_dropped


def _folded(text: str) -> str:
  return " ".join(text.split())


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--data_dir", required=True, help="the folder with the clone of genrm-critiques")
  parser.add_argument("--rounds", default="0,1,2,3", help="which of the four rationales of a solution")
  parser.add_argument("--out", default="results/gsm8k/rationales.json", help="where the figures are written")
  args = parser.parse_args()
  with one_message():
    rounds = _numbers(args.rounds)
    bad = BadRows()
    released = list(iter_critiques(data_dir=args.data_dir, split="val", bad=bad))
    found, replay = measure(iter_pool(data_dir=args.data_dir, rounds=rounds, bad=bad), released)
    show(found, replay)
    read = bad.to_dict()
    print(f"\nrows read {read['rows']}, left out {read['left_out']}")
    store.write_json(args.out, {"rounds": rounds, "rows_left_out": read["left_out"], **found})
    say(f"figures: {args.out}")


def _numbers(text: str) -> list[int]:
  if not re.fullmatch(r"\d+(,\d+)*", text):
    raise UserError(f"--rounds is {text!r}, expected numbers with commas between them, as in 0,1,2,3")
  return [int(n) for n in text.split(",")]


if __name__ == "__main__":
  main()
