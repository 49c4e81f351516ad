"""Checks that arrays fit into memory before they are allocated, and tunes the host's allocator."""

import contextlib
import ctypes
import math
import pathlib
from typing import Any

import jax

from genrm_jax.runtime.errors import UserError

_MEMINFO = pathlib.Path("/proc/meminfo")
# Parameters of glibc's mallopt (malloc.h).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -3, -4, -8
_MMAP_MAX, _MMAP_THRESHOLD_BYTES = 65_536, 32 << 20  # the defaults of glibc, the second at its largest
_LARGE_BYTES = 512 << 20  # kept buffers may take three times as much


def check_fits(what: str, arrays: Any) -> None:
  """Raises UserError if the shards of `arrays` do not fit into the free memory of this process's devices.

  CPU devices share the host's memory. Nothing is checked where a backend or an operating system does not report it.

  Args:
    what: what the arrays are, for the message.
    arrays: a tree of jax.ShapeDtypeStruct; one without a sharding is a NumPy array on the host.
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
      _compare(what, f"{device}", size, _available_bytes(device))


def _available_bytes(device: jax.Device) -> int | None:
  stats = device.memory_stats() or {}
  limit = stats.get("bytes_limit")
  return None if limit is None else limit - stats.get("bytes_in_use", 0)


def available_host_bytes() -> int | None:
  """Bytes that can be allocated on this machine without swapping; None where that is unknown (no /proc)."""
  if not _MEMINFO.exists():
    return None
  fields = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
  return int(fields["MemAvailable"].split()[0]) * 1024


def keep_freed_memory() -> None:
  """Makes the C library keep freed memory for the next allocation, instead of returning it to the system.

  XLA on CPU allocates its temporary buffers anew in each call. Getting them from the system page by page took a third
  of the training step of a small model. Call it before JAX starts its threads. It has no effect without glibc, or on an
  accelerator.
  """
  with contextlib.suppress(OSError, AttributeError, TypeError):  # another system, another C library
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_M_ARENA_MAX, 1)  # the arenas of threads consist of heaps that are too small for the buffers
    if jax.default_backend() == "cpu":
      mallopt(_M_MMAP_MAX, 0)
      mallopt(_M_TRIM_THRESHOLD, -1)  # never trim; a threshold is at most 2 GiB, and a step may free more


def prepare_for(what: str, program: jax.stages.Compiled, device: jax.Device, remedy: str) -> None:
  """Raises UserError if a program does not fit beside its arguments, which are in memory already.

  Programs with large temporary buffers get them from the system and return them each time: kept ones would be split by
  small arrays, so that the next call finds none that is large enough and the process grows to twice the size.

  Args:
    what: the program, for the message.
    program: compiled; all devices of this process run it.
    device: one of them.
    remedy: how to make it smaller.
  """
  sizes = program.memory_analysis()
  if sizes is None:  # a backend that does not tell
    return
  needed = sizes.temp_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
  if device.platform != "cpu":
    _compare(what, f"{device}", needed, _available_bytes(device), remedy)
    return
  needed *= jax.local_device_count()
  _compare(what, "the host", needed, available_host_bytes(), remedy)
  if needed > _LARGE_BYTES:
    with contextlib.suppress(OSError, AttributeError, TypeError):
      mallopt = ctypes.CDLL(None).mallopt
      mallopt(_M_MMAP_MAX, _MMAP_MAX)
      mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES)


_FEWER_PARAMETERS = "use bfloat16 parameters, more devices (fsdp or tensor in the mesh), or a larger machine"


def _compare(what: str, where: str, needed: int, available: int | None, remedy: str = _FEWER_PARAMETERS) -> None:
  if available is not None and needed > available:
    raise UserError(
      f"{what} take {needed / 2**30:.1f} GiB on {where}, which has {available / 2**30:.1f} GiB free; {remedy}"
    )
