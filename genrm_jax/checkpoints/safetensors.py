"""The safetensors file format: reads a file's index and single tensors, and writes files as streams.

    8 bytes     N, the length of the header, little-endian
    N bytes     the header, JSON: {name: {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}, ...}
    the rest    the tensors' raw bytes, without holes; offsets count from here

Files, local or gs://, are read by seek and read. Memory-mapping would be local only, and the mapped pages of a large
checkpoint would count as memory of this process.

Source: https://github.com/huggingface/safetensors#format
"""

import contextlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np
from etils import epath

from genrm_jax.runtime.errors import UserError

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}

_METADATA = "__metadata__"
_LENGTH_BYTES = 8
_ALIGNMENT = 8
_MAX_HEADER_BYTES = 100_000_000  # the format's limit
_BLOCK_BYTES = 64 * 2**20  # bytes are written and compared in such blocks

Create = Callable[[str], IO[Any]]


class Entry(NamedTuple):
  """The index entry of a tensor, whose data are bytes [begin, end) of the file."""

  dtype: str  # the format's name, such as "BF16"
  shape: tuple[int, ...]
  begin: int
  end: int


def read_index(path: epath.Path) -> dict[str, Entry]:
  """The tensors of a file, from its header. Lists tensors of any dtype; `read_tensor` reads those in DTYPES.

  Raises:
    UserError: the file cannot be read or is truncated, its header is malformed, or offsets overlap, leave holes or
      contradict shapes.
  """
  with _opened(path) as f:
    f.seek(0, 2)
    size = f.tell()
    f.seek(0)
    header_bytes = int.from_bytes(f.read(_LENGTH_BYTES), "little")
    start = _LENGTH_BYTES + header_bytes
    if size < _LENGTH_BYTES or header_bytes > _MAX_HEADER_BYTES:
      raise UserError(f"{path}: not a safetensors file, its {size} bytes do not start with a header; copy it again")
    if start > size:
      raise UserError(f"{path}: truncated, its header takes {start} bytes and the file has {size}; copy it again")
    header = f.read(header_bytes)
  try:
    fields = json.loads(header, object_pairs_hook=_without_repeats)
    index = {name: _entry(given, start) for name, given in fields.items() if name != _METADATA}
  except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as e:
    raise UserError(f"{path}: malformed safetensors header ({repr(e)[:200]}); copy the file again") from e
  _check_offsets(path, index, start)
  end = max((entry.end for entry in index.values()), default=start)
  if end != size:
    what = "truncated" if size < end else "malformed"
    raise UserError(f"{path}: {what}, its header announces {end} bytes and the file has {size}; copy it again")
  return index


def read_bytes(path: epath.Path, begin: int, end: int) -> bytes:
  """Bytes [begin, end) of a file; UserError if it ends before them."""
  with _opened(path) as f:
    f.seek(begin)
    data = f.read(end - begin)
  if len(data) != end - begin:
    raise UserError(f"{path}: truncated since its index was read, bytes {begin} to {end} are missing; copy it again")
  return data


def read_tensor(path: epath.Path, entry: Entry) -> np.ndarray:
  """One tensor, read-only; UserError if its dtype is not in DTYPES."""
  if entry.dtype not in DTYPES:
    raise UserError(f"{path}: a tensor has dtype {entry.dtype}, which cannot be read; known: {', '.join(DTYPES)}")
  return np.frombuffer(read_bytes(path, entry.begin, entry.end), DTYPES[entry.dtype]).reshape(entry.shape)


def same_values(path: epath.Path, entry: Entry, other_path: epath.Path, other: Entry) -> bool:
  """Whether two tensors agree in shape and every value; reads up to the first difference."""
  if entry.shape != other.shape or not {entry.dtype, other.dtype} <= DTYPES.keys():
    return False

  def block(path: epath.Path, entry: Entry, start: int) -> np.ndarray:
    dtype = DTYPES[entry.dtype]
    begin = entry.begin + start * dtype.itemsize
    return np.frombuffer(read_bytes(path, begin, min(begin + count * dtype.itemsize, entry.end)), dtype)

  count = _BLOCK_BYTES // 4
  starts = range(0, math.prod(entry.shape), count)
  return all(np.array_equal(block(path, entry, start), block(other_path, other, start)) for start in starts)


@contextlib.contextmanager
def new_files(folder: epath.Path) -> Iterator[Create]:
  """Yields create(name) -> open file. Files get their final names when the block succeeds; otherwise all are deleted.

  Raises:
    UserError: the disk is full, or the folder cannot be written.
  """
  names: list[str] = []

  def partial(name: str) -> epath.Path:
    return folder / f"{name}.partial"

  def create(name: str) -> IO[Any]:
    names.append(name)
    return partial(name).open("wb")

  try:
    folder.mkdir(parents=True, exist_ok=True)
    yield create
    for name in names:
      partial(name).replace(folder / name)
  except BaseException as e:
    for name in names:
      with contextlib.suppress(OSError):  # in a read-only folder, deleting fails too
        partial(name).unlink(missing_ok=True)
    if isinstance(e, OSError):
      reason = e.strerror or f"{type(e).__name__}: {e}"  # the text of a remote store's error may be a mere address
      raise UserError(f"{folder}: could not write the model ({reason}); free space, or give a writable folder") from e
    raise


