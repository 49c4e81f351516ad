"""The training loop: read, step, report, evaluate, save; a stopped run goes on where it was, bit for bit."""

import contextlib
import dataclasses
import json
import math
import tempfile
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from genrm_jax.model import lora
from genrm_jax.pytrees import TokenBatch
from genrm_jax.runtime import distributed, sharding
from genrm_jax.runtime.errors import UserError
from genrm_jax.runtime.progress import progress, say
from genrm_jax.train import optim, preemption
from genrm_jax.train.checkpoint import Checkpoints
from genrm_jax.train.losses import LossFn, Sums
from genrm_jax.train.step import init_state, make_eval_step, make_train_step, state_shardings

# So many steps are given to the devices before the first of them is done: enough to keep them busy, and few enough that
# a run which is told to end has little left to do.
_STEPS_AHEAD = 2


class RowSource(Protocol):
  """Packed rows: which of them a training step reads, by (seed, step), and the rows of an index (-1: an empty one)."""

  @property
  def num_rows(self) -> int: ...
  def order(self, seed: int, step: int, batch_size: int) -> np.ndarray: ...
  def take(self, index: np.ndarray) -> TokenBatch: ...


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """How long and how often. The best step is the one with the least loss on held-out rows."""

  optim: optim.OptimConfig
  batch_size: int  # rows of one update
  seed: int
  num_micro_batches: int = 1  # that the rows of an update go through the model in, one after another
  log_every_steps: int = 50
  save_every_steps: int = 200  # evaluate on the held-out rows and save
  stop_at_loss: float = 0.0  # end when the loss on held-out rows is not above it
  save_frozen: bool = True  # with adapters: whether the frozen parameters go into the checkpoints as well

  def __post_init__(self):
    for name in ("batch_size", "num_micro_batches", "log_every_steps", "save_every_steps"):
      if getattr(self, name) < 1:
        raise UserError(f"{name} must be 1 or more, not {getattr(self, name)}")
    if self.save_every_steps % self.log_every_steps:
      raise UserError(
        f"save_every_steps {self.save_every_steps} must be a multiple of log_every_steps {self.log_every_steps}, "
        "so that a resumed run reports the same means"
      )

  @property
  def micro_batch_size(self) -> int:
    """Rows that go through the model at a time; evaluation, too, has memory for no more."""
    return self.batch_size // self.num_micro_batches


def train(
  run: str,
  loss_fn: LossFn,
  init_params: Any,
  param_shardings: Any,
  rows: RowSource,
  eval_rows: RowSource,
  config: TrainConfig,
  mesh: Mesh,
  manifest: dict[str, Any],
  workdir: epath.Path,
  files: Sequence[Any] = (),
) -> None:
  """Trains to `config.optim.num_steps`, or to `config.stop_at_loss` if that is met before.

  Leaves checkpoints/<run>/ and metrics/<run>.jsonl in `workdir`.

  Goes on from the newest whole checkpoint of the run if there is one. Data order is a function of (seed, step), so the
  continued run is the run that was never stopped. SIGTERM ends the process with code 143 after the step at hand is
  saved.

  Args:
    run: its name.
    loss_fn: of all parameters and a batch.
    init_params: all parameters; where adapters are among them (model/lora.py), only those are trained. The buffers are
      given over: do not use them afterwards.
    param_shardings: of all parameters.
    rows: to train on.
    eval_rows: held out.
    config: how long and how often.
    mesh: the devices.
    manifest: what the parameters mean, for the checkpoints.
    workdir: see above.
    files: paths of files that go into each checkpoint.
  """
  num_devices = mesh.devices.size // mesh.shape["tensor"]
  if config.batch_size % (num_devices * config.num_micro_batches):
    parts = f" in {config.num_micro_batches} micro-batches" if config.num_micro_batches > 1 else ""
    raise UserError(f"batch_size {config.batch_size} of {run} does not divide over {num_devices} data devices{parts}")
  optimizer = optim.make_optimizer(config.optim)
  trained, frozen = lora.split(init_params)
  abstract = jax.eval_shape(lambda p, f: init_state(p, optimizer, f), trained, frozen)
  shardings = state_shardings(abstract, param_shardings, mesh)
  train_step = make_train_step(loss_fn, optimizer, mesh, shardings, config.num_micro_batches)
  eval_step = make_eval_step(loss_fn, mesh, param_shardings)
  num_steps = config.optim.num_steps

  with Checkpoints(workdir / "checkpoints" / run) as checkpoints, jax.set_mesh(mesh):
    where = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings)
    restored = checkpoints.restore_newest(where, manifest, frozen)
    begin = jax.jit(lambda p, f: init_state(p, optimizer, f), out_shardings=shardings, donate_argnums=(0, 1))
    state, pending = restored or (begin(trained, frozen), [])
    del init_params, trained, frozen, restored  # or what the training started from would stay in memory
    writer = _Metrics(workdir / "metrics", run, int(state.step))
    with contextlib.closing(writer), preemption.watched() as is_asked, progress(f"train {run}", num_steps) as advance:
      advance(int(state.step))
      is_good = checkpoints.newest_loss() <= config.stop_at_loss
      for step in range(num_steps if is_good else int(state.step), num_steps):
        batch = sharding.read_to_global(
          rows.take, rows.order(config.seed, step, config.batch_size), sharding.batch_sharding(mesh)
        )
        state, sums = train_step(state, batch)
        pending.append(sums)
        jax.block_until_ready(pending[-1 - _STEPS_AHEAD : -_STEPS_AHEAD])
        done = step + 1
        note = ""
        if done % config.log_every_steps == 0 or done == num_steps:
          means = _means(pending)
          pending = []
          means["learning_rate"] = float(optim.schedule(config.optim)(step))
          writer.write(done, {f"train/{name}": value for name, value in means.items()})
          note = f"loss {means['loss']:.4f}"
          _check_finite(run, "the loss", means["loss"], done)
        if done % config.save_every_steps == 0 or done == num_steps:
          evaluated = evaluate(eval_step, state.all_params, eval_rows, config.micro_batch_size, mesh)
          writer.write(done, {f"eval/{name}": value for name, value in evaluated.items()})
          _check_finite(run, "the loss on held-out rows", evaluated["loss"], done)
          eval_loss = evaluated.get("loss_verify", evaluated.get("loss_solve", float("nan")))
          checkpoints.save(state, manifest, eval_loss, files, config.save_frozen)
          is_good = eval_loss <= config.stop_at_loss
        advance(num_steps - step if is_good else 1, note)
        if is_good:
          break
        if done < num_steps and is_asked(done):
          if done % config.save_every_steps:
            checkpoints.save(state, manifest, math.inf, files, config.save_frozen, jax.device_get(pending))
          say(f"{run}: ended by SIGTERM, step {done} of {num_steps} is saved; the same command goes on from there")
          raise SystemExit(preemption.EXIT_CODE)
  assert train_step._cache_size() <= 1, "the train step was compiled more than once"  # type: ignore[attr-defined]


