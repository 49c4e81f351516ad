"""Stages: finished ones are skipped, and a workdir never mixes two configs.

    DIR/config.json          the resolved config and its hash
    DIR/stages/<name>.json   written when a stage finishes: its seconds, and fingerprints of what it read and wrote

DIR may be on gs://, and all processes must see it. Process 0 decides which stages run; stages that need no devices run
on process 0 only.
"""

import dataclasses
import functools
import hashlib
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import fsspec.core
from etils import epath

from genrm_jax.data import jsonl
from genrm_jax.runtime import distributed
from genrm_jax.runtime.errors import UserError

# Settings (dotted keys) that name locations. They may change between two starts: stages compare the content that they
# read there with what they read before.
LOCATIONS = (
  *("data_dir", "bank", "verifier", "problems", "solutions"),
  *("model.checkpoint", "tokenizer.path", "task.candidates", "task.eval.bbh"),
)
_DEVICES = ("mesh", "sharding", "cpu_devices")  # the device layout may change when a run is resumed


@dataclasses.dataclass(frozen=True)
class Stage:
  """One step from problems to the report.

  Attributes:
    name: unique in a run.
    run: does the work.
    reads: files and folders that it reads, relative to the workdir.
    writes: files and folders that it writes, relative to the workdir.
    sources: paths that it reads elsewhere, by setting: {"tokenizer.path": "/data/tokenizer.model"}.
    uses_devices: whether all processes run it; otherwise only process 0 does.
  """

  name: str
  run: Callable[[], None]
  reads: tuple[str, ...] = ()
  writes: tuple[str, ...] = ()
  sources: Mapping[str, str] = dataclasses.field(default_factory=dict)
  uses_devices: bool = False


def claim_workdir(workdir: epath.Path, config: dict[str, Any]) -> None:
  """Writes DIR/config.json, or checks that it matches. A workdir without results accepts any config.

  Raises:
    UserError: the folder belongs to another config (the message names the differing keys), holds files that are not a
      run's, or cannot be written.
  """
  path = workdir / "config.json"
  config_hash = hash_of(config)
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    # A bucket lists the object that marks a folder as a file of that name in the folder.
    in_use = any(p != path and p.exists() for p in workdir.iterdir())
  except FileNotFoundError:  # a bucket has no empty folders
    in_use = False
  except ImportError:
    raise
  except Exception as e:  # gcsfs raises its own exception types if access is denied
    raise UserError(f"{workdir} cannot be the workdir: {' '.join(str(e).splitlines())}") from e
  if path.exists():
    found = jsonl.read_json(path)
    if found.get("hash") == config_hash:
      return
    if in_use:
      keys = sorted(_changed(_identity(found.get("config", {})), _identity(config)))
      raise UserError(
        f"{workdir} was made by another config; different: {', '.join(keys[:8])}. Use another --workdir, or that config"
      )
  elif in_use:
    raise UserError(f"{workdir} is not empty but has no config.json, so no run made it; use another --workdir")
  jsonl.write_json(path, {"hash": config_hash, "config": config})


def hash_of(config: dict[str, Any]) -> str:
  """The identity of a run: a digest of its config, ignoring device layout and locations."""
  return jsonl.digest_of(_identity(config))


def _identity(config: Any, key: str = "") -> Any:
  if not isinstance(config, dict):
    return bool(config) if key in LOCATIONS else config
  inner = {name: f"{key}.{name}" if key else name for name in config}
  return {name: _identity(value, inner[name]) for name, value in config.items() if name not in _DEVICES}


def _changed(a: Any, b: Any, key: str = "") -> set[str]:
  if isinstance(a, dict) and isinstance(b, dict):
    return set().union(*(_changed(a.get(k), b.get(k), f"{key}.{k}" if key else k) for k in a.keys() | b.keys()))
  return set() if jsonl.digest_of(a) == jsonl.digest_of(b) else {key}  # to JSON a tuple is a list


def run_stages(
  workdir: epath.Path, stages: Sequence[Stage], selected: Sequence[str], say: Callable[[str], None]
) -> None:
  """Runs the selected stages (all if none is named) in order; skips finished ones.

  Raises:
    UserError: a stage is unknown, an input is missing, or files of a finished stage have changed since.
  """
  names = [s.name for s in stages]
  unknown = [name for name in selected if name not in names]
  if unknown:
    raise UserError(f"no stage {', '.join(unknown)}; there are: {', '.join(names)}")
  chosen = [s for s in stages if not selected or s.name in selected]
  num_done = 0
  for stage in chosen:
    reads = distributed.from_main(functools.partial(_begin, workdir, stage, stages))
    if reads is None:
      say(f"{stage.name}: done before")
      num_done += 1
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
  if num_done == len(chosen):
    say(f"{workdir}: everything was done before; nothing was run")


def _begin(workdir: epath.Path, stage: Stage, stages: Sequence[Stage]) -> dict[str, str] | None:
  """Fingerprints of the stage's inputs; None if it has finished. Raises UserError as `run_stages` does."""
  places = {name: workdir / name for name in stage.reads} | {k: epath.Path(path) for k, path in stage.sources.items()}
  missing = [name for name, path in places.items() if not path.exists()]
  if missing:
    makers = [s.name for s in stages if set(s.writes) & set(missing)]
    if not makers:
      raise UserError(f"stage {stage.name} needs {', '.join(f'{k} = {places[k]}' for k in missing)}: no such file")
    raise UserError(f"stage {stage.name} needs {', '.join(missing)}; run stage {', '.join(makers)} first")
  reads = {name: fingerprint(path) for name, path in places.items()}
  marker = workdir / "stages" / f"{stage.name}.json"
  if not marker.exists():
    return reads
  _check_unchanged(jsonl.read_json(marker), stage, reads, workdir)
  return None


def _check_unchanged(marker: dict[str, Any], stage: Stage, reads: dict[str, str], workdir: epath.Path) -> None:
  now = {**reads, **{p: fingerprint(workdir / p) if (workdir / p).exists() else "gone" for p in stage.writes}}
  changed = [name for name, mark in {**marker["reads"], **marker["writes"]}.items() if now.get(name) != mark]
  if changed:
    raise UserError(
      f"stage {stage.name} was done with another {', '.join(changed)} than {workdir} holds now. To do it again, "
      f"delete {workdir}/stages/{stage.name}.json and {', '.join(stage.writes)}; else restore the file"
    )


def seconds_of(workdir: epath.Path, stages: Sequence[Stage]) -> dict[str, float]:
  """Wall time in seconds of every finished stage."""
  markers = {s.name: workdir / "stages" / f"{s.name}.json" for s in stages}
  return {name: jsonl.read_json(path)["seconds"] for name, path in markers.items() if path.exists()}


def fingerprint(path: epath.Path) -> str:
  """A digest of a file's content; of a folder (a checkpoint may be large), of the names and sizes in it."""
  if path.is_file():
    return jsonl.file_digest(path)
  h = hashlib.sha256()
  files, root = fsspec.core.url_to_fs(str(path))  # lists a bucket in one call, not folder by folder
  found = files.find(root, detail=True).items()
  sizes = {pathlib.PurePosixPath(p).relative_to(root): f["size"] for p, f in found if f["type"] != "directory"}
  for name in sorted(sizes):
    h.update(f"{name} {sizes[name]}\n".encode())
  return h.hexdigest()
