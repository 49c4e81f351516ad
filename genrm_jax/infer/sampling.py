"""From logits to tokens, and the keys of every rollout."""

import dataclasses
import functools
import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from genrm_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class SampleConfig:
  """`temperature` 0 is greedy; `top_k` 0 and `top_p` 1 leave the distribution whole."""

  max_new_tokens: int
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0

  def __post_init__(self):
    if self.max_new_tokens < 1 or not self.temperature >= 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
      raise UserError(
        f"bad sampling settings {self}: max_new_tokens >= 1, temperature >= 0, top_k >= 0, 0 < top_p <= 1"
      )


def rollout_keys(seed: int, problem_ids: Sequence[str], candidates: Sequence[int], votes: Sequence[int]) -> jax.Array:
  """One key a rollout, folded from (seed, problem, candidate, vote) and from nothing else; key[n].

  So a sample does not depend on its neighbours, on the batch size, or on where in a run it is drawn.
  """
  problems = np.asarray([zlib.crc32(p.encode()) for p in problem_ids], np.uint32)
  return _fold(jax.random.key(seed), problems, np.asarray(candidates, np.uint32), np.asarray(votes, np.uint32))


@jax.jit
def _fold(key, problems, candidates, votes):
  def one(problem, candidate, vote):
    return jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, problem), candidate), vote)

  return jax.vmap(one)(problems, candidates, votes)


def restrict(logits_BV: jax.Array, config: SampleConfig) -> jax.Array:
  """Temperature, then top-k, then top-p: tokens outside get -inf. The likeliest token always stays."""
  logits_BV = logits_BV / config.temperature
  if config.top_k:
    k = min(config.top_k, logits_BV.shape[-1])
    least = jax.lax.top_k(logits_BV, k)[0][..., -1:]
    logits_BV = jnp.where(logits_BV < least, -jnp.inf, logits_BV)
  if config.top_p < 1.0:
    sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    probs_BV = jax.nn.softmax(sorted_BV, axis=-1)
    # A token stays while the mass before it is below top_p.
    before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
    least = jnp.min(jnp.where(before_BV < config.top_p, sorted_BV, jnp.inf), axis=-1, keepdims=True)
    logits_BV = jnp.where(logits_BV < least, -jnp.inf, logits_BV)
  return logits_BV


def sample(logits_BV: jax.Array, keys_BF: jax.Array, config: SampleConfig) -> jax.Array:
  """F tokens a row, i32[B, F], each with its own key: where a number drawn from [0, 1) lies in the cumulative sum.

  One draw a token, and not one for each of the vocabulary, makes it cheap to sample many times from one distribution.
  """
  if config.temperature == 0:
    token_B1 = jnp.argmax(logits_BV, axis=-1, keepdims=True).astype(jnp.int32)
    return jnp.broadcast_to(token_B1, keys_BF.shape)
  upto_BV = jnp.cumsum(jax.nn.softmax(restrict(logits_BV, config), axis=-1), axis=-1)
  drawn_BF = jax.vmap(jax.vmap(jax.random.uniform))(keys_BF)
  # Rounding leaves a sum that is not quite 1. The first token with a larger sum has a probability that is not 0.
  place_BF = jax.vmap(functools.partial(jnp.searchsorted, side="right"))(upto_BV, drawn_BF * upto_BV[:, -1:])
  return place_BF.astype(jnp.int32)
