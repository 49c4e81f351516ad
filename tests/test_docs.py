"""The Python blocks of docs/checkpoints.md run as written."""

import pathlib
import re

import saved_runs

from genrm_jax.export import export

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
