"""Which text each row of the batch writes, and which have left it and wait for a row.

    row 0 writes       3mike:mm+ai<5     rollouts 1, 4
    what has left it   3mike:-           rollout 3
                       3mike:mm-         rollout 2

When a row has ended, it takes up what has left it last: before that place it still has all that was read and written.
Rows that are free take up what has left others first, after a copy.
"""

import dataclasses

import jax
import numpy as np

from genrm_jax.infer.slots import Rollouts


@dataclasses.dataclass(frozen=True)
class Text:
  """What has been sampled after a prompt, f32[n, W] of it, and the rollouts that begin with it."""

  prompt: int
  rollouts: list[int]
  ids: list[int]
  watched: np.ndarray

  def then(self, rollouts: list[int], ids: list[int], watched: np.ndarray) -> "Text":
    return Text(self.prompt, rollouts, [*self.ids, *ids], np.concatenate([self.watched, watched]))


class Texts:
  """The texts of a batch. `keys` are those of all rollouts, key[prompts, R]."""

  def __init__(self, num_rows: int, num_shards: int, keys: jax.Array):
    self.held: dict[int, Text] = {}  # by row
    self.left: list[list[Text]] = [[] for _ in range(num_rows)]  # of each row, those that have left it last at the end
    self._per_shard = num_rows // num_shards
    self._key_data = np.asarray(jax.random.key_data(keys))
    self.key_of_row = np.zeros((num_rows, *self._key_data.shape[1:]), self._key_data.dtype)
    self._has_left = np.zeros(self.key_of_row.shape[:2], bool)  # rollouts of the text that are known to have left it

  def free(self) -> list[int]:
    return [row for row, left in enumerate(self.left) if row not in self.held and not left]

  def hold(self, row: int, text: Text) -> None:
    """The row is to write this text."""
    self.held[row] = text
    self._has_left[row] = False
    # What is not taken by a rollout of its own goes with the first.
    self.key_of_row[row] = self._key_data[text.prompt, text.rollouts[0]]
    self.key_of_row[row, : len(text.rollouts)] = self._key_data[text.prompt, text.rollouts]

  def collect(self, sampled: Rollouts, max_new_tokens: int, eos_id: int) -> list[Text]:
    """Takes from the rows what has left them, and those which have ended; returns what is at its end."""
    whole: list[Text] = []
    ids_RT, watched_RTW = np.asarray(sampled.ids), np.asarray(sampled.watched)
    left_at_RF, left_with_RF = np.asarray(sampled.left_at), np.asarray(sampled.left_with)
    new_RF = (left_at_RF >= 0) & ~self._has_left
    self._has_left |= new_RF
    for row, text in list(self.held.items()):
      before = len(text.ids)
      parted: dict[tuple[int, int], list[int]] = {}
      for f in np.flatnonzero(new_RF[row]).tolist():
        parted.setdefault((int(left_at_RF[row, f]), int(left_with_RF[row, f])), []).append(text.rollouts[f])
      for (place, token), rollouts in sorted(parted.items()):
        ids = [*ids_RT[row, before:place].tolist(), token]
        own = text.then(rollouts, ids, watched_RTW[row, before : place + 1])
        has_ended = token == eos_id or len(own.ids) == max_new_tokens
        (whole if has_ended else self.left[row]).append(own)
      if not sampled.live[row]:
        stayed = [r for f, r in enumerate(text.rollouts) if not self._has_left[row, f]]
        end = int(sampled.length[row])
        whole.append(text.then(stayed, ids_RT[row, before:end].tolist(), watched_RTW[row, before:end]))
        del self.held[row]
    return whole

  def take_up(self, free: list[int]) -> dict[int, int]:
    """Rows that have ended, and these that are free, take up what has left a row: {row: the row that it has left}."""
    source = {}
    for row, left in enumerate(self.left):
      if left and row not in self.held:
        source[row] = row
        self.hold(row, left.pop())
    for row in free:
      shard = row // self._per_shard * self._per_shard
      most = max(range(shard, shard + self._per_shard), key=lambda other: len(self.left[other]))
      if self.left[most]:
        source[row] = most
        self.hold(row, self.left[most].pop(0))
    return source
