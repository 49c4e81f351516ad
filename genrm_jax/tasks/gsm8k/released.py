"""The released GSM8K solutions and raw rationales as records, in two passes, so that rationales are streamed.

    bad = BadRows()
    release = scan(data_dir, train, rounds, bad)               # problems and their distinct solutions
    for rationale in iter_rationales(data_dir, release, rounds, bad): ...

Problems are GSM8K's train problems, matched by `problem_key`; the release's `question_id` is their index in TFDS.
Labels are the release's. They differ from ours where, for instance, a solution says "The answer is" twice (the release
judged the first) or has decimals (it truncated them); `python -m experiments.studies.gsm8k_answers` lists all.
"""

import dataclasses
from collections.abc import Iterator, Sequence

from genrm_jax.records import Candidate, Problem, Rationale
from genrm_jax.runtime.errors import UserError
from genrm_jax.tasks.gsm8k import answers
from genrm_jax.tasks.gsm8k import problems as gsm8k
from genrm_jax.tasks.gsm8k.rows import BadRows, DirectRow, PathLike, PoolRow, iter_direct, iter_pool

SOURCE = "genrm-critiques"
DIRECT_SOURCE = f"{SOURCE}/direct"

_TWO_LABELS = "same solution with two labels"


@dataclasses.dataclass(frozen=True)
class Release:
  """The problems and candidates of the release.

  Attributes:
    problems: those with solutions, sorted by id.
    candidates: the distinct solutions by problem id: those of the pool in sampling order, then those that only the
      direct set has. A candidate's index is its position there, `correct` the released label, `answer` what
      `answers.extract_answer` reads.
    by_text: the same candidates by problem id and text.
    rounds: the rounds of the pool that were read.
    train: all of GSM8K's train problems, by `problem_key`.
  """

  problems: list[Problem]
  candidates: dict[str, list[Candidate]]
  by_text: dict[str, dict[str, Candidate]]
  rounds: tuple[int, ...]
  train: dict[str, Problem]


def scan(data_dir: PathLike, train: Sequence[Problem], rounds: Sequence[int], bad: BadRows) -> Release:
  """Reads the pool once: problems and their distinct solutions.

  Memory: 0.8 KB per distinct solution (the pool of the full release has some 310,000).

  Args:
    data_dir: the folder that holds a clone of genrm-critiques, or the clone.
    train: GSM8K's train problems, from files or TFDS.
    rounds: which of the four rounds of the pool.
    bad: counts the rows that are left out. Of a solution with two labels the first counts.

  Raises:
    UserError: as `iter_pool` does.
  """
  by_key = {gsm8k.problem_key(p.question): p for p in train}
  found: dict[str, Problem] = {}
  seen: dict[str, dict[str, tuple[int, bool]]] = {}  # by problem id and text: its smallest solution_id, and its label
  for problem, row in _pool_rows(data_dir, rounds, bad, by_key):
    found[problem.id] = problem
    texts = seen.setdefault(problem.id, {})
    solution_id, correct = texts.get(row.solution, (row.solution_id, row.correct))
    if row.correct != correct:
      bad.note(_TWO_LABELS, row.place)
    else:
      texts[row.solution] = (min(solution_id, row.solution_id), correct)
  problems = sorted(found.values(), key=lambda p: p.id)
  candidates: dict[str, list[Candidate]] = {}
  for problem in problems:
    pool = sorted(seen.pop(problem.id).items(), key=lambda item: item[1][0])
    candidates[problem.id] = [_candidate(problem, i, text, label, SOURCE) for i, (text, (_, label)) in enumerate(pool)]
  by_text = {name: {c.text: c for c in pool} for name, pool in candidates.items()}
  return Release(problems, candidates, by_text, tuple(rounds), by_key)


def with_direct_set(release: Release, data_dir: PathLike, bad: BadRows) -> Release:
  """The release with the solutions of the direct set, from both of its splits, after those of the pool.

  They were selected by label (at most 16 of each per problem), and most are in the pool, so they are for training and
  not for evaluation. Their `source` is `DIRECT_SOURCE`.

  Raises:
    UserError: as `iter_direct` does.
  """
  by_text = {name: dict(texts) for name, texts in release.by_text.items()}
  found = {p.id: p for p in release.problems}
  for split in ("train", "val"):
    for row in iter_direct(data_dir, split, bad):
      problem = _problem_of(row, release.train, bad)
      if problem is None:
        continue
      found[problem.id] = problem
      texts = by_text.setdefault(problem.id, {})
      before = texts.get(row.solution)
      if before is None:
        texts[row.solution] = _candidate(problem, len(texts), row.solution, row.correct, DIRECT_SOURCE)
      elif before.correct != row.correct:
        bad.note(_TWO_LABELS, row.place)
  return dataclasses.replace(
    release,
    problems=sorted(found.values(), key=lambda p: p.id),
    candidates={name: list(texts.values()) for name, texts in by_text.items()},
    by_text=by_text,
  )


def iter_rationales(data_dir: PathLike, release: Release, rounds: Sequence[int], bad: BadRows) -> Iterator[Rationale]:
  """Reads the pool again: its raw rationales, by round; a rationale's index counts those of its candidate.

  They are as released: `kept` is True and `verdict` None for all; reading and filtering come later.

  Args:
    data_dir: as in `scan`.
    release: the result of `scan`.
    rounds: all or some of the rounds that `scan` read.
    bad: counts the rows that are left out, as in `scan`; the counts of a file restart.

  Raises:
    UserError: as `scan` does, or if the files have changed since `scan` read them.
  """
  counts = {name: [0] * len(pool) for name, pool in release.candidates.items()}
  for problem, row in _pool_rows(data_dir, rounds, bad, release.train):
    candidate = release.by_text.get(problem.id, {}).get(row.solution)
    if candidate is None:
      raise UserError(
        f"{row.place}: a solution that is new since rounds {', '.join(map(str, release.rounds))} were first read; did "
        "the file change meanwhile? Run the command again"
      )
    if candidate.correct != row.correct:
      bad.note(_TWO_LABELS, row.place)
      continue
    index = counts[problem.id][candidate.index]
    counts[problem.id][candidate.index] += 1
    source = f"{SOURCE}/round-{row.round}"
    yield Rationale(problem.id, candidate.index, index, row.rationale, None, source, kept=True)


def _candidate(problem: Problem, index: int, text: str, correct: bool, source: str) -> Candidate:
  return Candidate(problem.id, index, text, answers.extract_answer(text), correct, source)


def _pool_rows(
  data_dir: PathLike, rounds: Sequence[int], bad: BadRows, train: dict[str, Problem]
) -> Iterator[tuple[Problem, PoolRow]]:
  """The pool's rows with their problems. Rows whose target is not the problem's answer are left out."""
  for row in iter_pool(data_dir, rounds, bad):
    if problem := _problem_of(row, train, bad):
      if answers.same_answer(row.target, problem.answer):
        yield problem, row
      else:
        bad.note("target is not GSM8K's answer", row.place)


def _problem_of(row: PoolRow | DirectRow, train: dict[str, Problem], bad: BadRows) -> Problem | None:
  problem = train.get(gsm8k.problem_key(row.question))
  if problem is None:
    bad.note("question is no GSM8K train problem", row.place)
  return problem
