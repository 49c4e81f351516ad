"""Every variant of every config builds, is locked, and is what the library wants; bad settings are one message."""

import collections
import copy
import functools
import importlib
import math
import pathlib
import re
import sys

import jax
import ml_collections
import pytest
import saved_runs
from absl.testing import flagsaver
from char_model import PROMPTER
from etils import epath
from random_params import random_params
from refusals import refused

import experiments
from experiments import base, configs
from experiments.configs import gsm8k
from genrm_jax.checkpoints import hugging_face, pretrained
from genrm_jax.data import jsonl
from genrm_jax.model import gemma
from genrm_jax.model.config import get_config
from genrm_jax.pipeline import checks, cli, locate, settings
from genrm_jax.pipeline.experiment import make_stages
from genrm_jax.pipeline.run import Run
from genrm_jax.pytrees import PairBatch
from genrm_jax.runtime.errors import UserError
from genrm_jax.verifiers.base import TargetCounts, make_verifier

LIST_TASKS = ("last_letter", "word_sorting")
MODULES = {
  path.stem: importlib.import_module(f"experiments.configs.{path.stem}")
  for path in sorted(pathlib.Path(configs.__path__[0]).glob("*.py"))
  if path.stem not in ("__init__", "common", "list_tasks", "math500")
}
# A variant that stands for many is tried with one value.
VALUES = {"train_N": "train_500", "steps_N": "steps_3000", "size_NAME": "size_small", "lambda_X": "lambda_0.3"}


def _variants(name):
  with pytest.raises(UserError) as error:
    MODULES[name].get_config("no such variant")
  listed = re.fullmatch(r"unknown config variant 'no such variant'; there are: (.+)", str(error.value))[1].split(", ")
  return [VALUES.get(variant, variant) for variant in listed]


ALL = [(name, variant) for name in MODULES for variant in _variants(name)]
every_config = pytest.mark.parametrize(("name", "variant"), ALL, ids=[":".join(one) for one in ALL])


def _is_study(name, variant):
  return name in LIST_TASKS and variant not in ("tiny", "tour", "smoke", "gemma3_270m", "paper")


def _trained(config):
  first = {name: config[name] for name in ("base", "generator") if name in config}
  return {**first, **{name: v for name, v in config.verifiers.items() if "optim" in v}}


def _check(run):
  settings.check(run.config.to_dict())
  checks.check_run(run)


@every_config
def test_config_is_locked_plain_and_what_the_library_wants(name, variant, tmp_path):
  config = MODULES[name].get_config(variant)
  assert isinstance(config, ml_collections.ConfigDict) and config.variant == variant
  with pytest.raises((AttributeError, KeyError)):
    config.nope = 1
  assert jsonl.digest_of(MODULES[name].get_config(variant).to_dict()) == jsonl.digest_of(config.to_dict())
  trained = _trained(config)
  # Without the checkpoint the frozen parameters would be random.
  adapted = [f"{'' if n in config else 'verifiers.'}{n}.lora.save_frozen" for n, v in trained.items() if v.lora.rank]
  run = saved_runs.run_of(tmp_path, name, variant, model__checkpoint="", **dict.fromkeys(adapted, True))
  _check(run)
  for i, one in enumerate(trained.values()):
    assert one.optim.num_steps >= 2 and (one.init_from == "" or one.init_from in list(trained)[:i])
    with pytest.raises((AttributeError, KeyError)):
      one.optim.nope = 1
  model = get_config(config.model.size, sharding=config.model.sharding.to_dict(), **config.model.overrides.to_dict())
  assert set(run.mesh.shape) == {"data", "fsdp", "tensor"} and model.rules
  for verifier, one in config.verifiers.items():
    made = make_verifier(verifier, PROMPTER, one.to_dict())
    assert not made.is_trained or made.loss(model, TargetCounts(1, 1), "dots")
    assert not _is_study(name, variant) or one.init_from == ""
  if name == "base" and variant in ("mini", "small", "medium"):  # the packaged base is what its config makes
    found = pretrained.open_checkpoint(locate.asset_path(f"{configs.list_tasks.ASSETS}/{variant}")).config.to_dict()
    assert config.model.overrides.to_dict().items() <= found.items()
  if "report" in config:
    assert list(config.report.ks) == sorted(set(config.report.ks)) and max(config.report.ks) <= config.votes.num_votes
    assert config.votes.sample.max_new_tokens < config.engine.max_tokens
  if "candidates" in config:
    assert max(config.report.ns) <= config.candidates.num_eval + config.candidates.add_reference
    assert config.candidates.sample.max_new_tokens < config.engine.max_tokens


