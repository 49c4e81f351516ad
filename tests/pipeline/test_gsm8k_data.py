"""GSM8K's records: splits, draws, bad rows, someone's own solutions, graders of our own; and the configs of Gemma."""

import gzip
import json
import re

import jax
import numpy as np
import pytest
import saved_runs

from experiments import gsm8k
from experiments.configs import gsm8k as configs
from genrm_jax import verifiers
from genrm_jax.data import jsonl
from genrm_jax.infer.sampling import SampleConfig
from genrm_jax.model import gemma
from genrm_jax.model.config import get_config
from genrm_jax.pipeline import gsm8k_data, scoring, verifier_stages
from genrm_jax.pipeline.run import Run
from genrm_jax.pytrees import TokenBatch
from genrm_jax.records import Candidate, Problem, Score, Vote
from genrm_jax.runtime.errors import UserError
from genrm_jax.tasks.gsm8k import released
from genrm_jax.tasks.gsm8k.sample import write as write_release
from genrm_jax.text.prompts import Prompter, make_format
from genrm_jax.text.tokenizer import CharTokenizer

ASK = make_format("genrm").verdict_question


def _run(workdir, **changes):
  return saved_runs.run_of(workdir, "gsm8k", **changes)


def test_evaluation_has_a_draw_from_the_pool_alone(tmp_path):
  """The direct set was chosen by label, so it is trained on and not drawn from."""
  drawn = []
  for seed, num in ((0, 3), (0, 3), (1, 3), (0, 9)):
    run = _run(tmp_path / str(len(drawn)), seed=seed, task__eval_candidates=num)
    gsm8k_data.read_release(run)
    drawn.append({(c.problem_id, c.index) for c in run.candidates("eval")})
    assert {c.source for c in run.candidates("eval") + run.candidates("val")} == {released.SOURCE}
    assert {c.source for c in run.candidates("train")} == {released.SOURCE, released.DIRECT_SOURCE}
    assert len(drawn[-1]) == 6 * min(num, 4)
  assert drawn[0] == drawn[1] != drawn[2]
  of_all = {problem: {i for p, i in drawn[3] if p == problem} for problem, _ in drawn[3]}
  left_out = {min(of_all[p] - {i for q, i in drawn[0] if q == p}) for p in of_all}
  assert len(left_out) > 1, "each problem has a draw of its own"


def test_a_few_bad_rows_are_counted_and_the_rest_is_read(tmp_path):
  folder = write_release(tmp_path / "data", 60, 0)
  path = folder / "genrm-critiques/critiques/data_collection/critique_gen_correct_solutions_round_0_shard_0.jsonl.gz"
  with gzip.open(path, "rt") as f:
    lines = f.readlines()
  lines[7] = "{broken\n"
  lines[20] = json.dumps(json.loads(lines[20]) | {"verifier_output": ""}) + "\n"
  with gzip.open(path, "wt") as f:
    f.writelines(lines)
  run = _run(tmp_path / "run", variant="tiny", data_dir=str(folder), task__num_train=0)
  gsm8k_data.read_release(run)
  left_out = jsonl.read_json(run.path("problems/left_out.json"))
  assert left_out["left_out"] == 2 and left_out["rows"] == 60 * 6
  assert left_out["files"][str(path)]["left_out"] == {
    "empty rationale": {"rows": 1, "first_lines": [21]},
    "not JSON": {"rows": 1, "first_lines": [8]},
  }
  ledger = jsonl.read_json(run.path("rationales/ledger.json"))
  assert ledger["filter"] == "lenient-2"
  asked = sum(ledger[split][label]["all"] for split in ("train", "val") for label in ("correct", "incorrect"))
  assert asked == 60 * 4 - 2 - len(run.candidates("eval"))


