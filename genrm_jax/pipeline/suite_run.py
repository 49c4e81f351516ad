"""Measures a verifier on a suite: reads the rows, scores each distinct solution, writes the figures.

The solutions go through `score_file`, in OUT.parts, so that a run that was killed resumes where it was.
"""

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from genrm_jax.data import jsonl
from genrm_jax.data.suites import reading
from genrm_jax.data.suites.suites import Suite
from genrm_jax.evals import scored_rows
from genrm_jax.evals.scored_rows import ScoredRows, SuiteRow
from genrm_jax.evals.tables import number, percent
from genrm_jax.pipeline import score_file
from genrm_jax.pipeline.trained import TrainedVerifier
from genrm_jax.runtime import files
from genrm_jax.runtime.errors import UserError
from genrm_jax.runtime.progress import say
from genrm_jax.text.json_lines import iter_objects

PathLike = str | os.PathLike[str]


def run(
  name: str,
  data: Sequence[PathLike],
  load: Callable[[], TrainedVerifier],
  checkpoint: str,
  out: PathLike | None = None,
  num_votes: int | None = None,
) -> dict[str, Any]:
  """Measures, writes and returns the results.

  Args:
    name: of the suite.
    data: files or folders with its rows, as the authors publish them.
    load: opens the verifier, once the rows have been found to be readable.
    checkpoint: its name in the results.
    out: a folder for results.json, report.md and scores.jsonl; None: nothing is kept.
    num_votes: per solution; None for what the checkpoint says.

  Raises:
    UserError: no such suite, rows that cannot be read, an `out` that is not empty, or as `score_file.score_file`.
  """
  suite = reading.suite_of(name)
  target = None if out is None else epath.Path(out)
  parts = None if target is None else target.parent / f"{target.name}.parts"
  if target is not None and parts is not None:
    with files.named(target, "read"):
      if target.exists() and not parts.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target}: exists already and is not empty; give another --out, or remove it")
  found = reading.read(suite, data)
  if parts is None:
    with tempfile.TemporaryDirectory() as folder:
      scores, trained = _scores(found.rows, epath.Path(folder), load, num_votes)
  else:
    scores, trained = _scores(found.rows, parts, load, num_votes)
  about = {
    "suite": suite.name,
    "about": suite.about,
    "data": [os.fspath(path) for path in data],
    "checkpoint": checkpoint,
    "verifier": trained.verifier.name,
    "step": trained.step,
    "num_votes": trained.verifier.num_votes(trained.how.num_votes if num_votes is None else num_votes),
    "rows": len(found.rows),
    "repeated_rows_left_out": found.num_repeated,
  }
  results = about | measure(suite, found.rows, scores, not trained.verifier.is_likelihood)
  if target is not None and parts is not None:
    _write(target / "scores.jsonl", (parts / "scores.jsonl").read_bytes())
    _write(target / "report.md", markdown(results).encode())
    jsonl.write_json(target / "results.json", results)
    with files.named(parts, "written"):
      parts.rmtree()
    say(f"{target}: results.json, report.md, scores.jsonl")
  return results


def _write(path: epath.Path, data: bytes) -> None:
  with files.atomic_writer(path, every_process=True) as write:
    write(data)


Scores = Mapping[tuple[str, str], float | None]


def _scores(
  rows: Sequence[SuiteRow], folder: epath.Path, load: Callable[[], TrainedVerifier], num_votes: int | None
) -> tuple[Scores, TrainedVerifier]:
  """The score of each distinct (question, solution), and the verifier; files of `folder` are made or resumed."""
  pairs = dict.fromkeys((s.question, s.text) for row in rows for s in row.solutions)
  if not any(text.strip() for _, text in pairs):
    raise UserError("all solutions are empty; check --data")
  trained = load()
  lines = [json.dumps({"question": q, "solution": s}, ensure_ascii=False).encode() for q, s in pairs]
  source, out = folder / "solutions.jsonl", folder / "scores.jsonl"
  _write(source, b"\n".join(lines) + b"\n")
  if out.exists() and not (folder / "scores.jsonl.parts").exists():
    out.unlink()  # of which verifier, is not known
  score_file.score_file(score_file.Job(source, out, "simple", num_votes=num_votes), lambda: trained)
  return {(row["question"], row["solution"]): row["genrm_score"] for row, _ in iter_objects(out)}, trained


