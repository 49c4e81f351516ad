"""Importing the package loads no optional framework."""

import subprocess
import sys

import pytest

HEAVY = ("tensorflow", "torch", "transformers", "tensorflow_datasets", "gemma")
MODULES = ("genrm_jax", "genrm_jax.verifiers", "experiments.gsm8k", "experiments.studies.reproduce")


@pytest.mark.parametrize("module", MODULES)
def test_import_stays_light(module):
  code = f"import sys, {module}; print([name for name in {HEAVY!r} if name in sys.modules])"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert done.stdout.split("\n")[-2] == "[]"
