"""Runs launchers against stubs for gcloud, kubectl, sbatch and others, which record their calls."""

import dataclasses
import json
import os
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
ODD_WORDS = ("it's", 'a "b"', "$HOME $(id) `id` $$ \\n \\", "", "* ?", "a;b\nc\td", "ä: {b}")

SETTINGS = {
  "tpu_vm.sh": {"TPU_NAME": "verifier", "TPU_ZONE": "us-west4-a", "TPU_PROJECT": "project", "TPU_TYPE": "v5litepod-8"},
  "gke.sh": {"GKE_TOPOLOGY": "v5e:4x4", "GKE_IMAGE": "us-docker.pkg.dev/project/images/genrm:1"},
  "slurm.sh": {"CLUSTER_NODES": "2", "CLUSTER_GPUS": "8", "CLUSTER_TIME": "24:00:00"},
}

_RECORD = """#!{python} -IS
import json, os, sys
call = [os.path.basename(sys.argv[0]), *sys.argv[1:]], sys.stdin.read()
with open({calls!r}, "a") as f:
  f.write(json.dumps(call) + "\\n")
sys.exit({code})
"""

# A gcloud that runs the command of `ssh` for each of two workers, in a home of its own.
_WORKERS = """#!{python} -IS
import os, subprocess, sys
given = dict(word.split("=", 1) for word in sys.argv[1:] if word.startswith("--"))
workers = ("0", "1") if given["--worker"] == "all" else (given["--worker"],)
codes = [subprocess.run(["bash", "-c", given["--command"]], cwd=os.path.join({homes!r}, w)).returncode for w in workers]
sys.exit(max(codes))
"""


def install_worker(home: pathlib.Path) -> pathlib.Path:
  """Copies worker.sh to genrm-jax/launch in `home`; returns the folder of its logs."""
  target = home / "genrm-jax" / "launch"
  target.mkdir(parents=True)
  for script in ("common.sh", "worker.sh"):
    (target / script).write_bytes((LAUNCH / script).read_bytes())
  return target.parent / "runs" / "logs"


def run(words: Sequence[str], folder: pathlib.Path, **options: Any) -> subprocess.CompletedProcess[str]:
  pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
  return subprocess.run(words, cwd=folder, timeout=300, **pipes, **options)


@dataclasses.dataclass(frozen=True)
class Bench:
  """A folder of stubs, and the launcher's settings in the environment."""

  folder: pathlib.Path
  settings: dict[str, str] = dataclasses.field(default_factory=dict)

  def stub(self, *programs: str, code: int = 0) -> "Bench":
    """Replaces programs by stubs that record the call and exit with `code`."""
    for program in programs:
      self.program(program, _RECORD.format(python=sys.executable, calls=str(self.folder / "calls"), code=code))
    return self

  def workers(self) -> list[pathlib.Path]:
    """Replaces gcloud by ssh to two simulated workers; returns the folders of their logs."""
    homes = self.folder / "homes"
    self.program("gcloud", _WORKERS.format(python=sys.executable, homes=str(homes)))
    return [install_worker(homes / name) for name in ("0", "1")]

  def program(self, name: str, text: str) -> None:
    path = self.folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)

  def run(self, script: str, *words: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Runs a launcher, with further settings in the environment."""
    return self._run(["bash", str(LAUNCH / script), *words], settings)

  def bash(self, text: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return self._run(["bash", "-euc", text], settings)

  def dry_run(self, script: str, *words: str, **settings: str) -> str:
    """Returns what --dry-run prints; it must call nothing."""
    done = self.run(script, "--dry-run", *words, **settings)
    assert done.returncode == 0, done.stderr
    assert done.stdout and not self.calls()
    return done.stdout

  def calls(self) -> list[tuple[list[str], str]]:
    """Words and stdin of each call since the last time, except for `git status`, which changes nothing."""
    path = self.folder / "calls"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return [(words, text) for words, text in map(json.loads, lines) if words[0] != "git" or "status" not in words]

  def _run(self, words: list[str], settings: dict[str, str]) -> subprocess.CompletedProcess[str]:
    ours = ("TPU_", "GKE_", "CLUSTER_", "SBATCH_", "SLURM_")
    environ = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    environ |= {**self.settings, **settings, "PATH": f"{self.folder / 'bin'}:{environ['PATH']}"}
    return run(words, self.folder, env=environ)


def bench_of(folder: pathlib.Path, script: str) -> Bench:
  """A bench with all settings that the launcher needs."""
  return Bench(folder, {**SETTINGS[script], "TMPDIR": str(folder)})


def heredoc(printed: str) -> tuple[list[str], str]:
  """The last command that --dry-run printed, and the text on its stdin."""
  before, _, after = printed.rpartition(" <<'EOF'\n")
  text, end, rest = after.rpartition("EOF\n")
  assert end and not rest
  return shlex.split(before.splitlines()[-1]), text


def error_of(done: subprocess.CompletedProcess[str]) -> str:
  """The single error message of a command that failed."""
  assert done.returncode == 1 and not done.stdout
  assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
  return done.stderr