@every_config
def test_stages_make_what_later_stages_read(name, variant, tmp_path):
  changes = {"bank": "/of/another/run"} if _is_study(name, variant) else {}
  if variant == "paper" or variant.startswith("gemma"):
    changes = {"model__checkpoint": "gemma", "tokenizer__path": "tokenizer.model"}
  run = saved_runs.run_of(tmp_path / "work", name, variant, **changes)
  stages = (base.make_stages if name == "base" else make_stages)(run)
  saved_runs.check_order(stages)
  for stage in stages:
    if stage.name.startswith(("train_", "score_")):
      assert ("tokenizer.model" in stage.reads) == (run.config.tokenizer.type == "sentencepiece")
  names = [s.name for s in stages]
  assert len(set(names)) == len(names) and not (tmp_path / "work").exists(), "no stage has run"
  assert ("generator" in names) == (name in LIST_TASKS and variant in ("tiny", "tour", "smoke", "gemma3_270m"))
  solving = {n.removeprefix("solve_") for n in names if n.startswith("solve_")}
  learnt = {n for n, v in run.config.verifiers.items() if n == "genrm_cot" or v.get("solve_weight")}
  assert solving == (learnt if "candidates" in run.config else set())


PAPER = [("last_letter", "paper", "gemma_2b"), *(("gsm8k", model, model) for model in gsm8k.MODELS)]


@pytest.mark.parametrize(("name", "variant", "size"), PAPER)
def test_the_papers_gemmas_by_their_shapes(name, variant, size):
  config = MODULES[name].get_config(variant)
  for kind in gsm8k.KINDS if name == "gsm8k" else ():
    one = MODULES["gsm8k"].get_config(f"{variant}_{kind}")
    trained = {name: v for name, v in one.verifiers.items() if "optim" in v or name == "judge"}
    assert list(trained) == (["genrm", "genrm_cot"] if kind == "unified" else [kind])
    beside = {"dpo": ["dpo_reference"], "genrm_cot": ["genrm_cot_greedy"], "unified": ["genrm_cot_greedy"]}
    assert [name for name in one.verifiers if name not in trained] == beside.get(kind, [])
    weights = {v.get("solve_weight", 0.0) for v in trained.values()}
    assert weights == ({0.25} if kind == "unified" else {0.0}) and one.model == config.model
  assert config.verifiers.orm.z_loss == 1e-4 and config.verifiers.genrm_cot.get("min_agreement") == (
    0.5 if name == "gsm8k" else None
  )
  model = get_config(config.model.size, dtype=config.model.dtype, param_dtype=config.model.param_dtype)
  params = jax.eval_shape(lambda key: gemma.init(model, key), jax.random.key(0))
  assert model.name == size and sum(p.size for p in jax.tree.leaves(params)) == sum(gemma.num_params(model))
  for verifier in ("dpo", "orm", "genrm_cot"):
    settings = config.verifiers[verifier]
    shape = (2, settings.row_length)
    ints = {f: jax.ShapeDtypeStruct(shape, "int32") for f in ("tokens", "targets", "positions", "segments", "kind")}
    floats = {f: jax.ShapeDtypeStruct(shape, "float32") for f in ("weights", "reference")}
    loss = make_verifier(verifier, PROMPTER, settings.to_dict()).loss(model, TargetCounts(64, 2), settings.remat)
    gradient = jax.value_and_grad(lambda p, b, loss=loss: loss(p, b)[0])
    value, grads = jax.eval_shape(gradient, params, PairBatch(**ints, **floats))
    assert value.shape == () and jax.tree.map(lambda g: g.shape, grads) == jax.tree.map(lambda p: p.shape, params)


