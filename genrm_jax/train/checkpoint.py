"""Checkpoints by Orbax: `DIR/<step>/{state,manifest}`; the newest and the best are kept.

The manifest (JSON) names what the parameters mean: the model's configuration, tokenizer, prompt format, verdict ids,
verifier, data hash, code version.
"""

import contextlib
import logging
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from genrm_jax.errors import UserError
from genrm_jax.types import TrainState

BEST_METRIC = "eval_loss"

# TensorStore, which writes the arrays for Orbax, reports a full disk as a ValueError that ends like this.
_SYSTEM_ERROR = re.compile(r"([^:]+) \[os_error_code='\d+'\]")


class Checkpoints:
  """The checkpoints of one run. A context manager: leaving it waits for what is still being written."""

  def __init__(self, directory: pathlib.Path):
    self.directory = pathlib.Path(directory).absolute()
    policy = checkpoint_managers.AnyPreservationPolicy(
      [
        checkpoint_managers.LatestN(1),
        checkpoint_managers.BestN(get_metric_fn=lambda m: m[BEST_METRIC], reverse=True, n=1),
      ]
    )
    with _written(f"cannot open the checkpoints in {self.directory}"):
      self._manager = ocp.CheckpointManager(
        self.directory,
        item_names=("state", "manifest"),
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

  def latest_step(self) -> int | None:
    return self._manager.latest_step()

  def best_step(self) -> int | None:
    return self._manager.best_step()

  def save(self, state: TrainState, manifest: dict[str, Any], eval_loss: float) -> None:
    """Writes the state under its step. A failed write (a full disk) is a UserError; earlier steps stay."""
    with _written(f"could not write checkpoint {int(state.step)} in {self.directory}, earlier steps are whole"):
      self._manager.save(
        int(state.step),
        args=ocp.args.Composite(state=ocp.args.StandardSave(state), manifest=ocp.args.JsonSave(manifest)),
        metrics={BEST_METRIC: eval_loss},
        force=True,
      )

  def manifest(self, step: int) -> dict[str, Any]:
    try:
      return self._manager.restore(step, args=ocp.args.Composite(manifest=ocp.args.JsonRestore()))["manifest"]
    except (FileNotFoundError, KeyError, ValueError) as e:
      raise UserError(f"{self.directory}/{step} is not a checkpoint of this library ({e})") from e

  def restore(self, step: int, abstract_state: TrainState, expected: dict[str, Any]) -> TrainState:
    """The state of a step, in the shapes, dtypes and shardings of `abstract_state`.

    Raises:
      UserError: the manifest differs from `expected` in one of its entries (another model, tokenizer, data, ...).
    """
    check_manifest(self.manifest(step), expected, f"{self.directory}/{step}")
    restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state)))
    return restored["state"]


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


def check_manifest(found: dict[str, Any], expected: dict[str, Any], where: str) -> None:
  """UserError that names the first entries in which a checkpoint differs from what is expected of it."""
  differences = [
    f"{key}: the checkpoint has {a!r}, the config {b!r}" for key, a, b in _differences(found, expected) if a != b
  ]
  if differences:
    raise UserError(
      f"checkpoint {where} was made by something else:\n  "
      + "\n  ".join(differences[:8])
      + "\nUse the config that made it, or another workdir."
    )


def _differences(found: Any, expected: Any, key: str = ""):
  if isinstance(expected, dict) and isinstance(found, dict):
    for name in sorted(expected):
      yield from _differences(found.get(name), expected[name], f"{key}.{name}" if key else name)
  else:
    yield key, found, expected


def load_params(directory: pathlib.Path, expected: dict[str, Any], abstract_params: Any) -> tuple[Any, int]:
  """Parameters alone (no optimiser) of a run's best step, and that step."""
  directory = pathlib.Path(directory)
  if not directory.is_dir():
    raise UserError(f"no checkpoint at {directory}: run the stage that trains it first")
  with Checkpoints(directory) as checkpoints:
    step = checkpoints.best_step()
    if step is None:
      raise UserError(f"no finished checkpoint in {directory}: run the stage that trains it first")
    check_manifest(checkpoints.manifest(step), expected, f"{directory}/{step}")
  with ocp.PyTreeCheckpointer() as reader:
    args = ocp.args.PyTreeRestore(
      item={"params": abstract_params},
      restore_args={"params": ocp.checkpoint_utils.construct_restore_args(abstract_params)},
      partial_restore=True,
    )
    restored = reader.restore(directory.absolute() / str(step) / "state", args=args)
  return jax.tree.map(lambda x: x, restored["params"]), step
