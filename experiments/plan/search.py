"""Whether a verifier's programs fit a slice, and under which settings: the fastest by arithmetic first."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections

from experiments.plan import compiling, costs, estimates, sizes
from experiments.plan import programs as plan_programs
from experiments.plan.compiling import Fit, engine_mesh, training_mesh
from experiments.plan.estimates import training_of
from experiments.plan.programs import TRAIN_STEP
from experiments.plan.tpus import Slice
from genrm_jax.verifiers import Verifier

ROWS = (512, 256, 128, 64, 32, 16)  # of a batch that is scored, as they are tried

Changes = dict[str, Any]  # {"verifiers.orm.remat": "layer"}


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What came of one choice of settings: those that differ from the config's, and its programs on a chip."""

  changes: Changes
  programs: list[Fit]

  @property
  def fits(self) -> bool:
    return all(fit.fits for fit in self.programs)


def fit_training(config: ml_collections.ConfigDict, verifier: Verifier, where: Slice) -> list[Fit]:
  """The training step on a chip."""
  mesh = training_mesh(config, where)
  sizes.check_batch(config, verifier.name, mesh.shape)
  model, training = sizes.model_config(config), training_of(config, verifier)
  least = costs.least_memory(model, training, mesh.shape)
  return [compiling.fit(plan_programs.train_program(config, verifier, mesh), where, mesh, least)]


def fit_scoring(config: ml_collections.ConfigDict, verifier: Verifier, where: Slice) -> list[Fit]:
  """All that scoring runs on a chip."""
  mesh = engine_mesh(config, where)
  programs = plan_programs.score_programs(config, verifier, mesh)
  return [compiling.fit(program, where.of_one_host, mesh, {}) for program in programs]


def search_training(config: ml_collections.ConfigDict, verifier: Verifier, where: Slice) -> Outcome:
  """Tries what the backward pass computes again, and micro-batches; what was tried last if nothing fits."""
  outcome = Outcome({}, [])
  for changes in training_attempts(config, verifier, where, training_mesh(config, where).shape):
    outcome = Outcome(changes, fit_training(_with(config, changes), verifier, where))
    if outcome.fits:
      break
  return outcome


def search_scoring(
  config: ml_collections.ConfigDict, verifier: Verifier, where: Slice, attempts: list[Changes]
) -> Outcome:
  """Tries one after another of `attempts` up to the first that fits; what was tried last if none does."""
  outcome = Outcome({}, [])
  for changes in attempts:
    tried, outcome = _with(config, changes), Outcome(changes, [])
    mesh = engine_mesh(tried, where)
    for program in plan_programs.score_programs(tried, verifier, mesh):
      outcome.programs.append(compiling.fit(program, where.of_one_host, mesh, {}))
      if not outcome.fits:
        break
    if outcome.fits:
      break
  return outcome


def training_attempts(
  config: ml_collections.ConfigDict, verifier: Verifier, where: Slice, mesh: Mapping[str, int]
) -> list[Changes]:
  """What may be set for training, the fastest first by arithmetic."""
  loop, name = config.verifiers[verifier.name].loop, f"verifiers.{verifier.name}"
  shards = mesh["data"] * mesh["fsdp"]

  def counts() -> Iterator[int]:
    count = 1
    while count == 1 or loop.batch_size % (shards * count) == 0:  # where even 1 does not divide, a check says so
      yield count
      count *= 2

  def seconds(changes: Changes) -> float:
    return estimates.training(_with(config, changes), verifier, where, mesh)[0].seconds

  found = [{f"{name}.remat": r, f"{name}.loop.num_micro_batches": n} for n in counts() for r in ("dots", "layer")]
  return sorted(found, key=seconds)


def scoring_attempts(config: ml_collections.ConfigDict) -> list[Changes]:
  """The config's rows at a time, then fewer and fewer."""
  return [{}, *({"engine.rows_per_batch": rows} for rows in ROWS if rows < config.engine.rows_per_batch)]


def _with(config: ml_collections.ConfigDict, changes: Changes) -> ml_collections.ConfigDict:
  return sizes.with_settings(config, changes)


def remedy(config: ml_collections.ConfigDict, verifier: Verifier, fit: Fit, where: Slice) -> str:
  """What takes the most of a program that does not fit, and what to do about it."""
  if fit.program == TRAIN_STEP:
    use = _for_training(config, verifier, fit, training_mesh(config, where).shape)
  else:
    use = _for_scoring(config, fit)
  return f"{fit.program} needs {size_text(fit.total)} of {size_text(fit.limit)}, most of it {fit.largest}. Use {use}"


def _for_training(config: ml_collections.ConfigDict, verifier: Verifier, fit: Fit, mesh: Mapping[str, int]) -> str:
  settings, option = config.verifiers[verifier.name], f"--config.verifiers.{verifier.name}"
  stays = sum(size for part, size in fit.parts.items() if part in ("parameters", "optimiser", "gradients"))
  if stays > fit.limit:
    return "a larger slice" + ("" if settings.lora.rank else f", or adapters ({option}.lora.rank=16)")
  if settings.remat != "layer":
    return f"{option}.remat=layer, or more micro-batches"
  count = 2 * settings.loop.num_micro_batches
  if settings.loop.batch_size % (mesh["data"] * mesh["fsdp"] * count) == 0:
    return f"{option}.loop.num_micro_batches={count}"
  return "a larger slice, or more of its chips on --config.mesh.tensor"


def _for_scoring(config: ml_collections.ConfigDict, fit: Fit) -> str:
  rows = config.engine.rows_per_batch
  if fit.largest != "parameters" and rows > ROWS[-1]:
    return f"--config.engine.rows_per_batch={rows // 2}"
  return "more chips of a host on --config.engine.mesh.tensor, or chips with more memory"


def size_text(size: float) -> str:
  """Bytes, for a reader."""
  return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.2f} MiB"
