"""The programs that training and scoring run on the devices, lowered from shapes alone: no array is ever made."""

import dataclasses
import math
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh

from experiments.plan import sizes
from genrm_jax import verifiers
from genrm_jax.infer import engine, slots
from genrm_jax.infer.sampling import SampleConfig
from genrm_jax.model import cache as kv_cache
from genrm_jax.model import gemma, lora
from genrm_jax.model.config import ModelConfig
from genrm_jax.pipeline import trained
from genrm_jax.pytrees import PairBatch, TokenBatch
from genrm_jax.runtime import sharding
from genrm_jax.train import optim, step
from genrm_jax.verifiers import Verifier

TRAIN_STEP = "train step"
# Which tokens are tracked, and which ends a text or is the ORM's class token, makes no difference to shapes.
_TRACKED, _END = (2, 3), 1
_PROMPTER: Any = types.SimpleNamespace(tokenizer=types.SimpleNamespace(cls_id=_END))


@dataclasses.dataclass(frozen=True)
class Program:
  """One compiled function, and what lies on a chip while it runs.

  Attributes:
    name: for a reader.
    lower: lowers it, under the mesh.
    held: bytes of a chip by what they hold: all that is there besides the function's own temporaries.
    beside: of these, what is no argument of the function.
  """

  name: str
  lower: Callable[[], jax.stages.Lowered]
  held: dict[str, int]
  beside: int = 0


def bytes_of(tree: Any) -> int:
  """Of one chip's shards; the shapes have shardings."""
  return sum(
    math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize if a.sharding else a.size * a.dtype.itemsize
    for a in jax.tree.leaves(tree)
  )


def train_program(config: ml_collections.ConfigDict, verifier: Verifier, mesh: Mesh) -> Program:
  """The training step. The evaluation between steps, which reads as many rows at a time, takes less."""
  settings, model = config.verifiers[verifier.name], sizes.model_config(config)
  adapters = sizes.adapters(settings)
  shardings = trained.param_shardings(model, adapters, mesh)
  params = params_like(model, adapters, mesh)
  optimizer = optim.make_optimizer(optim.OptimConfig(**settings.optim.to_dict()))
  abstract = jax.eval_shape(lambda p, f: step.init_state(p, optimizer, f), *lora.split(params))
  state_shardings = step.state_shardings(abstract, shardings, mesh)
  state = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, state_shardings)
  kind: Any = PairBatch if verifier.learns_pairs else TokenBatch
  shape, in_rows = (settings.loop.batch_size, settings.row_length), sharding.batch_sharding(mesh)

  def field(name: str) -> jax.ShapeDtypeStruct:
    dtype = jnp.float32 if name in ("weights", "reference") else jnp.int32
    return jax.ShapeDtypeStruct(shape, dtype, sharding=in_rows)

  batch = kind(**{f.name: field(f.name) for f in dataclasses.fields(kind)})
  loss = verifiers.make_loss(
    verifier,
    model,
    _PROMPTER,
    sizes.max_targets(verifier, settings, sizes.lengths(config)),
    settings.get("solve_weight", 0.0),
    settings.get("beta", 0.0),
    settings.remat,
  )
  held = {"parameters": bytes_of(params), "optimiser": bytes_of(state.opt_state)}
  train: Any = step.make_train_step(loss, optimizer, mesh, state_shardings, settings.loop.num_micro_batches)
  return Program(TRAIN_STEP, lambda: train.lower(state, batch), held)


def score_programs(config: ml_collections.ConfigDict, verifier: Verifier, mesh: Mesh) -> list[Program]:
  """What scoring runs on the mesh of a host's engine.

  The parameters are brought to the dtype in which they are used; then it is one pass over each solution, or prompts
  that are read and rationales that are written.
  """
  model, texts, rows = sizes.model_config(config), sizes.lengths(config), rows_per_batch(config, mesh.shape)
  stored = params_like(model, None, mesh)  # adapters are merged
  shapes = jax.eval_shape(lambda tree: gemma.as_used(tree, model), stored)
  params = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s.sharding), shapes, stored)
  held = {"parameters": bytes_of(params)}
  cast: Any = jax.jit(lambda tree: gemma.as_used(tree, model), donate_argnums=0)
  loading = Program("loading", lambda: cast.lower(stored), {"parameters": bytes_of(stored)})

  def ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding.batch_sharding(mesh))

  width = padded(config, texts.longest_prompt)
  if verifier.writes_rationales:
    return [loading, *_vote_programs(config, verifier, mesh, params, ints, width)]
  if verifier.learns_pairs:  # its prompts hold no solution, which is read for its likelihood
    return [
      loading,
      Program(
        "scoring",
        lambda: engine.log_probs_from.lower(
          params, ints(rows, width), ints(rows), ints(rows), jax.ShapeDtypeStruct((), jnp.int32), config=model
        ),
        held,
      ),
    ]
  return [
    loading,
    Program(
      "scoring",
      lambda: engine.next_token_probs.lower(params, ints(rows, width), ints(rows), config=model, token_ids=_TRACKED),
      held,
    ),
  ]


