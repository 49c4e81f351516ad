"""Finished work is skipped; whatever it depends on and has changed is named, and redone on request."""

import json
import os
import pathlib

import pytest
from etils import epath

from genrm_jax.pipeline import fingerprints
from genrm_jax.pipeline import stages as staging
from genrm_jax.pipeline.stages import Stage
from genrm_jax.runtime.errors import UserError

CONFIG = {"seed": 0, "data_dir": "/a", "tail": {"mark": "!", "ks": (1, 2)}, "mesh": {"fsdp": 1}, "note": ""}


class Work:
  """A workdir with three stages: numbers (a source) -> double, and a folder of both, each with its settings."""

  def __init__(self, path):
    self.path, self.source, self.config = epath.Path(path) / "work", epath.Path(path) / "source", CONFIG
    self.source.write_text("1 2 3")
    self.said: list[str] = []
    self.ran: list[str] = []
    self.fails = ""

  @property
  def stages(self):
    source = {"data_dir": str(self.source)}
    return [
      Stage("numbers", lambda: self._do("numbers"), (), ("numbers.txt",), source, ("seed",)),
      Stage("double", lambda: self._do("double"), ("numbers.txt",), ("double.txt",), source, scratch=("double.tmp",)),
      Stage("folder", lambda: self._do("folder"), ("numbers.txt", "double.txt"), ("folder",), settings=("tail",)),
    ]

  def _do(self, name):
    self.ran.append(name)
    text = (self.source if name == "numbers" else self.path / "numbers.txt").read_text()
    if name == "double":
      assert not (self.path / "double.tmp").exists() or self.fails is None, "left by other settings"
      (self.path / "double.tmp").write_text("half")
    if name == self.fails:
      raise UserError("no luck")
    if name == "folder":
      (self.path / "folder/in").mkdir(parents=True)
      (self.path / "folder/in/all.txt").write_text(text + (self.path / "double.txt").read_text())
    else:
      (self.path / f"{name}.txt").write_text(text.replace("3", "6") if name == "double" else text)

  def run(self, *selected, rerun=False, **changes):
    """Runs stages with a changed config; returns the names of those that ran."""
    self.said.clear()
    self.ran.clear()
    staging.run_stages(self.path, {**self.config, **changes}, self.stages, selected, self.said.append, rerun)
    return list(self.ran)

  def files(self):
    found = pathlib.Path(self.path).rglob("*")
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in found if p.is_file()}

  def refuses(self, message, *selected, **changes):
    """The start is refused, and nothing is run or written."""
    before = self.files()
    with pytest.raises(UserError, match=message):
      self.run(*selected, **changes)
    assert self.ran == [] and self.files() == before


@pytest.fixture
def work(tmp_path):
  return Work(tmp_path)


@pytest.fixture
def done(work):
  work.run()
  return work


def test_stages_run_in_order_and_finished_ones_are_skipped(work):
  work.fails = "double"
  with pytest.raises(UserError, match="no luck"):
    work.run()
  work.fails = None
  assert work.run("double", "numbers") == ["double"], "what failed is run again"
  assert work.run() == ["folder"]
  before = work.files()
  assert work.run() == [] and "everything was done before" in work.said[-1]
  assert work.run(mesh={"fsdp": 8}) == [], "the layout of devices changes no result"
  assert {p: now for p, now in work.files().items() if not p.endswith("config.json")}.items() <= before.items()
  assert set(staging.seconds_of(work.path, work.stages)) == {"numbers", "double", "folder"}


def test_an_unknown_stage_and_a_missing_input_are_named(work):
  work.path.mkdir()
  work.refuses(r"no stage nope; there are: numbers, double, folder", "numbers", "nope")
  for selected, message in (("folder", "needs numbers.txt, double.txt; run stage numbers, double first"),):
    with pytest.raises(UserError, match=message):
      work.run(selected)
  (work.path / "numbers.txt").write_text("by hand")
  with pytest.raises(UserError, match=r"stage double needs numbers\.txt; run stage numbers first"):
    work.run("double")
  work.source.unlink()
  with pytest.raises(UserError, match=rf"stage numbers needs data_dir = {work.source}: no such file"):
    work.run("numbers")
  assert work.ran == []


CHANGED_FILES = {"numbers.txt": "numbers", "double.txt": "double", "folder/in/all.txt": "folder"}


@pytest.mark.parametrize(("file", "stage"), CHANGED_FILES.items())
@pytest.mark.parametrize("how", ["changed", "deleted", "flipped"])
def test_a_changed_result_is_named_and_made_again_on_request(file, stage, how, done):
  path, original = done.path / file, (done.path / file).read_bytes()
  if how == "deleted":
    path.unlink()
  else:
    path.write_bytes(original + b" and more" if how == "changed" else bytes([original[0] ^ 1]) + original[1:])
  made = "folder" if stage == "folder" else file
  done.refuses(rf"stage {stage} was begun or done, but {made} has changed.*--rerun")
  if stage != "folder":
    done.refuses(f"{made}", "folder")  # also a stage that only reads it
  assert done.run(rerun=True) == [stage], "what builds on it reads the same as before"
  assert path.read_bytes() == original and done.run() == []


