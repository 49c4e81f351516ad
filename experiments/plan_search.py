"""Whether a verifier's programs fit a slice, and under which settings: the fastest by arithmetic first."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections

from experiments import plan_compile, plan_costs, plan_estimates, plan_programs, plan_sizes
from experiments.plan_compile import Fit, mesh_of
from experiments.plan_estimates import training_of
from experiments.plan_programs import EVALUATION, TRAIN_STEP, Program
from genrm_jax.tpus import Slice
from genrm_jax.verifiers import Verifier

_LEAST_ROWS = 64  # of a batch that is scored; with fewer, chips would be idle

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
  """The evaluation and the training step on a chip."""
  return [_fit(program, config, verifier, where) for program in _train_programs(config, verifier, where)]


def fit_scoring(config: ml_collections.ConfigDict, verifier: Verifier, where: Slice) -> list[Fit]:
  """All that scoring runs on a chip."""
  mesh = mesh_of(config, where)
  return [plan_compile.fit(p, where, mesh, {}) for p in plan_programs.score_programs(config, verifier, mesh)]


def search_training(config: ml_collections.ConfigDict, verifier: Verifier, where: Slice) -> Outcome:
  """Tries what the backward pass computes again, and micro-batches; what was tried last if nothing fits.

  The evaluation is the same under all of them, so it comes first, and where it does not fit nothing else is tried.
  """
  attempts = training_attempts(config, verifier, where, mesh_of(config, where).shape)
  evaluation = _fit(_train_programs(_with(config, attempts[0]), verifier, where)[0], config, verifier, where)
  outcome = Outcome({}, [evaluation])
  for changes in attempts if evaluation.fits else ():
    tried = _with(config, changes)
    outcome = Outcome(changes, [evaluation, _fit(_train_programs(tried, verifier, where)[1], tried, verifier, where)])
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
    mesh = mesh_of(tried, where)
    for program in plan_programs.score_programs(tried, verifier, mesh):
      outcome.programs.append(plan_compile.fit(program, where, mesh, {}))
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
    return plan_estimates.training(_with(config, changes), verifier, where, mesh)[0].seconds

  found = [{f"{name}.remat": r, f"{name}.loop.num_micro_batches": n} for n in counts() for r in ("dots", "layer")]
  return sorted(found, key=seconds)


def scoring_attempts(config: ml_collections.ConfigDict) -> list[Changes]:
  """Fewer and fewer rows at a time."""
  rows, out = config.engine.rows_per_batch, list[Changes]()
  while not out or rows >= _LEAST_ROWS:
    out.append({"engine.rows_per_batch": rows})
    rows //= 2
  return out


def _train_programs(config: ml_collections.ConfigDict, verifier: Verifier, where: Slice) -> list[Program]:
  mesh = mesh_of(config, where)
  plan_sizes.check_batch(config, verifier.name, mesh.shape)
  return plan_programs.train_programs(config, verifier, mesh)


def _fit(program: Program, config: ml_collections.ConfigDict, verifier: Verifier, where: Slice) -> Fit:
  """A training step, or an evaluation, whose least memory is known."""
  mesh, model = mesh_of(config, where), plan_sizes.model_config(config)
  training = training_of(config, verifier)
  least = plan_costs.least_memory(model, training, mesh.shape, evaluates=program.name == EVALUATION)
  return plan_compile.fit(program, where, mesh, least)


def _with(config: ml_collections.ConfigDict, changes: Changes) -> ml_collections.ConfigDict:
  return plan_sizes.with_settings(config, changes)


def remedy(config: ml_collections.ConfigDict, verifier: Verifier, fit: Fit, mesh: Mapping[str, int]) -> str:
  """What takes the most of a program that does not fit, and what to do about it."""
  settings, option = config.verifiers[verifier.name], f"--config.verifiers.{verifier.name}"
  shards = mesh["data"] * mesh["fsdp"]
  what = f"{fit.program} needs {size_text(fit.total)} of {size_text(fit.limit)}, most of it {fit.largest}"
  stays = sum(size for part, size in fit.parts.items() if part in ("parameters", "optimiser", "gradients"))
  larger = "a larger slice, or more of its chips on --config.mesh.tensor"
  if stays > fit.limit:
    adapters = "" if "optimiser" not in fit.parts or settings.lora.rank else f", or adapters ({option}.lora.rank=16)"
    return f"{what}. Use a larger slice{adapters}"
  if fit.program == EVALUATION:
    return f"{what}; micro-batches do not change it. Use {larger}"
  if fit.program == TRAIN_STEP:
    count = 2 * settings.loop.num_micro_batches
    if settings.remat != "layer":
      return f"{what}. Use {option}.remat=layer, or more micro-batches"
    if settings.loop.batch_size % (shards * count) == 0:
      return f"{what}. Use {option}.loop.num_micro_batches={count}"
    return f"{what}. Use {larger}"
  rows = config.engine.rows_per_batch
  if rows > max(shards, _LEAST_ROWS):
    return f"{what}. Use --config.engine.rows_per_batch={rows // 2}"
  return f"{what}. Use {larger}"


def size_text(size: float) -> str:
  """Bytes, for a reader."""
  return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.2f} MiB"
