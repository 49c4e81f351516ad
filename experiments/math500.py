r"""Easy-to-hard generalization: verifiers trained on GSM8K select among solutions to harder problems.

    python -m experiments.math500 --config=experiments/configs/math500.py:tiny --workdir=DIR \
      --config.verifier=RUN/checkpoints/genrm_cot --config.problems=FILE --config.solutions=FILE

Nothing is trained. Candidates are graded by their boxed answers, and each verifier scores them with the number of votes
and the sampling settings of this config.
"""

import collections
import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import genrm_jax
from genrm_jax.data import jsonl, readers
from genrm_jax.evals import browse, report
from genrm_jax.model import gemma
from genrm_jax.model.config import ModelConfig
from genrm_jax.pipeline import checks, cli, stages, verifier_stages
from genrm_jax.pipeline.run import Run
from genrm_jax.pipeline.stages import Stage
from genrm_jax.pipeline.trained import verifier_of
from genrm_jax.records import Candidate
from genrm_jax.runtime.errors import UserError
from genrm_jax.runtime.progress import progress, say
from genrm_jax.tasks.math500 import equality
from genrm_jax.tasks.math500 import problems as math500
from genrm_jax.training import saved
from genrm_jax.verifiers.base import VoteConfig, verifier_class

_PROBLEMS, _CANDIDATES, _LEDGER = "problems/eval.jsonl", "candidates/eval.jsonl", "candidates/ledger.json"
_LEDGER_SHAPE = {"library": str, "not_used": int, "answers": {}, "comparisons": {}, "not_compared": list} | {
  "labelled_by_file": int,
  "labelled_otherwise": list,
}


class Given(NamedTuple):
  """A verifier of the config: its name in the report, the path of its checkpoint, and the manifest there."""

  name: str
  path: str
  manifest: dict[str, Any]


def given_verifiers(run: Run) -> list[Given]:
  """The verifiers that the config names; verifiers of equal name are numbered.

  Raises:
    UserError: none is named, or a path is not the checkpoint of a verifier.
  """
  paths = [_absolute(path.strip()) for path in run.config.verifier.split(",") if path.strip()]
  if not paths:
    raise UserError(
      "set --config.verifier=RUN/checkpoints/NAME to a trained verifier (or several, separated by commas)"
    )
  manifests = [saved.first_whole(saved.find(path), saved.read_manifest)[0] for path in paths]
  for path, manifest in zip(paths, manifests, strict=True):
    if manifest["verifier"] is None:
      raise UserError(f"{path} is a run's {manifest['run']}, not a verifier; give the path of a verifier")
  names = [m["verifier"]["name"] for m in manifests]
  out = []
  for i, (path, manifest) in enumerate(zip(paths, manifests, strict=True)):
    number = f"_{names[: i + 1].count(names[i])}" if names.count(names[i]) > 1 else ""
    out.append(Given(f"{names[i]}{number}", path, manifest))
  return out


def _absolute(path: str) -> str:
  """Makes a local path absolute, so that a run resumed from another folder reads the same file."""
  return path if "://" in path else str(pathlib.Path(path).expanduser().absolute())


def source_files(run: Run) -> tuple[str, str]:
  """Paths of problems and solutions; the smoke variant has its own in the workdir."""
  if run.config.variant == "smoke":
    return str(run.path("data", "problems.jsonl")), str(run.path("data", "solutions.jsonl"))
  for key in ("problems", "solutions"):
    if not run.config[key]:
      raise UserError(f"set --config.{key}=FILE, the file of {key}")
  return _absolute(run.config.problems), _absolute(run.config.solutions)


def write_sums(problems: jsonl.PathLike, solutions: jsonl.PathLike) -> None:
  """Writes a few sums with boxed answers, each with a correct and an incorrect solution."""
  sums = [(a, a + 3) for a in range(4, 8)]
  questions = [f"Find ${a} + {b}$." for a, b in sums]
  right = [f"${a} + {b} = {a + b}$, so the answer is $\\boxed{{{a + b}}}$." for a, b in sums]
  wrong = [f"We count on from {b}: $\\boxed{{{b + 1}}}$." for _, b in sums]
  jsonl.write_bytes(
    problems,
    _lines(
      {"problem": q, "solution": y, "answer": str(a + b), "subject": "Sums", "level": 1, "unique_id": f"sum/{a}.json"}
      for (a, b), q, y in zip(sums, questions, right, strict=True)
    ),
  )
  jsonl.write_bytes(
    solutions, _lines({"problem": q, "solution": y} for q, y in zip(questions * 2, right + wrong, strict=True))
  )


