"""Arithmetic of a step: operations, bytes, the least time and the least memory of one chip.

The compiler's own count sees the body of a loop once, and the layers are a loop, and so are micro-batches and decoding;
its `optimal_seconds` is negative for most of our programs. So the work is counted from the config: matrix products (of
attention all T x S, of which a kernel may leave out what is masked), and the bytes that any implementation has to move.
What a step does is bounded by

    operations / peak      bytes / memory bandwidth      bytes from other chips / bandwidth of the links

and its time here is the largest of the three, as if the others hid behind it. That is a bound that no run meets: left
out are activations inside a layer and attention's logits on their way through memory, norms and softmax, products too
small to fill the matrix units, the start of each transfer, the host, and reading back what was sampled.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax.numpy as jnp

from experiments.plan.tpus import Slice
from genrm_jax.model import gemma
from genrm_jax.model.config import ModelConfig

_FLOAT32 = 4


@dataclasses.dataclass(frozen=True)
class Work:
  """What one chip does: operations, bytes to or from its memory, bytes from other chips."""

  flops: float
  moved: float
  received: float

  def __add__(self, other: "Work") -> "Work":
    return Work(self.flops + other.flops, self.moved + other.moved, self.received + other.received)

  def times(self, n: float) -> "Work":
    return Work(self.flops * n, self.moved * n, self.received * n)

  def seconds(self, where: Slice) -> dict[str, float]:
    """The least time by what limits it."""
    chip, links = where.chip, where.receive_bandwidth
    return {
      "compute": self.flops / chip.peak_flops,
      "memory": self.moved / chip.hbm_bandwidth,
      "links": self.received / links if self.received else 0.0,
    }


def least_seconds(work: Work, where: Slice) -> tuple[float, str]:
  """The least time of the work, and what limits it."""
  by = work.seconds(where)
  limit = max(by, key=lambda name: by[name])
  return by[limit], limit


@dataclasses.dataclass(frozen=True)
class Training:
  """What of a step's settings costs something."""

  rows: int
  row_length: int
  targets: int  # of a row
  remat: gemma.Remat
  num_micro_batches: int
  trains_all: bool  # not only adapters, whose own work is left out


def matrix_params(model: ModelConfig) -> int:
  """Parameters of the matrices of all layers: each makes two operations a token."""
  attention = 2 * model.embed_dim * model.head_dim * (model.num_heads + model.num_kv_heads)
  return model.num_layers * (attention + 3 * model.embed_dim * model.ffw_dim)


def layers_flops(model: ModelConfig, tokens: int, keys: int) -> float:
  """Operations of all layers on so many tokens, of which each looks at so many keys."""
  return 2.0 * tokens * matrix_params(model) + attention_flops(model, tokens, keys)


def attention_flops(model: ModelConfig, tokens: int, keys: int) -> float:
  return 4.0 * tokens * keys * model.num_layers * model.num_heads * model.head_dim


def unembed_flops(model: ModelConfig, tokens: int) -> float:
  return 2.0 * tokens * model.vocab_size * model.embed_dim


def train_flops(model: ModelConfig, t: Training) -> float:
  """Operations of a step on all chips: forward, twice that backward, and what the backward pass computes again."""
  tokens = t.rows * t.row_length
  attention, matrices = attention_flops(model, tokens, t.row_length), 2.0 * tokens * matrix_params(model)
  of_loss = unembed_flops(model, t.rows * t.targets)
  # A frozen matrix needs no gradient of its own.
  backward = 2 if t.trains_all else 1
  again = {"none": 0.0, "dots": attention, "layer": attention + matrices}[t.remat]
  if t.remat == "layer" and not model.post_norms:
    # Nothing reads the last product of a layer again.
    again -= 2.0 * tokens * model.num_layers * model.embed_dim * model.ffw_dim
  return (1 + backward) * (matrices + of_loss) + 3 * attention + again


def kept_bytes(model: ModelConfig, tokens: int, remat: gemma.Remat) -> int:
  """Bytes that the forward pass keeps of so many tokens for the backward pass; the least that is known of "none"."""
  widths = model.embed_dim  # the residual stream
  if remat != "layer":
    heads = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    widths += heads + 2 * model.ffw_dim + model.embed_dim * (2 if model.post_norms else 1)
  return model.num_layers * tokens * widths * _itemsize(model)


