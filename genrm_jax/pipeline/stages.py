"""Stages: finished ones are skipped, and each is redone, on request, if what it depends on has changed.

    DIR/config.json                  the config of the last start
    DIR/stages/<name>.started.json   while a stage is not finished: the settings and inputs that it began with
    DIR/stages/<name>.json           when it has finished: the same, its seconds, and fingerprints of what it wrote

A stage depends on the settings that it names, on files of other stages, and on sources outside the workdir. If any of
them has changed since the stage began, the run stops and names both; with `rerun`, the stage runs again.

DIR may be on gs://, and all processes must see it. Process 0 decides which stages run; stages that need no devices run
on process 0 only.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from genrm_jax.data import jsonl
from genrm_jax.pipeline.fingerprints import fingerprint
from genrm_jax.pipeline.settings import LOCATIONS
from genrm_jax.runtime import distributed, lock
from genrm_jax.runtime.errors import UserError

# Where a run computes, and how many rows at a time, may change between two starts.
_NO_EFFECT = ("mesh", "sharding", "cpu_devices", "rows_per_batch")


@dataclasses.dataclass(frozen=True)
class Stage:
  """One step from problems to the report.

  Attributes:
    name: unique in a run.
    run: does the work.
    reads: files and folders that it reads, relative to the workdir.
    writes: files and folders that it writes, relative to the workdir.
    sources: paths that it reads elsewhere, by setting: {"tokenizer.path": "/data/tokenizer.model"}.
    settings: dotted keys of the config that its result depends on; a section stands for all in it.
    scratch: what else it leaves while it runs, removed if it is done again.
    check: raises UserError if it cannot run, say on these devices; called before the first stage runs.
    uses_devices: whether all processes run it; otherwise only process 0 does.
  """

  name: str
  run: Callable[[], None]
  reads: tuple[str, ...] = ()
  writes: tuple[str, ...] = ()
  sources: Mapping[str, str] = dataclasses.field(default_factory=dict)
  settings: tuple[str, ...] = ()
  scratch: tuple[str, ...] = ()
  check: Callable[[], object] = lambda: None
  uses_devices: bool = False


def run_stages(
  workdir: epath.Path,
  config: Mapping[str, Any],
  stages: Sequence[Stage],
  selected: Collection[str],
  say: Callable[[str], None],
  rerun: bool = False,
) -> None:
  """Runs the selected stages (all if none is named) in order; skips finished ones.

  Args:
    workdir: folder of the run.
    config: the resolved settings.
    stages: all stages of the run, in order.
    selected: names.
    say: prints a message.
    rerun: whether stages whose settings, inputs or results have changed are done again, instead of refused.

  Raises:
    UserError: a stage is unknown, an input is missing, the workdir is not a run's or cannot be written; or, without
      `rerun`, something has changed since a stage began.
  """
  names = [s.name for s in stages]
  unknown = [name for name in selected if name not in names]
  if unknown:
    raise UserError(f"no stage {', '.join(unknown)}; there are: {', '.join(names)}")
  chosen = [s for s in stages if not selected or s.name in selected]
  distributed.from_main(functools.partial(_check_workdir, workdir))
  with lock.hold(workdir):
    _run(_Book(workdir, config, stages, frozenset(s.name for s in chosen), rerun), chosen, say)


def _run(book: "_Book", chosen: Sequence[Stage], say: Callable[[str], None]) -> None:
  unfinished = distributed.from_main(book.open)
  for stage in chosen:
    if stage.name in unfinished:
      stage.check()
  num_done = 0
  for stage in chosen:
    if not distributed.from_main(functools.partial(book.begin, stage, say)):
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
    distributed.from_main(functools.partial(book.end, stage, seconds))
    say(f"{stage.name}: {seconds:.0f}s")
  if num_done == len(chosen):
    say(f"{book.workdir}: everything was done before; nothing was run")


class _Entry(NamedTuple):
  """What is on record of a stage; `is_done` is false while it has only begun."""

  is_done: bool
  settings: dict[str, Any]
  reads: dict[str, str]
  writes: dict[str, str]


class _Book:
  """The records of a workdir's stages; process 0 reads and writes them."""

  def __init__(self, workdir: epath.Path, config: Mapping[str, Any], stages: Sequence[Stage], chosen, rerun: bool):
    self.workdir, self._stages, self._chosen, self._rerun = workdir, stages, chosen, rerun
    self._config = {**config}
    self._by_name = {stage.name: stage for stage in stages}
    self._writer = {path: stage for stage in stages for path in stage.writes}
    self._entries: dict[str, _Entry | None] = {}
    self._started: dict[str, Any] = {}  # of the stage that runs

  def open(self) -> list[str]:
    """Claims the workdir for the config, after checking all records that the chosen stages build on.

    Returns:
      The chosen stages that are not finished.
    """
    outdated = {s.name: why for s in self._built_on() if (why := self._why_outdated(s))}
    left = {name: why for name, why in outdated.items() if not self._rerun or name not in self._chosen}
    if left:
      raise UserError(self._refusal(left))
    path, now = self.workdir / "config.json", {"hash": hash_of(self._config), "config": self._config}
    if not path.exists() or jsonl.digest_of(jsonl.read_json(path)) != jsonl.digest_of(now):
      jsonl.write_json(path, now)
    entries = {name: self._entry(stage) for name, stage in self._by_name.items() if name in self._chosen}
    return [name for name, entry in entries.items() if name in outdated or not (entry and entry.is_done)]

  def begin(self, stage: Stage, say: Callable[[str], None]) -> bool:
    """Records that a stage is about to run; false if it has finished."""
    lock.check()
    reads = self._fingerprints(stage)
    entry = self._entry(stage)
    if entry:
      why = self._why_outdated(stage) or self._changes(stage, entry, reads)
      if not why and entry.is_done:
        return False
      if why and not self._rerun:
        raise UserError(self._refusal({stage.name: why}))
      if why:
        say(f"{stage.name}: done again, since {why}")
        self._remove(stage)
    self._started = {"settings": self._settings(stage), "reads": reads}
    jsonl.write_json(self._file(stage, "started.json"), self._started)
    self._entries.pop(stage.name, None)
    return True

  def end(self, stage: Stage, seconds: float) -> None:
    """Records that a stage has finished."""
    lock.check()
    writes = {p: fingerprint(self.workdir / p) for p in stage.writes}
    jsonl.write_json(self._file(stage, "json"), {"seconds": round(seconds, 1), **self._started, "writes": writes})
    self._file(stage, "started.json").unlink(missing_ok=True)
    self._entries.pop(stage.name, None)

  def _file(self, stage: Stage, suffix: str) -> epath.Path:
    return self.workdir / "stages" / f"{stage.name}.{suffix}"

  def _settings(self, stage: Stage) -> dict[str, Any]:
    return {key: value for key, value in _flat(self._config) if covers(stage.settings, key)}

  def _entry(self, stage: Stage) -> _Entry | None:
    """The record of a stage, read once. Raises UserError if it is not what a stage writes."""
    if stage.name not in self._entries:
      self._entries[stage.name] = self._read(stage)
    return self._entries[stage.name]

  def _read(self, stage: Stage) -> _Entry | None:
    done, started = self._file(stage, "json"), self._file(stage, "started.json")
    if not done.exists() and not started.exists():
      return None
    path = done if done.exists() else started
    shape = {"settings": dict, "reads": dict} | ({"writes": dict, "seconds": float} if path is done else {})
    found = jsonl.read_object(path, shape)
    return _Entry(path is done, found["settings"], found["reads"], found.get("writes", {}))

  def _built_on(self) -> list[Stage]:
    """The chosen stages and those whose files they need, in order."""
    needed: set[str] = set()
    out = []
    for stage in reversed(self._stages):
      if stage.name in self._chosen or needed & set(stage.writes):
        out.append(stage)
        needed |= set(stage.reads)
    return out[::-1]

  def _why_outdated(self, stage: Stage) -> str:
    """What the records say has changed since a stage began; "" for nothing."""
    entry = self._entry(stage)
    if entry is None:
      return ""
    now = self._settings(stage)
    changed = [key for key in {**now, **entry.settings} if not _equal(now.get(key), entry.settings.get(key))]
    why = [f"{', '.join(sorted(changed)[:8])} {'has' if len(changed) == 1 else 'have'} changed"] if changed else []
    for other in self._stages[: self._stages.index(stage)]:
      before = self._entry(other)
      if before is None or before == entry:
        continue
      made = [p for p, mark in entry.reads.items() if before.writes.get(p, mark) != mark]
      same = [key for key in stage.sources if before.reads.get(key, entry.reads.get(key)) != entry.reads.get(key)]
      if made:
        why.append(f"it read another {', '.join(made)} than stage {other.name} wrote")
      if same:
        why.append(f"it read another {', '.join(same)} than stage {other.name}")
    return "; ".join(why)

  def _changes(self, stage: Stage, entry: _Entry, reads: Mapping[str, str]) -> str:
    """What has changed on disk since a stage began; "" for nothing."""
    changed = [name for name in {**entry.reads, **reads} if reads.get(name) != entry.reads.get(name)]
    if entry.is_done:
      now = {p: fingerprint(self.workdir / p) if (self.workdir / p).exists() else "gone" for p in stage.writes}
      changed += [p for p in stage.writes if now[p] != entry.writes.get(p)]
    return f"{', '.join(changed)} {'has' if len(changed) == 1 else 'have'} changed" if changed else ""

  def _fingerprints(self, stage: Stage) -> dict[str, str]:
    """Fingerprints of a stage's inputs. Raises UserError if one is missing or not what its stage wrote."""
    missing = [p for p in stage.reads if not (self.workdir / p).exists()]
    makers_of = {p: self._writer[p] for p in stage.reads if p in self._writer}
    unfinished = [p for p, maker in makers_of.items() if not ((entry := self._entry(maker)) and entry.is_done)]
    if missing or unfinished:
      makers = [s.name for s in self._stages if {*s.writes} & {*missing, *unfinished}]
      what = ", ".join(missing or unfinished)
      if not makers:
        raise UserError(f"stage {stage.name} needs {what}: no such file in {self.workdir}")
      raise UserError(f"stage {stage.name} needs {what}; run stage {', '.join(makers)} first")
    for key, path in stage.sources.items():
      if not epath.Path(path).exists():
        raise UserError(f"stage {stage.name} needs {key} = {path}: no such file")
    reads = {p: fingerprint(self.workdir / p) for p in stage.reads}
    for path, maker in makers_of.items():
      entry = self._entry(maker)
      if entry and entry.writes.get(path) != reads[path]:
        raise UserError(
          f"{path} is not what stage {maker.name} wrote; restore it, or add --rerun to do stage {maker.name} again"
        )
    sources = {key: fingerprint(epath.Path(path), whole=True) for key, path in stage.sources.items()}
    for other in self._stages[: self._stages.index(stage)]:
      before = self._entry(other)
      differ = [k for k, mark in sources.items() if before and before.reads.get(k, mark) != mark]
      if differ:
        raise UserError(
          f"stage {stage.name}: {differ[0]} is not what stage {other.name} read; restore it, or add --rerun to do "
          f"stage {other.name} again"
        )
    return reads | sources

  def _remove(self, stage: Stage) -> None:
    for path in (*stage.writes, *stage.scratch):
      place = self.workdir / path
      if place.is_dir():
        place.rmtree()
      else:
        place.unlink(missing_ok=True)
    for suffix in ("json", "started.json"):
      self._file(stage, suffix).unlink(missing_ok=True)
    self._entries.pop(stage.name, None)

  def _refusal(self, why: Mapping[str, str]) -> str:
    reasons = "; ".join(f"stage {name} was begun or done, but {reason}" for name, reason in why.items())
    return (
      f"{self.workdir}: {reasons}. Add --rerun to do {'it' if len(why) == 1 else 'them'} again (with what builds on "
      "it; other stages stay), restore what has changed, or use another --workdir"
    )


