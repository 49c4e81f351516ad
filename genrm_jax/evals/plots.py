"""The figures of a report, drawn without global state and without timestamps: the same results give the same bytes."""

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

from genrm_jax.evals.calibration import LIKELIHOODS
from genrm_jax.evals.costs import totals
from genrm_jax.evals.lengths import SIDES
from genrm_jax.evals.tables import length_spans, likelihood_note, method_name

# Okabe and Ito's palette, which colour-blind readers can tell apart; the marker says the same once more.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#777777"
_FEW = 20  # solutions, whose share of right ones says little

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
}


@dataclasses.dataclass(frozen=True)
class Figure:
  """A drawn figure: its file name, what it shows, and the PNG."""

  file: str
  caption: str
  png: bytes


def draw(results: Mapping[str, Any]) -> list[Figure]:
  """The figures that these results have something for, in reading order; `best_of_n.png` is always there."""
  figures = [
    Figure(
      "best_of_n.png",
      "Accuracy of the chosen solution by number of candidates. Bands are 95% intervals over problems.",
      _by_candidates(results, "Best-of-N", [*results["verifiers"]]),
    )
  ]
  if weighted := [method for method in results["curves"] if method.startswith("weighted_self_consistency/")]:
    figures.append(
      Figure(
        "weighted_self_consistency.png",
        "Accuracy of the majority answer, each vote weighted by a verifier's score.",
        _by_candidates(results, "Weighted self-consistency", weighted),
      )
    )
  if any(verifier["by_votes"] for verifier in results["verifiers"].values()):
    figures.append(
      Figure(
        "votes.png",
        f"Accuracy by number of votes: Best-of-{results['ns'][-1]} and verification. Dotted: verifiers of one vote.",
        _by_votes(results),
      )
    )
  if measured := results.get("costs"):
    figures.append(
      Figure(
        "costs.png",
        "Accuracy by what a method reads and samples for a problem, generator and verifier together. Solid: more"
        f" candidates, with all votes; dashed, open markers: more votes on {results['ns'][-1]} candidates.",
        _by_cost(results, measured),
      )
    )
  if binned := [name for name, verifier in results["verifiers"].items() if "reliability" in verifier]:
    figures.append(
      Figure(
        "reliability.png",
        "Share of right solutions by score, in ten bins, with 95% intervals over problems. On the dashed line a score"
        f" is the chance to be right. Grey: the share of solutions with such a score; open markers: fewer than {_FEW}."
        + likelihood_note(results),
        _reliability(results, binned),
      )
    )
  graded = [name for name, it in results["verifiers"].items() if "length" in it and name not in LIKELIHOODS]
  if graded and len(results["length"]["shortest"]) > 1:
    figures.append(
      Figure(
        "length.png",
        "Mean score by the length of the solution, for right and wrong ones. Bands are 95% intervals over problems.",
        _by_length(results, graded),
      )
    )
  return figures


def _by_candidates(results: Mapping[str, Any], title: str, methods: Sequence[str]) -> bytes:
  """Accuracy against N: the methods with bands, between the Oracle and pass@1."""
  with matplotlib.rc_context(STYLE):
    canvas = Canvas(figsize=(8.2, 4.4), layout="constrained")
    axes = canvas.subplots()
    curves = results["curves"]
    ns = results["ns"]
    oracle = [point["value"] for point in curves["oracle"]]
    axes.plot(ns, oracle, color=GREY, linestyle="--", zorder=4, label=method_name("oracle"))
    # By verifier, not by rank, so that a verifier looks the same in all figures.
    for method in methods:
      line(axes, ns, curves[method], *_look(results, method.rpartition("/")[2]), label=_short(method))
    line(axes, ns, curves["self_consistency"], "black", "X", label=method_name("self_consistency"))
    axes.axhline(results["pass1"]["value"], color=GREY, linestyle=":", label=method_name("pass1"))
    log2_axis(axes, ns, "candidates N")
    percent_axis(axes, f"{title} accuracy", [*oracle, results["pass1"]["value"]])
    axes.set_title(_heading(results, f"{title} on {results['num_problems']:,} problems"))
    last = {_short(method): curves[method][-1]["value"] for method in methods}
    last |= {method_name(name): curves[name][-1]["value"] for name in ("oracle", "self_consistency")}
    last[method_name("pass1")] = results["pass1"]["value"]
    legend(axes, last)
    return png(canvas)