def write(
  create: Create,
  tensors: Iterable[tuple[str, np.ndarray]],
  shapes: Sequence[tuple[str, np.dtype, tuple[int, ...]]],
  max_shard_bytes: int,
) -> None:
  """Writes a model: `model.safetensors`, or several shards and `model.safetensors.index.json`.

  Args:
    create: opens a new file, from `new_files`.
    tensors: (name, tensor), consumed one at a time.
    shapes: (name, dtype, shape) of all tensors in the same order, for the headers.
    max_shard_bytes: limit on the tensors in one file. A larger tensor gets its own file.
  """
  shards = _split(shapes, max_shard_bytes)
  names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
  names = names if len(shards) > 1 else ["model.safetensors"]
  rest = iter(tensors)
  for file_name, shard in zip(names, shards, strict=True):
    with create(file_name) as f:
      write_file(f, rest, shard)
  if len(shards) > 1:
    index = {
      "metadata": {"total_size": sum(_size(t) for t in shapes)},
      "weight_map": {t[0]: name for name, shard in zip(names, shards, strict=True) for t in shard},
    }
    with create("model.safetensors.index.json") as f:
      f.write(json.dumps(index, indent=2).encode())


def write_file(
  f: IO[Any], tensors: Iterator[tuple[str, np.ndarray]], shapes: Sequence[tuple[str, np.dtype, tuple[int, ...]]]
) -> None:
  """Writes one file; takes as many tensors as there are shapes, as for `write`."""
  f.write(_header(shapes))
  for expected in shapes:
    name, tensor = next(tensors)
    if (name, tensor.dtype, tensor.shape) != expected:
      raise ValueError(f"tensor {name}, {tensor.dtype}{tensor.shape}, where {expected} was announced")
    flat = np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)
    for start in range(0, flat.size, _BLOCK_BYTES):
      f.write(flat[start : start + _BLOCK_BYTES].tobytes())


@contextlib.contextmanager
def _opened(path: epath.Path) -> Iterator[IO[Any]]:
  try:
    with path.open("rb") as f:
      yield f
  except OSError as e:
    raise UserError(f"{path}: could not be read: {e.strerror or e}; copy the file again") from e


def _without_repeats(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
  fields = dict(pairs)
  if len(fields) != len(pairs):
    raise ValueError("a key occurs twice")
  return fields


def _entry(given: Any, start: int) -> Entry:
  """The index entry of a tensor; `start` is where the data begin. Raises ValueError for values of a wrong kind."""
  dtype, shape, (begin, end) = given["dtype"], given["shape"], given["data_offsets"]
  numbers = [*shape, begin, end]
  if not isinstance(dtype, str) or any(type(n) is not int or not 0 <= n < 2**63 for n in numbers):
    raise ValueError(f"{given} is no dtype, shape and pair of offsets")
  return Entry(dtype, tuple(shape), start + begin, start + end)


def _check_offsets(path: epath.Path, index: dict[str, Entry], start: int) -> None:
  end = start
  for name, entry in sorted(index.items(), key=lambda item: (item[1].begin, item[1].end)):
    if entry.begin != end or entry.end < entry.begin:
      raise UserError(
        f"{path}: tensor {name} occupies bytes {entry.begin} to {entry.end}, but the one before it ends at {end}; "
        "the header is malformed, copy the file again"
      )
    end = entry.end
    if entry.dtype in DTYPES and entry.end - entry.begin != math.prod(entry.shape) * DTYPES[entry.dtype].itemsize:
      raise UserError(
        f"{path}: tensor {name}, {entry.dtype} of shape {entry.shape}, has {entry.end - entry.begin} bytes by its "
        "offsets, which contradicts its shape; the header is malformed, copy the file again"
      )


def _split(shapes: Sequence[tuple[str, np.dtype, tuple[int, ...]]], max_bytes: int) -> list[list[Any]]:
  shards: list[list[Any]] = [[]]
  filled = 0
  for tensor in shapes:
    if shards[-1] and filled + _size(tensor) > max_bytes:
      shards.append([])
      filled = 0
    shards[-1].append(tensor)
    filled += _size(tensor)
  return shards


def _size(tensor: tuple[str, np.dtype, tuple[int, ...]]) -> int:
  _, dtype, shape = tensor
  return math.prod(shape) * dtype.itemsize


def _header(shard: Sequence[tuple[str, np.dtype, tuple[int, ...]]]) -> bytes:
  """Length and JSON, padded so that the tensors start at a multiple of 8 bytes."""
  names = {dtype: name for name, dtype in DTYPES.items()}
  # Loaders look here for the framework whose conventions the tensors follow.
  fields: dict[str, Any] = {_METADATA: {"format": "pt"}}
  begin = 0
  for tensor in shard:
    name, dtype, shape = tensor
    end = begin + _size(tensor)
    fields[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    begin = end
  header = json.dumps(fields, separators=(",", ":")).encode()
  header += b" " * (-len(header) % _ALIGNMENT)
  return len(header).to_bytes(_LENGTH_BYTES, "little") + header
