"""The process that compares answers with math-verify: one line of JSON in, one word out.

equality.py starts it by its path, so that it imports neither this package nor what that imports.
"""

import contextlib
import functools
import json
import logging
import os
import signal
import sys
from typing import Any

_MEMORY_BYTES = 1 << 30  # of address space; sympy with its tables takes a quarter of it


def main(seconds: float) -> None:
  """Answers until its input ends.

  Args:
    seconds: of CPU time that a comparison may take; this process ends when they are over (SIGPROF). What takes too
      long is so the same on a busy machine, and this process ends where its caller has died too.
  """
  replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
  os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no reply
  _limit_memory()
  logging.disable()  # it would warn that its own time limit, an alarm between two lines of Python, is not used
  import math_verify  # noqa: F401  (a second or more: it is not to count as a comparison)

  print("ready", file=replies, flush=True)
  for line in sys.stdin:
    target, answer = json.loads(line)
    signal.setitimer(signal.ITIMER_PROF, seconds)  # nothing handles the signal: no code can keep it waiting
    verdict = compare(target, answer)
    signal.setitimer(signal.ITIMER_PROF, 0)
    print(verdict, file=replies, flush=True)


def compare(target: str, answer: str) -> str:
  """ "equal", "different", or "unreadable" where math-verify makes no expression of one of them."""
  import math_verify

  left, right = _read(target), _read(answer)
  if not left or not right:
    return "unreadable"
  try:
    return "equal" if math_verify.verify(left, right, timeout_seconds=None, raise_on_error=True) else "different"
  except MemoryError:
    raise
  except Exception:  # whatever sympy raises for expressions that it cannot compare
    return "unreadable"


@functools.lru_cache(maxsize=1000)  # a problem's answer is compared with many
def _read(answer: str) -> list[Any]:
  """What the answer says to math-verify; empty where nothing."""
  from math_verify import LatexExtractionConfig, parse

  try:
    return parse(f"${answer}$", [LatexExtractionConfig()], "no_fallback", parsing_timeout=None, raise_on_error=True)
  except MemoryError:
    raise
  except Exception:  # its grammar and sympy raise of every kind
    return []


def _limit_memory() -> None:
  with contextlib.suppress(ImportError, ValueError, OSError):  # not everywhere can it be limited
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))


if __name__ == "__main__":
  main(float(sys.argv[1]))