def _by_votes(results: Mapping[str, Any]) -> bytes:
  """Best-of-N and verification accuracy against K, side by side; a verifier of one vote is a level line."""
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
        colour, marker = _look(results, name)
        points = [point for point in verifier["by_votes"] if point[key]["value"] is not None]
        if points:
          line(axes, [point["k"] for point in points], [point[key] for point in points], colour, marker, _short(name))
          shown += [bound for point in points for bound in (point[key]["low"], point[key]["high"])]
          level = points[-1][key]["value"]
        else:
          level = (results["curves"][name][-1] if key == "accuracy" else verifier["verification"][key])["value"]
          if level is None:
            continue
          axes.axhline(level, color=colour, linestyle=":", label=_short(name))
          shown.append(level)
        last.setdefault(_short(name), level)
      log2_axis(axes, ks, "votes K per solution")
      percent_axis(axes, title, shown)
    canvas.suptitle(_heading(results, "Accuracy by number of votes"), x=0.008, ha="left", fontsize=11.5)
    legend(panels[1], last)
    return png(canvas)


def _by_cost(results: Mapping[str, Any], measured: Mapping[str, Any]) -> bytes:
  """Accuracy against tokens, and against FLOPs where those of the generator are known."""
  units = ("tokens",) if measured["generator_params"] is None else ("tokens", "FLOPs")
  with matplotlib.rc_context(STYLE):
    canvas = Canvas(figsize=(3.4 + 3.6 * len(units), 4.4), layout="constrained")
    panels = canvas.subplots(1, len(units), squeeze=False, sharey=True)[0]
    last: dict[str, float] = {}
    for axes, unit in zip(panels, units, strict=True):
      shown = []
      for method, columns in measured["by_n"].items():
        name, costs = method_name(method), totals(columns, unit)
        colour, marker = _look(results, method) if method in results["verifiers"] else ("black", "X")
        if method == "pass1":  # one point, mostly under the first of self-consistency
          axes.plot(costs, columns["accuracy"], "*", color=GREY, markersize=13, zorder=1.5, label=name)
        else:
          line(axes, costs, _points(columns), colour, marker, name)
        shown += columns["low"] + columns["high"]
        last[name] = columns["accuracy"][-1]
        if by_k := measured["by_k"].get(method):
          look = {"color": colour, "marker": marker, "linestyle": "--", "markerfacecolor": "white"}
          axes.plot(totals(by_k, unit), by_k["accuracy"], zorder=3, **look)
          shown += by_k["accuracy"]
      axes.set_xscale("log")
      axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if _decades(axes) < 2 else (1,)))
      axes.xaxis.set_minor_locator(NullLocator())
      axes.xaxis.set_major_formatter(EngFormatter(sep=""))
      axes.set_xlabel(f"{unit} a problem")
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
  """A panel a verifier, up to three in a row."""
  across = 2 if len(names) == 4 else min(3, len(names))
  down = -(-len(names) // across)
  with matplotlib.rc_context(STYLE):
    canvas = Canvas(figsize=(0.8 + 3.0 * across, 0.7 + 3.0 * down), layout="constrained")
    panels = canvas.subplots(down, across, squeeze=False, sharex=True, sharey=True).reshape(-1)
    for axes, name in zip(panels, names, strict=False):
      bins = results["verifiers"][name]["reliability"]
      colour, marker = _look(results, name)
      width = 1 / len(bins["count"])
      total = max(1, sum(bins["count"]))
      edges = [width * index for index in range(len(bins["count"]))]
      axes.bar(edges, [count / total for count in bins["count"]], width, align="edge", color="#d9d9d9")
      axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
      held = [at for at, count in enumerate(bins["count"]) if count]
      x, y, low, high = ([bins[key][at] for at in held] for key in ("score", "right", "low", "high"))
      axes.vlines(x, low, high, color=colour, linewidth=1.4)
      axes.plot(x, y, color=colour)
      for at, *place in zip(held, x, y, strict=True):
        face = "white" if bins["count"][at] < _FEW else colour
        axes.plot(*place, color=colour, marker=marker, markerfacecolor=face)
      ece = results["verifiers"][name]["verification"]["ece"]
      axes.set_title(f"{_short(name)}: ECE {ece:.3f}" if ece is not None else f"{_short(name)}: no scores")
      axes.set_xlim(-0.03, 1.03)
      axes.set_ylim(-0.03, 1.03)
    for axes in panels[len(names) :]:
      axes.set_axis_off()
    for at, axes in enumerate(panels[: len(names)]):
      # The panel below may be an empty one.
      if at + across >= len(names):
        axes.set_xlabel("score")
        axes.tick_params(labelbottom=True)
      if at % across == 0:
        axes.set_ylabel("share right")
    canvas.suptitle(_heading(results, "Calibration"), x=0.008, ha="left", fontsize=11.5)
    return png(canvas)


def _by_length(results: Mapping[str, Any], names: Sequence[str]) -> bytes:
  """Mean score by bin of length, right and wrong solutions side by side."""
  spans = length_spans(results["length"])
  with matplotlib.rc_context(STYLE):
    canvas = Canvas(figsize=(9.6, 4.2), layout="constrained")
    panels = canvas.subplots(1, 2, sharey=True)
    last: dict[str, float] = {}
    for axes, side in zip(panels, SIDES, strict=True):
      for name in names:
        scores = results["verifiers"][name]["length"]["mean_score"][side]
        held = [at for at, value in enumerate(scores["value"]) if value is not None]
        if held:
          points = [{key: scores[key][at] for key in scores} for at in held]
          line(axes, held, points, *_look(results, name), label=_short(name))
          last[_short(name)] = points[-1]["value"]
      axes.set_xticks(range(len(spans)), spans, fontsize=8.5)
      axes.set_xlim(-0.3, len(spans) - 0.7)
      axes.set_ylim(-0.03, 1.03)
      axes.set_xlabel(f"{results['length']['unit']} of the solution")
      axes.set_title(f"{side} solutions")
    panels[0].set_ylabel("mean score")
    canvas.suptitle(_heading(results, "Score against length"), x=0.008, ha="left", fontsize=11.5)
    legend(panels[-1], last, among=[*panels])
    return png(canvas)


def line(
  axes: Axes, x: Sequence[float], points: Sequence[Mapping[str, Any]], colour: str, marker: str, label: str
) -> None:
  """A curve with the band of its intervals."""
  axes.plot(x, [point["value"] for point in points], color=colour, marker=marker, label=label)
  low, high = ([point[bound] for point in points] for bound in ("low", "high"))
  axes.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)


