"""Finished work is skipped; what has changed is named, and redone on request; damage to any file is one message."""

import collections
import dataclasses
import functools
import json
import os
import pathlib
import shutil

import pytest
import saved_runs
from etils import epath
from refusals import refused

from genrm_jax.data import jsonl
from genrm_jax.pipeline import fingerprints
from genrm_jax.pipeline import stages as staging
from genrm_jax.pipeline.experiment import make_stages
from genrm_jax.pipeline.stages import Stage
from genrm_jax.records import Score, Vote
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
    refused((message, functools.partial(self.run, *selected, **changes)))
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
  refused(("no luck", work.run))
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
  refused((r"needs numbers\.txt, double\.txt; run stage numbers, double first", work.run, "folder"))
  (work.path / "numbers.txt").write_text("by hand")
  refused((r"stage double needs numbers\.txt; run stage numbers first", work.run, "double"))
  work.source.unlink()
  refused((rf"stage numbers needs data_dir = {work.source}: no such file", work.run, "numbers"))
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
  refused(("no luck", work.run))
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
  for name in ("double.json", "folder.json"):
    (done.path / "stages" / name).unlink()
  refused(("data_dir is not what stage numbers read", done.run, "double"))


def test_records_that_contradict_each_other_are_noticed(done):
  record = done.path / "stages/numbers.json"
  fields = json.loads(record.read_text())
  (done.path / "numbers.txt").write_text("7 8")
  writes = {"numbers.txt": fingerprints.fingerprint(done.path / "numbers.txt")}
  record.write_text(json.dumps(fields | {"writes": writes}))
  done.refuses("it read another numbers.txt than stage numbers wrote", "folder")
  assert done.run(rerun=True) == ["double", "folder"]


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
  refused(
    (f"{tmp_path} is not empty but has no config.json", start, tmp_path),
    *(("cannot be the workdir", start, tmp_path / "thesis.tex" / inside) for inside in ("", "work")),
  )
  assert (tmp_path / "thesis.tex").read_text() == "years of work"
  (tmp_path / "killed").mkdir()
  (tmp_path / "killed/.config.json.0123.tmp").write_text("{")  # left by a kill
  start(tmp_path / "killed")
  assert json.loads((tmp_path / "killed/config.json").read_text())["config"]["seed"] == 0


def _stages(run):
  """The stages of a run; checkpoints are untrained, and scores are a formula."""

  def score(name):
    votes = tuple(Vote("ok", 0.25, 0.75, 1) for _ in range(2 if name in ("genrm_cot", "judge") else 1))
    scores = [Score(c.problem_id, c.index, name, step=4, value=0.25, votes=votes) for c in run.candidates("eval")]
    jsonl.write_records(run.path(run.scores_file(name, "eval")), scores)

  def made(stage):
    kind, _, name = stage.name.partition("_")
    work = {
      "train": lambda: run.path("checkpoints", name).exists() or saved_runs.save(run, name),
      "score": lambda: score(name),
    }.get(kind)
    return dataclasses.replace(stage, run=work) if work else stage

  return [made(stage) for stage in make_stages(run) if not stage.name.startswith("solve")]


def _run(workdir):
  return saved_runs.run_of(
    workdir, "gsm8k", **{f"verifiers__{v}__init_from": "" for v in ("orm", "genrm", "genrm_cot")}
  )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  run = _run(tmp_path_factory.mktemp("whole") / "work")
  staging.run_stages(run.workdir, run.config.to_dict(), _stages(run), [], lambda line: None)
  return pathlib.Path(run.workdir)


def _tree(folder):
  return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(folder.rglob("*")) if p.is_file()}


DAMAGE = {
  "deleted": lambda path: path.unlink(),
  "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
  "flipped": lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
  "longer": lambda path: path.write_bytes(path.read_bytes() + b"{}\n"),
  "a folder": lambda path: (path.unlink(), path.mkdir()),
}
SHAPES = (
  "",
  "null",
  "[]",
  "{}",
  "3",
  '"x"',
  '{"config": 3}',
  '{"settings": [], "reads": {}, "writes": {}}',
  "[" * 9999,
)


def test_damage_is_named_and_nothing_is_written(whole):
  run = _run(whole)
  stages, outcomes = _stages(run), collections.Counter()
  files = [p for p in _tree(whole) if p.stat().st_size > 1 and ("checkpoints" not in p.parts or "orm" in p.parts)]
  records = [p for p in files if p.parent == whole or p.parent.name == "stages"]
  cases = [(path, kind, do) for path in files for kind, do in DAMAGE.items()]
  cases += [(path, shape, lambda path, shape=shape: path.write_text(shape)) for path in records for shape in SHAPES]
  for path, kind, damage in cases:
    original, before = path.read_bytes(), _tree(whole)
    damage(path)
    damaged = _tree(whole)
    folder = path.relative_to(whole).parts[0]
    try:
      staging.run_stages(run.workdir, run.config.to_dict(), stages, [], lambda line: None)
    except UserError as e:
      assert "\n" not in str(e) and (path.stem.partition(".")[0] in str(e) or folder in str(e)), (path, kind, str(e))
      assert _tree(whole) == damaged, (path, kind)
      outcomes[folder, "refused"] += 1
    else:
      outcomes[folder, "accepted"] += 1
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.write_bytes(original)
    assert _tree(whole).keys() == before.keys(), (path, kind)
  assert outcomes.keys() >= {
    (kind, "refused") for kind in ("problems", "candidates", "scores", "checkpoints", "report")
  }
  assert {kind for kind, outcome in outcomes if outcome == "accepted"} <= {"config.json", "metrics", "stages", "report"}
