"""The figures of the page of results: a panel a task, bands over seeds and problems; the same input gives the same
bytes (with the same matplotlib)."""

import dataclasses
from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from experiments.studies.runs import MAIN, SIZE, TRAIN, VERIFIERS, Task
from experiments.studies.seeds import Pooled
from experiments.studies.tables import seed_words, studied
from genrm_jax.evals import plots
from genrm_jax.evals.per_problem import COT, ORACLE, VOTES
from genrm_jax.evals.plots import Figure
from genrm_jax.evals.tables import method_name

_BAND = "Bands: 95% intervals over seeds and problems."
_FLAT = {ORACLE: (plots.GREY, "--"), "pass1": (plots.GREY, ":"), VOTES: ("black", ":")}


@dataclasses.dataclass(frozen=True)
class _Panel:
  """One task: curves of methods as (x, figure), and methods without an x as levels."""

  task: Task
  curves: dict[str, list[tuple[float, Pooled]]]
  levels: dict[str, Pooled]


def draw(tasks: Sequence[Task]) -> list[Figure]:
  """The figures that there is something for."""
  figures = [
    _figure(
      "best_of_n.png", f"Best-of-N accuracy by number of candidates. {_BAND}", "candidates N", _by_candidates(tasks)
    ),
    _figure(
      "votes.png",
      f"Best-of-N accuracy at the largest N by number of votes. Level: what does not depend on votes. {_BAND}",
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


def _by_candidates(tasks: Sequence[Task]) -> list[_Panel]:
  panels = []
  for task in tasks:
    names = [name for name in (ORACLE, VOTES, *VERIFIERS) if (MAIN, f"{name}/n={task.top}") in task.figures]
    curves = {name: [(n, task.figures[MAIN, f"{name}/n={n}"]) for n in task.main.results["ns"]] for name in names}
    panels.append(_Panel(task, curves, {"pass1": task.figures[MAIN, "pass1"]}))
  return panels


def _by_votes(tasks: Sequence[Task]) -> list[_Panel]:
  panels = []
  for task in tasks:
    curves = {
      name: [(point["k"], task.figures[MAIN, f"{name}/k={point['k']}"]) for point in verifier["by_votes"]]
      for name, verifier in task.main.verifiers.items()
      if verifier["by_votes"]
    }
    if curves:
      panels.append(_Panel(task, curves, _levels(task, [name for name in task.main.verifiers if name not in curves])))
  return panels


def _by_study(tasks: Sequence[Task], which: str, unit: float = 1) -> list[_Panel]:
  panels = []
  for task in (task.with_seeds_of_all(which) for task in tasks if task.variants(which)):
    curves = {
      name: [
        (float(f"{x * unit:.3g}"), task.figures[variant, task.best_of_n(name)])
        for x, variant in task.points(which, name)
        if x > 0
      ]
      for name in studied(task, which)
    }
    if curves:
      panels.append(_Panel(task, curves, _levels(task, [])))
  return panels


def _levels(task: Task, names: Sequence[str]) -> dict[str, Pooled]:
  return {name: task.figures[MAIN, f"{name}/n={task.top}"] for name in (ORACLE, VOTES, *names)}


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
      last |= {method_name(name): it.value for name, it in ends.items() if it.value is not None}
    plots.legend(row[-1], last, among=row)
    return Figure(file, caption, plots.png(canvas))


def _draw_panel(axes: Axes, panel: _Panel, x_label: str, dots: bool) -> None:
  shown: list[float] = []
  for name, points in panel.curves.items():
    known = [(x, it) for x, it in points if it.value is not None]
    xs, label = [x for x, _ in known], method_name(name)
    colour, marker = _look(name)
    if name == ORACLE:
      axes.plot(xs, [vars(it)["value"] for _, it in known], color=plots.GREY, linestyle="--", zorder=4, label=label)
    else:
      plots.line(axes, xs, [vars(it) for _, it in known], colour, marker, label)
    if dots:
      each = [(x, value) for x, it in known for value in it.by_seed.values()]
      axes.plot(*zip(*each, strict=True), "o", color=colour, alpha=0.5, markersize=3, markeredgewidth=0)
    shown += [value for _, it in known for value in (it.value, it.low, it.high) if value is not None]
  for name, level in panel.levels.items():
    if level.value is not None:
      colour, style = _FLAT.get(name, (_look(name)[0], ":"))
      axes.axhline(level.value, color=colour, linestyle=style, label=method_name(name))
      shown.append(level.value)
  xs = sorted({x for points in panel.curves.values() for x, _ in points})
  plots.log2_axis(axes, xs, x_label)
  plots.percent_axis(axes, f"Best-of-{panel.task.top if x_label != 'candidates N' else 'N'} accuracy", shown)
  axes.set_title(f"{panel.task.name}, {seed_words(panel.task)}")


def _look(name: str) -> tuple[str, str]:
  """Colour and marker; a method looks the same in all figures."""
  if name == VOTES:
    return "black", "X"
  order = [COT, *(other for other in VERIFIERS if other != COT)]
  index = order.index(name) if name in order else len(order)
  return plots.COLOURS[index % len(plots.COLOURS)], plots.MARKERS[index % len(plots.MARKERS)]
