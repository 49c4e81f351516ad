"""Reads JSON that users write or edit, one object per line, gzipped or not."""

import contextlib
import gzip
import json
import os
import zlib
from collections.abc import Iterator
from typing import Any

from etils import epath

from genrm_jax.runtime.errors import UserError
from genrm_jax.text.unicode import half_pair

_GZIP = b"\x1f\x8b"


def iter_objects(path: str | os.PathLike[str]) -> Iterator[tuple[dict[str, Any], str]]:
  """Yields (object, "path:line") for each line of a file that is not blank.

  Raises:
    UserError: the file cannot be read; or as `json_object`.
  """
  for line, place in iter_lines(path):
    yield json_object(line, place), place


def iter_lines(path: str | os.PathLike[str]) -> Iterator[tuple[bytes, str]]:
  """Yields (line, "path:line") for each line that is not blank. Raises UserError if the file cannot be read."""
  with open_file(path) as lines:
    for number, line in enumerate(lines, start=1):
      if line.strip():
        yield line, f"{os.fspath(path)}:{number}"


@contextlib.contextmanager
def open_file(path: str | os.PathLike[str]) -> Iterator[Any]:
  """Yields the bytes of a file, unpacked if it is gzipped. Raises UserError if they cannot be read."""
  try:
    with epath.Path(path).open("rb") as stream:
      is_packed = stream.read(len(_GZIP)) == _GZIP
      stream.seek(0)
      yield gzip.GzipFile(fileobj=stream) if is_packed else stream
  except (OSError, ValueError, EOFError, zlib.error) as e:  # ValueError: NUL in the path
    why = getattr(e, "strerror", None) or e
    raise UserError(f"{os.fspath(path)}: could not be read ({why}); check the path, or copy the file again") from e


def json_object(line: bytes, place: str) -> dict[str, Any]:
  """The JSON object in a line; its texts are valid Unicode. Raises UserError, naming `place` ("path:line"), if not."""
  row = json_value(line, place, "correct or remove the line")
  try:
    if not isinstance(row, dict):
      raise UserError(f"{place}: expected a JSON object, found {shown(row)}; each line is one object in braces")
    if b"\\u" in line or b"\xed" in line:  # only these can spell a surrogate
      _check_texts(row, place)
  except RecursionError as e:
    raise UserError(f"{place}: nested too deeply; correct or remove the line") from e
  return row


def json_value(text: bytes, place: str, remedy: str) -> Any:
  """The JSON value in a text. Raises UserError, naming `place`, for anything else, NaN and infinity included."""
  try:
    return json.loads(text, parse_constant=_refuse_constant)
  except json.JSONDecodeError as e:
    where = f"{place}:{e.lineno}" if b"\n" in text.strip() else place
    raise UserError(f"{where}: not JSON: {e.msg.removesuffix(' at')} at character {e.colno}; {remedy}") from e
  except UnicodeDecodeError as e:
    raise UserError(f"{place}: not JSON: byte {e.start + 1} is not UTF-8 ({e.reason}); save the file as UTF-8") from e
  except (ValueError, RecursionError) as e:  # too many digits, nested too deeply
    raise UserError(f"{place}: not JSON: {e}; {remedy}") from e


def shown(value: Any) -> str:
  """A JSON value for a message, at most 60 characters."""
  text = json.dumps(value)
  return text if len(text) <= 60 else f"{text[:57]}..."


def _refuse_constant(name: str) -> Any:
  raise ValueError(f"{name} is not a JSON number")


def _check_texts(value: Any, place: str, name: str = "") -> None:
  """Raises UserError if a text in a JSON value, or a key, has half of a surrogate pair."""
  if isinstance(value, dict):
    for key, item in value.items():
      _check_texts(key, place, f"{name}.{key}" if name else key)
      _check_texts(item, place, f"{name}.{key}" if name else key)
  elif isinstance(value, list):
    for i, item in enumerate(value):
      _check_texts(item, place, f"{name}[{i}]")
  elif isinstance(value, str) and (fault := half_pair(value)):
    raise UserError(f"{place}: field {shown(name)} has {fault}")
