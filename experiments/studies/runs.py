"""The runs of one task side by side: the main run and studies that change one thing in it, each with several seeds.

    tiny                                             the main run, which is also a point of each study
    train_<n>, steps_<n>, size_<name>, lambda_<x>    studies of a number, which is read from the config, not the name
    any other                                        an ablation

A study is compared with the main run of the same seed on the same bank of candidates, problem by problem, and with the
same number of votes: if a study has fewer votes than the main run, the main run's figure with that many votes is used.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from experiments.studies import seeds
from experiments.studies.quantities import COT, read_quantities
from experiments.studies.seeds import Pooled
from genrm_jax.evals import metrics
from genrm_jax.evals.metrics import Quantity
from genrm_jax.runtime.errors import UserError

MAIN = "tiny"
TRAIN, STEPS, SIZE = "training-set size", "training steps", "model size"
LAMBDA, ABLATIONS = "unified training (lambda)", "ablations"
_PREFIXES = {"train": TRAIN, "steps": STEPS, "size": SIZE, "lambda": LAMBDA}
STUDIES = (*_PREFIXES.values(), ABLATIONS)
TASKS = ("last_letter", "word_sorting")
VERIFIERS = ("judge", "dpo", "orm", "genrm", COT)  # of a full main run, in the order of the tables


def study_of(variant: str) -> str:
  """The study of a variant; "" for the main run."""
  return "" if variant == MAIN else _PREFIXES.get(variant.partition("_")[0], ABLATIONS)


@dataclasses.dataclass(frozen=True, eq=False)
class StudyRun:
  """The results of one task, variant and seed, and the file they were read from."""

  file: str
  results: Mapping[str, Any]
  quantities: Mapping[str, Quantity]

  @property
  def meta(self) -> Mapping[str, Any]:
    return self.results["meta"]

  @property
  def verifiers(self) -> Mapping[str, Any]:
    return self.results["verifiers"]

  def trained(self) -> list[str]:
    """The verifiers that the config trains (all but the judge)."""
    return [name for name in self.verifiers if "optim" in self.meta["config"]["verifiers"].get(name, {})]

  def best_of_n(self, verifier: str) -> str:
    """The name of a verifier's Best-of-N accuracy at the largest n, with all votes of the run."""
    results = self.verifiers[verifier]
    if results["by_votes"]:
      return f"{verifier}/k={results['coverage']['votes_per_candidate']}"
    return f"{verifier}/n={max(self.results['ns'])}"

  def number(self, study: str, verifier: str) -> float:
    """The position of a trained verifier on the axis of a study; lambda is infinite for training on solutions only."""
    config = self.meta["config"]
    if study == SIZE:
      return self.meta["num_params"]
    settings = config["verifiers"][verifier]
    if study == STEPS:
      return settings["optim"]["num_steps"]
    if study == LAMBDA:
      return settings["solve_weight"] if settings["max_rationales"] else math.inf
    return settings["max_problems"] or config["task"]["train"]["num_problems"]


@dataclasses.dataclass(frozen=True, eq=False)
class StudyTask:
  """All runs of a task, and their metrics pooled over seeds."""

  name: str
  runs: Mapping[str, Mapping[int, StudyRun]]  # by variant and seed; the main run first
  pooled: Mapping[tuple[str, str], Pooled]  # by variant and metric, see `read_quantities` and `change`

  @property
  def main(self) -> StudyRun:
    """The main run of the first seed."""
    return next(iter(self.runs[MAIN].values()))

  @property
  def top(self) -> int:
    """The largest number of candidates."""
    return max(self.main.results["ns"])

  def variants(self, study: str) -> list[str]:
    return [variant for variant in self.runs if study_of(variant) == study]

  def points(self, study: str, verifier: str) -> list[tuple[float, str]]:
    """The points of a study in order, as (number, variant); [] if the study does not cover this verifier.

    The main run is a point too, unless a variant has the same number.
    """
    points: dict[float, str] = {}
    for variant in (MAIN, *self.variants(study)):
      trained = [run for run in self.runs[variant].values() if verifier in run.trained()]
      file_of = {run.number(study, verifier): run.file for run in trained}
      if len(file_of) > 1:
        listed = ", ".join(f"{number:g} in {file}" for number, file in file_of.items())
        raise UserError(f"{self.name} {variant}: its seeds differ in {study}: {listed}; run one of them again")
      points |= {number: variant for number in file_of}
    return sorted(points.items()) if set(points.values()) - {MAIN} else []

  def with_seeds_of_all(self, study: str) -> "StudyTask":
    """The main run and a study, restricted to the seeds that they share, so that its points differ in nothing else."""
    variants = [MAIN, *self.variants(study)]
    common = set.intersection(*(set(self.runs[variant]) for variant in variants))
    if not common or common == set(self.runs[MAIN]):
      return self
    shared = [run for variant in variants for seed, run in self.runs[variant].items() if seed in common]
    return _make_task(self.name, shared)

  def best_of_n(self, verifier: str) -> str:
    """The metric that studies of this verifier are compared by; see `StudyRun.best_of_n`."""
    studied = (run for variant, by_seed in self.runs.items() if variant != MAIN for run in by_seed.values())
    return next((run.best_of_n(verifier) for run in studied if verifier in run.verifiers), f"{verifier}/n={self.top}")

  def change(self, variant: str, metric: str, base: str = MAIN) -> Pooled | None:
    """The paired difference of a metric from the main run (or another variant); None if one of the two lacks it."""
    return self.pooled.get((variant, f"{metric} over {base}"))