def test_solutions_of_ones_own_are_evaluated(tmp_path):
  folder = write_release(tmp_path / "data", 40, 0)
  tests = [{"question": f"What is {i} + 1?", "answer": f"It is {i + 1}.\n#### {i + 1}"} for i in range(3)]
  gsm8k_dir = folder / "grade-school-math/grade_school_math/data"
  (gsm8k_dir / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tests))
  own = tmp_path / "own.jsonl"
  rows = [{"question": "What is 1 + 1?", "solution": f"The answer is {n}."} for n in (2, 3)]
  own.write_text("".join(json.dumps(row) + "\n" for row in rows))
  changes = dict(variant="tiny", data_dir=str(folder), task__num_train=0, task__candidates=str(own))
  run = _run(tmp_path / "run", **changes)
  gsm8k_data.read_release(run)
  assert [p.question for p in run.problems("eval")] == ["What is 1 + 1?"]
  assert [c.correct for c in run.candidates("eval")] == [True, False]
  assert len(run.problems("train")) == 40 - 6, "none of the pool's problems is held out in vain"
  assert any("own.jsonl" in note for note in _notes(run))


def _notes(run):
  """What the report is told, with nothing scored."""
  told = []
  original = verifier_stages.report_stage
  try:
    verifier_stages.report_stage = lambda run, stages, notes: told.extend(notes) or original(run, stages, notes)
    gsm8k.make_stages(run)
  finally:
    verifier_stages.report_stage = original
  return told


class Grader:
  """An engine that finds every solution right whose prompt holds no "+ 1"."""

  max_tokens = 4096

  def __init__(self, tokenizer):
    self.tokenizer, self.asked = tokenizer, []

  def write(self, prompts, keys, settings, watch, label):
    assert keys.shape == (len(prompts), 1)
    self.asked += [self.tokenizer.decode(ids) for ids in prompts]
    return [[(self.tokenizer.encode(f"It adds up.\n\n{ASK} Yes"), None)] for _ in prompts]


@pytest.mark.parametrize("way", ["reference", "plain"])
def test_a_grader_of_our_own(way, tmp_path, monkeypatch):
  run = _run(tmp_path, grader__way=way, grader__num_rationales=2, grader__max_per_label=1)
  names = [stage.name for stage in gsm8k.make_stages(run)]
  assert names.index("base") < names.index("grade") < names.index("train_genrm_cot")
  grader = Grader(CharTokenizer())
  monkeypatch.setattr(Run, "tokenizer", CharTokenizer())
  monkeypatch.setattr(Run, "init_params", lambda self, name, mesh: {})
  monkeypatch.setattr(Run, "engine", lambda self, params: grader)
  gsm8k_data.read_release(run)
  assert not run.path("rationales").exists(), "the released ones are not used"
  gsm8k_data.grade(run)
  written = run.rationales("train")
  label = {(c.problem_id, c.index): c.correct for c in run.candidates("train")}
  assert {r.source for r in written} == {f"base/{way}"}
  assert len(written) == 12 * 2 * 2 and {r.index for r in written} == {0, 1}
  assert all(r.kept == label[r.problem_id, r.candidate_index] for r in written), "it says Yes to all"
  assert all(r.text == "It adds up." for r in written)
  assert ("Expected Answer: " in grader.asked[0]) == (way == "reference")
  assert any(ASK in text for text in grader.asked) == (way == "reference"), "the release's prompt asks for its form"
  if way == "reference":
    solution, reference = re.search(r"\nSolution: (.*)\nExpected Answer: (.*)", grader.asked[0]).groups()
    assert solution != reference


def test_an_unknown_way_of_grading_is_told_before_anything_runs(tmp_path):
  with pytest.raises(UserError, match=r"config\.grader\.way is 'mine'; it is released, reference or plain"):
    gsm8k.make_stages(_run(tmp_path, grader__way="mine"))


