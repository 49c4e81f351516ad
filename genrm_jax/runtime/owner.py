"""Who a process is: recognized later, by other processes of its machine, even if its number has been reused."""

import getpass
import os
import pathlib
import socket
import time
import uuid
from collections.abc import Mapping
from typing import Any


def this_process() -> dict[str, Any]:
  """This process, as JSON can hold it, with a random token."""
  try:
    user = getpass.getuser()
  except (KeyError, OSError):  # a container's user without a name
    user = str(os.getuid())
  return {
    "token": uuid.uuid4().hex,
    "pid": os.getpid(),
    "started": _start_of(os.getpid()),
    "host": socket.gethostname(),
    "machine": _machine(),
    "user": user,
    "since": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
  }


def is_running(owner: Mapping[str, Any]) -> bool | None:
  """Whether a process described by `this_process` still runs; None if this machine cannot tell."""
  pid = owner.get("pid")
  if not _machine() or owner.get("machine") != _machine() or not isinstance(pid, int):
    return None
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except OSError:  # another user's
    pass
  return _start_of(pid) in (owner.get("started"), None)


def _start_of(pid: int) -> str | None:
  """When a process started, in clock ticks since boot; "" for a zombie, None where that is hidden."""
  try:
    state, *fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
  except OSError:
    return None
  return "" if state in "ZX" else fields[18]


def _machine() -> str:
  """Identifies the machine since it booted, and among its containers those that see the same processes."""
  try:
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"
  except OSError:  # not Linux
    return ""


def describe(owner: Mapping[str, Any]) -> str:
  return f"pid {owner.get('pid')} on host {owner.get('host')} (user {owner.get('user')})"
