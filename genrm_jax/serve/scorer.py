"""The queue of the server, and the one thread that owns JAX."""

import collections
import concurrent.futures
import dataclasses
import sys
import threading
import traceback
from collections.abc import Callable, Sequence

from genrm_jax.pipeline.trained import TrainedVerifier
from genrm_jax.records import Vote
from genrm_jax.serve.batches import Ask, Batches, asked, make_batches
from genrm_jax.verifiers import scoring

_KEPT_RESULTS = 1024  # so that a client that asks again, after its own deadline, is answered at once


class Full(Exception):
  """The queue has no room."""


@dataclasses.dataclass(frozen=True)
class Result:
  """Votes, the score (None if no vote could be read), and the length of the prompt in tokens."""

  votes: tuple[Vote, ...]
  value: float | None
  num_prompt_tokens: int


@dataclasses.dataclass(eq=False)
class Job:
  """An ask, how many requests wait for it, and its result.

  The future ends in a `Result`, a UserError (a text cannot be encoded) or another exception (a defect).
  """

  ask: Ask
  future: concurrent.futures.Future[Result] = dataclasses.field(default_factory=concurrent.futures.Future)
  num_waiting: int = 0
  num_prompt_tokens: int = 0

  def __post_init__(self):
    self.future.set_running_or_notify_cancel()  # one request that goes away cancels nothing for the others


class Scorer:
  """Scores asks of many requests in one thread.

  Equal asks share a job, and the latest results are kept. A job that no request waits for any more is dropped unless
  it has begun. A failure inside JAX fails the jobs that had begun; the thread goes on with a new batch.

  Attributes:
    num_votes_by_state: votes cast so far.
    num_tokens: sampled so far.
    num_scored: jobs finished so far.
  """

  def __init__(
    self, trained: TrainedVerifier, max_waiting: int, make: Callable[[TrainedVerifier], Batches] = make_batches
  ):
    """`max_waiting`: asks in the queue at most."""
    self._trained, self._max_waiting, self._make = trained, max_waiting, make
    self._changed = threading.Condition()
    self._waiting: collections.OrderedDict[Ask, Job] = collections.OrderedDict()
    self._running: dict[Ask, Job] = {}
    self._results: collections.OrderedDict[Ask, Result] = collections.OrderedDict()
    self._is_closing = False
    self.num_votes_by_state: collections.Counter[str] = collections.Counter()
    self.num_tokens = self.num_scored = 0
    self._thread = threading.Thread(target=self._run, name="scorer", daemon=True)
    self._thread.start()

  @property
  def num_waiting(self) -> int:
    return len(self._waiting)

  @property
  def num_running(self) -> int:
    return len(self._running)

  @property
  def is_alive(self) -> bool:
    return self._thread.is_alive()

  def submit(self, asks: Sequence[Ask]) -> list[Job]:
    """A job per ask. Hand all of them to `release` in the end. Raises Full, and then adds none."""
    with self._changed:
      missing = {ask for ask in asks if ask not in self._waiting and ask not in self._running}
      missing -= self._results.keys()
      if self._is_closing or len(self._waiting) + len(missing) > self._max_waiting:
        raise Full
      jobs = [self._job(ask) for ask in asks]
      for job in jobs:
        job.num_waiting += 1
      self._changed.notify()
      return jobs

  def release(self, jobs: Sequence[Job]) -> None:
    """Says that a request no longer waits for its jobs."""
    with self._changed:
      for job in jobs:
        job.num_waiting -= 1
        if not job.num_waiting and self._waiting.get(job.ask) is job:
          del self._waiting[job.ask]

  def close(self) -> None:
    """Finishes what waits and runs, then ends the thread."""
    with self._changed:
      self._is_closing = True
      self._changed.notify()
    self._thread.join()

  def _job(self, ask: Ask) -> Job:
    if ask in self._results:
      self._results.move_to_end(ask)
      job = Job(ask)
      job.future.set_result(self._results[ask])
      return job
    if ask in self._running:
      return self._running[ask]
    return self._waiting.setdefault(ask, Job(ask))

  def _run(self) -> None:
    batches = None
    while self._has_work(batches):
      try:
        batches = batches or self._make(self._trained)
        for job in self._next_jobs(batches.room):
          self._begin(job, batches)
        for ask, votes in batches.advance() if batches.is_busy else ():
          self._finish(self._running[ask], votes)
      except Exception as e:
        traceback.print_exc(file=sys.stderr)
        if batches is None:  # it will fail for the others too
          self._next_jobs(self._max_waiting)
        for job in list(self._running.values()):
          self._end(job, e)
        batches = None

  def _has_work(self, batches: Batches | None) -> bool:
    """Waits until there is something to do; False to stop."""
    is_busy = batches is not None and batches.is_busy
    with self._changed:
      self._changed.wait_for(lambda: self._waiting or is_busy or self._is_closing)
      return bool(self._waiting) or is_busy

  def _next_jobs(self, number: int) -> list[Job]:
    with self._changed:
      jobs = [self._waiting.popitem(last=False)[1] for _ in range(min(number, len(self._waiting)))]
      self._running |= {job.ask: job for job in jobs}
      return jobs

  def _begin(self, job: Job, batches: Batches) -> None:
    verifier, how = self._trained.verifier, self._trained.how
    try:
      # Not by the tokens asked for: the slots of a session have room for all that it may sample.
      needed = scoring.tokens_needed(verifier, job.ask.pair, how)
    except Exception as e:  # of this text alone: a UserError, or a defect of the user's own verifier
      self._end(job, e)
      return
    job.num_prompt_tokens = needed - (how.sample.max_new_tokens if verifier.samples_rationales else 0)
    if needed > self._trained.engine.max_tokens:
      self._finish(job, scoring.truncated_votes(verifier, asked(self._trained, job.ask)), keep=False)
    else:
      batches.add(job.ask)

  def _finish(self, job: Job, votes: Sequence[Vote], keep: bool = True) -> None:
    result = Result(tuple(votes), self._trained.verifier.value(votes), job.num_prompt_tokens)
    self.num_votes_by_state.update(vote.state for vote in votes)
    self.num_tokens += sum(vote.num_tokens for vote in votes)
    self.num_scored += 1
    self._end(job, result, keep)

  def _end(self, job: Job, outcome: Result | Exception, keep: bool = False) -> None:
    with self._changed:
      del self._running[job.ask]
      if keep and isinstance(outcome, Result):
        self._results[job.ask] = outcome
        if len(self._results) > _KEPT_RESULTS:
          self._results.popitem(last=False)
    if isinstance(outcome, Result):
      job.future.set_result(outcome)
    else:
      job.future.set_exception(outcome)
