"""Cloud TPUs by their published numbers, and slices of them by name: "v5e:2x2" is four chips of a v5e."""

import dataclasses
import math
import types
from collections.abc import Mapping

from genrm_jax.runtime.errors import UserError

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One chip of a kind of TPU.

  Attributes:
    name: as it stands before the colon of a slice.
    hbm_bytes: memory that a program can have. Published are 16, 95 and 32 GB; these are the "available HBM" of the
      compiler's own message (libtpu 0.0.52), which it refuses to go beyond.
    peak_flops: bfloat16 operations a second.
    hbm_bandwidth: bytes a second between memory and chip.
    ici_bandwidth: bytes a second over all links to other chips, in and out together.
    ici_links: links that a chip has, two for each dimension of a slice's shape.
    chips_per_host: chips of one host in a slice of several hosts.
    slices: shapes that are offered, from the smallest.
    source: where the numbers stand, read in November 2026.
  """

  name: str
  hbm_bytes: int
  peak_flops: float
  hbm_bandwidth: float
  ici_bandwidth: float
  ici_links: int
  chips_per_host: int
  slices: tuple[str, ...]
  source: str


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
KINDS: Mapping[str, Chip] = types.MappingProxyType(
  {
    chip.name: chip
    for chip in (
      Chip(
        name="v5e",
        hbm_bytes=int(15.75 * _GIB),
        peak_flops=197e12,
        hbm_bandwidth=819e9,
        ici_bandwidth=400e9,
        ici_links=4,
        chips_per_host=4,
        slices=_FLAT,
        source="https://docs.cloud.google.com/tpu/docs/v5e",
      ),
      Chip(
        name="v5p",
        hbm_bytes=int(95.73 * _GIB),
        peak_flops=459e12,
        hbm_bandwidth=2765e9,
        ici_bandwidth=1200e9,
        ici_links=6,
        chips_per_host=4,
        slices=("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
        source="https://docs.cloud.google.com/tpu/docs/v5p-training",
      ),
      Chip(
        name="v6e",
        hbm_bytes=int(31.24 * _GIB),
        peak_flops=918e12,
        hbm_bandwidth=1638e9,
        ici_bandwidth=800e9,
        ici_links=4,
        chips_per_host=4,
        slices=_FLAT,
        source="https://docs.cloud.google.com/tpu/docs/v6e",
      ),
    )
  }
)


@dataclasses.dataclass(frozen=True)
class Slice:
  """Chips of one kind, wired to a grid."""

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
    return -(-self.num_chips // self.chip.chips_per_host)

  @property
  def of_one_host(self) -> "Slice":
    """The chips of one of its hosts: 2x2 of them, unless it has fewer."""
    if self.num_hosts == 1:
      return self
    return Slice(self.chip, (2, 2) + (1,) * (len(self.shape) - 2))

  @property
  def receive_bandwidth(self) -> float:
    """Bytes a second that a chip can take in from its neighbours; 0 where it has none.

    Along a dimension of two chips one link is used, along a longer one both. Half of a link's published rate is inward.
    """
    used = sum(min(size - 1, 2) for size in self.shape)
    return self.chip.ici_bandwidth / 2 * used / self.chip.ici_links


def get_slice(name: str) -> Slice:
  """The slice called `name`, KIND:SHAPE.

  Raises:
    UserError: there is no such kind, or it has no such shapes.
  """
  kind, _, shape = name.partition(":")
  known = "; ".join(f"{c.name}:{c.slices[0]} to {c.name}:{c.slices[-1]}" for c in KINDS.values())
  if kind not in KINDS:
    raise UserError(f"unknown topology {name!r}; it is KIND:SHAPE, from {known}")
  chip, sizes = KINDS[kind], shape.split("x")
  if len(sizes) != chip.ici_links // 2 or not all(size.isdecimal() and int(size) for size in sizes):
    raise UserError(f"topology {name!r}: the shape of a {kind} is one such as {', '.join(chip.slices)}")
  return Slice(chip, tuple(map(int, sizes)))
