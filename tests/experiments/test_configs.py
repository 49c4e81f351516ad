"""Every variant of every config builds, is locked, and is what the library's dataclasses want; splits are disjoint."""

import importlib
import pathlib
import re
import sys
import types

import jax
import ml_collections
import numpy as np
import pytest
from absl.testing import flagsaver

from experiments import configs
from genrm_jax import verifiers
from genrm_jax.checkpoints import pretrained
from genrm_jax.data import jsonl, packing
from genrm_jax.model import gemma
from genrm_jax.model.config import get_config
from genrm_jax.pipeline import gsm8k_data, list_tasks, verifier_stages
from genrm_jax.pipeline.run import Run
from genrm_jax.runtime.errors import UserError
from genrm_jax.tasks.last_letter import LastLetter, read_list
from genrm_jax.tasks.word_sorting import WordSorting

SPLITS = ("train", "val", "eval", "in_distribution")
LIST_TASKS = {"last_letter": LastLetter, "word_sorting": WordSorting}
MODULES = {
  path.stem: importlib.import_module(f"experiments.configs.{path.stem}")
  for path in sorted(pathlib.Path(configs.__path__[0]).glob("*.py"))
  if path.stem not in ("__init__", "common", "list_tasks", "math500")
}
TASKS = [name for name in MODULES if name != "base"]
# A variant that stands for many is tried with one value.
VALUES = {"train_N": "train_500", "steps_N": "steps_3000", "size_NAME": "size_small", "lambda_X": "lambda_0.3"}


def _variants(name):
  """As the module itself lists them."""
  with pytest.raises(UserError) as error:
    MODULES[name].get_config("no such variant")
  listed = re.fullmatch(r"unknown config variant 'no such variant'; there are: (.+)", str(error.value))[1].split(", ")
  return [VALUES.get(variant, variant) for variant in listed]


def _studies(name):
  """Those that take the problems and the solutions of another run."""
  return [v for v in _variants(name) if v not in ("tiny", "smoke", "paper")] if name in LIST_TASKS else []


def _parametrize(pairs):
  return pytest.mark.parametrize(("name", "variant"), pairs, ids=[":".join(one) for one in pairs])


every_config = _parametrize([(name, variant) for name in MODULES for variant in _variants(name)])
every_task = _parametrize([(name, variant) for name in TASKS for variant in _variants(name)])
of_characters = _parametrize([(name, v) for name in LIST_TASKS for v in _variants(name) if v != "paper"])


def _run(workdir, name, variant, **changes):
  """A run of this config; `changes` by dotted key, with `__` for the dot."""
  config = MODULES[name].get_config(variant)
  config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
  return Run(ml_collections.FrozenConfigDict(config), workdir)


def _trained(config):
  """The settings of everything that is trained, by name, in the order of the stages."""
  first = {name: config[name] for name in ("base", "generator") if name in config}
  return {**first, **{name: config.verifiers[name] for name in config.verifiers if "optim" in config.verifiers[name]}}


def test_every_task_has_a_tiny_and_a_smoke_variant():
  assert set(TASKS) == {"last_letter", "word_sorting", "gsm8k"}
  for name in TASKS:
    assert {"tiny", "smoke"} <= set(_variants(name))
    assert MODULES[name].get_config().variant == "tiny", "the default"


@every_config
def test_config_is_locked_and_plain(name, variant):
  config = MODULES[name].get_config(variant)
  assert isinstance(config, ml_collections.ConfigDict) and config.variant == variant
  with pytest.raises((AttributeError, KeyError)):
    config.nope = 1
  for settings in _trained(config).values():
    with pytest.raises((AttributeError, KeyError)):
      settings.optim.nope = 1
  assert len(jsonl.digest_of(config.to_dict())) == 64, "JSON can hold it"
  assert jsonl.digest_of(MODULES[name].get_config(variant).to_dict()) == jsonl.digest_of(config.to_dict())


