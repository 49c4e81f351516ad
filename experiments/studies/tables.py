"""The tables of the page of results: several tasks, each over several seeds."""

import math
from collections.abc import Callable, Iterable, Sequence

from experiments.studies import runs as studies
from experiments.studies.runs import ABLATIONS, LAMBDA, MAIN, SIZE, STEPS, TRAIN, VERIFIERS, Task
from experiments.studies.seeds import Pooled
from genrm_jax.evals.per_problem import COT, ORACLE, VOTES
from genrm_jax.evals.tables import NAMES, Table, method_name, number, percent

_NONE = "–"
BASELINES = (VOTES, f"weighted_{VOTES}/{COT}")
OTHERS = (VOTES, "orm", "genrm")  # what GenRM-CoT is compared with, problem by problem

Show = Callable[[Pooled | None], str]


def _percent(pooled: Pooled | None) -> str:
  return percent(vars(pooled)) if pooled else _NONE


def _signed(pooled: Pooled | None) -> str:
  return percent(vars(pooled), signed=True) if pooled else _NONE


def _number(pooled: Pooled | None) -> str:
  return number(vars(pooled)) if pooled else _NONE


def _each(pooled: Pooled | None, runs: Iterable[int], sign: str = "") -> str:
  """The figure of each seed of these runs."""
  values = [pooled.by_seed.get(seed) if pooled else None for seed in runs]
  return " / ".join(_NONE if value is None else f"{100 * value:{sign}.1f}" for value in values)


def _seeds(task: Task, variant: str = MAIN) -> str:
  return ", ".join(str(seed) for seed in task.runs[variant])


def seed_words(task: Task) -> str:
  """The seeds of the main run, in words."""
  return f"seed{'s' if len(task.runs[MAIN]) > 1 else ''} {_seeds(task)}"


def methods(task: Task) -> list[str]:
  """What chooses a solution in the main run, weakest kind first; the Oracle last."""
  found = task.main.verifiers
  known = [name for name in VERIFIERS if name in found]
  return [*BASELINES[: 1 + (COT in found)], *known, *(name for name in found if name not in known), ORACLE]


def _over_tasks(tasks: Sequence[Task], rows: Sequence[tuple[str, str, Show, str]], title: str, note: str) -> Table:
  """A table with two columns a task, the figure and its seeds; a row is (name, figure at the largest n, shown how)."""
  header = ["", *(cell for task in tasks for cell in (f"{task.name}, %", seed_words(task)))]
  cells = []
  for name, figure, show, sign in rows:
    found = [task.figures.get((MAIN, figure.format(n=task.top))) for task in tasks]
    if any(found):
      cells.append(
        (
          name,
          *(
            cell for task, it in zip(tasks, found, strict=True) for cell in (show(it), _each(it, task.runs[MAIN], sign))
          ),
        )
      )
  return Table(title, note, tuple(header), tuple(cells))


def best_of_n(tasks: Sequence[Task]) -> Table:
  names = dict.fromkeys(name for task in tasks for name in methods(task))
  names = dict.fromkeys([*(name for name in names if name != ORACLE), ORACLE])
  rows: list[tuple[str, str, Show, str]] = [("pass@1", "pass1", _percent, "")]
  rows += [(_long_name(name), f"{name}/n={{n}}", _percent, "") for name in names]
  tops = ", ".join(f"N = {n}" for n in dict.fromkeys(task.top for task in tasks))
  return _over_tasks(
    tasks,
    rows,
    f"Table 1. Best-of-N accuracy, {tops}, out of distribution",
    "Percent of problems; in brackets the 95% interval over seeds and problems, beside it the figure of each seed.",
  )


def gains(tasks: Sequence[Task]) -> Table:
  rows: list[tuple[str, str, Show, str]] = [
    (f"{NAMES[COT]}, percent of the Oracle's accuracy", f"{COT}/{ORACLE}", _percent, "")
  ]
  rows += [(f"{NAMES[COT]} minus {method_name(other)}", f"{COT}-{other}", _signed, "+") for other in OTHERS]
  return _over_tasks(
    tasks,
    rows,
    f"What {NAMES[COT]} adds",
    "Differences are points of percent, paired by seed and problem. An interval that spans 0 does not show one.",
  )


