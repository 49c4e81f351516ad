"""The planner: its arithmetic against XLA, its programs and search on CPU devices, and with the TPU compiler."""

import dataclasses
import importlib.metadata
import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest
from refusals import refused

from experiments.configs import gsm8k
from experiments.plan import __main__, compiling, costs, dry_engine, planned, programs, search, tpus
from genrm_jax.infer import engine, sampling, slots
from genrm_jax.model import gemma
from genrm_jax.model.config import get_config
from genrm_jax.verifiers.genrm import GenRM

FOUR_CHIPS, ONE_CHIP = tpus.get_slice("v5e:2x2"), tpus.get_slice("v5e:1x1")


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
  """CPU devices in place of TPU chips, as many as the slice has."""
  monkeypatch.setattr(compiling, "devices", lambda where: jax.devices()[: where.num_chips])


def small(where=FOUR_CHIPS, **changes):
  """The smoke config with two layers, over fsdp; `changes` by dotted key, with `__` for the dot."""
  overrides = {"model.overrides.num_layers": 2, "engine.max_tokens": 64, "mesh.data": 1, "mesh.fsdp": -1}
  rows = {f"verifiers.{name}.row_length": 64 for name in ("orm", "genrm", "genrm_cot")}
  changed = {key.replace("__", "."): value for key, value in changes.items()}
  return planned.planned(gsm8k.get_config("smoke"), where).changed({**overrides, **rows, **changed})


def paper(model="gemma_2b", where=FOUR_CHIPS, **changes):
  run = planned.planned(gsm8k.get_config(model), where)
  return run.changed({key.replace("__", "."): value for key, value in changes.items()})


def with_memory(where, size):
  return dataclasses.replace(where, chip=dataclasses.replace(where.chip, hbm_bytes=size))


def compiled(run, name):
  return [p.compile() for p in [*programs.train_programs(run, name), *programs.score_programs(run, name)]]


# The run: the pipeline's own, without files.


def test_a_run_needs_neither_checkpoint_nor_tokenizer(tmp_path):
  run = paper(model__checkpoint=f"{tmp_path}/gemma", tokenizer__path=f"{tmp_path}/tokenizer.model")
  assert run.model == dataclasses.replace(get_config("gemma_2b", dtype="bfloat16"), sharding=run.model.sharding)
  assert small().model.vocab_size == 320, "that of the tokenizer that the run would learn"
  prompter = run.prompter
  solve = prompter.format.render(prompter.format.solve, question="1?")
  assert prompter.tokenizer.decode(prompter.direct("1?", "2")[1:]) == solve + "2" + prompter.template("verify")
  assert run.counts("orm") == (5, 0), "1,024 tokens have room for five of the shortest"
  assert 0.6 * 1024 < run.counts("genrm").max_targets < 1024, "it learns to solve as well"
  assert paper(verifiers__genrm__solve_weight=0.0).counts("genrm") == (5, 0)
  assert run.counts("dpo").max_pairs > 0


def test_the_engine_is_called_as_the_verifier_scores(monkeypatch):
  run, sampling = paper(), ["init", "prefill", "insert", "decode", "fork", "resume", "decode", "next_token_probs"]
  found = {name: [call.function.__name__ for call in run.calls(name, 317)] for name in run.verifier_names}
  direct = {"orm": ["next_token_logits"], "genrm": ["next_token_probs"]}
  direct |= {name: ["log_probs_from"] for name in ("dpo", "dpo_reference")}
  greedy = [name for name in sampling if name not in ("fork", "resume")]
  assert found == {**direct, "genrm_cot": sampling, "judge": sampling, "genrm_cot_greedy": greedy}
  calls = run.calls("genrm_cot", 317)
  assert [calls[i].prompts[1] for i in (1, 2, -1)] == [384, 384, 1536], "a forced verdict is read after the rationale"
  assert calls[3].options["settings"].max_new_tokens == 768 and calls[3].args[2].shape[:2] == (256, 32)
  # A context with room for fewer tokens, and a verifier of one's own.
  assert paper(engine__max_tokens=1024).calls("genrm_cot", 857)[0].options["max_len"] == 1024

  class TwoPrompts(GenRM):
    def votes(self, engine, pairs, how, label):
      engine.next_token_probs([self.prompter.solve(q) for q, _ in pairs], (1, 2, 3), label)
      return super().votes(engine, pairs, how, label)

  run = small(verifiers__genrm__solve_weight=0.5)
  verifier = TwoPrompts("genrm", run.prompter, run.config.verifiers.genrm)
  monkeypatch.setattr(planned.PlannedRun, "verifier", lambda self, name: verifier)
  assert run.calls("genrm", 40)[0].options["token_ids"] == (1, 2, 3)
  assert [memory.fits for memory in compiled(run, "genrm")] == [True] * 4


