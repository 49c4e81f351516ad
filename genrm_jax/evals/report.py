"""The report of an evaluation: every figure with its interval, tables, plots, and one page to browse.

`build_results` computes, `write_report` writes; between them is a plain dict that survives a JSON round trip.
"""

import dataclasses
import itertools
import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from genrm_jax.evals import calibration, lengths, metrics, pages, per_problem, plots, selection
from genrm_jax.evals import costs as costing
from genrm_jax.evals.browse import FOOLED, MISSED, TYPICAL, Example, pick_examples
from genrm_jax.records import VOTE_STATES, Candidate, Problem, Score
from genrm_jax.runtime.errors import UserError

SCHEMA_VERSION = 1
_SAME_VALUE = 1e-4  # a value that was averaged in another precision is still the mean of its votes
_LINE = 100  # characters of JSON that may stand on one line of results.json
_SAMPLES = 12
BASELINES = ("pass1", "self_consistency", "oracle")


def build_results(
  problems: Sequence[Problem],
  candidates: Sequence[Candidate],
  scores: Mapping[str, Sequence[Score]],
  *,
  ns: Sequence[int],
  ks: Sequence[int],
  seed: int,
  meta: Mapping[str, Any],
  costs: costing.Costs | None = None,
) -> dict[str, Any]:
  """Everything the report says, as a dict that JSON can hold. Figures are shares in [0, 1], None where undefined.

  Differences, curves over votes and rules are at the largest of `ns`. The caller may add three parts that the report
  shows too: "in_distribution" (the results of a second split, by this function), "generation" (`generation_results`
  by verifier) and "samples" (`sample_records`).

  Args:
    problems: the evaluation split.
    candidates: of these problems; pools may differ in size, and one smaller than n is used whole.
    scores: by verifier, one for each candidate.
    ns: numbers of candidates to choose from.
    ks: numbers of votes; a verifier's curve has those it has votes for, and all of its votes.
    seed: of the bootstrap and of the subsets that majority votes are averaged over.
    meta: what the run was: task, model, seed, config_hash, train_steps, wall_seconds (by stage), notes (a list), ...
    costs: lengths in tokens and model sizes, for accuracy against cost; None where they were not measured.

  Raises:
    UserError: see `select.make_bank`, `metrics.align_scores` and `costs.line_up`; an n no pool can serve; a bad name.
  """
  if not ns or any(k < 1 for k in ks):
    raise UserError(f"ns={list(ns)}, ks={list(ks)}: give at least one n, and only positive numbers of votes")
  for name in scores:
    if name in BASELINES or "/" in name:
      raise UserError(f"verifier {name!r}: a verifier's name has no '/' and is none of {', '.join(BASELINES)}")
  bank = selection.make_bank(problems, candidates)
  ns, top = sorted(set(ns)), max(ns)
  tables = {name: metrics.align_scores(bank, name, listed) for name, listed in scores.items()}
  curves = _curves(bank, tables, ns, seed)
  pass1 = selection.pass_at_1(bank)
  measured = costing.line_up(bank, candidates, list(tables), costs) if costs else None
  lengths_PC, unit = (measured.solution, "tokens") if measured else (lengths.characters(bank), "characters")

  # All quantities are gathered first and resampled together.
  quantities = {"pass1": metrics.mean(pass1)}
  for method, by_n in curves.items():
    quantities |= {f"{method}/n={n}": metrics.mean(accuracy) for n, accuracy in by_n.items()}
  for name, table in tables.items():
    against = {"pass1": pass1, "self_consistency": curves["self_consistency"][top]}
    against |= {"orm": curves["orm"][top]} if "orm" in tables and name != "orm" else {}
    own = curves[name][top]
    quantities |= {f"{name}/minus/{other}": metrics.mean(own - accuracy) for other, accuracy in against.items()}
    quantities |= {f"{name}/{key}": make(bank, table.values) for key, make in _VERIFICATION.items()}
    quantities |= _vote_quantities(bank, table, ks, top)
    more = lengths.length_quantities(bank, table.values, lengths_PC)
    if name not in calibration.LIKELIHOODS:
      more |= calibration.reliability_quantities(bank, table.values)
    quantities |= {f"{name}/{key}": quantity for key, quantity in more.items()}
  found = {name: dataclasses.asdict(it) for name, it in metrics.intervals(quantities, seed=seed).items()}

  results = {
    "schema": SCHEMA_VERSION,
    "meta": dict(meta),
    "seed": seed,
    "num_problems": len(bank.problems),
    "num_candidates": int(bank.sizes.sum()),
    "share_correct": int(bank.correct.sum()) / int(bank.sizes.sum()),
    "pool_sizes": [int(bank.sizes.min()), int(bank.sizes.max())],
    "ns": ns,
    "interval": {"level": metrics.LEVEL, "draws": metrics.BOOTSTRAP_DRAWS, "over": "problems"},
    "notes": _notes(bank, ns, tables),
    "pass1": found["pass1"],
    "curves": {method: [{"n": n, **found[f"{method}/n={n}"]} for n in ns] for method in curves},
    "verifiers": {name: _verifier_results(bank, table, found, seed) for name, table in tables.items()},
    "length": lengths.bins_results(bank, lengths_PC, unit),
  }
  if costs and measured:
    votes = {name: _vote_counts(table, ks) for name, table in tables.items()}
    results["costs"] = costing.cost_results(bank, tables, measured, costs, ns, votes, found)
  results["metrics"] = _flat_metrics(results)
  results["per_problem"] = per_problem.record(quantities, top)
  return _plain(results)


