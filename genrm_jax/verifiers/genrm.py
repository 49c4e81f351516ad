"""GenRM: next-token prediction of the verdict (paper, section 3.1)."""

from collections.abc import Mapping, Sequence
from typing import Any

from genrm_jax.data.packing import Example, sft_example
from genrm_jax.infer.engine import Engine
from genrm_jax.pytrees import KIND_VERIFY
from genrm_jax.records import Vote
from genrm_jax.verifiers import snippets
from genrm_jax.verifiers import votes as voting
from genrm_jax.verifiers.base import Item, Verifier, VoteConfig


class GenRM(Verifier):
  """Score: p(Yes | x, y, I) over the full vocabulary (paper, equation 3)."""

  def prompt(self, question: str, solution: str) -> list[int]:
    return self.prompter.direct(question, solution)

  def example(self, item: Item) -> Example:
    prompt = self.prompt(item.problem.question, item.candidate.text)
    return sft_example(item.name, prompt, [self.prompter.verdict_id(item.candidate.correct)], KIND_VERIFY)

  def votes(self, engine: Engine, pairs: Sequence[tuple[str, str]], how: VoteConfig, label: str) -> list[list[Vote]]:
    del how
    return voting.direct_votes(engine, self.prompter, [self.prompt(*pair) for pair in pairs], label)

  def how_to_score(self, num_votes: int) -> str:
    return "A generative verifier: the score is p(yes) over the full vocabulary, after `solve`, solution, `verify`."

  def transformers_code(self, scoring: Mapping[str, Any]) -> tuple[str, str]:
    return self.prompter.template("verify"), snippets.READ_LOGITS.format(
      value=f"logits.softmax(-1)[{self.prompter.yes_id}].item()"
    )
