"""Counts of the server as Prometheus text."""

import bisect
import collections
import itertools
import resource
import sys

from genrm_jax.serve.scorer import Scorer

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


class Metrics:
  """Requests by path and status, and how long they took. Paths must be few: those of routes."""

  def __init__(self) -> None:
    self._requests: collections.Counter[tuple[str, int]] = collections.Counter()
    self._buckets = [0] * (len(_SECONDS) + 1)
    self._seconds = 0.0

  def add(self, path: str, status: int, seconds: float) -> None:
    self._requests[path, status] += 1
    self._buckets[bisect.bisect_left(_SECONDS, seconds)] += 1
    self._seconds += seconds

  def text(self, scorer: Scorer) -> str:
    """All metrics, in Prometheus' text format."""
    lines = _family("requests_total", "counter", "Requests by path and status.")
    lines += [
      f'genrm_requests_total{{path="{path}",status="{status}"}} {count}'
      for (path, status), count in sorted(self._requests.items())
    ]
    lines += _family("request_seconds", "histogram", "Seconds until the reply.")
    counts = list(itertools.accumulate(self._buckets))
    limits = [*map(str, _SECONDS), "+Inf"]
    lines += [f'genrm_request_seconds_bucket{{le="{le}"}} {n}' for le, n in zip(limits, counts, strict=True)]
    lines += [f"genrm_request_seconds_sum {self._seconds:.6f}", f"genrm_request_seconds_count {counts[-1]}"]
    lines += _family("votes_total", "counter", "Votes by state.")
    lines += [f'genrm_votes_total{{state="{s}"}} {n}' for s, n in sorted(scorer.num_votes_by_state.copy().items())]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    for name, kind, about, value in (
      ("scored_total", "counter", "Distinct solutions scored.", scorer.num_scored),
      ("sampled_tokens_total", "counter", "Tokens of rationales.", scorer.num_tokens),
      ("waiting", "gauge", "Solutions in the queue.", scorer.num_waiting),
      ("running", "gauge", "Solutions being scored.", scorer.num_running),
      ("peak_memory_bytes", "gauge", "Largest resident memory of the process so far.", peak),
    ):
      lines += [*_family(name, kind, about), f"genrm_{name} {value}"]
    return "\n".join([*lines, ""])


def _family(name: str, kind: str, about: str) -> list[str]:
  return [f"# HELP genrm_{name} {about}", f"# TYPE genrm_{name} {kind}"]