def train_work(model: ModelConfig, t: Training, mesh: Mapping[str, int]) -> Work:
  """Of one chip, in one step."""
  data, fsdp, tensor = mesh["data"], mesh["fsdp"], mesh["tensor"]
  chips, dtype, stored = data * fsdp * tensor, _itemsize(model), jnp.dtype(model.param_dtype).itemsize
  embedding, rest = gemma.num_params(model)
  tokens = t.rows * t.row_length / (data * fsdp)
  passes = 2 + (t.remat == "layer")  # forward, backward, and forward again
  weights = t.num_micro_batches * passes * (rest + embedding) / tensor * dtype
  kept = 2 * kept_bytes(model, math.ceil(tokens), t.remat) / tensor  # written and read
  # Parameters and both moments are read and written, and so is a gradient.
  update = (embedding + rest) / (fsdp * tensor) * (2 * stored + 6 * _FLOAT32) if t.trains_all else 0.0
  gradients = (embedding + rest) / tensor * dtype if t.trains_all else 0.0
  received = t.num_micro_batches * (_gathered(model, mesh, 2) + _others(fsdp) * gradients)
  received += 2 * _others(data) * gradients / fsdp
  received += (2 + 2 * (passes - 1)) * model.num_layers * 2 * _others(tensor) * tokens * model.embed_dim * dtype
  return Work(train_flops(model, t) / chips, weights + kept + update, received)


def read_work(model: ModelConfig, rows: int, width: int, mesh: Mapping[str, int]) -> Work:
  """Of one chip, reading a batch of prompts."""
  chips = math.prod(mesh.values())
  flops = layers_flops(model, rows * width, width) + unembed_flops(model, rows)
  return Work(flops / chips, *_forward_bytes(model, rows * width, mesh))


def write_work(model: ModelConfig, rows: int, slots: int, mesh: Mapping[str, int]) -> Work:
  """Of one chip, writing one token in each row: the whole cache is read, and the logits pass through memory."""
  shards, tensor = mesh["data"] * mesh["fsdp"], mesh["tensor"]
  moved, received = _forward_bytes(model, rows, mesh)
  cache = cache_bytes_per_chip(model, rows, slots, mesh)
  # Made, normalised, summed up, searched.
  logits = 4 * rows / shards * model.vocab_size / tensor * _FLOAT32
  flops = layers_flops(model, rows, slots) + unembed_flops(model, rows)
  return Work(flops / (shards * tensor), moved + cache + logits, received)


def cache_bytes_per_chip(model: ModelConfig, rows: int, slots: int, mesh: Mapping[str, int]) -> float:
  """Keys and values of one chip's share of so many rows; a single kv head is on every tensor shard."""
  heads = model.num_kv_heads / mesh["tensor"] if model.num_kv_heads > 1 else 1
  rows_here = rows / (mesh["data"] * mesh["fsdp"])
  return 2 * model.num_layers * rows_here * slots * heads * model.head_dim * _itemsize(model)


def _forward_bytes(model: ModelConfig, tokens: int, mesh: Mapping[str, int]) -> tuple[float, float]:
  """Bytes moved and received in a forward pass: the weights, and with tensor shards the sums of activations."""
  shards, tensor, dtype = mesh["data"] * mesh["fsdp"], mesh["tensor"], _itemsize(model)
  weights = sum(gemma.num_params(model)) / (mesh["fsdp"] * tensor) * dtype
  sums = 2 * model.num_layers * 2 * _others(tensor) * tokens / shards * model.embed_dim * dtype
  return weights, _gathered(model, mesh, 1) + sums


def _gathered(model: ModelConfig, mesh: Mapping[str, int], passes: int) -> float:
  """Bytes of weights that a chip is sent by those that share them: layers in each pass, the embedding for tokens and
  for logits."""
  embedding, rest = gemma.num_params(model)
  return _others(mesh["fsdp"]) * (passes * rest + 2 * embedding) / mesh["tensor"] * _itemsize(model)


def _others(shards: int) -> float:
  """The share of an array that other chips hold."""
  return (shards - 1) / shards


def _itemsize(model: ModelConfig) -> int:
  return jnp.dtype(model.dtype).itemsize


def least_memory(model: ModelConfig, t: Training, mesh: Mapping[str, int]) -> dict[str, int]:
  """Bytes that a training step needs on a chip for certain, beside parameters and moments."""
  shards, tensor = mesh["data"] * mesh["fsdp"], mesh["tensor"]
  rows = t.rows // shards // t.num_micro_batches
  logits = rows * t.targets * model.vocab_size // tensor * _FLOAT32
  kept = kept_bytes(model, rows * t.row_length, t.remat) // tensor
  # Those of micro-batches are summed up in float32; those of a whole batch are made while logits are no longer needed.
  stored = jnp.dtype(model.param_dtype).itemsize if t.num_micro_batches == 1 else _FLOAT32
  gradients = sum(gemma.num_params(model)) // (mesh["fsdp"] * tensor) * stored if t.trains_all else 0
  parts = {"gradients": gradients, "kept for the backward pass": kept, "logits": logits}
  if t.num_micro_batches == 1:
    parts.pop("logits" if logits < gradients else "gradients")
  return parts
