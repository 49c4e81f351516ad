"""Which settings fit on a slice: tries them, by arithmetic the fastest first."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from experiments.plan import costs, programs
from experiments.plan.compiling import Memory
from experiments.plan.costs import Estimate
from experiments.plan.planned import PlannedRun
from genrm_jax.runtime.errors import UserError

ROWS = (512, 256, 128, 64, 32, 16)  # values of engine.rows_per_batch that are tried

Changes = dict[str, Any]  # {"verifiers.orm.remat": "layer"}


@dataclasses.dataclass
class Plan:
  """One choice of settings: how they differ from the config's, its programs on a chip, times of steps and of parts."""

  slice: str
  changes: Changes = dataclasses.field(default_factory=dict)
  programs: list[Memory] = dataclasses.field(default_factory=list)
  estimates: list[Estimate] = dataclasses.field(default_factory=list)
  totals: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # {"what": "training", "hours": 0.6}

  @property
  def fits(self) -> bool:
    return all(program.fits for program in self.programs)


def plan(run: PlannedRun, name: str, parts: Sequence[str], num_solutions: int, searches: bool) -> Plan:
  """The parts "training" and "scoring" of a verifier, with the config's settings or a search for the fastest that fit.

  An attempt ends with its first program that does not fit, and a search with its first part. If no attempt fits, the
  last one is returned.
  """
  found = Plan(run.where.name)
  for part in parts:
    attempts_of, programs_of = _PARTS[part]
    attempts = attempts_of(run, name) if searches else [{}]
    if not attempts:
      raise UserError(f"{name}: batch_size or heads do not divide over {found.slice} on any mesh; use another slice")
    for changes in attempts:
      attempt, memory = run.changed(changes), list[Memory]()
      for program in programs_of(attempt, name):
        memory.append(program.compile())
        if not memory[-1].fits:
          break
      if memory[-1].fits:
        break
    run = attempt
    estimates = costs.training(run, name) if part == "training" else costs.scoring(run, name, num_solutions)
    found.changes |= changes
    found.programs += memory
    found.estimates += estimates
    found.totals.append({"what": part, "hours": costs.hours(estimates)})
    if searches and not found.fits:
      break
  return found


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
