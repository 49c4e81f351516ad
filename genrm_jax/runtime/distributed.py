"""Many processes as one run: how they find each other, what only the first does, and what they tell each other.

A run on a pod is the same program in one process a host (one a GPU under SLURM). All go through the same stages in the
same order, so whatever is called here is called by each of them. What they tell each other goes by the coordination
service of jax.distributed, which process 0 runs: it waits as long as it takes, where a collective of the devices
would give up on a process that is minutes behind.
"""

import contextlib
import ctypes
import dataclasses
import functools
import itertools
import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax

from genrm_jax.runtime import rendezvous
from genrm_jax.runtime.errors import UserError

T = TypeVar("T")
_HEARTBEAT_S = 100  # a process that is silent for so long is gone, and the others end too
_LONG_MS = 7 * 24 * 3600 * 1000
_CHUNK_BYTES = 1 << 20
_names = (f"genrm_jax/{i}" for i in itertools.count())


@dataclasses.dataclass(frozen=True)
class Settings:
  """How this process finds the others.

  Attributes:
    auto: ask the machine: a TPU pod, SLURM, Open MPI, GKE.
    coordinator: else HOST:PORT where process 0 listens; "" for a run of one process.
    num_processes: how many there are.
    process_id: which one this is, from 0.
    timeout_s: how long to wait for all of them to come; one that is silent later is not waited for longer either.
  """

  auto: bool = False
  coordinator: str = ""
  num_processes: int = 1
  process_id: int = 0
  timeout_s: int = 300

  def __post_init__(self):
    if self.auto and (self.coordinator or self.num_processes != 1 or self.process_id):
      raise UserError("--distributed=auto finds coordinator, num_processes and process_id itself; leave them out")
    if self.num_processes < 1 or not 0 <= self.process_id < self.num_processes:
      raise UserError(
        f"--process_id={self.process_id} of --num_processes={self.num_processes}: processes are numbered from 0"
      )
    if (self.num_processes > 1) != bool(self.coordinator):
      raise UserError("--coordinator=HOST:PORT and --num_processes belong together: many processes need both")
    if self.timeout_s < 1:
      raise UserError(f"--distributed_timeout_s must be 1 or more, not {self.timeout_s}")


def start(settings: Settings) -> None:
  """Joins the other processes; does nothing for one. To be called before JAX has touched a device.

  Raises:
    UserError: no cluster was found (auto), or not all processes came in time: which of them were seen.
  """
  local_device_ids = None
  if settings.auto:
    settings, local_device_ids = _detected(settings.timeout_s)
  if settings.num_processes == 1:
    return
  rendezvous.wait_for_all(settings.coordinator, settings.num_processes, settings.process_id, settings.timeout_s)
  # A CPU runs a program as soon as it is given one; two programs whose collectives cross would wait for each other.
  jax.config.update("jax_cpu_enable_async_dispatch", False)
  jax.distributed.initialize(
    settings.coordinator,
    settings.num_processes,
    settings.process_id,
    local_device_ids,
    initialization_timeout=settings.timeout_s,
    heartbeat_timeout_seconds=min(settings.timeout_s, _HEARTBEAT_S),
  )
  _handler_of_jax()


def _detected(timeout_s: int) -> tuple[Settings, Sequence[int] | None]:
  """What jax.distributed.initialize() would find out by itself; it is needed before that, for the roll call."""
  from jax._src.clusters import ClusterEnv

  try:
    found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, timeout_s)
  except (RuntimeError, ValueError, KeyError, OSError) as e:
    raise UserError(f"--distributed=auto: the cluster does not tell who takes part: {e}") from e
  coordinator, num_processes, process_id, local_device_ids = found
  if coordinator is None or num_processes is None or process_id is None:
    raise UserError(
      "--distributed=auto found no cluster (TPU pod, SLURM, Open MPI, GKE); leave it out for one process, or give "
      "--coordinator=HOST:PORT --num_processes=N --process_id=I"
    )
  one = num_processes == 1
  return Settings(False, "" if one else coordinator, num_processes, process_id, timeout_s), local_device_ids


