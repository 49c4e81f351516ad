"""Something done every few seconds by a thread, which can also end the block that it accompanies."""

import contextlib
import ctypes
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from genrm_jax.runtime import distributed


@contextlib.contextmanager
def every(seconds: float, beat: Callable[[], type[BaseException] | None], last: Callable[[], None]) -> Iterator[None]:
  """Calls `beat` every `seconds` seconds while the block runs.

  Args:
    seconds: between two calls.
    beat: returns an exception to be raised in the block, or None.
    last: called when SIGTERM is about to end the process. The process still ends at once, even within a long
      computation of the main thread, and not while a training defers SIGTERM.
  """
  holder, (received, sent) = threading.get_ident(), socket.socketpair()

  def on_sigterm(number: int, frame: Any) -> None:
    """Leaves it to the thread, to which the interpreter sends the number of the signal."""

  def run() -> None:
    next_beat = time.monotonic() + seconds
    while True:
      received.settimeout(max(0.001, next_beat - time.monotonic()))
      try:
        signals = received.recv(64)
      except TimeoutError:
        if error := beat():
          ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(holder), ctypes.py_object(error))
        next_beat = time.monotonic() + seconds
        continue
      if not signals:  # the block has ended
        return
      if signal.SIGTERM in signals and signal.getsignal(signal.SIGTERM) is on_sigterm:
        last()
        distributed.set_sigterm_handler(None)
        os.kill(os.getpid(), signal.SIGTERM)

  sent.setblocking(False)
  thread = threading.Thread(target=run, name="heartbeat", daemon=True)
  thread.start()
  in_main_thread = threading.current_thread() is threading.main_thread()
  handles = in_main_thread and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
  if handles:
    before = signal.set_wakeup_fd(sent.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, on_sigterm)
  try:
    yield
  finally:
    if handles:
      signal.signal(signal.SIGTERM, signal.SIG_DFL)
      signal.set_wakeup_fd(before)
    sent.close()
    thread.join()
    received.close()
