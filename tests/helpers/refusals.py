"""Mistakes of users, each of which must end in one `UserError`."""

import re

import pytest

from genrm_jax.runtime.errors import UserError


def refused(*cases):
  """Calls `function(*args)` of each (pattern, function, *args); its UserError must match the pattern."""
  for pattern, function, *args in cases:
    try:
      function(*args)
    except UserError as error:
      assert re.search(pattern, str(error)), (pattern, str(error))
    else:
      pytest.fail(f"not refused: {pattern}")
