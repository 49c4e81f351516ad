"""The tables and lines of text of a report."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from genrm_jax.evals import costs
from genrm_jax.evals.calibration import likelihoods
from genrm_jax.evals.lengths import SIDES
from genrm_jax.evals.methods import MAJORITY, WEIGHTED
from genrm_jax.evals.metrics import THRESHOLD
from genrm_jax.records import VOTE_STATES

SIDE_NAMES = {"right": "correct", "wrong": "incorrect"}

# Labels of methods; any other name is its own label.
NAMES = {
  "orm": "ORM",
  "genrm": "GenRM",
  "genrm_cot": "GenRM-CoT",
  "genrm_cot_greedy": "GenRM-CoT, one greedy rationale",
  "dpo": "DPO verifier",
  "dpo_reference": "DPO verifier, with the reference",
  "judge": "LLM-as-a-Judge",
  "oracle": "Oracle (pass@N)",
  "self_consistency": "Self-consistency",
  "pass1": "pass@1",
}


def method_name(method: str) -> str:
  """The label of a method: GenRM-CoT for `genrm_cot`, any unknown name itself."""
  how, _, verifier = method.rpartition("/")
  name = NAMES.get(verifier, verifier)
  return {WEIGHTED: f"Weighted self-consistency, {name}", MAJORITY: f"{name}, majority verdict"}.get(how, name)


@dataclasses.dataclass(frozen=True)
class Table:
  """A table of strings; `note` explains how to read it."""

  title: str
  note: str
  header: tuple[str, ...]
  rows: tuple[tuple[str, ...], ...]
  num_text_columns: int = 1  # leading columns of words, aligned left; the others hold numbers


def result_tables(results: Mapping[str, Any]) -> list[Table]:
  """The non-empty tables of a report, in reading order."""
  tables = [
    _best_of_n_table(results),
    _difference_table(results),
    *_to_match_tables(results),
    _generation_table(results),
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


def meta_lines(results: Mapping[str, Any]) -> list[tuple[str, str]]:
  """What the run was, as (name, value); nested mappings are left out, and so are `task` and `notes`, shown apart.

  The metric that picked each checkpoint stands beside its number of updates.
  """
  meta = dict(results["meta"])
  if isinstance(steps := meta.get("train_steps"), Mapping) and isinstance(best_by := meta.pop("best_by", {}), Mapping):
    meta["train_steps"] = {
      name: f"{count:,}" + (f" (checkpoint: best held-out {best_by[name]})" if name in best_by else "")
      for name, count in steps.items()
    }
  lines = []
  for key, value in meta.items():
    if isinstance(value, Mapping):
      if any(isinstance(item, Mapping) for item in value.values()):
        continue
      value = ", ".join(f"{name} {item}" for name, item in value.items())
    if key not in ("task", "notes"):
      lines.append((key.replace("_", " "), str(value)))
  return lines


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


def _accuracy_cells(point: Mapping[str, Any]) -> tuple[str, str, str]:
  return percent(point["accuracy"]), percent(point["rm_accuracy"]), f"{100 * point['scored']['value']:.1f}"


def _best_of_n_table(results: Mapping[str, Any]) -> Table:
  rows = [("pass@1", *[percent(results["pass1"])] * len(results["ns"]))]
  rows += [(method_name(method), *map(percent, points)) for method, points in results["curves"].items()]
  return Table(
    "Accuracy of the selected solution",
    "Percent of problems, with the 95% interval over problems. A verifier's row is Best-of-N by its score; its majority"
    " verdict only says correct or incorrect, so ties are common. Weighted self-consistency picks the answer with the"
    f" largest sum of {f'its {top} best scores' if (top := results.get('top_scores')) else 'scores'}.",
    ("method", *(f"n = {n}" for n in results["ns"])),
    tuple(rows),
  )


def _difference_table(results: Mapping[str, Any]) -> Table:
  verifiers = results["verifiers"]
  others = [
    other
    for other in ("pass1", "self_consistency", *verifiers)
    if any(other in verifier["minus"] for verifier in verifiers.values())
  ]
  rows = [
    (
      method_name(name),
      *(percent(verifier["minus"][other], signed=True) if other in verifier["minus"] else "" for other in others),
    )
    for name, verifier in verifiers.items()
  ]
  return Table(
    f"Differences at n = {results['ns'][-1]}",
    "Percentage points by which Best-of-N by the verifier of the row beats the method of the column, paired by problem."
    " If the interval spans 0, no difference is shown.",
    ("verifier", *(f"over {method_name(other)}" for other in others)),
    tuple(rows),
  )


def _to_match_tables(results: Mapping[str, Any]) -> list[Table]:
  """How many solutions each method needs to match another; none for results without them."""
  largest, found = results["ns"][-1], results.get("to_match", {})

  def cell(row: Mapping[str, int | None], other: str) -> str:
    if other not in row:
      return ""
    n = row[other]
    return "–" if n is None else f"{n} ({largest / n:.1f}x fewer)" if n < largest else str(n)

  titles = {"best_of_n": "Best-of-N", WEIGHTED: "weighted self-consistency"}
  return [
    Table(
      f"Solutions to match: {title}",
      f"How many candidates the method of the row needs to be as accurate as that of the column with {largest}; – if"
      f" {largest} do not suffice. Read off the curves, without an interval.",
      ("method", *(f"{method_name(other)}, n = {largest}" for other in found[key])),
      tuple((method_name(name), *(cell(row, other) for other in found[key])) for name, row in found[key].items()),
    )
    for key, title in titles.items()
    if len(found.get(key, ())) > 1
  ]


def _generation_table(results: Mapping[str, Any]) -> Table:
  """Verifiers that were also measured as generators, beside the generator of the evaluated solutions."""
  models = results.get("generation", {})
  points = {name: {p["n"]: p for p in model.get("pass_at_n", ())} for name, model in models.items()}
  ns = [n for n in results["ns"] if n > 1 and any(n in of_model for of_model in points.values())]
  oracle = {point["n"]: point for point in results["curves"]["oracle"]}
  rows = [("the generator of these solutions", percent(results["pass1"]), *(percent(oracle[n]) for n in ns))]
  for name, model in models.items():
    cells = (percent(points[name][n]) if n in points[name] else "–" for n in ns)
    rows.append((method_name(name), percent(model["pass1"]), *cells))
  return Table(
    "Verifiers as generators: pass@N",
    "Percent of problems that N solutions of the model's own solve, with the 95% interval over problems.",
    ("model", "pass@1", *(f"pass@{n}" for n in ns)),
    tuple(rows) if models else (),
  )


def _verification_table(results: Mapping[str, Any]) -> Table:
  rows = []
  for name, verifier in results["verifiers"].items():
    checks, calibrated = verifier["verification"], name not in likelihoods(results)
    rows.append(
      (
        method_name(name),
        percent(checks["rm_accuracy"]),
        percent(checks["balanced_rm_accuracy"]),
        number(checks["auc_overall"]),
        number(checks["auc_within_problems"]),
        number(checks["brier"]) if calibrated else "–",
        f"{checks['ece']:.3f}" if calibrated and checks["ece"] is not None else "–",
      )
    )
  majority = 100 * max(results["share_correct"], 1 - results["share_correct"])
  return Table(
    "Verification",
    f"A verifier calls a solution correct if its score is above {THRESHOLD}; giving all solutions the more frequent"
    f" label would reach {majority:.1f}% RM accuracy. Balanced: mean of the accuracies on correct and on incorrect"
    " solutions. AUC within problems: mean over problems that have both. ECE: ten bins, no interval."
    + likelihood_note(results),
    ("verifier", "RM accuracy, %", "balanced, %", "AUC", "AUC within problems", "Brier", "ECE"),
    tuple(rows),
  )


def likelihood_note(results: Mapping[str, Any]) -> str:
  """A sentence on the verifiers without calibration, "" if there are none."""
  names = [method_name(name) for name in results["verifiers"] if name in likelihoods(results)]
  return f" Scores of {', '.join(names)} are likelihoods, which have no calibration." if names else ""


def _votes_table(results: Mapping[str, Any]) -> Table:
  rows = [
    (method_name(name), str(point["k"]), *_accuracy_cells(point))
    for name, verifier in results["verifiers"].items()
    for point in verifier["by_votes"]
  ]
  return Table(
    "Accuracy by number of votes",
    "Averaged over disjoint groups of K sampled votes. Candidates without a usable vote among the K rank last and are"
    " left out of the RM accuracy.",
    ("verifier", "K", f"Best-of-{results['ns'][-1]}, %", "RM accuracy, %", "scored, %"),
    tuple(rows),
  )


def _cost_table(results: Mapping[str, Any]) -> Table:
  """Every method's costs beside its accuracy; empty if costs were not measured."""
  measured = results.get("costs")
  if not measured:
    return Table("Accuracy against cost", "", (), ())
  unit = "tokens" if measured["generator_params"] is None else "FLOPs"
  curves = list(measured["by_n"].items())
  for name, columns in measured["by_k"].items():  # the last point, all votes at the largest n, is a row already
    curves.append((name, {key: column[:-1] for key, column in columns.items()}))
  majority = measured["by_n"]["self_consistency"]
  rows = []
  for method, columns in curves:
    for index, cost in enumerate(costs.totals(columns, unit)):
      affordable = [at for at, price in enumerate(costs.totals(majority, unit)) if price <= cost]
      alternative = ""
      if method in results["verifiers"]:
        at = affordable[-1] if affordable else None
        alternative = "–" if at is None else f"{100 * majority['accuracy'][at]:.1f} (n = {majority['n'][at]})"
      rows.append(
        (
          method_name(method),
          str(columns["n"][index]),
          str(columns["k"][index] or ""),
          *(_amount(columns[key][index]) for key in costs.TOKENS),
          *("–" if columns[key][index] is None else scientific(columns[key][index]) for key in costs.FLOPS),
          percent({"value": columns["accuracy"][index]} | {key: columns[key][index] for key in ("low", "high")}),
          alternative,
        )
      )
  params = measured["generator_params"]
  return Table(
    "Accuracy against cost",
    f"Mean tokens and FLOPs per problem. {costs.NOTE} The generator has"
    f" {'an unknown number of' if params is None else f'{params:,}'} parameters, the verifier"
    f" {measured['verifier_params']:,}. The last column is self-consistency over as many candidates, of the measured n,"
    f" as cost at most the same number of {unit}.",
    (
      *("method", "n", "K", "generator reads", "generator samples", "verifier reads", "verifier samples"),
      *("generator FLOPs", "verifier FLOPs", "accuracy, %", "self-consistency at the same cost, %"),
    ),
    tuple(rows),
  )


