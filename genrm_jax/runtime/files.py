"""Files that are replaced whole or not at all, and errors that name the file and the remedy.

Paths may be local or in any store that `etils.epath` supports (`gs://`).
"""

import contextlib
import dataclasses
import errno
import os
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from genrm_jax.runtime import distributed
from genrm_jax.runtime.errors import UserError

PathLike = str | os.PathLike[str]

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def atomic_writer(path: PathLike, every_process: bool = False) -> Iterator[Callable[[bytes], Any]]:
  """Yields `write(bytes)` into a hidden file beside `path`, which replaces `path` if the block succeeds."""
  if not (every_process or distributed.is_main()):
    yield lambda data: None
    return
  target = epath.Path(path)
  temporary = target.parent / f".{target.name}.{uuid.uuid4().hex[:12]}.tmp"
  try:
    # Errors that the caller's block raises about other things must keep their type, hence `_named` around each step
    # rather than one `try` around the `yield`.
    with named(path, "written"):
      target.parent.mkdir(parents=True, exist_ok=True)
      stream = temporary.open("wb")
    try:
      yield _NamedWrite(path, stream.write)
    except BaseException:
      with contextlib.suppress(OSError):  # the buffered rest may not fit on the disk either
        stream.close()
      raise
    with named(path, "written"):
      try:
        stream.flush()
        _sync(stream)
      finally:
        stream.close()
      temporary.replace(target)
  finally:
    with contextlib.suppress(OSError, ValueError):
      temporary.unlink(missing_ok=True)


@dataclasses.dataclass(frozen=True)
class _NamedWrite:
  """A `write` whose errors name the file."""

  path: PathLike
  write: Callable[[bytes], Any]

  def __call__(self, data: bytes) -> None:
    with named(self.path, "written"):
      self.write(data)


def _sync(stream: Any) -> None:
  """Waits until a local file is on disk. Remote files have no descriptor; they are complete once closed."""
  try:
    descriptor = stream.fileno()
  except (AttributeError, OSError):
    return
  os.fsync(descriptor)


@contextlib.contextmanager
def reader(path: PathLike) -> Iterator[Any]:
  """Yields the file, open for reading bytes. Raises UserError if there is no such file."""
  with named(path, "read"):
    stream = epath.Path(path).open("rb")
  with stream:
    yield stream


@contextlib.contextmanager
def named(path: PathLike, done: str) -> Iterator[None]:
  """Turns an OSError into a UserError with the file and the remedy."""
  try:
    yield
  except FileNotFoundError as e:
    if done == "written":  # missing folders are created, so this is no local path
      raise UserError(f"{os.fspath(path)}: no such bucket, or no such place; check the path") from e
    raise UserError(f"{os.fspath(path)}: no such file; check the path, or run the stage that writes it first") from e
  except (OSError, ValueError) as e:  # ValueError: NUL in the path
    if isinstance(e, OSError) and e.errno in _DISK_FULL:
      raise UserError(
        f"{os.fspath(path)}: the disk is full, nothing was written; free some space and run the same command again"
      ) from e
    why = getattr(e, "strerror", None) or " ".join(str(e).splitlines()) or type(e).__name__
    raise UserError(f"{os.fspath(path)}: could not be {done}: {why}; check the path and its permissions") from e
