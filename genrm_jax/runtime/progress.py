"""Messages and progress on stderr: a bar on a terminal, occasional lines elsewhere. Only process 0 prints."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

import rich.progress

from genrm_jax.runtime import distributed

_SECONDS_BETWEEN_LINES = 15.0
_SECONDS_WORTH_A_LINE = 2.0  # shorter work ends silently


def say(line: str) -> None:
  """Prints a message to the user."""
  if distributed.is_main():
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def progress(label: str, total: int) -> Iterator[Callable[..., None]]:
  """Yields `advance(n=1, note="")`, which counts `n` finished items of `total`. Prints nothing without a label."""
  if not label:
    yield lambda n=1, note="": None
    return
  if sys.stderr.isatty() and distributed.is_main():
    columns = (
      rich.progress.TextColumn("{task.description:<28}"),
      rich.progress.BarColumn(),
      rich.progress.MofNCompleteColumn(),
      rich.progress.TimeElapsedColumn(),
      rich.progress.TimeRemainingColumn(),
      rich.progress.TextColumn("{task.fields[note]}"),
    )
    with rich.progress.Progress(*columns, console=rich.console.Console(stderr=True)) as bar:
      task = bar.add_task(label, total=total, note="")
      yield lambda n=1, note="": bar.update(task, advance=n, note=note)
    return
  start = last = time.monotonic()
  done = 0

  def advance(n: int = 1, note: str = "") -> None:
    nonlocal done, last
    done += n
    now = time.monotonic()
    if now - last >= _SECONDS_BETWEEN_LINES or (done >= total and now - start >= _SECONDS_WORTH_A_LINE):
      last = now
      seconds_left = (now - start) / max(done, 1) * max(total - done, 0)
      say(f"{label}: {done}/{total}, {now - start:.0f}s elapsed, {seconds_left:.0f}s left {note}")

  yield advance
