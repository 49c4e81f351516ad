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

# Kinds of targets in a TokenBatch.
KIND_PAD, KIND_VERIFY, KIND_SOLVE = 0, 1, 2


@flax.struct.dataclass
class TokenBatch:
  """Packed rows. `targets[b, t]` is the token after `tokens[b, t]`; it counts where `weights[b, t]` > 0.

      tokens     Q : 1 + 1 ?  <pad> <pad>
      targets    : 1 + 1 ? Yes  0     0     the next token
      weights    0 0 0 0 0  1   0     0     only the verdict is a target
      segments   1 1 1 1 1  1   0     0     the row's examples, numbered from 1; padding is 0
      positions  0 1 2 3 4  5   0     0     from 0 in each segment
      kind       0 0 0 0 0  1   0     0     KIND_VERIFY / KIND_SOLVE where weights > 0

  For the ORM, the target at the last token is the label, 1 or 0, instead of a token id. For DPO, the targets are the
  tokens of the solutions; in pair p of a row, p = 0, 1, ..., segment 2p + 1 is the chosen solution and segment 2p + 2
  the rejected one.
  """

  tokens: Array  # i32[B, T]
  targets: Array  # i32[B, T]
  weights: Array  # f32[B, T]
  positions: Array  # i32[B, T]
  segments: Array  # i32[B, T]
  kind: Array  # i32[B, T]


@flax.struct.dataclass
class PairBatch(TokenBatch):
  """Packed rows of pairs, with the log-probabilities of DPO's reference model."""

  reference: Array  # f32[B, T]: log p(target) where weights > 0, else 0


@flax.struct.dataclass
class KVCache:
  """Keys and values of the tokens so far; row b is filled up to `length[b]`.

  Keys and values in bfloat16 are stored as their bit patterns, in uint16.
  """

  k: jax.Array  # [L, B, K, S, H]
  v: jax.Array  # [L, B, K, S, H]
  positions: jax.Array  # i32[B, S]
  length: jax.Array  # i32[B]


@flax.struct.dataclass
class TrainState:
  """The state of training after `step` updates. Steps use no randomness, so there is no key.

  When only some parameters are trained (adapters), `frozen` holds the others; the model gets `all_params`. The leaves
  may also be shapes or shardings.
  """

  step: Any  # i32[]
  params: Any  # the trained parameters, a dict
  opt_state: Any
  frozen: Any = dataclasses.field(default_factory=dict)

  @property
  def all_params(self) -> dict[str, Any]:
    return {**self.frozen, **self.params}
