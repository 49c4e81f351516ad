"""Startup rendezvous that names missing processes.

It precedes jax.distributed, which aborts a process that waits in vain without saying for whom. Process 0 listens on the
port that its coordination service will use; the others connect and wait for the answer:

    process 2 -> 0   "genrm-jax 2 of 4"    retried until process 0 listens
    process 0 -> 2   "joined"              at once, or "error: ..." if the numbers cannot be right
    process 0 -> 2   "all"                 when all have joined, or "error: ..." at the timeout

Any other connection is dropped and holds up nobody.
"""

import contextlib
import dataclasses
import ipaddress
import re
import selectors
import socket
import time
from typing import Any

from genrm_jax.runtime.errors import UserError

_SECONDS_BETWEEN_TRIES = 0.5
_SECONDS_FOR_GREETING = 10  # both sides greet at once
_SECONDS_FOR_ANSWER = 30  # on top of the timeout, since hosts do not start at the same moment
_MAX_STRANGERS = 256  # connections that have not greeted yet
_GREETING = re.compile(rb"genrm-jax (0|[1-9][0-9]{0,8}) of ([1-9][0-9]{0,8})\n")
_MAX_BYTES = 4096  # of a line
_ERROR = "error: "
_ADVICE = "Check that the same command runs on every host and that all of them reach the coordinator's port"


def wait_for_all(coordinator: str, num_processes: int, process_id: int, timeout_s: float) -> str:
  """Waits until all processes have joined.

  Args:
    coordinator: HOST:PORT of process 0.
    num_processes: in the whole run.
    process_id: of this process, from 0.
    timeout_s: how long to wait.

  Returns:
    On process 0, HOST:PORT to bind the coordination service to.

  Raises:
    UserError: some did not join in time (the message names them), two have the same number, or the coordinator is
      not HOST:PORT or cannot be used.
  """
  host, _, port = coordinator.rpartition(":")
  host = host.removeprefix("[").removesuffix("]")
  if not host or not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65535:
    raise UserError(f"--coordinator={coordinator} is not HOST:PORT")
  address = ""
  if process_id == 0:
    with listen(host, int(port), num_processes) as server:
      problem = call_roll(server, num_processes, timeout_s)
      address = server.getsockname()[0]
  else:
    problem = join(host, int(port), num_processes, process_id, timeout_s)
  if problem:
    raise UserError(f"{coordinator}: {problem}")
  return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def listen(host: str, port: int, num_processes: int) -> socket.socket:
  """Opens the port on process 0, on the address of `host` only if that is one of this machine's."""
  family, address = _own_address(host)
  server = socket.socket(family, socket.SOCK_STREAM)
  try:
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind((address, port))
    server.listen(num_processes + _MAX_STRANGERS)
  except OSError as e:
    server.close()
    raise UserError(f"process 0 cannot listen on port {port}: {e.strerror}; choose another in --coordinator") from e
  return server


def _own_address(host: str) -> tuple[socket.AddressFamily, str]:
  """The address to listen on; "" (all interfaces) where `host` does not tell which one the others reach.

  That is so behind a forwarded port, and where /etc/hosts maps a machine's own name to the loopback interface.
  """
  try:
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
  except OSError as e:
    raise UserError(f"--coordinator: {host} is not known on process 0 ({e.strerror})") from e
  family, *_, (address, *_) = min(found, key=lambda info: info[0] != socket.AF_INET)
  if host in ("localhost", address) or not ipaddress.ip_address(address).is_loopback:
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as probe:
      probe.bind((address, 0))
      return family, str(address)
  return socket.AF_INET, ""


def call_roll(server: socket.socket, num_processes: int, timeout_s: float) -> str:
  """Process 0: waits for the others and answers them. Returns what is wrong, or "" when all have joined."""
  deadline = time.monotonic() + timeout_s
  with contextlib.closing(_Roll(server, num_processes)) as roll:
    while missing := sorted(set(range(1, num_processes)) - roll.joined.keys()):
      seconds_left = deadline - time.monotonic()
      if seconds_left <= 0:
        break
      roll.listen(min(seconds_left, 1))
    problem = ""
    if missing:
      problem = (
        f"after {timeout_s:.0f} s {num_processes - len(missing)} of {num_processes} processes joined; missing: "
        f"{', '.join(map(str, missing))}. {roll.refused or _ADVICE}"
      )
    for caller in roll.joined.values():
      _send(caller, _ERROR + problem if problem else "all")
  return problem


@dataclasses.dataclass
class _Stranger:
  """A connection that has not greeted yet."""

  drop_at: float = dataclasses.field(default_factory=lambda: time.monotonic() + _SECONDS_FOR_GREETING)
  received: bytes = b""


