"""Batched inference engine: next-token probabilities, log-likelihoods and sampling.

Token ids in, numbers or token ids out, for any number of prompts of any length. Prompts are sorted by length and padded
to one of a few widths, each compiled once; results are returned in the order of the input.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from genrm_jax.infer.sampling import SampleConfig, probs_of
from genrm_jax.infer.session import Rollout, Session
from genrm_jax.infer.slots import last_hidden, positions_and_segments
from genrm_jax.model import gemma
from genrm_jax.model.config import ModelConfig
from genrm_jax.runtime import sharding
from genrm_jax.runtime.errors import UserError
from genrm_jax.runtime.progress import progress

_WIDTH_MULTIPLE = 32
# Decoding pauses when this fraction of the slots is free. A smaller one pauses more often; a larger one idles more.
_REFILL_FRACTION = 1 / 8


def buckets(max_tokens: int) -> list[int]:
  """Widths to which up to `max_tokens` tokens are padded: 32, 64, 96, 128, 192, 256, 384, ..., and the largest.

  They are the multiples of 32 that are 1 or 1.5 times a power of two, below `max_tokens` rounded up to a multiple of
  32, which is the last.
  """
  largest = _round_up(max_tokens, _WIDTH_MULTIPLE)
  powers = [2**i for i in range(largest.bit_length())]
  widths = {width for power in powers for width in (power, 3 * power // 2) if width % _WIDTH_MULTIPLE == 0}
  return [*sorted(width for width in widths if width < largest), largest]


def bucket(num_tokens: int, max_tokens: int) -> int:
  """The least of `buckets(max_tokens)` that holds `num_tokens`, which is at most `max_tokens`."""
  return next(width for width in buckets(max_tokens) if width >= num_tokens)


def refill_size(num_slots: int, num_shards: int) -> int:
  """Slots that are refilled at a time, and prompts per prefill: an eighth of the slots, in whole batch shards."""
  return _round_up(math.ceil(num_slots * _REFILL_FRACTION), num_shards)


@functools.partial(jax.jit, static_argnames=("config", "token_ids"))
def next_token_probs(params, tokens_BT, length_B, *, config: ModelConfig, token_ids: tuple[int, ...]):
  """Probabilities of the token ids after each row, over the full vocabulary: f32[B, W]."""
  x_BTD, _ = gemma.forward(params, config, tokens_BT, *positions_and_segments(tokens_BT, length_B))
  logits_BV = gemma.unembed(params, config, last_hidden(x_BTD, length_B))
  return probs_of(logits_BV, jnp.asarray(token_ids))


@functools.partial(jax.jit, static_argnames=("config", "token_ids"))
def next_token_logits(params, tokens_BT, length_B, *, config: ModelConfig, token_ids: tuple[int, ...]):
  """Logits of the token ids after each row, f32[B, W], and of no others."""
  x_BTD, _ = gemma.forward(params, config, tokens_BT, *positions_and_segments(tokens_BT, length_B))
  return gemma.unembed(params, config, last_hidden(x_BTD, length_B), token_ids)


@functools.partial(jax.jit, static_argnames="config")
def log_probs_from(params, tokens_BT, length_B, start_B, num_blocks, *, config: ModelConfig):
  """log p of the tokens of each row from place `start_B` on, f32[B, T], moved to the left; 0 beyond the row's end.

  Only the logits that predict such a token are computed, `num_blocks` times for 32 places: for a long solution and a
  vocabulary of 256k they would not fit into memory at once.
  """
  x_BTD, _ = gemma.forward(params, config, tokens_BT, *positions_and_segments(tokens_BT, length_B))
  last = tokens_BT.shape[1] - 1

  def add_block(index, logp_BT):
    first = index * _WIDTH_MULTIPLE
    place_BM = start_B[:, None] + first + jnp.arange(_WIDTH_MULTIPLE)
    x_BMD = jnp.take_along_axis(x_BTD, jnp.clip(place_BM - 1, 0, last)[..., None], axis=1)
    logp_BMV = jax.nn.log_softmax(gemma.unembed(params, config, x_BMD), axis=-1)
    target_BM = jnp.take_along_axis(tokens_BT, jnp.minimum(place_BM, last), axis=1)
    logp_BM = jnp.take_along_axis(logp_BMV, target_BM[..., None], axis=-1)[..., 0]
    logp_BM = jnp.where(place_BM < length_B[:, None], logp_BM, 0.0)
    return jax.lax.dynamic_update_slice_in_dim(logp_BT, logp_BM, first, axis=1)

  return jax.lax.fori_loop(0, num_blocks, add_block, jnp.zeros(tokens_BT.shape, jnp.float32))


@dataclasses.dataclass(frozen=True)
class Engine:
  """A model on a mesh, ready for inference.

  Attributes:
    params: laid out on `mesh`.
    config: the model.
    mesh: devices of this process.
    end_id: the token that ends a rollout.
    rows_per_batch: prompts, or rollouts being decoded, that go through the model at a time; rounded up to whole batch
      shards.
    max_tokens: the context: a prompt and all tokens after it.
  """

  params: Any
  config: ModelConfig
  mesh: Mesh
  end_id: int
  rows_per_batch: int
  max_tokens: int

  def next_token_probs(self, prompts: Sequence[Sequence[int]], token_ids: tuple[int, ...], label: str) -> np.ndarray:
    """Probabilities of some tokens after each prompt.

    Args:
      prompts: token ids of n prompts.
      token_ids: W tokens.
      label: of the progress bar.

    Returns:
      Probabilities over the full vocabulary, f32[n, W].

    Raises:
      UserError: a prompt is empty or exceeds the context.
    """
    return self._next_token(next_token_probs, prompts, token_ids, label)

  def next_token_logits(self, prompts: Sequence[Sequence[int]], token_ids: tuple[int, ...], label: str) -> np.ndarray:
    """Logits of some tokens after each prompt, f32[n, W]; arguments and errors as for `next_token_probs`."""
    return self._next_token(next_token_logits, prompts, token_ids, label)

  def log_likelihood(
    self, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], label: str
  ) -> np.ndarray:
    """Log-likelihoods of continuations.

    Args:
      prompts: token ids of n prompts.
      continuations: token ids that follow, one sequence per prompt.
      label: of the progress bar.

    Returns:
      log p(continuation | prompt) in nats, summed over the tokens of the continuation, f64[n].

    Raises:
      UserError: a prompt is empty, or exceeds the context together with its continuation.
    """
    self._check(prompts, [len(c) for c in continuations])
    sequences = [[*prompt, *continuation] for prompt, continuation in zip(prompts, continuations, strict=True)]
    out = np.zeros(len(prompts), np.float64)
    with progress(label, len(prompts)) as advance, jax.set_mesh(self.mesh):
      for index, tokens, length in self._batches(sequences):
        start = length.copy()  # empty rows have nothing to read
        start[: len(index)] = [len(prompts[i]) for i in index]
        num_blocks = np.int32(math.ceil(max(length - start) / _WIDTH_MULTIPLE))
        logp = self.run(log_probs_from, self.params, tokens, length, start, num_blocks)
        out[index] = np.sum(np.asarray(logp)[: len(index)], axis=1, dtype=np.float64)
        advance(len(index))
    return out

  def generate(
    self,
    prompts: Sequence[Sequence[int]],
    keys: jax.Array,
    settings: SampleConfig,
    tracked: tuple[int, ...],
    label: str,
  ) -> list[list[Rollout]]:
    """Samples R rollouts of each prompt, one per key.

    Args:
      prompts: n prompts.
      keys: key[n, R].
      settings: temperature, top-k, top-p and the most new tokens.
      tracked: token ids whose probabilities are recorded.
      label: of the progress bar.

    Returns:
      R rollouts per prompt, which end with `end_id` or at the most new tokens.
    """
    self._check(prompts, [settings.max_new_tokens] * len(prompts))
    num_rollouts = keys.shape[1]
    if not prompts or not num_rollouts:
      return [[] for _ in prompts]
    max_len = bucket(max(map(len, prompts)) + settings.max_new_tokens, self.max_tokens)
    rollouts: dict[Any, list[Rollout]] = {}
    with progress(label, len(prompts)) as advance, jax.set_mesh(self.mesh):
      session = self.session(settings, tracked, num_rollouts, max_len, jax.random.key_impl(keys))
      raw_keys = np.asarray(jax.random.key_data(keys))
      # Shortest first: a batch of prompts of similar length has little padding.
      for i in _by_length(prompts):
        session.add(i, prompts[i], raw_keys[i])
      while session.is_busy:
        finished = session.advance()
        rollouts.update(finished)
        advance(len(finished))
    return [rollouts[i] for i in range(len(prompts))]

  def session(
    self, settings: SampleConfig, tracked: tuple[int, ...], num_rollouts: int, max_len: int, key_impl: Any
  ) -> Session:
    """An empty decoding batch for prompts that may arrive at any time. Call and use it under `jax.set_mesh(mesh)`.

    Args:
      settings: of all rollouts.
      tracked: token ids whose probabilities are recorded.
      num_rollouts: the most per prompt.
      max_len: room of a slot in tokens: a prompt and all tokens after it, at most `max_tokens` in a whole bucket.
      key_impl: of the keys, as `jax.random.key_impl` returns it.
    """
    return Session(self, settings, tracked, num_rollouts, max_len, key_impl)

  def _next_token(
    self, function: Callable[..., jax.Array], prompts: Sequence[Sequence[int]], token_ids: tuple[int, ...], label: str
  ) -> np.ndarray:
    self._check(prompts, [0] * len(prompts))
    out = np.zeros((len(prompts), len(token_ids)), np.float32)
    with progress(label, len(prompts)) as advance, jax.set_mesh(self.mesh):
      for index, tokens, length in self._batches(prompts):
        values = self.run(function, self.params, tokens, length, token_ids=token_ids)
        out[index] = np.asarray(values)[: len(index)]
        advance(len(index))
    return out

  @property
  def num_shards(self) -> int:
    """Batch shards of the mesh."""
    return sharding.num_shards(self._batch_sharding())

  @property
  def num_slots(self) -> int:
    """Rows of a batch: `rows_per_batch` in whole batch shards."""
    return _round_up(self.rows_per_batch, self.num_shards)

  @property
  def num_refilled(self) -> int:
    """Slots that are refilled at a time."""
    return refill_size(self.num_slots, self.num_shards)

  def _batch_sharding(self) -> NamedSharding:
    return sharding.batch_sharding(self.mesh, self.config.rules)

  def _check(self, prompts: Sequence[Sequence[int]], num_following: Sequence[int]) -> None:
    for i, (prompt, following) in enumerate(zip(prompts, num_following, strict=True)):
      if not prompt:
        raise UserError(f"prompt {i} is empty; it needs at least the token that begins a text")
      room = self.max_tokens - following
      if len(prompt) > room:
        raise UserError(
          f"prompt {i} has {len(prompt)} tokens and {following} new ones follow; the context is "
          f"{self.max_tokens}, which leaves {room} for the prompt. Raise max_tokens, or leave that problem out"
        )

  def _batches(self, sequences: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Yields (indices, tokens[B, T], length[B]), shortest sequences first; rows beyond the indices are empty."""
    num_rows = self.num_slots
    order = _by_length(sequences)
    for start in range(0, len(order), num_rows):
      index = order[start : start + num_rows]
      yield index, *self.padded([sequences[i] for i in index], num_rows)

  def padded(self, sequences: Sequence[Sequence[int]], num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """tokens[num_rows, T], with T a bucket, and length[num_rows]; rows beyond the sequences are empty."""
    width = bucket(max(map(len, sequences)), self.max_tokens)
    tokens, length = np.zeros((num_rows, width), np.int32), np.zeros(num_rows, np.int32)
    for row, sequence in enumerate(sequences):
      tokens[row, : len(sequence)] = sequence
      length[row] = len(sequence)
    return tokens, length

  def run(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Calls a jitted function of this model; NumPy arrays among `args` go to the devices, sharded by rows."""
    rows = self._batch_sharding()
    args = tuple(sharding.host_to_global(a, rows) if isinstance(a, np.ndarray) else a for a in args)
    return function(*args, config=self.config, **options)


def _by_length(sequences: Sequence[Sequence[int]]) -> list[int]:
  return sorted(range(len(sequences)), key=lambda i: (len(sequences[i]), i))


def _round_up(n: int, multiple: int) -> int:
  return -(-n // multiple) * multiple
