"""Runs of one task side by side: several seeds of the main run, and of studies that change one thing in it.

    tiny                                             the main run, which is also a point of each study
    train_<n>, steps_<n>, size_<name>, lambda_<x>    studies of a number, which is read from the run, not from its name
    any other                                        an ablation

A study is compared with the main run of the same seed on the same bank of candidates, problem by problem, and with as
many votes: a study may have fewer than the main run, which then counts as many of its own.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from experiments.studies import seeds
from experiments.studies.seeds import Pooled
from genrm_jax.evals import metrics, per_problem
from genrm_jax.evals.metrics import Quantity
from genrm_jax.evals.per_problem import COT
from genrm_jax.runtime.errors import UserError

MAIN = "tiny"
TRAIN, STEPS, SIZE = "training-set size", "training steps", "model size"
LAMBDA, ABLATIONS = "unified training (lambda)", "ablations"
_PREFIXES = {"train": TRAIN, "steps": STEPS, "size": SIZE, "lambda": LAMBDA}
STUDIES = (*_PREFIXES.values(), ABLATIONS)
TASKS = ("last_letter", "word_sorting")
VERIFIERS = ("judge", "dpo", "orm", "genrm", "genrm_cot")


def study_of(variant: str) -> str:
  """The study that a variant belongs to; "" for the main run."""
  return "" if variant == MAIN else _PREFIXES.get(variant.partition("_")[0], ABLATIONS)


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
  """The results of one task, variant and seed, and the file that they stand in."""

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
    """The verifiers that the config trains (it does not train the judge)."""
    return [name for name in self.verifiers if "optim" in self.meta["config"]["verifiers"].get(name, {})]

  def best_of_n(self, verifier: str) -> str:
    """The name of a verifier's Best-of-N accuracy at the largest n, with all votes that the run has."""
    it = self.verifiers[verifier]
    if it["by_votes"]:
      return f"{verifier}/k={it['coverage']['votes_per_candidate']}"
    return f"{verifier}/n={max(self.results['ns'])}"

  def number(self, study: str, verifier: str) -> float:
    """Where a trained verifier of the run stands on the axis of a study; lambda is infinite for solutions alone."""
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
class Task:
  """All runs of a task, and their figures over seeds."""

  name: str
  runs: Mapping[str, Mapping[int, Run]]  # by variant and seed; the main run first
  figures: Mapping[tuple[str, str], Pooled]  # by variant and name, see `per_problem.read` and `change`

  @property
  def main(self) -> Run:
    """The main run of the first seed."""
    return next(iter(self.runs[MAIN].values()))

  @property
  def top(self) -> int:
    """The largest number of candidates."""
    return max(self.main.results["ns"])

  def variants(self, study: str) -> list[str]:
    return [variant for variant in self.runs if study_of(variant) == study]

  def points(self, study: str, verifier: str) -> list[tuple[float, str]]:
    """The numbers of a study and their variants, in order, with the main run where no variant has its number; [] where
    the study has nothing on this verifier."""
    numbers: dict[float, str] = {}
    for variant in (MAIN, *self.variants(study)):
      has = [run for run in self.runs[variant].values() if verifier in run.trained()]
      found = {run.number(study, verifier): run.file for run in has}
      if len(found) > 1:
        told = ", ".join(f"{number:g} in {file}" for number, file in found.items())
        raise UserError(f"{self.name} {variant}: seeds of one variant differ in {study}: {told}; run one of them again")
      numbers |= {number: variant for number in found}
    return sorted(numbers.items()) if set(numbers.values()) - {MAIN} else []

  def with_seeds_of_all(self, study: str) -> "Task":
    """The main run and a study on the seeds that all of them have, if any: its points then differ in nothing else."""
    variants = [MAIN, *self.variants(study)]
    common = set.intersection(*(set(self.runs[variant]) for variant in variants))
    if not common or common == set(self.runs[MAIN]):
      return self
    return _task(self.name, [run for of in variants for seed, run in self.runs[of].items() if seed in common])

  def best_of_n(self, verifier: str) -> str:
    """The figure that studies of this verifier are compared by; see `Run.best_of_n`."""
    of_studies = (run for variant, of_seed in self.runs.items() if variant != MAIN for run in of_seed.values())
    return next(
      (run.best_of_n(verifier) for run in of_studies if verifier in run.verifiers), f"{verifier}/n={self.top}"
    )

  def change(self, variant: str, figure: str, base: str = MAIN) -> Pooled | None:
    """The paired difference of a figure to the main run (or another variant); None where one of them lacks it."""
    return self.figures.get((variant, f"{figure} over {base}"))


