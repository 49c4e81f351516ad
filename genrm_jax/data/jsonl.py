"""JSON lines of the records in records.py, and small JSON files: written atomically, validated when read.

    {"schema": 1, "problem_id": "gsm8k/train/00012", "index": 0, "text": "...", "answer": "7", "correct": true, ...}

Paths may be local or in any store that `etils.epath` supports (`gs://`). All processes must see the same files; only
the first writes.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from genrm_jax.records import Candidate, Problem, Rationale, Score
from genrm_jax.runtime import files
from genrm_jax.runtime.errors import UserError
from genrm_jax.text.json_lines import json_object, json_value
from genrm_jax.text.unicode import half_pair

PathLike = str | os.PathLike[str]
Record = TypeVar("Record", Problem, Candidate, Rationale, Score)

# Incremented when the fields of a record change so that old files can no longer be read.
SCHEMA_VERSIONS: dict[type, int] = {Problem: 1, Candidate: 1, Rationale: 1, Score: 1}

_DIGEST_BLOCK_BYTES = 1 << 20
_REWRITE = "correct it, or remove the file and rerun the stage that wrote it"


def write_records(path: PathLike, records: Iterable[Record], every_process: bool = False) -> int:
  """Writes one JSON line per record and returns their number. `path` is replaced once the last line is on disk.

  Only process 0 writes, unless `every_process` is set: then each process must pass a different path.

  Raises:
    UserError: the place cannot be written, the disk is full, or a record holds NaN, infinity or invalid Unicode.
  """
  count = 0
  with files.atomic_writer(path, every_process) as write:
    for record in records:
      fields = {"schema": SCHEMA_VERSIONS[type(record)], **_shallow_dict(record)}
      write(_dump(fields, f"{os.fspath(path)}:{count + 1}", escape=False) + b"\n")
      count += 1
  return count


def read_records(path: PathLike, cls: type[Record]) -> list[Record]:
  """All records of a file; see `iter_records`."""
  return list(iter_records(path, cls))


def iter_records(path: PathLike, cls: type[Record]) -> Iterator[Record]:
  """Yields the records of a file, one line at a time. Blank lines are skipped; fields with a default may be left out.

  Raises:
    UserError: no such file; or `path:line`, for a line that is not a JSON object, another schema version, or a field
      that is missing, unknown, of another type or not valid Unicode.
  """
  yield from (record for _, record in _iter_placed(path, cls))


def read_scores(path: PathLike, verifier: str) -> list[Score]:
  """The scores of one verifier. Raises UserError as `iter_records`, and for the score of another verifier."""
  scores = []
  for place, score in _iter_placed(path, Score):
    if score.verifier != verifier:
      raise UserError(
        f"{place}: a score of verifier {score.verifier!r} in the file of {verifier!r}; put back its own scores, or "
        "remove the file and run the score stage again"
      )
    scores.append(score)
  return scores


def _iter_placed(path: PathLike, cls: type[Record]) -> Iterator[tuple[str, Record]]:
  """Yields ("path:line", record)."""
  version = SCHEMA_VERSIONS[cls]
  with files.reader(path) as lines:
    for number, line in enumerate(lines, start=1):
      if not line.strip():
        continue
      place = f"{os.fspath(path)}:{number}"
      fields = json_object(line, place)
      if "schema" not in fields:
        raise UserError(f'{place}: no field "schema"; add "schema": {version} to each {cls.__name__} line')
      schema = fields.pop("schema")
      if schema != version or isinstance(schema, bool):
        raise UserError(
          f"{place}: schema {schema!r}, but this version of genrm-jax reads {cls.__name__} schema {version}; "
          "write the file again with this version, or read it with the one that wrote it"
        )
      yield place, _decode(cls, fields, place)


def write_json(path: PathLike, obj: Any) -> None:
  """Writes a JSON-able object atomically, indented. Raises UserError as `write_records` does."""
  with files.atomic_writer(path) as write:
    write(_dump(obj, os.fspath(path), indent=2) + b"\n")


def write_bytes(path: PathLike, data: bytes) -> None:
  """Writes a file atomically. Raises UserError as `write_records` does."""
  with files.atomic_writer(path) as write:
    write(data)


def read_json(path: PathLike) -> Any:
  """The object in a JSON file. Raises UserError if there is no such file or it is not JSON."""
  with files.reader(path) as stream:
    text = stream.read()
  return json_value(text, os.fspath(path), _REWRITE)


def read_object(path: PathLike, shape: Mapping[str, Any]) -> dict[str, Any]:
  """The object in a JSON file. Raises UserError as `read_json`, and unless it has the fields of `shape`.

  A value of `shape` is the type of the field, or the shape of an object in it.
  """
  with files.reader(path) as stream:
    text = stream.read()
  found = json_value(text, os.fspath(path), _REWRITE)
  _check_shape(found, shape, os.fspath(path), text, "")
  return found


def _check_shape(value: Any, shape: Any, path: str, text: bytes, name: str) -> None:
  kind = dict if isinstance(shape, Mapping) else shape
  matches = type(value) is kind
  if not matches:
    line = 1 + text.count(b"\n", 0, max(0, text.find(json.dumps(name.rpartition(".")[2]).encode())))
    what = f'field "{name}"' if name else "the content"
    raise UserError(f"{path}:{line}: {what} is {_kind(value)}, expected {_NAMES[kind]}; {_REWRITE}")
  name += "." if name else ""
  for key, inner in shape.items() if isinstance(shape, Mapping) else ():
    if key not in value:
      raise UserError(f'{path}: no field "{name}{key}"; {_REWRITE}')
    _check_shape(value[key], inner, path, text, f"{name}{key}")


def file_digest(path: PathLike) -> str:
  """The sha256 of a file's bytes, in hex. Raises UserError if there is no such file."""
  digest = hashlib.sha256()
  with files.reader(path) as stream:
    while block := stream.read(_DIGEST_BLOCK_BYTES):
      digest.update(block)
  return digest.hexdigest()


