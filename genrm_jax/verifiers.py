"""The verifiers of the paper on one page: how each renders an example, what its loss is, how it scores.

              asks                                     target                                 score r(x, y)
  orm         solve(x) y verify                        label, at the class token's logit      sigmoid(z_cls)
  genrm       solve(x) y verify                        " Yes" / " No"                         p(Yes)
  genrm_cot   solve(x) y verify_cot                    rationale, question, " Yes" / " No"    mean over K of p(Yes)

Each may be trained together with solution generation, weighted by lambda (`solve_weight`; not the ORM).
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from genrm_jax.data.batches import Example, Rows, label_example, sft_example
from genrm_jax.errors import UserError
from genrm_jax.infer import score
from genrm_jax.infer.decode import Engine
from genrm_jax.infer.sample import SampleConfig, rollout_keys
from genrm_jax.model import gemma
from genrm_jax.model.config import ModelConfig
from genrm_jax.text.prompts import Prompter
from genrm_jax.text.verdicts import read_rationale
from genrm_jax.train import losses
from genrm_jax.types import KIND_SOLVE, KIND_VERIFY, Candidate, Problem, Rationale, Score, Vote


@dataclasses.dataclass(frozen=True)
class Verifier:
  """What sets one verifier apart; the functions below do the rest."""

  name: str
  prompt: Callable[[Prompter, str, str], list[int]]  # (prompter, question, solution) -> ids
  needs_rationales: bool = False
  is_classifier: bool = False


ORM = Verifier("orm", Prompter.direct, is_classifier=True)
GENRM = Verifier("genrm", Prompter.direct)
GENRM_COT = Verifier("genrm_cot", Prompter.cot, needs_rationales=True)
VERIFIERS = {v.name: v for v in (ORM, GENRM, GENRM_COT)}


def get_verifier(name: str) -> Verifier:
  if name not in VERIFIERS:
    raise UserError(f"unknown verifier {name!r}; there are: {', '.join(VERIFIERS)}")
  return VERIFIERS[name]


def verify_example(
  verifier: Verifier, prompter: Prompter, problem: Problem, candidate: Candidate, rationale: Rationale | None = None
) -> Example:
  """The training example for one labelled candidate (and one rationale, if the verifier needs it)."""
  prompt = verifier.prompt(prompter, problem.question, candidate.text)
  name = f"candidate {candidate.index} of {problem.id}"
  if verifier.is_classifier:
    return label_example(name, prompt, candidate.correct)
  if verifier.needs_rationales:
    assert rationale is not None
    return sft_example(name, prompt, prompter.rationale(rationale.text, candidate.correct), KIND_VERIFY)
  return sft_example(name, prompt, [prompter.verdict_id(candidate.correct)], KIND_VERIFY)


def solve_example(prompter: Prompter, problem: Problem, solution: str) -> Example:
  """The training example for generating a (correct) solution."""
  name = f"a solution of {problem.id}"
  return sft_example(name, prompter.solve(problem.question), prompter.solution(solution), KIND_SOLVE)


def sft_loss(config: ModelConfig, max_targets: int, solve_weight: float) -> losses.LossFn:
  """L_SFT(verify) + lambda * L_SFT(solve)."""

  def loss(params, batch):
    x_BTD, _ = gemma.forward(params, config, batch.tokens, batch.positions, batch.segments)
    x_BMD, targets_BM, weights_BM, kind_BM = losses.gather_targets(x_BTD, batch, max_targets)
    nll_BM = losses.cross_entropy(gemma.unembed(params, config, x_BMD), targets_BM)
    return losses.unified(losses.mean_by_kind(nll_BM, weights_BM, kind_BM), solve_weight)

  return loss


def orm_loss(config: ModelConfig, max_targets: int, cls_id: int) -> losses.LossFn:
  """Binary cross-entropy of the class token's logit at the last token of the prompt."""

  def loss(params, batch):
    x_BTD, _ = gemma.forward(params, config, batch.tokens, batch.positions, batch.segments)
    x_BMD, labels_BM, weights_BM, kind_BM = losses.gather_targets(x_BTD, batch, max_targets)
    z_BM = gemma.unembed(params, config, x_BMD)[..., cls_id]
    nll_BM = losses.binary_cross_entropy(z_BM, labels_BM)
    return losses.unified(losses.mean_by_kind(nll_BM, weights_BM, kind_BM), 0.0)

  return loss


