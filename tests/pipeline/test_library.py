"""The four functions do what the commands do, in the tour too, and `load` scores as the run did."""

import copy
import dataclasses
import json
import shutil

import jax
import numpy as np
import processes
import pytest
import saved_runs
from refusals import refused

import genrm_jax
from experiments.configs import common
from genrm_jax.data import jsonl
from genrm_jax.pipeline import api
from genrm_jax.records import Candidate, Problem, Score
from genrm_jax.runtime import sharding

VERIFIERS = ("judge", "dpo", "orm", "genrm", "genrm_cot")

# Before and after the cells of the tour, in its workdir.
_BEFORE = """
import dataclasses, json, pathlib
import genrm_jax

smoke = genrm_jax.get_config("last_letter:smoke")
first_trained = list(genrm_jax.train(smoke, "runs/tour", ["genrm_cot", "judge"]))
first_stages = sorted(p.stem for p in pathlib.Path("runs/tour/stages").iterdir())
first_scores = genrm_jax.score("last_letter:smoke", "runs/tour", ["genrm_cot"])
"""
_AFTER = """
first_scores = {name: [dataclasses.asdict(s) for s in scores] for name, scores in first_scores.items()}
pathlib.Path("learned.json").write_text(json.dumps([first_trained, first_stages, first_scores, results]))
"""


@pytest.fixture(scope="module")
def tour(tmp_path_factory):
  """The workdir after the cells of the tour with the smoke config in place of its own, and what the functions gave."""
  folder = tmp_path_factory.mktemp("tour")
  cells = json.loads((processes.ROOT / "docs/tour.ipynb").read_text())["cells"]
  code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
  assert "last_letter:tour" in code[0] and len(code) >= 7
  cells = "\n".join(code).replace("last_letter:tour", "last_letter:smoke")
  done = processes.run("-c", _BEFORE + cells + _AFTER, cwd=folder, MPLBACKEND="Agg")
  assert done.returncode == 0, done.stderr
  assert "of 4 candidates; a single one is right in" in done.stdout
  return folder / "runs/tour", *json.loads((folder / "learned.json").read_text())


def test_each_function_does_what_it_needs_and_no_more(tour):
  folder, trained, stages, scores, results = tour
  assert trained == ["genrm_cot", "judge"]
  assert stages == ["candidates", "generator", "problems", "rationales", "train_genrm_cot"]
  read = [dataclasses.asdict(s) for s in jsonl.read_records(folder / "scores/genrm_cot.jsonl", Score)]
  assert scores == {"genrm_cot": json.loads(json.dumps(read))}
  assert list(results["verifiers"]) == list(VERIFIERS)
  assert results == json.loads((folder / "report/results.json").read_text())
  assert set(results["meta"]["best_by"].values()) == {"loss_verify"}
  moved = folder.rename(folder.with_name("moved"))  # a run is its content, wherever that lies
  before = {p: p.stat().st_mtime_ns for p in moved.rglob("*") if p.is_file()}
  assert genrm_jax.evaluate("last_letter:smoke", moved) == results
  assert {p: p.stat().st_mtime_ns for p in moved.rglob("*") if p.is_file()} == before
  moved.rename(folder)


def test_the_command_leaves_the_same_files(tour, smoke_run):
  """Also the determinism of a run: another process, the same bytes."""
  folder, *_ = tour
  kinds = ("problems", "candidates", "rationales", "metrics", "scores")
  files = [p.relative_to(folder) for kind in kinds for p in sorted((folder / kind).rglob("*.json*"))]
  assert len(files) >= 26
  assert [str(f) for f in files if (folder / f).read_bytes() != (smoke_run / f).read_bytes()] == []


@pytest.mark.parametrize("name", VERIFIERS)
def test_what_is_loaded_scores_as_the_run_did(name, tour):
  folder, *_ = tour
  wanted = jsonl.read_records(folder / f"scores/{name}.jsonl", Score)
  problems = jsonl.read_records(folder / "problems/eval.jsonl", Problem)
  pool = jsonl.read_records(folder / "candidates/eval.jsonl", Candidate)
  if name == "judge":
    verifier = genrm_jax.train("last_letter:smoke", folder, ["judge"])["judge"]
  else:
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    verifier = genrm_jax.load(folder / "checkpoints" / name, mesh=mesh)
  found = verifier.score_candidates(problems, pool)
  question = {p.id: p.question for p in problems}
  many = verifier.score_many([(question[c.problem_id], c.text) for c in pool])
  assert [s.value for s in found] == many
  for a, b in zip(found, wanted, strict=True):
    assert dataclasses.replace(a, value=None, votes=()) == dataclasses.replace(b, value=None, votes=())
    assert [(v.state, v.text, v.num_tokens) for v in a.votes] == [(v.state, v.text, v.num_tokens) for v in b.votes]
    p_a, p_b = ([v.p_yes for v in s.votes if v.p_yes is not None] for s in (a, b))
    np.testing.assert_allclose(p_a, p_b, rtol=2e-5)