def gather(runs: Sequence[Run]) -> list[Task]:
  """The tasks of all runs, each with its figures over seeds.

  Raises:
    UserError: a run without a main run of its seed, or on another bank, or with other numbers of candidates; or a study
      with a number of votes that the main run or another study has no figure of.
  """
  names = dict.fromkeys((*TASKS, *sorted(run.meta["task"] for run in runs)))
  return [_task(name, of_task) for name in names if (of_task := [run for run in runs if run.meta["task"] == name])]


def _task(name: str, runs: Sequence[Run]) -> Task:
  grouped: dict[str, dict[int, Run]] = {MAIN: {}}
  for run in sorted(runs, key=lambda run: (run.meta["variant"], run.meta["seed"])):
    grouped.setdefault(run.meta["variant"], {})[run.meta["seed"]] = run
  main = grouped[MAIN]
  for run in runs:
    if run.meta["seed"] not in main:
      raise UserError(f"{run.file}: there is no main run ({MAIN}) of {name} with seed {run.meta['seed']} beside it")
    _check_same(run, main[run.meta["seed"]])
  first = next(iter(main.values()))
  for run in main.values():
    if max(run.results["ns"]) != max(first.results["ns"]):
      raise UserError(f"{run.file} and {first.file} have other numbers of candidates; run one of them again")

  studied = [run for variant, of_seed in grouped.items() if variant != MAIN for run in of_seed.values()]
  for run in studied:
    for verifier in run.verifiers:
      other = next(it for it in studied if verifier in it.verifiers)
      if run.best_of_n(verifier) != other.best_of_n(verifier):
        raise UserError(f"{run.file} and {other.file} have other numbers of votes of {verifier}; make them equal")

  quantities: dict[tuple[str, str], dict[int, Quantity]] = {}
  bases = {variant: _bases(variant, grouped) for variant in grouped}
  for variant, of_seed in grouped.items():
    for seed, run in of_seed.items():
      for figure, quantity in run.quantities.items():
        quantities.setdefault((variant, figure), {})[seed] = quantity
      for base in bases[variant]:
        compared = grouped[base].get(seed)
        for figure, quantity in _changes(run, compared).items() if compared and compared is not run else ():
          quantities.setdefault((variant, f"{figure} over {base}"), {})[seed] = quantity
  return Task(name, grouped, seeds.pool(quantities))


def _bases(variant: str, grouped: Mapping[str, Mapping[int, Run]]) -> list[str]:
  """What a variant is compared with: the main run; in the study of lambda the variants with lambda 0, in place of the
  main run, and with solutions alone, where there are such."""
  lambdas = {}
  for other, of_seed in grouped.items():
    run = next(iter(of_seed.values()))
    if study_of(other) == LAMBDA and COT in run.trained():
      lambdas[run.number(LAMBDA, COT)] = other
  alone = [lambdas[math.inf]] if math.inf in lambdas else []
  if variant in lambdas.values():
    return [lambdas.get(0, MAIN), *alone]
  return [MAIN, *alone] if variant == MAIN else [MAIN]


def _changes(run: Run, base: Run) -> dict[str, Quantity]:
  """Paired differences of what is a mean over problems: Best-of-N of each verifier, and generation."""
  wanted = [run.best_of_n(verifier) for verifier in run.verifiers]
  wanted += [name for name in run.quantities if name.startswith("generation/")]
  return {
    name: metrics.mean(run.quantities[name].parts[0][0] - base.quantities[name].parts[0][0])
    for name in wanted
    if name in run.quantities and name in base.quantities
  }


