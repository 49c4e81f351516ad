"""Stages that use verifiers: scoring, sampling solutions from a verifier, and the report."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

import genrm_jax
from genrm_jax.data import candidates, jsonl
from genrm_jax.evals import browse, report
from genrm_jax.evals.costs import Costs
from genrm_jax.model import gemma
from genrm_jax.pipeline import data_stages, sharing, stages
from genrm_jax.pipeline.run import Run
from genrm_jax.pipeline.stages import Stage
from genrm_jax.pipeline.trained import TrainedVerifier
from genrm_jax.records import Candidate, Problem, Score
from genrm_jax.runtime.errors import UserError
from genrm_jax.runtime.progress import say
from genrm_jax.verifiers import scoring


def score_verifier(run: Run, name: str) -> None:
  """Scores all candidates of the evaluated splits."""
  trained = run.trained_verifier(name)
  needed = trained.verifier.scores_needed(trained.verifier.settings)
  for split in run.eval_splits:
    others = {other: run.scores(other, split) for other in needed}
    write_scores(run, trained, run.scores_file(name, split), run.problems(split), run.candidates(split), others)


def write_scores(
  run: Run,
  trained: TrainedVerifier,
  file: str,
  problems: Sequence[Problem],
  pool: Sequence[Candidate],
  others: Mapping[str, Sequence[Score]] | None = None,
) -> None:
  """Scores the candidates of a pool and writes `file`; each process scores a share of the distinct solutions.

  `others` are the scores that `Verifier.combine` needs.

  Raises:
    UserError: not a single solution fits into the context.
  """
  distinct = candidates.distinct(pool)

  def work(part: Sequence[Candidate]) -> list[list[Score]]:
    return [[score] for score in trained.score_candidates(problems, part)]

  scores = [score for (score,) in sharing.map_records(run.path(file), distinct, work, Score)]
  if all(vote.state == "truncated" and not vote.num_tokens for score in scores for vote in score.votes):
    raise UserError(
      f"{trained.verifier.name}: no solution fits into the context of {trained.engine.max_tokens} tokens; raise "
      "config.engine.max_tokens, or lower config.votes.sample.max_new_tokens"
    )
  of_pool = scoring.for_equal_texts(scores, distinct, pool)
  jsonl.write_records(run.path(file), trained.verifier.combine(of_pool, others or {}))


def solve_again(run: Run, name: str) -> None:
  """Samples and grades solutions from a verifier (paper, section 4.3: unified training)."""
  params, step = run.load_params(name, run.engine_mesh)
  engine, num = run.engine(params), run.config.candidates.num_eval
  pool = data_stages.sample_solutions(run, engine, f"{name}/{step}", run.problems("eval"), num, few_shot=False)
  jsonl.write_records(run.path("candidates", f"by_{name}.jsonl"), pool)
  say(f"{name}: pass@1 {np.mean([c.correct for c in pool]):.3f} over {len(pool)} of its own solutions")


def write_report(run: Run, all_stages: Sequence[Stage], notes: Sequence[str]) -> None:
  """Writes report/: report.md, index.html, results.json and figures."""
  config = run.config
  by_split = {}
  for split in run.eval_splits:
    scores = {n: run.scores(n, split) for n in run.verifier_names}
    by_split[split] = run.problems(split), run.candidates(split), scores
  embedding, rest = gemma.num_params(run.model)
  meta = {
    **identity(run),
    "model": f"{(run.pretrained.config if run.pretrained else run.model).name}, {embedding + rest:,} parameters",
    "num_params": embedding + rest,
    "train_steps": {n: v.optim.num_steps for n, v in config.verifiers.items() if "optim" in v},
    "best_by": {n: v.loop.best_by for n, v in config.verifiers.items() if "loop" in v},
    "wall_seconds": stages.seconds_of(run.workdir, all_stages),
    "notes": [*notes, *_left_out(run)],
  }
  verifiers = {name: run.verifier(name) for name in run.verifier_names}
  likelihoods = frozenset(name for name, verifier in verifiers.items() if verifier.is_likelihood)
  found = {}
  for split, (problems, pool, scores) in by_split.items():
    ns, ks = config.report.ns, config.report.ks
    if split != "eval":
      ns, ks = ns[-1:], ks[-1:]
    found[split] = report.build_results(
      problems,
      pool,
      scores,
      ns=ns,
      ks=ks,
      seed=config.seed,
      meta=meta,
      costs=token_costs(run, problems, pool),
      likelihoods=likelihoods,
      top_scores=config.report.get("top_scores", 0),
    )
  results = found["eval"]
  if "in_distribution" in found:
    results["in_distribution"] = {k: v for k, v in found["in_distribution"].items() if k != "meta"}
  problems, pool, scores = by_split["eval"]
  solved = {n: run.path("candidates", f"by_{n}.jsonl") for n in run.verifier_names}
  results["generation"] = {
    n: report.generation_results(problems, jsonl.read_records(path, Candidate), config.seed, config.report.ns)
    for n, path in solved.items()
    if path.is_file()
  }
  results["samples"] = report.sample_records(problems, pool, scores, likelihoods=likelihoods)
  entries = browse.pick_entries(problems, pool, scores, likelihoods=likelihoods)
  report.write_report(results, run.path("report"), entries=entries)
  say(f"report: {run.path('report', 'index.html')}")


def _left_out(run: Run) -> list[str]:
  """One note for each verifier whose longest training examples were dropped."""
  lines = []
  for name in run.verifier_names:
    path = run.path("metrics", f"{name}.examples.json")
    shape = {"train": dict.fromkeys(("examples", "left_out", "row_length"), int)}
    about = jsonl.read_object(path, shape)["train"] if path.exists() else {"left_out": 0}
    if about["left_out"]:
      lines.append(
        f"{name}: {about['left_out']:,} of {about['examples']:,} training examples exceed a row of "
        f"{about['row_length']} tokens and were left out."
      )
  return lines


def identity(run: Run) -> dict[str, Any]:
  """Metadata that identifies a run in its report: code, task, config, and a digest of what was evaluated."""
  config = run.config
  evaluated = [jsonl.file_digest(run.path(kind, "eval.jsonl")) for kind in ("problems", "candidates")]
  return {
    "code_version": genrm_jax.__version__,
    "task": run.task_name,
    "variant": config.variant,
    "seed": config.seed,
    "config_hash": jsonl.read_object(run.path("config.json"), {"hash": str})["hash"],
    "config": config.to_dict(),
    "bank": jsonl.digest_of(evaluated),
  }


def token_costs(run: Run, problems: Sequence[Problem], pool: Sequence[Candidate]) -> Costs:
  """Numbers of tokens that each method reads and samples, with this run's tokenizer.

  The size of the generator is known only if this run sampled the solutions.
  """
  question = {p.id: p.question for p in problems}
  num_params = sum(gemma.num_params(run.model))

  def lengths(count: Callable[[str, str], int]) -> list[int]:
    of_text = {(c.problem_id, c.text): count(question[c.problem_id], c.text) for c in candidates.distinct(pool)}
    return [of_text[c.problem_id, c.text] for c in pool]

  def tokens_read(name: str) -> Callable[[str, str], int]:
    verifier = run.verifier(name)
    return lambda question, text: verifier.tokens_needed(question, text, max_new_tokens=0)

  return Costs(
    prompt_tokens=[len(run.prompter.solve(p.question)) for p in problems],
    solution_tokens=lengths(lambda _, text: len(run.prompter.solution(text))),
    verifier_tokens={name: lengths(tokens_read(name)) for name in run.verifier_names},
    generator_params=num_params if "candidates" in run.config else None,
    verifier_params=num_params,
  )
