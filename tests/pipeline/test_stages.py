"""What is done is not done again, and two runs are never mixed."""

import json

import pytest

from genrm_jax.pipeline import stages as staging
from genrm_jax.pipeline.stages import Stage
from genrm_jax.runtime.errors import UserError

CONFIG = {"seed": 0, "task": {"words": 3, "ns": (1, 2)}, "name": "x"}


class Work:
  """A workdir with three stages: numbers -> doubled, and a folder of both."""

  def __init__(self, path):
    self.path = path / "work"
    self.path.mkdir()
    self.said: list[str] = []
    self.ran: list[str] = []
    self.stages = [
      Stage("numbers", self._numbers, writes=("numbers.txt",)),
      Stage("double", self._double, reads=("numbers.txt",), writes=("double.txt",)),
      Stage("folder", self._folder, reads=("numbers.txt", "double.txt"), writes=("folder",)),
    ]

  def _numbers(self):
    self.ran.append("numbers")
    (self.path / "numbers.txt").write_text("1 2 3")

  def _double(self):
    self.ran.append("double")
    (self.path / "double.txt").write_text((self.path / "numbers.txt").read_text().replace("3", "6"))

  def _folder(self):
    self.ran.append("folder")
    (self.path / "folder/in").mkdir(parents=True)
    for name in ("numbers.txt", "double.txt"):
      (self.path / "folder/in" / name).write_text((self.path / name).read_text())

  def run(self, *selected):
    """Runs stages; returns the names of those that ran."""
    self.said.clear()
    self.ran.clear()
    staging.run_stages(self.path, self.stages, selected, self.said.append)
    return list(self.ran)

  def files(self):
    return {str(p.relative_to(self.path)): (p.read_bytes(), p.stat().st_mtime_ns) for p in self._all_files()}

  def _all_files(self):
    return [p for p in self.path.rglob("*") if p.is_file()]


@pytest.fixture
def work(tmp_path):
  return Work(tmp_path)


@pytest.fixture
def done(work):
  work.run()
  return work


def test_stages_run_in_order(work):
  assert work.run() == ["numbers", "double", "folder"]
  assert [line.partition(":")[0] for line in work.said] == [
    s for s in ("numbers", "double", "folder") for _ in range(2)
  ]
  assert set(staging.seconds_of(work.path, work.stages)) == {"numbers", "double", "folder"}


def test_what_is_done_is_skipped_and_said_so(done):
  before = done.files()
  assert done.run() == []
  assert done.said == [
    *(f"{name}: done before, nothing to do" for name in ("numbers", "double", "folder")),
    f"{done.path}: all was done before; nothing was run",
  ]
  assert done.files() == before


def test_only_what_is_missing_is_run(work):
  assert work.run("numbers") == ["numbers"]
  assert work.run("double") == ["double"]
  assert work.run() == ["folder"]
  assert not any("all was done before" in line for line in work.said)


def test_selected_stages_run_in_the_order_of_the_pipeline(work):
  assert work.run("double", "numbers") == ["numbers", "double"]


def test_a_stage_that_failed_is_run_again(work, monkeypatch):
  def fail():
    raise UserError("no luck")

  work.stages[1] = Stage("double", fail, reads=("numbers.txt",), writes=("double.txt",))
  with pytest.raises(UserError, match="no luck"):
    work.run()
  work.stages[1] = Stage("double", work._double, reads=("numbers.txt",), writes=("double.txt",))
  assert work.run() == ["double", "folder"]


def test_an_unknown_stage_is_named_and_nothing_runs(work):
  with pytest.raises(UserError, match=r"no stage nope; there are: numbers, double, folder"):
    work.run("numbers", "nope")
  assert work.ran == []


def test_a_missing_input_names_the_stage_that_makes_it(work):
  with pytest.raises(UserError, match=r"stage folder needs numbers.txt, double.txt; run stage numbers, double first"):
    work.run("folder")
  work.run("numbers")
  with pytest.raises(UserError, match=r"stage folder needs double.txt; run stage double first"):
    work.run("folder")
  assert work.ran == []


