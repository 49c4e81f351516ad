"""What the report shows beside its figures: tables of results."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from genrm_jax.evals import costs
from genrm_jax.evals.calibration import LIKELIHOODS
from genrm_jax.evals.lengths import SIDES
from genrm_jax.evals.metrics import THRESHOLD
from genrm_jax.records import VOTE_STATES

NAMES = {
  "orm": "ORM",
  "genrm": "GenRM",
  "genrm_cot": "GenRM-CoT",
  "dpo": "DPO verifier",
  "judge": "LLM-as-a-Judge",
  "oracle": "Oracle (pass@N)",
  "self_consistency": "Self-consistency",
  "pass1": "pass@1",
}


def method_name(method: str) -> str:
  """The name that people read: `genrm_cot` is GenRM-CoT; an unknown one is shown as it is."""
  vote, _, verifier = method.rpartition("/")
  name = NAMES.get(verifier, verifier)
  return f"votes weighted by {name}" if vote else name


@dataclasses.dataclass(frozen=True)
class Table:
  """A table of strings; `note` says how to read it."""

  title: str
  note: str
  header: tuple[str, ...]
  rows: tuple[tuple[str, ...], ...]
  num_text_columns: int = 1  # the first columns hold words, the others numbers


def result_tables(results: Mapping[str, Any]) -> list[Table]:
  """The tables of a report, in reading order; those without rows are left out."""
  tables = [
    _best_of_n_table(results),
    _difference_table(results),
    _verification_table(results),
    _votes_table(results),
    _cost_table(results),
    _length_table(results),
    _ties_table(results),
    _coverage_table(results),
    _rules_table(results),
    _in_distribution_table(results),
  ]
  return [table for table in tables if table.rows]


def percent(interval: Mapping[str, float | None], signed: bool = False) -> str:
  """`45.3 [40.1, 50.2]`, in percent."""
  if interval["value"] is None:
    return "–"
  sign = "+" if signed else ""
  value, low, high = (f"{100 * (interval[key] or 0.0):{sign}.1f}" for key in ("value", "low", "high"))
  return f"{value} [{low}, {high}]"


def number(interval: Mapping[str, float | None]) -> str:
  if interval["value"] is None:
    return "–"
  return f"{interval['value']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


def _figures(point: Mapping[str, Any]) -> tuple[str, str, str]:
  return percent(point["accuracy"]), percent(point["rm_accuracy"]), f"{100 * point['scored']['value']:.1f}"


def _best_of_n_table(results: Mapping[str, Any]) -> Table:
  rows = [("pass@1", *[percent(results["pass1"])] * len(results["ns"]))]
  rows += [(method_name(method), *map(percent, points)) for method, points in results["curves"].items()]
  return Table(
    "Accuracy of the chosen solution",
    "Percent of problems, with the 95% interval over problems. A verifier's row is Best-of-N by its score;"
    " weighted votes are self-consistency with its scores as weights.",
    ("method", *(f"n = {n}" for n in results["ns"])),
    tuple(rows),
  )


def _difference_table(results: Mapping[str, Any]) -> Table:
  others = [
    other
    for other in ("pass1", "self_consistency", "orm")
    if any(other in it["minus"] for it in results["verifiers"].values())
  ]
  rows = [
    (
      method_name(name),
      *(percent(it["minus"][other], signed=True) if other in it["minus"] else "" for other in others),
    )
    for name, it in results["verifiers"].items()
  ]
  return Table(
    f"What a verifier adds at n = {results['ns'][-1]}",
    "Points of percent, paired by problem. An interval that spans 0 does not show a difference.",
    ("verifier", *(f"over {method_name(other)}" for other in others)),
    tuple(rows),
  )


def _verification_table(results: Mapping[str, Any]) -> Table:
  rows = [
    (
      method_name(name),
      percent(it["verification"]["rm_accuracy"]),
      percent(it["verification"]["balanced_rm_accuracy"]),
      number(it["verification"]["auc_overall"]),
      number(it["verification"]["auc_within_problems"]),
      "–" if name in LIKELIHOODS else number(it["verification"]["brier"]),
      "–" if name in LIKELIHOODS or it["verification"]["ece"] is None else f"{it['verification']['ece']:.3f}",
    )
    for name, it in results["verifiers"].items()
  ]
  common = 100 * max(results["share_correct"], 1 - results["share_correct"])
  return Table(
    "Verification: is this solution right?",
    f"A solution is called right if its score is above {THRESHOLD}; saying the same of all would reach {common:.1f}% RM"
    " accuracy. Balanced is the average over right and wrong"
    " solutions. AUC within problems averages over problems that have both. ECE has ten bins and no interval."
    + likelihood_note(results),
    ("verifier", "RM accuracy, %", "balanced, %", "AUC", "AUC within problems", "Brier", "ECE"),
    tuple(rows),
  )


def likelihood_note(results: Mapping[str, Any]) -> str:
  """A sentence on the verifiers that have no calibration, "" if there are none."""
  names = [method_name(name) for name in results["verifiers"] if name in LIKELIHOODS]
  return f" The score of the {' and '.join(names)} is no probability and has no calibration." if names else ""


def _votes_table(results: Mapping[str, Any]) -> Table:
  rows = [
    (method_name(name), str(point["k"]), *_figures(point))
    for name, it in results["verifiers"].items()
    for point in it["by_votes"]
  ]
  return Table(
    "Accuracy by number of votes",
    "Averaged over disjoint groups of K of the sampled votes. Candidates without a readable vote among the K rank last"
    " and are not in the RM accuracy.",
    ("verifier", "K", f"Best-of-{results['ns'][-1]}, %", "RM accuracy, %", "scored, %"),
    tuple(rows),
  )


def _cost_table(results: Mapping[str, Any]) -> Table:
  """Every method's costs beside its accuracy; without rows where costs were not measured."""
  measured = results.get("costs")
  if not measured:
    return Table("Accuracy against cost", "", (), ())
  unit = "tokens" if measured["generator_params"] is None else "FLOPs"
  curves = list(measured["by_n"].items())
  for name, columns in measured["by_k"].items():  # all votes at the largest n are a row already
    curves.append((name, {key: column[:-1] for key, column in columns.items()}))
  majority = measured["by_n"]["self_consistency"]
  rows = []
  for method, columns in curves:
    for index, cost in enumerate(costs.totals(columns, unit)):
      affordable = [at for at, price in enumerate(costs.totals(majority, unit)) if price <= cost]
      rival = ""
      if method in results["verifiers"]:
        at = affordable[-1] if affordable else None
        rival = "–" if at is None else f"{100 * majority['accuracy'][at]:.1f} (n = {majority['n'][at]})"
      rows.append(
        (
          method_name(method),
          str(columns["n"][index]),
          str(columns["k"][index] or ""),
          *(_amount(columns[key][index]) for key in costs.TOKENS),
          *("–" if columns[key][index] is None else scientific(columns[key][index]) for key in costs.FLOPS),
          percent({"value": columns["accuracy"][index]} | {key: columns[key][index] for key in ("low", "high")}),
          rival,
        )
      )
  known = measured["generator_params"]
  return Table(
    "Accuracy against cost",
    f"A problem's mean tokens and FLOPs. {costs.NOTE} The generator has"
    f" {'an unknown number of' if known is None else f'{known:,}'} parameters, the verifier"
    f" {measured['verifier_params']:,}. The last column is the majority answer of the most candidates, of the numbers"
    f" measured, that cost no more {unit} than this.",
    (
      *("method", "n", "K", "generator reads", "generator samples", "verifier reads", "verifier samples"),
      *("generator FLOPs", "verifier FLOPs", "accuracy, %", "self-consistency for no more, %"),
    ),
    tuple(rows),
  )


