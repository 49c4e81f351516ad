"""From logits to tokens, and the random keys of every sample."""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from genrm_jax.runtime.errors import UserError

Purpose = Literal["generator", "grader", "vote"]

_MAX_UNDIVIDED, _BLOCK = 4096, 512  # tokens of a vocabulary that is sampled from in one step, and of a block otherwise


@dataclasses.dataclass(frozen=True)
class SampleConfig:
  """How tokens are sampled. The defaults keep the whole distribution.

  Attributes:
    max_new_tokens: the most tokens of a sample, the end token included.
    temperature: logits are divided by it; 0 is greedy.
    top_k: keeps the k most likely tokens; 0 keeps all.
    top_p: then keeps the most likely tokens that hold this probability; 1 keeps all.

  Raises:
    UserError: a value is out of range.
  """

  max_new_tokens: int
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0

  def __post_init__(self):
    if self.max_new_tokens < 1 or not self.temperature >= 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
      raise UserError(
        f"bad sampling settings {self}: max_new_tokens >= 1, temperature >= 0, top_k >= 0, 0 < top_p <= 1"
      )


def sample_keys(seed: int, purpose: Purpose, names: Sequence[str], num_samples: int) -> jax.Array:
  """Keys of `num_samples` samples per name, key[n, num_samples], folded from (seed, purpose, name, draw) only.

  A sample therefore depends neither on its batch nor on when it is drawn, and samples for different purposes are
  independent even where their names are equal.

  Args:
    seed: of the run.
    purpose: separates solutions, rationales of the grader and votes.
    names: what is sampled for, such as a problem's id.
    num_samples: draws per name, numbered from 0.
  """
  words_N2 = np.array([_hash_words(name) for name in names], np.uint32).reshape(-1, 2)
  return _fold(jax.random.key(seed), _hash_words(purpose), words_N2, np.arange(num_samples, dtype=np.uint32))


def _hash_words(text: str) -> np.ndarray:
  """64 bits of a hash, as two words, so that equal keys for different names are out of the question."""
  return np.frombuffer(hashlib.blake2b(text.encode(), digest_size=8).digest(), "<u4")


@jax.jit
def _fold(key, purpose_2, words_N2, draws_R):
  def fold_words(key, words_2):
    return jax.random.fold_in(jax.random.fold_in(key, words_2[0]), words_2[1])

  keys_N = jax.vmap(functools.partial(fold_words, fold_words(key, purpose_2)))(words_N2)
  return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(keys_N, draws_R)


def probs_of(logits_BV: jax.Array, ids_W: jax.Array) -> jax.Array:
  """Probabilities of some tokens over the full vocabulary, f32[B, W]; no other is computed."""
  largest_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
  return jnp.exp(logits_BV[:, ids_W] - largest_B1) / jnp.sum(jnp.exp(logits_BV - largest_B1), axis=-1, keepdims=True)


def restrict(logits_BV: jax.Array, config: SampleConfig) -> jax.Array:
  """Applies temperature, then top-k, then top-p: excluded tokens get -inf. The most likely token always stays.

  Top-k keeps the k largest logits; top-p then keeps the smallest set of largest logits that holds at least `top_p` of
  the remaining mass, summed in float32. Tokens whose logits equal that of the last one kept stay too.
  """
  logits_BV = logits_BV / config.temperature
  if config.top_k:
    logits_BV = _keep_largest(logits_BV, jnp.ones_like(logits_BV), min(config.top_k, logits_BV.shape[-1]))
  if config.top_p < 1.0:
    mass_BV = jnp.exp(logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True))
    logits_BV = _keep_largest(logits_BV, mass_BV, config.top_p * jnp.sum(mass_BV, axis=-1))
  return logits_BV


