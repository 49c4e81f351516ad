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


# Page faults of filling 2.5 GiB that were taken, filled and given back before.
_COUNT_LARGE = """
import ctypes, resource, sys
from genrm_jax import memory

if sys.argv[1] == "keep":
  memory.keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
size = 5 << 29
for _ in range(2):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  place = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(size)))
  ctypes.memset(place, 1, size)
  libc.free(place)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(script: str, keep: str) -> int:
  environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
  command = [sys.executable, "-c", script, keep]
  return int(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)


@pytest.mark.one_python
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
@pytest.mark.parametrize("script", [_COUNT, _COUNT_LARGE], ids=["64 MiB", "2.5 GiB"])
def test_buffers_of_one_call_are_there_for_the_next(script):
  without = _faults(script, "leave")
  assert without > 1000, "memory comes from the system each time"
  assert _faults(script, "keep") < without / 10