def _long_name(method: str) -> str:
  return f"Self-consistency, {method_name(method)}" if "/" in method else method_name(method)


def verification(tasks: Sequence[Task]) -> Table:
  """Table 2: in distribution beside out of distribution."""
  rows = []
  for task in tasks:
    inner_n = {
      max(r.results["in_distribution"]["ns"]) for r in task.runs[MAIN].values() if "in_distribution" in r.results
    }
    for name in ("pass1", *methods(task)):
      best = "pass1" if name == "pass1" else f"{name}/n={task.top}"
      inner = "pass1" if name == "pass1" else f"{name}/n={max(inner_n, default=0)}"
      found = {figure: task.figures.get((MAIN, figure)) for figure in (best, *_checks(name))}
      within = {figure: task.figures.get((MAIN, f"in_distribution/{figure}")) for figure in (inner, *_checks(name))}
      accuracy, auc = _checks(name)
      rows.append(
        (
          task.name,
          "pass@1" if name == "pass1" else _long_name(name),
          _percent(within[inner]),
          _percent(found[best]),
          *(_percent(it[accuracy]) for it in (within, found)),
          *(_number(it[auc]) for it in (within, found)),
        )
      )
  both = [
    f"{figure}{where}" for figure in ("Best-of-N, %", "RM accuracy, %", "AUC within problems") for where in _WHERE
  ]
  return Table(
    "Table 2. Verification, in distribution and out of distribution",
    "RM accuracy: is a solution called right (score above 0.5) if it is? AUC within problems: the chance that a right"
    " solution outscores a wrong one of the same problem, averaged over problems that have both.",
    ("task", "method", *both),
    tuple(rows),
    num_text_columns=2,
  )


_WHERE = (" (in)", " (out)")


def _checks(method: str) -> tuple[str, str]:
  return f"{method}/rm_accuracy", f"{method}/auc_within_problems"


def study(tasks: Sequence[Task], which: str) -> Table:
  """The numbers of a figure: Best-of-N of each verifier at each point of a study."""
  rows = []
  for task in tasks:
    for verifier in studied(task, which):
      for x, variant in task.points(which, verifier):
        figure = task.best_of_n(verifier)
        pooled = task.figures[variant, figure]
        change = _NONE if variant == MAIN else _signed(task.change(variant, figure))
        where = (task.name, method_name(verifier), f"{x:,g}" if x < 1e6 else f"{x / 1e6:.2f}M")
        rows.append((*where, _percent(pooled), _each(pooled, task.runs[variant]), change, _seeds(task, variant)))
  header = (
    "task",
    "verifier",
    _AXES[which],
    "Best-of-N, %",
    "each seed",
    f"minus {MAIN}",
    "seeds",
  )
  note = _votes(tasks) if any(COT in studied(task, which) for task in tasks) else ""
  return Table(f"Accuracy by {which}", note, header, tuple(rows), num_text_columns=2)


def _votes(tasks: Sequence[Task]) -> str:
  """With how many votes studies of GenRM-CoT are compared."""
  found = dict.fromkeys(task.best_of_n(COT).partition("/k=")[2] for task in tasks)
  return f"{NAMES[COT]} with K = {' or '.join(k for k in found if k)} votes."


_AXES = {TRAIN: "training problems", STEPS: "updates", SIZE: "parameters"}


def studied(task: Task, which: str) -> list[str]:
  """The verifiers that a study has points of."""
  found = {name for variant in task.variants(which) for run in task.runs[variant].values() for name in run.trained()}
  return [name for name in task.main.verifiers if name in found and task.points(which, name)]