def make_tasks(runs: Sequence[StudyRun]) -> list[StudyTask]:
  """Groups runs by task and pools their metrics over seeds.

  Raises:
    UserError: a run lacks a main run with its seed, or differs from it in the bank or the number of candidates; or a
      study has a number of votes that the main run or another study does not cover.
  """
  names = dict.fromkeys((*TASKS, *sorted(run.meta["task"] for run in runs)))
  by_name = {name: [run for run in runs if run.meta["task"] == name] for name in names}
  return [_make_task(name, of_task) for name, of_task in by_name.items() if of_task]


def _make_task(name: str, runs: Sequence[StudyRun]) -> StudyTask:
  grouped: dict[str, dict[int, StudyRun]] = {MAIN: {}}
  for run in sorted(runs, key=lambda run: (run.meta["variant"], run.meta["seed"])):
    grouped.setdefault(run.meta["variant"], {})[run.meta["seed"]] = run
  main = grouped[MAIN]
  for run in runs:
    if run.meta["seed"] not in main:
      raise UserError(f"{run.file}: there is no main run ({MAIN}) of {name} with seed {run.meta['seed']} beside it")
    _check_same(run, main[run.meta["seed"]])
  first = next(iter(main.values()))
  for run in main.values():
    _check_same_n(run, first)

  studied = [run for variant, by_seed in grouped.items() if variant != MAIN for run in by_seed.values()]
  for run in studied:
    for verifier in run.verifiers:
      other = next(candidate for candidate in studied if verifier in candidate.verifiers)
      if run.best_of_n(verifier) != other.best_of_n(verifier):
        raise UserError(f"{run.file} and {other.file} have different numbers of votes of {verifier}; make them equal")

  quantities: dict[tuple[str, str], dict[int, Quantity]] = {}
  bases = {variant: _bases(variant, grouped) for variant in grouped}
  for variant, by_seed in grouped.items():
    for seed, run in by_seed.items():
      for metric, quantity in run.quantities.items():
        quantities.setdefault((variant, metric), {})[seed] = quantity
      for base in bases[variant]:
        base_run = grouped[base].get(seed)
        for metric, quantity in _changes(run, base_run).items() if base_run and base_run is not run else ():
          quantities.setdefault((variant, f"{metric} over {base}"), {})[seed] = quantity
  return StudyTask(name, grouped, seeds.pool(quantities))


def _bases(variant: str, grouped: Mapping[str, Mapping[int, StudyRun]]) -> list[str]:
  """The variants that a variant is compared with: the main run.

  In the study of lambda, the variant with lambda 0 replaces the main run, and solutions only are a second base.
  """
  lambdas = {}
  for other, by_seed in grouped.items():
    run = next(iter(by_seed.values()))
    if study_of(other) == LAMBDA and COT in run.trained():
      lambdas[run.number(LAMBDA, COT)] = other
  solutions_only = [lambdas[math.inf]] if math.inf in lambdas else []
  if variant in lambdas.values():
    return [lambdas.get(0, MAIN), *solutions_only]
  return [MAIN, *solutions_only] if variant == MAIN else [MAIN]


def _changes(run: StudyRun, base: StudyRun) -> dict[str, Quantity]:
  """Paired differences of the metrics that are means over problems: Best-of-N of each verifier, and generation."""
  wanted = [run.best_of_n(verifier) for verifier in run.verifiers]
  wanted += [name for name in run.quantities if name.startswith("generation/")]
  return {
    name: metrics.mean(run.quantities[name].parts[0][0] - base.quantities[name].parts[0][0])
    for name in wanted
    if name in run.quantities and name in base.quantities
  }


