"""GenRM-CoT: writes a rationale, then the verdict (paper, section 3.2)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from genrm_jax.data.packing import Example, sft_example
from genrm_jax.data.rationales import Agreement
from genrm_jax.infer.engine import Engine
from genrm_jax.pytrees import KIND_VERIFY
from genrm_jax.records import Rationale, Vote
from genrm_jax.runtime.errors import UserError
from genrm_jax.text.verdicts import read_rationale
from genrm_jax.verifiers import snippets
from genrm_jax.verifiers import votes as voting
from genrm_jax.verifiers.base import Item, LabelledData, Scored, Verifier, VoteConfig


class CoTVotes(Verifier):
  """Score: mean p(Yes) over K sampled rationales (paper, equation 6)."""

  samples_rationales = True

  def prompt(self, question: str, solution: str) -> list[int]:
    return self.prompter.cot(question, solution)

  def sampling(self, how: VoteConfig) -> VoteConfig:
    """How many rationales are sampled, and how, given what was asked for."""
    return how

  def votes(self, engine: Engine, pairs: Sequence[tuple[str, str]], how: VoteConfig, label: str) -> list[list[Vote]]:
    how = self.sampling(how)
    keys = voting.vote_keys(how.seed, pairs, how.num_votes)
    prompts = [self.prompt(*pair) for pair in pairs]
    return voting.rationale_votes(engine, self.prompter, prompts, keys, how.sample, label)

  def how_to_score(self, num_votes: int) -> str:
    return (
      "A generative verifier: after `solve`, solution, `verify_cot` it writes a rationale that ends with `conclude` "
      "and the verdict. The score is p(yes) over the full vocabulary at the verdict, averaged over "
      f"{num_votes} sampled rationales."
    )

  def transformers_code(self, scoring: Mapping[str, Any]) -> tuple[str, str]:
    sample = scoring["sample"]
    how = f"temperature={sample['temperature']}, top_k={sample['top_k']}, top_p={sample['top_p']},"
    return self.prompter.template("verify_cot"), snippets.SAMPLE_VOTES.format(
      num_votes=scoring["num_votes"],
      max_new_tokens=sample["max_new_tokens"],
      do_sample=sample["temperature"] > 0,
      sampling=how if sample["temperature"] > 0 else "",
      question=self.prompter.format.verdict_question,
      yes=self.prompter.yes_id,
      no=self.prompter.no_id,
    )


class GreedyRationale(CoTVotes):
  """A trained GenRM-CoT, `settings["init_from"]`, with one greedy rationale in place of K sampled ones (figure 11)."""

  is_trained = False

  def num_votes(self, configured: int) -> int:
    return 1

  def sampling(self, how: VoteConfig) -> VoteConfig:
    return VoteConfig(1, how.seed, dataclasses.replace(how.sample, temperature=0.0))


class GenRMCoT(CoTVotes):
  """Trained by SFT on rationale, verdict question and verdict."""

  needs_rationales = True
  compared_as_solver = True

  def select(self, data: LabelledData) -> list[Item]:
    """One item per kept rationale, at most `max_rationales` per solution; 0 trains on solutions only.

    If `min_agreement` is set, only solutions count of which more than that share of all rationales, kept or not, agree
    with the label (paper, appendix C: 1/2).
    """
    rationales: dict[tuple[str, int], list[Rationale]] = {}
    pool, limit = data.candidates, self.settings["max_rationales"]
    if limit:
      agreement = Agreement(pool)
      for r in data.rationales:
        agreement.add(r)
        kept = rationales.setdefault((r.problem_id, r.candidate_index), []) if r.kept else []
        if len(kept) < limit:
          kept.append(r)
      least = self.settings.get("min_agreement", 0.0)
      pool = [c for c in pool if (c.problem_id, c.index) in rationales and agreement.exceeds(least, c)]
    problem_of = {p.id: p for p in data.problems}
    return [
      Item(problem_of[c.problem_id], c, rationale)
      for c in self._chosen(pool, data.seed)
      for rationale in (rationales[c.problem_id, c.index] if limit else [None])
    ]

  def has_verdict(self, item: Item) -> bool:
    return item.rationale is not None

  def example(self, item: Item) -> Example:
    prompt, rationale = self.prompt(item.problem.question, item.candidate.text), item.rationale
    assert rationale is not None
    return sft_example(item.name, prompt, self.prompter.rationale(rationale.text, item.candidate.correct), KIND_VERIFY)

  def scored(self, item: Item) -> list[Scored]:
    """The context after the rationale. A forced verdict must follow the same tokens as a sampled one.

    Raises:
      UserError: the rationale cannot be read back, or the two contexts differ.
    """
    rationale, prompter = item.rationale, self.prompter
    assert rationale is not None
    written = prompter.rationale(rationale.text, item.candidate.correct)
    location = read_rationale(written, prompter, room=0)
    if location.verdict_index is None:
      raise UserError(f"the rationale for {item.name} reads as {location.state!r}")
    sampled = written[: location.verdict_index]
    cut = prompter.tokenizer.encode_plain(rationale.text)
    forced = [*cut, *read_rationale(cut, prompter, room=len(written)).suffix]
    if forced != sampled:
      raise UserError(
        f"{item.name}: a forced verdict would follow other tokens than a sampled one.\n"
        f"  sampled: {sampled}\n  forced:  {forced}"
      )
    (direct,) = super().scored(item)
    return [direct._replace(context=[*direct.context, *sampled])]
