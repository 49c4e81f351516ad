"""The host's memory is kept between calls of a jitted function."""

import os
import platform
import subprocess
import sys

import pytest

# Page faults of a call of a function with two temporary buffers of this shape: the fewest of several calls, as the
# threads of a busy machine may allocate in another order than before.
_COUNT = """
import resource, sys
import jax, jax.numpy as jnp
from genrm_jax import memory

if sys.argv[1] == "keep":
  memory.keep_freed_memory()

@jax.jit
def f(x):
  y = jnp.full((int(sys.argv[2]), int(sys.argv[3])), x)
  return jnp.sum(y @ jnp.tanh(y.T @ y))

faults = []
for _ in range(3):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  jax.block_until_ready(f(1.0))
  faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults))
"""


def _faults(keep: str, rows: int, columns: int) -> int:
  environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
  command = [sys.executable, "-c", _COUNT, keep, str(rows), str(columns)]
  done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
  return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
@pytest.mark.one_python
@pytest.mark.parametrize(("rows", "columns"), [(1 << 15, 512), (5 << 23, 8)], ids=["128 MiB", "2.5 GiB"])
def test_buffers_of_one_call_are_there_for_the_next(rows, columns):
  without = _faults("leave", rows, columns)
  assert without > 1000, "the function's buffers come from the system in each call"
  assert _faults("keep", rows, columns) < without / 10
