"""Packs token ids into rows, and defines the order in which training reads them.

An `Example` is one sequence; `pack` puts several into each row. Which rows a step reads (`order`) is a pure function of
(seed, step), so a resumed run needs no iterator state.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from genrm_jax.pytrees import KIND_PAD, KIND_VERIFY, PairBatch, TokenBatch
from genrm_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Example:
  """What must share a row: one sequence, or two that are compared (see `pair`). All arrays have the same length T.

  Attributes:
    name: says in error messages where the example came from.
    tokens: i32[T].
    targets: i32[T], the token or label that each token predicts.
    weights: f32[T], 0 where there is no target.
    kind: i32[T], which loss a target counts in: one of the KIND constants of pytrees.py.
    positions: i32[T], for RoPE.
    segments: i32[T], from 1; only tokens of one segment attend to each other.
  """

  name: str
  tokens: np.ndarray
  targets: np.ndarray
  weights: np.ndarray
  kind: np.ndarray
  positions: np.ndarray
  segments: np.ndarray


_ARRAYS = tuple(f.name for f in dataclasses.fields(Example) if f.name != "name")


def sft_example(name: str, prompt: Sequence[int], target: Sequence[int], kind: int) -> Example:
  """Next-token prediction of `target` after `prompt`; the prompt itself is no target.

  prompt p0 p1, target t0 t1      tokens  p0 p1 t0      targets  p1 t0 t1      weights  0 1 1
  """
  ids = np.asarray([*prompt, *target], np.int32)
  weights = (np.arange(len(ids) - 1) >= len(prompt) - 1).astype(np.float32)
  return _example(name, ids[:-1], ids[1:], weights, kind)


def label_example(name: str, prompt: Sequence[int], label: bool, num_labels: int = 1) -> Example:
  """The ORM's example: a 0/1 label at each of the last `num_labels` tokens of the prompt."""
  tokens = np.asarray(prompt, np.int32)
  labelled = np.arange(len(tokens)) >= len(tokens) - num_labels
  return _example(name, tokens, np.where(labelled, np.int32(label), 0), labelled.astype(np.float32), KIND_VERIFY)


def _example(name, tokens, targets, weights, kind) -> Example:
  kinds = np.where(weights > 0, kind, KIND_PAD).astype(np.int32)
  positions, segments = np.arange(len(tokens), dtype=np.int32), np.ones(len(tokens), np.int32)
  return Example(name, tokens, targets.astype(np.int32), weights, kinds, positions, segments)


def pair(name: str, chosen: Example, rejected: Example) -> Example:
  """Two sequences of which DPO prefers the first. They share a row, as segments that do not attend to each other."""
  halves = [chosen, dataclasses.replace(rejected, segments=rejected.segments + 1)]
  return Example(name, *(np.concatenate([getattr(h, field) for h in halves]) for field in _ARRAYS))


def with_gaps(example: Example, max_gaps: Mapping[int, int], rng: np.random.Generator) -> Example:
  """Random gaps in the positions: after token id i, up to `max_gaps[i]` positions are skipped.

  Rotary embeddings see only differences of positions; gaps at separators keep a small model from relying on the
  distances in short training lists. About half of the examples get none, as in scoring; in the others the limits are
  scaled by a random share, so that every spread from dense to wide occurs.
  """
  share = max(0.0, 2 * rng.random() - 1)
  limits = np.rint(share * np.asarray([max_gaps.get(int(t), 0) for t in example.tokens]))
  gaps = rng.integers(0, limits.astype(np.int64) + 1)
  shift = np.concatenate([[0], np.cumsum(gaps)[:-1]])
  shift -= shift[np.searchsorted(example.segments, example.segments)]  # the first token of a segment keeps its position
  return dataclasses.replace(example, positions=(example.positions + shift).astype(np.int32))


