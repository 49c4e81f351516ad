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
    equal = math_verify.verify(left, right, timeout_seconds=None, raise_on_error=True)
    if equal and "%" not in target + answer and len(left) == len(right) == 1:
      equal = not _numbers_differ(left[0], right[0])
    return "equal" if equal else "different"
  except MemoryError:
    raise
  except Exception:  # sympy raises anything for expressions that it cannot compare
    return "unreadable"


def _numbers_differ(left: Any, right: Any) -> bool:
  """Whether the numbers in two expressions differ for certain; the library rounds them to six decimals.

  Exact numbers must be the same; a decimal may be rounded, and must agree in four digits.
  """
  import sympy

  left, right = (e.rhs if isinstance(e, sympy.Eq) else e for e in (left, right))
  if isinstance(left, sympy.Expr) and isinstance(right, sympy.Expr):
    difference = left - right
    if left == right or not difference.is_number or not difference.is_finite:
      return False
    numbers = left.is_number and right.is_number
    largest = max(abs(sympy.N(e, 50)) for e in (left, right)) if numbers else 1
    is_exact = not difference.has(sympy.Float)
    return bool(abs(sympy.N(difference, 50)) > largest * sympy.Rational(1, 10 ** (30 if is_exact else 4)))
  left_parts, right_parts = _parts(left), _parts(right)
  if not left_parts or len(left_parts) != len(right_parts):
    return False
  if isinstance(left, sympy.FiniteSet) or isinstance(right, sympy.FiniteSet):
    if not all(part.is_number and part.is_real for part in (*left_parts, *right_parts)):
      return False
    left_parts, right_parts = sorted(left_parts), sorted(right_parts)
  return any(map(_numbers_differ, left_parts, right_parts))


def _parts(expression: Any) -> list[Any]:
  """The coordinates, elements, entries or ends of an expression, empty if it has none."""
  import sympy

  if isinstance(expression, sympy.Interval):
    return [expression.start, expression.end]
  if isinstance(expression, (sympy.Tuple, sympy.FiniteSet)):
    return list(expression.args)
  return list(expression) if isinstance(expression, sympy.MatrixBase) else []


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
