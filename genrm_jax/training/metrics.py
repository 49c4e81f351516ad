"""Training metrics: means over the steps since the last report, written as JSON lines and TensorBoard events."""

import contextlib
import json
import tempfile
import time
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from etils import epath

from genrm_jax.runtime import distributed
from genrm_jax.runtime.errors import UserError
from genrm_jax.runtime.progress import say
from genrm_jax.training import saved
from genrm_jax.training.losses import Sums


def means(sums: Sequence[Sums]) -> dict[str, float]:
  """Total over total count for each name, in float64; names whose count is 0 are left out. Blocks on the devices."""
  fetched = jax.device_get(list(sums))
  out = {}
  for name in fetched[0]:
    total, count = (float(np.sum([f[name][i] for f in fetched], dtype=np.float64)) for i in (0, 1))
    if count > 0:
      out[name] = total / count
  return out


class Metrics:
  """Writes metrics/<run>.jsonl and the TensorBoard events beside it; only process 0 writes.

  Object stores cannot append, and tensorboardX writes to local disks only. In a bucket the JSON lines are therefore
  rewritten on every call, and the events are copied on `close`.

  All methods raise UserError if the files cannot be written: the disk is full, or it is not allowed. Checkpoints stay
  as they are, so the run resumes from the newest.
  """

  def __init__(self, directory: epath.Path, run: str, step: int):
    """Opens the files of a run that continues from `step`, and drops the lines after it.

    An incomplete last line was being written when the run was killed, and is dropped. If other lines cannot be read,
    the file as it was is kept as <run>.jsonl.damaged.
    """
    self._is_main = distributed.is_main()
    if not self._is_main:
      return
    # Imported late: it imports torch where that is installed, which takes seconds.
    from tensorboardX import event_file_writer, summary
    from tensorboardX.proto import event_pb2

    self._event, self._scalar = event_pb2.Event, summary.scalar
    self._path, self._run_directory = directory / f"{run}.jsonl", directory / run
    with self._disk_errors():
      directory.mkdir(parents=True, exist_ok=True)
      self._text = self._lines_until(step)
      temporary = self._path.with_suffix(".tmp")
      temporary.write_text(self._text)
      temporary.replace(self._path)
      self._local_events = tempfile.TemporaryDirectory() if "://" in str(directory) else None
      log_dir = epath.Path(self._local_events.name) if self._local_events else self._run_directory
      log_dir.mkdir(parents=True, exist_ok=True)
      # Not SummaryWriter, which writes in a thread and hangs if that cannot write.
      self._events = event_file_writer.EventsWriter(str(log_dir / "events"))
      # TensorBoard drops what earlier files say from this step on.
      start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
      self._events.write_event(event_pb2.Event(step=step + 1, session_log=start))
      self._events.flush()

  def write(self, step: int, values: dict[str, float]) -> None:
    """Writes one JSON line and one scalar event per value."""
    if not self._is_main:
      return
    line = json.dumps({"step": step, **values}) + "\n"
    with self._disk_errors():
      if self._local_events:
        self._text += line
        self._path.write_text(self._text)
      else:
        with self._path.open("a") as file:
          file.write(line)
      for name, value in values.items():
        self._events.write_event(self._event(wall_time=time.time(), step=step, summary=self._scalar(name, value)))
      self._events.flush()

  def close(self) -> None:
    if not self._is_main:
      return
    with self._disk_errors():
      self._events.close()
      if self._local_events:
        with self._local_events as folder:
          for file in epath.Path(folder).iterdir():
            file.copy(self._run_directory / file.name)

  def _lines_until(self, step: int) -> str:
    """The lines of the file up to a step."""
    data = self._path.read_bytes() if self._path.exists() else b""
    lines = data.split(b"\n")
    if _step_of(lines[-1]) is None:
      del lines[-1]
    steps = [_step_of(line) for line in lines]
    if None in steps:
      kept = saved.damaged_name(self._path)
      kept.write_bytes(data)
      place = f"{self._path}:{1 + steps.index(None)}"
      say(f"warning: {place} is not a line of metrics; the file is kept as {kept.name}, and such lines are dropped")
    return "".join(f"{line.decode()}\n" for line, of in zip(lines, steps, strict=True) if of is not None and of <= step)

  @contextlib.contextmanager
  def _disk_errors(self) -> Iterator[None]:
    try:
      yield
    except OSError as e:
      raise UserError(
        f"the metrics in {self._path} cannot be written: {e.strerror or e}; check the folder and the free disk space, "
        "then run the same command, which resumes from the newest checkpoint"
      ) from e


def _step_of(line: bytes) -> int | None:
  """The step of a line; None if it is not a line of metrics."""
  try:
    step = json.loads(line)["step"]
  except (ValueError, LookupError, TypeError, RecursionError):
    return None
  return step if type(step) is int else None
