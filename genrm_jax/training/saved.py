"""Reads checkpoints. A step's folder is self-contained: it can be moved, and read on any devices.

    <step>/state      Orbax: step, params, opt_state; with adapters also frozen, the parameters beside them
    <step>/manifest   JSON: what the parameters mean; shape, dtype and digest of every array; its own digest
    <step>/files      other files needed to open the checkpoint, such as the tokenizer's

Everything read is checked against its digest. A mismatch raises `Damaged`; `first_whole` then tries the next step.
"""

import asyncio
import contextlib
import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import flax.traverse_util
import fsspec.config
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from genrm_jax.runtime import distributed, memory
from genrm_jax.runtime.errors import UserError
from genrm_jax.runtime.progress import say
from genrm_jax.training import digests

T = TypeVar("T")
_UNFINISHED = ".orbax-checkpoint-tmp"

# By default gcsfs caches listings, and does not see what other processes write and delete.
fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)


class Damaged(UserError):
  """A checkpoint of this library that cannot be read, or differs from what was written."""


def absolute(path: Any) -> epath.Path:
  """The path as Orbax needs it, `~` expanded; paths of remote stores are absolute already."""
  path = epath.Path(path).expanduser()
  return path if "://" in str(path) else epath.Path(path.absolute())


def damaged_name(path: epath.Path) -> epath.Path:
  """Where to keep what is damaged: <path>.damaged or, if that is taken, <path>.damaged_2, ..."""
  names = (path.parent / f"{path.name}.damaged{f'_{n}' if n > 1 else ''}" for n in itertools.count(1))
  return next(name for name in names if not name.exists())


def finished_steps(run: epath.Path) -> list[epath.Path]:
  """The folders of a run's finished steps, newest first."""
  if not run.is_dir():
    # In a bucket without read access, folders do not seem to exist.
    access = ", and who may read the bucket" if "://" in str(run) else ""
    raise UserError(f"no checkpoint at {run}: check the path{access}, or run the stage that trains it first")
  return [run / str(step) for step in sorted(ocp.utils.checkpoint_steps(run), reverse=True)]


def unfinished_steps(run: epath.Path) -> list[int]:
  """Steps whose save was interrupted, in ascending order: a temporary folder, or in a bucket one without its marker."""
  if not run.is_dir():
    return []
  found = (re.fullmatch(rf"(\d+)({re.escape(_UNFINISHED)}.*)?", path.name) for path in run.iterdir())
  return sorted({int(match[1]) for match in found if match} - set(ocp.utils.checkpoint_steps(run)))


def find(path: Any) -> list[epath.Path]:
  """The steps that a path may refer to, in the order in which to try them.

  Args:
    path: of a run (DIR/checkpoints/<run>): its best step by held-out loss, then the others, newest first. Or of one
      step, under any name.

  Raises:
    UserError: no such folder, no finished step in it, or not a checkpoint of this library.
  """
  folder = absolute(path)
  if _UNFINISHED in folder.name:
    raise UserError(f"{folder} is unfinished: its run was stopped while saving it; use another step of the run")
  if _is_step(folder):
    return [folder]
  steps = finished_steps(folder)
  if not steps:
    unfinished = [p.name for p in folder.iterdir() if _UNFINISHED in p.name]
    also = f" (unfinished: {', '.join(unfinished)})" if unfinished else ""
    raise UserError(
      f"no finished checkpoint of genrm-jax in {folder}{also}; give a run's folder (WORKDIR/checkpoints/RUN) or one of "
      "its steps, or run the stage that trains it first"
    )
  losses = {step: eval_loss(step) for step in steps}
  best = min(steps, key=lambda step: losses[step])
  return [best, *(step for step in steps if step != best)]


def _is_step(folder: epath.Path) -> bool:
  return (folder / "state").is_dir() or (folder / "manifest").is_dir()


def eval_loss(step: epath.Path) -> float:
  """The held-out loss of a step; infinite if it has none or is damaged."""
  try:
    loss = read_manifest(step)["eval_loss"]
  except UserError:
    return math.inf
  return loss if loss is not None and math.isfinite(loss) else math.inf


def first_whole(steps: Sequence[epath.Path], read: Callable[[epath.Path], T]) -> tuple[T, epath.Path]:
  """The result of `read` for the first whole step, and that step; logs the damaged ones before it.

  Raises:
    UserError: no step is whole; or `read` raises one other than `Damaged`.
  """
  reasons = []
  for step in steps:
    try:
      result = read(step)
    except Damaged as e:
      reasons.append(str(e))
      continue
    if reasons:
      say(f"warning: {'; '.join(reasons)}. The checkpoint {step} is whole and is used instead")
    return result, step
  raise UserError(f"{'; '.join(reasons)}. There is no other whole step: copy it again, or train again")


