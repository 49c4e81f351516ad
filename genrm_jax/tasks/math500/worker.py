"""The subprocess that compares answers with math-verify: one line of JSON in, one word out.

equality.py starts it by its path, so that it does not import this package and its dependencies.
"""

import contextlib
import functools
import json
import logging
import os
import signal
import sys
from typing import Any

_MEMORY_BYTES = 1 << 30  # of address space; sympy and its tables take a quarter of it


def main(seconds: float) -> None:
  """Answers requests until its input ends.

  Args:
    seconds: CPU time per comparison, after which SIGPROF ends this process. CPU time rather than wall time makes the
      outcome independent of the load, and ends a comparison whose caller has died.
  """
  replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
  os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries may print; only replies go to the pipe
  _limit_memory()
  logging.disable()  # math-verify would warn that its own time limit is not used
  import math_verify  # noqa: F401  (takes a second or more, which must not count as a comparison)

  print("ready", file=replies, flush=True)
  for line in sys.stdin:
    target, answer = json.loads(line)
    signal.setitimer(signal.ITIMER_PROF, seconds)  # unhandled, so that no code can delay it
    outcome = compare(target, answer)
    signal.setitimer(signal.ITIMER_PROF, 0)
    print(outcome, file=replies, flush=True)


def compare(target: str, answer: str) -> str:
  """Returns "equal", "different", or "unreadable" where math-verify cannot parse one of them."""
  import math_verify

  left, right = _read(target), _read(answer)
  if not left or not right:
    return "unreadable"
  try:
    return "equal" if math_verify.verify(left, right, timeout_seconds=None, raise_on_error=True) else "different"
  except MemoryError:
    raise
  except Exception:  # sympy raises anything for expressions that it cannot compare
    return "unreadable"


@functools.lru_cache(maxsize=1000)  # the right answer is compared with many
def _read(answer: str) -> list[Any]:
  """The expressions that math-verify finds in an answer; empty where there are none."""
  from math_verify import LatexExtractionConfig, parse

  try:
    return parse(f"${answer}$", [LatexExtractionConfig()], "no_fallback", parsing_timeout=None, raise_on_error=True)
  except MemoryError:
    raise
  except Exception:  # its grammar and sympy raise anything
    return []


def _limit_memory() -> None:
  with contextlib.suppress(ImportError, ValueError, OSError):  # not every platform supports limits
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))


if __name__ == "__main__":
  main(float(sys.argv[1]))
