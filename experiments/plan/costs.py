"""Lower bounds of time, by arithmetic.

XLA's own count sees the body of a loop once, and layers, micro-batches and decoding are loops. So operations are
counted from the config (matrix products, attention as T x S), and the bytes that any implementation has to move. The
time of a step is the largest of

    operations / peak      bytes / memory bandwidth      bytes from other chips / bandwidth of the links

as if the others overlapped with it completely. No run reaches that bound: it leaves out activations on their way
through memory, norms and softmax, products too small to fill the matrix units, the latency of transfers, and the host.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax.numpy as jnp

from experiments.plan.planned import PlannedRun
from experiments.plan.programs import Sizes
from experiments.plan.tpus import Slice
from genrm_jax.model import gemma
from genrm_jax.model.config import ModelConfig

GSM8K_SOLUTIONS = 1_319 * 16  # the test problems, and the solutions to each
_FLOAT32 = 4


@dataclasses.dataclass(frozen=True)
class Estimate:
  """The least time of one step or pass.

  Attributes:
    what: as shown.
    seconds: per step.
    limit: what limits it: compute, memory or links.
    flops: per chip.
    tokens: read or sampled, on all chips that take part: those of the slice in training, of a host in scoring.
  """

  what: str
  seconds: float
  limit: str
  flops: float
  tokens: int


@dataclasses.dataclass(frozen=True)
class Total:
  """A whole piece of work, in hours."""

  what: str
  hours: float


def estimate(what: str, where: Slice, tokens: int, flops: float, moved: float, received: float) -> Estimate:
  """The least time of so many operations, bytes of memory traffic and bytes from other chips, per chip."""
  seconds = {"compute": flops / where.chip.peak_flops, "memory": moved / where.chip.hbm_bandwidth}
  seconds["links"] = received / where.receive_bandwidth if received else 0.0
  limit = max(seconds, key=lambda name: seconds[name])
  return Estimate(what, seconds[limit], limit, flops, tokens)


def forward_flops(model: ModelConfig, tokens: int, keys: int, num_logits: int) -> tuple[float, float, float]:
  """Operations of a forward pass on all chips: (matrices, attention, logits).

  Each of the tokens attends to `keys` tokens; logits are computed at `num_logits` of them.
  """
  attention = 2 * model.embed_dim * model.head_dim * (model.num_heads + model.num_kv_heads)
  matrices = 2.0 * tokens * model.num_layers * (attention + 3 * model.embed_dim * model.ffw_dim)
  scores = 4.0 * tokens * keys * model.num_layers * model.num_heads * model.head_dim
  return matrices, scores, 2.0 * num_logits * model.vocab_size * model.embed_dim


def train_flops(run: PlannedRun, name: str) -> float:
  """Operations of a training step on all chips: forward, twice that backward, and what is recomputed.

  For frozen matrices the backward pass costs as much as the forward pass; the work of adapters is left out.
  """
  model, rows, s = run.model, run.train_config(name).batch_size, run.config.verifiers[name]
  tokens, num_logits = rows * s.row_length, rows * run.counts(name).max_targets
  matrices, attention, logits = forward_flops(model, tokens, s.row_length, num_logits)
  recomputed = {"none": 0.0, "dots": attention, "layer": attention + matrices}[s.remat]
  if s.remat == "layer" and not model.post_norms:  # the last product of a layer is not needed again
    recomputed -= 2.0 * tokens * model.num_layers * model.embed_dim * model.ffw_dim
  return (2 if run.adapters(name) else 3) * (matrices + logits) + 3 * attention + recomputed


def cache_bytes(model: ModelConfig, rows: int, max_len: int, mesh: Mapping[str, int]) -> float:
  """Keys and values of so many rows, per chip; a single kv head is on every tensor shard."""
  heads = model.num_kv_heads / mesh["tensor"] if model.num_kv_heads > 1 else 1
  own = rows / (mesh["data"] * mesh["fsdp"])
  return 2 * model.num_layers * own * max_len * heads * model.head_dim * _itemsize(model)


def _traffic(model: ModelConfig, tokens: float, mesh: Mapping[str, int], passes: int = 1) -> tuple[float, float]:
  """Bytes per chip (moved through memory, received from other chips) in so many passes, forward or backward.

  Weights of the layers are gathered from the other fsdp shards in the forward and in the backward pass, the embedding
  for tokens and for logits; activations are summed over tensor shards, twice per layer.
  """
  (embedding, rest), fsdp, tensor = gemma.num_params(model), mesh["fsdp"], mesh["tensor"]
  gathered = _others(fsdp) * (min(passes, 2) * rest + 2 * embedding) / tensor
  summed = 4 * passes * model.num_layers * _others(tensor) * tokens / (mesh["data"] * fsdp) * model.embed_dim
  read = passes * (embedding + rest) / tensor / (1 if passes > 1 else fsdp)
  return read * _itemsize(model), (gathered + summed) * _itemsize(model)


def _others(shards: int) -> float:
  """The share of an array that other chips hold."""
  return (shards - 1) / shards


def _itemsize(model: ModelConfig) -> int:
  return jnp.dtype(model.dtype).itemsize


def train_step(run: PlannedRun, name: str) -> Estimate:
  """One training step."""
  model, config, s, mesh = run.model, run.train_config(name), run.config.verifiers[name], run.mesh.shape
  parts, num_params, tokens = config.num_micro_batches, sum(gemma.num_params(model)), config.batch_size * s.row_length
  moved, received = (parts * n for n in _traffic(model, tokens / parts, mesh, passes=2 + (s.remat == "layer")))
  if run.adapters(name) is None:
    # Parameters, both moments and the gradient are updated; gradients are summed over fsdp and data shards.
    moved += num_params / (mesh["fsdp"] * mesh["tensor"]) * 8 * _FLOAT32
    gradients = num_params / mesh["tensor"] * _itemsize(model)
    received += (parts * _others(mesh["fsdp"]) + 2 * _others(mesh["data"]) / mesh["fsdp"]) * gradients
  return estimate("training step", run.where, tokens, train_flops(run, name) / run.where.num_chips, moved, received)


def training(run: PlannedRun, name: str) -> tuple[list[Estimate], list[Total]]:
  """A training step and an evaluation, and all of them. Saves are written in the background and cost nothing here."""
  step, config, model = train_step(run, name), run.train_config(name), run.model
  rows, length, num_steps = config.micro_batch_size, run.config.verifiers[name].row_length, config.optim.num_steps
  flops = sum(forward_flops(model, rows * length, length, rows * run.counts(name).max_targets)) / run.where.num_chips
  batch = estimate("", run.where, rows * length, flops, *_traffic(model, rows * length, run.mesh.shape))
  # Without a cap, the number of held-out rows is that of the data.
  what = f"evaluation of {config.max_eval_rows or rows} rows" + ("" if config.max_eval_rows else ", of all there are")
  n = math.ceil(config.max_eval_rows / rows) or 1
  evaluation = Estimate(what, n * batch.seconds, batch.limit, n * batch.flops, n * batch.tokens)
  num_evals = math.ceil(num_steps / config.eval_every_steps)
  return [step, evaluation], [
    Total(f"{num_steps:,} training steps", num_steps * step.seconds / 3600),
    Total(f"{num_evals:,} x {what}", num_evals * evaluation.seconds / 3600),
  ]


def scoring(run: PlannedRun, name: str, num_solutions: int) -> tuple[list[Estimate], list[Total]]:
  """A host's batch of prompts (and a token in each slot, where rationales are sampled), and all of so many solutions.

  The hosts share the solutions. Each vote counts as if it were sampled alone, though common prefixes are sampled once;
  forced verdicts are left out.
  """
  model, mesh, host = run.model, run.engine_mesh.shape, run.where.of_one_host
  per_host, estimates, seconds, votes = math.ceil(num_solutions / run.where.num_hosts), [], 0.0, ""
  for call in run.calls(name):
    sizes = Sizes(run, call)
    prompts, tokens = sizes.num_prompts, sizes.num_prompts * sizes.width
    num_logits = tokens // 2 if call.method == "log_likelihood" else prompts
    flops = sum(forward_flops(model, tokens, sizes.width, num_logits)) / host.num_chips
    what = f"reading {prompts} prompts of {sizes.width} tokens"
    estimates.append(estimate(what, host, tokens, flops, *_traffic(model, tokens, mesh)))
    seconds += math.ceil(per_host / prompts) * estimates[-1].seconds
    if sizes.samples:
      rows, num_votes, length = sizes.num_rows, call.options["num_rollouts"], run.lengths.rationale
      cache = cache_bytes(model, rows, sizes.max_len, mesh)  # all of it is read
      flops = sum(forward_flops(model, rows, sizes.max_len, rows)) / host.num_chips
      moved, received = _traffic(model, rows, mesh)
      # Logits are computed, normalised, summed and searched.
      moved += cache + 4 * rows / sizes.num_shards * model.vocab_size / mesh["tensor"] * _FLOAT32
      estimates.append(estimate(f"a token in each of {rows} slots", host, rows, flops, moved, received))
      seconds += math.ceil(per_host * num_votes / rows) * length * estimates[-1].seconds
      # Each refill of finished slots reads and writes the cache.
      seconds += math.ceil(per_host * num_votes / prompts) * 2 * cache / host.chip.hbm_bandwidth
      votes = f" x {num_votes} votes of {length} tokens"
      break
  return estimates, [Total(f"scoring {num_solutions:,} solutions{votes}", seconds / 3600)]
