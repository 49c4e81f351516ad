"""Stages: what is done is not done again, and two runs are never mixed.

DIR/config.json          the resolved config and its hash
DIR/stages/<name>.json   written when a stage is done: its seconds, and a fingerprint of what it read and wrote

DIR may be on gs://. Of many processes, which all see it, the first decides what is run, and runs alone what needs no
devices.
"""

import dataclasses
import functools
import hashlib
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import fsspec.core
from etils import epath

from genrm_jax.data import jsonl
from genrm_jax.runtime import distributed
from genrm_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Stage:
  """A step of the way from problems to the report. Paths are relative to the workdir, or absolute."""

  name: str
  run: Callable[[], None]
  reads: tuple[str, ...] = ()
  writes: tuple[str, ...] = ()
  uses_devices: bool = False  # so that all processes run it


def claim_workdir(workdir: epath.Path, config: dict[str, Any]) -> None:
  """Writes DIR/config.json, or checks that it is this config's. A folder in which nothing was made yet is free.

  Raises:
    UserError: the folder belongs to another config (the differing keys are named) or holds something else.
  """
  path = workdir / "config.json"
  config_hash = hash_of(config)
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    # An object that marks a folder of a bucket is listed in it, as if it were a file of the same name.
    in_use = any(p != path and p.exists() for p in workdir.iterdir())
  except FileNotFoundError:  # a bucket has no empty folders
    in_use = False
  except ImportError:
    raise
  except Exception as e:  # gcsfs has errors of its own for who may not enter
    raise UserError(f"{workdir} cannot be the workdir: {' '.join(str(e).splitlines())}") from e
  if path.exists():
    found = jsonl.read_json(path)
    if found.get("hash") == config_hash:
      return
    if in_use:
      keys = sorted(_changed(_without_devices(found.get("config", {})), _without_devices(config)))
      raise UserError(
        f"{workdir} was made by another config; different: {', '.join(keys[:8])}. Use another --workdir, or that config"
      )
  elif in_use:
    raise UserError(f"{workdir} is not empty and holds no config.json, so it is not a run's; use another --workdir")
  jsonl.write_json(path, {"hash": config_hash, "config": config})


def hash_of(config: dict[str, Any]) -> str:
  """The name of a run: the digest of its config, less how the devices are laid out, which may change as it goes on."""
  return jsonl.digest_of(_without_devices(config))


def _without_devices(config: Any) -> Any:
  if not isinstance(config, dict):
    return config
  return {key: _without_devices(value) for key, value in config.items() if key not in ("mesh", "cpu_devices")}


def _changed(a: Any, b: Any, key: str = "") -> set[str]:
  if isinstance(a, dict) and isinstance(b, dict):
    return set().union(*(_changed(a.get(k), b.get(k), f"{key}.{k}" if key else k) for k in a.keys() | b.keys()))
  return set() if jsonl.digest_of(a) == jsonl.digest_of(b) else {key}  # to JSON a tuple is a list


def run_stages(workdir: epath.Path, stages: Sequence[Stage], selected: Sequence[str], say: Callable[[str], None]):
  """Runs the selected stages (all if none is named) in order; a finished one is skipped.

  Raises:
    UserError: an unknown stage; an input that is not there; a finished stage whose files were changed since.
  """
  names = [s.name for s in stages]
  unknown = [name for name in selected if name not in names]
  if unknown:
    raise UserError(f"no stage {', '.join(unknown)}; there are: {', '.join(names)}")
  done = 0
  chosen = [s for s in stages if not selected or s.name in selected]
  for stage in chosen:
    reads = distributed.from_main(functools.partial(_begin, workdir, stage, stages))
    if reads is None:
      say(f"{stage.name}: done before, nothing to do")
      done += 1
      continue
    say(f"{stage.name}: starts")
    start = time.monotonic()
    if stage.uses_devices:
      stage.run()
    else:
      distributed.from_main(stage.run)
    distributed.barrier()
    seconds = time.monotonic() - start
    if distributed.is_main():
      writes = {p: fingerprint(workdir / p) for p in stage.writes}
      marker = {"seconds": round(seconds, 1), "reads": reads, "writes": writes}
      jsonl.write_json(workdir / "stages" / f"{stage.name}.json", marker)
    say(f"{stage.name}: {seconds:.0f}s")
  if done == len(chosen):
    say(f"{workdir}: all was done before; nothing was run")


def _begin(workdir: epath.Path, stage: Stage, stages: Sequence[Stage]) -> dict[str, str] | None:
  """Fingerprints of what the stage is to read; None where it was done before.

  Raises:
    UserError: as `run_stages`.
  """
  marker = workdir / "stages" / f"{stage.name}.json"
  missing = [p for p in stage.reads if not _at(workdir, p).exists()]
  if missing:
    makers = [s.name for s in stages if set(s.writes) & set(missing)]
    raise UserError(f"stage {stage.name} needs {', '.join(missing)}; run stage {', '.join(makers)} first")
  reads = {p: fingerprint(_at(workdir, p)) for p in stage.reads}
  if not marker.exists():
    return reads
  _check_unchanged(jsonl.read_json(marker), stage, reads, workdir)
  return None


def _check_unchanged(marker: dict[str, Any], stage: Stage, reads: dict[str, str], workdir: epath.Path) -> None:
  now = {**reads, **{p: fingerprint(workdir / p) if (workdir / p).exists() else "gone" for p in stage.writes}}
  changed = [p for p, mark in {**marker["reads"], **marker["writes"]}.items() if now.get(p) != mark]
  if changed:
    raise UserError(
      f"stage {stage.name} was done with another {', '.join(changed)} than {workdir} holds now. To do it again, "
      f"delete {workdir}/stages/{stage.name}.json and {', '.join(stage.writes)}; else restore the file"
    )


def _at(workdir: epath.Path, path: str) -> epath.Path:
  return epath.Path(path) if os.path.isabs(path) else workdir / path  # `/` of epath would join gs:// and a local path


def seconds_of(workdir: epath.Path, stages: Sequence[Stage]) -> dict[str, float]:
  """Wall time of every finished stage."""
  markers = {s.name: workdir / "stages" / f"{s.name}.json" for s in stages}
  return {name: jsonl.read_json(path)["seconds"] for name, path in markers.items() if path.exists()}


def fingerprint(path: epath.Path) -> str:
  """The digest of a file; of a folder (a checkpoint, which may be large) the names and sizes in it."""
  if path.is_file():
    return jsonl.file_digest(path)
  h = hashlib.sha256()
  files, root = fsspec.core.url_to_fs(str(path))  # which lists a bucket at once, and not folder by folder
  found = files.find(root, detail=True).items()
  sizes = {pathlib.PurePosixPath(p).relative_to(root): it["size"] for p, it in found if it["type"] != "directory"}
  for name in sorted(sizes):
    h.update(f"{name} {sizes[name]}\n".encode())
  return h.hexdigest()