@every_config
def test_config_is_what_the_library_wants(name, variant, tmp_path):
  run = _run(tmp_path, name, variant, model__checkpoint="")
  config = run.config
  run.check_settings()
  assert all(s.row_length > 0 and s.optim.num_steps >= 2 for s in _trained(config).values())
  tokenizer = config.tokenizer
  vocab_size = run.tokenizer.vocab_size if tokenizer.type == "char" else tokenizer.get("vocab_size", 256_000)
  model = get_config(config.model.size, vocab_size=vocab_size, **config.model.overrides.to_dict())
  assert sum(gemma.num_params(model)) > 0
  assert set(run.mesh.shape) == {"data", "fsdp", "tensor"}
  assert run.verifier_names == [n for n in ("judge", "dpo", "orm", "genrm", "genrm_cot") if n in config.verifiers]
  assert bool(run.verifier_names) == (name != "base")
  prompter = types.SimpleNamespace(tokenizer=types.SimpleNamespace(cls_id=3))
  for verifier, settings in config.verifiers.items():
    if verifiers.get_verifier(verifier).is_trained:
      weight, beta = settings.get("solve_weight", 0.0), settings.get("beta", 0.0)
      assert verifiers.make_loss(verifiers.get_verifier(verifier), model, prompter, 1, weight, beta)


@pytest.mark.parametrize("name", LIST_TASKS)
def test_the_paper_variant_is_gemma_2b(name, tmp_path):
  config = _run(tmp_path, name, "paper").config
  model = get_config(config.model.size, dtype=config.model.dtype, param_dtype=config.model.param_dtype)
  params = jax.eval_shape(lambda key: gemma.init(model, key), jax.random.key(0))
  assert sum(p.size for p in jax.tree.leaves(params)) == sum(gemma.num_params(model)) == 2_506_434_560
  settings = config.verifiers.genrm_cot
  shape = (2, settings.row_length)
  rows = packing.TokenBatch(
    **{f: jax.ShapeDtypeStruct(shape, "int32") for f in ("tokens", "targets", "positions", "segments", "kind")},
    pretrained=jax.ShapeDtypeStruct(shape, "float32"),
  )
  loss = verifiers.make_loss(verifiers.GENRM_COT, model, None, 64, settings.solve_weight)
  value, grads = jax.eval_shape(jax.value_and_grad(lambda p, b: loss(p, b)[0]), params, rows)
  assert value.shape == () and jax.tree.map(lambda g: g.shape, grads) == jax.tree.map(lambda p: p.shape, params)


@of_characters
def test_a_character_model_needs_no_files_but_its_base(name, variant, tmp_path):
  run = _run(tmp_path, name, variant)
  assert run.model.vocab_size == run.tokenizer.vocab_size
  assert run.prompter.yes_id != run.prompter.no_id
  trained = run.verifier_names[-1]
  manifest = run.manifest(trained, trained)
  assert manifest["tokenizer"]["digest"] == run.tokenizer.digest
  assert manifest["init_from"] == (run.config.model.checkpoint or "random numbers")
  assert bool(run.config.model.checkpoint) == (variant != "smoke")
  assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("size", [v for v in _variants("base") if v != "smoke"])
def test_the_base_that_is_kept_is_what_its_config_makes(size):
  found = pretrained.open_checkpoint(f"{configs.list_tasks.ASSETS}/{size}").config.to_dict()
  c = MODULES["base"].get_config(size).model
  assert {key: found[key] for key in c.overrides} == c.overrides.to_dict()


@every_task
def test_reports_ask_for_no_more_than_there_is(name, variant):
  config = MODULES[name].get_config(variant)
  assert list(config.report.ks) == sorted(set(config.report.ks)) and max(config.report.ks) <= config.votes.num_votes
  assert list(config.report.ns) == sorted(set(config.report.ns))
  if "candidates" in config:
    assert max(config.report.ns) <= config.candidates.num_eval + config.candidates.add_reference
    assert config.candidates.sample.max_new_tokens < config.engine.max_tokens
  assert config.votes.sample.max_new_tokens < config.engine.max_tokens


@every_config
def test_runs_start_from_runs_that_are_there(name, variant):
  config = MODULES[name].get_config(variant)
  trained = _trained(config)
  for i, settings in enumerate(trained.values()):
    assert settings.init_from == "" or settings.init_from in list(trained)[:i]
  for settings in config.verifiers.values():
    assert settings.init_from in ("", *(n for n in ("base", "generator") if n in config))
    if variant in _studies(name):
      assert settings.init_from == "", "only problems and solutions are there of the run that it builds on"


