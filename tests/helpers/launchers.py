"""Runs launchers against stubs for gcloud, kubectl, sbatch and others, which record their calls."""

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
ODD_WORDS = ("it's", 'a "b"', "$HOME $(id) `id` $$ \\n \\", "", "* ?", "a;b\nc\td\x01", "ä: {b}", "a\nEOF\nexit 5 #")
SETTINGS = {
  **{"TPU_NAME": "verifier", "TPU_ZONE": "us-west4-a", "TPU_PROJECT": "project", "TPU_TYPE": "v5litepod-8"},
  **{"GKE_TOPOLOGY": "v5e:4x4", "GKE_IMAGE": "us-docker.pkg.dev/project/images/genrm:1"},
  **{"CLUSTER_NODES": "2", "CLUSTER_GPUS": "8", "CLUSTER_TIME": "24:00:00"},
}
_RECORD = """#!{python} -IS
import json, os, sys
with open({calls!r}, "a") as f:
  f.write(json.dumps([[os.path.basename(sys.argv[0]), *sys.argv[1:]], sys.stdin.read()]) + "\\n")
sys.exit({code})
"""


def run(words: Sequence[str], folder: pathlib.Path, **options: Any) -> subprocess.CompletedProcess[str]:
  return subprocess.run(words, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, **options)


class Bench:
  """A folder of stubs, and settings of launchers in the environment."""

  def __init__(self, folder: pathlib.Path, *stubs: str, **settings: str):
    self.folder = folder
    mine = {key: v for key, v in os.environ.items() if not key.startswith(("TPU_", "GKE_", "CLUSTER_", "SBATCH_"))}
    self._environ = {**mine, **settings, "PATH": f"{folder / 'bin'}:{mine['PATH']}", "TMPDIR": str(folder)}
    self.stub(*stubs)

  def stub(self, *programs: str, code: int = 0) -> None:
    for program in programs:
      self.program(program, _RECORD.format(python=sys.executable, calls=str(self.folder / "calls"), code=code))

  def program(self, name: str, text: str) -> None:
    path = self.folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)

  def run(self, *words: str, **settings: str) -> subprocess.CompletedProcess[str]:
    first = [str(LAUNCH / words[0])] if (LAUNCH / words[0]).exists() else [words[0]]
    return run(["bash", *first, *words[1:]], self.folder, env={**self._environ, **settings})

  def dry_run(self, script: str, *words: str, **settings: str) -> str:
    """What --dry-run prints; it must call nothing."""
    done = self.run(script, "--dry-run", *words, **settings)
    assert done.returncode == 0 and done.stdout and not self.calls(), done.stderr
    return done.stdout

  def error(self, script: str, *words: str, **settings: str) -> str:
    """The one message of a launcher that refuses; it must call nothing."""
    done = self.run(script, *words, **settings)
    assert done.returncode == 1 and not done.stdout and not self.calls()
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    return done.stderr

  def calls(self) -> list[tuple[list[str], str]]:
    """Words and stdin of each call since the last time, except for `git status`, which changes nothing."""
    path = self.folder / "calls"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return [(words, text) for words, text in map(json.loads, lines) if words[0] != "git" or "status" not in words]


def heredoc(printed: str) -> str:
  end, _, text = printed.partition(" <<'")[2].partition("'\n")
  assert text.endswith(f"\n{end}\n") and text.count(f"\n{end}\n") == 1
  return text.removesuffix(f"\n{end}\n")