def _check_workdir(workdir: epath.Path) -> None:
  """Raises UserError if the folder holds files but no run's, or cannot be written."""
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    # A bucket lists the object that marks a folder as a file of that name in the folder. A kill leaves hidden files.
    names = {p.name for p in workdir.iterdir() if p.exists() and not p.name.startswith(".")} - {lock.NAME}
  except FileNotFoundError:  # a bucket has no empty folders
    return
  except ImportError:
    raise
  except Exception as e:  # gcsfs raises its own exception types if access is denied
    raise UserError(f"{workdir} cannot be the workdir: {' '.join(str(e).splitlines())}") from e
  if names and not names & {"config.json", "stages"}:
    raise UserError(f"{workdir} is not empty but has no config.json, so no run made it; use another --workdir")


def hash_of(config: Mapping[str, Any]) -> str:
  """The identity of a run: a digest of its config, ignoring device layout and locations."""
  return jsonl.digest_of(dict(_flat(config)))


def _flat(config: Any, key: str = "") -> Iterator[tuple[str, Any]]:
  """Settings by dotted key. Of a location, whether it is set; those without effect on results are left out."""
  if isinstance(config, Mapping) and config:
    for name, value in config.items():
      if name not in _NO_EFFECT:
        yield from _flat(value, f"{key}.{name}" if key else str(name))
  else:
    yield key, bool(config) if key in LOCATIONS else config


def covers(settings: Sequence[str], key: str) -> bool:
  return any(key == s or key.startswith(f"{s}.") for s in settings)


def _equal(a: Any, b: Any) -> bool:
  return jsonl.digest_of(a) == jsonl.digest_of(b)  # to JSON a tuple is a list


def seconds_of(workdir: epath.Path, stages: Sequence[Stage]) -> dict[str, float]:
  """Wall time in seconds of every finished stage."""
  markers = {s.name: workdir / "stages" / f"{s.name}.json" for s in stages}
  return {name: jsonl.read_json(path)["seconds"] for name, path in markers.items() if path.exists()}
