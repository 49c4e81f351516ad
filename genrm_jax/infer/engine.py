"""Batched inference engine: next-token probabilities, log-likelihoods and sampling.

Token ids in, numbers or token ids out, for any number of prompts of any length. Prompts are sorted by length and padded
to one of a few widths, each compiled once; results are returned in the order of the input.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from genrm_jax.infer import slots
from genrm_jax.infer.sampling import SampleConfig, probs_of
from genrm_jax.infer.scheduler import Branch, Scheduler
from genrm_jax.infer.slots import last_hidden, positions_and_segments
from genrm_jax.model import gemma
from genrm_jax.model.config import ModelConfig
from genrm_jax.runtime import sharding
from genrm_jax.runtime.errors import UserError
from genrm_jax.runtime.progress import progress

_NEVER = np.int32(2**31 - 1)
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
class Rollout:
  """One sample: its token ids, and the probabilities of the tracked tokens at each of them, f32[len(ids), W].

  The probabilities are over the full vocabulary, at temperature 1.
  """

  ids: list[int]
  tracked_probs: np.ndarray


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
        logp = self._run(log_probs_from, self.params, tokens, length, start, num_blocks)
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
    rollouts: dict[tuple[int, int], Rollout] = {}
    num_missing = [num_rollouts] * len(prompts)
    with progress(label, len(prompts)) as advance, jax.set_mesh(self.mesh):
      for branch in self._finished_branches(prompts, keys, settings, tracked):
        for r in branch.rollouts:
          rollouts[branch.prompt, r] = Rollout(branch.ids, branch.tracked_probs)
        num_missing[branch.prompt] -= len(branch.rollouts)
        advance(int(num_missing[branch.prompt] == 0))
    return [[rollouts[i, r] for r in range(num_rollouts)] for i in range(len(prompts))]

  def _next_token(
    self, function: Callable[..., jax.Array], prompts: Sequence[Sequence[int]], token_ids: tuple[int, ...], label: str
  ) -> np.ndarray:
    self._check(prompts, [0] * len(prompts))
    out = np.zeros((len(prompts), len(token_ids)), np.float32)
    with progress(label, len(prompts)) as advance, jax.set_mesh(self.mesh):
      for index, tokens, length in self._batches(prompts):
        values = self._run(function, self.params, tokens, length, token_ids=token_ids)
        out[index] = np.asarray(values)[: len(index)]
        advance(len(index))
    return out

  def _finished_branches(
    self, prompts: Sequence[Sequence[int]], keys: jax.Array, settings: SampleConfig, tracked: tuple[int, ...]
  ) -> Iterator[Branch]:
    """Yields branches as they finish; each rollout is in one of them."""
    num_rollouts = keys.shape[1]
    if not prompts or not num_rollouts:
      return
    num_slots = _round_up(self.rows_per_batch, self._num_shards())
    num_refilled = refill_size(num_slots, self._num_shards())
    # Shortest first: a batch of prompts of similar length has little padding.
    queue = collections.deque(_by_length(prompts))
    state = self._run(
      slots.init,
      num_slots=num_slots,
      num_rollouts=num_rollouts,
      max_len=bucket(max(map(len, prompts)) + settings.max_new_tokens, self.max_tokens),
      max_new_tokens=settings.max_new_tokens,
      num_tracked=len(tracked),
    )
    scheduler = Scheduler(num_slots, self._num_shards(), keys)
    while True:
      free = scheduler.free_slots()
      if queue and len(free) >= num_refilled:
        index = [queue.popleft() for _ in range(min(num_refilled, len(queue)))]
        source_B = np.full(num_slots, -1, np.int32)
        source_B[free[: len(index)]] = np.arange(len(index))
        for slot, i in zip(free, index, strict=False):
          scheduler.assign(slot, Branch(i, list(range(num_rollouts)), [], np.zeros((0, len(tracked)), np.float32)))
        tokens, length = self._padded([prompts[i] for i in index], num_refilled)
        prefilled = self._run(slots.prefill, self.params, tokens, length)
        state = self._run(slots.insert, state, prefilled, source_B)
        continue
      sources = scheduler.resume_pending(free if len(free) >= num_refilled else [])
      state = self._resumed(state, sources, scheduler, prompts)
      if not scheduler.active:
        return

      num_active = len(scheduler.active)
      num_free = num_slots - num_active
      state, sampled = self._run(
        slots.decode,
        self.params,
        state,
        scheduler.keys,
        np.int32(num_free + min(num_refilled, num_active)),
        # With enough free slots the queue is empty, and rollouts that diverge can move into them.
        _NEVER if num_free < num_refilled else np.int32(min(num_refilled, num_active)),
        key_impl=jax.random.key_impl(keys),
        settings=settings,
        end_id=self.end_id,
        tracked=tracked,
      )
      yield from scheduler.collect(jax.device_get(sampled), settings.max_new_tokens, self.end_id)

  def _resumed(
    self, state: slots.Slots, sources: dict[int, int], scheduler: Scheduler, prompts: Sequence[Sequence[int]]
  ) -> slots.Slots:
    """The slots after those in `sources` have taken up their branches, with copies of keys and values if needed."""
    if not sources:
      return state
    num_slots = len(scheduler.pending)
    source_B = np.arange(num_slots, dtype=np.int32)
    kept_B, place_B, token_B = np.full((3, num_slots), -1, np.int32)
    for slot, source in sources.items():
      branch = scheduler.active[slot]
      place = len(branch.ids) - 1
      source_B[slot], kept_B[slot], place_B[slot] = source, len(prompts[branch.prompt]) + place, place
      token_B[slot] = branch.ids[-1]
    if any(slot != source for slot, source in sources.items()):
      state = self._run(slots.fork, state, source_B, num_shards=self._num_shards())
    return self._run(slots.resume, state, kept_B, place_B, token_B)

  def _num_shards(self) -> int:
    return sharding.num_shards(self._batch_sharding())

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
    num_rows = _round_up(self.rows_per_batch, self._num_shards())
    order = _by_length(sequences)
    for start in range(0, len(order), num_rows):
      index = order[start : start + num_rows]
      yield index, *self._padded([sequences[i] for i in index], num_rows)

  def _padded(self, sequences: Sequence[Sequence[int]], num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """tokens[num_rows, T], with T a bucket, and length[num_rows]; rows beyond the sequences are empty."""
    width = bucket(max(map(len, sequences)), self.max_tokens)
    tokens, length = np.zeros((num_rows, width), np.int32), np.zeros(num_rows, np.int32)
    for row, sequence in enumerate(sequences):
      tokens[row, : len(sequence)] = sequence
      length[row] = len(sequence)
    return tokens, length

  def _run(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Calls a jitted function of this model; NumPy arrays among `args` go to the devices, sharded by rows."""
    rows = self._batch_sharding()
    args = tuple(sharding.host_to_global(a, rows) if isinstance(a, np.ndarray) else a for a in args)
    return function(*args, config=self.config, **options)


def _by_length(sequences: Sequence[Sequence[int]]) -> list[int]:
  return sorted(range(len(sequences)), key=lambda i: (len(sequences[i]), i))


def _round_up(n: int, multiple: int) -> int:
  return -(-n // multiple) * multiple
