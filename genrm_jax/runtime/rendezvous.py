"""Startup rendezvous that names missing processes.

It precedes jax.distributed, which aborts a process that waits in vain without saying for whom. Process 0 listens on the
port that its coordination service will use; the others send it their number and wait for the answer:

    process 2 -> 0   "2"                        retried until process 0 listens
    process 0 -> 2   "all", or what is wrong    when all have joined, or at the timeout
"""

import contextlib
import socket
import time

from genrm_jax.runtime.errors import UserError

_SECONDS_BETWEEN_TRIES = 0.5
_SECONDS_FOR_GREETING = 5  # a process sends its number at once; a stranger that sends nothing must not block the others
_SECONDS_FOR_ANSWER = 30  # on top of the timeout, since hosts do not start at the same moment


def wait_for_all(coordinator: str, num_processes: int, process_id: int, timeout_s: float) -> None:
  """Returns when all processes have joined.

  Args:
    coordinator: HOST:PORT of process 0.
    num_processes: in the whole run.
    process_id: of this process, from 0.
    timeout_s: how long to wait.

  Raises:
    UserError: some did not join in time (the message names them), two have the same number, or the coordinator is
      not HOST:PORT or cannot be used.
  """
  host, _, port = coordinator.rpartition(":")
  if not host or not port.isdigit():
    raise UserError(f"--coordinator={coordinator} is not HOST:PORT")
  if process_id == 0:
    with listen(int(port), num_processes) as server:
      problem = call_roll(server, num_processes, timeout_s)
  else:
    problem = join(host, int(port), process_id, timeout_s)
  if problem:
    raise UserError(f"{coordinator}, after {timeout_s:.0f} s: {problem}")


def listen(port: int, num_processes: int) -> socket.socket:
  """Opens the port on process 0."""
  server = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
  try:
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind(("", port))
    server.listen(num_processes)
  except OSError as e:
    server.close()
    raise UserError(f"process 0 cannot listen on port {port}: {e.strerror}; choose another in --coordinator") from e
  return server


def call_roll(server: socket.socket, num_processes: int, timeout_s: float) -> str:
  """Process 0: waits for the others and answers them. Returns what is wrong, or "" when all have joined."""
  deadline = time.monotonic() + timeout_s
  joined = {0}
  problem = ""
  with contextlib.ExitStack() as stack:
    callers: list[socket.socket] = []
    while len(joined) < num_processes and not problem and (seconds_left := deadline - time.monotonic()) > 0:
      server.settimeout(seconds_left)
      try:
        caller = stack.enter_context(server.accept()[0])
        caller.settimeout(_SECONDS_FOR_GREETING)
        number = int(caller.makefile().readline())
      except (OSError, ValueError):
        continue  # the timeout, or a stranger on this port
      if number in joined or not 0 < number < num_processes:
        problem = f"process number {number} was used twice or is not below {num_processes}: check each --process_id"
      callers.append(caller)
      joined.add(number)
    missing = [str(i) for i in range(num_processes) if i not in joined]
    if missing and not problem:
      problem = (
        f"{len(joined)} of {num_processes} processes joined; missing: {', '.join(missing)}. Check that the same "
        "command runs on every host and that all of them reach the coordinator's port"
      )
    for caller in callers:
      with contextlib.suppress(OSError):
        caller.sendall((problem or "all").encode() + b"\n")
  return problem


def join(host: str, port: int, process_id: int, timeout_s: float) -> str:
  """The other processes: announce themselves. Returns what is wrong, or "" when all have joined."""
  deadline = time.monotonic() + timeout_s
  while True:
    try:
      with socket.create_connection((host, port), timeout=max(1.0, deadline - time.monotonic())) as server:
        server.sendall(f"{process_id}\n".encode())
        server.settimeout(max(0.0, deadline - time.monotonic()) + _SECONDS_FOR_ANSWER)
        answer = server.makefile().readline().strip()
        if answer:
          return "" if answer == "all" else answer
    except OSError as e:
      reason = e.strerror or str(e)
    except ValueError:
      reason = "another program answers there"
    else:
      reason = "it closed the connection"
    if time.monotonic() > deadline:
      return (
        f"process {process_id} cannot reach process 0 ({reason}). Check that process 0 runs, --coordinator, and that "
        "the port is open"
      )
    time.sleep(_SECONDS_BETWEEN_TRIES)
