"""SIGTERM, by which a machine is taken away: training ends between two steps, saved."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

from jax.experimental import multihost_utils

from genrm_jax.runtime import distributed

EXIT_CODE = 128 + signal.SIGTERM


@contextlib.contextmanager
def watched() -> Iterator[Callable[[int], bool]]:
  """Yields `is_asked(step)`: whether to save and end after this step. Of many processes all say so at the same step.

  Until the block is left SIGTERM does nothing but that. Of many processes it is enough that one is told.
  """
  if distributed.num_processes() > 1:
    with distributed.deferred_sigterm():
      yield multihost_utils.reached_preemption_sync_point
    return
  told = threading.Event()
  if threading.current_thread() is not threading.main_thread():  # which alone may listen
    yield lambda step: False
    return
  before = signal.signal(signal.SIGTERM, lambda number, frame: told.set())
  try:
    yield lambda step: told.is_set()
  finally:
    signal.signal(signal.SIGTERM, before)
