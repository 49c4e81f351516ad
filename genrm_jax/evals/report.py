"""The report of one evaluation: metrics with intervals, tables, plots, and a page to browse candidates.

`build_results` computes and `write_report` writes; between them is a plain dict that survives a JSON round trip.
"""

import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from genrm_jax.evals import calibration, lengths, methods, metrics, pages, per_problem, plots, selection
from genrm_jax.evals.browse import FOOLED, MISSED, TYPICAL, BrowseEntry, pick_entries
from genrm_jax.evals.costs import Costs, align_tokens, cost_results
from genrm_jax.evals.methods import RESERVED, SELF_CONSISTENCY, WEIGHTED, Methods
from genrm_jax.records import VOTE_STATES, Candidate, Problem, Score
from genrm_jax.runtime import files
from genrm_jax.runtime.errors import UserError

SCHEMA_VERSION = 1
_SAME_VALUE = 1e-4  # tolerance for values averaged in another precision
_LINE = 100  # most characters of a JSON value that stays on one line of results.json
_SAMPLES = 12


def build_results(
  problems: Sequence[Problem],
  candidates: Sequence[Candidate],
  scores: Mapping[str, Sequence[Score]],
  *,
  ns: Sequence[int],
  ks: Sequence[int],
  seed: int,
  meta: Mapping[str, Any],
  likelihoods: frozenset[str] = frozenset(),
  costs: Costs | None = None,
  top_scores: int = 0,
) -> dict[str, Any]:
  """Everything the report shows, as a dict of JSON values. Metrics are shares in [0, 1], None where undefined.

  Differences, curves over votes and rules are at the largest of `ns`. The caller may add three parts that the report
  shows too: "in_distribution" (this function's results for a second split), "generation" (`generation_results` by
  verifier) and "samples" (`sample_records`).

  Args:
    problems: the evaluation split.
    candidates: solutions to these problems; pools may differ in size, and one smaller than n is used whole.
    scores: one per candidate, by verifier. Any name without "/" that is not one of `RESERVED` will do.
    ns: numbers of candidates to choose from.
    ks: numbers of votes; a verifier's curve covers those that it has enough votes for, and all of its votes.
    seed: for the bootstrap and the subsets that majority votes are averaged over.
    meta: what the run was: task, model, seed, config_hash, train_steps and best_by (by verifier: the number of updates,
      and the held-out metric that picked the checkpoint), wall_seconds (by stage), notes (a list), ... The report shows
      flat values and flat mappings; nested mappings are only kept.
    likelihoods: the verifiers whose score is a likelihood and no probability of correctness: it has no calibration.
    costs: token counts and model sizes, for accuracy against cost; None if they were not measured.
    top_scores: how many of an answer's best scores weighted self-consistency sums up (paper: 6 on GSM8K, 4 on MATH); 0:
      all.

  Raises:
    UserError: see `selection.make_bank`, `metrics.align_scores` and `costs.align_tokens`; an n that exceeds every pool;
      a reserved name.
  """
  if not ns or any(k < 1 for k in ks):
    raise UserError(f"ns={list(ns)}, ks={list(ks)}: give at least one n, and only positive numbers of votes")
  for name in scores:
    if not name or name in RESERVED or "/" in name:
      raise UserError(f"verifier {name!r}: rename it; a name has no '/' and is none of {', '.join(RESERVED)}")
  bank = selection.make_bank(problems, candidates)
  ns, largest_n = sorted(set(ns)), max(ns)
  tables = {name: metrics.align_scores(bank, name, of_verifier) for name, of_verifier in scores.items()}
  selected = Methods(bank, tables, top_scores=top_scores, seed=seed)
  curves = {method: {n: selected(method, n) for n in ns} for method in selected.names}
  pass1 = selection.pass_at_1(bank)
  tokens = align_tokens(bank, candidates, list(tables), costs) if costs else None
  lengths_PC, unit = (tokens.solution, "tokens") if tokens else (lengths.characters(bank), "characters")

  # Gather all quantities first, to resample them together.
  quantities = {"pass1": metrics.mean(pass1)}
  for method, by_n in curves.items():
    quantities |= {f"{method}/n={n}": metrics.mean(accuracy) for n, accuracy in by_n.items()}
  for name, table in tables.items():
    own = curves[name][largest_n]
    others = {"pass1": pass1} | {
      other: curves[other][largest_n] for other in ("self_consistency", *tables) if other != name
    }
    quantities |= {f"{name}/minus/{other}": metrics.mean(own - accuracy) for other, accuracy in others.items()}
    quantities |= {f"{name}/{key}": make(bank, table.values) for key, make in _VERIFICATION.items()}
    quantities |= _vote_quantities(bank, table, ks, largest_n)
    more = lengths.length_quantities(bank, table.values, lengths_PC)
    if name not in likelihoods:
      more |= calibration.reliability_quantities(bank, table.values)
    quantities |= {f"{name}/{key}": quantity for key, quantity in more.items()}
  intervals = {name: dataclasses.asdict(point) for name, point in metrics.intervals(quantities, seed=seed).items()}

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
    "likelihoods": sorted(set(likelihoods) & set(tables)),
    "pass1": intervals["pass1"],
    "curves": {method: [{"n": n, **intervals[f"{method}/n={n}"]} for n in ns] for method in curves},
    "verifiers": {
      name: _verifier_results(bank, table, intervals, seed, is_probability=name not in likelihoods)
      for name, table in tables.items()
    },
    "length": lengths.bins_results(bank, lengths_PC, unit),
  }
  if costs and tokens:
    votes = {name: _vote_counts(table, ks) for name, table in tables.items()}
    results["costs"] = cost_results(bank, tables, tokens, costs, ns, votes, intervals)
  results["top_scores"] = top_scores
  weighted = [f"{WEIGHTED}/{name}" for name in tables]
  results["to_match"] = {
    key: methods.solutions_to_match(selected, [SELF_CONSISTENCY, *names], ns)
    for key, names in (("best_of_n", list(tables)), (WEIGHTED, weighted))
  }
  results["metrics"] = _flat_metrics(results)
  results["per_problem"] = per_problem.per_problem_results(quantities, largest_n)
  return _plain(results)


