"""Settings of the tests of sampling and scoring."""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def _compile_quickly():
  """Models are so small here that optimising a program costs more than running it."""
  before = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", before)
