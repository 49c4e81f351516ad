"""Multi-process runs: startup, work that only process 0 does, and host-side communication.

A run on a pod is one program with one process per host (per GPU under SLURM). All processes go through the same stages
in the same order, so every function of this module must be called by all of them. Values travel through the
coordination service of jax.distributed, which process 0 hosts: it waits for as long as necessary, whereas a device
collective would time out on a process that is minutes behind.
"""

import contextlib
import ctypes
import dataclasses
import functools
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax

from genrm_jax.runtime import rendezvous
from genrm_jax.runtime.errors import UserError

T = TypeVar("T")
_HEARTBEAT_S = 100  # a process that stays silent for longer counts as lost, and the others exit
_LONG_MS = 7 * 24 * 3600 * 1000
_LEAVE_MS = 10_000
_CHUNK_BYTES = 1 << 20
_names = (f"genrm_jax/{i}" for i in itertools.count())


@dataclasses.dataclass(frozen=True)
class Settings:
  """How this process finds the others.

  Attributes:
    auto: detect the cluster (TPU pod, SLURM, Open MPI, GKE); the next three fields stay at their defaults.
    coordinator: HOST:PORT where process 0 listens; "" for a single process.
    num_processes: in the whole run.
    process_id: of this process, from 0.
    timeout_s: how long startup waits for all processes; also an upper bound on the heartbeat timeout.
  """

  auto: bool = False
  coordinator: str = ""
  num_processes: int = 1
  process_id: int = 0
  timeout_s: int = 300

  def __post_init__(self):
    if self.auto and (self.coordinator or self.num_processes != 1 or self.process_id):
      raise UserError("--distributed=auto detects coordinator, num_processes and process_id; leave them out")
    if self.num_processes < 1 or not 0 <= self.process_id < self.num_processes:
      raise UserError(
        f"--process_id={self.process_id} with --num_processes={self.num_processes}: processes are numbered from 0"
      )
    if (self.num_processes > 1) != bool(self.coordinator):
      raise UserError("--coordinator=HOST:PORT and --num_processes belong together: a run of many processes needs both")
    if self.timeout_s < 1:
      raise UserError(f"--distributed_timeout_s must be 1 or more, not {self.timeout_s}")


def start(settings: Settings) -> None:
  """Joins the other processes; does nothing for a single one. Call it before JAX initializes its devices.

  Raises:
    UserError: no cluster was detected (auto), or some processes did not join in time; the message names them.
  """
  local_device_ids = None
  if settings.auto:
    settings, local_device_ids = _detected(settings.timeout_s)
  if settings.num_processes == 1:
    return
  address = rendezvous.wait_for_all(
    settings.coordinator, settings.num_processes, settings.process_id, settings.timeout_s
  )
  # With asynchronous dispatch two CPU programs can run at once, and their collectives can deadlock.
  jax.config.update("jax_cpu_enable_async_dispatch", False)
  jax.distributed.initialize(
    settings.coordinator,
    settings.num_processes,
    settings.process_id,
    local_device_ids,
    initialization_timeout=settings.timeout_s,
    heartbeat_timeout_seconds=min(settings.timeout_s, _HEARTBEAT_S),
    coordinator_bind_address=address,
  )
  _jax_sigterm_handler()


def _detected(timeout_s: int) -> tuple[Settings, Sequence[int] | None]:
  """What jax.distributed.initialize() would detect; the rendezvous needs it earlier. Also the local device ids."""
  from jax._src.clusters import ClusterEnv

  try:
    detected = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, timeout_s)
  except (RuntimeError, ValueError, KeyError, OSError) as e:
    raise UserError(f"--distributed=auto: could not read the cluster's description: {e}") from e
  coordinator, num_processes, process_id, local_device_ids = detected
  if coordinator is None or num_processes is None or process_id is None:
    raise UserError(
      "--distributed=auto detected no cluster (TPU pod, SLURM, Open MPI, GKE); omit it for a single process, or set "
      "--coordinator=HOST:PORT --num_processes=N --process_id=I"
    )
  if num_processes == 1:
    coordinator = ""
  return Settings(False, coordinator, num_processes, process_id, timeout_s), local_device_ids