@pytest.mark.parametrize("name", LIST_TASKS)
@pytest.mark.parametrize("variant", ["tiny", "smoke"])
def test_no_problem_of_a_list_task_is_in_two_splits(name, variant, tmp_path):
  run = _run(tmp_path, name, variant)
  list_tasks.make_problems(run, LIST_TASKS[name]())
  problems = {split: run.problems(split) for split in SPLITS}
  _assert_disjoint(problems)
  for split, mine in problems.items():
    c = run.config.task[split]
    lengths = {len(read_list(p.question)[0]) for p in mine}
    assert len(mine) == c.num_problems and min(lengths) >= c.min_words and max(lengths) <= c.max_words
    assert len(lengths) == c.max_words - c.min_words + 1
  c = run.config.task
  assert c.eval.min_words > c.train.max_words, "evaluated on longer lists than trained on"
  assert (c.in_distribution.min_words, c.in_distribution.max_words) == (c.train.min_words, c.train.max_words)


class _Few(LastLetter):
  """Draws from 40 problems of each length, so that a problem often comes again."""

  def problem(self, rng, num_words, split, index):
    return super().problem(np.random.default_rng(int(rng.integers(40))), num_words, split, index)


def test_a_problem_that_comes_again_is_drawn_anew(tmp_path):
  run = _run(tmp_path, "last_letter", "smoke")
  list_tasks.make_problems(run, _Few())
  _assert_disjoint({split: run.problems(split) for split in SPLITS})


def test_problems_are_a_function_of_the_seed(tmp_path):
  texts = []
  for i, seed in enumerate((0, 0, 1)):
    list_tasks.make_problems(_run(tmp_path / str(i), "last_letter", "smoke", seed=seed), LastLetter())
    texts.append([(tmp_path / str(i) / "problems" / f"{split}.jsonl").read_text() for split in SPLITS])
  assert texts[0] == texts[1]
  assert all(a != b for a, b in zip(texts[0], texts[2], strict=True))


def test_no_gsm8k_problem_is_in_two_splits(tmp_path):
  run = _run(tmp_path, "gsm8k", "smoke")
  gsm8k_data.read_release(run)
  problems = {split: run.problems(split) for split in gsm8k_data.SPLITS}
  _assert_disjoint(problems)
  for split, mine in problems.items():
    assert len(mine) == run.config.task[f"num_{split}"]
    ids = {p.id for p in mine}
    assert {c.problem_id for c in run.candidates(split)} == ids
    if split != "eval":
      assert {r.problem_id for r in run.rationales(split)} == ids
  assert not (tmp_path / "rationales" / "eval.jsonl").exists(), "the graders of rationales saw the reference"


def test_gsm8k_asks_for_its_data_and_for_no_more_problems_than_there_are(tmp_path):
  (tmp_path / "empty").mkdir()
  five = gsm8k_data.sample.write(tmp_path / "data", 5, 0)
  for folder, said in (
    ("", r"give the folder with the clones .* --config\.data_dir=DIR"),
    (tmp_path / "empty", rf"no GSM8K train problems; looked for {tmp_path}/empty/.*train\.jsonl.*git clone"),
    (five, r"asks for \d+ \+ \d+ \+ \d+ problems .* hold 5; get more shards or lower"),
  ):
    run = _run(tmp_path / "work", "gsm8k", "tiny", data_dir=str(folder), task__rounds=(0,))
    with pytest.raises(UserError, match=said):
      gsm8k_data.read_release(run)
  assert not (tmp_path / "work").exists()


def _assert_disjoint(problems):
  for what in ("id", "question"):
    seen = [getattr(p, what) for mine in problems.values() for p in mine]
    assert len(set(seen)) == len(seen), what


