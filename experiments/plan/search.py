"""Which settings fit on a slice: tries them, by arithmetic the fastest first."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from experiments.plan import compiling, costs, programs
from experiments.plan.compiling import Fit
from experiments.plan.planned import PlannedRun
from genrm_jax.runtime import sharding

ROWS = (512, 256, 128, 64, 32, 16)  # values of engine.rows_per_batch that are tried

Changes = dict[str, Any]  # {"verifiers.orm.remat": "layer"}


@dataclasses.dataclass(frozen=True)
class Outcome:
  """One choice of settings: how they differ from the config's, and the programs on a chip."""

  changes: Changes
  programs: list[Fit]

  @property
  def fits(self) -> bool:
    return all(fit.fits for fit in self.programs)


def fit_training(run: PlannedRun, name: str) -> Iterator[Fit]:
  """The training step on a chip."""
  yield compiling.fit(programs.train_program(run, name), run.where, run.mesh)


def fit_scoring(run: PlannedRun, name: str) -> Iterator[Fit]:
  """Each program of scoring on a chip."""
  for program in programs.score_programs(run, name):
    yield compiling.fit(program, run.where.of_one_host, run.engine_mesh)


def search(
  run: PlannedRun, name: str, attempts: Iterable[Changes], fit: Callable[[PlannedRun, str], Iterator[Fit]]
) -> Outcome:
  """The first attempt whose programs all fit, or the last attempt, up to the first program that does not fit."""
  outcome = Outcome({}, [])
  for changes in attempts:
    outcome = Outcome(changes, [])
    for found in fit(run.changed(changes), name):
      outcome.programs.append(found)
      if not found.fits:
        break
    if outcome.fits:
      break
  return outcome


def training_attempts(run: PlannedRun, name: str) -> list[Changes]:
  """Values of remat and num_micro_batches, the fastest first."""
  batch_size, prefix, counts = run.train_config(name).batch_size, f"verifiers.{name}", [1]
  shards = sharding.num_shards(sharding.batch_sharding(run.mesh, run.model.rules))
  while batch_size % (2 * shards * counts[-1]) == 0:
    counts.append(2 * counts[-1])
  attempts = [{f"{prefix}.remat": r, f"{prefix}.loop.num_micro_batches": n} for n in counts for r in ("dots", "layer")]
  return sorted(attempts, key=lambda changes: costs.train_step(run.changed(changes), name).seconds)


def scoring_attempts(run: PlannedRun, name: str) -> list[Changes]:
  """Meshes of a host and rows_per_batch, the fastest first: tensor shards, and copies on the rest of its chips."""
  num_chips, heads = run.where.of_one_host.num_chips, (run.model.num_heads, run.model.num_kv_heads)
  shards = [n for n in (1, 2, 4) if num_chips % n == 0 and all(h % n == 0 or h == 1 for h in heads)]
  attempts: list[Changes] = [
    {"engine.mesh.data": num_chips // n, "engine.mesh.tensor": n, "engine.rows_per_batch": rows}
    for n, rows in itertools.product(shards, ROWS)
  ]
  return sorted(attempts, key=lambda c: costs.scoring(run.changed(c), name, costs.GSM8K_SOLUTIONS)[1][0].hours)


def remedy(run: PlannedRun, name: str, fit: Fit) -> str:
  """What takes most of the memory of a program that does not fit, and what to change."""
  largest, prefix = max(fit.parts, key=lambda part: fit.parts[part]), f"--config.verifiers.{name}"
  uses = ["more chips of a host on --config.engine.mesh.tensor"]
  if fit.program != programs.TRAIN_STEP:
    if largest != "parameters":
      uses.insert(0, f"--config.engine.rows_per_batch={max(1, run.config.engine.rows_per_batch // 2)}")
  elif sum(size for part, size in fit.parts.items() if part != "temporaries") > fit.limit:
    uses = ["a larger slice", *([] if run.adapters(name) else [f"adapters ({prefix}.lora.rank=16)"])]
  else:
    tried = training_attempts(run, name)
    uses = [f"{prefix}.remat=layer"] if run.config.verifiers[name].remat != "layer" else []
    count, key = 2 * run.train_config(name).num_micro_batches, f"verifiers.{name}.loop.num_micro_batches"
    uses += [f"--config.{key}={count}"] if count in [changes[key] for changes in tried] else []
    uses.append("a larger slice")
  sizes = f"{size_text(fit.total)} of {size_text(fit.limit)}"
  return f"{fit.program} needs {sizes}, most of it {largest}. Use {', or '.join(uses)}"


def size_text(size: float) -> str:
  return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.2f} MiB"