def _check_finite(run: str, what: str, value: float, step: int) -> None:
  if not np.isfinite(value):
    raise UserError(f"{run}: {what} is {value} at step {step}; lower optim.learning_rate")


def evaluate(eval_step, params: Any, rows: RowSource, batch_size: int, mesh: Mesh) -> dict[str, float]:
  """Mean losses over all rows, each once."""
  index = np.full(-(-rows.num_rows // batch_size) * batch_size, -1)
  index[: rows.num_rows] = np.arange(rows.num_rows)
  sums = [
    eval_step(params, sharding.read_to_global(rows.take, part, sharding.batch_sharding(mesh)))
    for part in index.reshape(-1, batch_size)
  ]
  return _means(sums)


def _means(sums: list[Sums]) -> dict[str, float]:
  """Sums over sums of counts; the host waits for the device only here. Kinds without targets are left out."""
  fetched = jax.device_get(sums)
  out = {}
  for name in fetched[0]:
    total, count = (float(np.sum([f[name][i] for f in fetched], dtype=np.float64)) for i in (0, 1))
    if count > 0:
      out[name] = total / count
  return out


def _step_of(line: str) -> float:
  """The step of a line of metrics; a line that was cut off when a run was killed comes after all."""
  try:
    return json.loads(line)["step"]
  except ValueError:
    return math.inf


class _Metrics:
  """metrics/<run>.jsonl and TensorBoard events. Lines after the step that a run continues from are dropped.

  To a file of a bucket nothing can be appended: there all lines are written anew, every time, and the events of this
  start, for which tensorboardX wants a disk, are copied when it ends. Of many processes only the first writes.
  """

  def __init__(self, directory: epath.Path, run: str, step: int):
    self._is_main = distributed.is_main()
    if not self._is_main:
      return
    import tensorboardX  # where torch is installed it imports that, which takes seconds

    directory.mkdir(parents=True, exist_ok=True)
    self._path = directory / f"{run}.jsonl"
    lines = self._path.read_text().splitlines() if self._path.exists() else []
    self._text = "".join(line + "\n" for line in lines if _step_of(line) <= step)
    temporary = self._path.with_suffix(".tmp")
    temporary.write_text(self._text)
    temporary.replace(self._path)
    self._events_of_run = directory / run
    self._copied_from = tempfile.TemporaryDirectory() if "://" in str(directory) else None
    here = self._copied_from.name if self._copied_from else str(self._events_of_run)
    self._events = tensorboardX.SummaryWriter(here, purge_step=step + 1)

  def write(self, step: int, values: dict[str, float]) -> None:
    if not self._is_main:
      return
    line = json.dumps({"step": step, **values}) + "\n"
    if self._copied_from:
      self._text += line
      self._path.write_text(self._text)
    else:
      with self._path.open("a") as file:
        file.write(line)
    for name, value in values.items():
      self._events.add_scalar(name, value, step)

  def close(self) -> None:
    if not self._is_main:
      return
    self._events.close()
    if self._copied_from:
      with self._copied_from as folder:
        for file in epath.Path(folder).iterdir():
          file.copy(self._events_of_run / file.name)
