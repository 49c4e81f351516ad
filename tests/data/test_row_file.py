"""A row file gives the same rows as memory and reads only those it needs."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrm_jax.data import packing, row_file
from genrm_jax.pytrees import KIND_SOLVE, KIND_VERIFY, PairBatch, TokenBatch
from genrm_jax.runtime.errors import UserError


def _rows(num_rows, row_length=8):
  rng = np.random.default_rng(num_rows)
  ids = [rng.integers(1, 99, 6 + i % 3) for i in range(num_rows)]
  examples = [packing.sft_example(f"{i}", x[:2], x[2:], (KIND_SOLVE, KIND_VERIFY)[i % 2]) for i, x in enumerate(ids)]
  return packing.pack(examples, row_length)


def _file(path, rows):
  row_file.write(path, rows.num_rows, rows.take)
  return row_file.RowFile(path)


def _same(got, want):
  assert type(got) is type(want)
  for field in dataclasses.fields(want):
    a, b = getattr(got, field.name), getattr(want, field.name)
    assert a.dtype == b.dtype, field.name
    np.testing.assert_array_equal(a, b, field.name)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 4), st.data())
def test_a_file_gives_the_rows_of_memory(tmp_path_factory, num_rows, at_a_time, data):
  rows, path = _rows(num_rows), tmp_path_factory.mktemp("rows") / "new" / "train.npy"
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(row_file, "_ROWS_AT_A_TIME", at_a_time)
    file = _file(path, rows)
  records = np.load(path)  # NumPy reads the file too
  _same(TokenBatch(**{name: records[name] for name in records.dtype.names}), rows.data)
  assert file.num_rows == rows.num_rows == num_rows
  index = np.asarray(data.draw(st.lists(st.integers(-1, num_rows - 1), min_size=1, max_size=12)))
  _same(file.take(index), rows.take(index))
  np.testing.assert_array_equal(file.order(3, 2, 4), rows.order(3, 2, 4))
  log_probs = np.random.default_rng(0).normal(size=rows.data.tokens.shape).astype(np.float32)
  taken = file.with_reference(log_probs).take(index)
  assert isinstance(taken, PairBatch)
  _same(taken, rows.with_reference(log_probs).take(index))


def test_only_the_needed_rows_are_read(tmp_path, monkeypatch):
  file, ranges = _file(tmp_path / "train.npy", _rows(40)), []
  whole = (tmp_path / "train.npy").stat().st_size
  read = type(file._files).cat_ranges

  def recorded(self, paths, starts, ends, **kwargs):
    ranges.extend(zip(starts, ends, strict=True))
    return read(self, paths, starts, ends, **kwargs)

  monkeypatch.setattr(type(file._files), "cat_ranges", recorded)
  file.take(np.array([7, -1, 30]))
  (first, first_end), (second, second_end) = ranges
  row = first_end - first
  assert second_end - second == row == 8 * 6 * 4 and second - first == 23 * row
  assert whole - 40 * row == first - 7 * row, "the header precedes the rows"


def test_a_missing_or_truncated_file(tmp_path):
  path = tmp_path / "train.npy"
  with pytest.raises(UserError, match=r"train\.npy: no such file"):
    row_file.RowFile(path)
  file = _file(path, _rows(5))
  path.write_bytes(path.read_bytes()[:-4])
  file.take(np.array([3]))
  with pytest.raises(UserError, match=r"train\.npy: a row cannot be read \(the file was cut\)"):
    file.take(np.array([3, 4]))
  path.unlink()
  with pytest.raises(UserError, match=r"train\.npy: a row cannot be read \(.*No such file"):
    file.take(np.array([3]))