def _keep_largest(logits_BV: jax.Array, weights_BV: jax.Array, least_B: jax.Array | int) -> jax.Array:
  """Keeps the fewest of the largest logits whose weights add up to at least `least_B`; the others become -inf.

  Halves the interval of the threshold, in the order of float32 numbers, until it is one number: 32 sums instead of a
  sort. A sum of fewer weights of at least 0, added up in the same order, is never larger, so the result is exact.
  """

  def in_order(x):  # float32 -> int32, or back: x < y where in_order(x) < in_order(y)
    is_float = x.dtype == jnp.float32
    bits = jax.lax.bitcast_convert_type(x, jnp.int32) if is_float else x
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return bits if is_float else jax.lax.bitcast_convert_type(bits, jnp.float32)

  def halve(_, interval):
    low_B, high_B = interval
    middle_B = (low_B | high_B) - ((low_B ^ high_B) >> 1)  # the mean, rounded up, without overflow
    sum_B = jnp.sum(jnp.where(logits_BV >= in_order(middle_B)[:, None], weights_BV, 0.0), axis=-1)
    return jnp.where(sum_B >= least_B, middle_B, low_B), jnp.where(sum_B >= least_B, high_B, middle_B - 1)

  ends = in_order(jnp.min(logits_BV, axis=-1)), in_order(jnp.max(logits_BV, axis=-1))
  threshold_B, _ = jax.lax.fori_loop(0, 32, halve, ends)
  return jnp.where(logits_BV >= in_order(threshold_B)[:, None], logits_BV, -jnp.inf)


def sample(logits_BV: jax.Array, keys_BR: jax.Array, config: SampleConfig) -> jax.Array:
  """Samples R tokens from each distribution, i32[B, R], each with its own key, by inverse CDF.

  One uniform number per token, instead of one per entry of the vocabulary, makes many samples of one distribution
  cheap. In a large vocabulary, tokens are less likely than the resolution of a float32 sum or uniform number (2^-23):
  there one number chooses a block of tokens, and a second one a token in it.
  """
  if config.temperature == 0:
    token_B1 = jnp.argmax(logits_BV, axis=-1, keepdims=True).astype(jnp.int32)
    return jnp.broadcast_to(token_B1, keys_BR.shape)
  probs_BV = jax.nn.softmax(restrict(logits_BV, config), axis=-1)
  (B, V), R = probs_BV.shape, keys_BR.shape[1]
  if V <= _MAX_UNDIVIDED:
    return _inverse_cdf(probs_BV, jax.vmap(jax.vmap(jax.random.uniform))(keys_BR))
  uniform_BR2 = jax.vmap(jax.vmap(lambda key: jax.random.uniform(key, (2,))))(keys_BR)
  probs_BNV = jnp.pad(probs_BV, ((0, 0), (0, -V % _BLOCK))).reshape(B, -1, _BLOCK)
  block_BR = _inverse_cdf(jnp.sum(probs_BNV, axis=-1), uniform_BR2[..., 0])
  probs_BRV = jnp.take_along_axis(probs_BNV, block_BR[..., None], axis=1)
  place_BR = _inverse_cdf(probs_BRV.reshape(B * R, _BLOCK), uniform_BR2[..., 1].reshape(B * R, 1)).reshape(B, R)
  return block_BR * _BLOCK + place_BR


def _inverse_cdf(weights_BN: jax.Array, uniform_BR: jax.Array) -> jax.Array:
  """The first index whose running sum exceeds `uniform` of the total, i32[B, R]; its weight is above 0."""
  cdf_BN = jnp.cumsum(weights_BN, axis=-1)
  index_BR = jax.vmap(functools.partial(jnp.searchsorted, side="right"))(cdf_BN, uniform_BR * cdf_BN[:, -1:])

  # XLA adds up in parallel, so the sums around a weight of 0 may differ by rounding, and a search may end there. Such a
  # gap belongs to the last weight above 0 before it; there is one, since sums of zeros are exact.
  def is_0(index_BR):
    return jnp.take_along_axis(weights_BN, index_BR, axis=1) <= 0

  return jax.lax.while_loop(lambda i: jnp.any(is_0(i)), lambda i: i - is_0(i), index_BR.astype(jnp.int32))
