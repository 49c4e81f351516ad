"""XLA flags of the tests: cheap compilation, for small programs that take longer to compile than to run, and patience.

On a busy machine the threads of virtual devices may come to a collective minutes apart; by default XLA aborts then.
"""

import importlib.metadata
import os
import pathlib

XLA_FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_collective_call_terminate_timeout_seconds=1200"
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):  # removed later
  XLA_FLAGS += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"


def environ(folder: pathlib.Path) -> dict[str, str]:
  """Environment of processes that share compiled programs, in `folder` unless a cache is configured already."""
  return {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": XLA_FLAGS,
    "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(folder)),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
  }
