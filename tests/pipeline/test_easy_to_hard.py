"""Trained verifiers are evaluated on someone's problems and solutions, and what is wrong is said in one message."""

import json
import re

import ml_collections
import processes
import pytest
import saved_runs
from refusals import refused

from experiments import math500 as experiment
from experiments.configs import math500 as configs
from genrm_jax.data import jsonl
from genrm_jax.pipeline import stages as staging
from genrm_jax.pipeline.run import Run
from genrm_jax.records import Score

pytest.importorskip("math_verify")

PROBLEMS = [
  {"problem": "Halve $1$.", "answer": r"\frac{1}{2}", "solution": r"\boxed{\frac{1}{2}}", "unique_id": "test/a.json"},
  {"problem": "Factor $x² - 1$.", "answer": "(x-1)(x+1)", "level": 2, "unique_id": "test/b.json"},
]
SOLUTIONS = [
  {"unique_id": "test/a.json", "solution": r"It is $\boxed{0.5}$."},
  {"unique_id": "test/b.json", "solution": r"So \boxed{(x+1)(x-1)}."},
  {"problem": "Halve $1$.", "solution": r"It is \boxed{2}."},
  {"problem": "Halve $1$.", "solution": r"It is \boxed{2"},
  {"problem": "Halve $1$.", "solution": "no answer", "correct": True},
  {"unique_id": "test/b.json", "solution": "9" * 4000 + r" \boxed{" + "9" * 1_000_000 + "}"},
  {"unique_id": "test/b.json", "solution": "The answer is $x^2 - 1$.", "correct": False},
  {"unique_id": "test/b.json", "solution": r"So \boxed{(x+1)(x-1)}."},
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
  """A checkpoint of verifiers that were not trained, and of the base that they start from."""
  folder = tmp_path_factory.mktemp("runs")
  changes = {f"verifiers__{name}__init_from": "" for name in ("orm", "genrm_cot")}
  run = saved_runs.run_of(folder / "sums", "gsm8k", **changes)
  letters = saved_runs.run_of(folder / "letters", "last_letter", verifiers__genrm__init_from="")
  return {
    **{name: saved_runs.save(run, name) for name in ("orm", "genrm_cot", "base")},
    "letters": saved_runs.save(letters, "genrm"),
  }


def _file(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


def _run(workdir, variant="smoke", **changes):
  config = configs.get_config(variant)
  config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
  return Run(ml_collections.FrozenConfigDict(config), workdir)


def _with_files(tmp_path, verifier, **changes):
  files = {"problems": _file(tmp_path / "problems", PROBLEMS), "solutions": _file(tmp_path / "solutions", SOLUTIONS)}
  small = {"report__ns": (1, 2), "report__ks": (1, 3), "engine__rows_per_batch": 8}
  small |= {"votes__num_votes": 3, "votes__sample__max_new_tokens": 4}  # the checkpoint itself says 2 and 8
  return _run(tmp_path / "work", "tiny", **{"verifier": str(verifier), **files, **small, **changes})


def _all_stages(run):
  stages = experiment.make_stages(run)
  staging.run_stages(run.workdir, run.config.to_dict(), stages, [], lambda line: None)
  return jsonl.read_json(run.path("report", "results.json"))


def test_problems_of_files_are_graded_scored_and_reported(checkpoints, tmp_path):
  verifiers = f"{checkpoints['genrm_cot']}, {checkpoints['orm']}"
  run = _with_files(tmp_path, verifiers)
  results = _all_stages(run)
  right = PROBLEMS[0]["answer"], PROBLEMS[1]["answer"]
  of_a = [(right[0], True), ("2", False), (None, False), (None, True)]
  of_b = [(right[1], True), (None, False), (right[1], False), (right[1], True)]
  assert [(c.problem_id, c.answer, c.correct) for c in run.candidates("eval")] == [
    (f"test/{name}.json", *graded) for name, pool in (("a", of_a), ("b", of_b)) for graded in pool
  ]
  ledger = jsonl.read_json(run.path("candidates", "ledger.json"))
  once = ("in a box without end", "nowhere", "longer than 1,000 characters", 'after "The answer is"')
  assert ledger["answers"] == {"in a box": 4, **dict.fromkeys(once, 1)}
  assert ledger["comparisons"] == {"equal": 3, "different": 1} and ledger["not_compared"] == []
  assert ledger["labelled_by_file"] == 2
  assert ledger["labelled_otherwise"] == [
    {"problem_id": p, "index": i} for p, i in (("test/a.json", 3), ("test/b.json", 2))
  ]

  assert list(results["verifiers"]) == ["genrm_cot", "orm"]
  assert results["pass1"]["value"] == pytest.approx((2 / 4 + 2 / 4) / 2, abs=1e-5)
  for name, votes in (("genrm_cot", 3), ("orm", 1)):
    scores = {(s.problem_id, s.candidate_index): s for s in jsonl.read_records(run.path(f"scores/{name}.jsonl"), Score)}
    unread = scores.pop(("test/b.json", 1))
    assert unread.value is None and [v.state for v in unread.votes] == ["truncated"] * votes, "too long"
    assert all(len(s.votes) == votes and s.step == 4 for s in scores.values()) and len(scores) == 7
    assert all(vote.num_tokens <= 4 for s in scores.values() for vote in s.votes)
    assert scores["test/b.json", 3].votes == scores["test/b.json", 0].votes != scores["test/b.json", 2].votes
    assert results["verifiers"][name]["coverage"]["scored"] == sum(s.value is not None for s in scores.values()) > 0
  stages, said = experiment.make_stages(run), []
  staging.run_stages(run.workdir, run.config.to_dict(), stages, [], said.append)
  assert said[-1].endswith("nothing was run")
  _file(tmp_path / "solutions", SOLUTIONS[:-1])
  again = staging.run_stages, run.workdir, run.config.to_dict(), stages, [], said.append
  refused(("stage candidates was begun or done, but solutions has changed", *again))


def test_verifiers_of_one_name_are_numbered(checkpoints, tmp_path):
  both = ",".join(str(checkpoints[name]) for name in ("orm", "letters", "orm"))
  stages = experiment.make_stages(_run(tmp_path, verifier=both))
  assert [s.name for s in stages] == ["problems", "candidates", "score_orm_1", "score_genrm", "score_orm_2", "report"]
  saved_runs.check_order(stages)
  assert not any(tmp_path.iterdir())

  def make(key, value):
    run = _with_files(tmp_path, **{"verifier": str(checkpoints["orm"]), key: str(value)})
    assert not run.workdir.exists()
    experiment.make_stages(run)

  refused(
    (r"set --config\.verifier=RUN/checkpoints/NAME", make, "verifier", ""),
    (r"/checkpoints/base is a run's base, not a verifier", make, "verifier", checkpoints["base"]),
    (r"no checkpoint at .*/none: check the path", make, "verifier", "none"),
    (r"no checkpoint at .*/problems", make, "verifier", tmp_path / "problems"),
    (r"set --config\.problems=FILE", make, "problems", ""),
    (r"/gone: no such file; check --config\.problems", make, "solutions", tmp_path / "gone"),
  )
  assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("variant", ["paper", "tiny", "smoke"])
def test_a_config_is_plain_and_asks_for_no_more_than_there_is(variant, tmp_path):
  config = configs.get_config(variant)
  assert config.variant == variant and config.is_locked
  run = _run(tmp_path, variant)
  assert run.sample_config("votes").max_new_tokens < config.engine.max_tokens and run.engine_mesh.shape
  assert max(config.report.ns) <= config.task.num_candidates and max(config.report.ks) == config.votes.num_votes


def test_a_verifier_of_other_texts_and_too_few_solutions_are_told(checkpoints, tmp_path):
  run = _with_files(tmp_path, checkpoints["letters"], report__ns=(1, 8))
  experiment.read_problems(run)
  refused((r"report\.ns goes up to 8, but no problem .* more than 4", experiment.grade_solutions, run))
  run = _with_files(tmp_path, checkpoints["letters"], task__num_candidates=2)
  experiment.grade_solutions(run)
  assert jsonl.read_json(run.path("candidates/ledger.json"))["not_used"] == 4
  tight = _with_files(tmp_path, checkpoints["orm"], task__num_candidates=2, engine__max_tokens=8)
  for of, message in (
    (run, r"/checkpoints/genrm cannot score these problems: candidate 0 of test/b\.json: the char tokenizer"),
    (tight, r"no solution fits into the context of 8 tokens"),
  ):
    refused((message, experiment.score, of, experiment.given_verifiers(of)[0]))


def test_the_command_line(checkpoints, tmp_path):
  flags = (f"--workdir={tmp_path / 'work'}", f"--config.verifier={checkpoints['genrm_cot']}")
  done = processes.run("-m", "experiments.math500", "--config=experiments/configs/math500.py:smoke", *flags)
  assert done.returncode == 0, done.stderr
  assert "pass@1 0.500 over 8 solutions" in done.stderr
  page = (tmp_path / "work/report/report.md").read_text()
  assert re.search(r"genrm_cot was trained elsewhere, on gsm8k", page) and "GenRM-CoT" in page
