"""The training loop: read, update, report, evaluate, save. A stopped run resumes bit-exactly."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding

from genrm_jax.model import lora
from genrm_jax.pytrees import TokenBatch
from genrm_jax.runtime import memory, sharding
from genrm_jax.runtime.errors import UserError
from genrm_jax.runtime.progress import progress, say
from genrm_jax.training import digests, optim, preemption
from genrm_jax.training.checkpoint import Checkpoints
from genrm_jax.training.losses import LossFn, Sums
from genrm_jax.training.metrics import Metrics, means
from genrm_jax.training.step import abstract_state, init_state, make_eval_step, make_train_step

# Steps dispatched beyond the one being executed: enough to keep the devices busy, few enough to stop soon on SIGTERM.
_STEPS_AHEAD = 2
_SMALLER_STEP = "raise loop.num_micro_batches, set remat to dots or layer, or lower loop.batch_size or row_length"
BEST_BY = ("loss", "loss_verify", "loss_solve")


class RowSource(Protocol):
  """Packed rows. `order` is a pure function of (seed, step); `take` returns an empty row for index -1."""

  @property
  def num_rows(self) -> int: ...
  def order(self, seed: int, step: int, batch_size: int) -> np.ndarray: ...
  def take(self, index: np.ndarray) -> TokenBatch: ...


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """How to train, and how often to report, evaluate and save.

  `eval_every_steps` must be a multiple of `log_every_steps`, and `save_every_steps` of `eval_every_steps`: every saved
  step has an evaluation to choose the best step by, and no reported mean spans a save. The last step is reported,
  evaluated and saved in any case. A step saved on SIGTERM at another time is never chosen as the best.
  """

  optim: optim.OptimConfig
  batch_size: int  # rows per update
  seed: int
  num_micro_batches: int = 1  # parts of a batch that go through the model one after another
  log_every_steps: int = 50
  eval_every_steps: int = 200
  save_every_steps: int = 200
  max_eval_rows: int = 0  # held-out rows per evaluation, spread evenly over all of them; 0: all
  best_by: str = "loss"  # held-out metric, one of BEST_BY, that the best step is chosen by
  stop_at_loss: float = 0.0  # stop once that metric is at most this
  save_frozen: bool = True  # with adapters: save the frozen parameters too

  def __post_init__(self):
    for name in ("batch_size", "num_micro_batches", "log_every_steps", "eval_every_steps", "save_every_steps"):
      if getattr(self, name) < 1:
        raise UserError(f"{name} must be 1 or more, not {getattr(self, name)}")
    for often, seldom in (("log_every_steps", "eval_every_steps"), ("eval_every_steps", "save_every_steps")):
      if getattr(self, seldom) % getattr(self, often):
        raise UserError(
          f"{seldom} {getattr(self, seldom)} must be a multiple of {often} {getattr(self, often)}; change one of them"
        )
    if self.max_eval_rows < 0:
      raise UserError(f"max_eval_rows must be 0 (all) or more, not {self.max_eval_rows}")
    if self.best_by not in BEST_BY:
      raise UserError(f"best_by must be one of {', '.join(BEST_BY)}, not {self.best_by!r}")

  @property
  def micro_batch_size(self) -> int:
    """Rows that go through the model at a time, in training and in evaluation."""
    return self.batch_size // self.num_micro_batches


def fit(
  name: str,
  loss_fn: LossFn,
  init_params: Any,
  param_shardings: Any,
  rows: RowSource,
  eval_rows: RowSource,
  config: TrainConfig,
  batch: NamedSharding,
  *,
  manifest: dict[str, Any],
  workdir: epath.Path,
  files: Sequence[Any] = (),
  norm_mask: Any = None,
) -> None:
  """Trains for `config.optim.num_steps`, or until the held-out loss reaches `config.stop_at_loss`.

  Writes checkpoints/<name>/ and metrics/<name>.jsonl in `workdir`, and resumes bit-exactly from the newest whole
  checkpoint there. Saves are written in the background: a process killed during one resumes from the save before. On
  SIGTERM or Ctrl-C it saves after the current step and raises Terminated, which exits with code 143, or Interrupted.

  Args:
    loss_fn: of all parameters and a batch.
    init_params: all parameters, donated. If they include adapters (model/lora.py), only the adapters are trained.
    param_shardings: of all parameters.
    rows: to train on.
    eval_rows: held out.
    batch: the sharding of a batch's rows, and with it the mesh.
    manifest: what the parameters mean; stored in each checkpoint, and compared when the run resumes.
    files: paths of files to copy into each checkpoint.
    norm_mask: a tree of bool like `init_params`, true for norm scales, which are not decayed.

  Raises:
    UserError: trained parameters that are not float32; a batch that does not divide; a loss that is not finite;
      `config.best_by` names a metric without held-out targets; a checkpoint of another run; a full disk.
  """
  mesh = cast(Mesh, batch.mesh)
  check_batch_size(name, config, batch)
  trained, frozen = lora.split(init_params)
  _check_float32(name, trained)
  optimizer = optim.make_optimizer(config.optim, None if norm_mask is None else lora.split(norm_mask)[0])
  target = abstract_state(init_params, optimizer, param_shardings, mesh)
  shardings = jax.tree.map(lambda a: a.sharding, target)
  manifest = {**manifest, "best_by": config.best_by}
  num_steps = config.optim.num_steps

  with Checkpoints(workdir / "checkpoints" / name) as checkpoints, jax.set_mesh(mesh):
    restored = checkpoints.restore_newest(target, manifest, jax.device_put(frozen, shardings.frozen))
    begin = jax.jit(lambda p, f: init_state(p, optimizer, f), out_shardings=shardings, donate_argnums=(0, 1))
    state, pending = restored or (begin(trained, frozen), [])
    del init_params, trained, frozen, restored  # free what training started from
    first_step = int(state.step)
    if first_step == num_steps or checkpoints.newest_loss() <= config.stop_at_loss:
      return
    _say_start(name, first_step, num_steps, checkpoints.unfinished)

    # Compiled ahead of time: arguments of any other shape or sharding raise instead of compiling a second program.
    batch_like = _like_rows(rows, config.batch_size, batch)
    eval_batch_like = _like_rows(eval_rows, config.micro_batch_size, batch)
    jitted = make_train_step(loss_fn, optimizer, batch, shardings, config.num_micro_batches)
    train_step = jitted.lower(target, batch_like).compile()
    eval_step = make_eval_step(loss_fn, batch, param_shardings).lower(target.all_params, eval_batch_like).compile()
    for what, program in (("a training step", train_step), ("an evaluation", eval_step)):
      memory.prepare_for(f"{name}: the buffers of {what}", program, mesh.local_devices[0], _SMALLER_STEP)

    def ended_by(cause: str) -> str:
      saved = f"step {done} of {num_steps} is saved; the same command resumes from there"
      return f"{name}: ended by {cause}, {saved}"

    done = first_step
    with (
      preemption.watch(ended_by) as should_stop,
      contextlib.closing(Metrics(workdir / "metrics", name, first_step)) as metrics,
      progress(f"train {name}", num_steps) as advance,
    ):
      advance(first_step)
      for step in range(first_step, num_steps):
        index = rows.order(config.seed, step, config.batch_size)
        state, sums = train_step(state, sharding.read_to_global(rows.take, index, batch))
        pending.append(sums)
        jax.block_until_ready(pending[-1 - _STEPS_AHEAD : -_STEPS_AHEAD])
        done = step + 1
        is_last, is_saved, note = done == num_steps, False, ""

        if is_last or done % config.log_every_steps == 0:
          values = means(pending)
          pending = []
          values["learning_rate"] = float(optim.schedule(config.optim)(step))
          metrics.write(done, {f"train/{key}": value for key, value in values.items()})
          note = f"loss {values['loss']:.4f}"
          _check_finite(name, "the loss", values["loss"], done)

        if is_last or done % config.eval_every_steps == 0:
          values = evaluate(
            eval_step, state.all_params, eval_rows, config.micro_batch_size, batch, config.max_eval_rows
          )
          metrics.write(done, {f"eval/{key}": value for key, value in values.items()})
          _check_finite(name, "the held-out loss", values["loss"], done)
          eval_loss = _best_metric(name, config.best_by, values)
          is_last |= eval_loss <= config.stop_at_loss
          if is_last or done % config.save_every_steps == 0:
            checkpoints.save(state, manifest, eval_loss, files, config.save_frozen)
            is_saved = True

        advance(num_steps - step if is_last else 1, note)
        is_stopped = should_stop(done)
        if is_stopped and not is_saved:
          # Not a candidate for the best step, so that the resumed run keeps the same steps.
          checkpoints.save(state, manifest, math.inf, files, config.save_frozen, jax.device_get(pending))
        if is_last or is_stopped:
          break
      checkpoints.wait()


def evaluate(
  eval_step: Callable[[Any, TokenBatch], Sums],
  params: Any,
  rows: RowSource,
  batch_size: int,
  batch: NamedSharding,
  max_rows: int = 0,
) -> dict[str, float]:
  """Means over the rows, each read once; with `max_rows`, over that many rows at even distances."""
  num_rows = min(rows.num_rows, max_rows or rows.num_rows)
  index = np.full(-(-num_rows // batch_size) * batch_size, -1)
  index[:num_rows] = np.arange(num_rows) * rows.num_rows // num_rows
  parts = index.reshape(-1, batch_size)
  return means([eval_step(params, sharding.read_to_global(rows.take, part, batch)) for part in parts])


def _like_rows(rows: RowSource, batch_size: int, batch: NamedSharding) -> Any:
  """Shapes of a batch, [batch_size, ...] for each field."""
  row = rows.take(np.array([-1]))
  return jax.tree.map(lambda a: jax.ShapeDtypeStruct((batch_size, *a.shape[1:]), a.dtype, sharding=batch), row)


def _say_start(name: str, first_step: int, num_steps: int, unfinished: Sequence[int]) -> None:
  newer = [step for step in unfinished if step > first_step]
  lost = f"; step {max(newer)} was still being saved when the run stopped, and is computed again" if newer else ""
  if first_step or lost:
    say(f"{name}: resuming from step {first_step} of {num_steps}{lost}")


def check_batch_size(name: str, config: TrainConfig, batch: NamedSharding) -> None:
  """UserError where a batch does not divide over the batch shards and the micro-batches."""
  num_shards = sharding.num_shards(batch)
  if config.batch_size % (num_shards * config.num_micro_batches):
    raise UserError(
      f"{name}: batch_size {config.batch_size} must be a multiple of {num_shards} batch shards x "
      f"{config.num_micro_batches} micro-batches; change one of them or the mesh"
    )


def _check_float32(name: str, trained: Any) -> None:
  """In bfloat16 an update at a fine-tuning learning rate is less than half the distance to the next number."""
  other = [path for path, leaf in digests.names_of(trained).items() if leaf.dtype != jnp.float32]
  if other:
    dtype = digests.names_of(trained)[other[0]].dtype
    raise UserError(
      f"{name}: trained parameters must be float32, but {other[0]} is {dtype}, in which most updates round to nothing; "
      "use param_dtype=float32 (with dtype=bfloat16 for the computation), or train adapters"
    )


def _check_finite(name: str, what: str, value: float, step: int) -> None:
  if not np.isfinite(value):
    raise UserError(f"{name}: {what} is {value} at step {step}; lower optim.learning_rate")


def _best_metric(name: str, best_by: str, values: dict[str, float]) -> float:
  if best_by not in values:
    known = ", ".join(key for key in BEST_BY if key in values)
    raise UserError(f"{name}: no held-out row has a target for best_by={best_by!r}; choose one of {known}")
  return values[best_by]
