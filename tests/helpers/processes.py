"""Several Python processes, as the hosts of one run."""

import os
import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]


def free_port() -> int:
  with socket.socket() as s:
    s.bind(("localhost", 0))
    return s.getsockname()[1]


def start(commands: Sequence[Sequence[object]], **env: str) -> list[subprocess.Popen[str]]:
  """Starts one Python for each list of arguments."""
  pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
  pipes["env"] = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **env}
  return [subprocess.Popen([sys.executable, *map(str, command)], **pipes) for command in commands]


def finish(processes: Sequence[subprocess.Popen[str]], timeout: float = 600) -> list[tuple[int, str, str]]:
  """Waits for all; returns exit code, stdout and stderr of each."""
  out = []
  try:
    for process in processes:
      stdout, stderr = process.communicate(timeout=timeout)
      out.append((process.returncode, stdout, stderr))
  finally:
    for process in processes:
      process.kill()
  return out


def wait_for(condition: Callable[[], bool], running: Sequence[subprocess.Popen[str]] = ()) -> None:
  """Polls for ten minutes until the condition holds; fails at once when one of the processes has ended before."""
  deadline = time.monotonic() + 600
  while not condition():
    assert all(process.poll() is None for process in running), "ended early"
    assert time.monotonic() < deadline, "timed out"
    time.sleep(0.02)
