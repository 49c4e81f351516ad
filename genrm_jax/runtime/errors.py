"""UserError, the exception for mistakes of the user, and how a command exits with it."""

import contextlib
import sys
from collections.abc import Callable, Iterator


class UserError(Exception):
  """Bad input: a wrong path, a malformed line, an unknown name, a workdir of another config.

  The message names the thing, the place and the remedy. Commands print it without a traceback and exit with code 1.
  """


@contextlib.contextmanager
def one_message(leave: Callable[[int], None] = sys.exit) -> Iterator[None]:
  """Turns a UserError into one line on stderr and exit code 1, by `leave(1)`."""
  try:
    yield
  except (UserError, ImportError) as e:
    if isinstance(e, ImportError) and "gcsfs" not in str(e):
      raise
    print(f"error: {e if isinstance(e, UserError) else _NO_GCS}", file=sys.stderr)
    leave(1)


_NO_GCS = "gs:// paths need an optional package: pip install 'genrm-jax[gcs]'"
