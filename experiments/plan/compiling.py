"""The real TPU compiler, ahead of time and without a TPU: whether a program fits a chip, and what it keeps there.

libtpu compiles for slices that are not there. It looks for none (TPU_SKIP_MDS_QUERY), and since nothing is run, several
processes may have it loaded at once (ALLOW_MULTIPLE_LIBTPU_LOAD; else a lock file lets in one).
"""

import dataclasses
import functools
import importlib.util
import os
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
from jax.experimental import topologies
from jax.sharding import Mesh

from experiments.plan.programs import Program
from experiments.plan.tpus import Slice
from genrm_jax.runtime import sharding
from genrm_jax.runtime.errors import UserError
from genrm_jax.runtime.progress import say

_ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_LOG_DIR": "disabled",
  "TPU_STDERR_LOG_LEVEL": "3",
  # What the library would else ask the machine for, and warn of when there is no answer.
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_WORKER_HOSTNAMES": "localhost",
}
# "... the total memory required for HLO temporaries (16.03G) exceeds available HBM (15.75G)": arguments are among them.
_WANTED = re.compile(r"\(([\d.]+)([KMG])\) exceeds available HBM")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


@functools.cache
def devices(where: Slice) -> Sequence[Any]:
  """The devices of a slice that is not there.

  Raises:
    UserError: libtpu is not installed, or it knows no such slice.
  """
  if importlib.util.find_spec("libtpu") is None:
    raise UserError("planning needs the TPU compiler, which runs on Linux x86_64: pip install 'genrm-jax[plan]'")
  for name, value in _ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  try:
    return topologies.get_topology_desc(platform="tpu", topology_name=where.name).devices
  except jax.errors.JaxRuntimeError as e:
    message = str(e).splitlines()[0]
    if not message.startswith("INVALID_ARGUMENT"):
      raise UserError(f"the TPU compiler (libtpu) does not start: {message}") from e
    raise UserError(
      f"topology {where.name}: {message.partition(': ')[2]}; there are {', '.join(where.chip.slices)}"
    ) from e


def training_mesh(config: ml_collections.ConfigDict, where: Slice) -> Mesh:
  """The config's mesh over the devices of a slice.

  Raises:
    UserError: libtpu or the slice is not there, or the mesh does not divide.
  """
  return _mesh(config.mesh, "mesh", where)


def engine_mesh(config: ml_collections.ConfigDict, where: Slice) -> Mesh:
  """The mesh of the config's engine, of which each host of a slice has one over its own devices.

  Raises:
    UserError: as for `training_mesh`.
  """
  return _mesh(config.engine.mesh, "engine.mesh", where.of_one_host)


def _mesh(axes: ml_collections.ConfigDict, option: str, where: Slice) -> Mesh:
  chips = devices(where)
  try:
    return sharding.make_mesh(**axes.to_dict(), devices=chips)
  except UserError as e:
    options = ", ".join(f"--config.{option}.{axis}" for axis in axes)
    raise UserError(f"{e} Set {options} for the {where.num_chips} chips of {where.name}") from e


@dataclasses.dataclass(frozen=True)
class Fit:
  """A program on a chip.

  Attributes:
    program: its name.
    parts: bytes by what they hold.
    limit: bytes that there are.
    seconds: that tracing and compiling took here; None where `parts` is arithmetic, the least that is needed, and it is
      too much, so that nothing was compiled.
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

  @property
  def largest(self) -> str:
    """What takes the most."""
    return max(self.parts, key=lambda name: self.parts[name])


def fit(program: Program, where: Slice, mesh: Mesh, least: Mapping[str, int]) -> Fit:
  """Compiles a program for a slice, unless arithmetic tells that it cannot fit.

  Args:
    program: what.
    where: for which slice.
    mesh: of its devices.
    least: bytes that it needs for certain, beside what it holds.
  """
  limit = where.chip.hbm_bytes
  certain = Fit(program.name, {**program.held, **least}, limit, seconds=None)
  if not certain.fits:
    return certain
  say(f"compiling for {where.name}: {program.name}")
  start = time.monotonic()
  try:
    with jax.set_mesh(mesh):
      compiled = program.lower().compile()
    stats: Any = compiled.memory_analysis()
    # Outputs that take the place of donated arguments (alias) lie where these lay.
    total = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    total += stats.temp_size_in_bytes + stats.generated_code_size_in_bytes
  except jax.errors.JaxRuntimeError as e:
    if "RESOURCE_EXHAUSTED" not in str(e):
      raise
    total = wanted_bytes(str(e)) or limit + 1
  seconds = round(time.monotonic() - start, 1)
  held = sum(program.held.values())
  return Fit(program.name, {**program.held, "temporaries": max(0, total + program.beside - held)}, limit, seconds)


def wanted_bytes(message: str) -> int | None:
  """The bytes of arguments, results and temporaries that a program would need by the compiler's message, if it says."""
  found = _WANTED.search(message)
  return int(float(found[1]) * _UNITS[found[2].upper()]) if found else None
