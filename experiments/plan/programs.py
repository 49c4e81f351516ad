"""The programs that training and scoring run on devices, lowered from shapes alone: no array is ever made."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from experiments.plan.compiling import Program, bytes_of
from experiments.plan.planned import Call, PlannedRun
from genrm_jax.infer import engine, slots
from genrm_jax.model import cache as kv_cache
from genrm_jax.model import gemma, lora
from genrm_jax.pipeline import trained
from genrm_jax.pytrees import PairBatch, TokenBatch
from genrm_jax.runtime import sharding
from genrm_jax.train import loop, optim, step

TRAIN_STEP = "train step"


def _shaped(shapes: Any, shardings: Any) -> Any:
  return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings)


def _params(run: PlannedRun, adapters: lora.LoraConfig | None, mesh: Mesh) -> Any:
  """Parameters and adapters, as shapes with shardings."""

  def init(key: jax.Array) -> gemma.Params:
    return {**gemma.init(run.model, key), **(lora.init(run.model, adapters, key) if adapters else {})}

  return _shaped(jax.eval_shape(init, jax.random.key(0)), trained.param_shardings(run.model, adapters, mesh))


def train_program(run: PlannedRun, name: str) -> Program:
  """The training step. The evaluation step, which reads a micro-batch, needs less memory."""
  config, adapters, counts = run.train_config(name), run.adapters(name), run.counts(name)
  rows = sharding.batch_sharding(run.mesh, run.model.rules)
  loop.check_batch_size(name, config, rows)
  params = _params(run, adapters, run.mesh)
  optimizer = optim.make_optimizer(config.optim, lora.split(gemma.norm_mask(run.model, adapters))[0])
  state = jax.eval_shape(lambda p, f: step.init_state(p, optimizer, f), *lora.split(params))
  shardings = step.state_shardings(state, jax.tree.map(lambda a: a.sharding, params), run.mesh)
  state = _shaped(state, shardings)
  kind: Any = PairBatch if counts.max_pairs else TokenBatch
  shape = config.batch_size, run.config.verifiers[name].row_length
  floats, ints = (jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for dtype in (jnp.float32, jnp.int32))
  batch = kind(**{f.name: floats if f.name in ("weights", "reference") else ints for f in dataclasses.fields(kind)})
  loss = run.verifier(name).loss(run.model, counts, run.config.verifiers[name].remat)
  train_step = step.make_train_step(loss, optimizer, rows, shardings, config.num_micro_batches)
  held = {"parameters": bytes_of(params), "optimiser": bytes_of(state.opt_state)}
  return Program(TRAIN_STEP, train_step, (state, batch), {}, held, least={"gradients": bytes_of(state.params)})


class Sizes:
  """The sizes with which the engine makes one call, for the texts of the run's `lengths`.

  Attributes:
    num_rows: rows that go through the model at a time; slots, where rationales are sampled.
    num_prompts: prompts that are read at a time.
    width: padded width of a prompt of median length.
    widths: padded widths of all prompts; a program is compiled for each.
    max_len: length of a slot: the longest prompt, and what is sampled after it.
  """

  def __init__(self, run: PlannedRun, call: Call):
    c, lengths, self.rows = run.config.engine, run.lengths, sharding.batch_sharding(run.engine_mesh, run.model.rules)
    self.samples, self.num_shards = call.method == "generate", sharding.num_shards(self.rows)
    self.num_rows = -(-c.rows_per_batch // self.num_shards) * self.num_shards
    self.num_prompts = engine.refill_size(self.num_rows, self.num_shards) if self.samples else self.num_rows
    num_sampled = call.options["settings"].max_new_tokens if self.samples else 0

    def bucket(length: int, num_more: int = 0) -> int:
      fitting = min(length + call.num_extra, c.max_tokens - num_sampled)
      return engine.bucket(fitting + num_more, c.max_tokens)

    first, self.width, last = map(bucket, (lengths.shortest, lengths.median, lengths.longest))
    self.widths = [width for width in engine.buckets(c.max_tokens) if first <= width <= last]
    self.max_len = bucket(lengths.longest, num_sampled)


def score_programs(run: PlannedRun, name: str) -> list[Program]:
  """What scoring runs on a host, each program at its largest width."""
  model, stored = run.model, _params(run, None, run.engine_mesh)  # with adapters merged
  cast: Any = jax.jit(lambda tree: gemma.as_used(tree, model), donate_argnums=0)
  params = _shaped(jax.eval_shape(cast, stored), jax.tree.map(lambda a: a.sharding, stored))
  programs = [Program("loading", cast, (stored,), {}, {"parameters": bytes_of(stored)})]
  for call in run.calls(name):
    sizes = Sizes(run, call)
    if sizes.samples:
      programs += _sampling(run, call, sizes, params)
      continue
    function: Any = engine.log_probs_from if call.method == "log_likelihood" else getattr(engine, call.method)
    args: tuple[Any, ...] = (params, _ints(sizes.rows, sizes.num_rows, sizes.widths[-1]), _ints(sizes.rows, sizes.num_rows))
    if call.method == "log_likelihood":
      args += (_ints(sizes.rows, sizes.num_rows), _ints(None))
    static = {"config": model, **call.options}
    programs.append(Program(call.method, function, args, static, {"parameters": bytes_of(params)}))
  return programs


def _ints(rows: NamedSharding | None, *shape: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)


def _sampling(run: PlannedRun, call: Call, sizes: Sizes, params: Any) -> list[Program]:
  """Prompts are prefilled, inserted into free slots, and decoded; slots are forked. Those that compile fast first."""
  model, settings, tracked, num_rollouts = run.model, *call.options.values()
  prompts, width, rows = sizes.num_prompts, sizes.widths[-1], sizes.rows
  static = {"max_new_tokens": settings.max_new_tokens, "num_tracked": len(tracked), "num_rollouts": num_rollouts}

  def free_slots(num: int, max_len: int) -> jax.stages.Lowered:
    return slots.init.lower(num_slots=num, max_len=max_len, config=model, **static)

  def empty_cache(num: int, max_len: int) -> jax.stages.Lowered:
    return jax.jit(lambda: kv_cache.init(model, num, max_len)).lower()

  def made(of: Callable[[int, int], jax.stages.Lowered], num: int, max_len: int) -> Any:
    """Shapes with the shardings that the compiler chooses, read from a small one, which always fits."""
    return _shaped(of(num, max_len).out_info, of(sizes.num_shards, 1).compile().output_shardings)

  with jax.set_mesh(run.engine_mesh):
    state, cache = made(free_slots, sizes.num_rows, sizes.max_len), made(empty_cache, prompts, width)
  x_PD: Any = jax.ShapeDtypeStruct((prompts, model.embed_dim), model.dtype, sharding=rows)
  prefilled = slots.Prefilled(cache, x_PD)
  key = jax.eval_shape(lambda: jax.random.key(0)).dtype
  keys = jax.ShapeDtypeStruct((sizes.num_rows, num_rollouts), key, sharding=rows)
  decode = {"config": model, "settings": settings, "end_id": run.prompter.end_id, "tracked": tracked}
  per_slot, shards = _ints(rows, sizes.num_rows), {"num_shards": sizes.num_shards, "config": model}
  held = {"parameters": bytes_of(params), "cache": bytes_of(state)}
  with_prompts = {**held, "prompts": bytes_of(prefilled)}
  tokens = (_ints(rows, prompts, width), _ints(rows, prompts))
  return [
    Program("fork", slots.fork, (state, per_slot), shards, held),
    Program("insert", slots.insert, (state, prefilled, per_slot), {"config": model}, with_prompts),
    Program("decode", slots.decode, (params, state, keys, _ints(None), _ints(None)), decode, held),
    Program("prefill", slots.prefill, (params, *tokens), {"config": model}, held),
  ]


def num_compilations(run: PlannedRun, name: str) -> tuple[int, dict[str, int]]:
  """How many programs a run compiles at most: for training; and for a scoring stage by name."""
  scoring: dict[str, int] = {}
  for call in run.calls(name):
    sizes = Sizes(run, call)
    once = {"init": 1, "decode": 1, "fork": 1, "resume": 1} if sizes.samples else {}
    each = ("prefill", "insert") if sizes.samples else (call.method,)
    scoring |= once | dict.fromkeys(each, len(sizes.widths))
  if not run.verifier(name).is_trained:
    return 0, scoring
  return 2 + (run.counts(name).max_pairs > 0), scoring  # train step, evaluation step; log p under DPO's reference
