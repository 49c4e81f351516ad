"""The host keeps freed memory for the next call, and arrays that do not fit are refused."""

import os
import platform
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genrm_jax.runtime import memory, sharding
from genrm_jax.runtime.errors import UserError

# Prints page faults: of a jitted function with 64 MiB of temporary buffers (the fewest of several calls, since threads
# may allocate in different orders), and of filling 2.5 GiB that were allocated, filled and freed before.
_COUNT = """
import ctypes, resource, sys
import jax, jax.numpy as jnp
from genrm_jax.runtime import memory

if sys.argv[1] == "keep":
  memory.keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p

def faults(work):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  work()
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

@jax.jit
def f(x):
  y = jnp.full((1 << 15, 512), x)
  return jnp.sum(y @ jnp.tanh(y.T @ y))

def fill(size=5 << 29):
  place = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(size)))
  ctypes.memset(place, 1, size)
  libc.free(place)

print(min(faults(lambda: jax.block_until_ready(f(1.0))) for _ in range(6)))
fill()
print(faults(fill))
"""


@pytest.mark.one_python
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is a function of glibc")
def test_freed_memory_is_kept_for_the_next_call():
  environ, found = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}, {}
  for keep in ("leave", "keep"):
    command = [sys.executable, "-c", _COUNT, keep]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environ)
    found[keep] = np.array(done.stdout.split(), int)
  assert (found["leave"] > 1000).all(), "memory comes from the system each time"
  assert (found["keep"] < found["leave"] / 10).all()


def test_cpu_devices_share_the_memory_of_the_host(monkeypatch):
  """16,000 bytes: 4,000 in quarters, 4 copies of 1,000, and 8,000 on the host."""
  monkeypatch.setattr(memory, "available_host_bytes", lambda: available)
  quarters = sharding.batch_sharding(sharding.make_mesh(data=4, devices=jax.devices()[:4]))
  arrays = {
    "x": jax.ShapeDtypeStruct((1000,), jnp.float32, sharding=quarters),
    "whole": jax.ShapeDtypeStruct((250,), jnp.float32, sharding=sharding.replicated(quarters.mesh)),
    "y": jax.ShapeDtypeStruct((4000,), jnp.bfloat16),
  }
  available = 16_000
  memory.check_fits("they", arrays)
  available = 15_999
  with pytest.raises(UserError, match=r"they take .* the host"):
    memory.check_fits("they", arrays)