_VERIFICATION: dict[str, Callable[[selection.Bank, np.ndarray], metrics.Quantity]] = {
  "rm_accuracy": metrics.rm_accuracy,
  "balanced_rm_accuracy": metrics.balanced_rm_accuracy,
  "auc_within_problems": metrics.auc_within,
  "brier": metrics.brier,
}


def _vote_counts(table: metrics.ScoreTable, ks: Sequence[int]) -> list[int]:
  """The numbers of votes on a verifier's curve, up to all of its votes; none for a verifier with one vote."""
  return sorted({k for k in ks if k < table.num_votes} | {table.num_votes}) if table.num_votes > 1 else []


def _vote_quantities(
  bank: selection.Bank, table: metrics.ScoreTable, ks: Sequence[int], n: int
) -> dict[str, metrics.Quantity]:
  """Best-of-n and verification accuracy and share of scored candidates, by votes and by rule; {} for one vote."""
  quantities = {}
  for k in _vote_counts(table, ks):
    groups = metrics.values_of_k_votes(table, k)
    accuracy = np.mean([selection.best_of_n(bank, values, n) for values in groups], axis=0)
    quantities[f"{table.verifier}/k={k}/accuracy"] = metrics.mean(accuracy)
    for key, make in (("rm_accuracy", metrics.rm_accuracy), ("scored", metrics.scored_share)):
      numerator, denominator = np.sum([make(bank, values).parts[0] for values in groups], axis=0)
      quantities[f"{table.verifier}/k={k}/{key}"] = metrics.Quantity(((numerator, denominator),))
  for rule in metrics.RULES if quantities else ():
    values = metrics.vote_values(table, rule)
    quantities[f"{table.verifier}/rule={rule}/accuracy"] = metrics.mean(selection.best_of_n(bank, values, n))
    quantities[f"{table.verifier}/rule={rule}/rm_accuracy"] = metrics.rm_accuracy(bank, values)
    quantities[f"{table.verifier}/rule={rule}/scored"] = metrics.scored_share(bank, values)
  return quantities