def unified(tasks: Sequence[Task]) -> Table:
  """Verification and generation by lambda."""
  rows = []
  for task in tasks:
    points = task.points(LAMBDA, COT)
    base = next((variant for x, variant in points if x == 0), MAIN)
    alone = next((variant for x, variant in points if x == math.inf), "")
    for x, variant in points:
      best, generation = task.best_of_n(COT), f"generation/{COT}"
      rows.append(
        (
          task.name,
          "solutions only" if x == math.inf else f"{x:g}",
          _percent(task.figures[variant, best]),
          _NONE if variant == base else _signed(task.change(variant, best, base)),
          _percent(task.figures.get((variant, generation))),
          _NONE if variant == alone else _signed(task.change(variant, generation, alone)),
          _each(task.figures[variant, best], task.runs[variant]),
          _each(task.figures.get((variant, generation)), task.runs[variant]),
          _seeds(task, variant),
        )
      )
  return Table(
    f"Unified training: {NAMES[COT]} trained on solutions too, with weight lambda",
    "Best-of-N: the model as a verifier. pass@1: the same model as a generator. Differences are in points of percent,"
    f" paired by seed and problem. {_votes(tasks)}",
    (
      "task",
      "lambda",
      "Best-of-N, %",
      "minus lambda 0",
      "pass@1, %",
      "minus solutions only",
      "Best-of-N of each seed",
      "pass@1 of each seed",
      "seeds",
    ),
    tuple(rows),
  )


def ablations(tasks: Sequence[Task]) -> Table:
  rows = []
  for task in tasks:
    for variant in (MAIN, *task.variants(ABLATIONS)) if task.variants(ABLATIONS) else ():
      run = next(iter(task.runs[variant].values()))
      best = task.best_of_n(COT)
      if COT not in run.verifiers:
        continue
      changed = studies.differing(run, task.runs[MAIN][run.meta["seed"]])
      rows.append(
        (
          task.name,
          variant,
          "; ".join(changed[:3]) + (f"; and {len(changed) - 3} more" if len(changed) > 3 else ""),
          _percent(task.figures[variant, best]),
          _NONE if variant == MAIN else _signed(task.change(variant, best)),
          _each(task.figures[variant, best], task.runs[variant]),
          _seeds(task, variant),
        )
      )
  return Table(
    f"Ablations of {NAMES[COT]}",
    f"One thing changed in the main run ({MAIN}); the difference is paired by seed and problem. {_votes(tasks)}",
    ("task", "variant", "what differs", "Best-of-N, %", f"minus {MAIN}", "each seed", "seeds"),
    tuple(rows),
    num_text_columns=3,
  )


def wall_time(tasks: Sequence[Task]) -> Table:
  """Seconds of each stage of the main run, mean over seeds, and hours of all runs."""
  runs = [list(task.runs[MAIN].values()) for task in tasks]
  stages = dict.fromkeys(stage for of_task in runs for run in of_task for stage in run.meta["wall_seconds"])
  rows = []
  for stage in stages:
    seconds = [[run.meta["wall_seconds"][stage] for run in it if stage in run.meta["wall_seconds"]] for it in runs]
    rows.append((stage, *(f"{math.fsum(it) / len(it):,.0f}" if it else _NONE for it in seconds)))
  totals = [math.fsum(s for run in it for s in run.meta["wall_seconds"].values()) / len(it) for it in runs]
  rows.append(("all stages", *(f"{total:,.0f}" for total in totals)))
  header = ("stage", *(f"{task.name}, s" for task in tasks))
  hours = {
    task.name: math.fsum(
      s for by_seed in task.runs.values() for run in by_seed.values() for s in run.meta["wall_seconds"].values()
    )
    / 3600
    for task in tasks
  }
  note = (
    "Seconds, mean over seeds. `python -m experiments.studies.reproduce --workdir=DIR` repeats every run, as many side"
    " by side as there are cores; all runs of this page together took, in hours of one core: "
    + ", ".join(f"{name} {total:.1f}" for name, total in hours.items())
    + "."
  )
  return Table("Wall time", note, header, tuple(rows))


def sources(tasks: Sequence[Task]) -> Table:
  """Where each number comes from."""
  rows = [
    (
      f"{task.name}/{run.meta['variant']}-seed{run.meta['seed']}.json",
      str(run.meta["seed"]),
      run.meta["config_hash"][:12],
      run.meta["commit"][:12],
      run.meta["finished"],
      run.meta["bank"][:12],
      f"{run.meta['num_params']:,}",
      f"{run.results['num_problems']:,} x {run.results['pool_sizes'][1]}",
    )
    for task in tasks
    for of_seed in task.runs.values()
    for run in of_seed.values()
  ]
  return Table(
    "Where each number comes from",
    "The config of a run stands in its file. Bank: the start of the sha256 over problems and candidates.",
    ("file", "seed", "config", "commit", "finished", "bank", "parameters", "problems x candidates"),
    tuple(rows),
  )
