"""Selecting one of N candidates: pass@1, Best-of-N, self-consistency with and without weights, and the Oracle.

Every function returns the expected accuracy of each problem, `f64[P]`, ready for intervals over problems and for paired
differences. The expectation is over all subsets of n of the problem's candidates and over random tie breaks. A problem
with fewer than n candidates uses all of them.

Axis letters: P problem, C candidate (padded to the largest pool), A distinct answer, D subset.
"""

import collections
import dataclasses
import itertools
import math
import zlib
from collections.abc import Sequence

import numpy as np

from genrm_jax.records import Candidate, Problem
from genrm_jax.runtime.errors import UserError

# Subsets per problem that majority votes are averaged over, where there are more than that.
# The Monte-Carlo error of the mean over P problems is at most 0.5 / sqrt(512 P): 0.2 percentage points at P = 100.
SUBSET_DRAWS = 512

# Sums of scores that differ by less are ties: the order of summation must not decide.
_TIE = 1e-9


@dataclasses.dataclass(frozen=True, eq=False)
class Bank:
  """The candidates of an evaluation as arrays: one row per problem, columns in order of candidate index."""

  problems: tuple[Problem, ...]
  candidates: tuple[tuple[Candidate, ...], ...]
  mask: np.ndarray  # bool[P, C]: False in the padding
  correct: np.ndarray  # bool[P, C]: False in the padding
  answers: np.ndarray  # i64[P, C]: index among the problem's distinct answers, -1 for no answer and padding

  @property
  def sizes(self) -> np.ndarray:
    """Number of candidates of each problem, `i64[P]`."""
    return self.mask.sum(axis=1)


def make_bank(problems: Sequence[Problem], candidates: Sequence[Candidate]) -> Bank:
  """Groups candidates by problem.

  Raises:
    UserError: no problems, a problem without candidates, an unknown problem id, or a duplicate id or index.
  """
  if not problems:
    raise UserError("there are no problems to evaluate: the evaluation split is empty")
  pools: dict[str, list[Candidate]] = {problem.id: [] for problem in problems}
  if len(pools) < len(problems):
    duplicate = collections.Counter(problem.id for problem in problems).most_common(1)[0][0]
    raise UserError(f"problem {duplicate!r} occurs twice: problem ids must be unique within a split")
  for candidate in candidates:
    if candidate.problem_id not in pools:
      raise UserError(
        f"candidate {candidate.index} belongs to problem {candidate.problem_id!r}, which is not in this evaluation:"
        " pass only the candidates of this split"
      )
    pools[candidate.problem_id].append(candidate)
  for problem_id, pool in pools.items():
    if not pool:
      raise UserError(f"problem {problem_id!r} has no candidates: generate some or leave the problem out")
    pool.sort(key=lambda candidate: candidate.index)
    for left, right in itertools.pairwise(pool):
      if left.index == right.index:
        raise UserError(f"problem {problem_id!r} has two candidates with index {left.index}")

  shape = (len(problems), max(len(pool) for pool in pools.values()))
  mask, correct, answers = np.zeros(shape, bool), np.zeros(shape, bool), np.full(shape, -1)
  for row, pool in enumerate(pools.values()):
    numbers: dict[str, int] = {}
    for column, candidate in enumerate(pool):
      mask[row, column] = True
      correct[row, column] = candidate.correct
      if candidate.answer is not None:
        answers[row, column] = numbers.setdefault(candidate.answer, len(numbers))
  return Bank(tuple(problems), tuple(tuple(pool) for pool in pools.values()), mask, correct, answers)


def check_n(bank: Bank, n: int) -> None:
  """Raises UserError for an n that exceeds every pool."""
  if not 1 <= n <= bank.mask.shape[1]:
    raise UserError(f"n={n}: n must be between 1 and {bank.mask.shape[1]}, the most candidates of any problem")


def pass_at_1(bank: Bank) -> np.ndarray:
  """Chance that one candidate, picked at random, is correct: `f64[P]`."""
  return bank.correct.sum(axis=1) / bank.sizes


def oracle(bank: Bank, n: int) -> np.ndarray:
  """Chance that n candidates include a correct one (pass@n): 1 - C(incorrect, n) / C(all, n), `f64[P]`."""
  check_n(bank, n)
  sizes = bank.sizes[:, None]
  incorrect = sizes - bank.correct.sum(axis=1)[:, None]
  drawn = np.arange(n)
  # The ratio of binomials, as the product of the chances that each next draw is incorrect too.
  chances = np.clip(incorrect - drawn, 0, None) / np.maximum(sizes - drawn, 1)
  return 1.0 - np.where(drawn < sizes, chances, 1.0).prod(axis=1)


def best_of_n(bank: Bank, values_PC: np.ndarray, n: int) -> np.ndarray:
  """Exact chance that the highest-scored of n candidates is correct (Best-of-N, section 2 of the paper), `f64[P]`.

  Sort a pool of S by score, best first. The candidate of rank i is the best of C(S - 1 - i, n - 1) of the C(S, n)
  subsets, which is its weight. Tied candidates are in random order, so each counts as the average of its tie:

      score    0.9  0.7  0.7  none      S = 4, n = 2
      correct   1    0    1    0
      counts    1   1/2  1/2   0
      weight   3/6  2/6  1/6   0        sum of products: 3/4

  Args:
    bank: the candidates.
    values_PC: scores; NaN (no score) ranks below every number and ties with other NaNs.
    n: number of candidates to choose from.
  """
  check_n(bank, n)
  keys = np.where(np.isnan(values_PC), -np.inf, values_PC)
  order = np.lexsort((-keys, ~bank.mask), axis=1)
  keys, mask = np.take_along_axis(keys, order, 1), np.take_along_axis(bank.mask, order, 1)
  starts = np.ones(keys.shape, bool)
  starts[:, 1:] = (keys[:, 1:] != keys[:, :-1]) | (mask[:, 1:] != mask[:, :-1])
  tie = np.cumsum(starts).reshape(-1) - 1
  accuracy = np.bincount(tie, weights=np.take_along_axis(bank.correct, order, 1).reshape(-1)) / np.bincount(tie)
  return (_rank_weights(bank.sizes, n, keys.shape[1]) * accuracy[tie].reshape(keys.shape)).sum(axis=1)


