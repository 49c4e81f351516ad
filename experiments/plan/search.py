"""Which settings fit on a slice: tries them, by arithmetic the fastest first."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from experiments.plan import costs
from experiments.plan.compiling import Fit, Program
from experiments.plan.planned import PlannedRun
from genrm_jax.runtime.errors import UserError

ROWS = (512, 256, 128, 64, 32, 16)  # values of engine.rows_per_batch that are tried

Changes = dict[str, Any]  # {"verifiers.orm.remat": "layer"}


class Outcome(NamedTuple):
  """One choice of settings: how they differ from the config's, and the programs on a chip."""

  changes: Changes
  programs: list[Fit]

  @property
  def fits(self) -> bool:
    return all(fit.fits for fit in self.programs)


def search(
  run: PlannedRun, name: str, attempts: Sequence[Changes], programs_of: Callable[[PlannedRun, str], list[Program]]
) -> Outcome:
  """The first attempt whose programs all fit; or the last attempt, up to its first program that does not fit."""
  if not attempts:
    raise UserError(f"{name}: batch_size or heads do not divide over {run.where.name} on any mesh; use another slice")
  for changes in attempts:
    outcome = Outcome(changes, [])
    for program in programs_of(run.changed(changes), name):
      outcome.programs.append(program.fit())
      if not outcome.fits:
        break
    else:
      break
  return outcome


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
  return sorted(attempts, key=lambda c: costs.hours(costs.scoring(run.changed(c), name, costs.GSM8K_SOLUTIONS)))


def _tensor_shards(run: PlannedRun, num_chips: int) -> list[int]:
  heads = run.model.num_heads, run.model.num_kv_heads
  return [n for n in (1, 2, 4) if num_chips % n == 0 and all(h % n == 0 or h == 1 for h in heads)]
