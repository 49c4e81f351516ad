"""The tables of the results page: several tasks, each over several seeds."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from experiments.studies import runs
from experiments.studies.quantities import COT, ORACLE, SELF_CONSISTENCY
from experiments.studies.runs import ABLATIONS, LAMBDA, MAIN, SIZE, STEPS, TRAIN, VERIFIERS, StudyTask
from experiments.studies.seeds import Pooled
from genrm_jax.evals.methods import WEIGHTED
from genrm_jax.evals.tables import NAMES, Table, method_name, number, percent

_NONE = "–"
_MAJORITY = (SELF_CONSISTENCY, f"{WEIGHTED}/{COT}")
_COMPARED = (SELF_CONSISTENCY, "orm", "genrm")  # GenRM-CoT is compared with these, paired by problem

Show = Callable[[Pooled | None], str]


def _percent(pooled: Pooled | None) -> str:
  return percent(vars(pooled)) if pooled else _NONE


def _signed(pooled: Pooled | None) -> str:
  return percent(vars(pooled), signed=True) if pooled else _NONE


def _number(pooled: Pooled | None) -> str:
  return number(vars(pooled)) if pooled else _NONE


def _each(pooled: Pooled | None, seeds: Iterable[int], sign: str = "") -> str:
  """The value for each seed."""
  values = [pooled.by_seed.get(seed) if pooled else None for seed in seeds]
  return " / ".join(_NONE if value is None else f"{100 * value:{sign}.1f}" for value in values)


def _seeds(task: StudyTask, variant: str = MAIN) -> str:
  return ", ".join(str(seed) for seed in task.runs[variant])


def seed_words(task: StudyTask) -> str:
  """The seeds of the main run, in words."""
  return f"seed{'s' if len(task.runs[MAIN]) > 1 else ''} {_seeds(task)}"


def methods(task: StudyTask) -> list[str]:
  """The selection methods of the main run: majority votes, the paper's verifiers, other verifiers, the Oracle."""
  present = task.main.verifiers
  known = [name for name in VERIFIERS if name in present]
  return [*_MAJORITY[: 1 + (COT in present)], *known, *(name for name in present if name not in known), ORACLE]


def _over_tasks(tasks: Sequence[StudyTask], rows: Sequence[tuple[str, str, Show, str]], title: str, note: str) -> Table:
  """A table with two columns per task: a metric of the main run, and its value for each seed.

  Args:
    tasks: the tasks.
    rows: (label, metric with "{n}" for the largest n, formatter, sign of the values of each seed).
    title: of the table.
    note: of the table.
  """
  header = ["", *(cell for task in tasks for cell in (f"{task.name}, %", seed_words(task)))]
  lines = []
  for label, metric, show, sign in rows:
    found = [(task, task.pooled.get((MAIN, metric.format(n=task.top)))) for task in tasks]
    if any(pooled for _, pooled in found):
      cells = [cell for task, pooled in found for cell in (show(pooled), _each(pooled, task.runs[MAIN], sign))]
      lines.append((label, *cells))
  return Table(title, note, tuple(header), tuple(lines))


def best_of_n(tasks: Sequence[StudyTask]) -> Table:
  names = dict.fromkeys(name for task in tasks for name in methods(task))
  names = dict.fromkeys([*(name for name in names if name != ORACLE), ORACLE])
  rows: list[tuple[str, str, Show, str]] = [("pass@1", "pass1", _percent, "")]
  rows += [(method_name(name), f"{name}/n={{n}}", _percent, "") for name in names]
  tops = ", ".join(f"N = {n}" for n in dict.fromkeys(task.top for task in tasks))
  return _over_tasks(
    tasks,
    rows,
    f"Table 1. Best-of-N accuracy, {tops}, out of distribution",
    "Percent of problems, with the 95% interval over seeds and problems in brackets and the value for each seed.",
  )


def gains(tasks: Sequence[StudyTask]) -> Table:
  rows: list[tuple[str, str, Show, str]] = [
    (f"{NAMES[COT]}, percent of the Oracle's accuracy", f"{COT}/{ORACLE}", _percent, "")
  ]
  rows += [(f"{NAMES[COT]} minus {method_name(other)}", f"{COT}-{other}", _signed, "+") for other in _COMPARED]
  return _over_tasks(
    tasks,
    rows,
    f"{NAMES[COT]} against other methods",
    "Differences are percentage points, paired by seed and problem. If the interval spans 0, no difference is shown.",
  )