def _check_same(run: StudyRun, main: StudyRun) -> None:
  """Raises UserError if a run was not measured like the main run, on the same candidates."""
  if run.meta["bank"] != main.meta["bank"]:
    raise UserError(
      f"{run.file} and {main.file} were measured on different banks of candidates ({run.meta['bank'][:12]} and"
      f" {main.meta['bank'][:12]}), so they cannot be compared; run {run.meta['variant']} on the bank of the main run"
    )
  _check_same_n(run, main)
  for name in run.verifiers.keys() & main.verifiers.keys():
    if run.best_of_n(name) not in main.quantities:
      votes = run.verifiers[name]["coverage"]["votes_per_candidate"]
      raise UserError(
        f"{run.file} has {votes} votes of {name} per candidate, for which {main.file} has no metric; add {votes} to its"
        " config.report.ks"
      )


def _check_same_n(run: StudyRun, other: StudyRun) -> None:
  if max(run.results["ns"]) != max(other.results["ns"]):
    raise UserError(f"{run.file} and {other.file} have different numbers of candidates; run one of them again")


def not_run(tasks: Sequence[StudyTask]) -> list[str]:
  """What these results lack of a full set, in words."""
  missing = []
  by_name = {task.name: task for task in tasks}
  everywhere = {variant for task in tasks for variant in task.runs}
  for name in dict.fromkeys((*TASKS, *by_name)):
    task = by_name.get(name)
    if task is None:
      missing.append(name)
      continue
    for study in STUDIES:
      if not task.variants(study):
        missing.append(f"{name}: {study}")
        continue
      # Ablations differ by task.
      absent = sorted(v for v in everywhere if study_of(v) == study != ABLATIONS and v not in task.runs)
      missing += [f"{name}: {variant}" for variant in absent]
    main = task.runs[MAIN]
    lacks = {seed: _lacks(run) + [v for v in task.runs if seed not in task.runs[v]] for seed, run in main.items()}
    always = [part for part in lacks[next(iter(main))] if all(part in lack for lack in lacks.values())]
    missing += [f"{name}: {part}" for part in always]
    for seed, lack in lacks.items():
      if some := [part for part in lack if part not in always]:
        missing.append(f"{name} with seed {seed}: {', '.join(some)}")
  return missing


def _lacks(main: StudyRun) -> list[str]:
  lack = [verifier for verifier in VERIFIERS if verifier not in main.verifiers]
  return lack if "in_distribution" in main.results else [*lack, "in distribution"]


_IGNORED_KEYS = ("variant", "seed", "bank", "votes.num_votes", "task.in_distribution")


def config_changes(main: StudyRun, run: StudyRun) -> list[str]:
  """The changes from the main run's config to a run's, as `key: old -> new`.

  Ignored are verifiers and evaluations that only one of them has, and the number of votes, which is made equal.
  """
  return [
    f"{key}: {json.dumps(old)} -> {json.dumps(new)}"
    for key, old, new in _differences(main.meta["config"], run.meta["config"])
    if key not in _IGNORED_KEYS and not key.startswith("report.")
  ]


def _differences(left: Mapping[str, Any], right: Mapping[str, Any], within: str = "") -> Iterator[tuple[str, Any, Any]]:
  for key in sorted(left.keys() & right.keys()) if within == "verifiers." else dict.fromkeys((*left, *right)):
    old, new = left.get(key), right.get(key)
    if old and new and isinstance(old, Mapping) and isinstance(new, Mapping):
      yield from _differences(old, new, f"{within}{key}.")
    elif old != new:
      yield f"{within}{key}", old, new


def read_run(file: str, results: Any) -> StudyRun:
  """The run in a file's content.

  Raises:
    UserError: the content is not the results of a run.
  """
  try:
    meta = results["meta"]
    for key, kind in _META.items():
      if not isinstance(meta[key], kind):
        raise TypeError(f"meta.{key} is not of type {kind.__name__}")
    _ = [sample[key] for sample in results.get("samples", ()) for key in _SAMPLE]
    run = StudyRun(file, results, read_quantities(results))
    verifiers = run.verifiers.values()
    _ = results["pool_sizes"][1], [verifier["coverage"]["votes_per_candidate"] for verifier in verifiers]
    _ = [point["k"] for verifier in verifiers for point in verifier["by_votes"]]
    _ = [run.number(TRAIN, name) for name in run.trained()], [run.number(LAMBDA, n) for n in run.trained() if n == COT]
    return run
  except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as e:
    what = f"no {e}" if isinstance(e, KeyError) else str(e)
    raise UserError(f"{file}: not the results.json of a run ({what}); copy it again from the run's report/") from e


_SAMPLE = (
  *("verifier", "kind", "question", "answer", "solution", "correct", "value"),
  *("rationale", "state", "p_yes"),
)
_META = {
  "task": str,
  "variant": str,
  "seed": int,
  "config": dict,
  "config_hash": str,
  "num_params": int,
  "bank": str,
  "commit": str,
  "finished": str,
  "wall_seconds": dict,
}