def _amount(value: float) -> str:
  return f"{value:,.0f}" if value >= 10 or not value else f"{value:.1f}"


def scientific(value: float) -> str:
  """`1.25e9`: two decimals and no padding of the exponent."""
  if not value:
    return "0"
  mantissa, exponent = f"{value:.2e}".split("e")
  return f"{mantissa}e{int(exponent)}"


def _length_table(results: Mapping[str, Any]) -> Table:
  """Scores by length of the solution; without rows in results that do not have them."""
  bins = results.get("length")
  if not bins:
    return Table("Score against length", "", (), ())
  rows = [
    (
      method_name(name),
      side,
      number(it["length"]["spearman"][side]),
      *("–" if value is None else f"{value:.3f}" for value in it["length"]["mean_score"][side]["value"]),
    )
    for name, it in results["verifiers"].items()
    for side in SIDES
  ]
  spans = length_spans(bins)
  counts = "; ".join(
    f"{span}: {right:,} right, {wrong:,} wrong"
    for span, right, wrong in zip(spans, bins["right"], bins["wrong"], strict=True)
  )
  return Table(
    "Score against length",
    "The rank correlation (Spearman) of score and length among the right, or the wrong, solutions of one problem,"
    " averaged over the problems that have one: a verifier that ignores length is near 0 on both. Then the mean score"
    f" by length in {bins['unit']}: {counts}.",
    ("verifier", "solutions", "rank correlation", *spans),
    tuple(rows),
    num_text_columns=2,
  )


