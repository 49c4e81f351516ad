"""The command line as a user has it: whole runs in half a minute, started again, repeated, and given what is wrong."""

import contextlib
import hashlib
import io
import json
import re
import shutil
import sys
from unittest import mock

import processes
import pytest
from absl.testing import flagsaver

from genrm_jax.checkpoints import pretrained
from genrm_jax.data import jsonl
from genrm_jax.evals import tables
from genrm_jax.pipeline import cli
from genrm_jax.records import VOTE_STATES, Candidate, Problem, Rationale, Score
from genrm_jax.training import saved

TASKS = {  # all that is trained
  "last_letter": ("generator", "dpo", "orm", "genrm", "genrm_cot"),
  "word_sorting": ("generator", "dpo", "orm", "genrm_cot"),
  "gsm8k": ("base", "orm", "genrm", "genrm_cot"),
}
VOTES = {"judge": 2, "dpo": 1, "orm": 1, "genrm": 1, "genrm_cot": 2}  # a candidate

# Commands, one after another in one process, which imports and traces only once.
_COMMANDS = """
import contextlib, json, runpy, sys
from absl.testing import flagsaver
from genrm_jax.pipeline import cli  # defines the flags, which flagsaver would forget again

for module, args, log in json.loads(sys.argv[1]):
  sys.argv = [module, *args]
  with flagsaver.flagsaver(), open(log + ".out", "w") as out, open(log + ".err", "w") as err:
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
      try:
        runpy.run_module(module, run_name="__main__")
      except SystemExit as e:
        assert not e.code, e.code
"""


def _splits(task):
  return ("train", "val", "eval", *(["in_distribution"] if task == "last_letter" else []))


def _verifiers(task):
  return [name for name in VOTES if name in TASKS[task] or (name == "judge" and task == "last_letter")]


def _scores(task):
  here = [(name, "eval", f"scores/{name}.jsonl") for name in _verifiers(task)]
  if "in_distribution" in _splits(task):
    here += [(name, "in_distribution", f"scores/in_distribution/{name}.jsonl") for name in _verifiers(task)]
  return here


def _tree(folder):
  files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
  return {str(p.relative_to(folder)): (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns) for p in files}


def _called(task, *args):
  """Exit code, stdout and stderr of a command that computes nothing, called in this process."""
  out, err = io.StringIO(), io.StringIO()
  with (
    mock.patch.object(sys, "argv", [task, *map(str, args)]),
    flagsaver.flagsaver(),
    contextlib.redirect_stdout(out),
    contextlib.redirect_stderr(err),
    pytest.raises(SystemExit) as ended,
  ):
    cli.main(task)
  return ended.value.code or 0, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def work(smoke_run, tmp_path_factory):
  """Where each run is. Word Sorting starts from the base; the study is on the solutions of Last Letter."""
  folder = tmp_path_factory.mktemp("smoke")
  work = {name: folder / name for name in ("base", "word_sorting", "gsm8k", "study")}
  work["last_letter"] = smoke_run
  study = processes.write_config(folder / "study.py", "last_letter", "genrm_cot")
  sorting = processes.write_config(folder / "sorting.py", "word_sorting", "dpo", "orm", "genrm_cot")
  args = {
    "base": ("base", "--config=experiments/configs/base.py:smoke"),
    "word_sorting": ("word_sorting", f"--config={sorting}", f"--config.model.checkpoint={folder}/base/asset"),
    "gsm8k": ("gsm8k", "--config=gsm8k:smoke"),
    "study": (
      *("last_letter", f"--config={study}", f"--config.bank={smoke_run}"),
      "--config.verifiers.genrm_cot.solve_weight=0.3",
    ),
  }
  commands = [
    (f"experiments.{module}", [*args, f"--workdir={folder / name}"], str(folder / name))
    for name, (module, *args) in args.items()
  ]
  done = processes.run("-c", _COMMANDS, json.dumps(commands))
  assert done.returncode == 0, done.stderr + "".join(p.read_text() for p in sorted(folder.glob("*.err")))
  for name in args:
    assert not (folder / f"{name}.out").read_text() and "Traceback" not in (folder / f"{name}.err").read_text()
  return work


every_task = pytest.mark.parametrize("task", TASKS)


@every_task
def test_a_run_leaves_what_was_promised_and_its_records_fit_together(task, work):
  assert (work[task] / "config.json").is_file() and not list(work[task].rglob("*.tmp"))
  assert {p.name for p in (work[task] / "checkpoints").iterdir()} == set(TASKS[task])
  assert all((work[task] / f"checkpoints/{name}/4/manifest/metadata").is_file() for name in TASKS[task])
  assert len(list((work[task] / "report").glob("*.png"))) >= 3
  assert all(list((work[task] / "metrics" / name).glob("events.out.tfevents.*")) for name in TASKS[task])
  files = (("problems", Problem), ("candidates", Candidate))
  read = {s: [jsonl.read_records(work[task] / f"{kind}/{s}.jsonl", of) for kind, of in files] for s in _splits(task)}
  for problems, pool in read.values():
    assert {c.problem_id for c in pool} == {p.id for p in problems}
    assert len({(c.problem_id, c.index) for c in pool}) == len(pool)
    assert {c.correct for c in pool} == {True, False}
  ledger = json.loads((work[task] / "rationales/ledger.json").read_text())
  for split in ("train", "val"):
    written = jsonl.read_records(work[task] / "rationales" / f"{split}.jsonl", Rationale)
    label = {(c.problem_id, c.index): c.correct for c in read[split][1]}
    assert all(r.verdict is label[r.problem_id, r.candidate_index] for r in written if r.kept)
    assert sum(row["kept"] for row in ledger[split].values()) == sum(r.kept for r in written) > 0


