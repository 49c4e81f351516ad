"""Packaged configs and assets resolve from any folder; files in the current one take precedence."""

import pathlib

import pytest

import experiments
from genrm_jax.pipeline import locate
from genrm_jax.runtime.errors import UserError

PACKAGE = pathlib.Path(experiments.__file__).parent


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  return tmp_path


@pytest.mark.parametrize("name", ["last_letter", "experiments/configs/last_letter.py"])
@pytest.mark.parametrize("variant", ["", ":tiny"])
def test_packaged_config(name, variant):
  assert locate.config_path(name + variant) == f"{PACKAGE / 'configs' / 'last_letter.py'}{variant}"


@pytest.mark.parametrize("name", ["mine.py", "experiments/configs/last_letter.py"])
def test_existing_file_takes_precedence(name, elsewhere):
  (elsewhere / name).parent.mkdir(parents=True, exist_ok=True)
  (elsewhere / name).touch()
  assert locate.config_path(f"{name}:tiny") == f"{name}:tiny"


@pytest.mark.parametrize(
  "name", ["nothing", "nothing.py", "last_letter.py", "other/last_letter.py", "common", "", ".."]
)
def test_unknown_config_lists_the_known_ones(name):
  with pytest.raises(UserError) as error:
    locate.config_path(f"{name}:tiny")
  known = str(error.value).partition("one of ")[2].split(", ")
  assert {"last_letter", "word_sorting", "gsm8k", "math500", "base"} <= set(known)
  assert not {"common", "list_tasks", "__init__"} & set(known)


def test_packaged_asset():
  path = locate.asset_path("experiments/assets/medium")
  assert path == str(PACKAGE / "assets" / "medium") and (pathlib.Path(path) / "config.json").exists()


def test_existing_asset_takes_precedence(elsewhere):
  (elsewhere / "experiments/assets/medium").mkdir(parents=True)
  assert locate.asset_path("experiments/assets/medium") == "experiments/assets/medium"


@pytest.mark.parametrize("path", ["", "gemma", "gs://bucket/gemma", "experiments/assets/nothing", "assets/medium"])
def test_other_paths_stay(path):
  assert locate.asset_path(path) == path
