"""Lower bounds of time, by arithmetic.

Operations are counted from the config (XLA counts the body of a loop once, and layers are a loop), and the bytes that
any implementation has to move. The time of a step is the largest of operations / peak, bytes / memory bandwidth and
bytes from other chips / bandwidth of the links, as if the others overlapped with it completely. That leaves out
activations on their way through memory, norms and softmax, small products, the latency of transfers, and the host.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax.numpy as jnp

from experiments.plan.compiling import bytes_of
from experiments.plan.planned import PlannedRun
from experiments.plan.tpus import Slice
from genrm_jax.infer import slots
from genrm_jax.infer.engine import log_probs_from
from genrm_jax.model import gemma
from genrm_jax.model.config import ModelConfig

GSM8K_SOLUTIONS = 1_319 * 16  # the test problems, and the solutions to each


@dataclasses.dataclass(frozen=True)
class Estimate:
  """The least time of one step, what limits it (compute, memory, links), and how many steps there are."""

  what: str
  seconds: float
  limit: str
  number: int


def hours(estimates: Sequence[Estimate]) -> float:
  return sum(e.number * e.seconds for e in estimates) / 3600


def ms_text(seconds: float) -> str:
  return f"{1000 * seconds:,.0f} ms" if seconds >= 0.1 else f"{1000 * seconds:.3g} ms"


def roofline(what: str, number: int, where: Slice, flops: float, moved: float, received: float) -> Estimate:
  """The least time of operations on all chips, and of bytes through memory and from other chips per chip."""
  by = {"compute": flops / where.num_chips / where.chip.peak_flops, "memory": moved / where.chip.hbm_bandwidth}
  by["links"] = received / where.receive_bandwidth if received else 0.0
  limit = max(by, key=lambda name: by[name])
  return Estimate(what, by[limit], limit, number)


def forward_flops(model: ModelConfig, tokens: int, keys: int, num_logits: int) -> tuple[float, float, float]:
  """Operations of a forward pass of tokens that attend to `keys` tokens each: (matrices, attention, logits)."""
  projections = 2 * model.embed_dim * model.head_dim * (model.num_heads + model.num_kv_heads)
  matrices = 2.0 * tokens * model.num_layers * (projections + 3 * model.embed_dim * model.ffw_dim)
  attention = 4.0 * tokens * keys * model.num_layers * model.num_heads * model.head_dim
  return matrices, attention, 2.0 * num_logits * model.vocab_size * model.embed_dim


def train_flops(run: PlannedRun, name: str) -> float:
  """Operations of a training step: forward, twice that backward (once for frozen matrices), and what is recomputed."""
  model, rows, s = run.model, run.train_config(name).batch_size, run.config.verifiers[name]
  remat = run.remat(name)
  tokens, num_logits = rows * s.row_length, rows * run.counts(name).max_targets
  matrices, attention, logits = forward_flops(model, tokens, s.row_length, num_logits)
  recomputed = {"none": 0.0, "dots": attention, "layer": attention + matrices}[remat]
  if remat == "layer" and not model.post_norms:  # the last product of a layer is not needed again
    recomputed -= 2.0 * tokens * model.num_layers * model.embed_dim * model.ffw_dim
  return (2 if run.adapters(name) else 3) * (matrices + logits) + 3 * attention + recomputed


def _traffic(model: ModelConfig, tokens: float, mesh: Mapping[str, int], passes: int = 1) -> tuple[float, float]:
  """Bytes per chip (HBM traffic, received from other chips) for `passes` forward or backward passes.

  Weights are gathered from the other fsdp shards: layers in the forward and in the backward pass, the embedding for
  tokens and for logits. Activations are summed over tensor shards, twice per layer.
  """
  (embedding, rest), fsdp, tensor = gemma.num_params(model), mesh["fsdp"], mesh["tensor"]
  read = passes * (embedding + rest) / tensor / (1 if passes > 1 else fsdp)
  gathered = (1 - 1 / fsdp) * (min(passes, 2) * rest + 2 * embedding) / tensor
  summed = 4 * passes * model.num_layers * (1 - 1 / tensor) * tokens / (mesh["data"] * fsdp) * model.embed_dim
  return read * _itemsize(model), (gathered + summed) * _itemsize(model)


def _itemsize(model: ModelConfig) -> int:
  return jnp.dtype(model.dtype).itemsize


def training(run: PlannedRun, name: str) -> list[Estimate]:
  """A training step, and an evaluation of at most `max_eval_rows` rows. Saves are written in the background."""
  model, config, s, mesh = run.model, run.train_config(name), run.config.verifiers[name], run.mesh.shape
  num_steps, parts, num_params = config.optim.num_steps, config.num_micro_batches, sum(gemma.num_params(model))
  rows, tokens, fsdp = config.micro_batch_size, config.micro_batch_size * s.row_length, mesh["fsdp"]
  moved, received = (parts * size for size in _traffic(model, tokens, mesh, passes=2 + (run.remat(name) == "layer")))
  if run.adapters(name) is None:
    # Parameters, both moments and the gradient, in float32; gradients are summed over fsdp and data shards.
    moved += num_params / (fsdp * mesh["tensor"]) * 8 * 4
    gradients = num_params / mesh["tensor"] * _itemsize(model)
    received += (parts * (1 - 1 / fsdp) + 2 * (1 - 1 / mesh["data"]) / fsdp) * gradients
  step = roofline("training step", num_steps, run.where, train_flops(run, name), moved, received)
  # Without a cap, the number of held-out rows is that of the data.
  what = f"evaluation of {config.max_eval_rows} rows" if config.max_eval_rows else f"evaluation per {rows} rows"
  n, num_evals = math.ceil((config.max_eval_rows or rows) / rows), math.ceil(num_steps / config.eval_every_steps)
  flops = sum(forward_flops(model, tokens, s.row_length, rows * run.counts(name).max_targets))
  moved, received = _traffic(model, tokens, mesh)
  return [step, roofline(what, num_evals, run.where, n * flops, n * moved, n * received)]


def scoring(run: PlannedRun, name: str, num_solutions: int) -> list[Estimate]:
  """A host's batch of prompts and, where rationales are sampled, a token in each slot and a refill of slots.

  The hosts share the solutions. Each vote counts as if it were sampled alone, though common prefixes are sampled once;
  forced verdicts are left out.
  """
  model, mesh, host, estimates = run.model, run.engine_mesh.shape, run.where.of_one_host, list[Estimate]()
  per_host, refilled = math.ceil(num_solutions / run.where.num_hosts), 0
  for call in run.calls(name, run.lengths.median):
    if call.function is slots.decode:
      break
    if call.prompts and call.function is not slots.insert:
      refilled, width = call.prompts
      tokens, what = refilled * width, f"reading {refilled} prompts of {width} tokens"
      flops = sum(forward_flops(model, tokens, width, tokens // 2 if call.function is log_probs_from else refilled))
      estimates.append(roofline(what, math.ceil(per_host / refilled), host, flops, *_traffic(model, tokens, mesh)))
  for call in run.calls(name, run.lengths.longest):
    if call.function is slots.decode:
      cache, (rows, num_votes, _) = call.args[1].cache, call.args[2].shape
      num_texts, held = per_host * num_votes, bytes_of((cache.k, cache.v))
      # Logits are computed, normalised, summed and searched, in float32.
      logits = 4 * rows / (mesh["data"] * mesh["fsdp"]) * model.vocab_size / mesh["tensor"] * 4
      flops, (moved, received) = sum(forward_flops(model, rows, cache.k.shape[3], rows)), _traffic(model, rows, mesh)
      what, number = f"a token in each of {rows} slots", math.ceil(num_texts / rows) * run.lengths.rationale
      estimates.append(roofline(what, number, host, flops, moved + held + logits, received))
      # Each refill of finished slots reads and writes the cache.
      what, number = f"a refill of {refilled} slots", math.ceil(num_texts / refilled)
      return [*estimates, roofline(what, number, host, 0.0, 2 * held, 0.0)]
  return estimates
