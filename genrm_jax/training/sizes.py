"""Micro-batches and recomputation that keep a training step small, chosen by sizes alone.

The choice depends on model and batch and not on the machine, so that a run gives the same numbers anywhere.
"""

from genrm_jax.model import gemma
from genrm_jax.model.config import ModelConfig

_LOGITS_BYTES = 256 << 20  # at most for the logits of a part; the step needs about four times as much
_LAYERS_BYTES = 1 << 30  # and for what the backward pass keeps of the layers


def num_micro_batches(model: ModelConfig, batch_size: int, row_length: int, num_shards: int) -> int:
  """The smallest number of equal parts of a batch whose float32 logits take at most 256 MiB; else, of one row a shard.

  Args:
    model: gives the vocabulary.
    batch_size: rows per update.
    row_length: tokens per row.
    num_shards: over which the rows of each part are divided evenly.
  """
  largest = max(1, batch_size // num_shards)
  row_bytes = 4 * row_length * model.vocab_size
  divisors = [n for n in range(1, largest + 1) if not largest % n]
  return next((n for n in divisors if batch_size // n * row_bytes <= _LOGITS_BYTES), largest)


def remat(model: ModelConfig, rows: int, row_length: int) -> gemma.Remat:
  """What to recompute in the backward pass of `rows` rows: as little as fits into 1 GiB."""
  matrices = 3 * model.embed_dim + 2 * model.num_heads * model.head_dim + 3 * model.ffw_dim  # outputs of products
  scores = 3 * model.num_heads * row_length  # per query: logits, their softmax and its gradient
  bytes_per_width = (4 if model.dtype == "float32" else 2) * rows * row_length * model.num_layers
  if bytes_per_width * (2 * matrices + 6 * model.embed_dim + scores) <= _LAYERS_BYTES:
    return "none"
  return "dots" if bytes_per_width * matrices <= _LAYERS_BYTES else "layer"
