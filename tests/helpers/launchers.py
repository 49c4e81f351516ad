"""Launchers run among stand-ins for gcloud, kubectl, sbatch and others, which write down how they were called."""

import dataclasses
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable

import pytest

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "launch"

_RECORD = """#!{python} -IS
import json, os, sys
call = [os.path.basename(sys.argv[0]), *sys.argv[1:]], sys.stdin.read()
with open({calls!r}, "a") as f:
  f.write(json.dumps(call) + "\\n")
sys.exit({code})
"""

# gcloud as it is on the way to two workers, each with a home and a shell of its own.
_WORKERS = """#!{python} -IS
import os, subprocess, sys
given = dict(word.split("=", 1) for word in sys.argv[1:] if word.startswith("--"))
workers = ("0", "1") if given["--worker"] == "all" else (given["--worker"],)
codes = [subprocess.run(["bash", "-c", given["--command"]], cwd=os.path.join({homes!r}, w)).returncode for w in workers]
sys.exit(max(codes))
"""


@dataclasses.dataclass(frozen=True)
class Bench:
  """A folder with stand-ins, and the settings of a launcher in the environment."""

  folder: pathlib.Path
  settings: dict[str, str] = dataclasses.field(default_factory=dict)

  def stand_in(self, *programs: str, code: int = 0) -> "Bench":
    """Puts programs before all others that only write down their call, and end with `code`."""
    for program in programs:
      self._program(program, _RECORD.format(python=sys.executable, calls=str(self.folder / "calls"), code=code))
    return self

  def workers(self) -> "Bench":
    """Puts a gcloud in place that runs what is given to ssh, in the homes of two workers on which the code is."""
    for home in ("0", "1"):
      target = self.folder / "homes" / home / "genrm-jax" / "launch"
      target.mkdir(parents=True)
      for script in ("common.sh", "worker.sh"):
        (target / script).write_bytes((LAUNCH / script).read_bytes())
    self._program("gcloud", _WORKERS.format(python=sys.executable, homes=str(self.folder / "homes")))
    return self

  def log(self, worker: str, run: str) -> str:
    return (self.folder / "homes" / worker / "genrm-jax" / "runs" / "logs" / f"{run}.log").read_text()

  def run(self, script: str, *words: str, **settings: str) -> subprocess.CompletedProcess:
    """A launcher, with further settings in the environment."""
    return self._run(["bash", str(LAUNCH / script), *words], settings)

  def bash(self, text: str, **settings: str) -> subprocess.CompletedProcess:
    return self._run(["bash", "-euc", text], settings)

  def calls(self) -> list[tuple[list[str], str]]:
    """The words and the input of each call since the last time; without git status, which only asks."""
    path = self.folder / "calls"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    called = [(words, given) for words, given in map(json.loads, lines)]
    return [(words, given) for words, given in called if words[0] != "git" or "status" not in words]

  def _program(self, name: str, text: str) -> None:
    path = self.folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)

  def _run(self, words: list[str], settings: dict[str, str]) -> subprocess.CompletedProcess:
    ours = ("TPU_", "GKE_", "CLUSTER_", "SBATCH_", "SLURM_")
    environ = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    environ |= {**self.settings, **settings, "PATH": f"{self.folder / 'bin'}:{environ['PATH']}"}
    return subprocess.run(
      words, env=environ, cwd=self.folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
    )


def dry_run(bench: Bench, script: str, *words: str, **settings: str) -> str:
  """What --dry-run prints, and that nothing was called."""
  done = bench.run(script, "--dry-run", *words, **settings)
  assert done.returncode == 0, done.stderr
  assert not bench.calls()
  return done.stdout


def check_printed_is_run(bench: Bench, script: str, *words: str) -> list[list[str]]:
  """That a shell which is given what --dry-run prints calls the same as the launcher itself; and the calls' words."""
  printed = dry_run(bench, script, *words)
  assert bench.bash(printed).returncode == 0
  replayed = bench.calls()
  done = bench.run(script, *words)
  assert done.returncode == 0, done.stderr
  called = bench.calls()
  assert called and called == replayed
  return [words for words, _ in called]


def heredoc(printed: str) -> tuple[list[str], str]:
  """The words of the last command that --dry-run printed, and the text that it would be given."""
  before, _, after = printed.rpartition(" <<'EOF'\n")
  text, end, rest = after.rpartition("EOF\n")
  assert end and not rest
  return shlex.split(before.splitlines()[-1]), text


def refused_by_gcloud(commands: Iterable[str], folder: pathlib.Path) -> list[str]:
  """What gcloud's own parser says of commands that it would not take; nothing is run. Skips the test without gcloud."""
  gcloud = shutil.which("gcloud")
  if gcloud is None:
    pytest.skip("no gcloud here to read the commands")
  path = folder / "commands.json"
  path.write_text(json.dumps([{"command_string": command} for command in commands]))
  # In an empty folder it finds nobody's settings.
  environ = {**os.environ, "CLOUDSDK_CONFIG": str(folder / "gcloud"), "CLOUDSDK_CORE_CHECK_GCE_METADATA": "false"}
  words = [gcloud, "meta", "lint-gcloud-commands", f"--commands-file={path}"]
  done = subprocess.run(words, env=environ, capture_output=True, text=True, timeout=300)
  if done.returncode:
    pytest.skip(f"this gcloud does not read commands: {done.stderr[:200]}")
  return [f"{it['command_string']}: {it['error_message']}" for it in json.loads(done.stdout) if not it["success"]]


def error_of(done: subprocess.CompletedProcess) -> str:
  """The one message with which a command ended."""
  assert done.returncode == 1 and not done.stdout
  assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
  return done.stderr
