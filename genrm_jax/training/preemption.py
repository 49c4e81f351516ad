"""Preemption: on SIGTERM, training saves between two steps and exits."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

from jax.experimental import multihost_utils

from genrm_jax.runtime import distributed

EXIT_CODE = 128 + signal.SIGTERM


@contextlib.contextmanager
def watch() -> Iterator[Callable[[int], bool]]:
  """Yields `should_stop(step)`: whether to save and exit after this step.

  Inside the block SIGTERM has no other effect. With several processes, a SIGTERM to any of them is enough, and
  `should_stop`, to be called by all of them after every step, turns true at the same step on all.
  """
  if distributed.num_processes() > 1:
    with distributed.deferred_sigterm():
      yield multihost_utils.reached_preemption_sync_point
    return
  if threading.current_thread() is not threading.main_thread():  # only the main thread may set signal handlers
    yield lambda step: False
    return
  received = threading.Event()
  previous = signal.signal(signal.SIGTERM, lambda number, frame: received.set())
  try:
    yield lambda step: received.is_set()
  finally:
    signal.signal(signal.SIGTERM, previous)
