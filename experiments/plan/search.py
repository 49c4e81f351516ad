"""Which settings fit on a slice: tries them, by arithmetic the fastest first."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from experiments.plan import costs, programs
from experiments.plan.compiling import Fit, Program
from experiments.plan.costs import Estimate
from experiments.plan.planned import PlannedRun
from genrm_jax.runtime.errors import UserError

ROWS = (512, 256, 128, 64, 32, 16)  # values of engine.rows_per_batch that are tried

Changes = dict[str, Any]  # {"verifiers.orm.remat": "layer"}


class Plan(NamedTuple):
  """One choice of settings: how they differ from the config's, its programs on a chip, and the time of each part."""

  changes: Changes
  programs: list[Fit]
  times: dict[str, list[Estimate]]

  @property
  def fits(self) -> bool:
    return all(fit.fits for fit in self.programs)


def plan(run: PlannedRun, name: str, parts: Sequence[str], num_solutions: int, searches: bool) -> Plan:
  """The parts "training" and "scoring" of a verifier, with the config's settings or a search for the fastest that fit.

  A search ends with the first part that does not fit.
  """
  changes, fits, times = Changes(), list[Fit](), dict[str, list[Estimate]]()
  for part in parts:
    attempts_of, programs_of = _PARTS[part]
    found, of_part = search(run, name, attempts_of(run, name) if searches else [{}], programs_of)
    changes, fits, run = changes | found, fits + of_part, run.changed(found)
    times[part] = costs.training(run, name) if part == "training" else costs.scoring(run, name, num_solutions)
    if searches and not all(fit.fits for fit in fits):
      break
  return Plan(changes, fits, times)


def search(
  run: PlannedRun, name: str, attempts: Sequence[Changes], programs_of: Callable[[PlannedRun, str], list[Program]]
) -> tuple[Changes, list[Fit]]:
  """The first attempt whose programs all fit; or the last attempt, up to its first program that does not fit."""
  if not attempts:
    raise UserError(f"{name}: batch_size or heads do not divide over {run.where.name} on any mesh; use another slice")
  for changes in attempts:
    fits: list[Fit] = []
    for program in programs_of(run.changed(changes), name):
      fits.append(program.fit())
      if not fits[-1].fits:
        break
    else:
      break
  return changes, fits


def training_attempts(run: PlannedRun, name: str) -> list[Changes]:
  """Meshes of fsdp and tensor shards, remat and num_micro_batches, the fastest first."""
  prefix, num_chips, batch_size = f"verifiers.{name}", run.where.num_chips, run.train_config(name).batch_size
  attempts: list[Changes] = [
    {"mesh.data": 1, "mesh.fsdp": num_chips // n, "mesh.tensor": n}
    | {f"{prefix}.remat": remat, f"{prefix}.loop.num_micro_batches": parts}
    for n, parts, remat in itertools.product(_tensor_shards(run, num_chips), (1, 2, 4, 8, 16), ("dots", "layer"))
    if batch_size % (num_chips // n * parts) == 0
  ]
  return sorted(attempts, key=lambda changes: costs.training(run.changed(changes), name)[0].seconds)


def scoring_attempts(run: PlannedRun, name: str) -> list[Changes]:
  """Meshes of a host and rows_per_batch, the fastest first: tensor shards, and copies on the rest of its chips."""
  num_chips = run.where.of_one_host.num_chips
  attempts: list[Changes] = [
    {"engine.mesh.data": num_chips // n, "engine.mesh.tensor": n, "engine.rows_per_batch": rows}
    for n, rows in itertools.product(_tensor_shards(run, num_chips), ROWS)
  ]

  num_solutions = ROWS[0] * 64 * run.where.num_hosts  # whole batches, so that the last one makes no difference

  def hours(changes: Changes) -> float:
    found = costs.hours(costs.scoring(run.changed(changes), name, num_solutions))
    return float(f"{found:.1e}")  # where it makes no difference, more rows come first

  return sorted(attempts, key=hours)


def _tensor_shards(run: PlannedRun, num_chips: int) -> list[int]:
  heads = run.model.num_heads, run.model.num_kv_heads
  return [n for n in (1, 2, 4) if num_chips % n == 0 and all(h % n == 0 or h == 1 for h in heads)]


_PARTS = {
  "training": (training_attempts, programs.train_programs),
  "scoring": (scoring_attempts, programs.score_programs),
}