def _verifier_results(
  bank: selection.Bank,
  table: metrics.ScoreTable,
  intervals: Mapping[str, Mapping[str, Any]],
  seed: int,
  *,
  is_probability: bool,
) -> dict[str, Any]:
  """The part of the results about one verifier."""

  def under(prefix: str) -> dict[str, Any]:
    start = f"{table.verifier}/{prefix}"
    return {name.removeprefix(start): point for name, point in intervals.items() if name.startswith(start)}

  def nested_under(prefix: str) -> dict[str, dict[str, Any]]:
    nested: dict[str, dict[str, Any]] = {}
    for name, point in under(prefix).items():
      key, _, metric = name.rpartition("/")
      nested.setdefault(key, {})[metric] = point
    return nested

  states, num_votes = table.states, int((table.states >= 0).sum())
  results = {
    "step": table.step,
    "verification": {key: intervals[f"{table.verifier}/{key}"] for key in _VERIFICATION}
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
    "by_votes": [{"k": int(k), **points} for k, points in nested_under("k=").items()],
    "by_rule": [{"rule": rule, **points} for rule, points in nested_under("rule=").items()],
  }
  if is_probability:
    results["reliability"] = calibration.reliability(bank, table.values, under(""))
  return results


def _notes(bank: selection.Bank, ns: Sequence[int], tables: Mapping[str, metrics.ScoreTable]) -> list[str]:
  """What a reader needs to know to interpret the numbers."""
  notes = [
    "Intervals are percentile bootstraps over problems; they do not cover other training seeds or other candidates.",
    "Best-of-N, Oracle and pass@1 are exact expectations over all subsets of n candidates, with random tie breaks;"
    f" majority votes average over all subsets if a problem has at most {selection.SUBSET_DRAWS} of them, else over"
    " that many random ones.",
  ]
  for n in ns:
    if short := int((bank.sizes < n).sum()):
      notes.append(f"At n={n}, {short} of {len(bank.sizes)} problems have fewer candidates and use all of them.")
  for name, table in tables.items():
    if missing := int((np.isnan(table.values) & bank.mask).sum()):
      notes.append(
        f"{name}: {missing} of {int(bank.mask.sum())} candidates have no score. They rank below all others in"
        " Best-of-N, have weight 0 in votes, and are left out of the verification metrics."
      )
    difference = np.nan_to_num(np.abs(metrics.vote_values(table, metrics.RULES[0]) - table.values)).max()
    if difference > _SAME_VALUE:
      notes.append(
        f"{name}: recorded scores differ by up to {difference:.3g} from the mean over ok and forced votes. Metrics by"
        " votes and by rule use the votes, all others the recorded scores."
      )
  return notes


