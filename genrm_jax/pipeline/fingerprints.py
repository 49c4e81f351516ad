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
    return _digest(path, fs.info(root))
  h = hashlib.sha256()
  for name, info in sorted(fs.find(root, detail=True).items()):
    if info["type"] == "directory":
      continue
    inside = str(pathlib.PurePosixPath(name).relative_to(root))
    mark = f"{inside} {info['size']}"
    if whole or info["size"] <= _SMALL_BYTES:
      mark += f" {_digest(path / inside, info)}"
    h.update(f"{mark}\n".encode())
  return h.hexdigest()


def _digest(path: epath.Path, info: Mapping[str, Any]) -> str:
  """The digest of a file's content, computed once per version: the same wherever the file lies."""
  version = info.get("generation") or info.get("mtime")
  return jsonl.file_digest(path) if version is None else _content(str(path), str(version), info["size"])


@functools.lru_cache(maxsize=4096)
def _content(path: str, version: str, size: int) -> str:
  return jsonl.file_digest(path)