def length_spans(bins: Mapping[str, Any]) -> list[str]:
  """The bins of length for readers: `12–14`."""
  pairs = zip(bins["shortest"], bins["longest"], strict=True)
  return [f"{low:,}" if low == high else f"{low:,}–{high:,}" for low, high in pairs]


def _ties_table(results: Mapping[str, Any]) -> Table:
  """How often a coin decides; without rows in results that do not say."""
  found = {name: it["ties"] for name, it in results["verifiers"].items() if "ties" in it}
  rows = [
    (
      method_name(name),
      _count(it["tied"], it["pools"]),
      f"{it['candidates'] / it['tied']:.1f}" if it["tied"] else "–",
      str(it["largest"]) if it["tied"] else "–",
      _count(it["texts_differ"], it["pools"]),
      _count(it["labels_differ"], it["pools"]),
      _count(it["unscored"], it["pools"]),
    )
    for name, it in found.items()
  ]
  return Table(
    "Ties at the top",
    "Pools in which several candidates share the best score, so that Best-of-N with the whole pool picks one of them at"
    " random. It is a coin flip where right and wrong ones are among them. Candidates of one text tie always; a pool"
    " without any score ties as a whole.",
    (
      *("verifier", "pools with a tie", "candidates in a tie, mean", "most"),
      *("of different texts", "of both labels", "pools without a score"),
    ),
    tuple(rows),
  )


def _coverage_table(results: Mapping[str, Any]) -> Table:
  rows = [
    (
      method_name(name),
      f"{it['step']:,}",
      f"{it['coverage']['scored']:,} of {it['coverage']['candidates']:,}",
      f"{it['coverage']['votes']:,}",
      *(_count(it["coverage"]["states"][state], it["coverage"]["votes"]) for state in VOTE_STATES),
      "–" if it["coverage"]["tokens_per_vote"] is None else f"{it['coverage']['tokens_per_vote']:.1f}",
    )
    for name, it in results["verifiers"].items()
  ]
  return Table(
    "Coverage",
    "Votes by state. Only ok and forced votes carry a number; no other becomes one.",
    ("verifier", "training step", "candidates scored", "votes", *VOTE_STATES, "tokens per vote"),
    tuple(rows),
  )


def _count(count: int, total: int) -> str:
  return f"{count:,} ({100 * count / total:.1f}%)" if count else "0"


def _rules_table(results: Mapping[str, Any]) -> Table:
  rows = [
    (method_name(name), point["rule"], *_figures(point))
    for name, it in results["verifiers"].items()
    for point in it["by_rule"]
  ]
  return Table(
    "The same votes under other rules",
    "The first rule of a verifier defines its score.",
    ("verifier", "rule", f"Best-of-{results['ns'][-1]}, %", "RM accuracy, %", "scored, %"),
    tuple(rows),
    num_text_columns=2,
  )


def _in_distribution_table(results: Mapping[str, Any]) -> Table:
  """Best-of-N and verification on the second split; without rows where there is none."""
  inner = results.get("in_distribution")
  rows: list[tuple[str, ...]] = []
  if inner:
    rows = [(method_name("pass1"), percent(inner["pass1"]), "", "")]
    for method, points in inner["curves"].items():
      if "/" in method:
        continue
      checks = inner["verifiers"][method]["verification"] if method in inner["verifiers"] else None
      figures = (percent(checks["rm_accuracy"]), number(checks["auc_within_problems"])) if checks else ("", "")
      rows.append((method_name(method), percent(points[-1]), *figures))
  return Table(
    "In distribution",
    f"The same on {inner['num_problems']:,} other problems, of the kind that the verifiers were trained on."
    if inner
    else "",
    ("method", f"n = {inner['ns'][-1]}" if inner else "", "RM accuracy, %", "AUC within problems"),
    tuple(rows),
  )


def generation_lines(results: Mapping[str, Any]) -> list[str]:
  """A line for each verifier that was measured as a generator too."""
  return [
    f"{method_name(name)} as a generator: pass@1 {percent(it['pass1'])} on {it['num_problems']:,} problems"
    for name, it in results.get("generation", {}).items()
  ]