def test_further_rows_are_scored_in_a_finished_run(smoke_run, tmp_path):
  """The DPO score with its reference and a greedy rationale, from the models as they are; only the report is redone."""
  folder, config = shutil.copytree(smoke_run, tmp_path / "work"), genrm_jax.get_config("last_letter:smoke")
  with config.unlocked():
    config.verifiers.dpo_reference = common.dpo_reference(init_from="generator", beta=0.3)
    config.verifiers.genrm_cot_greedy = common.greedy()
  for change, message in (
    (dict(of="nobody"), "builds on the scores of 'nobody'"),
    (dict(of="genrm_cot"), "builds on the scores of 'genrm_cot'; config.verifiers must have that before"),
    (dict(init_from=""), "init_from is '', but its reference, the start of dpo, is 'generator'"),
  ):
    wrong = copy.deepcopy(config)
    wrong.verifiers.dpo_reference.update(change)
    refused((message, api.open_run, wrong, folder))
  before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and "report" not in str(p)}
  results = genrm_jax.evaluate(config, folder, rerun=True)
  assert {p: p.stat().st_mtime_ns for p in before if p.name != "config.json"}.items() <= before.items()
  assert list(results["verifiers"]) == [
    "judge",
    "dpo",
    "dpo_reference",
    "orm",
    "genrm",
    "genrm_cot",
    "genrm_cot_greedy",
  ]
  assert results["likelihoods"] == ["dpo", "dpo_reference"]

  run = api.open_run(config, folder)
  problems, pool = run.problems("eval"), run.candidates("eval")
  cot, dpo = run.trained_verifier("genrm_cot"), run.trained_verifier("dpo")
  how = dataclasses.replace(cot.how, num_votes=1, sample=dataclasses.replace(cot.how.sample, temperature=0.0))
  wanted = dataclasses.replace(cot, how=how).score_candidates(problems, pool)
  greedy = run.scores("genrm_cot_greedy", "eval")
  assert [(s.step, s.votes[0].text, s.votes[0].state) for s in greedy] == [
    (s.step, s.votes[0].text, s.votes[0].state) for s in wanted
  ]
  params, _ = run.load_params("generator", run.engine_mesh)
  of_reference = dataclasses.replace(dpo, engine=run.engine(params)).score_candidates(problems, pool)
  gains = [np.log(a.value / b.value) for a, b in zip(run.scores("dpo", "eval"), of_reference, strict=True)]
  found = run.scores("dpo_reference", "eval")
  np.testing.assert_allclose([s.value for s in found], 1 / (1 + np.exp(-0.3 * np.array(gains))), rtol=1e-4)
  assert len(set(np.round(gains, 4))) > len(pool) / 4 and {s.step for s in found} == {dpo.step}


def test_what_cannot_be_used_is_one_message(tour, tmp_path, monkeypatch):
  folder, *_ = tour
  config = genrm_jax.get_config("last_letter:smoke")
  refused(("the config has no verifier prm; it has: judge", genrm_jax.train, config, folder, ["prm"]))
  config.seed = 1
  refused(("stage problems was begun or done, but seed has changed", genrm_jax.score, config, folder))
  ran = []
  monkeypatch.setattr(api.stages, "run_stages", lambda workdir, config, every, chosen, *_: ran.append(chosen))
  run = saved_runs.run_of(tmp_path)
  api.run_up_to(run, ["score_orm"])
  assert set(ran[0]) == {"problems", "generator", "candidates", "train_orm", "score_orm"}
  monkeypatch.setattr(api, "open_run", lambda config, workdir: saved_runs.run_of(tmp_path, "gsm8k"))
  assert list(api.train("gsm8k:smoke", tmp_path, ["orm"])) == ["orm"], "opened when it is used"
  assert set(ran[1]) == {"release", "tokenizer", "base", "train_orm"}
  config = saved_runs.run_of(tmp_path, "gsm8k", "gemma_2b_judge", tokenizer__path="t", model__checkpoint="c")
  monkeypatch.setattr(api, "open_run", lambda *args: config)
  assert list(api.train("gsm8k:gemma_2b_judge", tmp_path)) == ["judge"] and ran[2] == ["tokenizer"]
