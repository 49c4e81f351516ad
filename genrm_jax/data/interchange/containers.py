"""Rows in files of any kind: JSON lines, one JSON or YAML document, parquet; local or gs://, gzipped or not.

A document is one row, or a list of rows. `write_with` writes a file of the same kind with fields added to each row.
"""

import contextlib
import gzip
import io
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import fsspec.core
import yaml
from etils import epath

from genrm_jax.runtime import files
from genrm_jax.runtime.errors import UserError
from genrm_jax.text.json_lines import iter_lines, json_object, json_value, open_file

PathLike = str | os.PathLike[str]
Added = Mapping[str, Any] | None  # the fields added to a row; None leaves the row out

IN_FOLDERS = (".jsonl", ".yaml", ".yml", ".parquet")  # what is read in a folder; JSON documents there are summaries
_PARQUET = b"PAR1"
_BATCH_ROWS = 1024
_REMEDY = "correct it, or write the file again"


class Place(NamedTuple):
  """A row of a file. `row` counts from 1; 0 if the whole file is one row. `sign` stands before it in messages."""

  file: str
  row: int = 0
  sign: str = ":"

  def __str__(self) -> str:
    return f"{self.file}{self.sign}{self.row}" if self.row else self.file

  @property
  def stem(self) -> str:
    """The name of the file without its endings."""
    return _name(self.file).partition(".")[0]


def files_of(path: PathLike) -> list[str]:
  """The file itself, or the files of a folder and its subfolders, by the numbers in their names.

  Raises:
    UserError: there is nothing to read at the path.
  """
  name = os.fspath(path)
  with files.named(name, "read"):
    if not epath.Path(path).is_dir():
      return [name]
    store, root = fsspec.core.url_to_fs(name)
    inside = [str(pathlib.PurePosixPath(file).relative_to(root)) for file in store.find(root)]
  found = [i for i in inside if pathlib.PurePosixPath(_name(i)).suffix in IN_FOLDERS and not re.search(r"(^|/)\.", i)]
  if not found:
    raise UserError(f"{name}: a folder without files that end in {', '.join(IN_FOLDERS)}; check the path")
  return [str(epath.Path(path) / i) for i in sorted(found, key=_by_number)]


def rows_of(file: str) -> Iterator[tuple[dict[str, Any], Place]]:
  """Yields the rows of a file; JSON lines and parquet are streamed.

  Raises:
    UserError: the file cannot be read, a row is no object, or pyarrow is missing.
  """
  kind = kind_of(file)
  if kind == "lines":
    for line, where in iter_lines(file):
      yield json_object(line, where), Place(file, int(where.rpartition(":")[2]))
  elif kind == "parquet":
    with open_file(file) as stream, _arrow_errors(file):
      batches = _parquet(file, stream).iter_batches(_BATCH_ROWS)
      rows = (row for batch in batches for row in batch.to_pylist())
      yield from ((row, Place(file, number, ", row ")) for number, row in enumerate(rows, start=1))
  else:
    document = _document(file, kind)
    is_list = isinstance(document, list)
    for number, row in enumerate(document if is_list else [document], start=1):
      place = Place(file, number, ", item ") if is_list else Place(file)
      if not isinstance(row, dict) or not all(isinstance(key, str) for key in row):
        raise UserError(f"{place}: expected an object with names, found {row!r:.60}; {_REMEDY}")
      yield row, place


def write_with(file: str, out: PathLike, added: Iterator[Added], columns: Mapping[str, Any]) -> None:
  """Writes a file of the same kind with fields added to its rows; replaces `out` once the last row is on disk.

  Lines of JSON keep their bytes. The result is gzipped if the name of `out` ends in .gz.

  Args:
    file: whose rows are read again.
    out: where to write.
    added: for each row.
    columns: the Arrow type of each added field, as text for `_arrow_type`.
  """
  kind = kind_of(file)
  with files.atomic_writer(out, every_process=True) as write, _packed(out, write) as put:
    if kind == "lines":
      for line, _ in iter_lines(file):
        fields = next(added)
        if fields is not None:
          put(line.rstrip()[:-1].rstrip() + b", " + _json(fields)[1:] + b"\n")
    elif kind == "parquet":
      _write_parquet(file, put, added, columns)
    else:
      document = _document(file, kind)
      rows = [row | fields for row, fields in zip(_as_list(document), added, strict=False) if fields is not None]
      result = rows if isinstance(document, list) else rows[0]
      put(_json(result, 2) + b"\n" if kind == "json" else _yaml(result))


def _name(file: str) -> str:
  """The file's own name, without .gz."""
  return file.rpartition("/")[2].removesuffix(".gz")


def _by_number(name: str) -> list[tuple[int, str]]:
  return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


