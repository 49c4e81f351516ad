"""Finished work is skipped, two runs are never mixed, and a run is its content, wherever that lies."""

import json
import pathlib

import pytest
from etils import epath

from genrm_jax.pipeline import stages as staging
from genrm_jax.pipeline.stages import Stage
from genrm_jax.runtime.errors import UserError

CONFIG = {"seed": 0, "task": {"words": 3, "ns": (1, 2)}, "name": "x", "data_dir": "/a", "model": {"checkpoint": "/m"}}


class Work:
  """A workdir with three stages: numbers (from a source elsewhere) -> doubled, and a folder of both."""

  def __init__(self, path):
    self.path, self.source = epath.Path(path) / "work", epath.Path(path) / "source"
    self.path.mkdir()
    self.source.write_text("1 2 3")
    self.said: list[str] = []
    self.ran: list[str] = []

  @property
  def stages(self):
    return [
      Stage("numbers", self._numbers, writes=("numbers.txt",), sources={"data_dir": str(self.source)}),
      Stage("double", self._double, reads=("numbers.txt",), writes=("double.txt",)),
      Stage("folder", self._folder, reads=("numbers.txt", "double.txt"), writes=("folder",)),
    ]

  def _numbers(self):
    self.ran.append("numbers")
    (self.path / "numbers.txt").write_text(self.source.read_text())

  def _double(self):
    self.ran.append("double")
    (self.path / "double.txt").write_text((self.path / "numbers.txt").read_text().replace("3", "6"))

  def _folder(self):
    self.ran.append("folder")
    (self.path / "folder/in").mkdir(parents=True)
    for name in ("numbers.txt", "double.txt"):
      (self.path / "folder/in" / name).write_text((self.path / name).read_text())

  def run(self, *selected, stages=None):
    """Runs stages; returns the names of those that ran."""
    self.said.clear()
    self.ran.clear()
    staging.run_stages(self.path, stages or self.stages, selected, self.said.append)
    return list(self.ran)

  def files(self):
    found = pathlib.Path(self.path).rglob("*")
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in found if p.is_file()}


@pytest.fixture
def work(tmp_path):
  return Work(tmp_path)


@pytest.fixture
def done(work):
  work.run()
  return work


def test_stages_run_in_order_and_finished_ones_are_skipped(work):
  assert work.run("double", "numbers") == ["numbers", "double"], "in the order of the pipeline"
  assert work.run() == ["folder"]
  before = work.files()
  assert work.run() == [] and "everything was done before" in work.said[-1]
  assert work.files() == before
  assert set(staging.seconds_of(work.path, work.stages)) == {"numbers", "double", "folder"}


def test_a_stage_that_failed_is_run_again(work):
  def fail():
    raise UserError("no luck")

  broken = [Stage("double", fail, s.reads, s.writes) if s.name == "double" else s for s in work.stages]
  with pytest.raises(UserError, match="no luck"):
    work.run(stages=broken)
  assert work.run() == ["double", "folder"]


def test_an_unknown_stage_and_a_missing_input_are_named(work):
  with pytest.raises(UserError, match=r"no stage nope; there are: numbers, double, folder"):
    work.run("numbers", "nope")
  with pytest.raises(UserError, match=r"stage folder needs numbers.txt, double.txt; run stage numbers, double first"):
    work.run("folder")
  work.source.unlink()
  with pytest.raises(UserError, match=rf"stage numbers needs data_dir = {work.source}: no such file"):
    work.run("numbers")
  assert work.ran == []