def digest_of(obj: Any) -> str:
  """The sha256, in hex, of a JSON-able object. The order of keys does not matter; 1 and 1.0 differ."""
  text = json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
  return hashlib.sha256(text.encode()).hexdigest()


def _dump(obj: Any, place: str, indent: int | None = None, escape: bool = True) -> bytes:
  """JSON as UTF-8. `escape` writes half of a surrogate pair, as in the name of a file, as "\\ud83d"."""
  try:
    text = json.dumps(obj, ensure_ascii=False, allow_nan=False, indent=indent)
  except ValueError as e:
    raise UserError(f"{place}: a value that JSON cannot hold ({e}); find where NaN or infinity came from") from e
  try:
    return text.encode()
  except UnicodeEncodeError:
    if not escape:
      raise UserError(f"{place}: the record has {half_pair(text)}") from None
    return json.dumps(obj, ensure_ascii=True, allow_nan=False, indent=indent).encode()


def _shallow_dict(record: Any) -> dict[str, Any]:
  """The fields of a record; records in its tuples become dicts too."""
  fields = {}
  for field in dataclasses.fields(record):
    value = getattr(record, field.name)
    fields[field.name] = [_shallow_dict(v) for v in value] if isinstance(value, (tuple, list)) else value
  return fields


@functools.cache
def _schema_of(cls: type) -> tuple[dict[str, Any], frozenset[str]]:
  """The type of each field, and the names of the required ones."""
  hints = typing.get_type_hints(cls)
  required = frozenset(f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING)
  return {f.name: hints[f.name] for f in dataclasses.fields(cls)}, required


def _decode(cls: Any, fields: dict[str, Any], place: str, within: str = "") -> Any:
  hints, required = _schema_of(cls)
  for name in fields:
    if name not in hints:
      raise UserError(f'{place}: unknown field "{within}{name}"; a {cls.__name__} has {", ".join(hints)}')
  for name in hints:
    if name in required and name not in fields:
      raise UserError(f'{place}: no field "{within}{name}"; a {cls.__name__} needs {", ".join(sorted(required))}')
  return cls(**{name: _convert(hints[name], value, place, within + name) for name, value in fields.items()})


def _convert(hint: Any, value: Any, place: str, name: str) -> Any:
  """`value` as a field of type `hint`, or a UserError."""
  options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
  for option in options:
    if option is type(None):
      if value is None:
        return None
    elif typing.get_origin(option) is tuple:
      if isinstance(value, list):
        inner = typing.get_args(option)[0]
        return tuple(_convert_item(inner, v, place, f"{name}[{i}]") for i, v in enumerate(value))
    elif option is float:
      if type(value) in (int, float) and abs(value) <= _LARGEST and not math.isnan(value):
        return float(value)
    elif type(value) is option:
      return value
  wanted = " or ".join(_NAMES.get(o, "a list") for o in options)
  raise UserError(f'{place}: field "{name}" is {_kind(value)}, expected {wanted}; correct the value')


def _convert_item(cls: Any, value: Any, place: str, name: str) -> Any:
  if not isinstance(value, dict):
    raise UserError(f'{place}: "{name}" is {_kind(value)}, expected an object; correct the value')
  return _decode(cls, value, place, f"{name}.")


_LARGEST = float.fromhex("0x1.fffffffffffffp+1023")
_NAMES = {
  str: "a string",
  bool: "true or false",
  int: "a whole number",
  float: "a finite number",
  type(None): "null",
  list: "a list",
  dict: "an object",
}


def _kind(value: Any) -> str:
  """The kind of a JSON value, and the value itself if it is short."""
  if value is None:
    return "null"
  if isinstance(value, (dict, list)):
    return _NAMES[type(value)]
  if type(value) is int and abs(value) > 10**12:
    return "a huge whole number"
  shown = json.dumps(value)
  return {str: "the string ", bool: "", int: "", float: ""}[type(value)] + (shown if len(shown) < 60 else "...")
