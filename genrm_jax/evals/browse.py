"""Candidates to browse on the report page: which ones to show, and how many fit."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from genrm_jax.evals.metrics import THRESHOLD, align_scores
from genrm_jax.evals.selection import make_bank
from genrm_jax.records import Candidate, Problem, Score, Vote

FOOLED, MISSED, TYPICAL = "fooled", "missed", "typical"
MAX_CHARS = 6_000  # shown of one text: a degenerate solution may be megabytes of digits
_MOST_TYPICAL = 6  # per label


@dataclasses.dataclass(frozen=True)
class BrowseEntry:
  """A scored candidate to look at, with its votes in the order they were sampled."""

  kind: str  # FOOLED: incorrect, but scored above the threshold; MISSED: correct, but not above it; TYPICAL
  verifier: str
  problem: Problem
  candidate: Candidate
  value: float
  is_best: bool  # no candidate of the same problem scores higher
  votes: tuple[Vote, ...]  # the first few, shown in full
  other_votes: tuple[Vote, ...]  # the rest, of which only state and number are shown

  @property
  def num_votes(self) -> int:
    return len(self.votes) + len(self.other_votes)


def pick_entries(
  problems: Sequence[Problem],
  candidates: Sequence[Candidate],
  scores: Mapping[str, Sequence[Score]],
  *,
  likelihoods: frozenset[str] = frozenset(),
  per_kind: int = 50,
  votes_shown: int = 3,
) -> list[BrowseEntry]:
  """Picks each verifier's worst mistakes of both kinds and some typical candidates, at most one per problem and list.

  Typical candidates are the correct and the incorrect ones whose scores are closest to the median of their label. The
  threshold is 0.5; for the verifiers in `likelihoods`, whose score is no probability, it is their median score.
  """
  bank = make_bank(problems, candidates)
  entries = []
  for verifier, verifier_scores in scores.items():
    values = align_scores(bank, verifier, verifier_scores).values
    votes_of = {(score.problem_id, score.candidate_index): score.votes for score in verifier_scores}
    scored = ~np.isnan(values) & bank.mask
    if not scored.any():
      continue
    threshold = np.median(values[scored]) if verifier in likelihoods else THRESHOLD
    best = np.where(scored, values, -np.inf).max(axis=1)
    correct, incorrect = scored & bank.correct, scored & ~bank.correct
    picks = [(FOOLED, place) for place in _cheapest(incorrect & (values > threshold), -values, per_kind)]
    picks += [(MISSED, place) for place in _cheapest(correct & (values <= threshold), values, per_kind)]
    for label in (correct, incorrect):
      if label.any():
        distance = np.abs(values - np.median(values[label]))
        picks += [(TYPICAL, place) for place in _cheapest(label, distance, min(-(-per_kind // 2), _MOST_TYPICAL))]
    for kind, (row, column) in picks:
      candidate, value = bank.candidates[row][column], float(values[row, column])
      votes = votes_of[candidate.problem_id, candidate.index]
      shown, others = votes[:votes_shown], votes[votes_shown:]
      is_best = bool(value == best[row])
      entries.append(BrowseEntry(kind, verifier, bank.problems[row], candidate, value, is_best, shown, others))
  return entries


def _cheapest(mask_PC: np.ndarray, costs_PC: np.ndarray, count: int) -> list[tuple[int, int]]:
  """The `count` masked places with the lowest cost, at most one per row; ties go to the lower row."""
  costs = np.where(mask_PC, costs_PC, np.inf)
  columns = costs.argmin(axis=1)
  best = costs.min(axis=1)
  rows = [int(row) for row in np.argsort(best, kind="stable")[:count] if np.isfinite(best[row])]
  return [(row, int(columns[row])) for row in rows]


def most_telling(entries: Sequence[BrowseEntry], sizes: Sequence[int], room: int) -> list[int]:
  """Indices of the entries that fit: the first of every verifier and kind, then the second of each, and so on.

  Args:
    entries: the most telling first within each verifier and kind.
    sizes: space that each entry takes.
    room: total space.
  """
  seen: collections.Counter[tuple[str, str]] = collections.Counter()
  ranks = []
  for entry in entries:
    ranks.append(seen[entry.verifier, entry.kind])
    seen[entry.verifier, entry.kind] += 1
  kept: list[int] = []
  for index in sorted(range(len(entries)), key=ranks.__getitem__):
    room -= sizes[index]
    if room < 0:
      break
    kept.append(index)
  return sorted(kept)


def clip(text: str) -> str:
  """The text, or its beginning and the number of characters left out if it is longer than `MAX_CHARS`."""
  return text if len(text) <= MAX_CHARS else f"{text[:MAX_CHARS]} … ({len(text) - MAX_CHARS:,} more characters)"