def test_a_changed_setting_redoes_only_what_depends_on_it(done):
  assert done.run(note="x", data_dir="/b") == [], "no stage reads the note; a folder may move"
  tail = {"mark": "?", "ks": (1, 2)}
  done.refuses(r"stage folder was begun or done, but tail\.mark has changed.*--rerun", tail=tail)
  done.refuses("tail.new", tail={**CONFIG["tail"], "new": 1})
  assert done.run("double", tail=tail) == [], "a stage that does not depend on it goes on"
  assert done.run(tail=tail, rerun=True) == ["folder"] and done.run(tail=tail) == []
  done.refuses(r"stage numbers .* seed has changed", "folder", tail=tail, seed=1)
  done.refuses(r"stage numbers .* seed has changed", "folder", tail=tail, seed=1, rerun=True)
  assert done.run(tail=tail, seed=1, rerun=True) == ["numbers"], "the same numbers come out"
  assert json.loads((done.path / "config.json").read_text())["config"]["seed"] == 1


def test_an_unfinished_stage_does_not_go_on_with_other_inputs(work):
  work.fails = "double"
  with pytest.raises(UserError, match="no luck"):
    work.run()
  work.fails = ""
  work.source.write_text("1 2 4")
  work.refuses("stage numbers was begun or done, but data_dir has changed")
  work.refuses("data_dir is not what stage numbers read|double was begun or done, but data_dir", "double")
  assert work.run(rerun=True) == ["numbers", "double", "folder"]
  assert (work.path / "folder/in/all.txt").read_text() == "1 2 4" * 2


def test_a_source_may_move_but_not_change(done, tmp_path):
  moved = epath.Path(tmp_path) / "elsewhere"
  done.source.rename(moved)
  done.source = moved
  assert done.run() == []
  moved.write_text("1 2 4")
  done.refuses("stage numbers was begun or done, but data_dir has changed")
  # A stage that begins now must read what an earlier stage read.
  for name in ("double.json", "folder.json"):
    (done.path / "stages" / name).unlink()
  with pytest.raises(UserError, match="data_dir is not what stage numbers read"):
    done.run("double")


def test_records_that_contradict_each_other_are_noticed(done):
  record = done.path / "stages/numbers.json"
  fields = json.loads(record.read_text())
  (done.path / "numbers.txt").write_text("7 8")
  record.write_text(
    json.dumps({**fields, "writes": {"numbers.txt": fingerprints.fingerprint(done.path / "numbers.txt")}})
  )
  done.refuses("it read another numbers.txt than stage numbers wrote", "folder")
  assert done.run(rerun=True) == ["double", "folder"]
  for broken in ("[]", '{"seconds": 1}', '{"settings": 1, "reads": {}, "writes": {}}', "{"):
    record.write_text(broken)
    done.refuses(r"numbers\.json")


def test_a_folder_is_known_by_what_is_in_it(tmp_path):
  folder = epath.Path(tmp_path) / "f"
  (folder / "a").mkdir(parents=True)
  (folder / "large").write_bytes(bytes(3 << 20))

  def marks():
    return fingerprints.fingerprint(folder), fingerprints.fingerprint(folder, whole=True)

  seen = [marks()]
  for change in (
    lambda: (folder / "a/x").write_text("123"),
    lambda: (folder / "a/x").write_text("124"),
    lambda: (folder / "a/x").rename(folder / "a/y"),
    lambda: (folder / "a/z").write_text(""),
  ):
    change()
    seen.append(marks())
  assert all(len(set(kind)) == len(seen) for kind in zip(*seen, strict=True))
  with open(folder / "large", "r+b") as file:
    file.write(b"x")
  os.utime(folder / "large", ns=(1, 1))
  assert marks()[0] == seen[-1][0] and marks()[1] != seen[-1][1], "only a whole one reads large files"


def test_what_cannot_be_a_workdir_is_refused_and_untouched(tmp_path):
  def start(path):
    staging.run_stages(epath.Path(path), CONFIG, [], [], print)

  (tmp_path / "thesis.tex").write_text("years of work")
  with pytest.raises(UserError, match=f"{tmp_path} is not empty but has no config.json"):
    start(tmp_path)
  for inside in ("", "work"):
    with pytest.raises(UserError, match="cannot be the workdir"):
      start(tmp_path / "thesis.tex" / inside)
  assert (tmp_path / "thesis.tex").read_text() == "years of work"
  (tmp_path / "broken").mkdir()
  (tmp_path / "broken/config.json").write_text("{")
  with pytest.raises(UserError, match=r"broken/config\.json: not JSON"):
    start(tmp_path / "broken")
  (tmp_path / "killed").mkdir()
  (tmp_path / "killed/.config.json.0123.tmp").write_text("{")  # left by a kill
  start(tmp_path / "killed")
  assert json.loads((tmp_path / "killed/config.json").read_text())["config"]["seed"] == 0