_VERIFICATION: dict[str, Callable[[selection.Bank, np.ndarray], metrics.Quantity]] = {
  "rm_accuracy": metrics.rm_accuracy,
  "balanced_rm_accuracy": metrics.balanced_rm_accuracy,
  "auc_within_problems": metrics.auc_within,
  "brier": metrics.brier,
}


def _curves(
  bank: selection.Bank, tables: Mapping[str, metrics.ScoreTable], ns: Sequence[int], seed: int
) -> dict[str, dict[int, np.ndarray]]:
  """Accuracy of each problem by method and n: the Oracle, self-consistency, each verifier, each as weights."""
  weighted = {name: f"weighted_self_consistency/{name}" for name in tables}
  curves: dict[str, dict[int, np.ndarray]] = {
    method: {} for method in ("oracle", "self_consistency", *tables, *weighted.values())
  }
  for n in ns:
    subsets = selection.draw_subsets(bank, n, seed=seed)
    curves["oracle"][n] = selection.oracle(bank, n)
    curves["self_consistency"][n] = selection.self_consistency(bank, subsets)
    for name, table in tables.items():
      curves[name][n] = selection.best_of_n(bank, table.values, n)
      curves[weighted[name]][n] = selection.self_consistency(bank, subsets, table.values)
  return curves


def _vote_counts(table: metrics.ScoreTable, ks: Sequence[int]) -> list[int]:
  """The numbers of votes of a verifier's curve, its largest too; none for a verifier of one vote."""
  return sorted({k for k in ks if k < table.num_votes} | {table.num_votes}) if table.num_votes > 1 else []


def _vote_quantities(
  bank: selection.Bank, table: metrics.ScoreTable, ks: Sequence[int], n: int
) -> dict[str, metrics.Quantity]:
  """Best-of-n, verification accuracy and share of scored candidates, by votes and by rule; {} for one vote."""
  quantities = {}
  for k in _vote_counts(table, ks):
    groups = metrics.values_of_k_votes(table, k)
    chosen = np.mean([selection.best_of_n(bank, values, n) for values in groups], axis=0)
    quantities[f"{table.verifier}/k={k}/accuracy"] = metrics.mean(chosen)
    for key, make in (("rm_accuracy", metrics.rm_accuracy), ("scored", metrics.scored_share)):
      over, under = np.sum([make(bank, values).parts[0] for values in groups], axis=0)
      quantities[f"{table.verifier}/k={k}/{key}"] = metrics.Quantity(((over, under),))
  for rule in metrics.RULES if quantities else ():
    values = metrics.vote_values(table, rule)
    quantities[f"{table.verifier}/rule={rule}/accuracy"] = metrics.mean(selection.best_of_n(bank, values, n))
    quantities[f"{table.verifier}/rule={rule}/rm_accuracy"] = metrics.rm_accuracy(bank, values)
    quantities[f"{table.verifier}/rule={rule}/scored"] = metrics.scored_share(bank, values)
  return quantities


