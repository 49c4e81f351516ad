"""The host's memory is kept between calls of a jitted function."""

import os
import platform
import subprocess
import sys

import pytest

# Page faults of a call of a function with 64 MiB of temporary buffers: the fewest of several calls, as the threads of a
# busy machine may allocate in another order than before.
_COUNT = """
import resource, sys
import jax, jax.numpy as jnp
from genrm_jax import memory

if sys.argv[1] == "keep":
  memory.keep_freed_memory()

@jax.jit
def f(x):
  y = jnp.full((1 << 15, 512), x)
  return jnp.sum(y @ jnp.tanh(y.T @ y))

faults = []
for _ in range(6):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  jax.block_until_ready(f(1.0))
  faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults))
"""


def _faults(keep: str) -> int:
  environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
  done = subprocess.run(
    [sys.executable, "-c", _COUNT, keep], capture_output=True, text=True, check=True, env=environment
  )
  return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_buffers_of_one_call_are_there_for_the_next():
  without = _faults("leave")
  assert without > 1000, "the function's buffers come from the system in each call"
  assert _faults("keep") < without / 10