def manifest_digest(manifest: Mapping[str, Any]) -> str:
  """SHA-256 of a manifest, apart from the digest entry itself."""
  rest = {key: value for key, value in manifest.items() if key != "digest"}
  return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_manifest(step: epath.Path) -> dict[str, Any]:
  """The manifest of a step.

  Raises:
    UserError: it is a checkpoint of another version.
    Damaged: it is not a checkpoint of this library; or the manifest is missing, is not JSON, or differs from what was
      written.
  """
  if not _is_step(step):
    raise Damaged(f"{step} is not a checkpoint of genrm-jax: there is no manifest in it")
  path = step / "manifest" / "metadata"
  try:
    manifest = json.loads(path.read_text())
  except (OSError, ValueError, RecursionError) as e:
    raise Damaged(f"checkpoint {step} is damaged: its manifest cannot be read ({e})") from e
  if not isinstance(manifest, dict) or "digest" not in manifest:
    raise UserError(f"{step} is not a checkpoint of this version of genrm-jax: its manifest has no digest")
  if manifest_digest(manifest) != manifest["digest"]:
    raise Damaged(f"checkpoint {step} is damaged: its manifest differs from what was written")
  with reading_manifest(step):
    _check_kinds(manifest)
  return manifest


@contextlib.contextmanager
def reading_manifest(step: epath.Path) -> Iterator[None]:
  """Within, an entry of the manifest that is missing or of a wrong kind raises UserError."""
  try:
    yield
  except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as e:
    raise UserError(
      f"{step} is not a checkpoint of this version of genrm-jax: an entry of its manifest is missing or of a wrong "
      f"kind ({repr(e)[:200]}); use the version that wrote it"
    ) from e


def _check_kinds(manifest: Mapping[str, Any]) -> None:
  """Raises ValueError or KeyError unless the entries that `Checkpoints.save` adds have their kinds."""
  arrays = [*manifest["arrays"].values(), *manifest["left_out"].values()]
  sums = [pair for entry in manifest["pending"] for pair in entry.values()]
  wrong = {
    "step": type(manifest["step"]) is not int,
    "eval_loss": manifest["eval_loss"] is not None and type(manifest["eval_loss"]) not in (int, float),
    "pending": any(type(n) not in (int, float) for pair in sums for n in pair) or {len(pair) for pair in sums} - {2},
    "arrays": any(type(n) is not int or n < 0 for array in arrays for n in array["shape"])
    or any(type(array[key]) is not str for array in arrays for key in ("dtype", "digest")),
  }
  if found := [key for key, is_wrong in wrong.items() if is_wrong]:
    raise ValueError(found[0])


def read_arrays(step: epath.Path, manifest: Mapping[str, Any], target: Any) -> Any:
  """Some of a step's arrays, checked against their digests.

  Args:
    target: a tree of ShapeDtypeStruct. One with a sharding gives a jax.Array, one without a NumPy array.

  Raises:
    UserError: the checkpoint lacks an array or has it in another shape or dtype; too little memory.
    Damaged: an array cannot be read or differs from what was written.
  """
  _check_held(step, manifest["arrays"], target)
  memory.check_fits(f"the arrays of checkpoint {step}", target)
  args = ocp.args.PyTreeRestore(item=target, restore_args=jax.tree.map(_restore_args, target), partial_restore=True)
  tree, reason = None, ""
  # The handler, not the checkpointer, which would wait for a process that has failed.
  with contextlib.closing(ocp.PyTreeCheckpointHandler()) as reader:
    try:
      with _quiet_event_loops():
        tree = reader.restore(step / "state", args=args)
    except Exception as e:  # damaged files raise many types of exceptions
      reason = f"{type(e).__name__} while reading ({next(iter(str(e).splitlines()), '')[:200]})"
  _raise_if_damaged(step, reason)
  written = {name: manifest["arrays"][name]["digest"] for name in digests.names_of(target)}
  changed = [name for name, digest in digests.of_tree(tree).items() if digest != written[name]]
  _raise_if_damaged(step, f"{', '.join(changed[:3])} differs from what was written" if changed else "")
  return tree


