"""Examples are aligned and packed whole; rows of a file equal those of memory; their order is fixed by (seed, step)."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused

from genrm_jax.data import packing, row_file
from genrm_jax.pytrees import KIND_PAD, KIND_SOLVE, PairBatch, TokenBatch

FIELDS = [f.name for f in dataclasses.fields(TokenBatch)]
OF_EXAMPLE = ("tokens", "targets", "weights", "kind", "positions")


def _example(i, length):
  """An example whose tokens, targets and positions tell which one it is."""
  own = 1000 * (i + 1) + np.arange(length, dtype=np.int32)
  weights = (np.arange(length) % 3 == i % 3).astype(np.float32)
  kind = np.where(weights > 0, 1 + i % 2, KIND_PAD).astype(np.int32)
  segments = np.ones(length, np.int32)
  return packing.Example(f"example {i}", own, own + 1, weights, kind, (7 * own).astype(np.int32), segments)


def _rows(num_rows, row_length=2):
  """Rows of one example each."""
  return packing.pack([_example(i, row_length) for i in range(num_rows)], row_length)


def _same(got, want):
  assert type(got) is type(want)
  for field in dataclasses.fields(want):
    a, b = getattr(got, field.name), getattr(want, field.name)
    assert a.dtype == b.dtype == (np.float32 if field.name in ("weights", "reference") else np.int32), field.name
    np.testing.assert_array_equal(a, b, field.name)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=40), st.integers(0, 9))
def test_pack_keeps_every_example_once_and_whole(lengths, spare):
  examples = [_example(i, n) for i, n in enumerate(lengths)]
  rows = packing.pack(examples, max(lengths) + spare)
  data, found = rows.data, []
  assert (rows.num_examples, data.tokens.shape) == (len(examples), (rows.num_rows, max(lengths) + spare))
  for r, segments in enumerate(data.segments):
    used = int((segments > 0).sum())
    assert (segments[used:] == 0).all() and used > 0, "padding stands at the end, and no row is only padding"
    steps = np.diff(np.concatenate([[0], segments[:used]]))
    assert set(steps.tolist()) <= {0, 1}, "segments count from 1, each in one piece"
    for segment in range(1, segments.max() + 1):
      at = segments == segment
      found.append(int(data.tokens[r, at][0]) // 1000 - 1)
      for name in OF_EXAMPLE:
        np.testing.assert_array_equal(getattr(data, name)[r, at], getattr(examples[found[-1]], name), name)
    for name in FIELDS:
      assert not getattr(data, name)[r, used:].any(), f"{name} of the padding"
  assert sorted(found) == list(range(len(examples)))
  assert rows.max_targets == max(int(row.sum()) for row in data.weights)
  refused((r"example \d+ has \d+ tokens", packing.pack, examples, max(lengths) - 1))


def test_rows_are_filled_and_pairs_share_a_row():
  rows = packing.pack([_example(i, n) for i, n in enumerate([6, 5, 4, 3, 2])], 10)
  assert rows.num_rows == 2 and (rows.data.segments > 0).all()
  refused(("no training examples", packing.pack, [], 8))
  lengths = [(4, 4), (1, 2), (3, 1), (2, 2)]
  pairs = [packing.pair(f"{i}", _example(2 * i, n), _example(2 * i + 1, m)) for i, (n, m) in enumerate(lengths)]
  rows = packing.pack(pairs, 8)
  assert rows.num_rows == 3 and rows.max_pairs == 2 and packing.pack(pairs[:1], 9).max_pairs == 1
  assert sorted(row.max() for row in rows.data.segments) == [2, 2, 4]
  for tokens, segments in zip(rows.data.tokens, rows.data.segments, strict=True):
    for p in range(segments.max() // 2):
      chosen, rejected = (int(tokens[segments == 2 * p + half][0]) // 1000 - 1 for half in (1, 2))
      assert rejected == chosen + 1 and chosen % 2 == 0


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 2**31))
def test_an_epoch_has_every_row_once_in_an_order_of_seed_and_step(num_rows, batch_size, seed):
  rows, num_epochs = _rows(num_rows), 3
  steps = -(-num_epochs * num_rows // batch_size)
  seen = [i for step in range(steps) for i in rows.order(seed, step, batch_size)]
  for epoch in range(num_epochs):
    assert sorted(seen[epoch * num_rows : (epoch + 1) * num_rows]) == list(range(num_rows))
  rows = _rows(50)
  orders = [rows.order(seed, step, 50).tolist() for seed, step in ((0, 0), (0, 1), (0, 2), (1, 0))]
  assert len({*map(tuple, orders), tuple(range(50))}) == 5, "orders differ by epoch and seed"
  assert [i for step in range(5) for i in _rows(50).order(0, step, 10)] == orders[0]


@settings(max_examples=60, deadline=None)
@given(
  st.lists(st.integers(0, 5), min_size=1, max_size=30),
  st.dictionaries(st.integers(0, 5), st.integers(0, 8)),
  st.integers(0, 2**31),
)
def test_gaps_follow_the_named_tokens_only(tokens, max_gaps, seed):
  e = packing.sft_example("e", tokens, [1, 2], KIND_SOLVE)
  got = packing.with_gaps(e, max_gaps, np.random.default_rng(seed))
  for name in ("tokens", "targets", "weights", "kind"):
    np.testing.assert_array_equal(getattr(got, name), getattr(e, name), name)
  assert got.name == e.name and got.positions.dtype == np.int32 and got.positions[0] == 0
  limits = np.array([max_gaps.get(t, 0) for t in e.tokens[:-1].tolist()])
  gaps = np.diff(got.positions) - 1
  assert ((gaps >= 0) & (gaps <= limits)).all()
  e, rng = packing.sft_example("e", [5] * 40, [5, 1], KIND_SOLVE), np.random.default_rng(0)
  drawn = [np.diff(packing.with_gaps(e, {5: 6}, rng).positions) - 1 for _ in range(20)]
  assert set(np.concatenate(drawn).tolist()) == set(range(7)), "every size up to the limit occurs"


def test_digest_depends_on_every_field_and_the_order():
  rows = _rows(3)
  assert _rows(3).digest == rows.digest
  digests = {rows.digest, packing.Rows(rows.take(np.array([1, 0, 2])), rows.num_examples).digest}
  for field in FIELDS:
    changed = getattr(rows.data, field).copy()
    changed[2, 1] += 1
    digests.add(dataclasses.replace(rows, data=rows.data.replace(**{field: changed})).digest)
  assert len(digests) == 2 + len(FIELDS)


def _file(path, rows):
  row_file.write(path, rows.num_rows, rows.take)
  return row_file.RowFile(path)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 4), st.data())
def test_rows_of_memory_and_of_a_file(tmp_path_factory, num_rows, at_a_time, data):
  rows, path = _rows(num_rows), tmp_path_factory.mktemp("rows") / "new" / "train.npy"
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(row_file, "_ROWS_AT_A_TIME", at_a_time)
    file = _file(path, rows)
  records = np.load(path)  # NumPy reads the file too
  _same(TokenBatch(**{name: records[name] for name in records.dtype.names}), rows.data)
  index = np.asarray(data.draw(st.lists(st.integers(-1, num_rows - 1), min_size=1, max_size=12)))
  want = {name: np.stack([field[i] * (i >= 0) for i in index]) for name, field in vars(rows.data).items()}
  for source in (rows, file):
    taken = source.take(index)
    for name in FIELDS:
      np.testing.assert_array_equal(getattr(taken, name), want[name], name)
    assert source.num_rows == num_rows
  _same(file.take(index), rows.take(index))
  np.testing.assert_array_equal(file.order(3, 2, 4), rows.order(3, 2, 4))
  log_probs = np.random.default_rng(0).normal(size=rows.data.tokens.shape).astype(np.float32)
  taken = file.with_reference(log_probs).take(index)
  assert isinstance(taken, PairBatch)
  _same(taken, rows.with_reference(log_probs).take(index))


def test_only_the_needed_rows_are_read_and_a_missing_or_truncated_file_is_named(tmp_path, monkeypatch):
  path, ranges = tmp_path / "train.npy", []
  refused((r"train\.npy: no such file", row_file.RowFile, path))
  file, row = _file(path, _rows(40)), 2 * len(FIELDS) * 4
  read, start = type(file._files).cat_ranges, path.stat().st_size - 40 * row  # the header precedes the rows

  def recorded(self, paths, starts, ends, **kwargs):
    ranges.extend(zip(starts, ends, strict=True))
    return read(self, paths, starts, ends, **kwargs)

  monkeypatch.setattr(type(file._files), "cat_ranges", recorded)
  file.take(np.array([7, -1, 30]))
  assert ranges == [(start + i * row, start + (i + 1) * row) for i in (7, 30)]
  path.write_bytes(path.read_bytes()[:-4])
  file.take(np.array([38]))
  refused((r"train\.npy: a row cannot be read \(the file was cut\)", file.take, np.array([38, 39])))
  path.unlink()
  refused((r"train\.npy: a row cannot be read \(.*No such file", file.take, np.array([38])))