class _Roll:
  """The connections to process 0: of processes that have `joined`, by number, and of strangers."""

  def __init__(self, server: socket.socket, num_processes: int):
    self.joined: dict[int, socket.socket] = {}
    self.refused = ""  # why the last one was
    self._server, self._num_processes = server, num_processes
    self._strangers: dict[socket.socket, _Stranger] = {}  # the oldest first
    self._selector = selectors.DefaultSelector()
    self._selector.register(server, selectors.EVENT_READ)
    server.setblocking(False)

  def close(self) -> None:
    self._selector.close()
    for caller in (*self._strangers, *self.joined.values()):
      caller.close()

  def listen(self, seconds: float) -> None:
    """Waits for connections and greetings, at most `seconds`, and handles those that came."""
    for key, _ in self._selector.select(seconds):
      with contextlib.suppress(OSError):  # a caller that has gone
        if key.fileobj is self._server:
          self._accept()
        elif key.fd in self._selector.get_map():  # else dropped a moment ago
          self._read(key.fileobj)
    for caller in [c for c, stranger in self._strangers.items() if stranger.drop_at < time.monotonic()]:
      self._drop(caller)

  def _accept(self) -> None:
    if len(self._strangers) >= _MAX_STRANGERS:
      self._drop(next(iter(self._strangers)))
    caller, _ = self._server.accept()
    caller.setblocking(False)
    self._selector.register(caller, selectors.EVENT_READ)
    self._strangers[caller] = _Stranger()

  def _read(self, caller: Any) -> None:
    try:
      data = caller.recv(_MAX_BYTES)
    except OSError:
      data = b""
    stranger = self._strangers.get(caller)
    if stranger is None or not data:  # a process that has joined sends nothing more; it has ended
      self._drop(caller)
      return
    stranger.received += data
    if not stranger.received.endswith(b"\n") and len(stranger.received) < _MAX_BYTES:
      return
    if match := _GREETING.fullmatch(stranger.received):
      number, total = map(int, match.groups())
      if total != self._num_processes:
        self.refused = f"process {number} has --num_processes={total}, process 0 has {self._num_processes}"
      elif number in self.joined or not 0 < number < total:
        self.refused = f"process number {number} was used twice or is not below {total}: check each --process_id"
      else:
        self.joined[number] = caller
        del self._strangers[caller]
      _send(caller, _ERROR + self.refused if caller in self._strangers else "joined")
    if caller in self._strangers:
      self._drop(caller)

  def _drop(self, caller: socket.socket) -> None:
    self._strangers.pop(caller, None)
    self.joined = {number: c for number, c in self.joined.items() if c is not caller}
    self._selector.unregister(caller)
    caller.close()


def _send(caller: socket.socket, line: str) -> None:
  with contextlib.suppress(OSError):  # the caller has gone
    caller.sendall(line.encode() + b"\n")


def join(host: str, port: int, num_processes: int, process_id: int, timeout_s: float) -> str:
  """The other processes: announce themselves. Returns what is wrong, or "" when all have joined."""
  deadline = time.monotonic() + timeout_s
  while True:
    seconds_left = max(1.0, deadline - time.monotonic())
    seconds = min(_SECONDS_FOR_GREETING, seconds_left)
    try:
      with socket.create_connection((host, port), timeout=seconds) as server:
        server.sendall(f"genrm-jax {process_id} of {num_processes}\n".encode())
        answer = _receive(server, seconds)
        if answer == "joined":
          answer = _receive(server, seconds_left + _SECONDS_FOR_ANSWER)
      if answer == "all":
        return ""
      if answer.startswith(_ERROR):
        return answer.removeprefix(_ERROR)
      reason = "another program answers there" if answer else "it closed the connection"
    except OSError as e:
      reason = e.strerror or str(e)
    if time.monotonic() > deadline:
      return (
        f"process {process_id} cannot reach process 0 ({reason}). Check that process 0 runs, --coordinator, and that "
        "the port is open"
      )
    time.sleep(_SECONDS_BETWEEN_TRIES)


def _receive(server: socket.socket, seconds: float) -> str:
  """A line from process 0; "" if it closed the connection. Raises OSError on timeout."""
  deadline, line = time.monotonic() + seconds, b""
  while not line.endswith(b"\n") and len(line) < _MAX_BYTES:
    server.settimeout(max(0.001, deadline - time.monotonic()))
    byte = server.recv(1)
    if not byte:
      return ""
    line += byte
  return line.decode(errors="replace").strip()
