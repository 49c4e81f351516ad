"""Scores candidates: equal texts are scored once; solutions that exceed the context get `truncated` votes."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from genrm_jax.infer.engine import Engine
from genrm_jax.records import Candidate, Problem, Score, Vote
from genrm_jax.runtime.errors import UserError
from genrm_jax.runtime.progress import say
from genrm_jax.text.unicode import half_pair
from genrm_jax.verifiers.base import Verifier, VoteConfig, check_votes


def score_pairs(
  verifier: Verifier,
  engine: Engine,
  pairs: Sequence[tuple[str, str]],
  how: VoteConfig,
  name: Callable[[int], str] = "pair {}".format,
) -> list[list[Vote]]:
  """The votes on (question, solution) pairs, in order.

  Votes depend only on the texts, the seed and the settings, not on order, batch or repetitions. If prompt and rationale
  do not fit into the context, all votes are `truncated`.

  Args:
    verifier: builds prompts and reads votes.
    engine: its model.
    pairs: may repeat.
    how: number of votes, seed and sampling settings.
    name: says which pair an index is, for messages.

  Raises:
    UserError: a text is no string, not valid Unicode, or not one that the tokenizer can express.
  """
  distinct = list(dict.fromkeys(pairs))
  room = engine.max_tokens
  fitting = []
  for pair in distinct:
    try:
      if tokens_needed(verifier, pair, how) <= room:
        fitting.append(pair)
    except UserError as e:
      raise UserError(f"{name(pairs.index(pair))}: {e}") from e
  if len(fitting) < len(distinct):
    num_long = len(distinct) - len(fitting)
    say(f"{verifier.name}: {num_long} of {len(distinct)} solutions exceed the context of {room} tokens")
  found = verifier.votes(engine, fitting, how, f"score {verifier.name}") if fitting else []
  check_votes(verifier, found, len(fitting), verifier.num_votes(how.num_votes))
  votes = dict(zip(fitting, found, strict=True))
  truncated = truncated_votes(verifier, how)
  return [votes.get(pair, truncated) for pair in pairs]


def tokens_needed(verifier: Verifier, pair: tuple[str, str], how: VoteConfig) -> int:
  """Context length that scoring a pair takes. UserError if a text cannot be encoded, as for `score_pairs`."""
  for what, text in zip(("question", "solution"), pair, strict=True):
    _check_text(what, text)
  return verifier.tokens_needed(*pair, how.sample.max_new_tokens)


def truncated_votes(verifier: Verifier, how: VoteConfig) -> list[Vote]:
  """The votes on a pair that exceeds the context."""
  return [Vote("truncated", None, None, 0)] * verifier.num_votes(how.num_votes)


def _check_text(what: str, text: Any) -> None:
  if not isinstance(text, str):
    raise UserError(f"the {what} is {text!r:.60}, expected a string")
  if fault := half_pair(text):
    raise UserError(f"the {what} has {fault}")


def score_candidates(
  verifier: Verifier,
  engine: Engine,
  problems: Sequence[Problem],
  candidates: Sequence[Candidate],
  how: VoteConfig,
  step: int,
) -> list[Score]:
  """One score per candidate; see `score_pairs`. `step`, of the checkpoint, is recorded in each score."""
  question = {p.id: p.question for p in problems}
  pairs = [(question[c.problem_id], c.text) for c in candidates]
  votes = score_pairs(
    verifier, engine, pairs, how, lambda i: f"candidate {candidates[i].index} of {candidates[i].problem_id}"
  )
  return [
    Score(c.problem_id, c.index, verifier.name, step, verifier.value(v), tuple(v))
    for c, v in zip(candidates, votes, strict=True)
  ]


def for_equal_texts(scores: Sequence[Score], scored: Sequence[Candidate], pool: Sequence[Candidate]) -> list[Score]:
  """Expands the scores of distinct solutions to all candidates of a pool."""
  of_text = {(c.problem_id, c.text): score for c, score in zip(scored, scores, strict=True)}
  return [dataclasses.replace(of_text[c.problem_id, c.text], candidate_index=c.index) for c in pool]
