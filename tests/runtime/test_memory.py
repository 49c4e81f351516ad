"""The host keeps freed memory for the next call, and arrays that do not fit are refused."""

import os
import platform
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from refusals import refused

from genrm_jax.runtime import memory, sharding

_FAULTS = """
import resource, sys
import numpy as np
from genrm_jax.runtime import memory

def faults():
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  np.ones(5 << 26)  # 2.5 GiB: glibc's threshold for trimming is at most 2 GiB
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if sys.argv[1] == "keep":
  memory.keep_freed_memory()
faults()
print(faults())
"""


@pytest.mark.one_python
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is a function of glibc")
def test_freed_memory_is_kept_for_the_next_call():
  environ = os.environ | {"JAX_PLATFORMS": "cpu"}
  commands = ([sys.executable, "-c", _FAULTS, keep] for keep in ("leave", "keep"))
  without, kept = (int(subprocess.check_output(command, env=environ)) for command in commands)
  assert without > 1000 and kept < without / 10


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
  refused((r"they take .* the host", memory.check_fits, "they", arrays))