def _verifier_results(
  bank: selection.Bank, table: metrics.ScoreTable, found: Mapping[str, Any], seed: int
) -> dict[str, Any]:
  """The part of the results that is about one verifier."""

  def under(prefix: str) -> dict[str, Any]:
    start = f"{table.verifier}/{prefix}"
    return {name.removeprefix(start): it for name, it in found.items() if name.startswith(start)}

  def by(prefix: str) -> dict[str, dict[str, Any]]:
    nested: dict[str, dict[str, Any]] = {}
    for name, it in under(prefix).items():
      key, _, figure = name.rpartition("/")
      nested.setdefault(key, {})[figure] = it
    return nested

  states, num_votes = table.states, int((table.states >= 0).sum())
  return {
    "step": table.step,
    "verification": {key: found[f"{table.verifier}/{key}"] for key in _VERIFICATION}
    | {
      "auc_overall": dataclasses.asdict(metrics.auc_overall(bank, table.values, seed=seed)),
      "ece": metrics.expected_calibration_error(bank, table.values),
      "threshold": metrics.THRESHOLD,
    },
    "minus": under("minus/"),
    "coverage": {
      "candidates": int(bank.mask.sum()),
      "scored": int((~np.isnan(table.values) & bank.mask).sum()),
      "votes": num_votes,
      "votes_per_candidate": table.num_votes,
      "states": {state: int((states == index).sum()) for index, state in enumerate(VOTE_STATES)},
      "tokens_per_vote": int(table.tokens.sum()) / num_votes if num_votes else None,
    },
    "length": lengths.length_results(under("")),
    "ties": calibration.ties(bank, table.values),
    "by_votes": [{"k": int(k), **figures} for k, figures in by("k=").items()],
    "by_rule": [{"rule": rule, **figures} for rule, figures in by("rule=").items()],
  } | (
    {}
    if table.verifier in calibration.LIKELIHOODS
    else {"reliability": calibration.reliability(bank, table.values, under(""))}
  )


def _notes(bank: selection.Bank, ns: Sequence[int], tables: Mapping[str, metrics.ScoreTable]) -> list[str]:
  """What a reader must know to read the figures right."""
  notes = [
    "Intervals are percentile bootstraps over problems; they do not cover other training seeds or other candidates.",
    "Best-of-N, Oracle and pass@1 are exact expectations over all subsets of n candidates, ties broken at random;"
    f" majority votes average over all subsets where a problem has at most {selection.SUBSET_DRAWS}, else over that"
    " many random ones.",
  ]
  for n in ns:
    if short := int((bank.sizes < n).sum()):
      notes.append(f"At n={n}, {short} of {len(bank.sizes)} problems have fewer candidates and use all they have.")
  for name, table in tables.items():
    if missing := int((np.isnan(table.values) & bank.mask).sum()):
      notes.append(
        f"{name}: {missing} of {int(bank.mask.sum())} candidates have no score. They rank below all others in"
        " Best-of-N, weigh 0 in votes, and are not in the verification figures."
      )
    apart = np.nan_to_num(np.abs(metrics.vote_values(table, metrics.RULES[0]) - table.values)).max()
    if apart > _SAME_VALUE:
      notes.append(
        f"{name}: recorded values differ by up to {apart:.3g} from the mean over ok and forced votes. Figures by votes"
        " and by rule are of the votes, all others of the recorded values."
      )
  return notes


def _flat_metrics(results: Mapping[str, Any]) -> dict[str, float | None]:
  """The figures by the names that a metrics file or a dashboard uses."""
  flat: dict[str, float | None] = {"eval/pass1": results["pass1"]["value"]}
  for method, points in results["curves"].items():
    flat |= {f"bon/{method}/n={point['n']}/accuracy": point["value"] for point in points}
  for name, verifier in results["verifiers"].items():
    checks = verifier["verification"]
    flat |= {f"eval/{name}/{key}": checks[key]["value"] for key in (*_VERIFICATION, "auc_overall")}
    flat[f"eval/{name}/ece"] = checks["ece"]
    for point in verifier["by_votes"]:
      flat |= {f"votes/{name}/k={point['k']}/{key}": point[key]["value"] for key in ("accuracy", "rm_accuracy")}
  return flat