def test_the_engine_makes_the_calls_that_are_planned(monkeypatch):
  made, function = [], engine.Engine.run

  def record(self, *args, **options):
    made.append(dry_engine.Call(args[0], args[1:], options))
    return function(self, *args, **options)

  def shapes(call):
    args = jax.tree.map(lambda a: (a.shape, str(a.dtype)), call.args)
    return call.function, str(args), *sorted((k, v) for k, v in call.options.items() if k != "config")

  run = small(engine__max_tokens=256, engine__rows_per_batch=8, votes__sample__max_new_tokens=8)
  params, end_id = gemma.init(run.model, jax.random.key(0)), run.prompter.end_id
  settings, keys = run.vote_config("genrm_cot").sample, sampling.sample_keys(0, "vote", ["text"], 2)
  monkeypatch.setattr(engine.Engine, "run", record)
  for length in (40, 100, 248):
    real = engine.Engine(params, run.model, run.engine_mesh, end_id, 8, 256)
    real.generate([[3] * length], keys, settings, (run.prompter.yes_id, run.prompter.no_id), "")
    assert {*map(shapes, made)} <= {*map(shapes, run.calls("genrm_cot", length))}
    assert {slots.init, slots.prefill, slots.insert, slots.decode} <= {call.function for call in made}
    made.clear()
  training, scoring = programs.num_compilations(run, "genrm_cot")
  assert training == 2 and programs.num_compilations(paper(), "dpo")[0] == 3
  assert scoring["prefill"] == scoring["insert"] == len([32, 64, 96, 128, 192, 256]) and scoring["decode"] == 1


# The arithmetic.


def one_layer(size, where=ONE_CHIP, **changes):
  widths = {f"model__overrides__{k}": v for k, v in (("num_layers", 1), ("embed_dim", 512), ("ffw_dim", 2048))}
  narrow = {"verifiers__genrm__row_length": 512, "tokenizer__vocab_size": 8192, "engine__max_tokens": 512}
  run = small(where, model__size=size, model__dtype="bfloat16", **widths, **narrow, **changes)
  config = run.config.to_dict()
  config["model"]["sharding"] = dict(get_config(size).rules)
  return planned.planned(config, where)


@pytest.mark.parametrize(
  ("size", "remat"), [("gemma_2b", "none"), ("gemma_2b", "layer"), ("gemma2_9b", "dots"), ("gemma2_9b", "layer")]
)
def test_a_training_step_has_the_operations_that_xla_counts(size, remat):
  run = one_layer(size, verifiers__genrm__remat=remat, verifiers__genrm__solve_weight=0.5)
  (program,) = programs.train_programs(run, "genrm")
  assert costs.train_flops(run, "genrm") == pytest.approx(program.lower().cost_analysis()["flops"], rel=0.02)


def test_reading_has_the_operations_that_xla_counts():
  run = one_layer("gemma2_9b", engine__rows_per_batch=4)
  (*_, program) = programs.score_programs(run, "genrm")
  tokens = program.args[1]
  counted = program.lower().cost_analysis()["flops"]
  assert sum(costs.forward_flops(run.model, tokens.size, tokens.shape[1], 4)) == pytest.approx(counted, rel=0.02)
  for work, limit in (((4 * 197e12, 4e11, 0), "compute"), ((0, 819e9, 1e9), "memory"), ((0, 1, 100e9), "links")):
    assert costs.roofline("", 1, FOUR_CHIPS, *work) == costs.Estimate("", pytest.approx(1), limit, 1)
  step, evaluation = costs.training(paper(), "genrm")
  more, _ = costs.training(paper(where=tpus.get_slice("v5e:2x4")), "genrm")
  assert more.seconds < step.seconds < costs.training(paper(verifiers__genrm__remat="layer"), "genrm")[0].seconds
  # Six operations per parameter and token, by the rule of thumb, and some for attention.
  assert step.seconds * 4 * 197e12 == pytest.approx(6 * 2.0e9 * 16 * 1024, rel=0.25)
  assert (step.number, evaluation.number) == (6_000, 24)
  assert evaluation.seconds == pytest.approx(256 / 16 * step.seconds / 3, rel=0.1), "256 rows forward, 16 at a time"
  fewer = paper(verifiers__genrm__loop__max_eval_rows=64, verifiers__genrm__loop__eval_every_steps=500)
  capped = costs.training(fewer, "genrm")[1]
  assert capped.seconds == pytest.approx(evaluation.seconds / 4) and capped.number == 12
  one, two = (costs.scoring(paper(where=tpus.get_slice(f"v5e:{s}")), "genrm_cot", 4096) for s in ("2x2", "2x4"))
  assert costs.hours(two) == pytest.approx(costs.hours(one) / 2), "each host scores its share"


