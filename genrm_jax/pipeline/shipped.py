"""The trained adapters that come with the package: one folder each, with card, log and notice."""

import os
import pathlib

from genrm_jax.runtime.errors import UserError

FOLDER = pathlib.Path(__file__).parent.parent / "shipped"
GSM8K = "gsm8k-gemma3-270m"


def shipped_names() -> list[str]:
  """The names of the trained adapters that come with the package."""
  return sorted(manifest.parent.name for manifest in FOLDER.glob("*/manifest"))


def resolve(path: str | os.PathLike[str]) -> str | os.PathLike[str]:
  """The folder of the adapters of that name; a path is returned as it is.

  Raises:
    UserError: neither a path that exists nor a name.
  """
  text = os.fspath(path)
  if os.sep in text or pathlib.Path(text).expanduser().exists():
    return path
  if text not in shipped_names():
    raise UserError(
      f"{text}: no such folder here, and no verifier of that name comes with genrm-jax; these do: "
      f"{', '.join(shipped_names())}"
    )
  return FOLDER / text