def _plain(value: Any) -> Any:
  """Rounds to six decimals, far below any interval, so that the last bits of a sum do not change the file."""
  if isinstance(value, dict):
    return {str(key): _plain(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(item) for item in value]
  return round(float(value), 6) if isinstance(value, float | np.floating) else value


def generation_results(problems: Sequence[Problem], candidates: Sequence[Candidate], seed: int) -> dict[str, Any]:
  """How good a model is as a generator: pass@1 over its own solutions to the problems, and that of each problem.

  Raises:
    UserError: see `select.make_bank`.
  """
  bank = selection.make_bank(problems, candidates)
  pass1 = selection.pass_at_1(bank)
  interval = dataclasses.asdict(metrics.bootstrap(metrics.mean(pass1), seed=seed))
  told = {"num_problems": len(problems), "num_candidates": int(bank.sizes.sum()), "pass1": interval}
  return _plain(told | {"per_problem": per_problem.shares(pass1)})


def sample_records(
  problems: Sequence[Problem], candidates: Sequence[Candidate], scores: Mapping[str, Sequence[Score]]
) -> list[dict[str, Any]]:
  """A dozen scored candidates of the verifiers that write rationales, as they are, each with its first vote.

  They are picked by a rule (`browse.pick_examples`): the worst mistakes of both kinds, a third each as far as there are
  so many, and for the rest the candidates closest to the median score of the right and of the wrong ones.
  """
  written = {name: listed for name, listed in scores.items() if any(vote.text for s in listed for vote in s.votes)}
  picked: list[Example] = []
  for name, listed in written.items():
    examples = pick_examples(problems, candidates, {name: listed}, per_kind=_SAMPLES, votes_shown=1)
    share = _SAMPLES // len(written)
    mistakes = [one for kind in (FOOLED, MISSED) for one in [e for e in examples if e.kind == kind][: share // 3]]
    typical = [[e for e in examples if e.kind == TYPICAL and e.candidate.correct == right] for right in (True, False)]
    in_turn = [one for pair in itertools.zip_longest(*typical) for one in pair if one]
    picked += mistakes + in_turn[: share - len(mistakes)]
  return [
    {
      "verifier": one.verifier,
      "kind": one.kind,
      "question": one.problem.question,
      "answer": one.problem.answer,
      "solution": one.candidate.text,
      "correct": one.candidate.correct,
      "value": round(one.value, 4),
      "rationale": one.votes[0].text,
      "state": one.votes[0].state,
      "p_yes": None if one.votes[0].p_yes is None else round(one.votes[0].p_yes, 4),
    }
    for one in picked
  ]


def write_report(
  results: Mapping[str, Any], out_dir: str | os.PathLike[str], *, examples: Sequence[Example] = ()
) -> list[epath.Path]:
  """Writes results.json, report.md, index.html (all in one file) and the figures; each is replaced whole.

  Args:
    results: from `build_results`, or read back from results.json.
    out_dir: a directory, local or on gs://, made if it is not there.
    examples: candidates to browse on the page, from `browse.pick_examples`.

  Returns:
    The paths that were written. The same input gives the same bytes.
  """
  folder = epath.Path(out_dir)
  folder.mkdir(parents=True, exist_ok=True)
  figures = plots.draw(results)
  files: dict[str, bytes] = {figure.file: figure.png for figure in figures}
  files |= pages.render(results, figures, examples)
  files["results.json"] = (compact_json(results) + "\n").encode()
  return [_replace(folder / name, data) for name, data in files.items()]


def compact_json(value: Any, indent: str = "") -> str:
  """Indented JSON, but numbers in a list, and what is short, stand on one line: a file to read and not too large."""
  if isinstance(value, list) and not any(isinstance(item, list | dict | str) for item in value):
    return json.dumps(value, allow_nan=False, separators=(",", ":"))
  line = json.dumps(value, allow_nan=False, ensure_ascii=False)
  if not isinstance(value, list | dict) or len(line) <= _LINE:
    return line
  deeper = indent + "  "
  if isinstance(value, list):
    return "[\n" + ",\n".join(deeper + compact_json(item, deeper) for item in value) + f"\n{indent}]"
  items = (
    f"{deeper}{json.dumps(key, ensure_ascii=False)}: {compact_json(item, deeper)}" for key, item in value.items()
  )
  return "{\n" + ",\n".join(items) + f"\n{indent}}}"


def _replace(path: epath.Path, data: bytes) -> epath.Path:
  """Writes beside the file, then moves over it, so that a reader never sees half of it."""
  beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
  try:
    beside.write_bytes(data)
    beside.replace(path)
  finally:
    beside.unlink(missing_ok=True)
  return path
