"""Problems, solutions and rationales of every task, what verifiers are trained on, and runs on another run's bank."""

import gzip
import json
import re

import numpy as np
import pytest
import saved_runs
from refusals import refused

from genrm_jax.data import jsonl
from genrm_jax.infer.engine import Rollout
from genrm_jax.pipeline import data_stages, fitting, stages
from genrm_jax.pipeline.experiment import make_stages
from genrm_jax.pipeline.run import Run
from genrm_jax.pytrees import KIND_SOLVE, KIND_VERIFY
from genrm_jax.records import Rationale
from genrm_jax.tasks.gsm8k.sample import write as write_release
from genrm_jax.tasks.last_letter import LastLetter, read_list, write_placed
from genrm_jax.text.tokenizer import CharTokenizer

SPLITS = ("train", "val", "eval", "in_distribution")


def _run(workdir, task="last_letter", variant="smoke", **changes):
  if task != "gsm8k":
    small = {f"task__{split}__num_problems": 12 for split in ("train", "val", "eval") if variant != "smoke"}
    changes = {"model__checkpoint": "", "candidates__num_train": 4, "candidates__num_eval": 4, **small, **changes}
  return saved_runs.run_of(workdir, task, variant, **changes)


def _do(run, *names):
  stages.run_stages(run.workdir, run.config.to_dict(), make_stages(run), names, lambda line: None)


class Scripted:
  """An engine that answers each prompt with what `write` makes of its text; it remembers the prompts."""

  def __init__(self, write, tokenizer=None):
    self.tokenizer, self.write, self.prompts, self.max_tokens = tokenizer or CharTokenizer(), write, [], 4096

  def generate(self, prompts, keys, settings, tracked, label):
    assert keys.shape[0] == len(prompts)
    texts = [self.tokenizer.decode(ids) for ids in prompts]
    self.prompts += texts
    none = np.zeros((0, 0))
    return [[Rollout(self.tokenizer.encode(self.write(t, i)), none) for i in range(keys.shape[1])] for t in texts]


def _use(monkeypatch, engine, step=4):
  monkeypatch.setattr(Run, "load_params", lambda self, name, mesh: ({}, step))
  monkeypatch.setattr(Run, "init_params", lambda self, name, mesh: {})
  monkeypatch.setattr(Run, "engine", lambda self, params: engine)
  return engine


def _letters(prompt, i):
  """A correct solution for an even index, an incorrect one for an odd index."""
  words, first = read_list(prompt.removeprefix("S").removesuffix("="))
  return write_placed([w[-1] if i % 2 == 0 else "z" if w[-1] != "z" else "a" for w in words], first)


@pytest.fixture
def bank(tmp_path, monkeypatch):
  run = _run(tmp_path / "bank", candidates__add_reference=False)
  _use(monkeypatch, Scripted(_letters))
  data_stages.make_problems(run)
  data_stages.make_candidates(run)
  jsonl.write_json(run.path("config.json"), {"hash": "h", "config": run.config.to_dict()})
  return run


def _study(bank, variant, **changes):
  return _run(bank.workdir.parent / variant, variant=variant, bank=str(bank.workdir), **{"report__ns": (4,), **changes})


@pytest.mark.parametrize("task", ["last_letter", "word_sorting", "gsm8k"])
def test_problems_are_a_function_of_the_seed_and_splits_are_disjoint(task, tmp_path):
  texts = []
  for i, seed in enumerate((0, 0, 1)):
    run = _run(tmp_path / str(i), task, seed=seed)
    (data_stages.read_release if task == "gsm8k" else data_stages.make_problems)(run)
    texts.append([run.path("problems", f"{split}.jsonl").read_text() for split in run.splits])
  assert texts[0] == texts[1] and all(a != b for a, b in zip(texts[0], texts[2], strict=True))
  problems = [p for split in run.splits for p in run.problems(split)]
  assert len({p.id for p in problems}) == len({p.question for p in problems}) == len(problems)
  if task == "gsm8k":
    for split in ("train", "val"):
      assert {r.problem_id for r in run.rationales(split)} == {p.id for p in run.problems(split)}
    assert not run.path("rationales", "eval.jsonl").exists(), "the graders of rationales saw the reference"
  else:
    lengths = {split: {len(read_list(p.question)[0]) for p in run.problems(split)} for split in SPLITS}
    assert min(lengths["eval"]) > max(lengths["train"]) and lengths["in_distribution"] <= {2, 3, 4}


def test_a_problem_of_an_earlier_split_is_left_out(tmp_path, monkeypatch, capsys):
  run = _run(tmp_path)
  fixed = run.task.problems("train", run.rng("train"))
  monkeypatch.setattr(LastLetter, "problems", lambda self, split, rng: fixed[: 3 if split == "train" else 5])
  data_stages.make_problems(run)
  assert [len(run.problems(split)) for split in ("train", "val", "eval")] == [3, 2, 0]
  assert "left out 3 problems" in capsys.readouterr().err