def test_what_cannot_run_is_refused_before_anything_runs(tmp_path):
  for variant in ("train_", "train_-5", "lambda_0", "train_many", "lambda_x", "train_0.5"):
    message = f"config variant '{variant}': '.*' is not a positive number"
    refused((message, MODULES["last_letter"].get_config, variant))
  for changes, message in (
    ({"model__param_dtype": "bfloat16"}, "generator: trained parameters must be float32"),
    ({"votes__num_votes": 1}, r"report\.ks goes up to 2, but config\.votes\.num_votes is 1"),
    ({"report__ns": (1, 64)}, r"report\.ns goes up to 64, but config\.candidates\.num_eval is 4"),
    ({"verifiers__orm__init_from": "bose"}, r"orm\.init_from is 'bose'"),
    ({"engine__max_tokens": 8}, r"max_new_tokens \d+ leaves no room"),
    ({"task__walk": {"stop": True, "stap": 1}}, "unknown option 'stap' of walk"),
    ({"model__overrides": {"num_layer": 2}}, "num_layer"),
    ({"prompts__verify": "Is it right?"}, r"verify.*\{verdict_question\}"),
    ({"prompts__solve": "Solve:"}, r"solve.*\{question\}"),
    ({"model__checkpoint": "/nowhere"}, "nowhere: no such folder"),
    ({"model__sharding__embed": "fdsp"}, "fdsp"),
    ({"verifiers__genrm__lora__rank": 2, "verifiers__genrm__lora__targets": ("bogus",)}, r"lora\.targets must be"),
    (
      {f"verifiers__genrm__{k}": v for k, v in {"lora__rank": 2, "lora__save_frozen": False, "init_from": ""}.items()},
      r"genrm: lora\.save_frozen is false",
    ),
  ):
    refused((message, _check, saved_runs.run_of(tmp_path, **changes)))
  tiny = get_config("tiny_gemma2")
  hugging_face.save(random_params(tiny), tiny, tmp_path / "model")
  for message, checkpoint in (
    (r"model\.checkpoint to the name, folder or \.gguf file", ""),
    ("somewhere: no such folder or file", "somewhere"),
    ("model comes without a tokenizer; set --config.tokenizer.path", str(tmp_path / "model")),
  ):
    run = saved_runs.run_of(tmp_path, "word_sorting", "paper", model__checkpoint=checkpoint)
    refused((message, make_stages, run))


REFUSED = {
  "seed": (-1, 2**32, 0.5, True, "0", None),
  "votes.num_votes": (0, -1, 1.0, "32"),
  "votes.sample.top_p": (0, 1.1, math.nan),
  "votes.sample.temperature": (-0.1, math.inf, math.nan),
  "verifiers.genrm_cot.remat": ("zzz", "full", ""),
  "verifiers.genrm_cot.solve_weight": (-1, math.nan, "x"),
  "verifiers.genrm_cot.max_rationales": (-1,),
  "verifiers.dpo.beta": (0, math.inf),
  "verifiers.dpo.row_length": (0, -512),
  "verifiers.orm.optim.learning_rate": (0.0, -1.0, math.nan, math.inf),
  "verifiers.orm.z_loss": (-1e-4, math.nan, math.inf),
  "report.top_scores": (-1, 0.5, None),
  "verifiers.orm.loop.best_by": ("accuracy?",),
  "tokenizer.type": ("hf", None),
  "model.size": ("gemma_3b", 2),
  "model.dtype": ("float16",),
  "mesh.fsdp": (0, -2, 1.5),
  "engine.rows_per_batch": (0,),
  "cpu_devices": (0, -1),
  "report.ns": ((), (0, 1), 4, ("1",)),
  "task.num_val": (0, -3, "x"),
  "data_dir": ("a\0b", 3),
  "verifiers": ([], "orm"),
}


