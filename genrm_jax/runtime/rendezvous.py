"""Who of the processes of a run is there: asked before jax.distributed, which ends a process that waits in vain.

Process 0 listens where its coordination service will; the others tell it their number and wait for its word.

    process 2 -> 0   "2"                        every second until it listens
    process 0 -> 2   "all", or "seen 0, 2"      when all are there, or the time is up
"""

import contextlib
import socket
import time

from genrm_jax.runtime.errors import UserError

_SECONDS_BETWEEN_TRIES = 0.5
_SECONDS_FOR_THE_ANSWER = 30  # beyond the time for all to come: clocks of hosts start apart


def wait_for_all(coordinator: str, num_processes: int, process_id: int, timeout_s: float) -> None:
  """Returns when all processes have called.

  Args:
    coordinator: HOST:PORT of process 0.
    num_processes: how many are to come.
    process_id: this one's number.
    timeout_s: how long to wait.

  Raises:
    UserError: not all came in time, with those that did; two with one number; a place that is no place.
  """
  host, _, port = coordinator.rpartition(":")
  if not host or not port.isdigit():
    raise UserError(f"--coordinator={coordinator} is not HOST:PORT")
  missing = (
    _listen(int(port), num_processes, timeout_s) if process_id == 0 else _call(host, int(port), process_id, timeout_s)
  )
  if missing:
    raise UserError(f"{coordinator}, after {timeout_s:.0f} s: {missing}")


def _listen(port: int, num_processes: int, timeout_s: float) -> str:
  """Process 0's part; says what is wrong, or "" when all are there."""
  deadline = time.monotonic() + timeout_s
  callers: list[socket.socket] = []
  seen = {0}
  wrong = ""
  with contextlib.ExitStack() as stack:
    server = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
      server.bind(("", port))
    except OSError as e:
      raise UserError(f"process 0 cannot listen at port {port}: {e.strerror}; choose another in --coordinator") from e
    server.listen(num_processes)
    while len(seen) < num_processes and not wrong and (left := deadline - time.monotonic()) > 0:
      server.settimeout(left)
      try:
        caller = stack.enter_context(server.accept()[0])
        caller.settimeout(max(1.0, deadline - time.monotonic()))
        number = int(caller.makefile().readline())
      except (OSError, ValueError):
        continue  # the time is up, or something else that found the port
      if number in seen or not 0 < number < num_processes:
        wrong = (
          f"two processes call themselves {number}, or it is not below {num_processes}: check --process_id of each"
        )
      callers.append(caller)
      seen.add(number)
    absent = [str(i) for i in range(num_processes) if i not in seen]
    if absent and not wrong:
      wrong = (
        f"{len(seen)} of {num_processes} processes were seen; missing: {', '.join(absent)}. Check that the same "
        "command runs on every host and that they reach the coordinator's port"
      )
    for caller in callers:
      with contextlib.suppress(OSError):
        caller.sendall((wrong or "all").encode() + b"\n")
  return wrong


def _call(host: str, port: int, process_id: int, timeout_s: float) -> str:
  """The other processes' part."""
  deadline = time.monotonic() + timeout_s
  while True:
    try:
      with socket.create_connection((host, port), timeout=max(1.0, deadline - time.monotonic())) as server:
        server.sendall(f"{process_id}\n".encode())
        server.settimeout(max(0.0, deadline - time.monotonic()) + _SECONDS_FOR_THE_ANSWER)
        answer = server.makefile().readline().strip()
        if answer:
          return "" if answer == "all" else answer
    except OSError as e:
      reason = e.strerror or str(e)
    except ValueError:
      reason = "something else answers there"
    else:
      reason = "it hung up"
    if time.monotonic() > deadline:
      return (
        f"process {process_id} does not reach process 0 ({reason}). Check that it runs, --coordinator, and that the "
        "port is open"
      )
    time.sleep(_SECONDS_BETWEEN_TRIES)
