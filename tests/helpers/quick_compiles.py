"""XLA flags of the tests: cheap compilation, for small programs that take longer to compile than to run, and patience.

On a busy machine the threads of virtual devices may come to a collective minutes apart; by default XLA aborts then.
"""

import importlib.metadata

XLA_FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_collective_call_terminate_timeout_seconds=1200"
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):  # removed later
  XLA_FLAGS += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