@dataclasses.dataclass(frozen=True)
class Rows:
  """Packed rows on the host: the fields of a TokenBatch (or of a kind of it) with a leading row axis."""

  data: TokenBatch
  num_examples: int

  @property
  def num_rows(self) -> int:
    return self.data.tokens.shape[0]

  @property
  def max_targets(self) -> int:
    """The largest number of targets in a row, which is the number of positions per row at which logits are computed."""
    return int(np.max(np.sum(np.asarray(self.data.weights) > 0, axis=1)))

  @property
  def max_pairs(self) -> int:
    """The largest number of pairs in a row, where the examples are pairs: two segments each."""
    return int(np.max(self.data.segments)) // 2

  @property
  def digest(self) -> str:
    """SHA-256 of the contents, by which checkpoints identify their data.

    The log-probabilities of a reference model are left out: they follow from pairs and model, but their last bits
    depend on the devices.
    """
    h = hashlib.sha256()
    for field in dataclasses.fields(TokenBatch):
      h.update(np.ascontiguousarray(getattr(self.data, field.name)).tobytes())
    return h.hexdigest()

  def order(self, seed: int, step: int, batch_size: int) -> np.ndarray:
    """The rows that a step reads; see `order`."""
    return order(self.num_rows, seed, step, batch_size)

  def take(self, index: np.ndarray) -> TokenBatch:
    """The rows of `index`; -1 gives an empty row."""
    is_row = (index >= 0)[:, None]
    return jax.tree.map(lambda a: np.where(is_row, a[index], 0).astype(a.dtype), self.data)

  def with_reference(self, log_probs: np.ndarray) -> "Rows":
    """The same pairs with log p(target) under the reference model, f32[rows, T]."""
    return dataclasses.replace(self, data=with_reference(self.data, log_probs))


def with_reference(batch: TokenBatch, log_probs: np.ndarray) -> PairBatch:
  """Pairs with log p(target) under the reference model, f32[B, T]."""
  return PairBatch(**{f.name: getattr(batch, f.name) for f in dataclasses.fields(TokenBatch)}, reference=log_probs)


def order(num_rows: int, seed: int, step: int, batch_size: int) -> np.ndarray:
  """Indices of the rows that a step reads, int[batch_size]. Every epoch is a new permutation of all rows."""
  places = step * batch_size + np.arange(batch_size)
  epochs, offsets = places // num_rows, places % num_rows
  return np.concatenate([_permutation(num_rows, seed, int(e))[offsets[epochs == e]] for e in np.unique(epochs)])


@functools.lru_cache(maxsize=2)  # a batch may span the end of an epoch
def _permutation(num_rows: int, seed: int, epoch: int) -> np.ndarray:
  return np.random.default_rng([seed, epoch]).permutation(num_rows)


def pack(examples: Sequence[Example], row_length: int) -> Rows:
  """Packs examples into rows of `row_length` tokens: longest first, each into the fullest row with room for it.

  Raises:
    UserError: no examples, or one that is longer than a row.
  """
  if not examples:
    raise UserError("there are no training examples to pack; look at the ledger of what was dropped")
  order = sorted(range(len(examples)), key=lambda i: (-len(examples[i].tokens), i))
  longest = examples[order[0]]
  if len(longest.tokens) > row_length:
    raise UserError(
      f"{longest.name} has {len(longest.tokens)} tokens, more than a row of {row_length}; raise row_length"
    )
  rows: list[list[int]] = []
  by_room: list[list[int]] = [[] for _ in range(row_length + 1)]  # by_room[r]: rows with room for r more tokens
  for i in order:
    n = len(examples[i].tokens)
    room = next((r for r in range(n, row_length + 1) if by_room[r]), None)
    if room is None:
      rows.append([])
      row, room = len(rows) - 1, row_length
    else:
      row = by_room[room].pop()
    rows[row].append(i)
    by_room[room - n].append(row)
  shape = (len(rows), row_length)
  data = TokenBatch(
    tokens=np.zeros(shape, np.int32),
    targets=np.zeros(shape, np.int32),
    weights=np.zeros(shape, np.float32),
    positions=np.zeros(shape, np.int32),
    segments=np.zeros(shape, np.int32),
    kind=np.zeros(shape, np.int32),
  )
  for r, members in enumerate(rows):
    start = num_segments = 0
    for i in members:
      at = slice(start, start + len(examples[i].tokens))
      for name in _ARRAYS:
        getattr(data, name)[r, at] = getattr(examples[i], name)
      data.segments[r, at] += num_segments
      start, num_segments = at.stop, int(data.segments[r, at][-1])
  return Rows(data, len(examples))
