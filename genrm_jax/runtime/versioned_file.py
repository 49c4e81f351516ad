"""A small file that is replaced only if it has not changed since it was read: compare-and-swap, local or on gs://."""

import contextlib
import fcntl
import os
import urllib.parse
from typing import Any, Protocol

import fsspec.core
from etils import epath


class VersionedFile(Protocol):
  def read(self) -> tuple[Any, bytes] | None:
    """The version and the content; None if there is no file."""

  def write(self, data: bytes | None, version: Any) -> Any:
    """Replaces the content, or deletes the file (None), if its version is `version` (None: there is no file).

    Returns:
      The new version; None if the file has another version, and then changes nothing.
    """


def open_file(path: epath.Path) -> VersionedFile:
  """The file at a path, which need not exist. The folder is created."""
  return _Object(path) if str(path).startswith("gs://") else _Local(path)


class _Local:
  """A local file; the version is its content. Writers and readers lock the file, so that they see all of it."""

  def __init__(self, path: epath.Path):
    path.parent.mkdir(parents=True, exist_ok=True)
    self._path = os.fspath(path)

  def read(self) -> tuple[Any, bytes] | None:
    with contextlib.suppress(FileNotFoundError), open(self._path, "rb") as f:
      _flock(f, fcntl.LOCK_SH)
      data = f.read()
      return data, data
    return None

  def write(self, data: bytes | None, version: Any) -> Any:
    create = os.O_CREAT | os.O_EXCL if version is None else 0
    try:
      with os.fdopen(os.open(self._path, os.O_RDWR | create, 0o644), "r+b", buffering=0) as f:
        _flock(f, fcntl.LOCK_EX)
        replaced = not os.path.samestat(os.stat(self._path), os.fstat(f.fileno()))
        if replaced or f.read() != (version or b""):
          return None
        if data is None:
          os.unlink(self._path)
          return version
        f.seek(0)
        f.write(data)
        f.truncate()
        return data
    except FileExistsError:
      return None
    except FileNotFoundError:
      if version is None:  # no place for a new file
        raise
      return None


def _flock(f: Any, kind: int) -> None:
  with contextlib.suppress(OSError):  # some network file systems cannot; creating a file is exclusive there too
    fcntl.flock(f, kind)


class _Object:
  """An object in a bucket; the version is its generation."""

  def __init__(self, path: epath.Path):
    self._files, name = fsspec.core.url_to_fs(os.fspath(path))
    self._bucket, _, self._key = name.partition("/")

  def read(self) -> tuple[Any, bytes] | None:
    with contextlib.suppress(FileNotFoundError):
      headers, data = self._files.call("GET", "b/{}/o/{}", self._bucket, self._key, alt="media")
      return headers["X-Goog-Generation"], data
    return None

  def write(self, data: bytes | None, version: Any) -> Any:
    wanted = {"ifGenerationMatch": version or "0"}
    try:
      if data is None:
        self._files.call("DELETE", "b/{}/o/{}", self._bucket, self._key, **wanted)
        return version
      url = f"{self._files._location}/upload/storage/v1/b/{urllib.parse.quote(self._bucket)}/o"
      upload = {"uploadType": "media", "name": self._key, "data": data}
      return self._files.call("POST", url, json_out=True, **upload, **wanted)["generation"]
    except FileExistsError:  # 412: another generation
      return None
    except FileNotFoundError:
      if version is None:  # no place for a new file
        raise
      return None
