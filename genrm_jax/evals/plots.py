"""The figures of a report, drawn without global state or timestamps: the same results give the same bytes."""

import dataclasses
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import EngFormatter, FixedLocator, FuncFormatter, LogLocator, NullLocator

from genrm_jax.evals.calibration import likelihoods
from genrm_jax.evals.costs import totals
from genrm_jax.evals.lengths import SIDES
from genrm_jax.evals.methods import WEIGHTED
from genrm_jax.evals.tables import SIDE_NAMES, length_spans, likelihood_note, method_name

# Okabe and Ito's palette, which colour-blind readers can tell apart; markers repeat the distinction.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#777777"
_FEW = 20  # fewer solutions than this say little about the share correct

STYLE: dict[Any, Any] = {
  "font.family": "DejaVu Sans",
  "font.size": 10.5,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.grid": True,
  "axes.axisbelow": True,
  "axes.titlesize": 11.5,
  "axes.titlelocation": "left",
  "grid.color": "#e3e3e3",
  "grid.linewidth": 0.8,
  "legend.frameon": False,
  "lines.linewidth": 1.8,
  "lines.markersize": 5.5,
  "text.parse_math": False,  # a name may contain "$"
}


@dataclasses.dataclass(frozen=True)
class Figure:
  """A drawn figure: file name, caption and PNG."""

  file: str
  caption: str
  png: bytes


def draw(results: Mapping[str, Any]) -> list[Figure]:
  """The figures that these results have data for, in reading order; always `best_of_n.png`."""
  figures = [
    Figure(
      "best_of_n.png",
      "Accuracy of the selected solution by number of candidates. Bands: 95% intervals over problems.",
      _by_candidates(results, "Best-of-N", [*results["verifiers"]]),
    )
  ]
  if weighted := [method for method in results["curves"] if method.startswith(f"{WEIGHTED}/")]:
    figures.append(
      Figure(
        "weighted_self_consistency.png",
        "Accuracy of weighted self-consistency, by the verifier whose scores are the weights.",
        _by_candidates(results, "Weighted self-consistency", weighted),
      )
    )
  if any(verifier["by_votes"] for verifier in results["verifiers"].values()):
    figures.append(
      Figure(
        "votes.png",
        f"Best-of-{results['ns'][-1]} and verification accuracy by number of votes. Dotted: verifiers with one vote.",
        _by_votes(results),
      )
    )
  if measured := results.get("costs"):
    figures.append(
      Figure(
        "costs.png",
        "Accuracy by the tokens or FLOPs of generator and verifier together. Solid: more candidates, with all votes;"
        f" dashed, open markers: more votes for {results['ns'][-1]} candidates.",
        _by_cost(results, measured),
      )
    )
  if binned := [name for name, verifier in results["verifiers"].items() if "reliability" in verifier]:
    figures.append(
      Figure(
        "reliability.png",
        "Share of correct solutions by score, in ten bins, with 95% intervals over problems. A calibrated verifier is"
        f" on the dashed line. Grey: share of solutions in the bin; open markers: fewer than {_FEW} solutions."
        + likelihood_note(results),
        _reliability(results, binned),
      )
    )
  probabilities = [
    name for name, verifier in results["verifiers"].items() if "length" in verifier and name not in likelihoods(results)
  ]
  if probabilities and len(results["length"]["shortest"]) > 1:
    figures.append(
      Figure(
        "length.png",
        "Mean score by length of the solution, correct and incorrect. Bands: 95% intervals over problems.",
        _by_length(results, probabilities),
      )
    )
  return figures


