"""Host records, one JSON line each (data/jsonl.py): problems, candidates, rationales, votes and scores."""

import dataclasses

# States of a vote; text/verdicts.py defines them.
VOTE_STATES = ("ok", "forced", "truncated", "missing", "malformed", "contradictory")


@dataclasses.dataclass(frozen=True)
class Problem:
  """A problem of a task.

  Attributes:
    id: differs from those of all other problems of the task.
    task: its name.
    split: such as "train" or "eval"; tasks/base.py lists those of a task.
    question: the text that a model is given.
    answer: the right one, normalised.
    reference: a worked solution, or "".
  """

  id: str
  task: str
  split: str
  question: str
  answer: str
  reference: str = ""


@dataclasses.dataclass(frozen=True)
class Candidate:
  """One solution to a problem.

  Attributes:
    problem_id: the problem's `id`.
    index: number among the candidates of the problem.
    text: the solution.
    answer: its final answer, normalised; None where none could be read.
    correct: whether the answer is right.
    source: where the solution comes from.
  """

  problem_id: str
  index: int
  text: str
  answer: str | None
  correct: bool
  source: str


@dataclasses.dataclass(frozen=True)
class Rationale:
  """A verification of one candidate, for training.

  Attributes:
    problem_id: the candidate's problem.
    candidate_index: the candidate's `index`.
    index: number among the rationales of the candidate.
    text: the rationale.
    verdict: whether it finds the candidate correct; None where none could be read.
    source: where the rationale comes from.
    kept: whether it is trained on.
    why_dropped: the reason if it is not.
  """

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

  The DPO verifier poses no question: `p_yes` is the likelihood of the solution, and there is no `p_no`.

  Attributes:
    state: one of `VOTE_STATES`.
    p_yes: probability over the full vocabulary; None where the state has no number.
    p_no: the same for the other verdict.
    num_tokens: number of sampled tokens.
    text: the sampled rationale; "" for a direct verifier.
  """

  state: str
  p_yes: float | None
  p_no: float | None
  num_tokens: int
  text: str = ""


@dataclasses.dataclass(frozen=True)
class Score:
  """A verifier's score of one candidate.

  Attributes:
    problem_id: the candidate's problem.
    candidate_index: the candidate's `index`.
    verifier: its name in the config.
    step: of the verifier's checkpoint.
    value: the score in [0, 1]; None where no vote could be read.
    votes: those behind the score.
  """

  problem_id: str
  candidate_index: int
  verifier: str
  step: int
  value: float | None
  votes: tuple[Vote, ...] = ()