def _rank_weights(sizes: np.ndarray, n: int, width: int) -> np.ndarray:
  """C(S - 1 - i, n - 1) / C(S, n) for ranks i = 0 .. width - 1, as a running product: `f64[P, width]`."""
  s = sizes[:, None]
  taken = np.minimum(n, s)
  i = np.arange(width - 1)
  steps = np.clip(s - i - taken, 0, None) / np.maximum(s - 1 - i, 1)
  return taken / s * np.cumprod(np.concatenate([np.ones((len(sizes), 1)), steps], axis=1), axis=1)


@dataclasses.dataclass(frozen=True, eq=False)
class Subsets:
  """Subsets of n candidates of each problem, with their weights in an expectation."""

  members: np.ndarray  # bool[P, D, C]
  share: np.ndarray  # f64[P, D]: sums to 1 over D, 0 in the padding


def draw_subsets(bank: Bank, n: int, *, seed: int, draws: int = SUBSET_DRAWS) -> Subsets:
  """All subsets of n of each problem if there are at most `draws` of them, else `draws` random ones.

  Random subsets are a pure function of (seed, problem id), and each subset of n lies within one of n + 1, which keeps
  curves over n smooth.
  """
  check_n(bank, n)
  members_of = [
    _subsets_of(int(size), min(n, int(size)), np.random.default_rng([seed, zlib.crc32(problem.id.encode())]), draws)
    for problem, size in zip(bank.problems, bank.sizes, strict=True)
  ]
  most = max(len(members) for members in members_of)
  members = np.zeros((len(members_of), most, bank.mask.shape[1]), bool)
  share = np.zeros(members.shape[:2])
  for row, subsets in enumerate(members_of):
    members[row, : subsets.shape[0], : subsets.shape[1]] = subsets
    share[row, : subsets.shape[0]] = 1 / subsets.shape[0]
  return Subsets(members, share)


def _subsets_of(size: int, n: int, rng: np.random.Generator, draws: int) -> np.ndarray:
  """Subsets of n out of `size` as membership rows, `bool[D, size]`."""
  if math.comb(size, n) <= draws:
    chosen = np.array(list(itertools.combinations(range(size), n)))
  else:
    chosen = rng.random((draws, size)).argsort(axis=1)[:, :n]
  members = np.zeros((len(chosen), size), bool)
  np.put_along_axis(members, chosen, True, axis=1)
  return members


def self_consistency(
  bank: Bank, subsets: Subsets, values_PC: np.ndarray | None = None, top_scores: int = 0
) -> np.ndarray:
  """Chance that the majority answer is correct, `f64[P]`; with scores, the answer with the largest sum of scores.

  With `top_scores`, only that many of an answer's best scores in the subset count (paper, appendix C); 0: all.

  Answers are the same if their normalised strings are equal. A candidate without an answer does not vote, one without
  a score votes with weight 0, a subset without any answer counts as incorrect, and ties are broken at random. If
  candidates with the chosen answer carry different labels, one of them is picked at random.
  """
  numbers = np.arange(bank.answers.max() + 1)
  has_PCA = (bank.answers[:, :, None] == numbers).astype(float)
  weights = np.ones(bank.mask.shape) if values_PC is None else np.nan_to_num(values_PC, nan=0.0)
  accuracy = np.zeros(len(bank.problems))
  # A few problems at a time: [P, D, A] for all of GSM8K at once would take gigabytes.
  for rows in np.array_split(np.arange(len(accuracy)), math.ceil(len(accuracy) / 32)):
    members, has = subsets.members[rows].astype(float), has_PCA[rows]
    count_PDA = members @ has
    counted = members
    if top_scores and values_PC is not None:
      counted = members * (members @ _before(bank.answers[rows], weights[rows]) < top_scores)
    total = np.where(count_PDA > 0, counted @ (has * weights[rows, :, None]), -np.inf)
    wins = (count_PDA > 0) & (total >= total.max(axis=2, keepdims=True, initial=-np.inf) - _TIE)
    correct = members @ (has * bank.correct[rows, :, None]) / np.maximum(count_PDA, 1)
    picked = (wins * correct).sum(axis=2) / np.maximum(wins.sum(axis=2), 1)
    accuracy[rows] = (picked * subsets.share[rows]).sum(axis=1)
  return accuracy


def _before(answers_PC: np.ndarray, weights_PC: np.ndarray) -> np.ndarray:
  """Whether a candidate has the answer of another and ranks before it by weight, as `f64[P, C, C]`."""
  rank = np.argsort(np.argsort(-weights_PC, axis=1, kind="stable"), axis=1)
  return ((answers_PC[:, :, None] == answers_PC[:, None, :]) & (rank[:, :, None] < rank[:, None, :])).astype(float)
