"""The Verifier interface, the registry of the paper's verifiers, and the gate on verdict tokens.

                prompt                   target                                 score r(x, y)
    judge       solve(x) y verify_cot    none (not trained)                     mean over K votes of p(Yes)
    dpo         solve(x)                 correct y preferred to incorrect y     p(y | x)
    orm         solve(x) y verify        label, on the class token's logit      sigmoid(z_cls)
    genrm       solve(x) y verify        " Yes" / " No"                         p(Yes)
    genrm_cot   solve(x) y verify_cot    rationale, question, " Yes" / " No"    mean over K votes of p(Yes)

Two further rows of the paper are scored by models that start or end a training above: `dpo_reference`, the DPO score
with the reference (dpo.py), and `genrm_cot_greedy`, one greedy rationale of GenRM-CoT (genrm_cot.py).

To add a verifier, subclass Verifier in a module of your own and name it in the config by its import path:

    config.verifiers.two_prompts = dict(kind="my_verifiers:TwoPrompts", **common.verifier(...))

docs/extending.md has an example.
"""

import abc
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np

from genrm_jax.data import candidates, packing
from genrm_jax.data.packing import Example, Rows
from genrm_jax.data.row_file import RowFile
from genrm_jax.infer.engine import Engine
from genrm_jax.infer.sampling import SampleConfig
from genrm_jax.model import gemma
from genrm_jax.model.config import ModelConfig
from genrm_jax.pytrees import KIND_SOLVE, KIND_VERIFY
from genrm_jax.records import Candidate, Problem, Rationale, Score, Vote
from genrm_jax.runtime import plugins
from genrm_jax.runtime.errors import UserError
from genrm_jax.text.prompts import Prompter
from genrm_jax.training import losses
from genrm_jax.verifiers import votes as voting

VERIFIERS: Mapping[str, str] = {
  "judge": "genrm_jax.verifiers.judge:Judge",
  "dpo": "genrm_jax.verifiers.dpo:DPO",
  "dpo_reference": "genrm_jax.verifiers.dpo:DPOReference",
  "orm": "genrm_jax.verifiers.orm:ORM",
  "genrm": "genrm_jax.verifiers.genrm:GenRM",
  "genrm_cot": "genrm_jax.verifiers.genrm_cot:GenRMCoT",
  "genrm_cot_greedy": "genrm_jax.verifiers.genrm_cot:GreedyRationale",
}
_GATE_SAMPLE = 64  # training items per label that the gate checks


class LabelledData(NamedTuple):
  """One split of training data.

  Attributes:
    problems: of the split.
    candidates: labelled solutions to them.
    rationales: may be an iterator; consumed once, by verifiers that need it.
    seed: of the choice among candidates.
  """

  problems: Sequence[Problem]
  candidates: Sequence[Candidate]
  rationales: Iterable[Rationale] = ()
  seed: int = 0


class Item(NamedTuple):
  """The source of one training example.

  Attributes:
    problem: what is solved.
    candidate: a labelled solution.
    rationale: of the solution, if the verifier is trained on one.
  """

  problem: Problem
  candidate: Candidate
  rationale: Rationale | None = None

  @property
  def name(self) -> str:
    """The candidate in error messages."""
    return f"candidate {self.candidate.index} of {self.problem.id}"


class Scored(NamedTuple):
  """A position at which scoring reads a verdict.

  Attributes:
    name: of the item, for error messages.
    context: the token ids that precede the verdict.
    target: what follows: a token id, or a label (ORM).
  """

  name: str
  context: list[int]
  target: int


@dataclasses.dataclass(frozen=True)
class VoteConfig:
  """How votes are cast.

  Attributes:
    num_votes: K, 1 or more.
    seed: of the sampled rationales.
    sample: their sampling settings.
  """

  num_votes: int
  seed: int
  sample: SampleConfig

  def __post_init__(self):
    if self.num_votes < 1:
      raise UserError(f"num_votes must be 1 or more, not {self.num_votes}")


