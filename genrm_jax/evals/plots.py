"""The figures of a report, drawn without global state and without timestamps: the same results give the same bytes."""

import dataclasses
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from genrm_jax.evals.tables import method_name

# Okabe and Ito's palette, which colour-blind readers can tell apart; the marker says the same once more.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#777777"

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
  """The figures that these results have something for: Best-of-N, weighted votes, accuracy by number of votes."""
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
