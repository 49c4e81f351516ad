"""What importing the package costs."""

import subprocess
import sys

import pytest

HEAVY = ("tensorflow", "torch", "transformers", "tensorflow_datasets", "gemma")


@pytest.mark.parametrize(
  "module",
  ["genrm_jax", "genrm_jax.verifiers", "experiments.gsm8k", "experiments.last_letter", "experiments.studies.reproduce"],
)
def test_no_heavy_package_comes_along(module):
  code = f"import sys, {module}; print([name for name in {HEAVY!r} if name in sys.modules])"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert done.stdout.strip() == "[]"