def _flat_metrics(results: Mapping[str, Any]) -> dict[str, float | None]:
  """The metrics under the flat names of a metrics file or dashboard."""
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
  """Rounds to six decimals, far below any interval, so that the last bits of a sum cannot change the file."""
  if isinstance(value, dict):
    return {str(key): _plain(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(item) for item in value]
  return round(float(value), 6) if isinstance(value, float | np.floating) else value


def generation_results(
  problems: Sequence[Problem], candidates: Sequence[Candidate], seed: int, ns: Sequence[int] = ()
) -> dict[str, Any]:
  """A model's quality as a generator: pass@1 over its own solutions, overall and per problem, and pass@n (figure 10).

  An n beyond every pool is left out.

  Raises:
    UserError: see `selection.make_bank`.
  """
  bank = selection.make_bank(problems, candidates)
  pass1 = selection.pass_at_1(bank)
  of_n = {n: metrics.mean(selection.oracle(bank, n)) for n in sorted(set(ns)) if n <= bank.mask.shape[1]}
  points = metrics.intervals({"pass1": metrics.mean(pass1)} | {f"{n}": q for n, q in of_n.items()}, seed=seed)
  shown = {name: dataclasses.asdict(point) for name, point in points.items()}
  return _plain(
    {"num_problems": len(problems), "num_candidates": int(bank.sizes.sum()), "pass1": shown["pass1"]}
    | {"pass_at_n": [{"n": n, **shown[f"{n}"]} for n in of_n], "per_problem": per_problem.rounded_shares(pass1)}
  )


def sample_records(
  problems: Sequence[Problem],
  candidates: Sequence[Candidate],
  scores: Mapping[str, Sequence[Score]],
  *,
  likelihoods: frozenset[str] = frozenset(),
) -> list[dict[str, Any]]:
  """A dozen scored candidates of the verifiers that write rationales, verbatim, each with its first vote.

  Picked by a rule (`browse.pick_entries`): up to a third each of the worst mistakes of both kinds, and for the rest the
  candidates closest to the median score of the correct and of the incorrect ones.
  """
  with_text = {name: of_name for name, of_name in scores.items() if any(vote.text for s in of_name for vote in s.votes)}
  picked: list[BrowseEntry] = []
  for name, of_name in with_text.items():
    entries = [
      entry
      for entry in pick_entries(
        problems, candidates, {name: of_name}, likelihoods=likelihoods, per_kind=_SAMPLES, votes_shown=1
      )
      if entry.votes
    ]
    share = _SAMPLES // len(with_text)
    mistakes = [entry for kind in (FOOLED, MISSED) for entry in [e for e in entries if e.kind == kind][: share // 3]]
    typical = [[e for e in entries if e.kind == TYPICAL and e.candidate.correct == label] for label in (True, False)]
    alternating = [entry for pair in itertools.zip_longest(*typical) for entry in pair if entry]
    picked += mistakes + alternating[: share - len(mistakes)]
  return [
    {
      "verifier": entry.verifier,
      "kind": entry.kind,
      "question": entry.problem.question,
      "answer": entry.problem.answer,
      "solution": entry.candidate.text,
      "correct": entry.candidate.correct,
      "value": round(entry.value, 4),
      "rationale": entry.votes[0].text,
      "state": entry.votes[0].state,
      "p_yes": None if entry.votes[0].p_yes is None else round(entry.votes[0].p_yes, 4),
    }
    for entry in picked
  ]


def write_report(
  results: Mapping[str, Any], out_dir: str | os.PathLike[str], *, entries: Sequence[BrowseEntry] = ()
) -> list[epath.Path]:
  """Writes results.json, report.md, index.html (self-contained) and the figures; each file is replaced atomically.

  Args:
    results: from `build_results`, or read back from results.json.
    out_dir: a directory, local or on gs://; created if missing.
    entries: candidates to browse on the page, from `browse.pick_entries`.

  Returns:
    The paths written. Raises UserError if the place cannot be written or the disk is full.
    The same input gives the same bytes.
  """
  folder = epath.Path(out_dir)
  figures = plots.draw(results)
  contents: dict[str, bytes] = {figure.file: figure.png for figure in figures}
  contents |= pages.render(results, figures, entries)
  contents["results.json"] = (compact_json(results) + "\n").encode()
  for name, data in contents.items():
    with files.atomic_writer(folder / name) as write:
      write(data)
  return [folder / name for name in contents]


def compact_json(value: Any, indent: str = "") -> str:
  """Indented JSON with lists of numbers and short values on one line: readable and not too large."""
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
