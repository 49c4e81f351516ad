"""ORM: a binary classifier on the logit of a class token (paper, section 2)."""

from collections.abc import Mapping, Sequence
from typing import Any

from genrm_jax.data.packing import Example, Rows, label_example
from genrm_jax.infer.engine import Engine
from genrm_jax.model import gemma
from genrm_jax.model.config import ModelConfig
from genrm_jax.records import Vote
from genrm_jax.runtime.errors import UserError
from genrm_jax.training import losses
from genrm_jax.verifiers import snippets
from genrm_jax.verifiers import votes as voting
from genrm_jax.verifiers.base import (
  Item,
  Scored,
  TargetCounts,
  Verifier,
  VoteConfig,
  logits_at_targets,
  supervised_targets,
)


class ORM(Verifier):
  """Score: sigmoid(z_cls) at the last token of the prompt (paper, equation 1). Computes only that logit.

  With `settings["every_token"]`, every token of the solution is trained to predict the label, and not only the last one
  of the prompt (Cobbe et al., arXiv 2110.14168); the score stays the same.
  """

  def prompt(self, question: str, solution: str) -> list[int]:
    return self.prompter.direct(question, solution)

  def example(self, item: Item) -> Example:
    prompt = self.prompt(item.problem.question, item.candidate.text)
    every_token = self.settings.get("every_token", False)
    num_labels = len(prompt) - len(self.prompter.solve(item.problem.question)) if every_token else 1
    return label_example(item.name, prompt, item.candidate.correct, num_labels)

  def loss(self, model: ModelConfig, counts: TargetCounts, remat: gemma.Remat) -> losses.LossFn:
    """Binary cross-entropy (paper, equation 2) and, weighted by `settings["z_loss"]`, log^2 Z (appendix B).

    The step is chosen by "loss_verify", the cross-entropy alone, unless `best_by` says otherwise.
    """
    if self.solve_weight:
      raise UserError(f"{self.name} is a classifier: solve_weight must be 0, not {self.solve_weight}")
    ids, z_loss = (self.prompter.tokenizer.cls_id,), self.settings.get("z_loss", 0.0)

    def loss(params, batch, counts_of_batch=None):
      logits_BM1, at = logits_at_targets(params, model, batch, counts.max_targets, remat, ids)
      z_BM = logits_BM1[..., 0]
      sums = losses.mean_by_kind(losses.binary_cross_entropy(z_BM, at.targets), at.weights, at.kind)
      if z_loss:
        log_z = losses.mean_by_kind(losses.squared_log_normaliser(z_BM), at.weights, at.kind)
        sums["z_loss"] = log_z["loss_verify"]
      return losses.unified(sums, 0.0, counts_of_batch, z_loss)

    return loss

  def votes(self, engine: Engine, pairs: Sequence[tuple[str, str]], how: VoteConfig, label: str) -> list[list[Vote]]:
    del how
    return voting.classifier_votes(engine, self.prompter, [self.prompt(*pair) for pair in pairs], label)

  def scored(self, item: Item) -> list[Scored]:
    context = self.prompt(item.problem.question, item.candidate.text)
    return [Scored(item.name, context, int(item.candidate.correct))]

  def supervised(self, rows: Rows) -> dict[tuple[int, ...], int]:
    return supervised_targets(rows)

  def how_to_score(self, num_votes: int) -> str:
    return "A verifier: the score of a solution is the sigmoid of the logit of `cls` after `solve`, solution, `verify`."

  def transformers_code(self, scoring: Mapping[str, Any]) -> tuple[str, str]:
    return self.prompter.template("verify"), snippets.READ_LOGITS.format(
      value=f"logits[{self.prompter.tokenizer.cls_id}].sigmoid().item()"
    )
