"""SIGTERM (preemption) and Ctrl-C: training saves between two steps, everything else ends at once.

The program ends with code 128 + the signal's number, 143 or 130, and the same command resumes. A second Ctrl-C ends the
process at once, also while it saves.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jax.experimental import multihost_utils

from genrm_jax.runtime import distributed
from genrm_jax.runtime.errors import Interrupted, Terminated
from genrm_jax.runtime.progress import say


@contextlib.contextmanager
def handled() -> Iterator[None]:
  """For a command: a signal raises Terminated or Interrupted wherever the program is, except inside `watch`.

  With several processes SIGTERM keeps its default action outside `watch`. The process may be waiting for others, where
  Python would not get to a handler.
  """
  received = []

  def handle(number: int) -> None:
    received.append(number)
    if len(received) == 1:
      raise _exception(number)

  numbers = [signal.SIGINT] if distributed.num_processes() > 1 else [signal.SIGINT, signal.SIGTERM]
  with _handlers(numbers, handle):
    yield
  if received:  # and some code has swallowed the exception
    raise _exception(received[0])


@contextlib.contextmanager
def watch(message: Callable[[str], str]) -> Iterator[Callable[[int], bool]]:
  """Yields `should_stop(step)`: whether to save and leave the block after this step.

  Within the block a signal has no other effect. If one came, at any moment of the block, then at its end
  `message("SIGTERM" or "Ctrl-C")` is printed and Terminated or Interrupted is raised. With several processes, a signal
  to any of them is enough; `should_stop`, to be called by all of them after every step, turns true at the same step on
  all. Outside the main thread, which alone receives signals, it stays false.
  """
  received: set[int] = set()
  several, is_stopped = distributed.num_processes() > 1, False

  def should_stop(step: int) -> bool:
    nonlocal is_stopped
    is_stopped = multihost_utils.reached_preemption_sync_point(step) if several else bool(received)
    return is_stopped

  def handle(number: int) -> None:
    received.add(number)
    notify()

  with distributed.deferred_sigterm() if several else contextlib.nullcontext(lambda: None) as notify:
    in_main = threading.current_thread() is threading.main_thread()
    with _handlers([signal.SIGINT, signal.SIGTERM] if in_main else [], handle):
      yield should_stop
      if several:
        received = set().union(*distributed.exchange(sorted(received)))
  if received or is_stopped:
    error = _exception(min(received, default=signal.SIGTERM))
    say(message(error.cause))
    error.is_told = True
    raise error


def _exception(number: int) -> Interrupted | Terminated:
  return Interrupted() if number == signal.SIGINT else Terminated()


@contextlib.contextmanager
def _handlers(numbers: Sequence[int], handle: Callable[[int], None]) -> Iterator[None]:
  """Within, the signals are handled by `handle`. A Ctrl-C after the first of them ends the process."""

  def act(number: int, frame: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    handle(number)

  previous = {number: signal.signal(number, act) for number in numbers}
  try:
    yield
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)