class TargetCounts(NamedTuple):
  """Sizes of packed rows; the loss computes logits for that many positions.

  Attributes:
    max_targets: the most targets in a row.
    max_pairs: the most pairs in a row.
  """

  max_targets: int
  max_pairs: int


class Verifier(abc.ABC):
  """One way to score a solution. Instances hold no parameters: those live in the engine or the train state.

  A subclass must define `prompt` and `votes`, and `example` if it is trained. Everything else has a default.

  Attributes:
    name: the key in `config.verifiers`, used in score files and reports.
    prompter: builds the token ids of prompts and targets.
    settings: the entry in `config.verifiers`.
  """

  is_trained: ClassVar[bool] = True
  needs_rationales: ClassVar[bool] = False  # whether training reads rationales/
  samples_rationales: ClassVar[bool] = False  # K votes per score, each from a sampled rationale; otherwise one vote
  is_likelihood: ClassVar[bool] = False  # scores rank solutions but are not probabilities of correctness
  # Its own solutions are evaluated even at lambda = 0, one end of the paper's sweep (section 4.3).
  compared_as_solver: ClassVar[bool] = False

  def __init__(self, name: str, prompter: Prompter, settings: Mapping[str, Any]):
    self.name, self.prompter, self.settings = name, prompter, settings

  # Training.

  @property
  def solve_weight(self) -> float:
    """lambda: the weight of the solution-generation loss (paper, equation 5)."""
    return self.settings.get("solve_weight", 0.0)

  def select(self, data: LabelledData) -> list[Any]:
    """The training items of a split: at most `max_per_label` solutions per label and problem (paper, appendix A)."""
    problem_of = {p.id: p for p in data.problems}
    return [Item(problem_of[c.problem_id], c) for c in self._chosen(data.candidates, data.seed)]

  def has_verdict(self, item: Any) -> bool:
    """Whether an item yields a verification example. One without a verdict yields only a solution to imitate."""
    del item
    return True

  def example(self, item: Any) -> Example:
    """The training example of one item of `select`."""
    raise NotImplementedError(f"verifier {self.name} does not define `example`")

  def examples(self, data: LabelledData) -> Iterator[Example]:
    """The training examples of a split, including correct solutions if `solve_weight` > 0.

    Raises:
      UserError: the gate found that scoring would read a verdict at a position that is not supervised.
    """
    items = self.select(data)
    supervised = [item for item in items if self.has_verdict(item)]
    self.check_gate(supervised)
    for item in supervised:
      example = self.example(item)
      if not isinstance(example, Example):
        raise UserError(f"verifier {self.name}: example() returned {example!r:.60}, expected an Example")
      yield example
    if self.solve_weight:
      solved = {(i.problem.id, i.candidate.index): i for i in items if i.candidate.correct}
      yield from (solve_example(self.prompter, i.problem, i.candidate.text) for i in solved.values())

  def loss(self, model: ModelConfig, counts: TargetCounts, remat: gemma.Remat) -> losses.LossFn:
    """L_SFT(verify) + lambda L_SFT(solve) (paper, equation 5); `counts` are static sizes of the packed rows."""
    return sft_loss(model, counts.max_targets, self.solve_weight, remat)

  def with_reference(
    self, rows: RowFile, counts: TargetCounts, params: Any, model: ModelConfig, mesh: jax.sharding.Mesh, batch_size: int
  ) -> RowFile:
    """Adds what the loss needs from the initial `params` to the rows; only DPO does. Returns rows for training."""
    del counts, params, model, mesh, batch_size
    return rows

  def _chosen(self, pool: Sequence[Candidate], seed: int) -> list[Candidate]:
    return candidates.choose_for_training(pool, self.settings["max_per_label"], self.settings["balanced"], seed)

  # Scoring.

  @abc.abstractmethod
  def prompt(self, question: str, solution: str) -> list[int]:
    """Token ids that precede the verdict, or the rationale if the verifier writes one."""

  @abc.abstractmethod
  def votes(self, engine: Engine, pairs: Sequence[tuple[str, str]], how: VoteConfig, label: str) -> list[list[Vote]]:
    """The votes on n distinct (question, solution) pairs, each of which fits into the engine's context.

    Args:
      engine: the verifier's model.
      pairs: n pairs.
      how: number of votes, seed and sampling settings; unused by verifiers that do not sample.
      label: shown on the progress bar.

    Returns:
      n lists of `num_votes(how.num_votes)` votes.
    """

  def value(self, votes: Sequence[Vote]) -> float | None:
    """The score in [0, 1]: mean p(Yes) over the votes that have one; None if none has."""
    return voting.mean_p_yes(votes)

  @staticmethod
  def scores_needed(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """The verifiers whose scores of the same candidates `combine` needs, given the entry in `config.verifiers`."""
    del settings
    return ()

  def combine(self, scores: Sequence[Score], others: Mapping[str, Sequence[Score]]) -> list[Score]:
    """The scores to record, from those of this verifier's model and those of `scores_needed`, by name."""
    del others
    return list(scores)

  def num_votes(self, configured: int) -> int:
    """The number of votes per score, given the configured number."""
    return configured if self.samples_rationales else 1

  def vote_config(self, configured: VoteConfig) -> VoteConfig:
    """The configured votes with this verifier's own number of votes and, if set, its own `max_new_tokens`."""
    limit = self.settings.get("max_new_tokens", configured.sample.max_new_tokens)
    sample = dataclasses.replace(configured.sample, max_new_tokens=limit)
    return VoteConfig(self.num_votes(configured.num_votes), configured.seed, sample)

  def tokens_needed(self, question: str, solution: str, max_new_tokens: int) -> int:
    """Context length in tokens that scoring takes: the prompt and what is sampled after it."""
    return len(self.prompt(question, solution)) + (max_new_tokens if self.samples_rationales else 0)

  # The gate.

  def scored(self, item: Any) -> list[Scored]:
    """The positions at which scoring reads the verdicts that `example(item)` supervises."""
    context = self.prompt(item.problem.question, item.candidate.text)
    return [Scored(item.name, context, self.prompter.verdict_id(item.candidate.correct))]

  def supervised(self, rows: Rows) -> dict[tuple[int, ...], int]:
    """Maps the context of each supervised verdict token in packed rows to that token."""
    return supervised_targets(rows, (self.prompter.yes_id, self.prompter.no_id))

  def check_gate(self, items: Sequence[Any]) -> None:
    """Checks on a sample of each label that scoring reads verdicts at the token ids that training supervises.

    Raises:
      UserError: they differ; the message shows both id sequences.
    """
    sample = gate_sample(items)
    if not sample:
      return
    examples = [self.example(item) for item in sample]
    supervised = self.supervised(packing.pack(examples, max(len(e.tokens) for e in examples)))
    for scored in (s for item in sample for s in self.scored(item)):
      found = supervised.get(tuple(scored.context))
      if found != scored.target:
        near = max(supervised, key=lambda ids: _common_prefix(ids, scored.context), default=())
        raise UserError(
          f"{self.name}, {scored.name}: the verdict is not scored where it is trained.\n"
          f"  scored:  {scored.context} -> {scored.target}\n  trained: {list(near)} -> {supervised.get(near)}"
        )

  # Export.

  def how_to_score(self, num_votes: int) -> str:
    """A sentence for the model card on how to compute the score."""
    del num_votes
    return "A custom verifier; its module defines how a score is computed."

  def transformers_code(self, scoring: Mapping[str, Any]) -> tuple[str, str] | None:
    """The text that follows a solution in the prompt, and Python that computes the score with transformers, if any."""
    del scoring
    return None


def check_votes(verifier: Verifier, votes: Any, num_pairs: int, num_votes: int) -> None:
  """UserError unless `votes` are `num_votes` Vote records for each of `num_pairs` pairs, as `Verifier.votes` says."""
  place = f"verifier {verifier.name}: votes() returned"
  if not isinstance(votes, list | tuple) or len(votes) != num_pairs:
    size = f"{len(votes)} items" if isinstance(votes, list | tuple) else type(votes).__name__
    raise UserError(f"{place} {size} for {num_pairs} pairs; return a list of Vote for each")
  for of_pair in votes:
    if not isinstance(of_pair, list | tuple) or not all(isinstance(vote, Vote) for vote in of_pair):
      raise UserError(f"{place} {of_pair!r:.60} for a pair, expected a list of Vote")
    if len(of_pair) != num_votes:
      raise UserError(f"{place} {len(of_pair)} votes for a pair, but num_votes() says {num_votes}")


def verifier_class(kind: str) -> type[Verifier]:
  """The class of a verifier.

  Args:
    kind: a key of VERIFIERS, or an import path "package.module:Class".

  Raises:
    UserError: the kind is unknown, cannot be imported, or is not a complete Verifier.
  """
  cls = plugins.load_class(kind, VERIFIERS, "verifier")
  if not issubclass(cls, Verifier):
    raise UserError(f"verifier {kind!r}: {cls.__name__} is not a subclass of genrm_jax.verifiers.base.Verifier")
  missing = sorted(getattr(cls, "__abstractmethods__", ()))
  if cls.is_trained and cls.example is Verifier.example and cls.examples is Verifier.examples:
    missing.append("example")
  if missing:
    raise UserError(f"verifier {kind!r}: {cls.__name__} lacks {', '.join(missing)}; see docs/extending.md")
  return cls


def make_verifier(name: str, prompter: Prompter, settings: Mapping[str, Any]) -> Verifier:
  """Constructs the verifier `name`; its class is `settings["kind"]`, by default its name."""
  return verifier_class(settings.get("kind", name))(name, prompter, settings)


def solve_example(prompter: Prompter, problem: Problem, solution: str) -> Example:
  """An SFT example whose target is a solution."""
  ids = prompter.solve(problem.question), prompter.solution(solution)
  return packing.sft_example(f"a solution to {problem.id}", *ids, KIND_SOLVE)


def sft_loss(model: ModelConfig, max_targets: int, solve_weight: float, remat: gemma.Remat = "none") -> losses.LossFn:
  """L_SFT(verify) + lambda L_SFT(solve) (paper, equations 4 and 5)."""

  def loss(params, batch, counts_of_batch=None):
    logits_BMV, at = logits_at_targets(params, model, batch, max_targets, remat)
    nll_BM = losses.cross_entropy(logits_BMV, at.targets)
    return losses.unified(losses.mean_by_kind(nll_BM, at.weights, at.kind), solve_weight, counts_of_batch)

  return loss


def logits_at_targets(params, model: ModelConfig, batch, max_targets: int, remat: gemma.Remat = "none", ids=None):
  """Logits f32[B, M, V] at the targets of each row (of the tokens `ids` only, if given), and the targets."""
  x_BTD, _ = gemma.forward(params, model, batch.tokens, batch.positions, batch.segments, remat=remat)
  x_BMD, at = losses.gather_targets(x_BTD, batch, max_targets)
  return gemma.unembed(params, model, x_BMD, ids), at


def supervised_targets(rows: Rows, ids: tuple[int, ...] = ()) -> dict[tuple[int, ...], int]:
  """Maps the context of each verification target in packed rows to the target; only targets in `ids`, if given."""
  data, out = rows.data, {}
  wanted = np.isin(data.targets, ids) if ids else True
  for r, t in np.argwhere((data.weights > 0) & (data.kind == KIND_VERIFY) & wanted):
    start = int(np.argmax(data.segments[r] == data.segments[r, t]))
    out[tuple(data.tokens[r, start : t + 1].tolist())] = int(data.targets[r, t])
  return out


def gate_sample(items: Sequence[Any]) -> list[Any]:
  """About `_GATE_SAMPLE` items of each label, evenly spaced in the data."""
  by_label: dict[Any, list[Any]] = {}
  for item in items:
    by_label.setdefault(item.candidate.correct if isinstance(item, Item) else None, []).append(item)
  return [x for group in by_label.values() for x in group[:: max(1, len(group) // _GATE_SAMPLE)]]


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
  return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