def _by_candidates(results: Mapping[str, Any], title: str, methods: Sequence[str]) -> bytes:
  """Accuracy against N for some methods, with the Oracle, self-consistency and pass@1."""
  with matplotlib.rc_context(STYLE):
    canvas = Canvas(figsize=(8.2, 4.4), layout="constrained")
    axes = canvas.subplots()
    curves = results["curves"]
    ns = results["ns"]
    oracle = [point["value"] for point in curves["oracle"]]
    axes.plot(ns, oracle, color=GREY, linestyle="--", zorder=4, label=label_of("oracle"))
    for method in methods:
      line(axes, ns, curves[method], *_style_of(results, method.rpartition("/")[2]), label=label_of(method))
    line(axes, ns, curves["self_consistency"], "black", "X", label=label_of("self_consistency"))
    axes.axhline(results["pass1"]["value"], color=GREY, linestyle=":", label=label_of("pass1"))
    log2_axis(axes, ns, "candidates N")
    percent_axis(axes, f"{title} accuracy", [*oracle, results["pass1"]["value"]])
    axes.set_title(_heading(results, f"{title} on {results['num_problems']:,} problems"))
    last = {label_of(method): curves[method][-1]["value"] for method in (*methods, "oracle", "self_consistency")}
    last[label_of("pass1")] = results["pass1"]["value"]
    legend(axes, last)
    return png(canvas)


def _by_votes(results: Mapping[str, Any]) -> bytes:
  """Best-of-N and verification accuracy against K, side by side; a verifier with one vote is a horizontal line."""
  with matplotlib.rc_context(STYLE):
    canvas = Canvas(figsize=(9.6, 4.2), layout="constrained")
    panels = canvas.subplots(1, 2)
    n = results["ns"][-1]
    ks = sorted({point["k"] for verifier in results["verifiers"].values() for point in verifier["by_votes"]})
    last: dict[str, float] = {}
    for axes, key, title in zip(
      panels, ("accuracy", "rm_accuracy"), (f"Best-of-{n} accuracy", "Verification (RM) accuracy"), strict=True
    ):
      shown = []
      for name, verifier in results["verifiers"].items():
        colour, marker = _style_of(results, name)
        points = [point for point in verifier["by_votes"] if point[key]["value"] is not None]
        if points:
          line(axes, [point["k"] for point in points], [point[key] for point in points], colour, marker, label_of(name))
          shown += [bound for point in points for bound in (point[key]["low"], point[key]["high"])]
          level = points[-1][key]["value"]
        else:
          level = (results["curves"][name][-1] if key == "accuracy" else verifier["verification"][key])["value"]
          if level is None:
            continue
          axes.axhline(level, color=colour, linestyle=":", label=label_of(name))
          shown.append(level)
        last.setdefault(label_of(name), level)
      log2_axis(axes, ks, "votes K per solution")
      percent_axis(axes, title, shown)
    canvas.suptitle(_heading(results, "Accuracy by number of votes"), x=0.008, ha="left", fontsize=11.5)
    legend(panels[1], last)
    return png(canvas)


def _by_cost(results: Mapping[str, Any], measured: Mapping[str, Any]) -> bytes:
  """Accuracy against tokens, and against FLOPs if the generator's are known."""
  units = ("tokens",) if measured["generator_params"] is None else ("tokens", "FLOPs")
  with matplotlib.rc_context(STYLE):
    canvas = Canvas(figsize=(3.4 + 3.6 * len(units), 4.4), layout="constrained")
    panels = canvas.subplots(1, len(units), squeeze=False, sharey=True)[0]
    last: dict[str, float] = {}
    for axes, unit in zip(panels, units, strict=True):
      shown = []
      for method, columns in measured["by_n"].items():
        name, costs = label_of(method), totals(columns, unit)
        colour, marker = _style_of(results, method) if method in results["verifiers"] else ("black", "X")
        if method == "pass1":  # a single point, usually under the first one of self-consistency
          axes.plot(costs, columns["accuracy"], "*", color=GREY, markersize=13, zorder=1.5, label=name)
        else:
          line(axes, costs, _points(columns), colour, marker, name)
        shown += columns["low"] + columns["high"]
        last[name] = columns["accuracy"][-1]
        if by_k := measured["by_k"].get(method):
          style = {"color": colour, "marker": marker, "linestyle": "--", "markerfacecolor": "white"}
          axes.plot(totals(by_k, unit), by_k["accuracy"], zorder=3, **style)
          shown += by_k["accuracy"]
      axes.set_xscale("log")
      axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if _decades(axes) < 2 else (1,)))
      axes.xaxis.set_minor_locator(NullLocator())
      axes.xaxis.set_major_formatter(EngFormatter(sep=""))
      axes.set_xlabel(f"{unit} per problem")
      percent_axis(axes, "accuracy" if axes is panels[0] else "", shown)
    canvas.suptitle(_heading(results, "Accuracy against cost"), x=0.008, ha="left", fontsize=11.5)
    legend(panels[-1], last)
    return png(canvas)


