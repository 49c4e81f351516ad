"""Packaged configs and assets resolve from any folder; files in the current one take precedence."""

import pathlib

import pytest
from refusals import refused

import experiments
from genrm_jax.pipeline import locate

PACKAGE = pathlib.Path(experiments.__file__).parent
LETTERS, MEDIUM = "experiments/configs/last_letter.py", "experiments/assets/medium"


def test_packaged_files_and_those_of_the_current_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for name in ("last_letter", LETTERS, "last_letter:tiny", f"{LETTERS}:tiny"):
    assert locate.config_path(name) == str(PACKAGE / "configs" / "last_letter.py") + (":tiny" if ":" in name else "")
  assert locate.asset_path(MEDIUM) == str(PACKAGE / "assets" / "medium")
  assert (PACKAGE / "assets" / "medium" / "config.json").exists()
  for path in ("", "gemma", "gs://bucket/gemma", "experiments/assets/nothing", "assets/medium"):
    assert locate.asset_path(path) == path
  (tmp_path / MEDIUM).mkdir(parents=True)
  assert locate.asset_path(MEDIUM) == MEDIUM
  for name in ("mine.py", LETTERS):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    assert locate.config_path(f"{name}:tiny") == f"{name}:tiny"


@pytest.mark.parametrize(
  "name", ["nothing", "nothing.py", "last_letter.py", "other/last_letter.py", "common", "", ".."]
)
def test_unknown_config_lists_the_known_ones(name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  refused(("one of base, gsm8k, last_letter, math500, word_sorting", locate.config_path, f"{name}:tiny"))