def _amount(value: float) -> str:
  return f"{value:,.0f}" if value >= 10 or not value else f"{value:.1f}"


def scientific(value: float) -> str:
  """`1.25e9`: two decimals and an unpadded exponent."""
  if not value:
    return "0"
  mantissa, exponent = f"{value:.2e}".split("e")
  return f"{mantissa}e{int(exponent)}"


def _length_table(results: Mapping[str, Any]) -> Table:
  """Scores by length of the solution; empty for results without them."""
  bins = results.get("length")
  if not bins:
    return Table("Score against length", "", (), ())
  rows = [
    (
      method_name(name),
      SIDE_NAMES[side],
      number(verifier["length"]["spearman"][side]),
      *("–" if value is None else f"{value:.3f}" for value in verifier["length"]["mean_score"][side]["value"]),
    )
    for name, verifier in results["verifiers"].items()
    for side in SIDES
  ]
  spans = length_spans(bins)
  counts = "; ".join(
    f"{span}: {right:,} correct, {wrong:,} incorrect"
    for span, right, wrong in zip(spans, bins["right"], bins["wrong"], strict=True)
  )
  return Table(
    "Score against length",
    "Spearman's rank correlation of score and length within a problem, over its correct or its incorrect solutions,"
    " averaged over the problems where it is defined: near 0 on both for a verifier that ignores length. Then the mean"
    f" score by length in {bins['unit']}: {counts}.",
    ("verifier", "solutions", "rank correlation", *spans),
    tuple(rows),
    num_text_columns=2,
  )


