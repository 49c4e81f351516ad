"""The verifiers of the paper on one page: how each renders an example, what its loss is, how it scores.

              asks                                     target                                 score r(x, y)
  judge       solve(x) y verify_cot                    none: it is not trained                mean over K of p(Yes)
  dpo         solve(x)                                 y correct, rather than y incorrect     p(y | x)
  orm         solve(x) y verify                        label, at the class token's logit      sigmoid(z_cls)
  genrm       solve(x) y verify                        " Yes" / " No"                         p(Yes)
  genrm_cot   solve(x) y verify_cot                    rationale, question, " Yes" / " No"    mean over K of p(Yes)

GenRM and GenRM-CoT may be trained together with solution generation, weighted by lambda (`solve_weight`). The DPO
verifier is that of V-STaR (Hosseini et al. 2024); its reference is the model that its training starts from.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from genrm_jax.data.packing import Example, Rows, label_example, pair, sft_example
from genrm_jax.data.row_file import RowFile
from genrm_jax.infer.engine import Engine
from genrm_jax.infer.sampling import SampleConfig, sample_keys
from genrm_jax.model import gemma
from genrm_jax.model.config import ModelConfig
from genrm_jax.pytrees import KIND_SOLVE, KIND_VERIFY, PairBatch
from genrm_jax.records import Candidate, Problem, Rationale, Score, Vote
from genrm_jax.runtime import sharding
from genrm_jax.runtime.errors import UserError
from genrm_jax.runtime.progress import progress
from genrm_jax.text.prompts import Prompter
from genrm_jax.text.verdicts import read_rationale
from genrm_jax.train import losses
from genrm_jax.verifiers import votes as score


@dataclasses.dataclass(frozen=True)
class Verifier:
  """What sets one verifier apart; the functions below do the rest."""

  name: str
  prompt: Callable[[Prompter, str, str], list[int]]  # (prompter, question, solution) -> ids
  learns: Literal["nothing", "pairs", "labels", "verdicts", "rationales"]
  writes_rationales: bool = False  # when it scores: K of them, each with a vote

  @property
  def is_trained(self) -> bool:
    return self.learns != "nothing"

  @property
  def learns_pairs(self) -> bool:
    return self.learns == "pairs"

  @property
  def is_classifier(self) -> bool:
    return self.learns == "labels"

  @property
  def needs_rationales(self) -> bool:
    """To be trained."""
    return self.learns == "rationales"


def _solve(prompter: Prompter, question: str, solution: str) -> list[int]:
  del solution  # what comes after the prompt
  return prompter.solve(question)


JUDGE = Verifier("judge", Prompter.cot, "nothing", writes_rationales=True)
DPO = Verifier("dpo", _solve, "pairs")
ORM = Verifier("orm", Prompter.direct, "labels")
GENRM = Verifier("genrm", Prompter.direct, "verdicts")
GENRM_COT = Verifier("genrm_cot", Prompter.cot, "rationales", writes_rationales=True)
VERIFIERS = {v.name: v for v in (JUDGE, DPO, ORM, GENRM, GENRM_COT)}


def get_verifier(name: str) -> Verifier:
  if name not in VERIFIERS:
    raise UserError(f"unknown verifier {name!r}; there are: {', '.join(VERIFIERS)}")
  return VERIFIERS[name]


def verify_example(
  verifier: Verifier, prompter: Prompter, problem: Problem, candidate: Candidate, rationale: Rationale | None = None
) -> Example:
  """The training example for one labelled candidate (and one rationale, if the verifier needs it).

  Not for DPO, which has `pair_example`, nor for the judge.
  """
  assert verifier.is_trained and not verifier.learns_pairs
  prompt = verifier.prompt(prompter, problem.question, candidate.text)
  name = f"candidate {candidate.index} of {problem.id}"
  if verifier.is_classifier:
    return label_example(name, prompt, candidate.correct)
  if verifier.needs_rationales:
    assert rationale is not None
    return sft_example(name, prompt, prompter.rationale(rationale.text, candidate.correct), KIND_VERIFY)
  return sft_example(name, prompt, [prompter.verdict_id(candidate.correct)], KIND_VERIFY)


def pair_example(prompter: Prompter, problem: Problem, chosen: Candidate, rejected: Candidate) -> Example:
  """The training example of DPO: a correct and an incorrect solution to a problem."""
  assert chosen.correct and not rejected.correct and chosen.problem_id == rejected.problem_id == problem.id
  name = f"candidates {chosen.index} and {rejected.index} of {problem.id}"
  prompt = prompter.solve(problem.question)
  return pair(name, *(sft_example(name, prompt, prompter.solution(c.text), KIND_VERIFY) for c in (chosen, rejected)))


def solve_example(prompter: Prompter, problem: Problem, solution: str) -> Example:
  """The training example for generating a (correct) solution."""
  name = f"a solution of {problem.id}"
  return sft_example(name, prompter.solve(problem.question), prompter.solution(solution), KIND_SOLVE)


def sft_loss(config: ModelConfig, max_targets: int, solve_weight: float, remat: gemma.Remat = "none") -> losses.LossFn:
  """L_SFT(verify) + lambda * L_SFT(solve)."""

  def loss(params, batch, counts=None):
    logits_BMV, at = _logits_at_targets(params, config, batch, max_targets, remat)
    nll_BM = losses.cross_entropy(logits_BMV, at.targets)
    return losses.unified(losses.mean_by_kind(nll_BM, at.weights, at.kind), solve_weight, counts)

  return loss


def orm_loss(config: ModelConfig, max_targets: int, cls_id: int, remat: gemma.Remat = "none") -> losses.LossFn:
  """Binary cross-entropy of the class token's logit at the last token of the prompt."""

  def loss(params, batch, counts=None):
    logits_BMV, at = _logits_at_targets(params, config, batch, max_targets, remat)
    nll_BM = losses.binary_cross_entropy(logits_BMV[..., cls_id], at.targets)
    return losses.unified(losses.mean_by_kind(nll_BM, at.weights, at.kind), 0.0, counts)

  return loss


