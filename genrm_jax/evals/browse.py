"""Candidates to look at, one by one: which are picked, and how many of them a page has room for."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from genrm_jax.evals.calibration import LIKELIHOODS
from genrm_jax.evals.metrics import THRESHOLD, align_scores
from genrm_jax.evals.selection import make_bank
from genrm_jax.records import Candidate, Problem, Score, Vote

FOOLED, MISSED, TYPICAL = "fooled", "missed", "typical"
MAX_CHARS = 6_000  # of one text on the page: a solution may be megabytes of digits
_MOST_TYPICAL = 6  # right ones, and as many wrong ones


@dataclasses.dataclass(frozen=True)
class Example:
  """A scored candidate to look at, with its votes in the order they were sampled."""

  kind: str  # FOOLED: wrong but scored above the threshold; MISSED: right but not above it; TYPICAL
  verifier: str
  problem: Problem
  candidate: Candidate
  value: float
  is_best: bool  # no candidate of its pool has a higher score
  votes: tuple[Vote, ...]  # to be read: the first few
  other_votes: tuple[Vote, ...]  # of these, state and number only

  @property
  def num_votes(self) -> int:
    return len(self.votes) + len(self.other_votes)


def pick_examples(
  problems: Sequence[Problem],
  candidates: Sequence[Candidate],
  scores: Mapping[str, Sequence[Score]],
  *,
  per_kind: int = 50,
  votes_shown: int = 3,
) -> list[Example]:
  """For each verifier its worst mistakes of both kinds and some typical candidates, each of another problem.

  Typical are the right and the wrong candidates whose scores are closest to the median of their own label. A score that
  is no probability has no threshold of its own: its median stands in.
  """
  bank = make_bank(problems, candidates)
  examples = []
  for verifier, listed in scores.items():
    values = align_scores(bank, verifier, listed).values
    votes = {(score.problem_id, score.candidate_index): score.votes for score in listed}
    scored = ~np.isnan(values) & bank.mask
    if not scored.any():
      continue
    threshold = np.median(values[scored]) if verifier in LIKELIHOODS else THRESHOLD
    best = np.where(scored, values, -np.inf).max(axis=1)
    right, wrong = scored & bank.correct, scored & ~bank.correct
    picks = [(FOOLED, place) for place in _cheapest(wrong & (values > threshold), -values, per_kind)]
    picks += [(MISSED, place) for place in _cheapest(right & (values <= threshold), values, per_kind)]
    for side in (right, wrong):
      if side.any():
        off = np.abs(values - np.median(values[side]))
        picks += [(TYPICAL, place) for place in _cheapest(side, off, min(-(-per_kind // 2), _MOST_TYPICAL))]
    for kind, (row, column) in picks:
      problem, candidate = bank.problems[row], bank.candidates[row][column]
      value, cast = float(values[row, column]), votes[candidate.problem_id, candidate.index]
      told = problem, candidate, value, value == best[row], cast[:votes_shown], cast[votes_shown:]
      examples.append(Example(kind, verifier, *told))
  return examples


def _cheapest(among_PC: np.ndarray, costs_PC: np.ndarray, count: int) -> list[tuple[int, int]]:
  """The `count` places of a mask with the lowest cost, at most one a row; ties in order of place."""
  costs = np.where(among_PC, costs_PC, np.inf)
  columns = costs.argmin(axis=1)
  best = costs.min(axis=1)
  rows = [int(row) for row in np.argsort(best, kind="stable")[:count] if np.isfinite(best[row])]
  return [(row, int(columns[row])) for row in rows]


def most_telling(examples: Sequence[Example], sizes: Sequence[int], room: int) -> list[int]:
  """The examples that fit, by index: the first of every verifier and kind, then the second, and so on.

  Args:
    examples: those of one verifier and kind in order, the most telling first.
    sizes: the room that each takes.
    room: for all of them together.
  """
  seen: collections.Counter[tuple[str, str]] = collections.Counter()
  ranks = []
  for example in examples:
    ranks.append(seen[example.verifier, example.kind])
    seen[example.verifier, example.kind] += 1
  kept: list[int] = []
  for index in sorted(range(len(examples)), key=ranks.__getitem__):
    room -= sizes[index]
    if room < 0:
      break
    kept.append(index)
  return sorted(kept)


def clip(text: str) -> str:
  """The beginning of a text that is too long to be shown, and how much is left out."""
  return text if len(text) <= MAX_CHARS else f"{text[:MAX_CHARS]} … ({len(text) - MAX_CHARS:,} more characters)"