@pytest.mark.parametrize(
  ("file", "stage"),
  [("numbers.txt", "numbers"), ("double.txt", "double"), ("folder/in/double.txt", "folder")],
)
@pytest.mark.parametrize("how", ["changed", "deleted"])
def test_a_changed_or_deleted_file_is_named_with_the_remedy(file, stage, how, done):
  original = (done.path / file).read_text()
  if how == "deleted":
    (done.path / file).unlink()
  else:
    (done.path / file).write_text(original + " and more")
  with pytest.raises(UserError) as error:
    done.run()
  made = "folder" if stage == "folder" else file
  assert f"stage {stage} was done with another {made} than {done.path} holds now" in str(error.value)
  assert f"delete {done.path}/stages/{stage}.json and {made}" in str(error.value)
  assert done.ran == []
  (done.path / file).write_text(original)
  assert done.run() == [], "the file is put back"


def test_a_changed_input_is_told_by_the_stage_that_read_it(done):
  (done.path / "numbers.txt").write_text("1 2 4")
  with pytest.raises(UserError, match=r"stage double was done with another numbers.txt than .*; else restore the file"):
    done.run("double")


def test_the_remedy_works(done):
  (done.path / "double.txt").write_text("mine")
  (done.path / "stages/double.json").unlink()
  (done.path / "double.txt").unlink()
  with pytest.raises(UserError, match=r"stage folder needs double.txt; run stage double first"):
    done.run("folder")
  assert done.run() == ["double"]


def test_a_folder_is_known_by_the_names_and_sizes_in_it(tmp_path):
  (tmp_path / "a").mkdir()
  (tmp_path / "a/x").write_text("123")
  marks = [staging.fingerprint(tmp_path)]
  (tmp_path / "a/x").write_text("1234")
  marks.append(staging.fingerprint(tmp_path))
  (tmp_path / "a/x").rename(tmp_path / "a/y")
  marks.append(staging.fingerprint(tmp_path))
  (tmp_path / "a/z").write_text("")
  marks.append(staging.fingerprint(tmp_path))
  assert len(set(marks)) == 4


# The workdir and its config.


def test_a_workdir_belongs_to_its_config(tmp_path):
  work = tmp_path / "a" / "b"
  staging.claim_workdir(work, CONFIG)
  assert json.loads((work / "config.json").read_text())["config"]["task"] == {"words": 3, "ns": [1, 2]}
  before = (work / "config.json").stat().st_mtime_ns
  staging.claim_workdir(work, {"name": "x", "task": {"ns": (1, 2), "words": 3}, "seed": 0})
  assert (work / "config.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
  ("changed", "named"),
  [
    ({**CONFIG, "seed": 1}, "different: seed. Use"),
    ({**CONFIG, "task": {"words": 4, "ns": (1, 2)}}, r"different: task\.words\. Use"),
    ({**CONFIG, "task": {"words": 3, "ns": (1, 2, 4)}}, r"different: task\.ns\. Use"),
    ({**CONFIG, "task": {"words": 3, "ns": (1, 2), "new": 1}}, r"different: task\.new\. Use"),
    ({"task": CONFIG["task"], "name": "y"}, r"different: name, seed\. Use"),
  ],
)
def test_another_config_is_refused_and_the_keys_named(changed, named, tmp_path):
  staging.claim_workdir(tmp_path, CONFIG)
  (tmp_path / "stages").mkdir()
  before = (tmp_path / "config.json").read_bytes()
  with pytest.raises(UserError, match=f"{tmp_path} was made by another config; {named}"):
    staging.claim_workdir(tmp_path, changed)
  assert (tmp_path / "config.json").read_bytes() == before


def test_a_workdir_in_which_nothing_was_made_takes_another_config(tmp_path):
  staging.claim_workdir(tmp_path, CONFIG)
  staging.claim_workdir(tmp_path, {**CONFIG, "seed": 1})
  assert json.loads((tmp_path / "config.json").read_text())["config"]["seed"] == 1


def test_someone_elses_folder_is_refused_and_untouched(tmp_path):
  (tmp_path / "thesis.tex").write_text("years of work")
  with pytest.raises(UserError, match=f"{tmp_path} is not empty and holds no config.json"):
    staging.claim_workdir(tmp_path, CONFIG)
  assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
  assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("inside", ["", "work"])
def test_a_file_is_no_workdir(inside, tmp_path):
  (tmp_path / "file").write_text("mine")
  with pytest.raises(UserError, match=f"{tmp_path / 'file' / inside} cannot be the workdir"):
    staging.claim_workdir(tmp_path / "file" / inside, CONFIG)
  assert (tmp_path / "file").read_text() == "mine"


def test_a_broken_config_file_is_named(tmp_path):
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(UserError, match=f"{tmp_path}/config.json: not JSON"):
    staging.claim_workdir(tmp_path, CONFIG)