def dpo_loss(config: ModelConfig, max_targets: int, beta: float, remat: gemma.Remat = "none") -> losses.LossFn:
  """-log sigmoid of beta times what the model prefers the correct solution by, above the reference; rows hold pairs."""

  def loss(params, batch, counts=None):
    assert isinstance(batch, PairBatch), "rows without a reference: see with_reference"
    logits_BMV, at = _logits_at_targets(params, config, batch, max_targets, remat)
    return losses.dpo(-losses.cross_entropy(logits_BMV, at.targets), at, beta, counts)

  return loss


def _logits_at_targets(params, config: ModelConfig, batch, max_targets: int, remat: gemma.Remat = "none"):
  """Logits f32[B, M, V] at the targets of each row, and the batch there."""
  x_BTD, _ = gemma.forward(params, config, batch.tokens, batch.positions, batch.segments, remat=remat)
  x_BMD, at = losses.gather_targets(x_BTD, batch, max_targets)
  return gemma.unembed(params, config, x_BMD), at


def make_loss(
  verifier: Verifier,
  config: ModelConfig,
  prompter: Prompter,
  max_targets: int,
  solve_weight: float,
  beta: float = 0.0,
  remat: gemma.Remat = "none",
) -> losses.LossFn:
  """The verifier's loss.

  Args:
    verifier: which.
    config: the model.
    prompter: holds the class token.
    max_targets: the most targets that a row has.
    solve_weight: lambda; 0 for the ORM and for DPO, which have no way to use a solution part.
    beta: how strongly DPO holds the model to the reference; the others do not read it.
    remat: what the backward pass computes again (gemma.forward).

  Raises:
    UserError: settings that the verifier cannot have; or it is not trained.
  """
  if not verifier.is_trained:
    raise UserError(f"{verifier.name} is not trained; it scores as it is")
  if verifier.learns in ("labels", "pairs") and solve_weight:
    what = "is a classifier" if verifier.is_classifier else "learns from pairs"
    raise UserError(f"{verifier.name} {what}: solve_weight must be 0, not {solve_weight}")
  if verifier.is_classifier:
    return orm_loss(config, max_targets, prompter.tokenizer.cls_id, remat)
  if verifier.learns_pairs:
    if not beta > 0:
      raise UserError(f"{verifier.name}: beta must be more than 0, not {beta}")
    return dpo_loss(config, max_targets, beta, remat)
  return sft_loss(config, max_targets, solve_weight, remat)


