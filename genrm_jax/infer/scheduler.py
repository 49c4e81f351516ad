"""Continuous batching: finished slots are refilled from the queue.

The scheduler knows which branch each slot decodes, and which branches have diverged from it and wait for a slot:

    slot 0 decodes   3mike:mm+ai<5     rollouts 1, 4
    pending          3mike:-           rollout 3
                     3mike:mm-         rollout 2

A finished slot resumes the branch that diverged from it last, whose keys and values it still holds. Free slots fork the
branches that diverged first.
"""

import dataclasses
from collections.abc import Hashable

import numpy as np

from genrm_jax.infer.slots import Sampled


@dataclasses.dataclass(frozen=True)
class Branch:
  """Tokens sampled after a prompt, the tracked probabilities f32[n, W] at each, and the rollouts that share them.

  `prompt` is a prompt's name, `rollouts` are indices of its keys.
  """

  prompt: Hashable
  rollouts: list[int]
  ids: list[int]
  tracked_probs: np.ndarray

  def extended(self, rollouts: list[int], ids: list[int], tracked_probs: np.ndarray) -> "Branch":
    """The branch of some of its rollouts with further tokens."""
    return Branch(self.prompt, rollouts, [*self.ids, *ids], np.concatenate([self.tracked_probs, tracked_probs]))


class Scheduler:
  """Assigns branches to slots.

  Attributes:
    active: the branch of each slot in use.
    pending: per slot, the branches that diverged from it, the latest last.
    keys: raw keys of the rollouts in each slot, [B, R, ...].
    rollout_keys: raw keys of each prompt's rollouts, at most R; the caller adds and removes them.
  """

  def __init__(self, num_slots: int, num_shards: int, no_keys: np.ndarray):
    """`no_keys`: zeros in the shape of one prompt's raw keys, [R, ...]."""
    self.active: dict[int, Branch] = {}
    self.pending: list[list[Branch]] = [[] for _ in range(num_slots)]
    self._slots_per_shard = num_slots // num_shards
    self.rollout_keys: dict[Hashable, np.ndarray] = {}
    self.keys = np.repeat(no_keys[None], num_slots, axis=0)
    self._diverged_BR = np.zeros(self.keys.shape[:2], bool)

  def free_slots(self) -> list[int]:
    """Slots without an active or a pending branch."""
    return [slot for slot, pending in enumerate(self.pending) if slot not in self.active and not pending]

  def assign(self, slot: int, branch: Branch) -> None:
    self.active[slot] = branch
    self._diverged_BR[slot] = False
    # Places without a rollout repeat the first, from which the slot never diverges.
    keys = self.rollout_keys[branch.prompt][branch.rollouts]
    self.keys[slot] = keys[0]
    self.keys[slot, : len(branch.rollouts)] = keys

  def collect(self, sampled: Sampled, max_new_tokens: int, end_id: int) -> list[Branch]:
    """Updates the branches after a decoding call (`sampled` on the host); returns those that are finished."""
    finished: list[Branch] = []
    ids_BT, probs_BTW = np.asarray(sampled.ids), np.asarray(sampled.tracked_probs)
    places_BR, tokens_BR = np.asarray(sampled.diverged_at), np.asarray(sampled.diverged_token)
    new_BR = (places_BR >= 0) & ~self._diverged_BR
    self._diverged_BR |= new_BR
    for slot, branch in list(self.active.items()):
      start = len(branch.ids)
      diverged: dict[tuple[int, int], list[int]] = {}
      for r in np.flatnonzero(new_BR[slot]).tolist():
        diverged.setdefault((int(places_BR[slot, r]), int(tokens_BR[slot, r])), []).append(branch.rollouts[r])
      for (place, token), rollouts in sorted(diverged.items()):
        ids = [*ids_BT[slot, start:place].tolist(), token]
        other = branch.extended(rollouts, ids, probs_BTW[slot, start : place + 1])
        is_finished = token == end_id or len(other.ids) == max_new_tokens
        (finished if is_finished else self.pending[slot]).append(other)
      if not sampled.live[slot]:
        followers = [rollout for r, rollout in enumerate(branch.rollouts) if not self._diverged_BR[slot, r]]
        end = int(sampled.length[slot])
        finished.append(branch.extended(followers, ids_BT[slot, start:end].tolist(), probs_BTW[slot, start:end]))
        del self.active[slot]
    return finished

  def resume_pending(self, free: list[int]) -> dict[int, int]:
    """Assigns pending branches to the slots that they diverged from, if finished, and to the free slots given.

    Returns:
      For each slot that resumes a branch the slot, of the same batch shard, that the branch diverged from.
    """
    sources = {}
    for slot, pending in enumerate(self.pending):
      if pending and slot not in self.active:
        sources[slot] = slot
        self.assign(slot, pending.pop())
    for slot in free:
      first = slot // self._slots_per_shard * self._slots_per_shard
      fullest = max(range(first, first + self._slots_per_shard), key=lambda other: len(self.pending[other]))
      if self.pending[fullest]:
        sources[slot] = fullest
        self.assign(slot, self.pending[fullest].pop(0))
    return sources
