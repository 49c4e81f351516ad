"""Problems, solutions and rationales of the list tasks, what verifiers are trained on, and runs on another's bank."""

import importlib

import jax
import ml_collections
import numpy as np
import pytest

from experiments.configs import last_letter, word_sorting
from genrm_jax import verifiers
from genrm_jax.data import jsonl, packing
from genrm_jax.model import gemma
from genrm_jax.pipeline import list_tasks, scoring, verifier_stages
from genrm_jax.pipeline import stages as staging
from genrm_jax.pipeline.run import Run
from genrm_jax.pytrees import KIND_SOLVE, KIND_VERIFY
from genrm_jax.records import Score
from genrm_jax.runtime.errors import UserError
from genrm_jax.tasks.last_letter import LastLetter, read_list, write_placed
from genrm_jax.tasks.word_sorting import WordSorting
from genrm_jax.text.tokenizer import CharTokenizer

CONFIGS = {"last_letter": last_letter, "word_sorting": word_sorting}
TASK = LastLetter()


def _run(workdir, name="last_letter", variant="smoke", **changes):
  """A run with a smoke model; `changes` by dotted key, with `__` for the dot."""
  config = CONFIGS[name].get_config(variant)
  small = {f"task.{split}.num_problems": 12 for split in ("train", "val", "eval") if variant != "smoke"}
  config.update_from_flattened_dict(
    {"model.checkpoint": "", "candidates.num_train": 4, "candidates.num_eval": 4, **small}
  )
  config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
  workdir.mkdir(exist_ok=True)
  return Run(ml_collections.FrozenConfigDict(config), workdir)


def _stages(run):
  return importlib.import_module(f"experiments.{run.config.task.name}").make_stages(run)


def _do(run, *names):
  staging.run_stages(run.workdir, _stages(run), names, lambda line: None)


class Writer:
  """An engine that answers each prompt with what `write` makes of its text; it remembers the prompts."""

  def __init__(self, tokenizer, write):
    self.tokenizer, self.answer = tokenizer, write
    self.max_tokens = 384
    self.asked = []

  def write(self, prompts, keys, settings, watch, label):
    self.asked += [self.tokenizer.decode(ids) for ids in prompts]
    texts = [[self.answer(self.tokenizer.decode(ids), i) for i in range(keys.shape[1])] for ids in prompts]
    return [[(self.tokenizer.encode(text), None) for text in row] for row in texts]


def _letters(prompt, i):
  """Of an even index a right solution, of an odd one a wrong one."""
  words, first = read_list(prompt.removeprefix("S").removesuffix("="))
  return write_placed([w[-1] if i % 2 == 0 else "z" if w[-1] != "z" else "a" for w in words], first)


@pytest.fixture
def bank(tmp_path, monkeypatch):
  """A run with problems and solutions, half of them right."""
  run = _run(tmp_path / "bank", candidates__add_reference=False)
  list_tasks.make_problems(run, TASK)
  monkeypatch.setattr(Run, "load_params", lambda self, name, mesh: ({}, 4))
  monkeypatch.setattr(Run, "engine", lambda self, params: Writer(self.tokenizer, _letters))
  list_tasks.make_candidates(run, TASK)
  return run


def _study(bank, variant, **changes):
  return _run(bank.workdir.parent / variant, variant=variant, bank=str(bank.workdir), **changes)


# Solutions