_Pairs = TypeVar("_Pairs", Rows, RowFile)


def with_reference(
  rows: _Pairs, max_targets: int, params: Any, config: ModelConfig, mesh: Mesh, batch_size: int
) -> _Pairs:
  """The rows with log p of every target under `params`, the reference of DPO: one pass, so that training needs none.

  Args:
    rows: pairs.
    max_targets: the most targets that a row has.
    params: what training starts from, on the mesh.
    config: the model.
    mesh: the devices.
    batch_size: rows that go through the model at a time.
  """

  @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
  def log_probs(params, batch):
    logits_BMV, at = _logits_at_targets(params, config, batch, max_targets)
    is_target_BT = batch.weights > 0
    slot_BT = jnp.cumsum(is_target_BT, axis=1) - 1  # the targets of a row stand first, in their order
    logp_BT = jnp.take_along_axis(-losses.cross_entropy(logits_BMV, at.targets), slot_BT, axis=1)
    return jnp.where(is_target_BT, logp_BT, 0.0)

  out = []
  with progress("log p under the reference", rows.num_rows) as advance, jax.set_mesh(mesh):
    for start in range(0, rows.num_rows, batch_size):
      index = np.arange(start, start + batch_size)
      batch = sharding.read_to_global(
        rows.take, np.where(index < rows.num_rows, index, -1), sharding.batch_sharding(mesh)
      )
      out.append(np.asarray(log_probs(params, batch))[: rows.num_rows - start])
      advance(len(out[-1]))
  return rows.with_reference(np.concatenate(out))


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
    engine: its model.
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
  if verifier.writes_rationales:
    keys = sample_keys(seed, "vote", [f"{c.problem_id}/{c.index}" for c in candidates], num_votes)
    votes = score.rationale_votes(engine, prompter, prompts, keys, settings, label)
  elif verifier.learns_pairs:
    solutions = [prompter.solution(c.text) for c in candidates]
    votes = [[vote] for vote in score.likelihood_votes(engine, prompts, solutions, label)]
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
  packed training rows, with the verdict (or the ORM's label) as the target of its last token. For DPO, which has no
  verdict, `asked` holds the solutions of all pairs: each, with its prompt and end mark as scoring reads them, must be a
  chosen half of a pair if it is correct and a rejected one if not, with the targets where scoring sums log p.

  Raises:
    UserError: shows both id sequences.
  """
  supervised: dict[tuple[int, ...], Any]
  if verifier.learns_pairs:
    supervised = _supervised_halves(rows)
  else:
    supervised = _supervised(rows, () if verifier.is_classifier else (prompter.yes_id, prompter.no_id))
  for problem, candidate, rationale in asked:
    context = verifier.prompt(prompter, problem.question, candidate.text)
    target: Any = int(candidate.correct) if verifier.is_classifier else prompter.verdict_id(candidate.correct)
    if verifier.learns_pairs:
      solution = prompter.solution(candidate.text)
      context, target = [*context, *solution], _half(candidate.correct, len(solution))
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
      what = "solution" if verifier.learns_pairs else "verdict"
      raise UserError(
        f"candidate {candidate.index} of {problem.id}: the {what} is not scored where it was trained.\n"
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


def _supervised_halves(rows: Rows) -> dict[tuple[int, ...], str]:
  """Prompt and solution -> what DPO makes of them, for every half of the packed pairs."""
  out = {}
  data = rows.data
  for r in range(rows.num_rows):
    for segment in range(1, int(data.segments[r].max()) + 1):
      here = data.segments[r] == segment
      tokens, targets = data.tokens[r, here].tolist(), data.targets[r, here & (data.weights[r] > 0)].tolist()
      prompt = tokens[: len(tokens) - len(targets) + 1]
      out[(*prompt, *targets)] = _half(segment % 2 == 1, len(targets))
  return out


def _half(correct: bool, num_targets: int) -> str:
  return f"{'chosen' if correct else 'rejected'} for its last {num_targets} tokens"


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
  n = 0
  for x, y in zip(a, b, strict=False):
    if x != y:
      break
    n += 1
  return n
