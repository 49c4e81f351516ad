"""Training, prefill, decode and scores agree on every split of 1, 2, 4 and 8 devices."""

import math

import device_splits
import pytest

# All splits of one model, one of the other; `python tests/helpers/device_splits.py` runs all.
_CASES = [
  pytest.param(model, split, id=f"{model}-{'x'.join(map(str, split))}")
  for model in device_splits.MODELS
  for split in device_splits.SPLITS[1:]
  if model == "one kv head" or split == (2, 2, 2)
]


@pytest.mark.one_python
@pytest.mark.parametrize(("model", "split"), _CASES)
def test_numbers_do_not_depend_on_the_split(model, split):
  assert device_splits.too_far(device_splits.differences(model, split)) == {}


def test_all_splits_are_covered():
  assert len(device_splits.SPLITS) == 20 == len(set(device_splits.SPLITS))
  assert {math.prod(split) for split in device_splits.SPLITS} == {1, 2, 4, 8}
