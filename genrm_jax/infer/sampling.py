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


@dataclasses.dataclass(frozen=True)
class SampleConfig:
  """`temperature` 0 is greedy; `top_k` 0 and `top_p` 1 keep the whole distribution."""

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


def restrict(logits_BV: jax.Array, config: SampleConfig) -> jax.Array:
  """Applies temperature, then top-k, then top-p: excluded tokens get -inf. The most likely token always stays."""
  logits_BV = logits_BV / config.temperature
  if config.top_k:
    k = min(config.top_k, logits_BV.shape[-1])
    threshold_B1 = jax.lax.top_k(logits_BV, k)[0][..., -1:]
    logits_BV = jnp.where(logits_BV < threshold_B1, -jnp.inf, logits_BV)
  if config.top_p < 1.0:
    sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    probs_BV = jax.nn.softmax(sorted_BV, axis=-1)
    # A token stays while the mass of the more likely ones is below top_p.
    mass_before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
    threshold_B1 = jnp.min(jnp.where(mass_before_BV < config.top_p, sorted_BV, jnp.inf), axis=-1, keepdims=True)
    logits_BV = jnp.where(logits_BV < threshold_B1, -jnp.inf, logits_BV)
  return logits_BV


def sample(logits_BV: jax.Array, keys_BR: jax.Array, config: SampleConfig) -> jax.Array:
  """Samples R tokens from each distribution, i32[B, R], each with its own key, by inverse CDF.

  One uniform number per token, instead of one per entry of the vocabulary, makes many samples of one distribution
  cheap.
  """
  if config.temperature == 0:
    token_B1 = jnp.argmax(logits_BV, axis=-1, keepdims=True).astype(jnp.int32)
    return jnp.broadcast_to(token_B1, keys_BR.shape)
  cdf_BV = jnp.cumsum(jax.nn.softmax(restrict(logits_BV, config), axis=-1), axis=-1)
  uniform_BR = jax.vmap(jax.vmap(jax.random.uniform))(keys_BR)
  # Rounding leaves a total that is not quite 1. The first token whose sum exceeds the number has a probability above 0.
  token_BR = jax.vmap(functools.partial(jnp.searchsorted, side="right"))(cdf_BV, uniform_BR * cdf_BV[:, -1:])
  return token_BR.astype(jnp.int32)