def _lines(rows: Iterable[dict[str, Any]]) -> bytes:
  return "".join(json.dumps(row) + "\n" for row in rows).encode()


def read_problems(run: Run) -> None:
  """Reads the problems from their file into the workdir."""
  problems, solutions = source_files(run)
  if run.config.variant == "smoke":
    write_sums(problems, solutions)
  jsonl.write_records(run.path(_PROBLEMS), math500.read_problems(problems))


def grade_solutions(run: Run) -> None:
  """Extracts and grades the answers of the solutions; writes candidates and a ledger."""
  c = run.config.task
  problems = run.problems("eval")
  solutions = readers.read_solutions(source_files(run)[1], problems)
  graded: list[math500.Graded] = []
  labels: dict[tuple[str, int], bool] = {}
  with equality.MathEqual(c.comparison_seconds) as equal, progress("grade", len(problems)) as advance:
    for problem in problems:
      chosen = solutions[problem.id][: c.num_candidates]
      graded += math500.grade(problem, chosen, equal)
      labels |= {(problem.id, i): s.correct for i, s in enumerate(chosen) if s.correct is not None}
      advance()
  jsonl.write_records(run.path(_CANDIDATES), [g.candidate for g in graded])
  checks.check_pools(run)
  jsonl.write_json(run.path(_LEDGER), _ledger(graded, labels, equal.counts, sum(map(len, solutions.values()))))
  say(f"pass@1 {sum(g.candidate.correct for g in graded) / len(graded):.3f} over {len(graded)} solutions")


def _ledger(
  graded: Sequence[math500.Graded], labels: dict[tuple[str, int], bool], comparisons: dict[str, int], in_file: int
) -> dict[str, Any]:
  """Counts of extracted answers, comparisons and unused solutions; `labels` are those in the file."""

  def names(chosen: Iterable[Candidate]) -> list[dict[str, Any]]:
    return [{"problem_id": c.problem_id, "index": c.index} for c in chosen]

  def disagrees(g: math500.Graded) -> bool:
    return labels.get((g.candidate.problem_id, g.candidate.index), bool(g.equal)) != bool(g.equal)

  return {
    "library": equality.version(),
    "not_used": in_file - len(graded),
    "answers": dict(collections.Counter(g.where for g in graded)),
    "comparisons": dict(comparisons),
    "not_compared": names(g.candidate for g in graded if g.equal is None),
    "labelled_by_file": len(labels),
    "labelled_otherwise": names(g.candidate for g in graded if disagrees(g)),
  }


def score(run: Run, given: Given) -> None:
  """Scores all candidates with one verifier and the votes of this config."""
  c = run.config
  trained = genrm_jax.load(given.path, mesh=run.engine_mesh, rows_per_batch=c.engine.rows_per_batch)
  named = {**given.manifest, "verifier": {**given.manifest["verifier"], "name": given.name}}
  verifier = verifier_of(named, trained.verifier.prompter)
  trained = dataclasses.replace(
    trained,
    verifier=verifier,
    engine=dataclasses.replace(trained.engine, max_tokens=c.engine.max_tokens),
    how=VoteConfig(verifier.num_votes(c.votes.num_votes), c.seed, run.sample_config("votes")),
  )
  try:
    file = run.scores_file(given.name, "eval")
    verifier_stages.write_scores(run, trained, file, run.problems("eval"), run.candidates("eval"))
  except UserError as e:
    raise UserError(f"{given.path} cannot score these problems: {e}") from e