def test_a_solution_that_does_not_fit_has_no_score_and_is_counted(monkeypatch, capsys):
  problem = Problem("p", "gsm8k", "eval", "?", "1")
  pool = [Candidate("p", i, text, "1", True, "s") for i, text in enumerate(["short", "long" * 50, "short"])]
  prompter = Prompter(CharTokenizer(), make_format("compact"))
  engine = type("Engine", (), {"max_tokens": 100})

  def score(verifier, engine, prompter, problems, candidates, **_):
    return [Score(c.problem_id, c.index, verifier.name, 7, 0.5, (Vote("ok", 0.5, 0.5, 1),) * 3) for c in candidates]

  monkeypatch.setattr(verifiers, "score_candidates", score)
  settings = SampleConfig(max_new_tokens=40, temperature=1.0)

  def scored(pool):
    return scoring.score_pool(
      verifiers.GENRM_COT, engine, prompter, [problem], pool, step=7, seed=0, num_votes=3, settings=settings
    )

  values = [(s.candidate_index, s.value, {v.state for v in s.votes}, len(s.votes)) for s in scored(pool)]
  assert values == [(0, 0.5, {"ok"}, 3), (1, None, {"truncated"}, 3), (2, 0.5, {"ok"}, 3)]
  assert "1 of 2 solutions do not fit into the context" in capsys.readouterr().err
  with pytest.raises(UserError, match=r"no solution fits into the context of 100 tokens, the shortest needs \d+"):
    scored(pool[1:2])


def test_training_examples_that_were_left_out_are_told(tmp_path):
  run = _run(tmp_path)
  told = {"left_out": 12, "examples": 3456, "row_length": 64}
  jsonl.write_json(run.path("metrics/genrm.examples.json"), {"train": told, "val": told})
  jsonl.write_json(run.path("metrics/orm.examples.json"), {"train": told | {"left_out": 0}, "val": told})
  assert verifier_stages._left_out(run) == [
    "genrm: 12 of 3,456 training examples are longer than a row of 64 tokens and were left out."
  ]


@pytest.mark.parametrize("model", configs.MODELS)
def test_the_losses_of_gemma_by_their_shapes(model):
  config = configs.get_config(model)
  assert set(config.verifiers) == {"judge", "dpo", "orm", "genrm", "genrm_cot"}
  made = get_config(config.model.size, dtype=config.model.dtype, param_dtype=config.model.param_dtype)
  params = jax.eval_shape(lambda key: gemma.init(made, key), jax.random.key(0))
  assert made.name == model and sum(p.size for p in jax.tree.leaves(params)) == sum(gemma.num_params(made))
  prompter = type("P", (), {"tokenizer": type("T", (), {"cls_id": 3})})
  for name in ("orm", "genrm_cot"):
    settings = config.verifiers[name]
    shape = (2, settings.row_length)
    rows = TokenBatch(
      **{f: jax.ShapeDtypeStruct(shape, "int32") for f in ("tokens", "targets", "positions", "segments", "kind")},
      weights=jax.ShapeDtypeStruct(shape, "float32"),
    )
    loss = verifiers.make_loss(verifiers.get_verifier(name), made, prompter, 64, settings.solve_weight)
    value, _ = jax.eval_shape(lambda p, b, loss=loss: loss(p, b), params, rows)
    assert value.shape == ()


@pytest.mark.parametrize("model", configs.MODELS)
@pytest.mark.parametrize("kind", configs.KINDS)
def test_one_kind_of_verifier_alone(model, kind):
  config = configs.get_config(f"{model}_{kind}")
  both = configs.get_config(model)
  assert list(config.verifiers) == (["genrm", "genrm_cot"] if kind == "unified" else [kind])
  weights = {v.get("solve_weight", 0.0) for v in config.verifiers.values()}
  assert weights == ({0.25} if kind == "unified" else {0.0})
  if kind in ("judge", "dpo", "orm"):
    assert config.verifiers[kind] == both.verifiers[kind]
  assert config.model == both.model and config.model.size == model
  longest = np.max([v.row_length for v in config.verifiers.values() if "row_length" in v], initial=0)
  assert longest <= config.engine.max_tokens