def _look(results: Mapping[str, Any], verifier: str) -> tuple[str, str]:
  index = [*results["verifiers"]].index(verifier)
  return COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]


def _short(method: str) -> str:
  return method_name(method.rpartition("/")[2])


def _heading(results: Mapping[str, Any], text: str) -> str:
  task = results["meta"].get("task")
  return f"{task}: {text}" if task else text


def log2_axis(axes: Axes, values: Sequence[float], label: str) -> None:
  """A logarithmic x axis with labels at (some of) the values."""
  axes.set_xscale("log", base=2)
  axes.xaxis.set_major_locator(FixedLocator(_spread(values)))
  axes.xaxis.set_minor_locator(NullLocator())
  axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
  axes.set_xlabel(label)
  if len(values) == 1:
    axes.set_xlim(values[0] / 2, values[0] * 2)


def _spread(values: Sequence[float]) -> list[float]:
  """The values that have room for a label, the largest first of all."""
  kept: list[float] = []
  for value in sorted(values, reverse=True):
    if not kept or value <= kept[-1] / 1.25:
      kept.append(value)
  return kept[::-1]


def percent_axis(axes: Axes, label: str, shown: Iterable[float]) -> None:
  """Percent, around what is shown, over at least ten points where 0 to 100 has room; no label beyond these."""
  low, high = axes.get_ylim()
  low, high = max(min(low, *shown), -0.02), min(max(high, *shown), 1.02)
  spare = max(0.0, 0.1 - (high - low)) / 2
  axes.set_ylim(max(low - spare, -0.02), min(high + spare, 1.02))
  # A tick of 1 may be a little more than 1.
  axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.3g}%" if -1e-9 < v < 1 + 1e-9 else ""))
  axes.set_ylabel(label)


def legend(axes: Axes, last: Mapping[str, float], among: Sequence[Axes] = ()) -> None:
  """Outside, to the right, in the order in which the lines end; of all panels that are named, each label once."""
  found: dict[str, Any] = {}
  for panel in among or (axes,):
    found |= {label: handle for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
  labels = sorted(found, key=lambda label: -last.get(label, 0.0))
  axes.legend(
    [found[label] for label in labels], labels, loc="center left", bbox_to_anchor=(1.01, 0.5), borderaxespad=0
  )


def png(canvas: Canvas) -> bytes:
  """The drawing as a file, without a date."""
  FigureCanvasAgg(canvas)
  buffer = io.BytesIO()
  canvas.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
  return buffer.getvalue()
