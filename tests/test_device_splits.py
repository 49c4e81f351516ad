"""Training, prefill, decode and scores agree on meshes that use each axis alone, each pair of axes, and all three."""

import math

import device_splits
import pytest

# Of all splits, which `python tests/helpers/device_splits.py` runs. Axes of both models are split: kv heads are
# replicated in one of them and sharded in the other.
CHOSEN = {
  "one kv head": [(1, 1, 8), (2, 2, 1), (1, 2, 4)],
  "grouped heads": [(4, 1, 1), (1, 8, 1), (2, 1, 4), (2, 2, 2)],
}


@pytest.mark.one_python
@pytest.mark.parametrize(("model", "split"), [(model, split) for model in CHOSEN for split in CHOSEN[model]], ids=str)
def test_numbers_do_not_depend_on_the_split(model, split):
  assert device_splits.too_far(device_splits.differences(model, split)) == {}


def test_the_chosen_splits_use_every_combination_of_axes():
  chosen = {split for splits in CHOSEN.values() for split in splits}
  assert len({tuple(size > 1 for size in split) for split in chosen}) == 7
  assert chosen < set(device_splits.SPLITS)
  assert len(device_splits.SPLITS) == 20 == len(set(device_splits.SPLITS))
  assert {math.prod(split) for split in device_splits.SPLITS} == {1, 2, 4, 8}
