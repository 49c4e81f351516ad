"""Training metrics: means over the steps since the last report, written as JSON lines and TensorBoard events."""

import json
import math
import tempfile
from collections.abc import Sequence

import jax
import numpy as np
from etils import epath

from genrm_jax.runtime import distributed
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
  """

  def __init__(self, directory: epath.Path, run: str, step: int):
    """Opens the files of a run that continues from `step`, and drops the lines after it."""
    self._is_main = distributed.is_main()
    if not self._is_main:
      return
    import tensorboardX  # imported late: it imports torch where that is installed, which takes seconds

    directory.mkdir(parents=True, exist_ok=True)
    self._path = directory / f"{run}.jsonl"
    lines = self._path.read_text().splitlines() if self._path.exists() else []
    self._text = "".join(line + "\n" for line in lines if _step_of(line) <= step)
    temporary = self._path.with_suffix(".tmp")
    temporary.write_text(self._text)
    temporary.replace(self._path)
    self._run_directory = directory / run
    self._local_events = tempfile.TemporaryDirectory() if "://" in str(directory) else None
    log_dir = self._local_events.name if self._local_events else str(self._run_directory)
    self._events = tensorboardX.SummaryWriter(log_dir, purge_step=step + 1)

  def write(self, step: int, values: dict[str, float]) -> None:
    """Writes one JSON line and one scalar event per value."""
    if not self._is_main:
      return
    line = json.dumps({"step": step, **values}) + "\n"
    if self._local_events:
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
    if self._local_events:
      with self._local_events as folder:
        for file in epath.Path(folder).iterdir():
          file.copy(self._run_directory / file.name)


def _step_of(line: str) -> float:
  """The step of a line; infinite for a line that was cut off when the run was killed."""
  try:
    return json.loads(line)["step"]
  except ValueError:
    return math.inf
