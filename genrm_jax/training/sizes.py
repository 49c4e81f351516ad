"""Micro-batches and recomputation that keep a training step small, chosen by sizes alone.

The choice depends on model and batch and not on the machine, so that a run gives the same numbers anywhere.
"""

from genrm_jax.model import gemma
from genrm_jax.model.config import ModelConfig

_LOGITS_BYTES = 256 << 20  # at most for the logits of a part; the step needs about four times as much
_LAYERS_BYTES = 1 << 30  # and for what the backward pass keeps of the layers


def num_micro_batches(model: ModelConfig, batch_size: int, row_length: int) -> int:
  """The smallest number of equal parts of a batch whose float32 logits take at most 256 MiB; `batch_size` if none do."""
  row_bytes = 4 * row_length * model.vocab_size
  return next(
    (n for n in range(1, batch_size) if not batch_size % n and batch_size // n * row_bytes <= _LOGITS_BYTES), batch_size
  )


def remat(model: ModelConfig, rows: int, row_length: int) -> gemma.Remat:
  """What to recompute in the backward pass of `rows` rows: as little as fits into 1 GiB."""
  matrices = 3 * model.embed_dim + 2 * model.num_heads * model.head_dim + 3 * model.ffw_dim  # outputs of products
  scores = 3 * model.num_heads * row_length  # per query: logits, their softmax and its gradient
  bytes_per_width = (4 if model.dtype == "float32" else 2) * rows * row_length * model.num_layers
  if bytes_per_width * (2 * matrices + 6 * model.embed_dim + scores) <= _LAYERS_BYTES:
    return "none"
  return "dots" if bytes_per_width * matrices <= _LAYERS_BYTES else "layer"
