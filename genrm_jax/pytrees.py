"""Pytrees that live on devices, and the legend of axis letters.

Axis letters, used as suffixes of array names (`x_BTD`) and in einsums:
  B batch, T query position, S key position, L layer, N query head, K kv head, G = N/K, H head dim, D model, F ffw,
  V vocabulary, W tracked token, R rollout (vote), C candidate.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import numpy as np

Array = jax.Array | np.ndarray  # on devices, or still on the host

# Kinds of a target in a TokenBatch.
KIND_PAD, KIND_VERIFY, KIND_SOLVE = 0, 1, 2


@flax.struct.dataclass
class TokenBatch:
  """Packed rows. `targets[b, t]` is what follows `tokens[b, t]`, read where `weights[b, t]` > 0.

      tokens     Q : 1 + 1 ?  <pad> <pad>
      targets    : 1 + 1 ? Yes  0     0     the next token
      weights    0 0 0 0 0  1   0     0     only the verdict is a target
      segments   1 1 1 1 1  1   0     0     examples of a row are numbered from 1, padding is 0
      positions  0 1 2 3 4  5   0     0     count from 0 in each segment
      kind       0 0 0 0 0  1   0     0     KIND_VERIFY / KIND_SOLVE where weights > 0

  For the ORM the target at the last token is the label, 1 or 0, instead of a token id. For DPO the targets are the
  tokens of solutions; those of pair p of a row, counted from 0, lie in segment 2p + 1, the chosen one, and 2p + 2.
  """

  tokens: Array  # i32[B, T]
  targets: Array  # i32[B, T]
  weights: Array  # f32[B, T]
  positions: Array  # i32[B, T]
  segments: Array  # i32[B, T]
  kind: Array  # i32[B, T]


@flax.struct.dataclass
class PairBatch(TokenBatch):
  """Packed rows of pairs, with what the reference model of DPO says of them."""

  reference: Array  # f32[B, T]: log p(target) where weights > 0, else 0


@flax.struct.dataclass
class KVCache:
  """Keys and values of what was read so far; row b is filled up to `length[b]`."""

  k: jax.Array  # [L, B, S, K, H]
  v: jax.Array  # [L, B, S, K, H]
  positions: jax.Array  # i32[B, S]
  length: jax.Array  # i32[B]


@flax.struct.dataclass
class TrainState:
  """`step` is the number of updates already applied. Nothing in a step is random, so there is no key.

  Where only some parameters are trained (adapters), `frozen` holds the others; a model reads `all_params`.
  """

  step: Any  # i32[]; in the trees of shapes and shardings, its shape or sharding
  params: Any  # trained: a dict
  opt_state: Any
  frozen: Any = dataclasses.field(default_factory=dict)

  @property
  def all_params(self) -> dict[str, Any]:
    return {**self.frozen, **self.params}