# Memory and search.


def test_parameters_and_moments_are_counted_as_they_lie_on_a_chip():
  (program,) = programs.train_programs(small(), "genrm")
  num_params = sum(gemma.num_params(small().model))
  assert program.held["parameters"] == 4 * num_params / 4
  # Adam's two counters beside the moments.
  assert program.held["optimiser"] == pytest.approx(2 * 4 * num_params / 4, abs=8)
  assert program.compile().parts["temporaries"] >= program.least["gradients"] == 4 * num_params / 4
  too_small = dataclasses.replace(program, where=with_memory(FOUR_CHIPS, 1000)).compile()
  assert not too_small.fits and too_small.seconds is None, "by arithmetic, without the compiler"
  (adapted,) = programs.train_programs(small(verifiers__genrm__lora__rank=2), "genrm")
  assert adapted.compile().fits and adapted.held["optimiser"] < program.held["optimiser"] / 4


def test_search_takes_the_fastest_settings_that_fit(monkeypatch):
  run = paper("gemma_7b", tpus.get_slice("v5e:2x4"))
  meshes = {(c["engine.mesh.data"], c["engine.mesh.tensor"]) for c in search.scoring_attempts(run, "genrm_cot")}
  assert meshes == {(4, 1), (2, 2), (1, 4)}, "of the four chips of a host"
  attempts = search.training_attempts(run, "genrm_cot")
  seconds = [costs.training(run.changed(changes), "genrm_cot")[0].seconds for changes in attempts]
  assert seconds == sorted(seconds) and seconds[0] < seconds[-1]
  run = small(verifiers__genrm__row_length=256, verifiers__genrm__loop__batch_size=4)
  dots, layer = ({"verifiers.genrm.remat": remat} for remat in ("dots", "layer"))
  monkeypatch.setitem(search._PARTS, "training", (lambda run, name: [dots, layer], programs.train_programs))
  first, second = (programs.train_programs(run.changed(c), "genrm")[0].compile() for c in (dots, layer))
  for size, changes, fits in ((first.total - 1, layer, True), (second.total - 1, layer, False)):
    found = search.plan(planned.planned(run.config, with_memory(FOUR_CHIPS, size)), "genrm", ["training"], 1, True)
    assert (found.changes, found.fits, len(found.programs)) == (changes, fits, 1)
    assert found.programs[0].parts == second.parts


# The command and the table.


def test_a_verifier_of_the_papers_tables_is_planned():
  tiny = {"model__size": "tiny_gemma1", "engine__max_tokens": 1664, "engine__rows_per_batch": 8}
  run = paper(**tiny, verifiers__dpo__row_length=64)
  shown = __main__.show(run, "dpo", 100, searches=False)
  assert shown.count(": fits (compiled in ") == 3 and "NOT FIT" not in shown
  assert "scoring 100 solutions: at least" in shown and "evaluation of" in shown


def test_a_mistake_is_one_message(monkeypatch):
  for changes, key_words in (
    ({"mesh__fsdp": 3}, "fsdp=3.*4 devices"),
    ({"engine__mesh__tensor": 3}, "tensor=3.*4 devices"),
    ({"verifiers__genrm__loop__batch_size": 6}, "genrm: batch_size 6.*4 batch shards"),
    ({"verifiers__genrm__remat": "zzz"}, "config.verifiers.genrm.remat"),
    ({"votes__num_votes": 0}, "config.votes.num_votes"),
    ({"engine__max_tokens": -1}, "config.engine.max_tokens"),
  ):
    refused((key_words, lambda changes=changes: compiled(small(**changes), "genrm")))
  monkeypatch.undo()
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  compiling.devices.cache_clear()
  refused((r"genrm-jax\[plan\]", compiling.devices, FOUR_CHIPS))


