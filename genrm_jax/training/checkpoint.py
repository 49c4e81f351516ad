"""Saves checkpoints with Orbax, asynchronously, and restores the newest; training/saved.py describes a step's folder.

The newest step and the best one by held-out loss are kept.
"""

import contextlib
import dataclasses
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from genrm_jax.pytrees import TrainState
from genrm_jax.runtime import distributed
from genrm_jax.runtime.errors import UserError
from genrm_jax.training import saved
from genrm_jax.training.losses import Sums

BEST_METRIC = "eval_loss"

# TensorStore, which writes the arrays for Orbax, reports a full disk as a ValueError that ends like this.
_SYSTEM_ERROR = re.compile(r"([^:]+) \[os_error_code='\d+'\]")

# Orbax logs the traceback of a failed write, sometimes twice, and raises the error as well.
logging.getLogger("absl").addFilter(lambda r: r.levelno < logging.ERROR or "orbax" not in r.pathname)


class _FileHandler(ocp.CheckpointHandler):
  """Copies files into a checkpoint."""

  def save(self, directory: epath.Path, args: "_FileSave") -> None:
    if jax.process_index() == 0:
      for path in args.paths:
        epath.Path(path).copy(directory / epath.Path(path).name)

  def restore(self, directory: epath.Path, args: Any = None) -> epath.Path:
    return directory


