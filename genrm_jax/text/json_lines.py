"""Reads lines of JSON files that users write."""

import json
from typing import Any

from genrm_jax.runtime.errors import UserError


def json_object(line: bytes, place: str) -> dict[str, Any]:
  """The JSON object in a line. Raises UserError, naming `place` ("path:line"), if there is none."""
  try:
    row = json.loads(line)
  except (ValueError, RecursionError) as e:
    raise UserError(f"{place}: not JSON ({e}); correct or remove the line") from e
  if not isinstance(row, dict):
    raise UserError(f"{place}: expected a JSON object, found {shown(row)}; each line is one object in braces")
  return row


def shown(value: Any) -> str:
  """A JSON value for a message, at most 60 characters."""
  text = json.dumps(value)
  return text if len(text) <= 60 else f"{text[:57]}..."
