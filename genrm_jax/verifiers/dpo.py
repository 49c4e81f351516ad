"""DPO verifier, as in V-STaR (Hosseini et al. 2024). The reference is the model that training starts from."""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from genrm_jax.data import candidates
from genrm_jax.data.packing import Example, Rows, pack, pair, sft_example
from genrm_jax.data.row_file import RowFile
from genrm_jax.infer.engine import Engine
from genrm_jax.model import gemma
from genrm_jax.model.config import ModelConfig
from genrm_jax.pytrees import KIND_VERIFY, PairBatch
from genrm_jax.records import Candidate, Problem, Score, Vote
from genrm_jax.runtime import sharding
from genrm_jax.runtime.errors import UserError
from genrm_jax.runtime.progress import progress
from genrm_jax.training import losses
from genrm_jax.verifiers import snippets
from genrm_jax.verifiers import votes as voting
from genrm_jax.verifiers.base import LabelledData, TargetCounts, Verifier, VoteConfig, gate_sample, logits_at_targets


class Pair(NamedTuple):
  """A correct and an incorrect solution to a problem."""

  problem: Problem
  chosen: Candidate
  rejected: Candidate


class DPO(Verifier):
  """Score: the likelihood p(y | x). It ranks solutions to one problem; it is not a probability of correctness.

  The paper found it better without the reference than with it (appendix B): see `DPOReference`.
  """

  is_likelihood = True

  def prompt(self, question: str, solution: str) -> list[int]:
    del solution  # the continuation, whose likelihood is the score
    return self.prompter.solve(question)

  def tokens_needed(self, question: str, solution: str, max_new_tokens: int) -> int:
    return len(self.prompt(question, solution)) + len(self.prompter.solution(solution))

  def select(self, data: LabelledData) -> list[Pair]:
    """At most `max_pairs` pairs per problem."""
    problem_of = {p.id: p for p in data.problems}
    pairs = candidates.choose_pairs(data.candidates, self.settings["max_pairs"], data.seed)
    return [Pair(problem_of[a.problem_id], a, b) for a, b in pairs]

  def example(self, item: Pair) -> Example:
    name = f"candidates {item.chosen.index} and {item.rejected.index} of {item.problem.id}"
    prompt = self.prompter.solve(item.problem.question)
    halves = (self.prompter.solution(c.text) for c in (item.chosen, item.rejected))
    return pair(name, *(sft_example(name, prompt, half, KIND_VERIFY) for half in halves))

  def examples(self, data: LabelledData) -> Iterator[Example]:
    if self.solve_weight:
      raise UserError(f"{self.name} is trained on pairs: solve_weight must be 0, not {self.solve_weight}")
    yield from super().examples(data)

  def loss(self, model: ModelConfig, counts: TargetCounts, remat: gemma.Remat) -> losses.LossFn:
    """-log sigmoid(beta * margin over the reference) (Rafailov et al. 2023, equation 7)."""
    beta = self.settings["beta"]
    if not beta > 0:
      raise UserError(f"{self.name}: beta must be positive, not {beta}")

    def loss(params, batch, counts_of_batch=None):
      if not isinstance(batch, PairBatch):
        raise TypeError("DPO needs rows with log p under the reference: see with_reference")
      logits_BMV, at = logits_at_targets(params, model, batch, counts.max_targets, remat)
      logp_BM = -losses.cross_entropy(logits_BMV, at.targets)
      return losses.dpo(logp_BM, at, beta, counts.max_pairs, counts_of_batch)

    return loss

  def with_reference(
    self, rows: RowFile, counts: TargetCounts, params: Any, model: ModelConfig, mesh: Mesh, batch_size: int
  ) -> RowFile:
    """Adds log p of every target under the reference `params`, so that training runs no reference model."""
    batch_sharding = sharding.batch_sharding(mesh, model.rules)

    @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
    def log_probs(params, batch):
      logits_BMV, at = logits_at_targets(params, model, batch, counts.max_targets)
      is_target_BT = batch.weights > 0
      slot_BT = jnp.cumsum(is_target_BT, axis=1) - 1  # gather_targets puts the targets of a row first, in order
      logp_BT = jnp.take_along_axis(-losses.cross_entropy(logits_BMV, at.targets), slot_BT, axis=1)
      return jnp.where(is_target_BT, logp_BT, 0.0)

    out = []
    with progress("log p under the reference", rows.num_rows) as advance, jax.set_mesh(mesh):
      for start in range(0, rows.num_rows, batch_size):
        index = np.arange(start, start + batch_size)
        batch = sharding.read_to_global(rows.take, np.where(index < rows.num_rows, index, -1), batch_sharding)
        out.append(np.asarray(log_probs(params, batch))[: rows.num_rows - start])
        advance(len(out[-1]))
    return rows.with_reference(np.concatenate(out))

  def votes(self, engine: Engine, pairs: Sequence[tuple[str, str]], how: VoteConfig, label: str) -> list[list[Vote]]:
    del how
    solutions = [self.prompter.solution(solution) for _, solution in pairs]
    return voting.likelihood_votes(engine, [self.prompt(*p) for p in pairs], solutions, label)

  def check_gate(self, items: Sequence[Pair]) -> None:
    """Checks on a sample that scoring reads each solution with the tokens that training supervises."""
    sample = gate_sample(items)
    if not sample:
      return
    examples = [self.example(item) for item in sample]
    halves = _supervised_halves(pack(examples, max(len(e.tokens) for e in examples)))
    for item in sample:
      for candidate in (item.chosen, item.rejected):
        solution = self.prompter.solution(candidate.text)
        context = (*self.prompt(item.problem.question, candidate.text), *solution)
        if halves.get(context) != (candidate.correct, len(solution)):
          raise UserError(
            f"{self.name}, candidate {candidate.index} of {item.problem.id}: the solution is not scored where it is "
            f"trained.\n  scored:  {list(context)}, the last {len(solution)} tokens\n  trained: {halves.get(context)}"
          )

  def how_to_score(self, num_votes: int) -> str:
    return (
      "A DPO verifier: the score of a solution is its likelihood after `solve`, including the end token. It ranks "
      "solutions to one problem."
    )

  def transformers_code(self, scoring: Mapping[str, Any]) -> tuple[str, str]:
    return "", snippets.LIKELIHOOD.format(end=self.prompter.end_id)