def verification(tasks: Sequence[StudyTask]) -> Table:
  """Table 2: in distribution beside out of distribution."""
  rows = []
  for task in tasks:
    inner_n = {
      max(r.results["in_distribution"]["ns"]) for r in task.runs[MAIN].values() if "in_distribution" in r.results
    }
    for name in ("pass1", *methods(task)):
      best = "pass1" if name == "pass1" else f"{name}/n={task.top}"
      inner = "pass1" if name == "pass1" else f"{name}/n={max(inner_n, default=0)}"
      found = {metric: task.pooled.get((MAIN, metric)) for metric in (best, *_checks(name))}
      within = {metric: task.pooled.get((MAIN, f"in_distribution/{metric}")) for metric in (inner, *_checks(name))}
      accuracy, auc = _checks(name)
      rows.append(
        (
          task.name,
          method_name(name),
          _percent(within[inner]),
          _percent(found[best]),
          *(_percent(split[accuracy]) for split in (within, found)),
          *(_number(split[auc]) for split in (within, found)),
        )
      )
  both = [
    f"{metric}{where}" for metric in ("Best-of-N, %", "RM accuracy, %", "AUC within problems") for where in _WHERE
  ]
  return Table(
    "Table 2. Verification, in distribution and out of distribution",
    "RM accuracy: share of solutions whose label the verifier predicts (correct if the score is above 0.5). AUC within"
    " problems: the chance that a correct solution outscores an incorrect one of the same problem, averaged over"
    " problems that have both.",
    ("task", "method", *both),
    tuple(rows),
    num_text_columns=2,
  )


_WHERE = (" (in)", " (out)")


def _checks(method: str) -> tuple[str, str]:
  return f"{method}/rm_accuracy", f"{method}/auc_within_problems"


def study(tasks: Sequence[StudyTask], which: str) -> Table:
  """Best-of-N of each verifier at each point of a study."""
  rows = []
  for task in tasks:
    for verifier in studied(task, which):
      for x, variant in task.points(which, verifier):
        metric = task.best_of_n(verifier)
        pooled = task.pooled[variant, metric]
        change = _NONE if variant == MAIN else _signed(task.change(variant, metric))
        point = (task.name, method_name(verifier), f"{x:,g}" if x < 1e6 else f"{x / 1e6:.2f}M")
        rows.append((*point, _percent(pooled), _each(pooled, task.runs[variant]), change, _seeds(task, variant)))
  header = ("task", "verifier", _AXES[which], "Best-of-N, %", "each seed", f"minus {MAIN}", "seeds")
  note = _votes(tasks) if any(COT in studied(task, which) for task in tasks) else ""
  return Table(f"Accuracy by {which}", note, header, tuple(rows), num_text_columns=2)


def _votes(tasks: Sequence[StudyTask]) -> str:
  """The number of votes at which studies of GenRM-CoT are compared."""
  found = dict.fromkeys(task.best_of_n(COT).partition("/k=")[2] for task in tasks)
  return f"{NAMES[COT]} with K = {' or '.join(k for k in found if k)} votes."


_AXES = {TRAIN: "training problems", STEPS: "updates", SIZE: "parameters"}


def studied(task: StudyTask, which: str) -> list[str]:
  """The verifiers that a study has points of."""
  found = {name for variant in task.variants(which) for run in task.runs[variant].values() for name in run.trained()}
  return [name for name in task.main.verifiers if name in found and task.points(which, name)]