def test_a_pretrained_model_is_prompted_with_worked_examples(tmp_path):
  answer = "The last letters are e, h. The answer is eh."
  run = _run(tmp_path, task__style="natural")
  problem = run.task.problems("train", np.random.default_rng(0))[0]
  engine = Scripted(lambda prompt, i: f"{answer}\n\nQ: And of these?\nA: The answer is no.")
  for few_shot, kept in ((False, engine.write("", 0)), (True, answer)):
    pool = data_stages.sample_solutions(run, engine, "s", [problem], 2, few_shot)
    assert [c.text for c in pool] == [kept] * 2, "after worked examples a model goes on to a question of its own"
  alone = f"S{problem.question}="
  assert engine.prompts == [alone, run.task.few_shot("S{question}=") + alone]


def test_solutions_are_graded_and_without_a_shift_training_lists_count_from_0(bank):
  for split in SPLITS:
    pool = bank.candidates(split)
    assert [(c.problem_id, c.index) for c in pool] == [(p.id, i) for p in bank.problems(split) for i in range(4)]
    assert [c.correct for c in pool] == [True, False] * (len(pool) // 2) and {c.source for c in pool} == {"generator/4"}
  run = _study(bank, "no_shift")
  _do(run, "bank", "rationales")
  for split in ("train", "val"):
    before, after = bank.problems(split), run.problems(split)
    assert {p.question[0] for p in before} != {"0"} == {p.question[0] for p in after}
    assert [(p.id, p.answer) for p in after] == [(p.id, p.answer) for p in before]
    labels = [(c.problem_id, c.index, c.correct) for c in run.candidates(split)]
    assert labels == [(c.problem_id, c.index, c.correct) for c in bank.candidates(split)]
    assert all(r.kept for r in run.rationales(split)), "the program agrees with the label"


def test_what_cannot_be_used_is_named_before_anything_runs(bank, tmp_path):
  own_grader, trained = _run(tmp_path, "gsm8k", grader__way="mine"), _run(tmp_path / "x", variant="tiny", bank="other")
  refused(
    (r"config\.grader\.way is 'mine'.*program, released, reference, plain", make_stages, own_grader),
    (r"dpo: init_from.*config\.bank none is trained", make_stages, trained),
  )
  path = bank.path("candidates/eval.jsonl")
  lines = path.read_text().splitlines(keepends=True)
  path.write_text("".join([*lines[:2], lines[2][: len(lines[2]) // 2] + "\n", *lines[3:]]))
  config = bank.path("config.json")
  for change, message in (
    (lambda: None, r"candidates/eval\.jsonl:3: not JSON"),
    (
      lambda: path.write_text(lines[0].replace('"problem_id": "', '"problem_id": "x')),
      r"problem 'x.*eval\.jsonl does not",
    ),
    (path.unlink, r"candidates/eval\.jsonl"),
    (
      lambda: config.write_text(config.read_text().replace("last_letter", "word_sorting")),
      "run of task 'word_sorting'",
    ),
    (lambda: config.write_text('{"config": []}'), "task None"),
    (config.unlink, r"config\.json; config.bank must be the workdir of a run of last_letter"),
  ):
    change()
    refused((message, data_stages.copy_bank, _study(bank, "no_gaps")))


def _examples(run, name):
  verifier = run.verifier(name)
  return [list(fitting._verifier_examples(run, verifier, split)) for split in ("train", "val")]


def test_max_problems_keeps_the_first_problems_of_the_training_split(bank):
  run = _study(bank, "train_3")
  _do(run, "bank", "rationales")
  first = {p.id for p in run.problems("train")[:3]}
  assert run.verifier_names == ["orm", "genrm", "genrm_cot"]
  for name in run.verifier_names:
    train, val = _examples(run, name)
    assert {e.name.split(" of ")[-1] for e in train} == first
    assert len({e.name.split(" of ")[-1] for e in val}) == 12


@pytest.mark.parametrize("variant", ["no_gaps", "lambda_0.3", "lambda_only"])
def test_lambda_decides_what_is_learnt(variant, bank):
  run = _study(bank, variant)
  _do(run, "bank", "rationales")
  train, val = _examples(run, "genrm_cot")
  kinds = {KIND_VERIFY: "lambda_only" not in variant, KIND_SOLVE: "lambda" in variant}
  for examples in (train, val):
    found = {int(k) for e in examples for k in np.unique(e.kind[e.weights > 0])}
    assert found == {kind for kind, is_in in kinds.items() if is_in}
  solved = [e for e in train if KIND_SOLVE in e.kind]
  texts = {(e.name.split()[-1], run.tokenizer.decode(e.targets[e.weights > 0][:-1].tolist())) for e in solved}
  right = {(c.problem_id, c.text) for c in run.candidates("train") if c.correct}
  assert texts == (right if "lambda" in variant else set()) and len(solved) == len(texts)


def test_gaps_are_of_training_alone_and_deterministic(tmp_path):
  run = _run(tmp_path)
  example = fitting.packing.sft_example("e", run.prompter.solve("3mike4dlih;"), run.prompter.solution("DeEh;"), 2)
  got = [[e.positions.tolist() for e in fitting.with_gaps(run, [example] * 20)] for _ in range(2)]
  assert got[0] == got[1] and any(positions[-1] > example.positions[-1] for positions in got[0])
  rows = fitting.held_out(run, "generator", fitting.with_gaps(run, [example] * 60))
  assert (len(list(rows["train"])), len(list(rows["val"]))) == (10, 50)


def test_bad_rows_are_counted_and_solutions_of_ones_own_are_evaluated(tmp_path):
  folder, own = write_release(tmp_path / "data", 40, 0), tmp_path / "own.jsonl"
  path = folder / "genrm-critiques/critiques/data_collection/critique_gen_correct_solutions_round_0_shard_0.jsonl.gz"
  lines = gzip.decompress(path.read_bytes()).decode().splitlines(keepends=True)
  lines[7] = "{broken\n"
  path.write_bytes(gzip.compress("".join(lines).encode()))
  test = {"question": "What is 1 + 1?", "answer": "It is 2.\n#### 2"}
  (folder / "grade-school-math/grade_school_math/data/test.jsonl").write_text(json.dumps(test) + "\n")
  rows = [{"question": test["question"], "solution": f"The answer is {n}."} for n in (2, 3)]
  own.write_text("".join(json.dumps(row) + "\n" for row in rows))
  changes = dict(data_dir=str(folder), task__made_up=0, task__num_train=0, task__candidates=str(own), report__ns=(1, 2))
  run = _run(tmp_path / "run", "gsm8k", **changes)
  data_stages.read_release(run)
  left_out = jsonl.read_json(run.path("problems/left_out.json"))
  assert (left_out["left_out"], left_out["rows"]) == (1, 40 * 6)
  assert left_out["files"][str(path)]["left_out"] == {"not JSON": {"rows": 1, "first_lines": [8]}}
  ledger = jsonl.read_json(run.path("rationales/ledger.json"))
  assert sum(ledger[split][label]["all"] for split in ("train", "val") for label in ("correct", "incorrect")) == 159
  assert [p.question for p in run.problems("eval")] == [test["question"]]
  assert [c.correct for c in run.candidates("eval")] == [True, False]
  assert len(run.problems("train")) == 40 - 6, "no problem of the pool is held out in vain"


def test_missing_or_too_little_data_is_named(tmp_path):
  empty, five = tmp_path / "empty", write_release(tmp_path / "data", 5, 0)
  empty.mkdir()
  for folder, message in (
    ("", r"--config\.data_dir=DIR"),
    (empty, rf"no GSM8K train problems; looked for {empty}/.*git clone"),
    (five, r"asks for \d+ \+ \d+ \+ \d+ problems .* hold 5"),
  ):
    run = _run(tmp_path / "work", "gsm8k", "tiny", data_dir=str(folder), task__rounds=(0,))
    refused((message, data_stages.read_release, run))
  assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("way", ["reference", "plain"])
def test_a_grader_of_our_own(way, tmp_path, monkeypatch):
  run = _run(tmp_path, "gsm8k", grader__way=way, grader__num_rationales=2, grader__max_per_label=1)
  names = [stage.name for stage in make_stages(run)]
  assert names.index("base") < names.index("grade") < names.index("train_genrm_cot")
  question = run.config.prompts.verdict_question
  grader = _use(monkeypatch, Scripted(lambda prompt, i: f"It adds up.\n\n{question} Yes"))
  monkeypatch.setattr(Run, "tokenizer", CharTokenizer())
  data_stages.read_release(run)
  assert not run.path("rationales").exists(), "the released ones are not used"
  data_stages.sample_rationales(run)
  written: list[Rationale] = list(run.rationales("train"))
  label = {(c.problem_id, c.index): c.correct for c in run.candidates("train")}
  assert {r.source for r in written} == {f"base/{way}"} and {r.text for r in written} == {"It adds up."}
  assert len(written) == 12 * 2 * 2 and {r.index for r in written} == {0, 1}
  assert all(r.kept == label[r.problem_id, r.candidate_index] for r in written), "it says Yes to all"
  assert ("Expected Answer: " in grader.prompts[0]) == (way == "reference")
  if way == "reference":
    solution, reference = re.search(r"\nSolution: (.*)\nExpected Answer: (.*)", grader.prompts[0]).groups()
    assert solution != reference