def write_report(run: Run, given: Sequence[Given], all_stages: Sequence[Stage]) -> None:
  """Writes report/: report.md, index.html, results.json and figures."""
  config = run.config
  problems, pool = run.problems("eval"), run.candidates("eval")
  scores = {g.name: run.scores(g.name, "eval") for g in given}
  ledger = jsonl.read_object(run.path(_LEDGER), _LEDGER_SHAPE)
  meta = {
    **verifier_stages.identity(run),
    "verifiers": {g.name: g.path for g in given},
    "wall_seconds": stages.seconds_of(run.workdir, all_stages),
    "notes": [*map(_trained_on, given), *_grading_notes(ledger)],
  }
  likelihoods = frozenset(g.name for g in given if verifier_class(g.manifest["verifier"]["kind"]).is_likelihood)
  results = report.build_results(
    *(problems, pool, scores),
    ns=config.report.ns,
    ks=config.report.ks,
    seed=config.seed,
    meta=meta,
    likelihoods=likelihoods,
    top_scores=config.report.get("top_scores", 0),
  )
  results["samples"] = report.sample_records(problems, pool, scores, likelihoods=likelihoods)
  entries = browse.pick_entries(problems, pool, scores, likelihoods=likelihoods)
  report.write_report(results, run.path("report"), entries=entries)
  say(f"report: {run.path('report', 'index.html')}")


def _trained_on(given: Given) -> str:
  m = given.manifest
  size = sum(gemma.num_params(ModelConfig.from_dict(m["model"])))
  return (
    f"{given.name} was trained elsewhere, on {m['task']}, and not on these problems: {given.path}, "
    f"{m['model']['name']}, {size:,} parameters, from {m['init_from']}; prompts {m['prompts']['name']}."
  )


def _grading_notes(ledger: dict[str, Any]) -> list[str]:
  def counted(table: dict[str, int]) -> str:
    return ", ".join(f"{n:,} {what}" for what, n in table.items()) or "none"

  notes = [
    f"Answers of the solutions: {counted(ledger['answers'])}. Comparisons of distinct answers, by "
    f"{ledger['library']}: {counted(ledger['comparisons'])}. Answers that the library finds equal vote together."
  ]
  if ledger["not_compared"]:
    notes.append(
      f"{len(ledger['not_compared']):,} solutions could not be compared with the right answer (time, memory or length) "
      "and count as wrong; candidates/ledger.json names them."
    )
  if ledger["labelled_by_file"]:
    notes.append(
      f"The file has labels for {ledger['labelled_by_file']:,} solutions, which are used; the comparison disagrees on "
      f"{len(ledger['labelled_otherwise']):,}, which candidates/ledger.json names."
    )
  if ledger["not_used"]:
    notes.append(f"{ledger['not_used']:,} solutions of the file are beyond task.num_candidates and were not used.")
  return notes


def make_stages(run: Run) -> list[Stage]:
  """All stages, in order."""
  given = given_verifiers(run)
  run.sample_config("votes")
  equality.check_installed()
  problems, solutions = source_files(run)
  made: tuple[str, ...] = ()
  if run.config.variant == "smoke":
    made = "data/problems.jsonl", "data/solutions.jsonl"
  else:
    for path in (problems, solutions):
      if "://" not in path and not pathlib.Path(path).is_file():
        raise UserError(f"{path}: no such file; check --config.problems and --config.solutions")
  before = [
    Stage(
      "problems",
      functools.partial(read_problems, run),
      writes=(*made, _PROBLEMS),
      sources={} if made else _local("problems", problems),
      settings=("task",),
    ),
    Stage(
      "candidates",
      functools.partial(grade_solutions, run),
      reads=(_PROBLEMS, *made[1:]),
      writes=(_CANDIDATES, _LEDGER),
      sources={} if made else _local("solutions", solutions),
      settings=("task",),
    ),
  ]
  scored = tuple(run.scores_file(g.name, "eval") for g in given)
  settings = ("seed", "votes", "engine.max_tokens")
  for g, file in zip(given, scored, strict=True):
    work, data = functools.partial(score, run, g), (_PROBLEMS, _CANDIDATES)
    before.append(
      Stage(f"score_{g.name}", work, data, (file,), _local(f"verifier.{g.name}", g.path), settings, uses_devices=True)
    )
  writes = tuple(f"report/{name}" for name in ("results.json", "report.md", "index.html"))
  report = functools.partial(write_report, run, given, before)
  return [
    *before,
    Stage("report", report, (_PROBLEMS, _CANDIDATES, _LEDGER, *scored), writes, settings=("report", "seed")),
  ]


def _local(setting: str, path: str) -> dict[str, str]:
  """Stage.sources of a local path. Remote ones are not compared when the run resumes."""
  return {} if "://" in path else {setting: path}


if __name__ == "__main__":
  cli.main("math500", make_stages)