@pytest.mark.parametrize(
  ("file", "stage"), [("numbers.txt", "numbers"), ("double.txt", "double"), ("folder/in/double.txt", "folder")]
)
@pytest.mark.parametrize("how", ["changed", "deleted"])
def test_a_changed_or_deleted_file_is_named_with_the_remedy(file, stage, how, done):
  original = (done.path / file).read_text()
  if how == "deleted":
    (done.path / file).unlink()
  else:
    (done.path / file).write_text(original + " and more")
  made = "folder" if stage == "folder" else file
  with pytest.raises(UserError, match=rf"{stage} was done with another {made}.*delete .*{stage}.json and {made}"):
    done.run()
  assert done.ran == []
  (done.path / file).write_text(original)
  assert done.run() == [], "the file is restored"
  (done.path / "stages/double.json").unlink()
  assert done.run() == ["double"], "the remedy works"


def test_a_source_may_move_but_not_change(done, tmp_path):
  moved = epath.Path(tmp_path) / "elsewhere"
  done.source.rename(moved)
  done.source = moved
  assert done.run() == []
  moved.write_text("1 2 4")
  with pytest.raises(UserError, match="stage numbers was done with another data_dir"):
    done.run()


def test_a_folder_is_known_by_the_names_and_sizes_in_it(tmp_path):
  folder = epath.Path(tmp_path) / "f"
  (folder / "a").mkdir(parents=True)
  (folder / "a/x").write_text("123")
  marks = [staging.fingerprint(folder)]
  (folder / "a/x").write_text("1234")
  marks.append(staging.fingerprint(folder))
  (folder / "a/x").rename(folder / "a/y")
  marks.append(staging.fingerprint(folder))
  (folder / "a/z").write_text("")
  marks.append(staging.fingerprint(folder))
  assert len(set(marks)) == 4


# The workdir and its config.


def test_a_workdir_belongs_to_its_config(tmp_path):
  work = epath.Path(tmp_path) / "a" / "b"
  staging.claim_workdir(work, CONFIG)
  assert json.loads((work / "config.json").read_text())["config"]["task"] == {"words": 3, "ns": [1, 2]}
  (work / "stages").mkdir()
  before = (work / "config.json").read_bytes()
  moved = {"data_dir": "/b", "model": {"checkpoint": "/n"}, "mesh": {"fsdp": 8}, "cpu_devices": 2}
  staging.claim_workdir(work, {**CONFIG, **moved})
  for changed, named in (
    ({"seed": 1}, "different: seed"),
    ({"task": {"words": 4, "ns": (1, 2)}}, r"different: task\.words"),
    ({"task": {"words": 3, "ns": (1, 2, 4), "new": 1}}, r"different: task\.new, task\.ns"),
    ({"data_dir": ""}, "different: data_dir"),
    ({"model": {"checkpoint": ""}}, r"different: model\.checkpoint"),
  ):
    with pytest.raises(UserError, match=f"{work} was made by another config; {named}"):
      staging.claim_workdir(work, {**CONFIG, **changed})
  assert (work / "config.json").read_bytes() == before


def test_a_workdir_that_holds_nothing_takes_another_config(tmp_path):
  for seed in (0, 1):
    staging.claim_workdir(epath.Path(tmp_path), {**CONFIG, "seed": seed})
  assert json.loads((tmp_path / "config.json").read_text())["config"]["seed"] == 1


def test_what_cannot_be_a_workdir_is_refused_and_untouched(tmp_path):
  (tmp_path / "thesis.tex").write_text("years of work")
  with pytest.raises(UserError, match=f"{tmp_path} is not empty but has no config.json"):
    staging.claim_workdir(epath.Path(tmp_path), CONFIG)
  for inside in ("", "work"):
    with pytest.raises(UserError, match="cannot be the workdir"):
      staging.claim_workdir(epath.Path(tmp_path) / "thesis.tex" / inside, CONFIG)
  assert (tmp_path / "thesis.tex").read_text() == "years of work"
  (tmp_path / "broken").mkdir()
  (tmp_path / "broken/config.json").write_text("{")
  with pytest.raises(UserError, match=r"broken/config\.json: not JSON"):
    staging.claim_workdir(epath.Path(tmp_path) / "broken", CONFIG)
