"""A lock on a workdir, so that two runs never write into one.

    with lock.hold(workdir):    UserError if another run holds it
      lock.check()              before something is written: UserError if another run has taken it over

The file run.lock in the workdir tells who holds it, and has a counter that a thread of the holder increments. On the
holder's machine its process decides whether the lock counts, elsewhere the counter: no two clocks are compared.
"""

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

from etils import epath

from genrm_jax.runtime import distributed, heartbeat, owner, versioned_file
from genrm_jax.runtime.errors import UserError
from genrm_jax.runtime.progress import say

NAME = "run.lock"
_BEAT_S = 10.0
_STALE_S = 60.0  # without a beat for so long, a lock of another machine is taken over, and its holder gives up
_FIRST_BEAT = 10**9  # the file keeps its length, so that a full disk does not matter
_held: list["_Lock"] = []  # by this process


@contextlib.contextmanager
def hold(workdir: epath.Path) -> Iterator[None]:
  """Holds the lock of a workdir within the block, which all processes of a run must enter.

  Process 0 takes it, and releases it when the block ends, also by an exception or SIGTERM. If another run takes it
  over, which happens only to a process that has stood still, the block ends with a UserError.

  Raises:
    UserError: another run holds the lock (the message names it), or it cannot be written.
  """
  taken: list[_Lock] = []
  distributed.from_main(lambda: taken.append(_acquire(workdir)))
  if not taken:
    yield
    return
  (lock,) = taken
  _held.append(lock)
  try:
    with heartbeat.every(_BEAT_S, lock.beat, last=lock.release):
      yield
    lock.check()
  except _Lost:
    raise UserError(lock.lost) from None
  finally:
    _held.remove(lock)
    lock.release()


def check() -> None:
  """Raises UserError if another run has taken over a lock that this process holds."""
  for lock in _held:
    lock.check()


class _Lost(BaseException):
  """Thrown into the thread that holds the lock; no `except Exception` on the way must swallow it."""


class _Lock:
  """A lock that this process holds."""

  def __init__(self, workdir: epath.Path, file: versioned_file.VersionedFile, content: dict[str, Any], version: Any):
    self.lost = ""  # why, once it is
    self._workdir, self._file, self._content, self._version = workdir, file, content, version
    self._mutex, self._renewed = threading.Lock(), time.monotonic()

  def beat(self) -> type[_Lost] | None:
    """Increments the counter. Returns _Lost if that fails for long, or the lock is no longer this process's."""
    with self._mutex:
      self._content["beat"] += 1
      try:
        version = self._file.write(_encode(self._content), self._version)
        if version is not None or self._is_mine():
          self._version, self._renewed = version or self._version, time.monotonic()
      except Exception as e:  # a store that is out of reach for a moment
        if time.monotonic() - self._renewed > _STALE_S:
          self.lost = f"{self._workdir}: its lock could not be renewed for {_STALE_S:.0f} s ({e}); start the run again"
    return _Lost if self.lost else None

  def check(self) -> None:
    """Raises UserError if the lock is lost."""
    with self._mutex, contextlib.suppress(Exception):  # as above
      self._is_mine()
    if self.lost:
      raise UserError(self.lost)

  def release(self) -> None:
    with self._mutex, contextlib.suppress(Exception):
      if self._is_mine():
        self._file.write(None, self._version)
        self.lost = "released"

  def _is_mine(self) -> bool:
    """Reads the file; sets `lost` if the lock is another's."""
    version, content = _read(self._file)
    if content.get("token") == self._content["token"]:
      self._version = version
    elif not self.lost:
      by = f"taken over by {owner.describe(content)}" if version else "removed"
      self.lost = f"{self._workdir}: its lock was {by}, so this run ends; start it again when no other runs there"
    return not self.lost


def _acquire(workdir: epath.Path) -> _Lock:
  try:
    file, content = versioned_file.open_file(workdir / NAME), {**owner.this_process(), "beat": _FIRST_BEAT}
    seen, since = None, time.monotonic()
    while True:
      version, found = _read(file)
      running = owner.is_running(found)
      stale = version == seen and time.monotonic() - since > _STALE_S
      if version is None or running is False or (running is None and stale):
        mine = file.write(_encode(content), version)
        if mine is not None:
          return _Lock(workdir, file, content, mine)
      elif running or seen not in (None, version):
        who = f"{owner.describe(found)}, since {found.get('since')}"
        raise UserError(f"{workdir} is in use by {who}; wait for it or stop it")
      elif seen is None:
        seen = version
        if found:
          say(f"{workdir} was locked by {owner.describe(found)}; watching for {_STALE_S:.0f} s whether that run lives")
      time.sleep(min(0.2, _BEAT_S / 2))
  except (UserError, ImportError):
    raise
  except Exception as e:  # gcsfs raises its own exception types
    raise UserError(f"{workdir} cannot be the workdir: {' '.join(str(e).splitlines())}") from e


def _read(file: versioned_file.VersionedFile) -> tuple[Any, dict[str, Any]]:
  """The version (None: no file), and who holds the lock; empty where nobody could write that."""
  version, data = file.read() or (None, b"")
  try:
    content = json.loads(data)
  except ValueError:
    content = {}
  return version, content if isinstance(content, dict) else {}


def _encode(content: dict[str, Any]) -> bytes:
  return json.dumps(content).encode()