def _decades(axes: Axes) -> float:
  low, high = axes.get_xlim()
  return math.log10(high / low)


def _points(columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
  keys = zip(columns["accuracy"], columns["low"], columns["high"], strict=True)
  return [{"value": value, "low": low, "high": high} for value, low, high in keys]


def _reliability(results: Mapping[str, Any], names: Sequence[str]) -> bytes:
  """One panel per verifier, up to three in a row."""
  across = 2 if len(names) == 4 else min(3, len(names))
  down = -(-len(names) // across)
  with matplotlib.rc_context(STYLE):
    canvas = Canvas(figsize=(0.8 + 3.0 * across, 0.7 + 3.0 * down), layout="constrained")
    panels = canvas.subplots(down, across, squeeze=False, sharex=True, sharey=True).reshape(-1)
    for axes, name in zip(panels, names, strict=False):
      bins = results["verifiers"][name]["reliability"]
      colour, marker = _style_of(results, name)
      width = 1 / len(bins["count"])
      total = max(1, sum(bins["count"]))
      edges = [width * index for index in range(len(bins["count"]))]
      axes.bar(edges, [count / total for count in bins["count"]], width, align="edge", color="#d9d9d9")
      axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
      filled = [at for at, count in enumerate(bins["count"]) if count]
      x, y, low, high = ([bins[key][at] for at in filled] for key in ("score", "right", "low", "high"))
      axes.vlines(x, low, high, color=colour, linewidth=1.4)
      axes.plot(x, y, color=colour)
      for at, *place in zip(filled, x, y, strict=True):
        face = "white" if bins["count"][at] < _FEW else colour
        axes.plot(*place, color=colour, marker=marker, markerfacecolor=face)
      ece = results["verifiers"][name]["verification"]["ece"]
      axes.set_title(f"{label_of(name)}: ECE {ece:.3f}" if ece is not None else f"{label_of(name)}: no scores")
      axes.set_xlim(-0.03, 1.03)
      axes.set_ylim(-0.03, 1.03)
    for axes in panels[len(names) :]:
      axes.set_axis_off()
    for at, axes in enumerate(panels[: len(names)]):
      if at + across >= len(names):  # nothing is drawn below this panel
        axes.set_xlabel("score")
        axes.tick_params(labelbottom=True)
      if at % across == 0:
        axes.set_ylabel("share correct")
    canvas.suptitle(_heading(results, "Calibration"), x=0.008, ha="left", fontsize=11.5)
    return png(canvas)


def _by_length(results: Mapping[str, Any], names: Sequence[str]) -> bytes:
  """Mean score by length bin, correct and incorrect solutions side by side."""
  spans = length_spans(results["length"])
  with matplotlib.rc_context(STYLE):
    canvas = Canvas(figsize=(9.6, 4.2), layout="constrained")
    panels = canvas.subplots(1, 2, sharey=True)
    last: dict[str, float] = {}
    for axes, side in zip(panels, SIDES, strict=True):
      for name in names:
        scores = results["verifiers"][name]["length"]["mean_score"][side]
        filled = [at for at, value in enumerate(scores["value"]) if value is not None]
        if filled:
          points = [{key: scores[key][at] for key in scores} for at in filled]
          line(axes, filled, points, *_style_of(results, name), label=label_of(name))
          last[label_of(name)] = points[-1]["value"]
      axes.set_xticks(range(len(spans)), spans, fontsize=8.5)
      axes.set_xlim(-0.3, len(spans) - 0.7)
      axes.set_ylim(-0.03, 1.03)
      axes.set_xlabel(f"{results['length']['unit']} of the solution")
      axes.set_title(f"{SIDE_NAMES[side]} solutions")
    panels[0].set_ylabel("mean score")
    canvas.suptitle(_heading(results, "Score against length"), x=0.008, ha="left", fontsize=11.5)
    legend(panels[-1], last, panels=[*panels])
    return png(canvas)


def line(
  axes: Axes, x: Sequence[float], points: Sequence[Mapping[str, Any]], colour: str, marker: str, label: str
) -> None:
  """A curve with a band for its intervals."""
  axes.plot(x, [point["value"] for point in points], color=colour, marker=marker, label=label)
  low, high = ([point[bound] for point in points] for bound in ("low", "high"))
  axes.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)


def _style_of(results: Mapping[str, Any], verifier: str) -> tuple[str, str]:
  """Colour and marker by position among the verifiers, so that a verifier looks the same in all figures."""
  index = [*results["verifiers"]].index(verifier)
  return COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]