@every_config
def test_stages_make_what_later_stages_read(name, variant, tmp_path):
  bank = {"bank": "/of/another/run"} if variant in _studies(name) else {}
  files = {"model__checkpoint": "gemma", "tokenizer__path": "tokenizer.model"} if variant == "paper" else {}
  stages = importlib.import_module(f"experiments.{name}").make_stages(_run(tmp_path, name, variant, **bank, **files))
  made: set[str] = set()
  for stage in stages:
    assert set(stage.reads) <= made, stage.name
    assert stage.writes and not made & set(stage.writes), stage.name
    made |= set(stage.writes)
  assert len({s.name for s in stages}) == len(stages)
  assert not any(tmp_path.iterdir()), "nothing is made before a stage runs"
  assert ("generator" in [s.name for s in stages]) == (name in LIST_TASKS and variant in ("tiny", "smoke"))


# What is wrong is said in one message.


def test_an_unknown_verifier_is_named(tmp_path):
  config = MODULES["last_letter"].get_config("smoke")
  with config.unlocked():
    config.verifiers.nope = config.verifiers.orm
  with pytest.raises(UserError, match="unknown verifier 'nope'; there are: judge, dpo, orm, genrm, genrm_cot"):
    _ = Run(ml_collections.FrozenConfigDict(config), tmp_path).verifier_names


@pytest.mark.parametrize("variant", ["train_", "train_-5", "lambda_0", "train_many", "lambda_x", "train_0.5"])
def test_a_variant_with_no_number_is_named(variant):
  with pytest.raises(UserError, match=f"config variant '{variant}': '.*' is no positive number"):
    MODULES["last_letter"].get_config(variant)


def test_bad_settings_are_refused_before_anything_runs(tmp_path):
  for key in ("generator", "verifiers__dpo"):
    run = _run(tmp_path, "last_letter", "smoke", **{f"{key}__optim__learning_rate": -1.0})
    with pytest.raises(UserError, match="learning_rate must be positive and finite, not -1"):
      run.check_settings()


@pytest.mark.parametrize("given", ["model__checkpoint", "tokenizer__path", "seed"])
def test_the_paper_variant_says_what_it_needs(given, tmp_path):
  run = _run(tmp_path, "word_sorting", "paper", **{given: 1 if given == "seed" else "somewhere"})
  with pytest.raises(UserError, match=r"--config\.model\.checkpoint=DIR --config\.tokenizer\.path=FILE"):
    importlib.import_module("experiments.word_sorting").make_stages(run)


LETTERS = "--config=experiments/configs/last_letter.py"


@pytest.mark.parametrize(
  ("args", "said"),
  [
    ([f"{LETTERS}:smoke", "--config.nope=1"], r"--config\.nope: the config has no key 'nope'"),
    (
      [f"{LETTERS}:smoke", "--config.generator.optim.learning_rat=1"],
      r"--config\.generator\.optim\.learning_rat: the config has no key 'learning_rat'\. Did you mean .learning_rate.",
    ),
    ([f"{LETTERS}:huge"], r"unknown config variant 'huge'; there are: tiny, smoke, paper, train_N, .*, no_stop"),
    (
      ["--config=experiments/configs/none.py:smoke"],
      r"cannot load the config: .*No such file or directory: 'experiments/configs/none\.py'",
    ),
  ],
)
def test_a_wrong_command_line_is_one_clear_message(args, said, capsys, monkeypatch):
  monkeypatch.setattr(sys, "argv", ["last_letter", *args, "--workdir=work"])  # there ml_collections looks for keys
  with flagsaver.flagsaver(), pytest.raises(SystemExit) as ended:
    verifier_stages._parse_flags(sys.argv)
  assert ended.value.code == 1
  (line,) = capsys.readouterr().err.splitlines()
  assert re.match(f"error: {said}", line), line


def test_gaps_name_characters_that_the_tokenizer_has(tmp_path):
  run = _run(tmp_path, "last_letter", "tiny")
  ids = [run.tokenizer.encode(c) for chars in run.config.gaps for c in chars]
  assert all(len(i) == 1 for i in ids)
  example = packing.sft_example("e", run.prompter.solve("3mike4dlih;"), run.prompter.solution("DeEh;"), 2)
  got = [e.positions.tolist() for e in list_tasks.with_gaps(run, [example] * 20)]
  assert any(positions[-1] > example.positions[-1] for positions in got)
  assert got == [e.positions.tolist() for e in list_tasks.with_gaps(run, [example] * 20)]
