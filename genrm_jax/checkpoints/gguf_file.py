"""The GGUF file format of llama.cpp: reads a file's metadata, the index of its tensors, and single tensors.

    4 bytes     "GGUF"
    u32         the version
    u64 u64     number of tensors, number of metadata entries
    entries     each a key, u32 type, value
    tensors     each a name, u32 rank, u64 dimensions (the fastest first), u32 type, u64 offset in the data
    padding     to a multiple of general.alignment
    data        of the tensors, each padded likewise

All is little-endian, and a string is its length as u64 and UTF-8. Files, local or gs://, are read by seek and read.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Quantised types are the business of the `gguf`
package, an extra.
"""

import functools
import math
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np
from etils import epath

from genrm_jax.runtime.errors import UserError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32
_MAX_RANK = 4
_MAX_KEY_BYTES = 65_535
# Types of metadata values.
_SCALARS = dict(enumerate(("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "|b1"))) | {10: "<u8", 11: "<i8", 12: "<f8"}
_STRING, _ARRAY = 8, 9
# Types of tensors that are not quantised.
_FLOATS = {0: np.dtype("<f4"), 1: np.dtype("<f2"), 30: np.dtype(ml_dtypes.bfloat16)}


class Entry(NamedTuple):
  """The index entry of a tensor, whose data are bytes [begin, end) of the file."""

  type: int
  shape: tuple[int, ...]  # as of a NumPy array: the fastest dimension is last
  begin: int
  end: int


class Index(NamedTuple):
  """The metadata of a file (arrays of numbers as NumPy arrays, of strings as lists) and its tensors by name."""

  metadata: dict[str, Any]
  tensors: dict[str, Entry]


def read_index(path: epath.Path) -> Index:
  """Reads all of a file but the tensors.

  Raises:
    UserError: the file cannot be read, is no GGUF, of an unknown version, cut off or malformed; or a tensor has a type
      that cannot be read, perhaps since the `gguf` package is missing.
  """
  try:
    with path.open("rb") as f:
      stream = _Stream(f)
      try:
        return _read_index(path, stream)
      except (_Malformed, UnicodeDecodeError) as e:
        raise UserError(f"{path}: malformed GGUF header at byte {stream.position} ({e}); copy the file again") from e
      except EOFError as e:
        raise UserError(
          f"{path}: cut off or damaged, by its header it is longer than its {stream.size} bytes; copy the file again"
        ) from e
  except (OSError, ValueError) as e:  # ValueError: NUL in the path
    raise UserError(f"{path}: could not be read: {getattr(e, 'strerror', None) or e}; copy the file again") from e


def read_tensor(path: epath.Path, entry: Entry) -> np.ndarray:
  """One tensor in its dtype, or in float32 if it is quantised; UserError if the file ends before it."""
  try:
    with path.open("rb") as f:
      f.seek(entry.begin)
      data = f.read(entry.end - entry.begin)
  except OSError as e:
    raise UserError(f"{path}: could not be read: {e.strerror or e}; copy the file again") from e
  if len(data) != entry.end - entry.begin:
    raise UserError(f"{path}: cut off since its index was read, at byte {entry.begin + len(data)}; copy it again")
  if entry.type in _FLOATS:
    return np.frombuffer(data, _FLOATS[entry.type]).reshape(entry.shape)
  gguf = _package()
  rows = np.frombuffer(data, np.uint8).reshape(*entry.shape[:-1], -1)
  return gguf.quants.dequantize(rows, gguf.GGMLQuantizationType(entry.type))


class _Malformed(Exception):
  """A header that no writer writes."""


class _Stream:
  """Reads numbers and strings; raises EOFError where the file is too short, before memory is taken."""

  def __init__(self, f: IO[Any]):
    self._f = f
    f.seek(0, 2)
    self.size, self.position = f.tell(), 0
    f.seek(0)

  def take(self, num_bytes: int) -> bytes:
    if num_bytes > self.size - self.position:
      raise EOFError
    data = self._f.read(num_bytes)
    if len(data) != num_bytes:
      raise EOFError
    self.position += num_bytes
    return data

  def u32(self) -> int:
    return int.from_bytes(self.take(4), "little")

  def u64(self) -> int:
    return int.from_bytes(self.take(8), "little")

  def string(self) -> str:
    return self.take(self.u64()).decode()

  def value(self) -> Any:
    kind = self.u32()
    if kind == _STRING:
      return self.string()
    if kind != _ARRAY:
      return self._numbers(kind, 1)[0].item()
    kind, length = self.u32(), self.u64()
    if kind != _STRING:
      return self._numbers(kind, length)
    if 8 * length > self.size - self.position:
      raise EOFError
    return [self.string() for _ in range(length)]

  def _numbers(self, kind: int, length: int) -> np.ndarray:
    if kind not in _SCALARS:
      raise _Malformed(f"type {kind} of a value")
    dtype = np.dtype(_SCALARS[kind])
    data = self.take(length * dtype.itemsize)
    if dtype.kind == "b" and set(data) - {0, 1}:
      raise _Malformed("a truth value that is neither 0 nor 1")
    return np.frombuffer(data, dtype)


def _read_index(path: epath.Path, stream: _Stream) -> Index:
  magic = stream.take(min(4, stream.size))
  if magic != _MAGIC:
    raise UserError(
      f"{path}: not a GGUF file, it starts with {magic!r}; give a .gguf file of a Gemma, or copy it again"
    )
  version = stream.u32()
  if version not in _VERSIONS:
    big_endian = version >= 1 << 16
    what = "of a big-endian machine" if big_endian else f"GGUF version {version}"
    raise UserError(
      f"{path}: {what}; this library reads little-endian files of versions {' and '.join(map(str, _VERSIONS))}: "
      "convert the model again with a current llama.cpp"
    )
  num_tensors, num_entries = stream.u64(), stream.u64()
  metadata: dict[str, Any] = {}
  for _ in range(num_entries):
    key = stream.string()
    if key in metadata or not 0 < len(key) <= _MAX_KEY_BYTES:
      raise _Malformed(f"key {key[:80]!r}")
    metadata[key] = stream.value()
  headers: dict[str, tuple[int, tuple[int, ...], int]] = {}
  for _ in range(num_tensors):
    name, rank = stream.string(), stream.u32()
    if name in headers or rank > _MAX_RANK:
      raise _Malformed(f"tensor {name[:80]!r} twice, or of rank {rank}")
    shape = tuple(stream.u64() for _ in range(rank))[::-1]
    headers[name] = stream.u32(), shape, stream.u64()
  alignment = metadata.get("general.alignment", _ALIGNMENT)
  if type(alignment) is not int or alignment < 1 or alignment % 8:
    raise _Malformed(f"general.alignment {alignment!r}")
  start = _rounded_up(stream.position, alignment)
  tensors: dict[str, Entry] = {}
  for name, (kind, shape, offset) in headers.items():
    if offset % alignment:
      raise _Malformed(f"tensor {name[:80]!r} at offset {offset}")
    tensors[name] = Entry(kind, shape, start + offset, start + offset + _num_bytes(path, name, kind, shape))
  end = start
  for name, entry in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
    if entry.begin != end:
      raise _Malformed(f"tensor {name[:80]!r} at byte {entry.begin}, where {end} is next")
    if entry.end > stream.size:
      raise EOFError
    end = _rounded_up(entry.end, alignment)
  return Index(metadata, tensors)


def _rounded_up(n: int, multiple: int) -> int:
  return n + -n % multiple


def _num_bytes(path: epath.Path, name: str, kind: int, shape: tuple[int, ...]) -> int:
  if kind in _FLOATS:
    return math.prod(shape) * _FLOATS[kind].itemsize
  what, block, block_bytes = _block(path, kind)
  if not shape or shape[-1] % block:
    raise _Malformed(f"rows of {what} tensor {name[:80]!r}, which are no multiple of {block}")
  return math.prod(shape) // block * block_bytes


@functools.cache
def _package() -> Any:
  import gguf
  import gguf.quants

  return gguf


def _block(path: epath.Path, kind: int) -> tuple[str, int, int]:
  """(name, values, bytes) of a block of a quantised type; UserError if it cannot be read here."""
  try:
    gguf = _package()
  except ImportError as e:
    raise UserError(
      f"{path}: its tensors are quantised (type {kind}), which needs an optional package: pip install 'genrm-jax[gguf]'"
    ) from e
  try:
    known = gguf.GGMLQuantizationType(kind)
    block, block_bytes = gguf.GGML_QUANT_SIZES[known]
    gguf.quants.dequantize(np.zeros((1, block_bytes), np.uint8), known)
  except (ValueError, LookupError, NotImplementedError) as e:
    raise UserError(
      f"{path}: the installed `gguf` package cannot dequantise tensors of type {kind}; update it (pip install "
      "--upgrade gguf), or use another quantisation of the model, such as Q8_0 or BF16"
    ) from e
  return known.name, block, block_bytes
