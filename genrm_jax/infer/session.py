"""Sampling whose prompts may come at any time: `Engine.generate` adds all of them at once, a server as they arrive.

    session = engine.session(settings, tracked, num_rollouts, max_len, key_impl)
    session.add("a", prompt, raw_keys)
    while session.is_busy:
      for name, rollouts in session.advance(max_steps=16):
        ...
      session.add(...)              # enters as soon as slots are free

A rollout depends on its prompt, its key and the settings, not on what else is decoded or when it was added.
"""

import collections
import dataclasses
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from genrm_jax.infer import slots
from genrm_jax.infer.sampling import SampleConfig
from genrm_jax.infer.scheduler import Branch, Scheduler

if TYPE_CHECKING:
  from genrm_jax.infer.engine import Engine

_NEVER = np.int32(2**31 - 1)


@dataclasses.dataclass(frozen=True)
class Rollout:
  """One sample: its token ids, and the probabilities of the tracked tokens at each of them, f32[len(ids), W].

  The probabilities are over the full vocabulary, at temperature 1.
  """

  ids: list[int]
  tracked_probs: np.ndarray


class Session:
  """A decoding batch and the prompts that wait for it. Use it under `jax.set_mesh(engine.mesh)`."""

  def __init__(
    self,
    engine: "Engine",
    settings: SampleConfig,
    tracked: tuple[int, ...],
    num_rollouts: int,
    max_len: int,
    key_impl: Any,
  ):
    """Arguments as for `Engine.session`."""
    self._engine, self._settings, self._tracked, self._key_impl = engine, settings, tracked, key_impl
    self._num_rollouts, self._max_len = num_rollouts, max_len
    self._prompts: dict[Hashable, Sequence[int]] = {}
    self._rollouts: dict[Hashable, list[Rollout | None]] = {}
    self._queue: collections.deque[Hashable] = collections.deque()
    self._state: slots.Slots = engine.run(
      slots.init,
      num_slots=engine.num_slots,
      num_rollouts=num_rollouts,
      max_len=max_len,
      max_new_tokens=settings.max_new_tokens,
      num_tracked=len(tracked),
    )
    one_key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=key_impl)))
    self._scheduler = Scheduler(engine.num_slots, engine.num_shards, np.zeros((num_rollouts, *one_key.shape), "u4"))

  @property
  def is_busy(self) -> bool:
    """Whether any prompt waits or is being decoded."""
    return bool(self._prompts)

  @property
  def num_waiting(self) -> int:
    """Prompts that have no slot yet."""
    return len(self._queue)

  def add(self, name: Hashable, prompt: Sequence[int], raw_keys: np.ndarray) -> None:
    """Queues a prompt.

    Args:
      name: identifies the prompt among those that are not finished.
      prompt: at least one token, and at most `max_len - settings.max_new_tokens`.
      raw_keys: u32[R, ...], the data of the key of each rollout; R is 1 to `num_rollouts`.
    """
    assert name not in self._prompts and 0 < len(raw_keys) <= self._num_rollouts, (name, len(raw_keys))
    assert 0 < len(prompt) <= self._max_len - self._settings.max_new_tokens, (name, len(prompt))
    self._prompts[name], self._rollouts[name] = prompt, [None] * len(raw_keys)
    self._scheduler.rollout_keys[name] = raw_keys
    self._queue.append(name)

  def advance(self, max_steps: int | None = None) -> list[tuple[Any, list[Rollout]]]:
    """Refills free slots and decodes until enough slots are free again.

    Args:
      max_steps: tokens to decode at most while enough slots are free, so that new prompts need not wait for them.

    Returns:
      The prompts that are finished, by name, with one rollout per key.
    """
    scheduler, num_slots = self._scheduler, self._engine.num_slots
    num_refilled = self._engine.num_refilled
    while self._queue and len(free := scheduler.free_slots()) >= num_refilled:
      self._insert(free[:num_refilled])
    free = scheduler.free_slots()
    self._resume(scheduler.resume_pending(free if len(free) >= num_refilled else []))
    if not scheduler.active:
      return []
    num_active = len(scheduler.active)
    num_free = num_slots - num_active
    self._state, sampled = self._engine.run(
      slots.decode,
      self._engine.params,
      self._state,
      scheduler.keys,
      np.int32(num_free + min(num_refilled, num_active)),
      # With enough free slots the queue is empty, and rollouts that diverge can move into them.
      _NEVER if num_free < num_refilled else np.int32(min(num_refilled, num_active)),
      _NEVER if max_steps is None or num_free < num_refilled else np.int32(max_steps),
      key_impl=self._key_impl,
      settings=self._settings,
      end_id=self._engine.end_id,
      tracked=self._tracked,
    )
    return self._collect(scheduler.collect(jax.device_get(sampled), self._settings.max_new_tokens, self._engine.end_id))

  def _insert(self, free: list[int]) -> None:
    names = [self._queue.popleft() for _ in range(min(len(free), len(self._queue)))]
    source_B = np.full(self._engine.num_slots, -1, np.int32)
    source_B[free[: len(names)]] = np.arange(len(names))
    for slot, name in zip(free, names, strict=False):
      rollouts = list(range(len(self._rollouts[name])))
      self._scheduler.assign(slot, Branch(name, rollouts, [], np.zeros((0, len(self._tracked)), np.float32)))
    tokens, length = self._engine.padded([self._prompts[name] for name in names], self._engine.num_refilled)
    prefilled = self._engine.run(slots.prefill, self._engine.params, tokens, length)
    self._state = self._engine.run(slots.insert, self._state, prefilled, source_B)

  def _resume(self, sources: dict[int, int]) -> None:
    """Lets the slots in `sources` take up their branches, with copies of keys and values if needed."""
    if not sources:
      return
    num_slots = self._engine.num_slots
    source_B = np.arange(num_slots, dtype=np.int32)
    kept_B, place_B, token_B = np.full((3, num_slots), -1, np.int32)
    for slot, source in sources.items():
      branch = self._scheduler.active[slot]
      place = len(branch.ids) - 1
      source_B[slot], kept_B[slot], place_B[slot] = source, len(self._prompts[branch.prompt]) + place, place
      token_B[slot] = branch.ids[-1]
    if any(slot != source for slot, source in sources.items()):
      self._state = self._engine.run(slots.fork, self._state, source_B, num_shards=self._engine.num_shards)
    self._state = self._engine.run(slots.resume, self._state, kept_B, place_B, token_B)

  def _collect(self, branches: Sequence[Branch]) -> list[tuple[Any, list[Rollout]]]:
    for branch in branches:
      for r in branch.rollouts:
        self._rollouts[branch.prompt][r] = Rollout(branch.ids, branch.tracked_probs)
    finished = []
    for name in dict.fromkeys(branch.prompt for branch in branches):
      rollouts = [rollout for rollout in self._rollouts[name] if rollout is not None]
      if len(rollouts) == len(self._rollouts[name]):
        finished.append((name, rollouts))
        del self._prompts[name], self._rollouts[name], self._scheduler.rollout_keys[name]
    return finished