def measure(suite: Suite, rows: Sequence[SuiteRow], scores: Scores, is_probability: bool) -> dict[str, Any]:
  """The figures of a suite from scores by (question, solution), None where there is none.

  Returns:
    figures: by measure and group, as `scored_rows.summaries`; none that need a probability if the score is none.
    verification: as `scored_rows.verification`.
    rates: by tag, its value, and rate, as `scored_rows.summaries`.
  """
  values = [np.array([scores[s.question, s.text] for s in row.solutions], float) for row in rows]  # None -> NaN
  scored = ScoredRows(rows, values)
  figures = suite.figures(scored) if is_probability or not suite.needs_probability else {}
  flat = {(measure, group): figure for measure, groups in figures.items() for group, figure in groups.items()}
  found = scored_rows.summaries(scored, {**flat, **scored_rows.rates(scored, is_probability)})
  results: dict[str, Any] = {"figures": {}, "verification": scored_rows.verification(scored, is_probability)}
  results["rates"] = {}
  for key, summary in found.items():
    if key in flat:
      results["figures"].setdefault(key[0], {})[key[1]] = summary
    else:
      tag, value, rate = key
      kept = {name: summary[name] for name in ("value", "low", "high")}
      results["rates"].setdefault(tag, {}).setdefault(value, {})[rate] = kept
  return results


# The report.


def markdown(results: Mapping[str, Any]) -> str:
  """The results as tables."""
  counts = results["verification"]
  lines = [f"# {results['suite']}: {results['verifier']}", "", results["about"], ""]
  lines += [
    f"{results['rows']} rows, {counts['solutions']} distinct solutions ({counts['correct']} labelled correct,"
    f" {counts['scored']} scored) to {counts['problems']} problems. Checkpoint {results['checkpoint']}, step"
    f" {results['step']}, votes per solution: {results['num_votes']}. Percent, with 95% intervals over problems. A row"
    " without all its scores counts against the verifier; the column of scored rows leaves it out.",
    "",
  ]
  if results["repeated_rows_left_out"]:
    lines += [f"{results['repeated_rows_left_out']} rows repeat the id of an earlier one and were left out.", ""]
  if results["figures"]:
    rows = [
      (name, group, percent(f), _percent(f["value_of_scored"]), f"{f['scored_rows']}/{f['rows']}")
      for name, groups in results["figures"].items()
      for group, f in groups.items()
    ]
    lines += _table(("figure", "group", "percent", "of scored rows", "scored rows"), 2, rows)
  else:
    lines += [
      "The score is a likelihood, which only ranks solutions to one problem: no figure at the threshold 0.5.",
      "",
    ]
  within = f"AUC within the {counts['problems_with_both_labels']} problems with both labels"
  verification = [(within, number(counts["auc_within_problems"])), ("AUC, overall", number(counts["auc"]))]
  if "brier" in counts:
    verification += [("ECE, ten bins", _number(counts["ece"])), ("Brier score", number(counts["brier"]))]
  verification.append(("Coverage, percent", percent(counts["coverage"])))
  lines += _table(("solutions", "figure"), 1, verification)
  names = {"true_positive_rate": "true positives", "true_negative_rate": "true negatives", "coverage": "coverage"}
  shown = [name for name in names if name in results["rates"]["all"]["all"]]
  rows = [
    (tag, value, *(percent(of[name]) for name in shown))
    for tag, values in results["rates"].items()
    for value, of in values.items()
  ]
  lines += _table(("by", "value", *(names[name] for name in shown)), 2, rows)
  return "\n".join(lines)


def _percent(value: float | None) -> str:
  return "–" if value is None else f"{100 * value:.1f}"


def _number(value: float | None) -> str:
  return "–" if value is None else f"{value:.3f}"


def _table(header: Sequence[str], num_text_columns: int, rows: Sequence[Sequence[str]]) -> list[str]:
  rule = ["---"] * num_text_columns + ["---:"] * (len(header) - num_text_columns)
  cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
  return [f"| {' | '.join(row)} |" for row in (header, rule, *cells)] + [""]
