"""The one exception that stands for a user's mistake, and the way in which a command ends with it."""

import contextlib
import sys
from collections.abc import Callable, Iterator


class UserError(Exception):
  """Bad input: a wrong path, a malformed line, an unknown name, a run made by another config.

  The message names the thing, the place and the remedy. Commands print it without a traceback and exit with 1.
  """


@contextlib.contextmanager
def one_message(leave: Callable[[int], None] = sys.exit) -> Iterator[None]:
  """Ends the command with a UserError's message and exit code 1, by `leave(1)`."""
  try:
    yield
  except (UserError, ImportError) as e:
    if isinstance(e, ImportError) and "gcsfs" not in str(e):
      raise
    print(f"error: {e if isinstance(e, UserError) else _NO_GCS}", file=sys.stderr)
    leave(1)


_NO_GCS = "paths on gs:// need a further package: pip install 'genrm-jax[gcs]'"
