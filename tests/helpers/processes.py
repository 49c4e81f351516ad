"""Several processes at once, as the hosts of one run."""

import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).resolve().parents[2]


def free_port() -> int:
  with socket.socket() as s:
    s.bind(("localhost", 0))
    return s.getsockname()[1]


def start(commands: Sequence[Sequence[object]], **env: str) -> list[subprocess.Popen[str]]:
  """Starts Python with each list of arguments, each its own process with the devices that it asks for."""
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **env}
  return [
    subprocess.Popen(
      [sys.executable, *map(str, command)],
      cwd=ROOT,
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for command in commands
  ]


def finish(processes: Sequence[subprocess.Popen[str]], timeout: float = 600) -> list[tuple[int, str, str]]:
  """Exit code, stdout and stderr of each."""
  out = []
  try:
    for process in processes:
      stdout, stderr = process.communicate(timeout=timeout)
      out.append((process.returncode, stdout, stderr))
  finally:
    for process in processes:
      process.kill()
  return out
