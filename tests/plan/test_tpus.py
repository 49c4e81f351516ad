import pytest

from experiments.plan import tpus
from genrm_jax.runtime.errors import UserError


def test_every_slice_on_offer_is_found_by_its_name():
  for chip in tpus.KINDS.values():
    slices = [tpus.get_slice(f"{chip.name}:{shape}") for shape in chip.slices]
    assert [s.name for s in slices] == [f"{chip.name}:{shape}" for shape in chip.slices]
    sizes = [s.num_chips for s in slices]
    assert sizes == sorted(set(sizes)), "from the smallest"
  assert [tpus.get_slice(name).num_hosts for name in ("v5e:1x1", "v5p:2x2x4")] == [1, 4]


def test_a_chip_receives_over_the_links_that_its_slice_uses():
  for name, rate in {"v5e:1x1": 0, "v5e:2x2": 100e9, "v5e:4x4": 200e9, "v5p:4x4x4": 600e9}.items():
    assert tpus.get_slice(name).receive_bandwidth == pytest.approx(rate)


@pytest.mark.parametrize("name", ["v7x:2x2", "2x2", "v5e:2x2x2", "v5p:2x2", "v5e:0x2", "v5e"])
def test_a_slice_that_cannot_be_is_named(name):
  with pytest.raises(UserError, match=f"topology '{name}'.*(1x1|2x2x1)"):
    tpus.get_slice(name)
