"""Metrics of scores: verification accuracy, AUC, calibration, vote coverage, and their intervals over problems.

A `Quantity` keeps the per-problem sums behind a metric, so that one bootstrap serves every metric of a report and
metrics are compared on the same resampled problems.

Axis letters: P problem, C candidate (padded), V vote (padded), G group of votes, M column of sums.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from genrm_jax.evals.selection import Bank
from genrm_jax.records import VOTE_STATES, Score, Vote
from genrm_jax.runtime.errors import UserError

BOOTSTRAP_DRAWS = 10_000
AUC_DRAWS = 1_000  # the AUC over all candidates is not a ratio of sums, so each resample recomputes it
LEVEL = 0.95
THRESHOLD = 0.5  # a candidate is called correct if its score is above
CALIBRATION_BINS = 10

_CHUNK = 250  # resamples held in memory at a time
_NUMBERED = tuple(VOTE_STATES.index(state) for state in ("ok", "forced"))  # states whose p(Yes) counts


@dataclasses.dataclass(frozen=True)
class Interval:
  """A metric and its percentile interval over problems; None where undefined (nothing to count)."""

  value: float | None
  low: float | None
  high: float | None


@dataclasses.dataclass(frozen=True, eq=False)
class Quantity:
  """The average of one or more ratios, each a sum over problems divided by another."""

  parts: tuple[tuple[np.ndarray, np.ndarray], ...]  # (numerators f64[P], denominators f64[P]) of each ratio


def mean(values_P: np.ndarray) -> Quantity:
  """The mean over problems of one value per problem."""
  return Quantity(((values_P, np.ones(len(values_P))),))


def intervals(
  quantities: Mapping[str, Quantity], *, seed: int, draws: int = BOOTSTRAP_DRAWS, level: float = LEVEL
) -> dict[str, Interval]:
  """Percentile bootstrap over problems for many quantities at once, all on the same resamples.

  A paired difference of two methods is the interval of `mean(a - b)`. The interval covers the choice of problems, not
  of training seeds. It has no width where all problems agree.
  """
  names = [name for name, quantity in quantities.items() for _ in quantity.parts]
  if not names:
    return {}
  pairs = [pair for quantity in quantities.values() for pair in quantity.parts]
  columns = np.stack([column for pair in pairs for column in pair], axis=1).astype(float)
  sums = np.concatenate([counts @ columns for counts in resamples(len(columns), draws, seed)])
  ratios = divide(sums[:, 0::2], sums[:, 1::2])
  points = divide(columns.sum(axis=0)[0::2], columns.sum(axis=0)[1::2])
  where: dict[str, list[int]] = {}
  for index, name in enumerate(names):
    where.setdefault(name, []).append(index)
  return {name: percentiles(points[at].mean(), ratios[:, at].mean(axis=1), level) for name, at in where.items()}


def bootstrap(quantity: Quantity, *, seed: int, draws: int = BOOTSTRAP_DRAWS, level: float = LEVEL) -> Interval:
  """The interval of one quantity."""
  return intervals({"": quantity}, seed=seed, draws=draws, level=level)[""]


def resamples(num_problems: int, draws: int, seed: int | Sequence[int]) -> Iterator[np.ndarray]:
  """Counts of each problem in each resample, in chunks of `f64[_CHUNK, P]`."""
  rng = np.random.default_rng(seed)
  for start in range(0, draws, _CHUNK):
    rows = min(_CHUNK, draws - start)
    picks = rng.integers(num_problems, size=(rows, num_problems)) + num_problems * np.arange(rows)[:, None]
    yield np.bincount(picks.reshape(-1), minlength=rows * num_problems).reshape(rows, num_problems).astype(float)


def divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
  """Ratios, NaN where the denominator is 0."""
  return np.divide(numerator, denominator, out=np.full(np.shape(numerator), np.nan), where=denominator > 0)


def percentiles(point: float, draws: np.ndarray, level: float) -> Interval:
  """The interval of a metric from its resamples; resamples in which it is undefined are left out."""
  draws = draws[~np.isnan(draws)]
  if np.isnan(point) or not draws.size:
    return Interval(None, None, None)
  low, high = np.percentile(draws, [50 * (1 - level), 50 * (1 + level)])
  return Interval(float(point), float(low), float(high))


# ---- Verification: judging each candidate by its score alone. Candidates without a score are left out. ----


def rm_accuracy(bank: Bank, values_PC: np.ndarray) -> Quantity:
  """Share of scored candidates whose label the verifier predicts: correct if the score is above 0.5."""
  scored = ~np.isnan(values_PC) & bank.mask
  hits = scored & ((values_PC > THRESHOLD) == bank.correct)
  return Quantity(((hits.sum(axis=1), scored.sum(axis=1)),))


def balanced_rm_accuracy(bank: Bank, values_PC: np.ndarray) -> Quantity:
  """Mean of the accuracies on correct and on incorrect candidates: 0.5 for a constant verifier."""
  scored = ~np.isnan(values_PC) & bank.mask
  hits = scored & ((values_PC > THRESHOLD) == bank.correct)
  labels = (scored & bank.correct, scored & ~bank.correct)
  return Quantity(tuple(((hits & label).sum(axis=1), label.sum(axis=1)) for label in labels))


def scored_share(bank: Bank, values_PC: np.ndarray) -> Quantity:
  """Share of candidates that have a score."""
  return Quantity((((~np.isnan(values_PC) & bank.mask).sum(axis=1), bank.sizes),))


def brier(bank: Bank, values_PC: np.ndarray) -> Quantity:
  """Mean squared difference of score and label over scored candidates."""
  scored = ~np.isnan(values_PC) & bank.mask
  return Quantity(((np.where(scored, (values_PC - bank.correct) ** 2, 0).sum(axis=1), scored.sum(axis=1)),))


def expected_calibration_error(bank: Bank, values_PC: np.ndarray) -> float | None:
  """ECE over ten bins of equal width: the mean over candidates of |mean score - share correct| of their bin.

  Has no interval: resampling adds noise to each bin, and noise can only raise the error.
  """
  scored = ~np.isnan(values_PC) & bank.mask
  if not scored.any():
    return None
  values, labels = values_PC[scored], bank.correct[scored]
  gaps = np.bincount(calibration_bins(values), weights=values - labels, minlength=CALIBRATION_BINS)
  return float(np.abs(gaps).sum() / values.size)


def calibration_bins(values: np.ndarray) -> np.ndarray:
  """The bin of each score, 0 to 9; a score of 1 falls into the last."""
  return np.minimum((values * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)


def auc_within(bank: Bank, values_PC: np.ndarray) -> Quantity:
  """AUC within each problem, averaged over problems with both a correct and an incorrect scored candidate."""
  scored = ~np.isnan(values_PC) & bank.mask
  # [P, correct, incorrect]: 1 where the correct candidate scores higher, 1/2 where they tie.
  above = (values_PC[:, :, None] > values_PC[:, None, :]) + 0.5 * (values_PC[:, :, None] == values_PC[:, None, :])
  pairs = (scored & bank.correct)[:, :, None] & (scored & ~bank.correct)[:, None, :]
  count = pairs.sum(axis=(1, 2))
  return Quantity((((above * pairs).sum(axis=(1, 2)) / np.maximum(count, 1), count > 0),))


def auc(values: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
  """Chance that a correct candidate outscores an incorrect one, a tie counting half, for each row of weights.

  Args:
    values: scores, `f64[X]`.
    labels: whether each candidate is correct, `bool[X]`.
    weights: how often each candidate counts, `f64[D, X]`.

  Returns:
    `f64[D]`, NaN where a row of weights covers only one label.
  """
  order = np.argsort(values, kind="stable")
  weights = weights[:, order]
  correct = weights * labels[order]
  incorrect = weights - correct
  starts = np.flatnonzero(np.diff(values[order], prepend=-np.inf))
  if starts.size < values.size:  # merge ties
    correct, incorrect = (np.add.reduceat(label, starts, axis=1) for label in (correct, incorrect))
  below = np.cumsum(incorrect, axis=1) - incorrect
  wins = (correct * (below + 0.5 * incorrect)).sum(axis=1)
  return divide(wins, correct.sum(axis=1) * incorrect.sum(axis=1))


def auc_overall(bank: Bank, values_PC: np.ndarray, *, seed: int, draws: int = AUC_DRAWS) -> Interval:
  """AUC over the scored candidates of all problems pooled, with an interval over problems."""
  scored = ~np.isnan(values_PC) & bank.mask
  if not scored.any():
    return Interval(None, None, None)
  values, labels, row = values_PC[scored], bank.correct[scored], np.nonzero(scored)[0]
  point = auc(values, labels, np.ones((1, values.size)))[0]
  chunks = [auc(values, labels, counts[:, row]) for counts in resamples(len(bank.problems), draws, seed)]
  return percentiles(point, np.concatenate(chunks), LEVEL)


# ---- Scores and their votes ----


@dataclasses.dataclass(frozen=True, eq=False)
class ScoreTable:
  """The scores of one verifier, aligned with the bank."""

  verifier: str
  step: int
  values: np.ndarray  # f64[P, C]: as recorded, NaN where there is no value
  states: np.ndarray  # i8[P, C, V]: index into VOTE_STATES, -1 where there is no vote
  p_yes: np.ndarray  # f64[P, C, V]: NaN where there is no number
  says_yes: np.ndarray  # bool[P, C, V]: p(Yes) > p(No)
  tokens: np.ndarray  # i64[P, C]: sampled by all votes of the candidate
  num_votes: int  # minimum over candidates


def align_scores(bank: Bank, verifier: str, scores: Sequence[Score]) -> ScoreTable:
  """Aligns a verifier's scores with the candidates.

  Raises:
    UserError: a candidate without a score or with two, a score of an unknown candidate, a value outside [0, 1], a vote
      in an unknown state or without the number that its state requires, or scores from different training steps.
  """
  by_candidate: dict[tuple[str, int], Score] = {}
  for score in scores:
    key = (score.problem_id, score.candidate_index)
    if key in by_candidate:
      raise UserError(f"verifier {verifier!r} has two scores for candidate {key[1]} of problem {key[0]!r}")
    by_candidate[key] = score
  steps = {score.step for score in scores}
  if len(steps) > 1:
    raise UserError(f"verifier {verifier!r}: its scores come from several training steps: {sorted(steps)}")

  width = max((len(score.votes) for score in scores), default=0)
  values = np.full(bank.mask.shape, np.nan)
  states = np.full((*bank.mask.shape, width), -1, np.int8)
  p_yes, says_yes = np.full(states.shape, np.nan), np.zeros(states.shape, bool)
  tokens, fewest = np.zeros(bank.mask.shape, int), width
  for row, pool in enumerate(bank.candidates):
    for column, candidate in enumerate(pool):
      place = f"verifier {verifier!r}, problem {candidate.problem_id!r}, candidate {candidate.index}"
      own = by_candidate.pop((candidate.problem_id, candidate.index), None)
      if own is None:
        raise UserError(f"{place}: there is no score; run the score stage again")
      if own.value is not None:
        if not 0 <= own.value <= 1:
          raise UserError(f"{place}: the value {own.value} is not between 0 and 1")
        values[row, column] = own.value
      for index, vote in enumerate(own.votes):
        _check_vote(vote, place)
        states[row, column, index] = VOTE_STATES.index(vote.state)
        if vote.p_yes is not None:
          p_yes[row, column, index] = vote.p_yes
          says_yes[row, column, index] = vote.p_yes > (1 - vote.p_yes if vote.p_no is None else vote.p_no)
        tokens[row, column] += vote.num_tokens
      fewest = min(fewest, len(own.votes))
  if by_candidate:
    problem_id, index = next(iter(by_candidate))
    raise UserError(f"verifier {verifier!r} has a score for an unknown candidate: {index} of problem {problem_id!r}")
  return ScoreTable(verifier, steps.pop(), values, states, p_yes, says_yes, tokens, fewest)


def _check_vote(vote: Vote, place: str) -> None:
  if vote.state not in VOTE_STATES:
    raise UserError(f"{place}: a vote has the unknown state {vote.state!r}; the states are {', '.join(VOTE_STATES)}")
  if vote.p_yes is None and VOTE_STATES.index(vote.state) in _NUMBERED:
    raise UserError(f"{place}: a vote is {vote.state!r} but has no p_yes")


# Ways to reduce votes to one value. The first defines the score; the others show how much depends on that choice.
MAJORITY_RULE = "majority verdict"
RULES = ("ok and forced votes", "ok votes only", "failed votes count 0", "share of Yes verdicts", MAJORITY_RULE)


def vote_values(table: ScoreTable, rule: str, votes: slice = slice(None)) -> np.ndarray:
  """Each candidate's value from (a slice of) its votes by one of `RULES`: `f64[P, C]`, NaN for no value.

  The majority verdict is 1 for Yes, 0 for No and 1/2 for a draw.
  """
  states, p_yes, says_yes = table.states[..., votes], table.p_yes[..., votes], table.says_yes[..., votes]
  numbered = np.isin(states, _NUMBERED)
  counted = {
    "ok and forced votes": (numbered, p_yes),
    "ok votes only": (states == VOTE_STATES.index("ok"), p_yes),
    "failed votes count 0": (states >= 0, np.where(numbered, p_yes, 0.0)),
    "share of Yes verdicts": (numbered, says_yes),
    MAJORITY_RULE: (numbered, says_yes),
  }
  counts, numbers = counted[rule]
  values = divide(np.where(counts, numbers, 0.0).sum(axis=2), counts.sum(axis=2))
  return (1 + np.sign(values - 0.5)) / 2 if rule == MAJORITY_RULE else values


def values_of_k_votes(table: ScoreTable, k: int) -> np.ndarray:
  """Values from k votes each: `f64[G, P, C]` for the G = num_votes // k disjoint groups of k votes.

  Votes are independent samples, so averaging a metric over the groups has the same expectation as using the first k
  votes, and less variance. Leftover votes are not used.
  """
  if not 1 <= k <= table.num_votes:
    raise UserError(f"verifier {table.verifier!r} has {table.num_votes} votes per candidate, so k={k} is impossible")
  groups = range(table.num_votes // k)
  return np.stack([vote_values(table, RULES[0], slice(group * k, (group + 1) * k)) for group in groups])