def test_solutions_are_graded_and_say_where_they_come_from(bank):
  for split in ("train", "val", "eval", "in_distribution"):
    pool = bank.candidates(split)
    assert [(c.problem_id, c.index) for c in pool] == [(p.id, i) for p in bank.problems(split) for i in range(4)]
    assert [c.correct for c in pool] == [True, False] * (len(pool) // 2)
    assert {c.source for c in pool} == {"generator/4"}


def test_a_model_as_it_came_is_shown_worked_examples(tmp_path):
  answer = "The last letters are e, h. The answer is eh."
  run = _run(tmp_path, task__style="natural")
  task = LastLetter(style="natural")
  problem = task.problem(np.random.default_rng(0), 2, "train", 0)
  written = f"{answer}\n\nQ: And what of these?\nA: The answer is no."
  writer = Writer(run.tokenizer, lambda prompt, i: written)
  prompted = ml_collections.ConfigDict(run.config.to_dict())
  del prompted.generator
  prompted = Run(ml_collections.FrozenConfigDict(prompted), tmp_path)
  for one, shown, kept in ((run, False, written), (prompted, True, answer)):
    pool = list_tasks.sample_solutions(one, task, writer, "s", [problem], 2, shown)
    assert [c.text for c in pool] == [kept] * 2, "shown examples, a model goes on to a question of its own"
  alone = f"S{problem.question}="
  assert writer.asked == [alone, task.few_shot("S{question}=") + alone]
  assert len(list_tasks._solve_prompt(prompted, task, problem.question, True)) == len(writer.asked[1]) + 1, "one <bos>"


def test_word_sorting_is_evaluated_on_big_bench_hard(data_dir, tmp_path, monkeypatch):
  splits = {f"task__{split}__num_problems": 3 for split in ("train", "val", "in_distribution")}
  files = dict(model__checkpoint="gemma", tokenizer__path="tokenizer.model")
  run = _run(tmp_path, "word_sorting", "paper", task__eval__bbh=str(data_dir), **splits, **files)
  _do(run, "problems")
  problems = {p.question: p for p in run.problems("eval")}
  assert len(run.problems("eval")) == 250 and all(p.task == "word_sorting" for p in problems.values())
  assert [len(run.problems(split)) for split in ("train", "val", "in_distribution")] == [3, 3, 3]

  def solve(prompt, i):
    question = prompt.rpartition("Q: ")[2].partition("\nA:")[0]
    answer = problems[question].answer if question in problems and i % 2 == 0 else "no"
    return f"Sorted.\nThe answer is {answer}.\n\nQ: another"

  monkeypatch.setattr(Run, "engine", lambda self, params: Writer(CharTokenizer(), solve))
  monkeypatch.setattr(Run, "init_params", lambda self, name, mesh: {})
  monkeypatch.setattr(Run, "tokenizer", CharTokenizer())
  list_tasks.make_candidates(run, WordSorting(style="natural"))
  assert [c.correct for c in run.candidates("eval")] == [True, False] * 500
  assert not any(c.correct for c in run.candidates("val"))


def test_a_prompt_that_is_too_long_is_told_before_anything_is_written(tmp_path):
  run = _run(tmp_path, engine__max_tokens=40)
  list_tasks.make_problems(run, TASK)
  with pytest.raises(UserError, match=r"prompt \d+ has \d+ tokens.* the context is 40, .* Raise max_tokens"):
    list_tasks.sample_solutions(run, TASK, run.engine({}), "s", run.problems("eval"), 1, False)


# Another run's problems and solutions


def test_a_study_takes_the_problems_and_solutions_of_another_run(bank):
  run = _study(bank, "size_small")
  _do(run, "bank")
  for kind in ("problems", "candidates"):
    assert sorted(p.stem for p in run.path(kind).iterdir()) == ["eval", "train", "val"], "what it needs"
    for file in run.path(kind).iterdir():
      assert file.read_bytes() == bank.path(kind, file.name).read_bytes()
  digest = verifier_stages.bank_digest(run)
  assert digest == verifier_stages.bank_digest(bank), "though the bank has problems in distribution as well"
  jsonl.write_records(run.path("candidates/eval.jsonl"), bank.candidates("eval")[:-1])
  assert verifier_stages.bank_digest(run) != digest


def test_a_bank_that_is_none_is_named(bank):
  bank.path("candidates/val.jsonl").unlink()
  with pytest.raises(
    UserError, match=rf"{bank.workdir} has no candidates/val\.jsonl; config\.bank must be the workdir"
  ):
    _do(_study(bank, "no_gaps"), "bank")


def test_a_bank_has_no_generator_to_start_from(tmp_path):
  with pytest.raises(UserError, match=r"dpo: init_from is the generator, but with config\.bank none is trained here"):
    _stages(_run(tmp_path, variant="tiny", bank="somewhere"))


def test_without_a_shift_training_lists_count_from_0_and_keep_their_labels(bank):
  run = _study(bank, "no_shift")
  _do(run, "bank", "rationales")
  assert verifier_stages.bank_digest(run) == verifier_stages.bank_digest(bank)
  for split in ("train", "val"):
    before, after = bank.problems(split), run.problems(split)
    assert {p.question[0] for p in before} != {"0"} == {p.question[0] for p in after}
    assert [p.id for p in after] == [p.id for p in before] and [p.answer for p in after] == [p.answer for p in before]
    pool = run.candidates(split)
    assert [(c.problem_id, c.index, c.correct) for c in pool] == [
      (c.problem_id, c.index, c.correct) for c in bank.candidates(split)
    ]
    assert all(r.kept for r in run.rationales(split)), "the program comes to the label"
    problem_of = {p.id: p for p in after}
    assert all(TASK.rationale(problem_of[c.problem_id], c.text)[1] is c.correct for c in pool)


def test_a_broken_line_is_named_before_anything_is_trained_on_it(bank):
  path = bank.path("candidates/eval.jsonl")
  lines = path.read_text().splitlines(keepends=True)
  lines[2] = lines[2][: len(lines[2]) // 2] + "\n"
  path.write_text("".join(lines))
  with pytest.raises(UserError, match=r"bank/candidates/eval\.jsonl:3: not JSON: .*; correct or remove the line"):
    _do(_study(bank, "no_gaps"), "bank")


# What verifiers are trained on, and what they score


def _trained_on(monkeypatch, run, name):
  """What `Run.train` is given: training and held-out examples."""
  got = []
  monkeypatch.setattr(Run, "train", lambda self, name, make, *_, **__: got.append(make()))
  verifier_stages.train_verifier(run, name, lambda examples: examples)
  (parts,) = got
  return parts["train"], parts["val"]


def test_max_problems_keeps_the_first_problems_of_the_training_split(bank, monkeypatch):
  run = _study(bank, "train_3")
  _do(run, "bank", "rationales")
  first = {p.id for p in run.problems("train")[:3]}
  settings = run.config.verifiers.genrm
  chosen = verifier_stages.training_candidates(run, "train", settings)
  assert chosen == [c for c in run.candidates("train") if c.problem_id in first] and len(chosen) == 12
  assert verifier_stages.training_candidates(run, "val", settings) == run.candidates("val")
  assert run.verifier_names == ["orm", "genrm", "genrm_cot"]
  for name in run.verifier_names:
    train, val = _trained_on(monkeypatch, run, name)
    assert {e.name.split(" of ")[-1] for e in train} == first
    assert len({e.name.split(" of ")[-1] for e in val}) == 12


@pytest.mark.parametrize("variant", ["no_gaps", "lambda_0.3", "lambda_only"])
def test_lambda_says_what_is_learnt(variant, bank, monkeypatch):
  run = _study(bank, variant)
  _do(run, "bank", "rationales")
  train, val = _trained_on(monkeypatch, run, "genrm_cot")
  right = [c for c in run.candidates("train") if c.correct]
  kinds = {KIND_VERIFY: "lambda_only" not in variant, KIND_SOLVE: "lambda" in variant}
  for examples in (train, val):
    assert {int(k) for e in examples for k in np.unique(e.kind[e.weights > 0])} == {
      k for k, is_in in kinds.items() if is_in
    }
  solved = [e for e in train if KIND_SOLVE in e.kind]
  texts = [(e.name.split(" of ")[-1], run.tokenizer.decode(e.targets[e.weights > 0][:-1].tolist())) for e in solved]
  assert sorted(texts) == (sorted({(c.problem_id, c.text) for c in right}) if "lambda" in variant else [])


def test_the_loss_of_solutions_alone_is_a_number(bank):
  run = _study(bank, "lambda_only", model__overrides__num_layers=1, model__overrides__embed_dim=16)
  _do(run, "bank", "rationales")
  settings = run.config.verifiers.genrm_cot
  examples, asked = verifier_stages.verifier_examples(run, verifiers.GENRM_COT, "train", settings)
  assert asked == []
  rows = packing.pack(examples, 64)
  loss = verifiers.make_loss(verifiers.GENRM_COT, run.model, run.prompter, rows.max_targets, settings.solve_weight)
  value, _ = jax.jit(loss)(gemma.init(run.model, jax.random.key(0)), rows.take(np.arange(2)))
  assert 3 < float(value) < 8, "near log of the vocabulary"


@pytest.mark.parametrize(
  ("variant", "solving"),
  [("tiny", ["genrm_cot"]), ("steps_30", []), ("lambda_0.3", ["genrm_cot"]), ("train_500", ["genrm_cot"])],
)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_verifier_with_rationales_solves_as_well(name, variant, solving, tmp_path):
  names = [s.name for s in _stages(_run(tmp_path, name, variant, bank="" if variant == "tiny" else "somewhere"))]
  assert [n for n in names if n.startswith("solve_")] == [f"solve_{n}" for n in solving]
  assert names[-1] == "report"


def test_solutions_of_a_verifier_are_kept_apart(bank):
  run = _study(bank, "lambda_0.3")
  _do(run, "bank")
  pool = run.path("candidates/eval.jsonl").read_bytes()
  list_tasks.solve_again(run, TASK, "genrm_cot")
  own = run.candidates("by_genrm_cot")
  assert {c.source for c in own} == {"genrm_cot/4"} and len(own) == 48
  assert run.path("candidates/eval.jsonl").read_bytes() == pool


def test_scores_in_distribution_have_a_file_of_their_own(bank, monkeypatch):
  asked = []

  def score(verifier, engine, prompter, problems, candidates, **_):
    asked.append(len(candidates))
    return [Score(c.problem_id, c.index, verifier.name, 4, float(c.correct)) for c in candidates]

  monkeypatch.setattr(verifiers, "score_candidates", score)
  scoring.score_verifier(bank, "orm")
  for split, file in (("eval", "scores/orm.jsonl"), ("in_distribution", "scores/in_distribution/orm.jsonl")):
    scores = jsonl.read_records(bank.path(file), Score)
    pool = bank.candidates(split)
    assert [(s.problem_id, s.candidate_index) for s in scores] == [(c.problem_id, c.index) for c in pool]
    assert [s.value for s in scores] == [float(c.correct) for c in pool]
  assert asked == [24, 24], "equal solutions to a problem are scored once"
  study = _study(bank, "no_gaps")
  _do(study, "bank")
  scoring.score_verifier(study, "genrm_cot")
  assert [str(p.relative_to(study.workdir)) for p in study.path("scores").rglob("*.jsonl")] == [
    "scores/genrm_cot.jsonl"
  ]
