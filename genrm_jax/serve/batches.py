"""How the worker batches what clients ask for: rationales continuously, other verifiers whatever waits."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import jax
import numpy as np

from genrm_jax.infer.engine import Engine, bucket
from genrm_jax.infer.session import Rollout
from genrm_jax.pipeline.trained import TrainedVerifier
from genrm_jax.records import Vote
from genrm_jax.verifiers import votes as voting
from genrm_jax.verifiers.base import VoteConfig, check_votes
from genrm_jax.verifiers.genrm_cot import CoTVotes

_STEPS = 16  # tokens decoded before the next look at the queue, while slots are free
_ROWS = (1, 8)  # rows of a batch with little to score; otherwise all that the engine has


@dataclasses.dataclass(frozen=True)
class Ask:
  """A solution to score. Equal ones are scored once."""

  question: str
  solution: str
  num_votes: int
  seed: int
  max_new_tokens: int

  @property
  def pair(self) -> tuple[str, str]:
    return self.question, self.solution


class Batches(Protocol):
  """Scores asks, several at a time. Each fits into the context, and none is added twice before it is finished."""

  @property
  def is_busy(self) -> bool: ...

  @property
  def room(self) -> int:
    """How many more asks are worth adding now; the others may as well wait in the queue."""
    ...

  def add(self, ask: Ask) -> None: ...

  def advance(self) -> list[tuple[Ask, Sequence[Vote]]]:
    """Computes for a while; returns what is finished."""
    ...


def make_batches(trained: TrainedVerifier) -> Batches:
  """The way to batch a verifier: continuously if it samples rationales in the usual manner."""
  verifier = trained.verifier
  is_usual = isinstance(verifier, CoTVotes) and type(verifier).votes is CoTVotes.votes
  return RationaleBatches(trained) if is_usual else DirectBatches(trained)


def asked(trained: TrainedVerifier, ask: Ask) -> VoteConfig:
  """The votes that are asked for."""
  return VoteConfig(ask.num_votes, ask.seed, dataclasses.replace(trained.how.sample, max_new_tokens=ask.max_new_tokens))


def _with_rows(engine: Engine, num_rows: int) -> Engine:
  """The engine with no more rows per batch than a few sequences need."""
  rows = min((rows for rows in (*_ROWS, engine.rows_per_batch) if rows >= num_rows), default=engine.rows_per_batch)
  return dataclasses.replace(engine, rows_per_batch=min(rows, engine.rows_per_batch))


class DirectBatches:
  """One batch of what waits at a time, by `Verifier.votes`."""

  def __init__(self, trained: TrainedVerifier):
    self._trained = trained
    self._asks: list[Ask] = []

  @property
  def is_busy(self) -> bool:
    return bool(self._asks)

  @property
  def room(self) -> int:
    return self._trained.engine.num_slots - len(self._asks)

  def add(self, ask: Ask) -> None:
    self._asks.append(ask)

  def advance(self) -> list[tuple[Ask, Sequence[Vote]]]:
    finished: list[tuple[Ask, Sequence[Vote]]] = []
    asks, self._asks = self._asks, []
    verifier, engine = self._trained.verifier, _with_rows(self._trained.engine, len(asks))
    by_config: dict[VoteConfig, list[Ask]] = {}
    for ask in asks:
      by_config.setdefault(asked(self._trained, ask), []).append(ask)
    for how, group in by_config.items():
      votes = verifier.votes(engine, [ask.pair for ask in group], how, "")
      check_votes(verifier, votes, len(group), verifier.num_votes(how.num_votes))
      finished += zip(group, votes, strict=True)
    return finished


class RationaleBatches:
  """One session for all clients: the slots of finished rationales are refilled with whatever was asked next.

  Fewer tokens than the session's limit, if asked for, are cut from its rollouts: a rollout's tokens do not depend on
  the limit. More votes than fit into a slot take several.
  """

  def __init__(self, trained: TrainedVerifier):
    assert isinstance(trained.verifier, CoTVotes)
    self._trained, self._verifier, self._engine = trained, trained.verifier, trained.engine
    self._how = self._verifier.sampling(trained.how)
    prompter, max_len = self._verifier.prompter, self._engine.max_tokens
    with jax.set_mesh(self._engine.mesh):
      self._session = self._engine.session(
        self._how.sample,
        (prompter.yes_id, prompter.no_id),
        self._how.num_votes,
        bucket(max_len, max_len),
        jax.random.key_impl(voting.vote_keys(0, [("", "")], 1)),
      )
    self._prompts: dict[Ask, list[int]] = {}
    self._parts: dict[Ask, dict[int, list[Rollout]]] = {}

  @property
  def is_busy(self) -> bool:
    return self._session.is_busy

  @property
  def room(self) -> int:
    return self._engine.num_slots - self._session.num_waiting

  def add(self, ask: Ask) -> None:
    num_votes, size = ask.num_votes, self._how.num_votes
    # In whole slots, so that few shapes are compiled; a key does not depend on how many there are.
    num_parts = -(-num_votes // size)
    keys = voting.vote_keys(ask.seed, [ask.pair], num_parts * size)
    raw_keys = np.asarray(jax.random.key_data(keys))[0, :num_votes]
    self._prompts[ask], self._parts[ask] = self._verifier.prompt(*ask.pair), {}
    for part in range(num_parts):
      part_keys = raw_keys[part * size : (part + 1) * size]
      self._session.add((ask, part), self._prompts[ask], part_keys)

  def advance(self) -> list[tuple[Ask, Sequence[Vote]]]:
    with jax.set_mesh(self._engine.mesh):
      parts = self._session.advance(_STEPS)
    finished: dict[Ask, list[Rollout]] = {}
    for (ask, part), rollouts in parts:
      self._parts[ask][part] = rollouts
      if sum(map(len, self._parts[ask].values())) == ask.num_votes:
        of_ask = self._parts.pop(ask)
        finished[ask] = [_cut(r, ask.max_new_tokens) for number in sorted(of_ask) for r in of_ask[number]]
    if not finished:
      return []
    prompts = [self._prompts.pop(ask) for ask in finished]
    engine = _with_rows(self._engine, sum(map(len, finished.values())))
    votes = voting.read_votes(engine, self._verifier.prompter, prompts, list(finished.values()), "")
    return list(zip(finished, votes, strict=True))


def _cut(rollout: Rollout, max_new_tokens: int) -> Rollout:
  return Rollout(rollout.ids[:max_new_tokens], rollout.tracked_probs[:max_new_tokens])