@pytest.mark.parametrize("task", ["gsm8k", "last_letter"])
def test_every_setting_is_checked_by_kind_and_range(task, tmp_path):
  """Any change of any setting builds all stages or is one message that names it; no traceback, nothing written."""
  config = MODULES[task].get_config("smoke").to_dict()
  flat = dict(ml_collections.ConfigDict(config).items()) | _leaves(config)
  outcomes = collections.Counter()

  def attempt(change, key):
    changed = copy.deepcopy(config)
    change(changed)
    try:
      settings.check(changed)
      run = Run(ml_collections.FrozenConfigDict(changed), epath.Path(tmp_path / "work"))
      checks.check_run(run)
      make_stages(run)
    except UserError as e:
      named = any(part[:4] in str(e) for part in key.split("."))
      assert named and "\n" not in str(e), (key, str(e))
      outcomes["refused"] += 1
      return True
    outcomes["accepted"] += 1
    return False

  for key in flat:
    values = (None, "", "x", -1, 0, 10**12, 0.5, math.nan, -math.inf, True, [], {}, [-1], {"x": 1})
    for value in (*values, "gone"):
      attempt(functools.partial(_set, key, value), key)
    for value in REFUSED.get(key, ()):
      assert attempt(functools.partial(_set, key, value), key), (key, value)
  assert attempt(lambda c: c["votes"].update(num_vote=3), "num_vote")
  for share in (1.0, -0.1, math.nan, "half"):
    assert attempt(lambda c, share=share: c["verifiers"]["genrm_cot"].update(min_agreement=share), "min_agreement")
  assert outcomes["refused"] > 500 and not (tmp_path / "work").exists(), outcomes


def _set(key, value, config):
  *sections, name = key.split(".")
  section = functools.reduce(lambda c, s: c[s], sections, config)
  section[name] = value
  if value == "gone":
    del section[name]


def _leaves(config, key=""):
  if not isinstance(config, dict):
    return {key: config}
  inner = [_leaves(value, f"{key}.{name}" if key else name) for name, value in config.items()]
  return {k: v for leaves in inner for k, v in leaves.items()}


LETTERS = "--config=experiments/configs/last_letter.py"


def test_a_wrong_command_line_is_one_message(capsys, monkeypatch, tmp_path):
  files = {"broken": "x = 1\nx = = 2\n", "fails": "def get_config():\n  return 1 / 0\n", "empty": "x = 1\n"}
  for name, text in {**files, "none": "def get_config():\n  return None\n"}.items():
    (tmp_path / f"{name}.py").write_text(text)
  for args, message in (
    ([f"{LETTERS}:smoke", "--config.generator.optim.learning_rat=1"], r"learning_rat.*Did you mean .learning_rate."),
    ([f"{LETTERS}:huge"], r"unknown config variant 'huge'; there are: tiny, .*, no_stop"),
    (["--config=experiments/configs/none.py:smoke"], r"none"),
    (["--config=FOLDER/broken.py"], r"broken\.py:2: SyntaxError"),
    (["--config=FOLDER/fails.py"], r"fails\.py:2: ZeroDivisionError: division by zero"),
    (["--config=FOLDER/empty.py"], r"empty\.py has no function get_config"),
    (["--config=FOLDER/none.py"], r"get_config returns NoneType, not a ConfigDict"),
  ):
    args = [arg.replace("FOLDER", str(tmp_path)) for arg in args]
    monkeypatch.setattr(sys, "argv", ["last_letter", *args, "--workdir=work"])  # there ml_collections looks for keys
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as ended:
      cli._parse_flags(sys.argv)
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 1 and re.search(f"^error: .*{message}", line), line


PACKAGE = pathlib.Path(experiments.__file__).parent
LETTERS_FILE, MEDIUM = "experiments/configs/last_letter.py", "experiments/assets/medium"


def test_packaged_files_and_those_of_the_current_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for name in ("nothing", "last_letter.py", "other/last_letter.py", "common", "", ".."):
    refused(("one of base, gsm8k, last_letter, math500, word_sorting", locate.config_path, f"{name}:tiny"))
  for name in ("last_letter", LETTERS_FILE, "last_letter:tiny", f"{LETTERS_FILE}:tiny"):
    assert locate.config_path(name) == str(PACKAGE / "configs" / "last_letter.py") + (":tiny" if ":" in name else "")
  assert locate.asset_path(MEDIUM) == str(PACKAGE / "assets" / "medium")
  for path in ("", "gemma", "gs://bucket/gemma", "experiments/assets/nothing", "assets/medium"):
    assert locate.asset_path(path) == path
  (tmp_path / MEDIUM).mkdir(parents=True)
  assert locate.asset_path(MEDIUM) == MEDIUM
  for name in ("mine.py", LETTERS_FILE):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    assert locate.config_path(f"{name}:tiny") == f"{name}:tiny"
