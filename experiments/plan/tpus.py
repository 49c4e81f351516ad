"""Cloud TPUs by their published numbers, and slices by name: "v5e:2x2" is four chips of a v5e."""

import dataclasses
import math

from genrm_jax.runtime.errors import UserError

CHIPS_PER_HOST = 4  # in a slice of several hosts


@dataclasses.dataclass(frozen=True)
class Chip:
  """One kind of chip; numbers from docs.cloud.google.com/tpu/docs/{v5e,v5p-training,v6e}, read in November 2026."""

  name: str
  hbm_bytes: int  # published: 16, 95, 32 GB; these are the "available HBM" of the compiler's messages (libtpu 0.0.52)
  peak_flops: float  # bfloat16 operations per second
  hbm_bandwidth: float  # bytes per second between memory and chip
  ici_bandwidth: float  # bytes per second over all links to other chips, both directions together
  slices: tuple[str, ...]  # shapes on offer, from the smallest: tori with two links per axis


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
KINDS = {
  "v5e": Chip("v5e", int(15.75 * 2**30), 197e12, 819e9, 400e9, _FLAT),
  "v5p": Chip("v5p", int(95.73 * 2**30), 459e12, 2765e9, 1200e9, _CUBES),
  "v6e": Chip("v6e", int(31.24 * 2**30), 918e12, 1638e9, 800e9, _FLAT),
}


@dataclasses.dataclass(frozen=True)
class Slice:
  """Chips of one kind, wired to a torus."""

  chip: Chip
  shape: tuple[int, ...]

  @property
  def name(self) -> str:
    return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

  @property
  def num_chips(self) -> int:
    return math.prod(self.shape)

  @property
  def num_hosts(self) -> int:
    return -(-self.num_chips // CHIPS_PER_HOST)

  @property
  def of_one_host(self) -> "Slice":
    """The chips of one host: 2x2, or all of a smaller slice."""
    return self if self.num_hosts == 1 else Slice(self.chip, (2, 2) + (1,) * (len(self.shape) - 2))

  @property
  def receive_bandwidth(self) -> float:
    """Bytes per second that a chip receives from its neighbours: half of each link's rate; an axis of two uses one."""
    used = sum(min(size - 1, 2) for size in self.shape)
    return self.chip.ici_bandwidth / 2 * used / (2 * len(self.shape))


def get_slice(name: str) -> Slice:
  """The slice called KIND:SHAPE. UserError if there is no such kind, or the shape has the wrong number of axes."""
  kind, _, shape = name.partition(":")
  sizes = [int(size) if size.isdecimal() else 0 for size in shape.split("x")]
  if kind in KINDS and all(sizes) and len(sizes) == KINDS[kind].slices[0].count("x") + 1:
    return Slice(KINDS[kind], tuple(sizes))
  known = "; ".join(f"{c.name}:{c.slices[0]} to {c.name}:{c.slices[-1]}" for c in KINDS.values())
  raise UserError(f"topology {name!r}: give KIND:SHAPE, from {known}")
