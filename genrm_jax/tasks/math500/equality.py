r"""Whether two mathematical answers are the same, within a time limit.

    with MathEqual(seconds=5.0) as equal:
      equal(r"\frac{1}{2}", "0.5")    # True
      equal("2", "9^{9^{9^9}}")       # None, and counted: equal.counts["timed out"] == 1

Identical texts need no library. Other answers are compared by math-verify (Hugging Face), which parses LaTeX into
sympy, in a subprocess (worker.py), since sympy cannot be interrupted reliably otherwise. The subprocess serves many
comparisons; one that times out or crashes is counted, and the next comparison starts a new subprocess.
"""

import collections
import importlib.metadata
import importlib.util
import json
import math
import multiprocessing.connection
import pathlib
import re
import signal
import subprocess
import sys
import time

from genrm_jax.runtime.errors import UserError
from genrm_jax.tasks.math500 import guards

MAX_CHARACTERS = 1000  # longer answers are not compared; the longest of MATH have about 150

# Outcomes of a comparison. Those of FAILED say nothing about the answers.
SAME_TEXT, EQUAL, DIFFERENT, UNREADABLE = "same text", "equal", "different", "unreadable"
TOO_LONG, TIMED_OUT, DIED = FAILED = ("too long", "timed out", "died")

_START_SECONDS = 120.0  # to import sympy, which takes long on a cold disk or a busy machine
_WORKER = pathlib.Path(__file__).with_name("worker.py")
_SPACES = re.compile(guards.SPACE)
_FRAC = re.compile(r"\\[dt]frac(?![a-zA-Z])")
# An argument of one digit without braces: what follows it is no part of the same number.
_ARGUMENTS = re.compile(r"\\([dt]?frac|binom)\s*([0-9])\s+([0-9])|([_^]|\\sqrt\s)\s*([0-9])(?=\s)")
_THOUSANDS = re.compile(r"(?<![0-9.,])([1-9][0-9]{0,2})((?:(?:\\[,;:! ]|~|[ ])[0-9]{3})+)(?![0-9]|\s*/)")
_MIXED = re.compile(rf"(?<![0-9.,/])([0-9]+)(?:{guards.SPACE})+([0-9]+)\s*/\s*([0-9]+)(?![0-9.])")
_BETWEEN_NUMBERS = re.compile(rf"(?<=[0-9])(?:{guards.SPACE})+(?=[0-9])")
_APART = "\N{NO-BREAK SPACE}"


def plain(answer: str) -> str:
  """The answer without formatting: spaces, `$`, a final period, sizes of fractions and brackets.

  For comparison only: `\\pi r` becomes `\\pir`. A space stays between digits, except in thousands: `1 1/2`, not `11/2`.
  """
  apart = _BETWEEN_NUMBERS.sub(_APART, _numerals(answer).replace(_APART, " "))
  kept = _APART.join(_SPACES.sub("", part) for part in apart.split(_APART))
  return _FRAC.sub(r"\\frac", kept).rstrip(".")


def _numerals(answer: str) -> str:
  """The answer with spaced thousands as one number, and arguments of one digit and mixed numbers with braces."""
  answer = _ARGUMENTS.sub(_in_braces, answer)
  answer = _THOUSANDS.sub(lambda m: m[1] + re.sub(r"[^0-9]", "", m[2]), answer)
  return _MIXED.sub(r"\1\\frac{\2}{\3}", answer)


def _in_braces(match: re.Match[str]) -> str:
  command, top, bottom, mark, digit = match.groups()
  return f"\\{command}{{{top}}}{{{bottom}}}" if command else f"{mark}{{{digit}}}"


def check_installed() -> None:
  """Raises UserError where math-verify is not installed."""
  if importlib.util.find_spec("math_verify") is None:
    raise UserError("comparing mathematical answers needs math-verify: pip install 'genrm-jax[math]'")


class MathEqual:
  """Compares answers. A context manager, which ends the subprocess.

  Attributes:
    counts: comparisons by outcome.
  """

  def __init__(self, seconds: float):
    """Limits a comparison to `seconds` of CPU time, and to ten times as many of wall time.

    Raises:
      UserError: the limit is not positive and finite, or math-verify is not installed.
    """
    if not 0 < seconds < math.inf:
      raise UserError(f"the time limit of a comparison must be more than 0 seconds, not {seconds}")
    check_installed()
    self.counts: collections.Counter[str] = collections.Counter()
    self._seconds = seconds
    self._worker: subprocess.Popen[bytes] | None = None

  def __enter__(self) -> "MathEqual":
    return self

  def __exit__(self, *_) -> None:
    self._stop()

  def __call__(self, target: str, answer: str) -> bool | None:
    """Whether `answer` equals `target`, the right one; None where the comparison failed.

    The order matters where one is an equation. Answers that the library cannot parse are equal only as texts.
    """
    outcome = self._compare(target, answer)
    self.counts[outcome] += 1
    return None if outcome in FAILED else outcome in (SAME_TEXT, EQUAL)

  def _compare(self, target: str, answer: str) -> str:
    if max(len(target), len(answer)) > MAX_CHARACTERS:
      return SAME_TEXT if target == answer else TOO_LONG
    if plain(target) == plain(answer):
      return SAME_TEXT
    numerals = _numerals(target), _numerals(answer)
    if any(map(_BETWEEN_NUMBERS.search, numerals)):  # the library would add them
      return UNREADABLE
    worker = self._worker or self._start()
    try:
      _ask(worker, json.dumps(numerals).encode() + b"\n")
      outcome = _reply(worker, 10 * self._seconds)
      return DIFFERENT if outcome == EQUAL and guards.certainly_differ(target, answer) else outcome
    except (TimeoutError, EOFError, OSError) as e:
      self._stop()
      timed_out = isinstance(e, TimeoutError) or worker.returncode == -signal.SIGPROF
      return TIMED_OUT if timed_out else DIED

  def _start(self) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", str(_WORKER), str(self._seconds)]  # -P: it must not import its neighbours
    self._worker = subprocess.Popen(
      command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
    )
    try:
      if _reply(self._worker, _START_SECONDS) != "ready":
        raise RuntimeError("the process that compares answers did not start")
    except (TimeoutError, EOFError) as e:
      self._stop()
      raise UserError(
        f"the process that compares answers did not start ({type(e).__name__}); to see why, run {' '.join(command)}"
      ) from e
    return self._worker

  def _stop(self) -> None:
    if self._worker is None:
      return
    with self._worker as worker:  # closes the pipes and waits
      worker.kill()
    self._worker = None


def _ask(worker: subprocess.Popen[bytes], line: bytes) -> None:
  """Sends a line. It fits into the buffer of a pipe, so this does not block."""
  assert worker.stdin is not None
  worker.stdin.write(line)


def _reply(worker: subprocess.Popen[bytes], seconds: float) -> str:
  """The next line from the process. TimeoutError if none comes in time, EOFError if the process has ended."""
  assert worker.stdout is not None
  end, line = time.monotonic() + seconds, b""
  while not line.endswith(b"\n"):
    if not multiprocessing.connection.wait([worker.stdout.fileno()], max(0.0, end - time.monotonic())):
      raise TimeoutError
    read = worker.stdout.read(100)
    if not read:
      raise EOFError
    line += read
  return line.decode().strip()


def version() -> str:
  """The name and version of the library that compares."""
  return f"math-verify {importlib.metadata.version('math-verify')}"