def test_slices_by_name():
  for chip in tpus.KINDS.values():
    slices = [tpus.get_slice(f"{chip.name}:{shape}") for shape in chip.slices]
    assert [s.name for s in slices] == [f"{chip.name}:{shape}" for shape in chip.slices]
    sizes = [s.num_chips for s in slices]
    assert sizes == sorted(set(sizes)), "from the smallest"
  assert [tpus.get_slice(name).num_hosts for name in ("v5e:1x1", "v5p:2x2x4")] == [1, 4]
  for name, rate in {"v5e:1x1": 0, "v5e:2x2": 100e9, "v5e:4x4": 200e9, "v5p:4x4x4": 600e9}.items():
    assert tpus.get_slice(name).receive_bandwidth == pytest.approx(rate), "over the links that the slice uses"
  for name in ("v7x:2x2", "2x2", "v5e:2x2x2", "v5p:2x2", "v5e:0x2", "v5e"):
    refused((f"topology '{name}': give KIND:SHAPE, from v5e:1x1", tpus.get_slice, name))


ROOT = pathlib.Path(__file__).resolve().parents[2]
needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="libtpu is not installed: pip install 'genrm-jax[plan]' on Linux x86_64",
)

NEVER_FITS = """
import jax
jax.config.update("jax_platforms", "cpu")
from experiments.configs import gsm8k
from experiments.plan import planned, search, tpus
sizes = {"model.overrides.num_layers": 128, "engine.rows_per_batch": 1280}
run = planned.planned(gsm8k.get_config("smoke"), tpus.get_slice("v6e:2x2")).changed(sizes)
fits = search.plan(run, "genrm_cot", ["scoring"], 1, searches=False).programs
print(len(fits), fits[-1].parts["cache"] / 2**30, fits[-1].total / 2**30, fits[-1].seconds)
"""


def python(*arguments):
  """Runs in a subprocess, which keeps the TPU compiler out of the test process."""
  environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")}
  environment["PYTHONPATH"] = str(ROOT)
  return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, env=environment)


def plan(*arguments):
  return python("-m", "experiments.plan", "--config=gsm8k:smoke", *arguments)


@needs_libtpu
def test_a_small_gemma_is_trained_and_votes_on_four_chips_of_a_v5e():
  mesh = ("--config.mesh.data=1", "--config.mesh.fsdp=-1")
  sizes = ("model.overrides.num_layers=2", "engine.max_tokens=64", "verifiers.genrm_cot.row_length=64")
  done = plan("--topology=v5e:2x2", "--verifier=genrm_cot", *mesh, *(f"--config.{size}" for size in sizes))
  assert done.returncode == 0, done.stderr
  assert "data=1, fsdp=4, tensor=1. " in done.stdout and "data=4, fsdp=1, tensor=1." in done.stdout
  line = r"^  (.+): parameters ([\d.]+) .* of 16,128 MiB per chip: fits \(compiled in \d+ s\)$"
  rows = re.findall(line, done.stdout, re.MULTILINE)
  scoring = ["loading", "insert", "fork", "prefill", "decode", "next_token_probs"]
  assert [name for name, _ in rows] == ["train step", *scoring]
  run = planned.planned(gsm8k.get_config("smoke"), tpus.get_slice("v5e:2x2")).changed({"model.overrides.num_layers": 2})
  held = sum(gemma.num_params(run.model))  # four bytes each, of which each chip trains a quarter
  assert [float(size) for _, size in rows] == [round(size / 2**20, 2) for size in [held] + 6 * [4 * held]]
  assert "compilations: 2 for training" in done.stdout


@needs_libtpu
def test_a_program_that_does_not_fit_has_the_compilers_own_number():
  done = python("-c", NEVER_FITS)
  assert done.returncode == 0, done.stderr
  num_programs, cache, total, seconds = map(float, done.stdout.split())
  assert num_programs == 2 and seconds > 0, "the first that does not fit is the last that is tried"
  assert cache < 31.24 < total, "only the compiler could tell"
