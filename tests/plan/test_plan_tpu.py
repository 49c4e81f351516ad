"""The planner with the TPU compiler, where it is installed: the quick version of docs/plans.md."""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import pytest

from experiments.configs import gsm8k
from experiments.plan import tpus
from experiments.plan.planned import planned
from genrm_jax.model import gemma

ROOT = pathlib.Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="libtpu is not installed: pip install 'genrm-jax[plan]' on Linux x86_64",
)

NEVER_FITS = """
import jax
jax.config.update("jax_platforms", "cpu")
from experiments.configs import gsm8k
from experiments.plan import search, tpus
from experiments.plan.planned import planned
sizes = {"model.overrides.num_layers": 128, "engine.rows_per_batch": 1280}
run = planned(gsm8k.get_config("smoke"), tpus.get_slice("v6e:2x2")).changed(sizes)
fits = search.plan(run, "genrm_cot", ["scoring"], 1, searches=False).programs
print(len(fits), fits[-1].parts["cache"] / 2**30, fits[-1].total / 2**30, fits[-1].seconds)
"""


def python(*arguments):
  """A process of its own, so that the compiler is not loaded into the one that runs all tests."""
  environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")}
  environment["PYTHONPATH"] = str(ROOT)
  return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, env=environment)


def plan(*arguments):
  return python("-m", "experiments.plan", "--config=gsm8k:smoke", *arguments)


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
  run = planned(gsm8k.get_config("smoke"), tpus.get_slice("v5e:2x2")).changed({"model.overrides.num_layers": 2})
  held = sum(gemma.num_params(run.model))  # four bytes each, of which each chip trains a quarter
  assert [float(size) for _, size in rows] == [round(size / 2**20, 2) for size in [held] + 6 * [4 * held]]
  assert "compilations: 2 for training" in done.stdout


def test_a_program_that_does_not_fit_has_the_compilers_own_number():
  done = python("-c", NEVER_FITS)
  assert done.returncode == 0, done.stderr
  num_programs, cache, total, seconds = map(float, done.stdout.split())
  assert num_programs == 2 and seconds > 0, "the first that does not fit is the last that is tried"
  assert cache < 31.24 < total, "only the compiler could tell"


def test_a_users_mistake_is_one_message():
  for argument, key_words in {
    "--topology=v5e:3x3": "topology v5e:3x3: .*1x1, 2x2",
    "--config=base": "no verifiers",
    "--verifier=nope": "no verifier nope; it has: orm, genrm, genrm_cot",
    "--config.verifiers.genrm.loop.batch_size=6": "genrm: batch_size 6",
  }.items():
    done = plan("--topology=v5e:2x2", argument)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(f"^error: .*{key_words}", done.stderr, re.MULTILINE)
