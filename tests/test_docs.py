"""The Python blocks of docs/checkpoints.md run as written, and importing the package loads no optional framework."""

import pathlib
import re
import subprocess
import sys

import pytest
import saved_runs

from genrm_jax.export import export

HEAVY = ("tensorflow", "torch", "transformers", "tensorflow_datasets", "gemma")
MODULES = ("genrm_jax", "genrm_jax.verifiers", "experiments.gsm8k", "experiments.studies.reproduce")
PAGE = pathlib.Path(__file__).parents[1] / "docs" / "checkpoints.md"


def test_checkpoints_page(tmp_path, monkeypatch, capsys):
  run = saved_runs.run_of(tmp_path / "runs" / "last_letter")
  export(saved_runs.save(run, "genrm_cot"), tmp_path / "gemma")
  monkeypatch.chdir(tmp_path)
  names: dict = {}
  for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
    exec(block, names)
  assert len(names["scores"]) == 2 and names["params"]["layers"]["q"].dtype == "bfloat16"
  assert (tmp_path / "exported" / "README.md").exists()
  assert "genrm_cot 4" in capsys.readouterr().out


@pytest.mark.parametrize("module", MODULES)
def test_import_stays_light(module):
  code = f"import sys, {module}; print([name for name in {HEAVY!r} if name in sys.modules])"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert done.stdout.split("\n")[-2] == "[]"
