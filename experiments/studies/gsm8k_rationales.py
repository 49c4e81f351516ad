"""What our rationale filters keep of the raw pool that the paper's authors released, compared with their own set.

    python -m experiments.studies.gsm8k_rationales --data_dir=DIR [--rounds=0,1,2,3] [--out=FILE]

DIR holds a clone of genrm-star/genrm-critiques. Reports the ledger of each filter (a reading of verdicts, with or
without dropping rationales that name the reference), how the filters differ from the first one on the same texts, and
how the rationales kept by the first compare with the released validation files of the CoT set. Streams the pool once.
"""

import argparse
import collections
import re
import zlib
from collections.abc import Iterable, Sequence
from os.path import expanduser
from typing import Any

from genrm_jax.data import jsonl, rationales, verdict_reading
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
_VERDICT_QUESTION = RELEASED.verdict_question
_REPORT_EVERY = 20_000  # rows
_SHOWN = 160  # last characters of an example


class TargetStatistics:
  """Structure and length of the targets of a CoT set."""

  def __init__(self) -> None:
    self._counts: dict[str, collections.Counter[str]] = {name: collections.Counter() for name in LABELS.values()}
    self._characters: dict[str, collections.Counter[int]] = {name: collections.Counter() for name in LABELS.values()}

  def add(self, targets: str, correct: bool) -> None:
    """Counts one row of the set."""
    body, question, end = targets.rpartition(_VERDICT_QUESTION)
    last_line = (body.strip().splitlines() or [""])[-1]
    seen = {
      "ends in the verdict question and the verdict": bool(question) and end in (RELEASED.yes, RELEASED.no),
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
    """By label: number of rows, shares of these, and lengths in characters."""
    table = {}
    for label, counts in self._counts.items():
      n = counts["rows"]
      shares = {name: round(count / n, 4) for name, count in counts.items() if name != "rows"}
      table[label] = {"rows": n, **shares, "characters": rationales.length_statistics(self._characters[label])}
    return table


class PoolSearch:
  """Searches the raw pool for the released rationales."""

  def __init__(self, released: Iterable[CritiqueRow]) -> None:
    self._wanted: dict[str, list[tuple[str, str, bool]]] = {}
    for row in released:
      solution, body = _folded(row.solution), _folded(row.rationale.rpartition(_VERDICT_QUESTION)[0])
      self._wanted.setdefault(problem_key(row.question), []).append((solution, body, row.correct))
    self._found: dict[str, set[tuple[str, int]]] = {
      name: set() for name in ("problem in the pool", "solution in the pool", "rationale in the pool")
    }

  def add(self, row: PoolRow) -> None:
    """Compares a row of the pool with the released rationales for its problem, ignoring differences in white space."""
    key = problem_key(row.question)
    for i, (solution, body, _) in enumerate(self._wanted.get(key, ())):
      self._found["problem in the pool"].add((key, i))
      if solution == _folded(row.solution):
        self._found["solution in the pool"].add((key, i))
      if body in _folded(row.rationale):
        self._found["rationale in the pool"].add((key, i))

  def table(self) -> dict[str, dict[str, int]]:
    """By label: the number of released rationales, and for how many of them the pool has what was searched for."""
    labels = {(key, i): row[2] for key, rows in self._wanted.items() for i, row in enumerate(rows)}
    return {
      name: {
        "rows": sum(label == correct for label in labels.values()),
        **{what: sum(labels[place] == correct for place in places) for what, places in self._found.items()},
      }
      for correct, name in LABELS.items()
    }


class RecordMaker:
  """Rows of the pool as records: problems are numbered in order of appearance, solutions by a hash of their text."""

  def __init__(self) -> None:
    self._ids: dict[str, str] = {}

  def record(self, row: PoolRow) -> Rationale:
    """The raw rationale of a row, with the place of the row as its source."""
    problem = self._ids.setdefault(problem_key(row.question), str(len(self._ids)))
    solution = zlib.crc32(row.solution.encode())
    return Rationale(problem, solution, row.round, row.rationale, None, str(row.place), kept=True)


def measure(rows: Iterable[PoolRow], released: Sequence[CritiqueRow]) -> tuple[dict[str, Any], rationales.Replay]:
  """The results as JSON values, and the replay with its examples."""
  records, replay, search = RecordMaker(), rationales.Replay(FILTERS), PoolSearch(released)
  ours, theirs = TargetStatistics(), TargetStatistics()
  for critique in released:
    theirs.add(critique.rationale, critique.correct)
  count = 0
  for count, row in enumerate(rows, start=1):
    first = replay.add(records.record(row), row.correct)[0]
    search.add(row)
    if first.kept:
      ours.add(rationales.released_targets(first.text, row.correct), row.correct)
    if count % _REPORT_EVERY == 0:
      say(f"{count:,} rationales read")
  results = {
    "rationales": count,
    "ledgers": {n: {**b.table(), "problems_with_both": b.problems_with_both()} for n, b in replay.ledgers.items()},
    f"differences from {FILTERS[0].name}": replay.table(),
    "released_validation": {"ours": ours.table(), "theirs": theirs.table(), "theirs in the pool": search.table()},
  }
  return results, replay


def show(results: dict[str, Any], replay: rationales.Replay) -> None:
  """Prints the tables and the examples; the latter are texts of the release and are not written to the file."""
  for name, table in results["ledgers"].items():
    print(f"\nledger of {name}; problems with both labels: {table['problems_with_both']}")
    for label in LABELS.values():
      print(f"  {label}: {_in_words(table[label])}")
  print(f"\ndifferences from {FILTERS[0].name}")
  for name, table in replay.table().items():
    for label, counts in table.items():
      print(f"  {name}, {label}: {_in_words(counts)}")
  for (name, label, kind), examples in replay.examples.items():
    print(f"\n{name}, {label}: {kind}")
    for raw, first, other in examples:
      print(f"  {raw.source}; {_outcome(first)} -> {_outcome(other)}")
      print(f"    raw text ends in {raw.text[-_SHOWN:]!r}")
  print("\nthe CoT set made from this pool, and the released validation files")
  for who, table in results["released_validation"].items():
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
  parser.add_argument("--data_dir", type=expanduser, required=True, help="folder with the clone of genrm-critiques")
  parser.add_argument("--rounds", default="0,1,2,3", help="which of the four rationales per solution, comma-separated")
  parser.add_argument(
    "--out",
    type=expanduser,
    default="results/gsm8k/rationales.json",
    help="file to write the results to, as JSON",
  )
  args = parser.parse_args()
  with one_message():
    rounds = _numbers(args.rounds)
    bad = BadRows()
    released = list(iter_critiques(data_dir=args.data_dir, split="val", bad=bad))
    results, replay = measure(iter_pool(data_dir=args.data_dir, rounds=rounds, bad=bad), released)
    show(results, replay)
    rows = bad.to_dict()
    print(f"\nrows read {rows['rows']}, left out {rows['left_out']}")
    jsonl.write_json(args.out, {"rounds": rounds, "rows_left_out": rows["left_out"], **results})
    say(f"results: {args.out}")


def _numbers(text: str) -> list[int]:
  if not re.fullmatch(r"\d+(,\d+)*", text):
    raise UserError(f"--rounds={text}: give numbers separated by commas, as in 0,1,2,3")
  return [int(n) for n in text.split(",")]


if __name__ == "__main__":
  main()