def _check_same(run: Run, main: Run) -> None:
  """Refuses to compare what was not measured on the same candidates in the same way."""
  if run.meta["bank"] != main.meta["bank"]:
    raise UserError(
      f"{run.file} and {main.file} were measured on different banks of candidates ({run.meta['bank'][:12]} and"
      f" {main.meta['bank'][:12]}), so they cannot be compared; run {run.meta['variant']} on the bank of the main run"
    )
  if max(run.results["ns"]) != max(main.results["ns"]):
    raise UserError(f"{run.file} and {main.file} have other numbers of candidates; run one of them again")
  for name in run.verifiers.keys() & main.verifiers.keys():
    if run.best_of_n(name) not in main.quantities:
      votes = run.verifiers[name]["coverage"]["votes_per_candidate"]
      raise UserError(
        f"{run.file} has {votes} votes of {name} a candidate, and {main.file} no figure for as many; add {votes} to its"
        " config.report.ks"
      )


def not_run(tasks: Sequence[Task]) -> list[str]:
  """What a full set of results would hold and this one does not, in words."""
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
      # Each task has ablations of its own.
      absent = sorted(v for v in everywhere if study_of(v) == study != ABLATIONS and v not in task.runs)
      missing += [f"{name}: {variant}" for variant in absent]
    main = task.runs[MAIN]
    lacks = {seed: _lacks(run) + [v for v in task.runs if seed not in task.runs[v]] for seed, run in main.items()}
    always = [it for it in lacks[next(iter(main))] if all(it in lack for lack in lacks.values())]
    missing += [f"{name}: {it}" for it in always]
    for seed, lack in lacks.items():
      if some := [it for it in lack if it not in always]:
        missing.append(f"{name} with seed {seed}: {', '.join(some)}")
  return missing


def _lacks(main: Run) -> list[str]:
  lack = [verifier for verifier in VERIFIERS if verifier not in main.verifiers]
  return lack if "in_distribution" in main.results else [*lack, "in distribution"]


_NO_DIFFERENCE = ("variant", "seed", "bank", "votes.num_votes", "task.in_distribution")


def differing(run: Run, main: Run) -> list[str]:
  """What a run's config has other than the main run's, as `key: main -> run`; a verifier or a further evaluation that
  only one has is no difference to the others, nor is the number of votes, which is made equal."""
  return [
    f"{key}: {json.dumps(old)} -> {json.dumps(new)}"
    for key, old, new in _differences(main.meta["config"], run.meta["config"])
    if key not in _NO_DIFFERENCE and not key.startswith("report.")
  ]


def _differences(left: Mapping[str, Any], right: Mapping[str, Any], within: str = "") -> Iterator[tuple[str, Any, Any]]:
  for key in sorted(left.keys() & right.keys()) if within == "verifiers." else dict.fromkeys((*left, *right)):
    old, new = left.get(key), right.get(key)
    if old and new and isinstance(old, Mapping) and isinstance(new, Mapping):
      yield from _differences(old, new, f"{within}{key}.")
    elif old != new:
      yield f"{within}{key}", old, new


def read_run(file: str, results: Any) -> Run:
  """Checks that a file's content is the results of a run.

  Raises:
    UserError: something is missing or of another form.
  """
  try:
    meta = results["meta"]
    for key, kind in _META.items():
      if not isinstance(meta[key], kind):
        raise TypeError(f"meta.{key} is no {kind.__name__}")
    _ = [sample[key] for sample in results.get("samples", ()) for key in _SAMPLE]
    run = Run(file, results, per_problem.read(results))
    _ = results["pool_sizes"][1], [it["coverage"]["votes_per_candidate"] for it in run.verifiers.values()]
    _ = [point["k"] for it in run.verifiers.values() for point in it["by_votes"]]
    _ = [run.number(TRAIN, name) for name in run.trained()], [run.number(LAMBDA, n) for n in run.trained() if n == COT]
    return run
  except (KeyError, TypeError, ValueError, AttributeError, IndexError) as e:
    what = f"no {e}" if isinstance(e, KeyError) else str(e)
    raise UserError(f"{file}: not the results.json of a run ({what}); copy it again from the run's report/") from e


_SAMPLE = (
  "verifier",
  "kind",
  "question",
  "answer",
  "solution",
  "correct",
  "value",
  "rationale",
  "state",
  "p_yes",
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
