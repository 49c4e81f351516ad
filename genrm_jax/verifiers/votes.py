"""Votes from prompts: p(Yes) in one forward pass, or p(Yes) at the end of each of K sampled rationales."""

from collections.abc import Sequence

import jax
import numpy as np

from genrm_jax.infer.engine import Engine, Rollout
from genrm_jax.infer.sampling import SampleConfig, sample_keys
from genrm_jax.records import Vote
from genrm_jax.text.prompts import Prompter
from genrm_jax.text.verdicts import VerdictLocation, read_rationale


def direct_votes(engine: Engine, prompter: Prompter, prompts: Sequence[Sequence[int]], label: str) -> list[list[Vote]]:
  """GenRM: p(Yes | x, y, I) (paper, equation 3), one vote per prompt."""
  probs = engine.next_token_probs(prompts, (prompter.yes_id, prompter.no_id), label)
  return [[Vote("ok", float(yes), float(no), 0)] for yes, no in probs]


def classifier_votes(
  engine: Engine, prompter: Prompter, prompts: Sequence[Sequence[int]], label: str
) -> list[list[Vote]]:
  """ORM: sigmoid of the logit of the class token (paper, equation 1), one vote per prompt."""
  logits = engine.next_token_logits(prompts, (prompter.tokenizer.cls_id,), label)
  yes = 1 / (1 + np.exp(-logits[:, 0].astype(np.float64)))
  return [[Vote("ok", float(p), float(1 - p), 0)] for p in yes]


def likelihood_votes(
  engine: Engine, prompts: Sequence[Sequence[int]], solutions: Sequence[Sequence[int]], label: str
) -> list[list[Vote]]:
  """DPO: p(y | x), one vote per prompt, as in V-STaR (Hosseini et al. 2024, section 3.1).

  float64 underflows to 0 below log p = -745, so less likely solutions (hundreds of tokens, each of them uncertain) tie.
  """
  return [[Vote("ok", p, None, 0)] for p in np.exp(engine.log_likelihood(prompts, solutions, label)).tolist()]


def vote_keys(seed: int, pairs: Sequence[tuple[str, str]], num_votes: int) -> jax.Array:
  """One key per vote on each (question, solution) pair, key[n, K]; depends only on the seed and the texts."""
  return sample_keys(seed, "vote", [f"{question}\n\n{solution}" for question, solution in pairs], num_votes)


def rationale_votes(
  engine: Engine,
  prompter: Prompter,
  prompts: Sequence[Sequence[int]],
  keys: jax.Array,
  settings: SampleConfig,
  label: str,
) -> list[list[Vote]]:
  """GenRM-CoT: samples K rationales per prompt and reads p(Yes) after the verdict question (paper, equation 6).

  Args:
    engine: the verifier's model.
    prompter: templates and verdict ids.
    prompts: token ids of n prompts, each ending where a rationale begins.
    keys: key[n, K].
    settings: sampling settings of the rationales.
    label: shown on the progress bar.

  Returns:
    K votes per prompt; text/verdicts.py defines their states.
  """
  rollouts = engine.generate(prompts, keys, settings, (prompter.yes_id, prompter.no_id), label)
  return read_votes(engine, prompter, prompts, rollouts, label)


def read_votes(
  engine: Engine,
  prompter: Prompter,
  prompts: Sequence[Sequence[int]],
  rollouts: Sequence[Sequence[Rollout]],
  label: str,
) -> list[list[Vote]]:
  """The votes that sampled rationales cast, one list per prompt; a forced verdict takes another forward pass.

  The rollouts must track the probabilities of yes and no.
  """
  votes: list[list[Vote | None]] = []
  forced: list[tuple[int, int, list[int]]] = []
  for i, (prompt, of_prompt) in enumerate(zip(prompts, rollouts, strict=True)):
    votes.append([])
    for k, rollout in enumerate(of_prompt):
      location = read_rationale(rollout.ids, prompter, engine.max_tokens - len(prompt) - len(rollout.ids))
      if location.state == "forced":
        forced.append((i, k, [*prompt, *rollout.ids, *location.suffix]))
      votes[-1].append(_vote(location, rollout, prompter))
  if forced:
    verdict_ids = (prompter.yes_id, prompter.no_id)
    probs = engine.next_token_probs([ids for *_, ids in forced], verdict_ids, label and f"{label}, forced verdicts")
    for (i, k, _), (yes, no) in zip(forced, probs, strict=True):
      sampled = rollouts[i][k].ids
      votes[i][k] = Vote("forced", float(yes), float(no), len(sampled), prompter.tokenizer.decode(sampled))
  return [[v for v in of_prompt if v is not None] for of_prompt in votes]


def _vote(location: VerdictLocation, rollout: Rollout, prompter: Prompter) -> Vote | None:
  """The vote of a rollout; None if it is forced, since its p(Yes) takes another forward pass."""
  if location.state == "forced":
    return None
  text, num_tokens = prompter.tokenizer.decode(rollout.ids), len(rollout.ids)
  if location.verdict_index is None:
    return Vote(location.state, None, None, num_tokens, text)
  yes, no = rollout.tracked_probs[location.verdict_index]
  return Vote(location.state, float(yes), float(no), num_tokens, text)


def mean_p_yes(votes: Sequence[Vote]) -> float | None:
  """Mean p(Yes) over the votes that have one; None if none has."""
  numbers = [v.p_yes for v in votes if v.p_yes is not None]
  return float(np.mean(numbers)) if numbers else None
