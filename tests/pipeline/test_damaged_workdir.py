"""Damage to any file of a finished workdir is one message that names the file, and nothing is lost or written."""

import collections
import dataclasses
import pathlib
import shutil

import pytest
import saved_runs

from genrm_jax.data import jsonl
from genrm_jax.pipeline import stages as staging
from genrm_jax.pipeline.experiment import make_stages
from genrm_jax.records import Score, Vote
from genrm_jax.runtime.errors import UserError


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
  """The workdir of a finished run."""
  run = _run(tmp_path_factory.mktemp("whole") / "work")
  staging.run_stages(run.workdir, run.config.to_dict(), _stages(run), [], lambda line: None)
  return pathlib.Path(run.workdir)


def _tree(folder):
  return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(folder.rglob("*")) if p.is_file()}


def _directory(path):
  path.unlink()
  path.mkdir()


DAMAGE = {
  "deleted": lambda path: path.unlink(),
  "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
  "flipped": lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
  "longer": lambda path: path.write_bytes(path.read_bytes() + b"{}\n"),
  "a folder": _directory,
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
  "[" * 10_000,
)


def test_damage_is_named_and_nothing_is_written(whole):
  run = _run(whole)
  stages, outcomes = _stages(run), collections.Counter()
  files = [p for p in _tree(whole) if p.stat().st_size > 1 and (p.parts[-4:][0] != "checkpoints" or "orm" in p.parts)]
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
