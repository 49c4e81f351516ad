"""How much memory there is, asked before it is taken, and how the host's is kept."""

import contextlib
import ctypes
import math
import pathlib
from typing import Any

import jax

from genrm_jax.runtime.errors import UserError

_MEMINFO = pathlib.Path("/proc/meminfo")
# Parameters of glibc's mallopt (malloc.h).
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def check_fits(what: str, arrays: Any) -> None:
  """UserError if the shards of `arrays` do not fit into the free memory of this process's devices.

  Devices of a CPU share the host's memory. Where a backend or an operating system does not tell, nothing is checked.

  Args:
    what: of which the arrays are, for the message.
    arrays: a tree of jax.ShapeDtypeStruct; without a sharding an array is the host's (NumPy).
  """
  needed: dict[Any, int] = {}
  on_host = 0
  for array in jax.tree.leaves(arrays):
    if array.sharding is None:
      on_host += math.prod(array.shape) * array.dtype.itemsize
      continue
    shard_bytes = math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
    for device in array.sharding.addressable_devices:
      needed[device] = needed.get(device, 0) + shard_bytes
  on_host += sum(size for device, size in needed.items() if device.platform == "cpu")
  _compare(what, "the host", on_host, available_host_bytes())
  for device, size in needed.items():
    if device.platform != "cpu":
      stats = device.memory_stats() or {}
      limit = stats.get("bytes_limit")
      _compare(what, f"{device}", size, None if limit is None else limit - stats.get("bytes_in_use", 0))


def available_host_bytes() -> int | None:
  """Memory that this machine can still give without swapping; None where it does not tell (no /proc)."""
  if not _MEMINFO.exists():
    return None
  fields = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
  return int(fields["MemAvailable"].split()[0]) * 1024


def keep_freed_memory() -> None:
  """Lets a CPU backend keep what it frees for its next allocation, instead of giving it back to the system.

  XLA on CPU allocates its temporary buffers anew in each call. Fetched from the system page by page, they took a third
  of the time of a small model's training step. To be called before JAX has started its threads; does nothing where the
  C library is not glibc, or on an accelerator.
  """
  with contextlib.suppress(OSError, AttributeError, TypeError):  # another system, another C library
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_M_ARENA_MAX, 1)  # a thread's own arena consists of small heaps, which have no room for the buffers
    if jax.default_backend() == "cpu":
      mallopt(_M_MMAP_MAX, 0)
      mallopt(_M_TRIM_THRESHOLD, -1)  # never; a number would be at most 2 GiB, and a step may free more


def _compare(what: str, where: str, needed: int, available: int | None) -> None:
  if available is not None and needed > available:
    raise UserError(
      f"{what} take {needed / 2**30:.1f} GiB on {where}, which has {available / 2**30:.1f} GiB free; use bfloat16 "
      "parameters, more devices (fsdp or tensor in the mesh), or a larger machine"
    )
