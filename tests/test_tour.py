"""The tour, cell by cell, with the smoke config in place of its own."""

import json
import os
import pathlib
import subprocess
import sys

import quick_compiles

ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_every_cell_of_the_tour_runs(tmp_path):
  cells = json.loads((ROOT / "docs/tour.ipynb").read_text())["cells"]
  code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
  assert "last_letter:tour" in code[0] and len(code) >= 7
  script = "\n".join(code).replace("last_letter:tour", "last_letter:smoke")
  env = {**os.environ, **quick_compiles.environ(tmp_path / "compiled"), "PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"}
  command = [sys.executable, "-c", script]
  done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900)
  assert done.returncode == 0, done.stderr
  assert "of 4 candidates; a single one is right in" in done.stdout
  assert (tmp_path / "runs/tour/report/index.html").is_file()