@contextlib.contextmanager
def sigterm_remembered() -> Iterator[None]:
  """Within, SIGTERM of many processes is only remembered, for multihost_utils.reached_preemption_sync_point.

  jax.distributed would have that so from its start to the end of the process, which nobody could then stop while it
  scores. Elsewhere SIGTERM ends the process, as it does one that is alone.
  """
  _at_sigterm(_handler_of_jax())
  try:
    yield
  finally:
    _at_sigterm(None)


@functools.cache
def _handler_of_jax() -> int | None:
  """The C function that jax.distributed has called at SIGTERM, in place of which the first call here puts the end."""
  return _at_sigterm(None)


def _at_sigterm(handler: int | None) -> int | None:
  """Sets the C function that is called at SIGTERM, None for the end of the process; returns the one before."""
  set_handler = ctypes.CDLL(None).signal  # Python's own `signal` does not know what C has set
  set_handler.restype, set_handler.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]
  return set_handler(signal.SIGTERM, handler)


def num_processes() -> int:
  return jax.process_count() if jax.distributed.is_initialized() else 1


def process_index() -> int:
  return jax.process_index() if jax.distributed.is_initialized() else 0


def is_main() -> bool:
  """Whether this is process 0, which alone writes files and speaks to the user."""
  return process_index() == 0


def barrier() -> None:
  """Waits until every process is here."""
  if num_processes() > 1:
    _client().wait_at_barrier(next(_names), _LONG_MS)


def from_main(make: Callable[[], T]) -> T:
  """What `make()` gives on process 0, which alone calls it; every process gets it, or the UserError that it raised."""
  if num_processes() == 1:
    return make()
  name = next(_names)
  if is_main():
    try:
      value = make()
    except UserError as e:
      _put(name, (str(e), None))
      raise
    _put(name, (None, value))
  else:
    error, value = _get(name)
    if error is not None:
      raise UserError(error)
  return value


def exchange(value: T) -> list[T]:
  """The values of all processes, in their order, on each of them."""
  if num_processes() == 1:
    return [value]
  name = next(_names)
  _put(f"{name}/{process_index()}", value)
  values = [_get(f"{name}/{i}") for i in range(num_processes())]
  barrier()
  if is_main():
    _client().key_value_delete(f"{name}/")
  return values


def share_out(work: Callable[[list[int]], Sequence[T]], number: int) -> list[T]:
  """The results of `number` pieces of work, each done by one process, all known to all, in order.

  Args:
    work: is given the indices that fall to this process and gives a result for each.
    number: of pieces.
  """
  if num_processes() == 1:
    return list(work(list(range(number))))
  mine = list(range(process_index(), number, num_processes()))
  out: dict[int, T] = {}
  for done in exchange(dict(zip(mine, work(mine), strict=True))):
    out |= done
  return [out[i] for i in range(number)]


def check_same(what: str, value: str) -> None:
  """UserError unless `value` is the same on all processes."""
  values = exchange(value)
  different = [i for i, other in enumerate(values) if other != values[0]]
  if different:
    raise UserError(
      f"{what} of process {', '.join(map(str, different))} differs from that of process 0: give all the same"
    )


def leave(code: int) -> None:
  """Ends this process. Of many it does not wait for the others, who wait for it: they are told that it is gone."""
  if num_processes() == 1:
    sys.exit(code)
  sys.stderr.flush()
  sys.stdout.flush()
  os._exit(code)


def _client() -> Any:
  from jax._src import distributed

  return distributed.global_state.client


def _put(name: str, value: Any) -> None:
  data = pickle.dumps(value)
  chunks = range(0, len(data), _CHUNK_BYTES)
  for i, begin in enumerate(chunks):
    _client().key_value_set_bytes(f"{name}/{i}", data[begin : begin + _CHUNK_BYTES])
  _client().key_value_set_bytes(f"{name}/number", str(len(chunks)).encode())


def _get(name: str) -> Any:
  number = int(_client().blocking_key_value_get_bytes(f"{name}/number", _LONG_MS))
  return pickle.loads(b"".join(_client().blocking_key_value_get_bytes(f"{name}/{i}", _LONG_MS) for i in range(number)))
