"""The figures of the results page: one panel per task, with bands over seeds and problems.

The same input gives the same bytes with the same Matplotlib.
"""

import dataclasses
from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from experiments.studies.quantities import COT, ORACLE, SELF_CONSISTENCY
from experiments.studies.runs import MAIN, SIZE, TRAIN, VERIFIERS, StudyTask
from experiments.studies.seeds import Pooled
from experiments.studies.tables import methods, seed_words, studied
from genrm_jax.evals import plots
from genrm_jax.evals.plots import Figure, label_of

_BAND = "Bands: 95% intervals over seeds and problems."
_FLAT = {ORACLE: (plots.GREY, "--"), "pass1": (plots.GREY, ":"), SELF_CONSISTENCY: ("black", ":")}


@dataclasses.dataclass(frozen=True)
class _Panel:
  """One task: curves of methods as (x, accuracy), and methods without an x as levels."""

  task: StudyTask
  curves: dict[str, list[tuple[float, Pooled]]]
  levels: dict[str, Pooled]


def draw(tasks: Sequence[StudyTask]) -> list[Figure]:
  """The figures that there is data for."""
  figures = [
    _figure(
      "best_of_n.png", f"Best-of-N accuracy by number of candidates. {_BAND}", "candidates N", _by_candidates(tasks)
    ),
    _figure(
      "votes.png",
      f"Best-of-N accuracy at the largest N by number of votes. Horizontal: methods that sample no votes. {_BAND}",
      "votes K per solution",
      _by_votes(tasks),
    ),
    _figure(
      "train_size.png",
      f"Best-of-N accuracy at the largest N by number of training problems. {_BAND} Dots: each seed.",
      "training problems",
      _by_study(tasks, TRAIN),
      dots=True,
    ),
    _figure(
      "model_size.png",
      f"Best-of-N accuracy at the largest N by model size. {_BAND} Dots: each seed.",
      "parameters, millions",
      _by_study(tasks, SIZE, 1e-6),
      dots=True,
    ),
  ]
  return [figure for figure in figures if figure]


def _by_candidates(tasks: Sequence[StudyTask]) -> list[_Panel]:
  panels = []
  for task in tasks:
    names = [ORACLE, *(name for name in methods(task) if name != ORACLE and "/" not in name)]
    curves = {name: [(n, task.pooled[MAIN, f"{name}/n={n}"]) for n in task.main.results["ns"]] for name in names}
    panels.append(_Panel(task, curves, {"pass1": task.pooled[MAIN, "pass1"]}))
  return panels


def _by_votes(tasks: Sequence[StudyTask]) -> list[_Panel]:
  panels = []
  for task in tasks:
    curves = {
      name: [(point["k"], task.pooled[MAIN, f"{name}/k={point['k']}"]) for point in verifier["by_votes"]]
      for name, verifier in task.main.verifiers.items()
      if verifier["by_votes"]
    }
    if curves:
      panels.append(_Panel(task, curves, _levels(task, [name for name in task.main.verifiers if name not in curves])))
  return panels


def _by_study(tasks: Sequence[StudyTask], which: str, unit: float = 1) -> list[_Panel]:
  panels = []
  for task in (task.with_seeds_of_all(which) for task in tasks if task.variants(which)):
    curves = {
      name: [
        (float(f"{x * unit:.3g}"), task.pooled[variant, task.best_of_n(name)])
        for x, variant in task.points(which, name)
        if x > 0
      ]
      for name in studied(task, which)
    }
    if curves:
      panels.append(_Panel(task, curves, _levels(task, [])))
  return panels


def _levels(task: StudyTask, names: Sequence[str]) -> dict[str, Pooled]:
  return {name: task.pooled[MAIN, f"{name}/n={task.top}"] for name in (ORACLE, SELF_CONSISTENCY, *names)}


def _figure(file: str, caption: str, x_label: str, panels: Sequence[_Panel], dots: bool = False) -> Figure | None:
  if not panels:
    return None
  with matplotlib.rc_context(plots.STYLE):
    canvas = Canvas(figsize=(4.1 * len(panels) + 2, 4.2), layout="constrained")
    row = list(canvas.subplots(1, len(panels), squeeze=False)[0])
    last: dict[str, float] = {}
    for axes, panel in zip(row, panels, strict=True):
      _draw_panel(axes, panel, x_label, dots)
      ends = {name: points[-1][1] for name, points in panel.curves.items()} | panel.levels
      last |= {label_of(name): end.value for name, end in ends.items() if end.value is not None}
    plots.legend(row[-1], last, panels=row)
    return Figure(file, caption, plots.png(canvas))


def _draw_panel(axes: Axes, panel: _Panel, x_label: str, dots: bool) -> None:
  shown: list[float] = []
  for name, points in panel.curves.items():
    known = [(x, pooled) for x, pooled in points if pooled.value is not None]
    xs, label = [x for x, _ in known], label_of(name)
    colour, marker = _style_of(panel.task, name)
    if name == ORACLE:
      oracle = [pooled.value for _, pooled in known if pooled.value is not None]
      axes.plot(xs, oracle, color=plots.GREY, linestyle="--", zorder=4, label=label)
    else:
      plots.line(axes, xs, [vars(pooled) for _, pooled in known], colour, marker, label)
    if dots:
      each = [(x, value) for x, pooled in known for value in pooled.by_seed.values()]
      axes.plot(*zip(*each, strict=True), "o", color=colour, alpha=0.5, markersize=3, markeredgewidth=0)
    shown += [value for _, pooled in known for value in (pooled.value, pooled.low, pooled.high) if value is not None]
  for name, level in panel.levels.items():
    if level.value is not None:
      colour, style = _FLAT.get(name) or (_style_of(panel.task, name)[0], ":")
      axes.axhline(level.value, color=colour, linestyle=style, label=label_of(name))
      shown.append(level.value)
  xs = sorted({x for points in panel.curves.values() for x, _ in points})
  plots.log2_axis(axes, xs, x_label)
  plots.percent_axis(axes, f"Best-of-{panel.task.top if x_label != 'candidates N' else 'N'} accuracy", shown)
  axes.set_title(f"{panel.task.name}, {seed_words(panel.task)}")


def _style_of(task: StudyTask, name: str) -> tuple[str, str]:
  """Colour and marker of a method, the same in all figures."""
  if name == SELF_CONSISTENCY:
    return "black", "X"
  order = list(dict.fromkeys((COT, *VERIFIERS, *task.main.verifiers)))
  index = order.index(name) if name in order else len(order)
  return plots.COLOURS[index % len(plots.COLOURS)], plots.MARKERS[index % len(plots.MARKERS)]