def length_spans(bins: Mapping[str, Any]) -> list[str]:
  """The labels of the length bins: `12–14`."""
  pairs = zip(bins["shortest"], bins["longest"], strict=True)
  return [f"{low:,}" if low == high else f"{low:,}–{high:,}" for low, high in pairs]


def _ties_table(results: Mapping[str, Any]) -> Table:
  """How often ties are broken at random; empty for results without counts of ties."""
  counts = {name: verifier["ties"] for name, verifier in results["verifiers"].items() if "ties" in verifier}
  rows = [
    (
      method_name(name),
      _count(ties["tied"], ties["pools"]),
      f"{ties['candidates'] / ties['tied']:.1f}" if ties["tied"] else "–",
      str(ties["largest"]) if ties["tied"] else "–",
      _count(ties["texts_differ"], ties["pools"]),
      _count(ties["labels_differ"], ties["pools"]),
      _count(ties["unscored"], ties["pools"]),
    )
    for name, ties in counts.items()
  ]
  return Table(
    "Ties for the best score",
    "Problems in which several candidates share the best score, so that Best-of-N over all candidates picks one of them"
    " at random; chance decides if correct and incorrect ones are among them. Identical texts always tie; without any"
    " score, all candidates tie.",
    (
      *("verifier", "problems with a tie", "tied candidates, mean", "most"),
      *("with different texts", "with both labels", "problems without a score"),
    ),
    tuple(rows),
  )