def _vote_programs(
  config: ml_collections.ConfigDict,
  verifier: Verifier,
  mesh: Mesh,
  params: Any,
  ints: Callable[..., jax.ShapeDtypeStruct],
  width: int,
) -> list[Program]:
  """As the engine calls them: some prompts are read, take the place of rows that have ended, and all rows write."""
  model, num_rows, num_votes = (
    sizes.model_config(config),
    rows_per_batch(config, mesh.shape),
    config.votes.num_votes,
  )
  sampling = sample_config(config, verifier)
  num_prompts, shards = prompts_per_read(num_rows, mesh.shape), mesh.shape["data"] * mesh.shape["fsdp"]
  max_len = padded(config, sizes.lengths(config).longest_prompt + sampling.max_new_tokens)

  def free_slots(num_rows: int, max_len: int) -> jax.stages.Lowered:
    return slots.init.lower(
      num_slots=num_rows,
      num_rollouts=num_votes,
      max_len=max_len,
      max_new_tokens=sampling.max_new_tokens,
      num_tracked=len(_TRACKED),
      config=model,
    )

  def empty_cache(num_rows: int, max_len: int) -> jax.stages.Lowered:
    return jax.jit(lambda: kv_cache.init(model, num_rows, max_len)).lower()

  with jax.set_mesh(mesh):
    rows = _made(free_slots(num_rows, max_len), free_slots(shards, 1))
    read_cache = _made(empty_cache(num_prompts, width), empty_cache(shards, 1))
  x_BD: Any = jax.ShapeDtypeStruct((num_prompts, model.embed_dim), model.dtype, sharding=sharding.batch_sharding(mesh))
  prompts = slots.Prefilled(read_cache, x_BD)
  key = jax.eval_shape(lambda: jax.random.key(0))
  keys = jax.ShapeDtypeStruct((num_rows, num_votes), key.dtype, sharding=sharding.batch_sharding(mesh))
  count = jax.ShapeDtypeStruct((), jnp.int32)
  weights, cache, read = bytes_of(params), bytes_of(rows), bytes_of(prompts)
  held = {"parameters": weights, "cache": cache}
  return [  # those first that take little time to compile
    Program(
      "copying rows",
      lambda: slots.fork.lower(rows, ints(num_rows), num_shards=shards, config=model),
      held,
      beside=weights,
    ),
    Program(
      "placing prompts",
      lambda: slots.insert.lower(rows, prompts, ints(num_rows), config=model),
      {"parameters": weights, "cache": cache + read},
      beside=weights,
    ),
    Program(
      "writing",
      lambda: slots.decode.lower(
        params, rows, keys, count, count, config=model, settings=sampling, end_id=_END, tracked=_TRACKED
      ),
      held,
    ),
    Program(
      "reading prompts",
      lambda: slots.prefill.lower(params, ints(num_prompts, width), ints(num_prompts), config=model),
      held,
      beside=cache,
    ),
  ]


def sample_config(config: ml_collections.ConfigDict, verifier: Verifier) -> SampleConfig:
  """How votes are sampled; the judge, which is not trained to end, has a limit of its own."""
  sampling = SampleConfig(**config.votes.sample.to_dict())
  if verifier.is_trained:
    return sampling
  return dataclasses.replace(sampling, max_new_tokens=config.verifiers[verifier.name].max_new_tokens)


def params_like(model: ModelConfig, adapters: lora.LoraConfig | None, mesh: Mesh) -> Any:
  """The parameters of a verifier as they are trained and saved, as shapes with shardings."""
  specs = {name: (tree, model.param_dtype) for name, tree in gemma.param_specs(model).items()}
  if adapters:
    specs |= {name: (tree, "float32") for name, tree in lora.param_specs(model, adapters).items()}
  shardings = trained.param_shardings(model, adapters, mesh)
  return {
    name: jax.tree.map(lambda s, h, d=dtype: jax.ShapeDtypeStruct(s.shape, d, sharding=h), tree, shardings[name])
    for name, (tree, dtype) in specs.items()
  }


def rows_per_batch(config: ml_collections.ConfigDict, mesh: Mapping[str, int]) -> int:
  """Rows that the engine sends through the model at a time: as configured, and as many on each batch shard."""
  shards = mesh["data"] * mesh["fsdp"]
  return -(-config.engine.rows_per_batch // shards) * shards


def prompts_per_read(num_rows: int, mesh: Mapping[str, int]) -> int:
  """Prompts that the engine reads at a time."""
  shards = mesh["data"] * mesh["fsdp"]
  return engine.refill_size(num_rows, shards)


def padded(config: ml_collections.ConfigDict, num_tokens: int) -> int:
  """The width to which the engine pads so many tokens, or all of its context if they do not fit."""
  max_tokens = config.engine.max_tokens
  return engine.bucket(min(num_tokens, max_tokens), max_tokens)


def _made(lowered: jax.stages.Lowered, smaller: jax.stages.Lowered) -> Any:
  """What a function that takes nothing gives, as shapes with the shardings that the compiler chooses.

  These are read from a smaller one, which always fits.
  """
  shardings = smaller.compile().output_shardings
  return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), lowered.out_info, shardings)