@ocp.args.register_with_handler(_FileHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class _FileSave(ocp.args.CheckpointArgs):
  paths: Sequence[Any]


class _Manager(ocp.CheckpointManager):
  """Takes the losses of earlier steps from their manifests, which are checked against a digest."""

  def metrics(self, step: int) -> dict[str, float]:
    return {BEST_METRIC: saved.eval_loss(self.directory / str(step))}


class Checkpoints:
  """The checkpoints of one run. A context manager: leaving it waits for a save in progress.

  Attributes:
    unfinished: steps, in ascending order, whose save was in progress when the run was last stopped.
  """

  def __init__(self, directory: Any):
    self.directory = saved.absolute(directory)
    self.unfinished = saved.unfinished_steps(self.directory)
    self._saving = -1  # the step of the last call of `save`
    policy = checkpoint_managers.AnyPreservationPolicy(
      [
        checkpoint_managers.LatestN(1),
        checkpoint_managers.BestN(get_metric_fn=lambda m: m[BEST_METRIC], reverse=True, n=1),
      ]
    )
    with _disk_errors(f"cannot open the checkpoints in {self.directory}"):
      self._manager = _Manager(
        self.directory,
        item_names=("state", "manifest", "files"),
        options=ocp.CheckpointManagerOptions(
          preservation_policy=policy,
          best_fn=lambda m: m[BEST_METRIC],
          best_mode="min",
          prevent_write_metrics=True,
          cleanup_tmp_directories=True,
          # _FileHandler writes before the background work begins, when the directories must exist.
          async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        ),
      )

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, exc_type: type[BaseException] | None, *exc: Any) -> None:
    try:
      with self._disk_errors():
        self._manager.close()
    except UserError:
      if exc_type is None:  # otherwise the exception on its way says what went wrong first
        raise

  def save(
    self,
    state: TrainState,
    manifest: Mapping[str, Any],
    eval_loss: float,
    files: Sequence[Any] = (),
    with_frozen: bool = True,
    pending: Sequence[Sums] = (),
  ) -> None:
    """Starts to save the state under its step. Waits for the save before, if that is still in progress.

    On return the state has been copied to the host and may be donated; writing goes on in the background.

    Args:
      manifest: what the parameters mean; shapes, dtypes and digests of the arrays are added.
      eval_loss: to choose the best step by; infinite for a step that is not to be chosen.
      files: paths of files to copy into the checkpoint.
      with_frozen: whether to save the frozen parameters. Otherwise their digests are saved, so that other ones are
        refused when the run resumes.
      pending: sums of steps not reported yet, on the host.

    Raises:
      UserError: this step, or the one before, could not be written (a full disk). Earlier steps are intact.
    """
    self.wait()
    self._saving = step = int(state.step)
    arrays = saved.describe(state)
    kept = {name: a for name, a in arrays.items() if with_frozen or not name.startswith("frozen/")}
    entries = {
      **manifest,
      "step": step,
      "eval_loss": eval_loss if math.isfinite(eval_loss) else None,
      "arrays": kept,
      "left_out": {name: a for name, a in arrays.items() if name not in kept},
      "pending": [{name: [float(total), float(count)] for name, (total, count) in sums.items()} for sums in pending],
    }
    args = ocp.args.Composite(
      state=ocp.args.PyTreeSave(state if with_frozen else dataclasses.replace(state, frozen={})),
      manifest=ocp.args.JsonSave({**entries, "digest": saved.manifest_digest(entries)}),
      files=_FileSave(files),
    )
    with self._disk_errors():
      self._manager.save(step, args=args, metrics={BEST_METRIC: eval_loss}, force=True)

  def wait(self) -> None:
    """Waits for a save in progress. Raises UserError if it could not be written."""
    with self._disk_errors():
      self._manager.wait_until_finished()

  def _disk_errors(self) -> contextlib.AbstractContextManager[None]:
    return _disk_errors(f"could not write checkpoint {self._saving} in {self.directory}, earlier steps are intact")

  def _finished_steps(self) -> list[epath.Path]:
    """Newest first. In a bucket, the folder does not exist before the first save."""
    return saved.finished_steps(self.directory) if self.directory.exists() else []

  def newest_loss(self) -> float:
    """The held-out loss of the newest step; infinite before the first."""
    steps = self._finished_steps()
    return saved.eval_loss(steps[0]) if steps else math.inf

  def restore_newest(
    self, target: TrainState, expected: Mapping[str, Any], frozen: Any
  ) -> tuple[TrainState, list[Any]] | None:
    """The state of the newest whole step and the sums pending then; None before the first save.

    A damaged step is reported and renamed (`saved.damaged_name`), so that the run can write it again.

    Args:
      target: shapes, dtypes and shardings; its `frozen` is not read.
      expected: entries that the manifest must have.
      frozen: the frozen parameters, which must be those that the run began with.

    Raises:
      UserError: the manifest differs from `expected` (another model, tokenizer, data, ...), the frozen parameters are
        not those of the run, or no step is whole.
    """
    steps = self._finished_steps()
    if not steps:
      return None

    def read(step: epath.Path) -> tuple[TrainState, list[Any]]:
      manifest = saved.read_manifest(step)
      saved.check_manifest(manifest, expected, step)
      saved.check_left_out(step, {**manifest["arrays"], **manifest["left_out"]}, frozen)
      trained = {"step": target.step, "params": target.params, "opt_state": target.opt_state}
      return TrainState(**saved.read_arrays(step, manifest, trained), frozen=frozen), manifest["pending"]

    restored, used = saved.first_whole(steps, read)
    damaged = [step for step in steps if int(step.name) > int(used.name)]

    def rename_damaged() -> None:
      for step in damaged:
        with _disk_errors(f"cannot rename the damaged {step}"):
          step.rename(saved.damaged_name(step))

    distributed.from_main(rename_damaged)
    if damaged:
      self._manager.reload()
    return restored


@contextlib.contextmanager
def _disk_errors(what: str) -> Iterator[None]:
  """Turns an error of the file system into a UserError."""
  try:
    yield
  except OSError as e:
    raise UserError(f"{what}: {e}; check the folder and the free disk space") from e
  except ValueError as e:
    system_error = _SYSTEM_ERROR.search(str(e))
    if not system_error:
      raise
    raise UserError(f"{what}:{system_error[1]}; check the folder and the free disk space") from e