def unified(tasks: Sequence[StudyTask]) -> Table:
  """Verification and generation by lambda."""
  rows = []
  for task in tasks:
    points = task.points(LAMBDA, COT)
    base = next((variant for x, variant in points if x == 0), MAIN)
    solutions_only = next((variant for x, variant in points if x == math.inf), "")
    for x, variant in points:
      best, generation = task.best_of_n(COT), f"generation/{COT}"
      rows.append(
        (
          task.name,
          "solutions only" if x == math.inf else f"{x:g}",
          _percent(task.pooled[variant, best]),
          _NONE if variant == base else _signed(task.change(variant, best, base)),
          _percent(task.pooled.get((variant, generation))),
          _NONE if variant == solutions_only else _signed(task.change(variant, generation, solutions_only)),
          _each(task.pooled[variant, best], task.runs[variant]),
          _each(task.pooled.get((variant, generation)), task.runs[variant]),
          _seeds(task, variant),
        )
      )
  return Table(
    f"Unified training: {NAMES[COT]} also trained on correct solutions, with weight lambda",
    "Best-of-N: the model as a verifier. pass@1: the same model as a generator. Differences are percentage points,"
    f" paired by seed and problem. {_votes(tasks)}",
    (
      *("task", "lambda", "Best-of-N, %", "minus lambda 0", "pass@1, %", "minus solutions only"),
      *("Best-of-N, each seed", "pass@1, each seed", "seeds"),
    ),
    tuple(rows),
  )


def ablations(tasks: Sequence[StudyTask]) -> Table:
  rows = []
  for task in tasks:
    for variant in (MAIN, *task.variants(ABLATIONS)) if task.variants(ABLATIONS) else ():
      run = next(iter(task.runs[variant].values()))
      best = task.best_of_n(COT)
      if COT not in run.verifiers:
        continue
      changed = runs.config_changes(task.runs[MAIN][run.meta["seed"]], run)
      rows.append(
        (
          task.name,
          variant,
          "; ".join(changed[:3]) + (f"; and {len(changed) - 3} more" if len(changed) > 3 else ""),
          _percent(task.pooled[variant, best]),
          _NONE if variant == MAIN else _signed(task.change(variant, best)),
          _each(task.pooled[variant, best], task.runs[variant]),
          _seeds(task, variant),
        )
      )
  return Table(
    f"Ablations of {NAMES[COT]}",
    f"Each variant changes one thing in the main run ({MAIN}); differences are percentage points, paired by seed and"
    f" problem. {_votes(tasks)}",
    ("task", "variant", "change", "Best-of-N, %", f"minus {MAIN}", "each seed", "seeds"),
    tuple(rows),
    num_text_columns=3,
  )


def wall_time(tasks: Sequence[StudyTask]) -> Table:
  """Seconds of each stage of the main run, mean over seeds, and hours of all runs."""
  main_seconds = [[run.meta["wall_seconds"] for run in task.runs[MAIN].values()] for task in tasks]
  all_seconds = {
    task.name: [run.meta["wall_seconds"] for by_seed in task.runs.values() for run in by_seed.values()]
    for task in tasks
  }
  rows = []
  for stage in dict.fromkeys(stage for of_task in main_seconds for seconds in of_task for stage in seconds):
    by_task = [[seconds[stage] for seconds in of_task if stage in seconds] for of_task in main_seconds]
    rows.append((stage, *(f"{math.fsum(of_task) / len(of_task):,.0f}" if of_task else _NONE for of_task in by_task)))
  totals = [_total(of_task) / len(of_task) for of_task in main_seconds]
  rows.append(("all stages", *(f"{total:,.0f}" for total in totals)))
  header = ("stage", *(f"{task.name}, s" for task in tasks))
  hours = ", ".join(f"{name} {_total(of_task) / 3600:.1f}" for name, of_task in all_seconds.items())
  note = (
    "Seconds, mean over seeds. `python -m experiments.studies.reproduce --workdir=DIR` reproduces every run, one per"
    f" core at a time. All runs on this page took, in hours of one core: {hours}."
  )
  return Table("Wall time", note, header, tuple(rows))


def _total(wall_seconds: Iterable[Mapping[str, float]]) -> float:
  return math.fsum(seconds for stages in wall_seconds for seconds in stages.values())


def sources(tasks: Sequence[StudyTask]) -> Table:
  """The file, config and commit behind each number."""
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
    for by_seed in task.runs.values()
    for run in by_seed.values()
  ]
  return Table(
    "Source of each number",
    "Each file contains the config of its run. Bank: start of the SHA-256 over problems and candidates.",
    ("file", "seed", "config", "commit", "finished", "bank", "parameters", "problems x candidates"),
    tuple(rows),
  )