def _coverage_table(results: Mapping[str, Any]) -> Table:
  """Votes by state and the training step behind them, with the metric that picked it if the results name it."""
  best_by = results["meta"].get("best_by", {})
  rows = []
  for name, verifier in results["verifiers"].items():
    coverage = verifier["coverage"]
    rows.append(
      (
        method_name(name),
        f"{verifier['step']:,}",
        *((best_by.get(name, "–"),) if best_by else ()),
        f"{coverage['scored']:,} of {coverage['candidates']:,}",
        f"{coverage['votes']:,}",
        *(_count(coverage["states"].get(state, 0), coverage["votes"]) for state in VOTE_STATES),
        "–" if coverage["tokens_per_vote"] is None else f"{coverage['tokens_per_vote']:.1f}",
      )
    )
  note = " The training step is the one with the best held-out value of the metric beside it." if best_by else ""
  return Table(
    "Coverage",
    f"Votes by state. Only ok and forced votes count in a score; failed votes never become a number.{note}",
    (
      *("verifier", "training step", *(("best by",) if best_by else ())),
      *("candidates scored", "votes", *VOTE_STATES, "tokens per vote"),
    ),
    tuple(rows),
  )


def _count(count: int, total: int) -> str:
  return f"{count:,} ({100 * count / total:.1f}%)" if count else "0"


def _rules_table(results: Mapping[str, Any]) -> Table:
  rows = [
    (method_name(name), point["rule"], *_accuracy_cells(point))
    for name, verifier in results["verifiers"].items()
    for point in verifier["by_rule"]
  ]
  return Table(
    "The same votes under other rules",
    "The first rule of each verifier defines its score.",
    ("verifier", "rule", f"Best-of-{results['ns'][-1]}, %", "RM accuracy, %", "scored, %"),
    tuple(rows),
    num_text_columns=2,
  )


def _in_distribution_table(results: Mapping[str, Any]) -> Table:
  """Best-of-N and verification on the second split; empty if there is none."""
  inner = results.get("in_distribution")
  rows: list[tuple[str, ...]] = []
  if inner:
    rows = [(method_name("pass1"), percent(inner["pass1"]), "", "")]
    for method, points in inner["curves"].items():
      if "/" in method:
        continue
      checks = inner["verifiers"][method]["verification"] if method in inner["verifiers"] else None
      cells = (percent(checks["rm_accuracy"]), number(checks["auc_within_problems"])) if checks else ("", "")
      rows.append((method_name(method), percent(points[-1]), *cells))
  return Table(
    "In distribution",
    f"The same on {inner['num_problems']:,} held-out problems from the training distribution." if inner else "",
    ("method", f"n = {inner['ns'][-1]}" if inner else "", "RM accuracy, %", "AUC within problems"),
    tuple(rows),
  )