def make_loss(
  verifier: Verifier, config: ModelConfig, prompter: Prompter, max_targets: int, solve_weight: float
) -> losses.LossFn:
  """The verifier's loss; UserError for an ORM with a solution part, which it has no way to use."""
  if not verifier.is_classifier:
    return sft_loss(config, max_targets, solve_weight)
  if solve_weight:
    raise UserError(f"{verifier.name} is a classifier: solve_weight must be 0, not {solve_weight}")
  return orm_loss(config, max_targets, prompter.tokenizer.cls_id)


def score_candidates(
  verifier: Verifier,
  engine: Engine,
  prompter: Prompter,
  problems: Sequence[Problem],
  candidates: Sequence[Candidate],
  *,
  step: int,
  seed: int,
  num_votes: int,
  settings: SampleConfig,
) -> list[Score]:
  """A score for each candidate.

  Args:
    verifier: which.
    engine: its trained model.
    prompter: templates.
    problems: hold every problem of the candidates.
    candidates: what to score.
    step: of the checkpoint, for the record.
    seed: of the sampled rationales.
    num_votes: K, rationales a candidate (for a verifier that writes them).
    settings: of their sampling.
  """
  question = {p.id: p.question for p in problems}
  prompts = [verifier.prompt(prompter, question[c.problem_id], c.text) for c in candidates]
  label = f"score {verifier.name}"
  votes: list[list[Vote]]
  if verifier.needs_rationales:
    ids = [c.problem_id for c in candidates for _ in range(num_votes)]
    indices = [c.index for c in candidates for _ in range(num_votes)]
    keys = rollout_keys(seed, ids, indices, list(range(num_votes)) * len(candidates))
    keys = keys.reshape(len(candidates), num_votes)
    votes = score.rationale_votes(engine, prompter, prompts, keys, settings, label)
  else:
    read = score.classifier_votes if verifier.is_classifier else score.direct_votes
    votes = [[vote] for vote in read(engine, prompter, prompts, label)]
  return [
    Score(c.problem_id, c.index, verifier.name, step, score.value(v), tuple(v))
    for c, v in zip(candidates, votes, strict=True)
  ]


def check_verdict_tokens(
  verifier: Verifier,
  prompter: Prompter,
  rows: Rows,
  asked: Sequence[tuple[Problem, Candidate, Rationale | None]],
) -> None:
  """Proves that scoring asks with the token ids that training supervised: the gate before any training or scoring.

  For each of `asked` the context in which scoring would read the verdict, built by the scoring code, must stand in the
  packed training rows, with the verdict (or the ORM's label) as the target of its last token.

  Raises:
    UserError: shows both id sequences.
  """
  supervised = _supervised(rows, () if verifier.is_classifier else (prompter.yes_id, prompter.no_id))
  for problem, candidate, rationale in asked:
    context = verifier.prompt(prompter, problem.question, candidate.text)
    target = int(candidate.correct) if verifier.is_classifier else prompter.verdict_id(candidate.correct)
    if rationale is not None:
      written = prompter.rationale(rationale.text, candidate.correct)
      read = read_rationale(written, prompter, room=0)
      if read.verdict_index is None:
        raise UserError(f"the rationale for candidate {candidate.index} of {problem.id} reads as {read.state!r}")
      sampled = written[: read.verdict_index]
      cut = prompter.tokenizer.encode(rationale.text)
      forced = [*cut, *read_rationale(cut, prompter, room=len(written)).suffix]
      if forced != sampled:
        raise UserError(
          f"candidate {candidate.index} of {problem.id}: a forced verdict would be asked for with other tokens than a "
          f"sampled one.\n  sampled: {sampled}\n  forced:  {forced}"
        )
      context = [*context, *sampled]
    found = supervised.get(tuple(context))
    if found != target:
      near = max(supervised, key=lambda ids: _common_prefix(ids, context))
      raise UserError(
        f"candidate {candidate.index} of {problem.id}: the verdict is not scored where it was trained.\n"
        f"  scored:  {context} -> {target}\n  trained: {list(near)} -> {supervised[near]}"
      )


def _supervised(rows: Rows, verdict_ids: tuple[int, ...]) -> dict[tuple[int, ...], int]:
  """Context -> target for every verification target of the packed rows that is one of `verdict_ids` (any, if empty)."""
  out = {}
  data = rows.data
  is_verdict = np.isin(data.targets, verdict_ids) if verdict_ids else True
  for r, t in np.argwhere((data.weights > 0) & (data.kind == KIND_VERIFY) & is_verdict):
    start = int(np.argmax(data.segments[r] == data.segments[r, t]))
    out[tuple(data.tokens[r, start : t + 1].tolist())] = int(data.targets[r, t])
  return out


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
  n = 0
  for x, y in zip(a, b, strict=False):
    if x != y:
      break
    n += 1
  return n