@every_task
def test_every_candidate_is_scored_with_all_votes(task, work):
  for name, split, path in _scores(task):
    pool = jsonl.read_records(work[task] / "candidates" / f"{split}.jsonl", Candidate)
    scores = jsonl.read_records(work[task] / path, Score)
    assert [(s.problem_id, s.candidate_index) for s in scores] == [(c.problem_id, c.index) for c in pool]
    assert {s.verifier for s in scores} == {name}
    steps = {int(p.name) for p in (work[task] / "checkpoints" / name).iterdir()} if name != "judge" else {0}
    assert {s.step for s in scores} <= steps
    for s in scores:
      assert len(s.votes) == VOTES[name] and all(v.state in VOTE_STATES for v in s.votes)
      numbers = [v.p_yes for v in s.votes if v.p_yes is not None]
      assert s.value == (pytest.approx(sum(numbers) / len(numbers)) if numbers else None)
      assert all((v.p_no is None) == (v.p_yes is None or name == "dpo") for v in s.votes)
      assert all(0 <= v.p_yes <= 1 and v.p_yes + (v.p_no or 0) <= 1 + 1e-6 for v in s.votes if v.p_yes is not None)
    assert len({s.value for s in scores}) > len(scores) / 4, "scores differ by candidate"
    of_text = {}
    for c, s in zip(pool, scores, strict=True):
      assert of_text.setdefault((c.problem_id, c.text), s.votes) == s.votes


@every_task
def test_metrics_and_report_are_of_this_run(task, work):
  for name in TASKS[task]:
    lines = [json.loads(line) for line in (work[task] / "metrics" / f"{name}.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 2, 4, 4]
    assert all("train/loss" in line or "eval/loss" in line for line in lines)
  results = json.loads((work[task] / "report/results.json").read_text())
  assert (results["meta"]["task"], results["meta"]["variant"]) == (task, "smoke")
  assert list(results["verifiers"]) == _verifiers(task)
  assert list(results["generation"]) == ([] if task == "gsm8k" else ["genrm_cot"])
  if "in_distribution" in _splits(task):
    assert list(results["in_distribution"]["verifiers"]) == _verifiers(task)
    assert results["in_distribution"]["verifiers"] != results["verifiers"]
  page = (work[task] / "report/index.html").read_text()
  text = (work[task] / "report/report.md").read_text()
  assert all(name in page and name in text for name in map(tables.method_name, _verifiers(task)))
  stages = [p.stem for p in (work[task] / "stages").iterdir()]
  assert set(results["meta"]["wall_seconds"]) == set(stages) - {"report"}


def test_other_runs_start_from_a_base_or_build_on_the_solutions_of_a_run(work):
  asset = work["base"] / "asset"
  config = pretrained.open_checkpoint(asset).config
  assert (config.num_layers, config.embed_dim, config.vocab_size) == (1, 32, 102)
  assert "it is no verifier" in (asset / "README.md").read_text()
  for name, start in (("generator", "gemma, files "), ("orm", "gemma, files "), ("dpo", "generator")):
    manifest = saved.read_manifest(saved.find(work["word_sorting"] / "checkpoints" / name)[0])
    assert manifest["init_from"].startswith(start)
  here, study = work["last_letter"], work["study"]
  for split in ("train", "val", "eval"):
    for file in (f"problems/{split}.jsonl", f"candidates/{split}.jsonl"):
      assert (here / file).read_bytes() == (study / file).read_bytes()
  assert [p.name for p in (study / "checkpoints").iterdir()] == ["genrm_cot"]
  metrics = [json.loads(line) for line in (study / "metrics/genrm_cot.jsonl").read_text().splitlines()]
  assert all(line["train/loss_solve"] > 0 for line in metrics if "train/loss" in line)
  own = jsonl.read_records(study / "candidates/by_genrm_cot.jsonl", Candidate)
  problems = jsonl.read_records(study / "problems/eval.jsonl", Problem)
  assert [c.problem_id for c in own] == [p.id for p in problems for _ in range(4)]
  assert {c.source.partition("/")[0] for c in own} == {"genrm_cot"}
  results, main = (json.loads((folder / "report/results.json").read_text()) for folder in (study, here))
  assert results["meta"]["bank"] == main["meta"]["bank"]
  assert (results["generation"]["genrm_cot"]["num_candidates"], "in_distribution" in results) == (48, False)


def test_a_second_start_does_nothing_and_one_with_another_config_is_refused(work, tmp_path):
  place = shutil.copytree(work["last_letter"], tmp_path / "work")
  flags, before = ("--config=last_letter:smoke", f"--workdir={place}"), _tree(place)
  code, out, err = _called("last_letter", *flags)
  *lines, last = err.splitlines()
  assert (code, out) == (0, "") and last.endswith("nothing was run"), err
  assert all(re.fullmatch(r"\w+: done before", line) for line in lines), err
  code, out, err = _called("last_letter", *flags, "--config.seed=1")
  assert (code, out, err.count("\n")) == (1, "", 1), err
  message = r"stage problems was begun or done, but seed has changed; stage generator .*\. Add --rerun to do them again"
  assert re.match(f"error: {re.escape(str(place))}: {message}", err) and _tree(place) == before, err
