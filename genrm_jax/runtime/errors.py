"""Exceptions for user errors and for signals, and the exit code of a command that ends with one."""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator


class UserError(Exception):
  """Bad input: a wrong path, a malformed line, an unknown name, a workdir of another config.

  The message names the thing, the place and the remedy. Commands print it without a traceback and exit with code 1.
  """


class Terminated(SystemExit):
  """SIGTERM. `is_told`: whether the user has been told where the program stopped."""

  cause, is_told = "SIGTERM", False

  def __init__(self) -> None:
    super().__init__(128 + signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
  """Ctrl-C, as `Terminated`."""

  cause, is_told = "Ctrl-C", False


@contextlib.contextmanager
def one_message(leave: Callable[[int], None] = sys.exit) -> Iterator[None]:
  """Ends a command: a UserError in one line on stderr with code 1, a signal in one line with 143 or 130, by `leave`."""
  try:
    yield
  except (Terminated, KeyboardInterrupt) as e:
    if not getattr(e, "is_told", False):
      cause = getattr(e, "cause", Interrupted.cause)
      print(f"ended by {cause}; start the same command again to go on", file=sys.stderr, flush=True)
    leave(128 + (signal.SIGTERM if isinstance(e, Terminated) else signal.SIGINT))
  except (UserError, ImportError) as e:
    if isinstance(e, ImportError) and "gcsfs" not in str(e):
      raise
    print(f"error: {e if isinstance(e, UserError) else _NO_GCS}", file=sys.stderr)
    leave(1)


_NO_GCS = "gs:// paths need an optional package: pip install 'genrm-jax[gcs]'"
