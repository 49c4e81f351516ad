"""The paper's losses, as sums and counts (axis letters: pytrees.py; M targets per row, P pairs per row).

    GenRM, GenRM-CoT   L = L_SFT(verify) + lambda * L_SFT(solve)    (paper, equations 4 and 5)
    ORM                L = binary cross-entropy of sigmoid(z_cls) + c log^2 Z    (paper, equation 2 and appendix B)
    DPO                L = -log sigmoid(beta * (m - m_ref))         (Rafailov et al. 2023, equation 7)

L_SFT is the mean over target tokens of -log p(target). The margin m of a pair is log p(chosen) - log p(rejected), each
summed over the tokens of the solution, and m_ref the same under the reference model; the loss is the mean over pairs.
Logits are computed at targets only.
"""

from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp

from genrm_jax.pytrees import KIND_SOLVE, KIND_VERIFY, Array, PairBatch, TokenBatch

# name -> (sum, count); the mean is taken once, over all steps since the last report.
Sums = dict[str, tuple[jax.Array, jax.Array]]
_Batch = TypeVar("_Batch", bound=TokenBatch)
Counts = dict[str, jax.Array]


class LossFn(Protocol):
  """(params, batch) -> (loss to differentiate, sums to report).

  For a micro-batch, `counts` are the counts of the whole batch; the losses of the parts then add up to its loss.
  """

  def __call__(self, params: Any, batch: Any, counts: Counts | None = None) -> tuple[jax.Array, Sums]: ...


def gather_targets(x_BTD: jax.Array, batch: _Batch, max_targets: int) -> tuple[jax.Array, _Batch]:
  """The hidden states and the batch (fields [B, M]) at the first `max_targets` targets of each row, in order.

  With a vocabulary of 256k, a verdict after 2,000 tokens needs the logits of one position, not of 2,000.
  """
  order_BM = jnp.argsort(batch.weights <= 0, axis=1, stable=True)[:, :max_targets]
  x_BMD = jnp.take_along_axis(x_BTD, order_BM[..., None], axis=1)
  return x_BMD, jax.tree.map(lambda a: jnp.take_along_axis(a, order_BM, axis=1), batch)


def cross_entropy(logits_BMV: jax.Array, targets_BM: jax.Array) -> jax.Array:
  """-log p(target), float32[B, M]."""
  logits_BMV = logits_BMV.astype(jnp.float32)
  picked_BM = jnp.take_along_axis(logits_BMV, targets_BM[..., None], axis=-1)[..., 0]
  return jax.nn.logsumexp(logits_BMV, axis=-1) - picked_BM


def binary_cross_entropy(z_BM: jax.Array, labels_BM: jax.Array) -> jax.Array:
  """-log sigmoid(z) where the label is 1, else -log sigmoid(-z); float32[B, M]."""
  z_BM = z_BM.astype(jnp.float32)
  return -jax.nn.log_sigmoid(jnp.where(labels_BM > 0, z_BM, -z_BM))


def squared_log_normaliser(z_BM: jax.Array) -> jax.Array:
  """The z-loss log^2 Z of a classifier that reads one logit, float32[B, M] (paper, appendix B).

  sigmoid(z) is the softmax over the logits (0, z), so Z = 1 + e^z. The paper does not define Z; this reading needs no
  other logit.
  """
  return jax.nn.softplus(z_BM.astype(jnp.float32)) ** 2


def mean_by_kind(nll_BM: jax.Array, weights_BM: jax.Array, kind_BM: jax.Array) -> Sums:
  """Sums and counts over the verification targets and over the solution targets."""
  sums = {}
  for name, kind in (("loss_verify", KIND_VERIFY), ("loss_solve", KIND_SOLVE)):
    w_BM = jnp.where(kind_BM == kind, weights_BM, 0.0)
    sums[name] = (jnp.sum(w_BM * nll_BM), jnp.sum(w_BM))
  return sums


def margins(logp_BM: Array, batch: TokenBatch, max_pairs: int) -> tuple[jax.Array, jax.Array]:
  """log p(chosen) - log p(rejected) of the first `max_pairs` pairs of each row.

  Args:
    logp_BM: log p of the targets.
    batch: at the targets; pair p of a row, from 0, is in segments 2p + 1 (chosen) and 2p + 2 (rejected).
    max_pairs: P, at least the number of pairs in any row; later pairs are dropped.

  Returns:
    The margins f32[B, P], and which of them belong to a pair, bool[B, P].
  """
  signed_BM = batch.weights * jnp.where(batch.segments % 2 == 1, logp_BM, -logp_BM)
  is_in_pair_BMP = (batch.segments[..., None] + 1) // 2 == 1 + jnp.arange(max_pairs)
  is_pair_BP = jnp.any(is_in_pair_BMP & (batch.weights > 0)[..., None], axis=1)
  return jnp.sum(jnp.where(is_in_pair_BMP, signed_BM[..., None], 0.0), axis=1), is_pair_BP


def dpo(
  logp_BM: jax.Array, batch: PairBatch, beta: float, max_pairs: int, counts: Counts | None = None
) -> tuple[jax.Array, Sums]:
  """DPO's mean loss over pairs, and the sums to report.

  `accuracy` is the share of pairs whose implicit rewards are in the right order, `accuracy_likelihood` the share whose
  likelihoods are, by which the verifier ranks.

  Args:
    logp_BM: log p of the targets.
    batch: at the targets.
    beta: strength of the pull towards the reference.
    max_pairs: see `margins`.
    counts: see `LossFn`.
  """
  margin_BP, is_pair_BP = margins(logp_BM, batch, max_pairs)
  gain_BP = margin_BP - margins(batch.reference, batch, max_pairs)[0]
  nll_BP = -jax.nn.log_sigmoid(beta * gain_BP)
  num_pairs = jnp.sum(is_pair_BP, dtype=jnp.float32)

  def over_pairs(a_BP):
    return jnp.sum(jnp.where(is_pair_BP, a_BP, 0.0)), num_pairs

  total, _ = over_pairs(nll_BP)
  loss = total / jnp.maximum(num_pairs if counts is None else counts["loss_verify"], 1.0)
  return loss, {
    "loss": (loss, jnp.ones(())),
    "loss_verify": (total, num_pairs),
    "accuracy": over_pairs(gain_BP > 0),
    "accuracy_likelihood": over_pairs(margin_BP > 0),
  }


def unified(
  sums: Sums, solve_weight: float, counts: Counts | None = None, z_loss: float = 0.0
) -> tuple[jax.Array, Sums]:
  """L_verify + lambda * L_solve + `z_loss` * the mean of "z_loss" in `sums`, if any, and the sums to report.

  A kind without targets in the batch adds nothing.
  """
  counts = {name: count for name, (_, count) in sums.items()} if counts is None else counts
  weights = {"loss_verify": 1.0, "loss_solve": solve_weight, "z_loss": z_loss}
  loss = sum(
    (weights[name] * total / jnp.maximum(counts[name], 1.0) for name, (total, _) in sums.items()), jnp.zeros(())
  )
  return loss, {"loss": (loss, jnp.ones(())), **sums}
