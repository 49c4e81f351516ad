"""The programs that training and scoring run on devices, lowered from shapes alone: no array is ever made."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from experiments.plan.compiling import Program, bytes_of
from experiments.plan.planned import Call, PlannedRun
from genrm_jax.infer import engine, slots
from genrm_jax.model import cache as kv_cache
from genrm_jax.model import gemma, lora
from genrm_jax.pipeline import trained
from genrm_jax.pytrees import PairBatch, TokenBatch
from genrm_jax.runtime import sharding
from genrm_jax.training import loop, optim, step


def _shaped(shapes: Any, shardings: Any) -> Any:
  return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings)


def _params(run: PlannedRun, adapters: lora.LoraConfig | None, mesh: Mesh) -> Any:
  """Parameters and adapters, as shapes with shardings."""

  def init(key: jax.Array) -> gemma.Params:
    return {**gemma.init(run.model, key), **(lora.init(run.model, adapters, key) if adapters else {})}

  return _shaped(jax.eval_shape(init, jax.random.key(0)), trained.param_shardings(run.model, adapters, mesh))


def train_programs(run: PlannedRun, name: str) -> list[Program]:
  """The training step. The evaluation step, which reads a micro-batch, needs less memory."""
  config, settings, adapters = run.train_config(name), run.config.verifiers[name], run.adapters(name)
  counts, rows = run.counts(name), sharding.batch_sharding(run.mesh, run.model.rules)
  loop.check_batch_size(name, config, rows)
  params = _params(run, adapters, run.mesh)
  optimizer = optim.make_optimizer(config.optim, lora.split(gemma.norm_mask(run.model, adapters))[0])
  state = jax.eval_shape(lambda p, f: step.init_state(p, optimizer, f), *lora.split(params))
  shardings = step.state_shardings(state, jax.tree.map(lambda a: a.sharding, params), run.mesh)
  state, shape = _shaped(state, shardings), (config.batch_size, settings.row_length)
  floats, ints = (jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for dtype in (jnp.float32, jnp.int32))
  kind: Any = PairBatch if counts.max_pairs else TokenBatch
  batch = kind(**{f.name: floats if f.name in ("weights", "reference") else ints for f in dataclasses.fields(kind)})
  loss = run.verifier(name).loss(run.model, counts, settings.remat)
  train_step = step.make_train_step(loss, optimizer, rows, shardings, config.num_micro_batches)
  held = {"parameters": bytes_of(params), "optimiser": bytes_of(state.opt_state)}
  least = {"gradients": bytes_of(state.params)}
  return [Program("train step", run.where, run.mesh, train_step, (state, batch), {}, held, least)]


class Sizes:
  """The sizes with which the engine makes one call, for texts of the run's `lengths`.

  Attributes:
    num_rows: rows that go through the model at a time; slots, where rationales are sampled.
    num_prompts: prompts that are read at a time.
    width: padded width of a prompt of median length.
    widths: padded widths of all prompts; a program is compiled for each.
    max_len: length of a slot: the longest prompt, and what is sampled after it.
  """

  def __init__(self, run: PlannedRun, call: Call):
    c, lengths, self.samples = run.config.engine, run.lengths, call.function is slots.decode
    self.num_shards = sharding.num_shards(sharding.batch_sharding(run.engine_mesh, run.model.rules))
    self.num_rows = -(-c.rows_per_batch // self.num_shards) * self.num_shards
    self.num_prompts = engine.refill_size(self.num_rows, self.num_shards) if self.samples else self.num_rows
    num_sampled = call.options["settings"].max_new_tokens if self.samples else 0

    def bucket(length: int, num_more: int = 0) -> int:
      return engine.bucket(min(length + call.num_extra, c.max_tokens - num_sampled) + num_more, c.max_tokens)

    first, self.width, last = map(bucket, (lengths.shortest, lengths.median, lengths.longest))
    self.widths = [width for width in engine.buckets(c.max_tokens) if first <= width <= last]
    self.max_len = bucket(lengths.longest, num_sampled)


def score_programs(run: PlannedRun, name: str) -> list[Program]:
  """What scoring runs on a host, each program at its largest width; those that compile fast come first."""
  model, mesh, rows = run.model, run.engine_mesh, sharding.batch_sharding(run.engine_mesh, run.model.rules)
  stored = _params(run, None, mesh)  # with adapters merged
  cast: Any = jax.jit(lambda tree: gemma.as_used(tree, model), donate_argnums=0)
  params = _shaped(jax.eval_shape(cast, stored), jax.tree.map(lambda a: a.sharding, stored))
  held, key_type = {"parameters": bytes_of(params)}, jax.eval_shape(lambda: jax.random.key(0)).dtype
  programs = [Program("loading", run.where.of_one_host, mesh, cast, (stored,), {}, {"parameters": bytes_of(stored)})]

  def add(function: Any, args: tuple[Any, ...], held: dict[str, int], **static: Any) -> None:
    static["config"] = model
    programs.append(Program(function.__name__, run.where.of_one_host, mesh, function, args, static, held))

  def shape(*sizes: int, dtype: Any = jnp.int32) -> Any:
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=rows if sizes else None)

  def new_slots(call: Call, num: int, max_len: int) -> jax.stages.Lowered:
    o, settings = call.options, call.options["settings"]
    how = {"max_new_tokens": settings.max_new_tokens, "num_tracked": len(o["tracked"])}
    return slots.init.lower(num_slots=num, max_len=max_len, num_rollouts=o["num_rollouts"], config=model, **how)

  for call in run.calls(name):
    sizes, options = Sizes(run, call), dict(call.options)
    num, num_prompts, width, shards = sizes.num_rows, sizes.num_prompts, sizes.widths[-1], sizes.num_shards
    prompts = (params, shape(num_prompts, width), shape(num_prompts))
    if not sizes.samples:
      more = (shape(num), shape()) if call.function is engine.log_probs_from else ()
      add(call.function, (*prompts, *more), held, **options)
      continue
    with jax.set_mesh(
      mesh
    ):  # the compiler chooses the shardings; a small batch of slots, which always fits, has the same
      placed = new_slots(call, shards, 1).compile().output_shardings
      state = _shaped(new_slots(call, num, sizes.max_len).out_info, placed)
    cache = _shaped(jax.eval_shape(lambda n=num_prompts, s=width: kv_cache.init(model, n, s)), placed.cache)
    prefilled = slots.Prefilled(cache, shape(num_prompts, model.embed_dim, dtype=jnp.dtype(model.dtype)))
    keys = shape(num, options.pop("num_rollouts"), dtype=key_type)
    with_cache = {**held, "cache": bytes_of(state)}
    add(slots.fork, (state, shape(num)), with_cache, num_shards=shards)
    add(slots.insert, (state, prefilled, shape(num)), {**with_cache, "prompts": bytes_of(prefilled)})
    add(slots.decode, (params, state, keys, shape(), shape()), with_cache, end_id=run.prompter.end_id, **options)
    add(slots.prefill, prompts, with_cache)
  return programs


def num_compilations(run: PlannedRun, name: str) -> tuple[int, dict[str, int]]:
  """How many programs a run compiles at most: for training; and for a scoring stage, by name."""
  scoring: dict[str, int] = {}
  for call in run.calls(name):
    sizes = Sizes(run, call)
    once = {"init": 1, "decode": 1, "fork": 1, "resume": 1} if sizes.samples else {}
    each = ("prefill", "insert") if sizes.samples else (call.function.__name__,)
    scoring |= once | dict.fromkeys(each, len(sizes.widths))
  if not run.verifier(name).is_trained:
    return 0, scoring
  return 2 + (run.counts(name).max_pairs > 0), scoring  # train step, evaluation step; log p under DPO's reference