class DPOReference(DPO):
  """DPO's score with the reference: sigmoid(beta (log p(y | x) - log p_ref(y | x))), the implicit reward.

  Its own model is the reference, that is, what the DPO verifier `settings["of"]` was trained from; p(y | x) comes from
  the recorded scores of that verifier. Where a likelihood underflows to 0, its logarithm counts as -744.4.
  """

  is_trained = False

  @staticmethod
  def scores_needed(settings: Mapping[str, Any]) -> tuple[str, ...]:
    return (settings["of"],)

  def combine(self, scores: Sequence[Score], others: Mapping[str, Sequence[Score]]) -> list[Score]:
    policy = {(s.problem_id, s.candidate_index): s for s in others[self.settings["of"]]}
    return [self._relative(s, policy[s.problem_id, s.candidate_index]) for s in scores]

  def _relative(self, reference: Score, policy: Score) -> Score:
    if reference.value is None or policy.value is None:
      return dataclasses.replace(reference, step=policy.step, value=None, votes=(Vote("truncated", None, None, 0),))
    reward = self.settings["beta"] * (_log(policy.value) - _log(reference.value))
    odds = math.exp(-abs(reward))
    value = (1.0 if reward > 0 else odds) / (1 + odds)
    return dataclasses.replace(reference, step=policy.step, value=value, votes=(Vote("ok", value, None, 0),))


def _log(p: float) -> float:
  return math.log(max(p, math.ulp(0.0)))


def _supervised_halves(rows: Rows) -> dict[tuple[int, ...], tuple[bool, int]]:
  """Maps prompt + solution of each half of the packed pairs to (is it the chosen half, number of targets)."""
  out, data = {}, rows.data
  for r in range(rows.num_rows):
    for segment in range(1, int(data.segments[r].max()) + 1):
      here = data.segments[r] == segment
      tokens, targets = data.tokens[r, here].tolist(), data.targets[r, here & (data.weights[r] > 0)].tolist()
      prompt = tokens[: len(tokens) - len(targets) + 1]
      out[(*prompt, *targets)] = segment % 2 == 1, len(targets)
  return out
