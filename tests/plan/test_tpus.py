import re

import pytest

from experiments.plan import tpus
from genrm_jax.runtime.errors import UserError


def test_every_slice_that_is_offered_has_a_name_from_which_it_is_found_again():
  for chip in tpus.KINDS.values():
    slices = [tpus.get_slice(f"{chip.name}:{shape}") for shape in chip.slices]
    assert [s.name for s in slices] == [f"{chip.name}:{shape}" for shape in chip.slices]
    sizes = [s.num_chips for s in slices]
    assert sizes == sorted(set(sizes)), "from the smallest"


def test_a_slice_counts_its_chips_and_hosts():
  pod = tpus.get_slice("v5p:2x2x4")
  assert (pod.num_chips, pod.num_hosts) == (16, 4)
  assert tpus.get_slice("v5e:1x1").num_hosts == 1


def test_a_chip_receives_over_the_links_that_its_slice_uses():
  # A quarter of what a v5e sends and receives over four links goes in or out on one.
  assert tpus.get_slice("v5e:1x1").receive_bandwidth == 0
  assert tpus.get_slice("v5e:2x2").receive_bandwidth == pytest.approx(2 * 50e9)
  assert tpus.get_slice("v5e:4x4").receive_bandwidth == pytest.approx(4 * 50e9)
  assert tpus.get_slice("v5p:4x4x4").receive_bandwidth == pytest.approx(600e9)


@pytest.mark.parametrize(
  ("name", "told"),
  [
    ("v7x:2x2", "unknown topology 'v7x:2x2'; it is KIND:SHAPE, from v5e:1x1 to v5e:16x16"),
    ("2x2", "unknown topology '2x2'"),
    ("v5e:2x2x2", "topology 'v5e:2x2x2': the shape of a v5e is one such as 1x1, 2x2"),
    ("v5p:2x2", "topology 'v5p:2x2': the shape of a v5p is one such as 2x2x1"),
    ("v5e:0x2", "topology 'v5e:0x2'"),
    ("v5e", "topology 'v5e'"),
  ],
)
def test_a_slice_that_cannot_be_is_named(name, told):
  with pytest.raises(UserError, match=re.escape(told)):
    tpus.get_slice(name)
