"""The model on devices as the rest sees it: texts go in, in batches, and what is read or written comes out.

`Engine` is what the rest calls: token ids in, token ids out, for any number of prompts of any lengths. It sorts prompts
by length, pads them to a few widths (one compilation each), and gives results back in the order of the input.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from genrm_jax.infer import slots
from genrm_jax.infer.sampling import SampleConfig
from genrm_jax.infer.scheduler import Text, Texts
from genrm_jax.infer.slots import last_hidden, layout
from genrm_jax.model import gemma
from genrm_jax.model.config import ModelConfig
from genrm_jax.runtime import distributed, sharding
from genrm_jax.runtime.errors import UserError
from genrm_jax.runtime.progress import progress

_NEVER = np.int32(2**31 - 1)
_WIDTH_STEP = 32  # prompts and continuations are padded to a multiple of it
# Decoding is interrupted when one row in so many has ended: more often with a greater number, and with a smaller one
# more rows are idle.
_REFILLS = 8


@functools.partial(jax.jit, static_argnames=("config", "watch"))
def read_next(params, tokens_BT, length_B, *, config: ModelConfig, watch: tuple[int, ...]):
  """Logits and probabilities (full vocabulary) of the watched tokens after each row: two f32[B, W]."""
  x_BTD, _ = gemma.forward(params, config, tokens_BT, *layout(tokens_BT, length_B))
  logits_BV = gemma.unembed(params, config, last_hidden(x_BTD, length_B))
  ids = jnp.asarray(watch)
  return logits_BV[:, ids], jax.nn.softmax(logits_BV, axis=-1)[:, ids]


@functools.partial(jax.jit, static_argnames=("config", "num_places"))
def read_places(params, tokens_BT, length_B, start_B, *, config: ModelConfig, num_places: int):
  """log p of each row's tokens from place `start_B` on, f32[B, num_places], 0 beyond the row's end.

  Logits are computed where such a token is predicted, and for `_WIDTH_STEP` places at a time: with a vocabulary of 256k
  those of a long solution would not fit.
  """
  x_BTD, _ = gemma.forward(params, config, tokens_BT, *layout(tokens_BT, length_B))
  places_BM = start_B[:, None] + jnp.arange(num_places)
  last = tokens_BT.shape[1] - 1

  def some(first):
    at_BM = jax.lax.dynamic_slice_in_dim(places_BM, first, _WIDTH_STEP, axis=1)
    x_BMD = jnp.take_along_axis(x_BTD, jnp.clip(at_BM - 1, 0, last)[..., None], axis=1)
    logp_BMV = jax.nn.log_softmax(gemma.unembed(params, config, x_BMD), axis=-1)
    target_BM = jnp.take_along_axis(tokens_BT, jnp.minimum(at_BM, last), axis=1)
    logp_BM = jnp.take_along_axis(logp_BMV, target_BM[..., None], axis=-1)[..., 0]
    return jnp.where(at_BM < length_B[:, None], logp_BM, 0.0)

  logp_CBM = jax.lax.map(some, jnp.arange(0, num_places, _WIDTH_STEP))
  return jnp.moveaxis(logp_CBM, 0, 1).reshape(places_BM.shape)


@dataclasses.dataclass(frozen=True)
class Engine:
  """A model ready to read and to write: parameters on a mesh, and how many rows go through it at a time.

  `max_tokens` is the context: the longest prompt with all that is sampled after it. Where many processes each have an
  engine on devices of their own, `shares_out` gives each of them its part of the prompts, and all of them the results.
  """

  params: Any
  config: ModelConfig
  mesh: Mesh
  eos_id: int
  rows_per_batch: int
  max_tokens: int
  shares_out: bool = False

  def read(self, prompts: Sequence[Sequence[int]], watch: tuple[int, ...], label: str) -> tuple[np.ndarray, np.ndarray]:
    """Logits and probabilities of the watched tokens after each prompt, f32[n, W] each, in one pass."""
    self._check(prompts, [0] * len(prompts))

    def some(mine: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
      logits = np.zeros((len(mine), len(watch)), np.float32)
      probs = np.zeros_like(logits)
      with progress(label, len(mine)) as advance, jax.set_mesh(self.mesh):
        for index, tokens, length in self._batches([prompts[i] for i in mine], self.rows_per_batch):
          z, p = read_next(self.params, *self._put(tokens, length), config=self.config, watch=watch)
          logits[index], probs[index] = np.asarray(z)[: len(index)], np.asarray(p)[: len(index)]
          advance(len(index))
      return list(zip(logits, probs, strict=True))

    both = np.asarray(self._each(some, len(prompts)), np.float32).reshape(len(prompts), 2, len(watch))
    return both[:, 0], both[:, 1]

  def log_likelihood(
    self, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], label: str
  ) -> np.ndarray:
    """log p(continuation | prompt), summed over its tokens: f64[n], in one pass."""
    self._check(prompts, [len(c) for c in continuations])

    def some(mine: list[int]) -> list[float]:
      out = np.zeros(len(mine), np.float64)
      whole = [[*prompts[i], *continuations[i]] for i in mine]
      with progress(label, len(mine)) as advance, jax.set_mesh(self.mesh):
        for index, tokens, length in self._batches(whole, self.rows_per_batch):
          start = np.zeros_like(length)
          start[: len(index)] = [len(prompts[mine[i]]) for i in index]
          logp = read_places(
            self.params,
            *self._put(tokens, length, start),
            config=self.config,
            num_places=_round_up(int(max(length - start))),
          )
          out[index] = np.sum(np.asarray(logp)[: len(index)], axis=1, dtype=np.float64)
          advance(len(index))
      return out.tolist()

    return np.asarray(self._each(some, len(prompts)), np.float64)

  def write(
    self, prompts: Sequence[Sequence[int]], keys: jax.Array, settings: SampleConfig, watch: tuple[int, ...], label: str
  ) -> list[list[tuple[list[int], np.ndarray]]]:
    """Samples from every prompt as many rollouts as there are keys for it.

    Args:
      prompts: n prompts.
      keys: key[n, R].
      settings: temperature and its kin.
      watch: token ids whose probability is recorded.
      label: of the progress bar.

    Returns:
      For each prompt its R rollouts: sampled ids, and f32[len(ids), W].
    """
    self._check(prompts, [settings.max_new_tokens] * len(prompts))

    def some(mine: list[int]) -> list[list[Any]]:
      out: list[list[Any]] = [[None] * keys.shape[1] for _ in mine]
      mine_keys = keys[np.asarray(mine, np.int32)]
      with progress(label, len(mine)) as advance, jax.set_mesh(self.mesh):
        missing = [keys.shape[1]] * len(mine)
        for i, rollouts, ids, watched in self._rollouts([prompts[i] for i in mine], mine_keys, settings, watch):
          for r in rollouts:
            out[i][r] = ids, watched
          missing[i] -= len(rollouts)
          advance(int(missing[i] == 0))
      return out

    return self._each(some, len(prompts))

  def _each(self, work: Callable[[list[int]], list[Any]], number: int) -> list[Any]:
    """The results of all prompts, by their indices; of which this process does its part, or all."""
    return distributed.share_out(work, number) if self.shares_out else work(list(range(number)))

  def _rollouts(
    self, prompts: Sequence[Sequence[int]], keys: jax.Array, settings: SampleConfig, watch: tuple[int, ...]
  ) -> Iterator[tuple[int, list[int], list[int], np.ndarray]]:
    """Gives (prompt, rollouts, sampled ids, watched), each rollout once, in the order in which texts end."""
    if not prompts or not keys.shape[1]:
      return
    num_rows, num_rollouts = self._whole_shards(self.rows_per_batch), keys.shape[1]
    num_ended = self._whole_shards(-(-num_rows // _REFILLS))
    # The shortest is read first: what waits holds no memory on the devices, and batches hold little padding.
    waiting = collections.deque(sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i)))
    rows = slots.free_rows(
      num_rows=num_rows,
      num_rollouts=num_rollouts,
      max_len=_round_up(max(map(len, prompts))) + _round_up(settings.max_new_tokens),
      max_new_tokens=settings.max_new_tokens,
      num_watched=len(watch),
      config=self.config,
    )
    texts = Texts(num_rows, self._num_shards(), keys)
    while True:
      free = texts.free()
      if waiting and len(free) >= num_ended:
        taken = [waiting.popleft() for _ in range(min(num_ended, len(waiting)))]
        width = _round_up(len(prompts[taken[-1]]))
        tokens, length = _padded([prompts[i] for i in taken], num_ended, width)
        source_of_row = np.full(num_rows, -1, np.int32)
        for place, (row, i) in enumerate(zip(free, taken, strict=False)):
          source_of_row[row] = place
          texts.hold(row, Text(i, list(range(num_rollouts)), [], np.zeros((0, len(watch)))))
        read = slots.read(self.params, *self._put(tokens, length), config=self.config)
        rows = slots.start(rows, read, *self._put(source_of_row), config=self.config)
        continue
      rows = self._resume(rows, texts.take_up(free if len(free) >= num_ended else []), texts, prompts)
      if not texts.held:
        return

      num_held = len(texts.held)
      num_free = num_rows - num_held
      keys_RF = jax.random.wrap_key_data(*self._put(texts.key_of_row), impl=jax.random.key_impl(keys))
      rows, sampled = slots.decode(
        self.params,
        rows,
        keys_RF,
        np.int32(num_free + min(num_ended, num_held)),
        # Prompts that wait need rows. Where none do, what leaves a row may have one while that row still writes.
        _NEVER if num_free < num_ended else np.int32(min(num_ended, num_held)),
        config=self.config,
        settings=settings,
        eos_id=self.eos_id,
        watch=watch,
      )
      for text in texts.collect(jax.device_get(sampled), settings.max_new_tokens, self.eos_id):
        yield text.prompt, text.rollouts, text.ids, text.watched

  def _resume(
    self, rows: slots.Rows, source: dict[int, int], texts: Texts, prompts: Sequence[Sequence[int]]
  ) -> slots.Rows:
    """The rows that take a text up begin to write it, after the keys and values that they need are copied."""
    if not source:
      return rows
    num_rows = len(texts.left)
    source_R, kept_R, place_R, token_R = np.arange(num_rows, dtype=np.int32), *np.full((3, num_rows), -1, np.int32)
    for row, other in source.items():
      text = texts.held[row]
      place = len(text.ids) - 1
      source_R[row], kept_R[row], place_R[row] = other, len(prompts[text.prompt]) + place, place
      token_R[row] = text.ids[-1]
    if any(row != other for row, other in source.items()):
      rows = slots.copy(rows, *self._put(source_R), num_shards=self._num_shards(), config=self.config)
    return slots.resume(rows, *self._put(kept_R, place_R, token_R))

  def _num_shards(self) -> int:
    return sharding.num_shards(sharding.batch_sharding(self.mesh, self.config.rules))

  def _whole_shards(self, num_rows: int) -> int:
    """The least number of rows, not below this one, that all batch shards share evenly."""
    return -(-num_rows // self._num_shards()) * self._num_shards()

  def _check(self, prompts: Sequence[Sequence[int]], num_following: Sequence[int]) -> None:
    for i, (prompt, following) in enumerate(zip(prompts, num_following, strict=True)):
      room = self.max_tokens - following
      if len(prompt) > room:
        raise UserError(
          f"prompt {i} has {len(prompt)} tokens and {following} new ones follow; the context is "
          f"{self.max_tokens}, which leaves {room} for the prompt. Raise max_tokens, or leave that problem out"
        )

  def _batches(self, prompts: Sequence[Sequence[int]], size: int):
    """Batches of (indices, tokens[size, T], length[size]), shortest prompts first; further rows are empty."""
    size = self._whole_shards(size)
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    for start in range(0, len(order), size):
      index = order[start : start + size]
      mine = [prompts[i] for i in index]
      yield index, *_padded(mine, size, _round_up(max(map(len, mine))))

  def _put(self, *arrays: np.ndarray):
    return sharding.host_to_global(arrays, sharding.batch_sharding(self.mesh, self.config.rules))


def _padded(prompts: Sequence[Sequence[int]], num_rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
  """tokens[num_rows, width] and length[num_rows]; rows beyond the prompts are empty."""
  tokens, length = np.zeros((num_rows, width), np.int32), np.zeros(num_rows, np.int32)
  for row, prompt in enumerate(prompts):
    tokens[row, : len(prompt)] = prompt
    length[row] = len(prompt)
  return tokens, length


def _round_up(n: int) -> int:
  return -(-n // _WIDTH_STEP) * _WIDTH_STEP
