"""The planner with the real TPU compiler, where it is installed: the quick version of docs/plans.md."""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import pytest

from experiments.configs import gsm8k
from experiments.plan import sizes
from genrm_jax.model import gemma

ROOT = pathlib.Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="libtpu is not installed: pip install 'genrm-jax[plan]' on Linux x86_64",
)

NEVER_FITS = """
import jax
jax.config.update("jax_platforms", "cpu")
from experiments import plan_search, plan_sizes
from experiments.configs import gsm8k
from genrm_jax import tpus, verifiers
config = plan_sizes.with_settings(gsm8k.get_config("smoke"), {"engine.max_tokens": 64})
where, verifier = tpus.get_slice("v6e:2x2"), verifiers.GENRM_COT
outcome = plan_search.search_scoring(config, verifier, where, [{"engine.rows_per_batch": 3_000_000}])
config = plan_sizes.with_settings(config, outcome.changes)
last = outcome.programs[-1]
print(len(outcome.programs), last.parts["cache"] / 2**30, last.seconds)
print(plan_search.remedy(config, verifier, last, where))
"""


def python(*arguments):
  """A process of its own, so that the compiler is not loaded into the one that runs all tests."""
  environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")}
  environment["PYTHONPATH"] = str(ROOT)
  return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, env=environment)


def plan(*arguments):
  return python("-m", "experiments.plan", "--config=experiments/configs/gsm8k.py:smoke", *arguments)


def test_a_small_gemma_is_trained_and_votes_on_four_chips_of_a_v5e():
  done = plan(
    "--topology=v5e:2x2",
    "--verifier=genrm_cot",
    "--config.model.overrides.num_layers=2",
    "--config.mesh.data=1",
    "--config.mesh.fsdp=-1",
    "--config.engine.max_tokens=64",
    "--config.verifiers.genrm_cot.row_length=64",
  )
  assert done.returncode == 0, done.stderr
  assert "smoke on v5e:2x2: 4 chips, 1 hosts" in done.stdout
  assert "mesh of data=1, fsdp=4, tensor=1, scoring on one of data=4, fsdp=1, tensor=1 a host" in done.stdout
  rows = re.findall(r"^  (.+?)  +([\d.]+) MiB .* of 15\.75 GiB: fits \(compiled in \d+ s\)$", done.stdout, re.MULTILINE)
  voting = ["loading", "copying rows", "placing prompts", "writing", "reading prompts"]
  assert [name for name, _ in rows] == ["train step", *voting]
  config = sizes.with_settings(gsm8k.get_config("smoke"), {"model.overrides.num_layers": 2})
  held = sum(gemma.num_params(sizes.model_config(config)))  # four bytes each, of which each chip trains a quarter
  assert [float(size) for _, size in rows] == [round(size / 2**20, 2) for size in [held] + 5 * [4 * held]]


def test_what_does_not_fit_is_told_with_the_compilers_own_number():
  done = python("-c", NEVER_FITS)
  assert done.returncode == 0, done.stderr
  first, line = done.stdout.splitlines()
  num_programs, cache, seconds = first.split()
  assert num_programs == "2" and float(seconds) > 0, "the first that does not fit is the last that is tried"
  wanted = float(re.search(r"copying rows needs ([\d.]+) GiB of 31\.24 GiB, most of it ", line)[1])
  assert float(cache) < 31.24 < wanted, "only the compiler could tell"
  assert "Use --config.engine.rows_per_batch=1500000" in line


def test_a_topology_that_is_not_there_is_one_message():
  done = plan("--topology=v5e:3x3")
  assert done.returncode == 1 and "Traceback" not in done.stderr
  assert "error: topology v5e:3x3: " in done.stderr and "there are 1x1, 2x2" in done.stderr