class _EventLoop(asyncio.SelectorEventLoop):
  """Shows no failure but the first.

  When a read fails, Orbax raises its error and closes its loop. TensorStore then reports the reads still in progress,
  and each would print a traceback.
  """

  def call_exception_handler(self, context: Any) -> None:
    pass

  def call_soon_threadsafe(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
    try:
      return super().call_soon_threadsafe(*args, **kwargs)
    except RuntimeError:
      if not self.is_closed():
        raise


class _Policy(asyncio.DefaultEventLoopPolicy):
  def new_event_loop(self) -> asyncio.AbstractEventLoop:
    return _EventLoop()


@contextlib.contextmanager
def _quiet_event_loops() -> Iterator[None]:
  policy = asyncio.get_event_loop_policy()
  asyncio.set_event_loop_policy(_Policy())
  try:
    yield
  finally:
    asyncio.set_event_loop_policy(policy)


def _raise_if_damaged(step: epath.Path, reason: str) -> None:
  """Raises Damaged on all processes if any has a reason; each of them reads only its own shards."""
  reasons = [found for found in distributed.exchange(reason) if found]
  if reasons:
    raise Damaged(f"checkpoint {step} is damaged: {reasons[0]}")


def read_params(step: epath.Path, manifest: Mapping[str, Any], shardings: Mapping[str, Any] | None) -> dict[str, Any]:
  """All saved parameters, trained and frozen, as one tree, without the optimizer's state.

  Args:
    shardings: by path ("layers/q"); None gives NumPy arrays.
  """
  flat: dict[str, Any] = {}
  for name, array in manifest["arrays"].items():
    part, _, rest = name.partition("/")
    if part in ("params", "frozen"):
      sharding = None if shardings is None else shardings[rest]
      flat[name] = jax.ShapeDtypeStruct(array["shape"], jnp.dtype(array["dtype"]), sharding=sharding)
  tree = read_arrays(step, manifest, flax.traverse_util.unflatten_dict(flat, sep="/"))
  return {**tree.get("frozen", {}), **tree["params"]}


def check_left_out(step: epath.Path, arrays: Mapping[str, Any], frozen: Any) -> None:
  """Raises UserError unless `frozen` are the parameters beside which a step's adapters were trained.

  Args:
    arrays: entries of the step's manifest, by path ("frozen/final_norm").
  """
  for name, digest in digests.of_tree({"frozen": frozen}).items():
    if name not in arrays or arrays[name]["digest"] != digest:
      raise UserError(
        f"checkpoint {step} was trained beside other frozen parameters: {name} differs. Use the base that it was "
        "trained from, in the same dtype"
      )


def describe(tree: Any) -> dict[str, dict[str, Any]]:
  """Shape, dtype and digest of every array of a tree, by path."""
  found = digests.of_tree(tree)
  return {
    name: {"shape": list(np.shape(leaf)), "dtype": str(leaf.dtype), "digest": found[name]}
    for name, leaf in digests.names_of(tree).items()
  }


def _restore_args(target: jax.ShapeDtypeStruct) -> ocp.RestoreArgs:
  if target.sharding is None:
    return ocp.RestoreArgs(restore_type=np.ndarray)
  return ocp.ArrayRestoreArgs(sharding=target.sharding, global_shape=target.shape, dtype=target.dtype)


def _check_held(step: epath.Path, arrays: Mapping[str, Any], target: Any) -> None:
  for name, like in digests.names_of(target).items():
    wanted = f"{like.dtype}{list(like.shape)}"
    held = f"{arrays[name]['dtype']}{arrays[name]['shape']}" if name in arrays else "missing"
    if held != wanted:
      raise UserError(
        f"checkpoint {step} was made by something else: {name} is {held}, the config's is {wanted}. "
        "Use the config that made it, or another workdir."
      )


def check_manifest(found: Mapping[str, Any], expected: Mapping[str, Any], step: Any) -> None:
  """Raises UserError with the first entries in which a step's manifest differs from what is expected."""
  decisive = {key: value for key, value in expected.items() if key != "scoring"}  # how it scores may change later
  differences = [
    f"{key}: the checkpoint has {a!r}, the config {b!r}" for key, a, b in _differences(found, decisive) if a != b
  ]
  if differences:
    raise UserError(
      f"checkpoint {step} was made by something else:\n  "
      + "\n  ".join(differences[:8])
      + "\nUse the config that made it, or another workdir."
    )


def _differences(found: Any, expected: Any, key: str = ""):
  if isinstance(expected, Mapping) and isinstance(found, Mapping):
    for name in sorted(expected):
      yield from _differences(found.get(name), expected[name], f"{key}.{name}" if key else name)
  else:
    yield key, found, expected
