"""Writing checkpoints, by Orbax, and going on from the newest; train/saved.py says what a step's folder holds.

The newest step and the best, by the loss on held-out rows, are kept.
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
from genrm_jax.train import saved
from genrm_jax.train.losses import Sums

BEST_METRIC = "eval_loss"

# TensorStore, which writes the arrays for Orbax, reports a full disk as a ValueError that ends like this.
_SYSTEM_ERROR = re.compile(r"([^:]+) \[os_error_code='\d+'\]")


class _FileHandler(ocp.CheckpointHandler):
  """Copies files into a checkpoint, so that they are there when it is."""

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


class Checkpoints:
  """The checkpoints of one run. A context manager: leaving it waits for what is still being written."""

  def __init__(self, directory: Any):
    self.directory = saved.absolute(directory)
    policy = checkpoint_managers.AnyPreservationPolicy(
      [
        checkpoint_managers.LatestN(1),
        checkpoint_managers.BestN(get_metric_fn=lambda m: m[BEST_METRIC], reverse=True, n=1),
      ]
    )
    with _written(f"cannot open the checkpoints in {self.directory}"):
      self._manager = ocp.CheckpointManager(
        self.directory,
        item_names=("state", "manifest", "files"),
        options=ocp.CheckpointManagerOptions(
          preservation_policy=policy,
          best_fn=lambda m: m[BEST_METRIC],
          best_mode="min",
          enable_async_checkpointing=False,
        ),
      )

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *exc) -> None:
    self._manager.close()

  def save(
    self,
    state: TrainState,
    manifest: Mapping[str, Any],
    eval_loss: float,
    files: Sequence[Any] = (),
    with_frozen: bool = True,
    pending: Sequence[Sums] = (),
  ) -> None:
    """Writes the state under its step, and the manifest with what is said of its arrays.

    Args:
      state: of the training.
      manifest: what the parameters mean.
      eval_loss: for choosing the best step.
      files: paths of files that go into the checkpoint.
      with_frozen: whether the frozen parameters go into it too. Without them their digests do, so that another base
        cannot take their place.
      pending: the sums of steps that are not reported yet, as NumPy.

    Raises:
      UserError: it cannot be written (a full disk); earlier steps stay.
    """
    step = int(state.step)
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
    with _written(f"could not write checkpoint {step} in {self.directory}, earlier steps are whole"):
      self._manager.save(step, args=args, metrics={BEST_METRIC: eval_loss}, force=True)

  def _finished_steps(self) -> list[epath.Path]:
    """The newest first; none before the first save, when there is no folder in a bucket."""
    return saved.finished_steps(self.directory) if self.directory.exists() else []

  def newest_loss(self) -> float:
    """The loss on held-out rows of the newest step; infinite before the first."""
    steps = self._finished_steps()
    return saved.eval_loss(steps[0]) if steps else math.inf

  def restore_newest(
    self, where: TrainState, expected: Mapping[str, Any], frozen: Any
  ) -> tuple[TrainState, list[Any]] | None:
    """The state of the newest whole step, and what was pending then; None before the first save.

    A damaged step is named aloud and set aside as `<step>.damaged`, so that the run can write it again.

    Args:
      where: shapes, dtypes and shardings; its `frozen` is not read.
      expected: what the manifest must say.
      frozen: the frozen parameters, which must be those that the run began with.

    Raises:
      UserError: the manifest differs from `expected` in one of its entries (another model, tokenizer, data, ...), or
        the frozen parameters from those of the run; or no step is whole.
    """
    steps = self._finished_steps()
    if not steps:
      return None

    def read(step: epath.Path) -> tuple[TrainState, list[Any]]:
      manifest = saved.read_manifest(step)
      saved.check_manifest(manifest, expected, step)
      saved.check_left_out(step, {**manifest["arrays"], **manifest["left_out"]}, frozen)
      read = {"step": where.step, "params": where.params, "opt_state": where.opt_state}
      return TrainState(**saved.read_arrays(step, manifest, read), frozen=frozen), manifest["pending"]

    restored, used = saved.first_whole(steps, read)
    damaged = [step for step in steps if int(step.name) > int(used.name)]

    def set_aside() -> None:
      for step in damaged:
        step.rename(step.parent / f"{step.name}.damaged")

    distributed.from_main(set_aside)
    if damaged:
      self._manager.reload()
    return restored


@contextlib.contextmanager
def _written(what: str) -> Iterator[None]:
  """Turns what the system says of the disk into a UserError."""
  orbax_log = logging.getLogger("absl")
  level = orbax_log.level
  orbax_log.setLevel(logging.CRITICAL)  # or Orbax prints the traceback of a failed write as well
  try:
    yield
  except OSError as e:
    raise UserError(f"{what}: {e}; check the folder and the space on the disk") from e
  except ValueError as e:
    system_error = _SYSTEM_ERROR.search(str(e))
    if not system_error:
      raise
    raise UserError(f"{what}:{system_error[1]}; check the folder and the space on the disk") from e
  finally:
    orbax_log.setLevel(level)
