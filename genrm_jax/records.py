"""Host records, one JSON line each (data/jsonl.py): problems, candidates, rationales, votes and scores."""

import dataclasses

# States of a vote; text/verdicts.py defines them.
VOTE_STATES = ("ok", "forced", "truncated", "missing", "malformed", "contradictory")


@dataclasses.dataclass(frozen=True)
class Problem:
  """A problem of a task. `answer` is the right one, normalised; `reference` is a worked solution or ""."""

  id: str
  task: str
  split: str
  question: str
  answer: str
  reference: str = ""


@dataclasses.dataclass(frozen=True)
class Candidate:
  """One solution to a problem. `answer` is None where none could be read."""

  problem_id: str
  index: int
  text: str
  answer: str | None
  correct: bool
  source: str


@dataclasses.dataclass(frozen=True)
class Rationale:
  """A verification of one candidate, for training. `verdict` is None where none could be read."""

  problem_id: str
  candidate_index: int
  index: int
  text: str
  verdict: bool | None
  source: str
  kept: bool
  why_dropped: str = ""


@dataclasses.dataclass(frozen=True)
class Vote:
  """One reading of the verdict: one per candidate for a direct verifier, K for a verifier with rationales.

  `p_yes` and `p_no` are probabilities over the full vocabulary, None where the state has no number; `num_tokens` counts
  the sampled tokens; `text` is the sampled rationale ("" for a direct verifier). The DPO verifier poses no question:
  `p_yes` is the likelihood of the solution, and there is no `p_no`.
  """

  state: str
  p_yes: float | None
  p_no: float | None
  num_tokens: int
  text: str = ""


@dataclasses.dataclass(frozen=True)
class Score:
  """A verifier's score of one candidate: `value` in [0, 1], None where no vote could be read."""

  problem_id: str
  candidate_index: int
  verifier: str
  step: int
  value: float | None
  votes: tuple[Vote, ...] = ()
