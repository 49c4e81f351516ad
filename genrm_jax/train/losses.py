"""The losses of the paper as sums with denominators (legend of axis letters: types.py; M targets of a row).

    GenRM, GenRM-CoT   L = L_SFT(verify) + lambda * L_SFT(solve)    (paper, equations 4 and 5)
    ORM                L = binary cross-entropy of sigmoid(z_cls)   (paper, equation 2)

L_SFT is the mean over target tokens of -log p(target). Logits are computed only where a target is.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from genrm_jax.types import KIND_SOLVE, KIND_VERIFY, TokenBatch

# name -> (sum, count); the mean is taken once, over all steps between two reports.
Sums = dict[str, tuple[jax.Array, jax.Array]]
# (params, batch) -> (loss to differentiate, sums to report)
LossFn = Callable[[Any, TokenBatch], tuple[jax.Array, Sums]]


def gather_targets(x_BTD: jax.Array, batch: TokenBatch, max_targets: int):
  """The hidden states, targets, weights and kinds of the first `max_targets` targets of each row.

  With a vocabulary of 256k a verdict in a row of 2,000 tokens needs one row of logits, not 2,000.
  """
  order_BM = jnp.argsort(batch.weights <= 0, axis=1, stable=True)[:, :max_targets]

  def take(a):
    return jnp.take_along_axis(a, order_BM, axis=1)

  x_BMD = jnp.take_along_axis(x_BTD, order_BM[..., None], axis=1)
  return x_BMD, take(batch.targets), take(batch.weights), take(batch.kind)


def cross_entropy(logits_BMV: jax.Array, targets_BM: jax.Array) -> jax.Array:
  """-log p(target), float32[B, M]."""
  logits_BMV = logits_BMV.astype(jnp.float32)
  picked_BM = jnp.take_along_axis(logits_BMV, targets_BM[..., None], axis=-1)[..., 0]
  return jax.nn.logsumexp(logits_BMV, axis=-1) - picked_BM


def binary_cross_entropy(z_BM: jax.Array, labels_BM: jax.Array) -> jax.Array:
  """-log sigmoid(z) where the label is 1, -log sigmoid(-z) where it is 0; float32[B, M]."""
  z_BM = z_BM.astype(jnp.float32)
  return -jax.nn.log_sigmoid(jnp.where(labels_BM > 0, z_BM, -z_BM))


def mean_by_kind(nll_BM: jax.Array, weights_BM: jax.Array, kind_BM: jax.Array) -> Sums:
  """Sums and counts of the verification and the solution targets."""
  sums = {}
  for name, kind in (("loss_verify", KIND_VERIFY), ("loss_solve", KIND_SOLVE)):
    w_BM = jnp.where(kind_BM == kind, weights_BM, 0.0)
    sums[name] = (jnp.sum(w_BM * nll_BM), jnp.sum(w_BM))
  return sums


def unified(sums: Sums, solve_weight: float) -> tuple[jax.Array, Sums]:
  """L_verify + lambda * L_solve, and the sums with the total; a kind that is absent from the batch adds nothing."""
  verify, solve = (s / jnp.maximum(n, 1.0) for s, n in (sums["loss_verify"], sums["loss_solve"]))
  loss = verify + solve_weight * solve
  return loss, {"loss": (loss, jnp.ones(())), **sums}
