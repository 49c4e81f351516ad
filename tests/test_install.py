"""The wheel, installed into a fresh environment, runs experiments from an empty folder."""

import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import processes
import pytest
import quick_compiles

pytestmark = pytest.mark.one_python

SOURCES = ("genrm_jax", "experiments", "setup.py", "pyproject.toml", "README.md", "LICENSE")
TASKS = ("last_letter", "word_sorting", "gsm8k", "math500", "base", "plan")


def run(*command: object, folder: pathlib.Path) -> subprocess.CompletedProcess[str]:
  """Runs a command in `folder` without the paths of this checkout."""
  environ = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
  environ["XLA_FLAGS"] = quick_compiles.XLA_FLAGS
  words = [str(word) for word in command]
  return subprocess.run(words, cwd=folder, env=environ, capture_output=True, text=True, timeout=600)


def check(done: subprocess.CompletedProcess[str]) -> str:
  assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
  return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
  """Built from a copy of the sources, since a build leaves files beside them."""
  folder = tmp_path_factory.mktemp("wheel")
  for name in SOURCES:
    source, target = processes.ROOT / name, folder / "source" / name
    if source.is_dir():
      shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
      shutil.copy(source, target)
  options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet")
  check(run(sys.executable, "-m", "pip", "wheel", *options, folder / "source", folder=folder))
  (path,) = folder.glob("genrm_jax-*.whl")
  return path


@pytest.fixture(scope="module")
def scripts(wheel, tmp_path_factory) -> pathlib.Path:
  """The bin folder of an environment that has the wheel, and the dependencies of this one through a .pth file."""
  venv = tmp_path_factory.mktemp("venv")
  check(run(sys.executable, "-m", "venv", "--without-pip", venv, folder=venv))
  bin_folder = venv / "bin"
  pip = (sys.executable, "-m", "pip", "--python", bin_folder / "python")
  check(run(*pip, "install", "--no-deps", "--no-index", "--quiet", wheel, folder=venv))
  (site,) = venv.glob("lib/python*/site-packages")
  (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
  return bin_folder


def test_wheel_holds_every_file(wheel):
  packages = [wheel.parent / "source" / name for name in ("genrm_jax", "experiments")]
  sources = {str(p.relative_to(wheel.parent / "source")) for f in packages for p in f.rglob("*") if p.is_file()}
  names = set(zipfile.ZipFile(wheel).namelist())
  assert sources - names == set()
  assert any(name.endswith("dist-info/licenses/LICENSE") for name in names)
  assert all(name.startswith(("genrm_jax", "experiments/")) for name in names)


def test_module_finds_packaged_config_and_asset(scripts, tmp_path):
  where = check(run(scripts / "python", "-c", "import genrm_jax; print(genrm_jax.__file__)", folder=tmp_path))
  assert pathlib.Path(where.strip()).is_relative_to(scripts.parent)
  flags = ("--config=experiments/configs/last_letter.py:smoke", "--config.model.checkpoint=experiments/assets/mini")
  more = ("--workdir=runs/smoke", "--stages=problems")
  check(run(scripts / "python", "-m", "experiments.last_letter", *flags, *more, folder=tmp_path))
  assert sorted(p.name for p in (tmp_path / "runs/smoke").iterdir()) == ["config.json", "problems", "stages"]
  processes.write_config(tmp_path / "mine.py", "last_letter", "judge")
  check(run(scripts / "genrm-jax", "last_letter", "--config=mine.py", "--workdir=smoke", folder=tmp_path))
  assert (tmp_path / "smoke/report/index.html").exists() and (tmp_path / "smoke/scores/judge.jsonl").exists()
  for wrong in ([], ["no_such_task"]):
    done = run(scripts / "genrm-jax", *wrong, folder=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr and all(name in done.stderr for name in TASKS)
