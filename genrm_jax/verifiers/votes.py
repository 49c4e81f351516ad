"""From prompts to votes: p(Yes) in one pass, or K sampled rationales with p(Yes) read in each."""

from collections.abc import Sequence

import jax
import numpy as np

from genrm_jax.infer.engine import Engine
from genrm_jax.infer.sampling import SampleConfig
from genrm_jax.records import Vote
from genrm_jax.text.prompts import Prompter
from genrm_jax.text.verdicts import VerdictLocation, read_rationale


def direct_votes(engine: Engine, prompter: Prompter, prompts: Sequence[Sequence[int]], label: str) -> list[Vote]:
  """GenRM: p(Yes | x, y, I) (paper, equation 3), one vote a prompt."""
  _, probs = engine.read(prompts, (prompter.yes_id, prompter.no_id), label)
  return [Vote("ok", float(yes), float(no), 0) for yes, no in probs]


def classifier_votes(engine: Engine, prompter: Prompter, prompts: Sequence[Sequence[int]], label: str) -> list[Vote]:
  """ORM: sigmoid of the logit of the class token (paper, equation 1), one vote a prompt."""
  logits, _ = engine.read(prompts, (prompter.tokenizer.cls_id,), label)
  yes = 1 / (1 + np.exp(-logits[:, 0].astype(np.float64)))
  return [Vote("ok", float(p), float(1 - p), 0) for p in yes]


def likelihood_votes(
  engine: Engine, prompts: Sequence[Sequence[int]], solutions: Sequence[Sequence[int]], label: str
) -> list[Vote]:
  """DPO: p(y | x), one vote a prompt, as V-STaR ranks solutions (Hosseini et al. 2024, section 3.1).

  A float64 tells likelihoods apart down to log p = -708, and below -745 all are 0: solutions less likely than that,
  hundreds of tokens of a model that is unsure of each, come out equal.
  """
  return [Vote("ok", p, None, 0) for p in np.exp(engine.log_likelihood(prompts, solutions, label)).tolist()]


def rationale_votes(
  engine: Engine,
  prompter: Prompter,
  prompts: Sequence[Sequence[int]],
  keys: jax.Array,
  settings: SampleConfig,
  label: str,
) -> list[list[Vote]]:
  """GenRM-CoT: K rationales a prompt, p(Yes) read where each poses the verdict question (paper, equation 6).

  Args:
    engine: the verifier.
    prompter: templates.
    prompts: n prompts that end where a rationale begins.
    keys: key[n, K].
    settings: of the sampling.
    label: of the progress bar.

  Returns:
    K votes for each prompt; text/verdicts.py defines their states.
  """
  watch = (prompter.yes_id, prompter.no_id)
  rollouts = engine.write(prompts, keys, settings, watch, label)
  votes: list[list[Vote | None]] = []
  forced: list[tuple[int, int, list[int]]] = []
  for i, (prompt, rolled) in enumerate(zip(prompts, rollouts, strict=True)):
    mine: list[Vote | None] = []
    for ids, watched in rolled:
      reading = read_rationale(ids, prompter, engine.max_tokens - len(prompt) - len(ids))
      if reading.state == "forced":
        forced.append((i, len(mine), [*prompt, *ids, *reading.suffix]))
      mine.append(_vote(reading, ids, watched, prompter))
    votes.append(mine)
  if forced:
    _, probs = engine.read([ids for *_, ids in forced], watch, f"{label}, forced verdicts")
    for (i, k, _), (yes, no) in zip(forced, probs, strict=True):
      sampled = rollouts[i][k][0]
      votes[i][k] = Vote("forced", float(yes), float(no), len(sampled), prompter.tokenizer.decode(sampled))
  return [[v for v in mine if v is not None] for mine in votes]


def _vote(reading: VerdictLocation, ids: list[int], watched: np.ndarray, prompter: Prompter) -> Vote | None:
  """The vote of a reading; None for a forced one, which is read in a further pass."""
  if reading.state == "forced":
    return None
  text = prompter.tokenizer.decode(ids)
  if reading.verdict_index is None:
    return Vote(reading.state, None, None, len(ids), text)
  yes, no = watched[reading.verdict_index]
  return Vote(reading.state, float(yes), float(no), len(ids), text)


def value(votes: Sequence[Vote]) -> float | None:
  """The mean p(Yes) of the votes that give a number; None where none does."""
  numbers = [v.p_yes for v in votes if v.p_yes is not None]
  return float(np.mean(numbers)) if numbers else None
