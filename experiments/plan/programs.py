"""The programs that training and scoring run on devices, lowered from shapes alone: no array is ever made."""

import dataclasses
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp

from experiments.plan.compiling import Program, bytes_of
from experiments.plan.planned import PlannedRun
from genrm_jax.infer import slots
from genrm_jax.model import gemma, lora
from genrm_jax.pytrees import PairBatch, TokenBatch
from genrm_jax.runtime import sharding
from genrm_jax.training import loop, optim, step


def train_programs(run: PlannedRun, name: str) -> list[Program]:
  """The training step. The evaluation step, which reads a micro-batch, needs less memory."""
  config, settings, adapters = run.train_config(name), run.config.verifiers[name], run.adapters(name)
  counts, rows = run.counts(name), sharding.batch_sharding(run.mesh, run.model.rules)
  loop.check_batch_size(name, config, rows)
  params = run.param_shapes(adapters, run.mesh)
  optimizer = optim.make_optimizer(config.optim, lora.split(gemma.norm_mask(run.model, adapters))[0])
  state = step.abstract_state(params, optimizer, jax.tree.map(lambda a: a.sharding, params), run.mesh)
  shape, kind = (config.batch_size, settings.row_length), PairBatch if counts.max_pairs else TokenBatch
  floats, ints = (jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for dtype in (jnp.float32, jnp.int32))
  batch: Any = {f.name: floats if f.name in ("weights", "reference") else ints for f in dataclasses.fields(kind)}
  loss = run.verifier(name).loss(run.model, counts, run.remat(name))
  shardings = jax.tree.map(lambda a: a.sharding, state)
  train_step = step.make_train_step(loss, optimizer, rows, shardings, config.num_micro_batches)
  held = {"parameters": bytes_of(params), "optimiser": bytes_of(state.opt_state)}
  least = {"gradients": bytes_of(state.params)}
  return [Program("train step", run.where, run.mesh, train_step, (state, kind(**batch)), {}, held, least)]


def score_programs(run: PlannedRun, name: str) -> list[Program]:
  """What scoring runs on a host, each program at its largest width; those that compile fast come first."""
  where, mesh, stored = run.where.of_one_host, run.engine_mesh, run.param_shapes(None, run.engine_mesh)
  loading: Any = jax.jit(lambda params: gemma.as_used(params, run.model), donate_argnums=0)
  programs = [Program("loading", where, mesh, loading, (stored,), {}, {"parameters": bytes_of(stored)})]
  largest = {(call.function, call.options.get("token_ids")): call for call in run.all_calls(name)}
  calls = [call for call in largest.values() if call.function not in (slots.init, slots.resume)]  # which take less
  cache = [bytes_of(call.args[1]) for call in calls if call.function is slots.decode]
  for call in sorted(calls, key=lambda call: isinstance(call.args[0], dict)):
    held = {"parameters": bytes_of(run.engine_params)}
    if call.function.__module__ == slots.__name__:
      held["cache"] = cache[0]
    if call.function is slots.insert:
      held["prompts"] = bytes_of(call.args[1])
    programs.append(Program(call.function.__name__, where, mesh, *call, held))
  return programs


def num_compilations(run: PlannedRun, name: str) -> tuple[int, dict[str, int]]:
  """How many programs a run compiles at most: for training; and for a scoring stage, by name."""
  scoring = Counter(function for function, _ in {(c.function.__name__, c.prompts): 0 for c in run.all_calls(name)})
  if not run.verifier(name).is_trained:
    return 0, scoring
  return 2 + (run.counts(name).max_pairs > 0), scoring  # train step, evaluation step; log p under DPO's reference