def kind_of(file: str) -> str:
  """The kind of a file: lines (of JSON), json, yaml or parquet."""
  suffix = pathlib.PurePosixPath(_name(file)).suffix
  if suffix in (".yaml", ".yml"):
    return "yaml"
  with open_file(file) as stream:
    start = stream.read(len(_PARQUET))
    if start == _PARQUET or suffix == ".parquet":
      return "parquet"
    if suffix != ".json":
      return "lines"
    first = start + stream.readline()
    more = any(line.strip() for line in stream)
  with contextlib.suppress(ValueError, RecursionError):
    return "lines" if more and isinstance(json.loads(first), dict) else "json"
  return "json"


def _document(file: str, kind: str) -> Any:
  with open_file(file) as stream:
    data = stream.read()
  if not data.strip():
    return []
  if kind == "json":
    document = json_value(data, file, _REMEDY)
    try:
      _json(document)
    except (ValueError, RecursionError) as e:  # infinity, half of a surrogate pair, nested too deeply
      raise UserError(f"{file}: a value that JSON cannot hold ({e}); {_REMEDY}") from e
    return document
  try:
    return yaml.load(data, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
  except (yaml.YAMLError, ValueError, OverflowError, RecursionError, TypeError) as e:  # TypeError: a list as a key
    mark = getattr(e, "problem_mark", None)
    where = f"{file}:{mark.line + 1}" if mark else file
    raise UserError(f"{where}: not YAML: {getattr(e, 'problem', None) or ' '.join(str(e).split())}; {_REMEDY}") from e


def _as_list(document: Any) -> Sequence[Any]:
  return document if isinstance(document, list) else [document]


def _json(value: Any, indent: int | None = None) -> bytes:
  return json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent).encode()


def _yaml(value: Any) -> bytes:
  dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
  return yaml.dump(value, Dumper=dumper, allow_unicode=True, sort_keys=False).encode()


@contextlib.contextmanager
def _packed(out: PathLike, write: Callable[[bytes], Any]) -> Iterator[Callable[[bytes], Any]]:
  """Yields `write`, or one that gzips first; the bytes do not depend on time or name."""
  if not os.fspath(out).endswith(".gz"):
    yield write
    return
  with gzip.GzipFile("", "wb", fileobj=_Sink(write), mtime=0) as stream:
    yield stream.write


class _Sink(io.RawIOBase):
  """A writable file that passes all bytes to a function."""

  def __init__(self, write: Callable[[bytes], Any]):
    self._write = write

  def writable(self) -> bool:
    return True

  def write(self, data: Any) -> int:
    self._write(bytes(data))
    return len(data)


# Parquet.


def _pyarrow(file: str) -> tuple[Any, Any]:
  try:
    import pyarrow
    import pyarrow.parquet
  except ImportError as e:
    raise UserError(f"{file}: parquet needs an optional package: pip install 'genrm-jax[parquet]'") from e
  return pyarrow, pyarrow.parquet


def _parquet(file: str, stream: Any) -> Any:
  return _pyarrow(file)[1].ParquetFile(stream)


@contextlib.contextmanager
def _arrow_errors(file: str) -> Iterator[None]:
  arrow = _pyarrow(file)[0]
  try:
    yield
  except arrow.ArrowException as e:
    raise UserError(f"{file}: no parquet file that can be read ({str(e).splitlines()[0]}); copy it again") from e


def _arrow_type(arrow: Any, name: str) -> Any:
  """An Arrow type from its name: "number", "text", {field: type} or [type]."""
  if isinstance(name, list):
    return arrow.list_(_arrow_type(arrow, name[0]))
  if isinstance(name, dict):
    return arrow.struct([(key, _arrow_type(arrow, value)) for key, value in name.items()])
  return {"number": arrow.float64(), "text": arrow.string()}[name]


def _write_parquet(
  file: str, write: Callable[[bytes], Any], added: Iterator[Added], columns: Mapping[str, Any]
) -> None:
  arrow, parquet = _pyarrow(file)
  with open_file(file) as stream, _arrow_errors(file):
    source = parquet.ParquetFile(stream)
    schema = source.schema_arrow
    for name, kind in columns.items():
      schema = schema.append(arrow.field(name, _arrow_type(arrow, kind)))
    sink = arrow.PythonFile(_Sink(write), mode="w")
    with parquet.ParquetWriter(sink, schema) as writer:
      for batch in source.iter_batches(_BATCH_ROWS):
        fields = [next(added) for _ in range(batch.num_rows)]
        kept = [f for f in fields if f is not None]
        arrays = list(batch.filter(arrow.array([f is not None for f in fields])).columns)
        arrays += [arrow.array([f.get(name) for f in kept], schema.field(name).type) for name in columns]
        writer.write_batch(arrow.record_batch(arrays, schema=schema))