@contextlib.contextmanager
def deferred_sigterm() -> Iterator[Callable[[], None]]:
  """Within, SIGTERM only marks a preemption, for multihost_utils.reached_preemption_sync_point.

  Yields a function that does the same, for handlers of other signals.

  Outside, SIGTERM ends the process at once. jax.distributed would defer it from startup to exit, so that a process
  could not be stopped while it samples or scores.
  """
  handler = _jax_sigterm_handler()
  before = set_sigterm_handler(handler)
  try:
    yield lambda: ctypes.CFUNCTYPE(None, ctypes.c_int)(handler or 0)(signal.SIGTERM)
  finally:
    set_sigterm_handler(before)


@functools.cache
def _jax_sigterm_handler() -> int | None:
  """The C handler that jax.distributed installs; the first call replaces it by the default action."""
  return set_sigterm_handler(None)


def set_sigterm_handler(handler: int | None) -> int | None:
  """Installs a C handler for SIGTERM (None: the default action) and returns the previous one."""
  set_handler = ctypes.CDLL(None).signal  # Python's `signal` module cannot see handlers that C code installed
  set_handler.restype, set_handler.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]
  return set_handler(signal.SIGTERM, handler)


def num_processes() -> int:
  return jax.process_count() if jax.distributed.is_initialized() else 1


def process_index() -> int:
  return jax.process_index() if jax.distributed.is_initialized() else 0


def is_main() -> bool:
  """Whether this is process 0: the only one that reports to the user and writes shared files."""
  return process_index() == 0


def barrier() -> None:
  """Waits until every process has reached this point."""
  if num_processes() > 1:
    _client().wait_at_barrier(next(_names), _LONG_MS)


def from_main(make: Callable[[], T]) -> T:
  """Calls `make` on process 0 only and returns its result, or raises its UserError, on every process.

  The result must be what JSON can hold: no tuples, no arrays, dicts with strings as keys.
  """
  if num_processes() == 1:
    return make()
  name = next(_names)
  if is_main():
    try:
      value = make()
    except UserError as e:
      _put(name, [str(e), None])
      raise
    _put(name, [None, value])
  else:
    error, value = _get(name)
    if error is not None:
      raise UserError(error)
  return value


def exchange(value: T) -> list[T]:
  """Returns the values of all processes, ordered by process, on each of them. They must be what JSON can hold."""
  if num_processes() == 1:
    return [value]
  name = next(_names)
  _put(f"{name}/{process_index()}", value)
  values = [_get(f"{name}/{i}") for i in range(num_processes())]
  barrier()
  if is_main():
    _client().key_value_delete(f"{name}/")
  return values


def check_same(what: str, value: str) -> None:
  """Raises a UserError on every process unless all have the same `value`; `what` names it."""
  values = exchange(value)
  different = [i for i, other in enumerate(values) if other != values[0]]
  if different:
    raise UserError(
      f"{what} of process {', '.join(map(str, different))} differs from that of process 0: start all with the same"
    )


def leave(code: int) -> None:
  """Exits. Processes that leave together, on an error that all of them know, all get to print it.

  Process 0 must not exit first: the others abort as soon as they lose the coordination service. A process that leaves
  alone exits after `_LEAVE_MS`, and the service tells the others.
  """
  if num_processes() > 1:
    sys.stderr.flush()
    sys.stdout.flush()
    try:
      _client().wait_at_barrier("genrm_jax/leave", _LEAVE_MS)
    except jax.errors.JaxRuntimeError:  # the others stay
      os._exit(code)
  sys.exit(code)


def _client() -> Any:
  from jax._src import distributed

  return distributed.global_state.client


def _put(name: str, value: Any) -> None:
  """Stores a value for the others as JSON: whoever reaches the coordination service may write there too."""
  data = json.dumps(value).encode()
  if json.loads(data) != value:
    raise TypeError(f"JSON does not hold {value!r}")
  chunks = range(0, len(data), _CHUNK_BYTES)
  for i, begin in enumerate(chunks):
    _client().key_value_set_bytes(f"{name}/{i}", data[begin : begin + _CHUNK_BYTES])
  _client().key_value_set_bytes(f"{name}/num_chunks", str(len(chunks)).encode())


def _get(name: str) -> Any:
  read = functools.partial(_client().blocking_key_value_get_bytes, timeout_in_ms=_LONG_MS)
  num_chunks = int(read(f"{name}/num_chunks"))
  return json.loads(b"".join(read(f"{name}/{i}") for i in range(num_chunks)))
