"""The TPU compiler, ahead of time and without a TPU: whether a program fits on a chip, and what it holds there."""

import dataclasses
import functools
import importlib.util
import math
import os
import re
import time
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from experiments.plan.tpus import Slice
from genrm_jax.runtime.errors import UserError
from genrm_jax.runtime.progress import say

# libtpu must not look for a TPU, nor mind other processes that have it loaded.
_ENVIRONMENT = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
_ENVIRONMENT |= {"TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_LOG_DIR": "disabled", "TPU_STDERR_LOG_LEVEL": "3"}
# "... the total memory required for HLO temporaries (16.03G) exceeds available HBM (15.75G)", arguments included.
_NEEDED = re.compile(r"\(([\d.]+)([KMG])\) exceeds available HBM")


@functools.cache
def devices(where: Slice) -> Sequence[Any]:
  """Devices of a slice to compile for; they run nothing. UserError without libtpu, or if it does not know the slice."""
  if importlib.util.find_spec("libtpu") is None:
    raise UserError("planning needs the TPU compiler, which runs on Linux x86_64: pip install 'genrm-jax[plan]'")
  for name, value in _ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  try:
    return topologies.get_topology_desc(platform="tpu", topology_name=where.name).devices
  except jax.errors.JaxRuntimeError as e:
    first, known = str(e).splitlines()[0], ", ".join(where.chip.slices)
    raise UserError(f"topology {where.name}: the TPU compiler says {first!r}; shapes on offer: {known}") from e


def bytes_of(tree: Any) -> int:
  """Bytes per chip of shapes, which may have shardings."""
  leaves = jax.tree.leaves(tree)
  return sum(math.prod(a.sharding.shard_shape(a.shape) if a.sharding else a.shape) * a.dtype.itemsize for a in leaves)


@dataclasses.dataclass(frozen=True)
class Memory:
  """The memory of a program on a chip: bytes by content, the limit, and the time to trace and compile.

  Where `seconds` is None, nothing was compiled: what the program needs in any case exceeds the limit.
  """

  program: str
  parts: dict[str, int]
  limit: int
  seconds: float | None

  @property
  def total(self) -> int:
    return sum(self.parts.values())

  @property
  def fits(self) -> bool:
    return self.total <= self.limit


@dataclasses.dataclass(frozen=True)
class Program:
  """A jitted function with the shapes of its arguments, for a mesh of chips of `where`.

  While it runs, a chip holds `held` (bytes by content) and its temporaries, which are `least` in any case.
  """

  name: str
  where: Slice
  mesh: jax.sharding.Mesh
  function: Any
  args: tuple[Any, ...]
  options: dict[str, Any]
  held: dict[str, int]
  least: dict[str, int] = dataclasses.field(default_factory=dict)

  def lower(self) -> jax.stages.Lowered:
    with jax.set_mesh(self.mesh):
      return self.function.lower(*self.args, **self.options)

  def compile(self) -> Memory:
    """Compiles the program, unless it cannot fit in any case."""
    limit, start = self.where.chip.hbm_bytes, time.monotonic()
    bound = Memory(self.name, {**self.held, **self.least}, limit, seconds=None)
    if not bound.fits:
      return bound
    say(f"compiling for {self.where.name}: {self.name}")
    try:
      stats: Any = self.lower().compile().memory_analysis()
      # Outputs that take the place of donated arguments (alias) need no memory of their own.
      size = stats.output_size_in_bytes - stats.alias_size_in_bytes + stats.temp_size_in_bytes
      size += stats.generated_code_size_in_bytes
    except jax.errors.JaxRuntimeError as e:
      if "RESOURCE_EXHAUSTED" not in str(e):
        raise
      found = _NEEDED.search(str(e))
      needed = float(found[1]) * {"K": 2**10, "M": 2**20, "G": 2**30}[found[2]] if found else limit + 1
      size = int(needed) - bytes_of(self.args)
    seconds = round(time.monotonic() - start, 1)
    return Memory(self.name, {**self.held, "temporaries": max(0, size)}, limit, seconds)
