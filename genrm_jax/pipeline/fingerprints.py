"""Digests by which stages notice that a file or folder is not what it was."""

import functools
import hashlib
import pathlib
from collections.abc import Mapping
from typing import Any

import fsspec.core
from etils import epath

from genrm_jax.data import jsonl

_SMALL_BYTES = 1 << 20


def fingerprint(path: epath.Path, whole: bool = False) -> str:
  """A digest of the content of a file, or of the names, sizes and contents of the files in a folder.

  Args:
    path: local or in a bucket.
    whole: whether files above 1 MiB in a folder are read, too. A checkpoint of this library does not need it: its
      manifest, a small file, holds a digest of every array.
  """
  fs, root = fsspec.core.url_to_fs(str(path))  # lists a bucket in one call, not folder by folder
  if path.is_file():
    return _stored(fs.info(root)) or _content(str(path), *_version(path))
  h = hashlib.sha256()
  for name, info in sorted(fs.find(root, detail=True).items()):
    if info["type"] == "directory":
      continue
    mark = f"{pathlib.PurePosixPath(name).relative_to(root)} {info['size']}"
    if whole or info["size"] <= _SMALL_BYTES:
      file = path / str(pathlib.PurePosixPath(name).relative_to(root))
      mark += f" {_stored(info) or _content(str(file), *_version(file))}"
    h.update(f"{mark}\n".encode())
  return h.hexdigest()


def _stored(info: Mapping[str, Any]) -> str | None:
  """The digest that a bucket keeps of an object."""
  return info.get("md5Hash") or info.get("crc32c")


def _version(path: epath.Path) -> tuple[int, int]:
  """What tells that a local file was written again; files in buckets are read each time."""
  if "://" in str(path):
    return next(_never), 0
  stat = pathlib.Path(path).stat()
  return stat.st_mtime_ns, stat.st_size


_never = iter(range(-1, -(2**62), -1))


@functools.lru_cache(maxsize=4096)
def _content(path: str, mtime_ns: int, size: int) -> str:
  return jsonl.file_digest(path)
