"""Scoring the candidates of a run: what fits into the context, each text once, and how many tokens that takes."""

import dataclasses
from collections.abc import Callable, Sequence

from genrm_jax import verifiers
from genrm_jax.data import candidates, jsonl
from genrm_jax.evals.costs import Costs
from genrm_jax.infer.engine import Engine
from genrm_jax.infer.sampling import SampleConfig
from genrm_jax.model import gemma
from genrm_jax.pipeline.run import Run
from genrm_jax.records import Candidate, Problem, Score, Vote
from genrm_jax.runtime.errors import UserError
from genrm_jax.runtime.progress import say
from genrm_jax.text.prompts import Prompter


def score_verifier(run: Run, name: str) -> None:
  """Scores every candidate of the evaluated splits."""
  verifier, mesh = verifiers.get_verifier(name), run.engine_mesh
  params, step = run.load_params(name, mesh) if verifier.is_trained else (run.init_params(name, mesh), 0)
  settings = run.sample_config("votes")
  if not verifier.is_trained:
    settings = dataclasses.replace(settings, max_new_tokens=run.config.verifiers[name].max_new_tokens)
  engine = run.engine(params)
  for split in run.eval_splits:
    scores = score_pool(
      verifier,
      engine,
      run.prompter,
      run.problems(split),
      run.candidates(split),
      step=step,
      seed=run.config.seed,
      num_votes=run.config.votes.num_votes,
      settings=settings,
    )
    jsonl.write_records(run.path(run.scores_file(name, split)), scores)


def score_pool(
  verifier: verifiers.Verifier,
  engine: Engine,
  prompter: Prompter,
  problems: Sequence[Problem],
  pool: Sequence[Candidate],
  *,
  step: int,
  seed: int,
  num_votes: int,
  settings: SampleConfig,
) -> list[Score]:
  """Scores every candidate, equal solutions to a problem once (arguments as of `verifiers.score_candidates`).

  A solution that does not fit into the context has truncated votes and no score.

  Raises:
    UserError: none of them fits.
  """
  distinct = candidates.distinct(pool)
  question = {p.id: p.question for p in problems}
  lengths = [
    tokens_needed(verifier, prompter, question[c.problem_id], c.text, settings.max_new_tokens) for c in distinct
  ]
  fitting = [c for c, n in zip(distinct, lengths, strict=True) if n <= engine.max_tokens]
  if not fitting:
    raise UserError(
      f"{verifier.name}: no solution fits into the context of {engine.max_tokens} tokens, the shortest needs "
      f"{min(lengths)}; raise config.engine.max_tokens, or lower config.votes.sample.max_new_tokens"
    )
  if len(fitting) < len(distinct):
    say(f"{verifier.name}: {len(distinct) - len(fitting)} of {len(distinct)} solutions do not fit into the context")
  scores = verifiers.score_candidates(
    verifier, engine, prompter, problems, fitting, step=step, seed=seed, num_votes=num_votes, settings=settings
  )
  of_text = {(c.problem_id, c.text): score for c, score in zip(fitting, scores, strict=True)}
  unread = (Vote("truncated", None, None, 0),) * (num_votes if verifier.writes_rationales else 1)
  return [
    dataclasses.replace(found, candidate_index=c.index)
    if (found := of_text.get((c.problem_id, c.text)))
    else Score(c.problem_id, c.index, verifier.name, step, None, unread)
    for c in pool
  ]


def tokens_needed(
  verifier: verifiers.Verifier, prompter: Prompter, question: str, solution: str, max_new_tokens: int
) -> int:
  """How much of the context scoring a solution takes: the prompt, and what is written or read after it."""
  length = len(verifier.prompt(prompter, question, solution))
  if verifier.writes_rationales:
    length += max_new_tokens
  elif verifier.learns_pairs:
    length += len(prompter.solution(solution))
  return length


def token_costs(run: Run, problems: Sequence[Problem], pool: Sequence[Candidate]) -> Costs:
  """How many tokens each method reads and samples, as this run's tokenizer counts them.

  The generator's size is known where its solutions were sampled here.
  """
  question = {p.id: p.question for p in problems}
  num_params = sum(gemma.num_params(run.model))

  def lengths(count: Callable[[str, str], int]) -> list[int]:
    of_text = {(c.problem_id, c.text): count(question[c.problem_id], c.text) for c in candidates.distinct(pool)}
    return [of_text[c.problem_id, c.text] for c in pool]

  def read(name: str) -> Callable[[str, str], int]:
    verifier = verifiers.get_verifier(name)
    return lambda question, text: tokens_needed(verifier, run.prompter, question, text, max_new_tokens=0)

  return Costs(
    prompt_tokens=[len(run.prompter.solve(p.question)) for p in problems],
    solution_tokens=lengths(lambda _, text: len(run.prompter.solution(text))),
    verifier_tokens={name: lengths(read(name)) for name in run.verifier_names},
    generator_params=num_params if "candidates" in run.config else None,
    verifier_params=num_params,
  )