def label_of(method: str) -> str:
  """The label of a method or of the verifier that weighs its votes; Matplotlib hides labels that start with "_"."""
  name = method_name(method.rpartition("/")[2])
  return f" {name}" if name.startswith("_") else name


def _heading(results: Mapping[str, Any], text: str) -> str:
  task = results["meta"].get("task")
  return f"{task}: {text}" if task else text


def log2_axis(axes: Axes, values: Sequence[float], label: str) -> None:
  """A logarithmic x axis with ticks at those values that leave room for labels."""
  axes.set_xscale("log", base=2)
  axes.xaxis.set_major_locator(FixedLocator(_spread(values)))
  axes.xaxis.set_minor_locator(NullLocator())
  axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
  axes.set_xlabel(label)
  if len(values) == 1:
    axes.set_xlim(values[0] / 2, values[0] * 2)


def _spread(values: Sequence[float]) -> list[float]:
  """The values whose labels do not overlap, preferring large ones."""
  kept: list[float] = []
  for value in sorted(values, reverse=True):
    if not kept or value <= kept[-1] / 1.25:
      kept.append(value)
  return kept[::-1]


def percent_axis(axes: Axes, label: str, shown: Iterable[float]) -> None:
  """A percent axis around the values shown, spanning at least ten points, without labels below 0 or above 100."""
  low, high = axes.get_ylim()
  low, high = max(min(low, *shown), -0.02), min(max(high, *shown), 1.02)
  spare = max(0.0, 0.1 - (high - low)) / 2
  axes.set_ylim(max(low - spare, -0.02), min(high + spare, 1.02))
  # The tick at 1 may be slightly above 1.
  axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.3g}%" if -1e-9 < v < 1 + 1e-9 else ""))
  axes.set_ylabel(label)


def legend(axes: Axes, last: Mapping[str, float], panels: Sequence[Axes] = ()) -> None:
  """A legend right of the axes, in order of the lines' last values, for these axes or for all `panels`."""
  handles: dict[str, Any] = {}
  for panel in panels or (axes,):
    handles |= {label: handle for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
  labels = sorted(handles, key=lambda label: -last.get(label, 0.0))
  axes.legend(
    [handles[label] for label in labels], labels, loc="center left", bbox_to_anchor=(1.01, 0.5), borderaxespad=0
  )


def png(canvas: Canvas) -> bytes:
  """The canvas as PNG bytes without metadata that varies."""
  FigureCanvasAgg(canvas)
  buffer = io.BytesIO()
  canvas.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
  return buffer.getvalue()
