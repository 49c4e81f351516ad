"""Training, prefill, decode and scores agree on meshes that use each axis alone, each pair of axes, and all three."""

import device_splits
import pytest

CHOSEN = {  # kv heads are replicated in one model and sharded in the other
  "one kv head": [(1, 1, 8), (2, 2, 1), (1, 2, 2)],
  "grouped heads": [(2, 1, 1), (1, 4, 1), (2, 1, 2), (2, 2, 2)],
}


@pytest.mark.one_python
@pytest.mark.parametrize(("model", "split"), [(model, split) for model in CHOSEN for split in CHOSEN[model]], ids=str)
def test_numbers_do_not_depend_on_the_split(model, split):
  assert device_splits.too_far(device_splits.differences(model, split)) == {}
