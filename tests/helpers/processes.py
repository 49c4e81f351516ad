"""Several Python processes, as the hosts of one run."""

import os
import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import quick_compiles

ROOT = pathlib.Path(__file__).resolve().parents[2]


def free_port() -> int:
  with socket.socket() as s:
    s.bind(("localhost", 0))
    return s.getsockname()[1]


def start(commands: Sequence[Sequence[object]], cwd: pathlib.Path = ROOT, **env: str) -> list[subprocess.Popen[str]]:
  """Starts one Python for each list of arguments, with the devices of the config; "" removes a variable."""
  defaults = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": quick_compiles.XLA_FLAGS, "PYTHONPATH": str(ROOT)}
  environ = {**os.environ, **defaults, **env}
  return [
    subprocess.Popen(
      [sys.executable, *map(str, command)],
      cwd=cwd,
      env={key: value for key, value in environ.items() if value},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for command in commands
  ]


def run(*command: object, cwd: pathlib.Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
  ((code, stdout, stderr),) = finish(start([command], cwd, **env))
  return subprocess.CompletedProcess(list(command), code, stdout, stderr)


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


def write_config(path: pathlib.Path, task: str, *verifiers: str, changes: str = "") -> pathlib.Path:
  """A user's config file: the task's smoke config with these verifiers only, without a second evaluated split.

  `changes` are further lines, which change `config`.
  """
  lines = [
    f"import genrm_jax\n\n\ndef get_config():\n  config = genrm_jax.get_config('{task}:smoke')",
    "  with config.unlocked():",
    f"    config.verifiers = {{name: config.verifiers[name] for name in {verifiers}}}",
    "    if 'in_distribution' in config.task:\n      del config.task.in_distribution",
    *(f"    {line}" for line in changes.splitlines()),
    "  return config\n",
  ]
  path.write_text("\n".join(lines))
  return path
