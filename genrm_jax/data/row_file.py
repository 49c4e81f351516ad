"""Packed rows in a file, from which each process reads only the rows that its devices hold.

The file is .npy, one record per row, with the fields of a TokenBatch or PairBatch; np.load reads it too.
"""

import dataclasses
import io
import os
from collections.abc import Callable
from typing import Any

import fsspec.core
import numpy as np

from genrm_jax.data import jsonl, packing
from genrm_jax.pytrees import PairBatch, TokenBatch
from genrm_jax.runtime import distributed, files
from genrm_jax.runtime.errors import UserError

_ROWS_AT_A_TIME = 1024  # held in memory while a file is written


def write(path: jsonl.PathLike, num_rows: int, take: Callable[[np.ndarray], TokenBatch]) -> None:
  """Writes rows 0 to `num_rows` - 1 as `take(index)` returns them. Raises UserError as `jsonl.write_records` does."""
  with files.atomic_writer(path) as put:
    for start in range(0, num_rows, _ROWS_AT_A_TIME):
      batch = take(np.arange(start, min(start + _ROWS_AT_A_TIME, num_rows)))
      arrays = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
      dtype = np.dtype([(name, array.dtype, array.shape[1:]) for name, array in arrays.items()])
      if start == 0:
        header = io.BytesIO()
        described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (num_rows,)}
        np.lib.format.write_array_header_1_0(header, described)
        put(header.getvalue())
      records = np.empty(len(batch.tokens), dtype)
      for name, array in arrays.items():
        records[name] = array
      put(records.tobytes())


class RowFile:
  """Rows in a file by `write`, with the interface of `packing.Rows`."""

  def __init__(self, path: jsonl.PathLike):
    """Reads the header. Raises UserError if there is no such file, or it is no file of rows."""
    self.path = path
    with files.reader(path) as stream:
      try:
        np.lib.format.read_magic(stream)
        (self.num_rows,), _, self._dtype = np.lib.format.read_array_header_1_0(stream)
      except ValueError as e:
        raise UserError(f"{path}: no file of packed rows ({e}); the same command writes the file again") from e
      self._begin = stream.tell()
    self._files, self._name = fsspec.core.url_to_fs(os.fspath(path))

  def order(self, seed: int, step: int, batch_size: int) -> np.ndarray:
    """The rows that a step reads; see `packing.order`."""
    return packing.order(self.num_rows, seed, step, batch_size)

  def take(self, index: np.ndarray) -> TokenBatch:
    """The rows of `index`; -1 gives an empty row. Raises UserError if the file can no longer be read or was cut."""
    present, size = index[index >= 0], self._dtype.itemsize
    starts = [self._begin + int(i) * size for i in present]
    read: list[Any] = self._files.cat_ranges([self._name] * len(present), starts, [s + size for s in starts])
    for part in read:
      if isinstance(part, Exception) or len(part) != size:
        why = part if isinstance(part, Exception) else "the file was cut"
        raise UserError(f"{self.path}: a row cannot be read ({why}); the same command writes the file again")
    records = np.zeros(len(index), self._dtype)
    records[index >= 0] = np.frombuffer(b"".join(read), self._dtype)
    kind = PairBatch if "reference" in records.dtype.fields else TokenBatch
    return kind(**{name: records[name] for name in records.dtype.fields})

  def with_reference(self, log_probs: np.ndarray) -> "RowFile":
    """The same pairs with log p(target) under the reference model, f32[rows, T]; rewrites the file.

    Must be called by all processes; the first writes.
    """

    def take(index: np.ndarray) -> PairBatch:
      return packing.with_reference(self.take(index), log_probs[index])

    distributed.from_main(lambda: write(self.path, self.num_rows, take))
    return RowFile(self.path)
