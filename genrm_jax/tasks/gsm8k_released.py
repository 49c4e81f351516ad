"""The GSM8K data that the paper's authors released (github.com/genrm-star/genrm-critiques), read as a stream.

    critiques/rm_{correct,incorrect}_solutions_batch_NN[_val].zip         (problem, solution, Yes/No): `iter_direct`
    critiques/critiques_{correct,incorrect}_solutions_batch_NN[_val].zip  the same with a rationale: `iter_critiques`
    critiques/data_collection/critique_gen_*_round_R_shard_S.jsonl.gz     raw rationales, four per solution: `iter_pool`

Problems are GSM8K's train problems, matched by `problem_key`; the release's `question_id` is their index in TFDS.
Labels are the release's: of solutions that say "The answer is" twice, say, it judged the first (0.3% differ from ours).
"""

import bisect
import contextlib
import dataclasses
import gzip
import io
import os
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from etils import epath

from genrm_jax.errors import UserError
from genrm_jax.tasks import gsm8k
from genrm_jax.tasks.gsm8k import json_object, problem_key, text_field
from genrm_jax.types import Candidate, Problem, Rationale

PathLike = str | os.PathLike[str]

SOURCE = "genrm-critiques"
ROUNDS = (0, 1, 2, 3)

_FOLDERS = ("genrm-critiques/critiques", "critiques", "")
_CLONE = "git clone https://github.com/genrm-star/genrm-critiques"
_QUESTION, _SOLUTION = "\n\nQ: ", "\nA: Let's think step by step.\n"
_ASK, _ASK_COT = "\nVerification: Is the answer correct (Yes/No)?", "\nVerification: Let's verify step by step."
_LABELS = {" Yes": True, " No": False}


class DirectRow(NamedTuple):
  """A solution and whether its final answer is right."""

  question: str
  solution: str
  correct: bool


class CritiqueRow(NamedTuple):
  """A solution and a filtered rationale, which ends in the verdict."""

  question: str
  solution: str
  rationale: str
  correct: bool


class PoolRow(NamedTuple):
  """A solution and one raw, unfiltered rationale; `round` tells which of the four."""

  question: str
  solution: str
  solution_id: int
  extracted_answer: str
  correct: bool
  rationale: str
  round: int
  shard: int
  question_id: int
  path: str
  line: int


@dataclasses.dataclass
class PooledSolution:
  """A solution of the pool, once, with its raw rationales as (round, text), by round."""

  question: str
  text: str
  solution_id: int
  extracted_answer: str
  correct: bool
  rationales: list[tuple[int, str]]


def iter_direct(data_dir: PathLike, split: str = "train") -> Iterator[DirectRow]:
  """The rows of the direct Yes/No set, correct solutions first.

  Args:
    data_dir: the folder that holds a clone of genrm-critiques, or the clone.
    split: "train" or "val", the release's own split of rows (not of problems).

  Raises:
    UserError: no such files, a damaged one, or a row of another form.
  """
  for path in _batches(data_dir, "rm", split):
    for row, place in _zip_rows(path):
      question, solution = _parse_inputs(text_field(row, "inputs", place), _ASK, place)
      target = text_field(row, "targets", place)
      if target not in _LABELS:
        raise UserError(f'{place}: "targets" is {target[:40]!r}, expected " Yes" or " No"; {_CLONE} anew')
      yield DirectRow(question, solution, _LABELS[target])


def iter_critiques(data_dir: PathLike, split: str = "val") -> Iterator[CritiqueRow]:
  """The rows of the CoT set, correct solutions first; arguments and errors as in `iter_direct`."""
  for path in _batches(data_dir, "critiques", split):
    correct = "_correct_" in path.name
    for row, place in _zip_rows(path):
      question, solution = _parse_inputs(text_field(row, "inputs", place), _ASK_COT, place)
      yield CritiqueRow(question, solution, text_field(row, "targets", place), correct)


def iter_pool(data_dir: PathLike, rounds: Sequence[int] = (0,)) -> Iterator[PoolRow]:
  """The raw pool: all rows of these rounds, by round, shard, and correct solutions first.

  Raises:
    UserError: no file of one of the rounds, a damaged file, or a row of another form.
  """
  for number in rounds:
    for path, shard in _shards(data_dir, number):
      for row, place, line in _gzip_rows(path):
        yield PoolRow(
          question=text_field(row, "question", place),
          solution=text_field(row, "model_output", place),
          solution_id=_int_field(row, "model_output_id", place),
          extracted_answer=text_field(row, "extracted_answer", place),
          correct=_label(row, place),
          rationale=text_field(row, "verifier_output", place),
          round=number,
          shard=shard,
          question_id=_int_field(row, "question_id", place),
          path=str(path),
          line=line,
        )


def load_pools(data_dir: PathLike, rounds: Sequence[int] = ROUNDS) -> dict[str, list[PooledSolution]]:
  """The pool by problem (`problem_key`): each distinct solution once, in the order in which it was sampled.

  All of it is held in memory, about 1.5 KB a rationale. Errors as in `iter_pool`.
  """
  return _collect(iter_pool(data_dir, rounds))


def read_released(
  data_dir: PathLike, max_problems: int | None = None, rounds: Sequence[int] = ROUNDS
) -> tuple[list[Problem], list[Candidate], list[Rationale]]:
  """The pool as records: GSM8K train problems, their candidates, and the raw rationales, in the order of the problems.

  A candidate's index counts a problem's distinct solutions in the order in which they were sampled; a rationale's
  counts those of its candidate. Rationales are as released: `kept` is True and `verdict` None for all, reading and
  filtering come later. `correct` is the released label, `answer` what `gsm8k.extract_answer` reads.

  Args:
    data_dir: the folder that holds the clones of genrm-critiques and grade-school-math.
    max_problems: the first so many problems, by id; None for all. Memory grows with these, time does not.
    rounds: which of the four rounds of rationales.

  Raises:
    UserError: as `iter_pool` and `gsm8k.read_problems` do; or for a question that is no GSM8K train problem.
  """
  train = {problem_key(p.question): p for p in gsm8k.read_problems(data_dir, "train")}
  pools = _collect(_of_first_problems(iter_pool(data_dir, rounds), train, max_problems))
  keys = sorted(pools, key=lambda key: train[key].id)[:max_problems]
  candidates: list[Candidate] = []
  rationales: list[Rationale] = []
  for key in keys:
    for index, solution in enumerate(pools.pop(key)):
      answer = gsm8k.extract_answer(solution.text)
      candidates.append(Candidate(train[key].id, index, solution.text, answer, solution.correct, SOURCE))
      rationales.extend(
        Rationale(train[key].id, index, i, text, None, f"{SOURCE}/round-{number}", True)
        for i, (number, text) in enumerate(solution.rationales)
      )
  return [train[key] for key in keys], candidates, rationales


def _of_first_problems(
  rows: Iterator[PoolRow], train: dict[str, Problem], max_problems: int | None
) -> Iterator[PoolRow]:
  """The rows that can still belong to the first `max_problems` problems, by id, of all that come."""
  first: list[str] = []  # the ids of the first problems so far, sorted
  for row in rows:
    problem = train.get(problem_key(row.question))
    if problem is None:
      raise UserError(
        f"{row.path}:{row.line}: the question is no GSM8K train problem: {row.question[:60]!r}; "
        f"are both clones complete? {_CLONE}"
      )
    if max_problems is not None:
      place = bisect.bisect_left(first, problem.id)
      if place >= max_problems:
        continue
      if first[place : place + 1] != [problem.id]:
        first.insert(place, problem.id)
        del first[max_problems:]
    yield row


def _collect(rows: Iterator[PoolRow]) -> dict[str, list[PooledSolution]]:
  pools: dict[str, dict[str, PooledSolution]] = {}
  for row in rows:
    pool = pools.setdefault(problem_key(row.question), {})
    solution = pool.get(row.solution)
    if solution is None:
      solution = PooledSolution(row.question, row.solution, row.solution_id, row.extracted_answer, row.correct, [])
      pool[row.solution] = solution
    solution.solution_id = min(solution.solution_id, row.solution_id)
    solution.rationales.append((row.round, row.rationale))
  return {key: sorted(pool.values(), key=lambda s: s.solution_id) for key, pool in pools.items()}


def _parse_inputs(inputs: str, ask: str, place: str) -> tuple[str, str]:
  """The question and solution of `instruction, Q: ..., A: Let's think step by step. ..., Verification: ...`."""
  _, is_question, rest = inputs.partition(_QUESTION)
  question, is_solution, rest = rest.partition(_SOLUTION)
  solution, asked, after = rest.rpartition(ask)
  if not (is_question and is_solution and asked) or after.strip():
    raise UserError(
      f'{place}: "inputs" is not of the form "Q: ... A: Let\'s think step by step. ... {ask.strip()}"; {_CLONE} anew'
    )
  return question, solution


def _int_field(row: dict[str, Any], name: str, place: str) -> int:
  value = row.get(name)
  if type(value) is not int:
    raise UserError(f'{place}: field "{name}" is {value!r:.40}, expected a whole number; {_CLONE} anew')
  return value


def _label(row: dict[str, Any], place: str) -> bool:
  value = _int_field(row, "correctness", place)
  if value not in (0, 1):
    raise UserError(f'{place}: field "correctness" is {value}, expected 0 or 1; {_CLONE} anew')
  return bool(value)


def _batches(data_dir: PathLike, kind: str, split: str) -> list[epath.Path]:
  """The zip files of a set and split, correct solutions first."""
  if split not in ("train", "val"):
    raise UserError(f"the released data has no split {split!r}; it has train and val")
  name = re.compile(rf"{kind}_(correct|incorrect)_solutions_batch_(\d+){'_val' if split == 'val' else ''}\.zip")
  folder = _folder(data_dir)
  found = [(m[1], int(m[2]), p) for p in folder.iterdir() if (m := name.fullmatch(p.name))]
  for label in ("correct", "incorrect"):
    if label not in {f[0] for f in found}:
      pattern = f"{kind}_{label}_solutions_batch_*{'_val' if split == 'val' else ''}.zip"
      raise UserError(f"no file {folder / pattern}; {_CLONE}")
  return [path for _, _, path in sorted(found, key=lambda f: f[:2])]


def _shards(data_dir: PathLike, number: int) -> list[tuple[epath.Path, int]]:
  """The files of a round with their shard numbers, by shard, correct solutions first."""
  folder = _folder(data_dir) / "data_collection"
  name = re.compile(rf"critique_gen_(correct|incorrect)_solutions_round_{number}_shard_(\d+)\.jsonl\.gz")
  files = folder.iterdir() if folder.exists() else ()
  found = {(int(m[2]), m[1]): p for p in files if (m := name.fullmatch(p.name))}
  missing = [
    (shard, label) for shard, _ in found for label in ("correct", "incorrect") if (shard, label) not in found
  ] or ([] if found else [(0, "correct")])
  if missing:
    shard, label = missing[0]
    wanted = folder / f"critique_gen_{label}_solutions_round_{number}_shard_{shard}.jsonl.gz"
    raise UserError(f"no file {wanted}; {_CLONE}")
  return [(found[key], key[0]) for key in sorted(found)]


def _folder(data_dir: PathLike) -> epath.Path:
  places = [epath.Path(data_dir) / folder for folder in _FOLDERS]
  found = next((p for p in places if (p / "data_collection").exists() or any(p.glob("rm_*.zip"))), None)
  if found is None:
    raise UserError(
      f"no released GenRM data; looked in {', '.join(str(p) for p in places)}; "
      f"{_CLONE} {epath.Path(data_dir) / 'genrm-critiques'}"
    )
  return found


def _zip_rows(path: epath.Path) -> Iterator[tuple[dict[str, Any], str]]:
  """The rows of the JSONL file in a zip, each with its place."""
  with _damage(path), path.open("rb") as file, zipfile.ZipFile(file) as archive:
    names = [n for n in archive.namelist() if n.endswith(".jsonl") and not n.startswith("__MACOSX")]
    if len(names) != 1:
      raise UserError(f"{path}: holds {len(names)} JSONL files, expected one; {_CLONE} anew")
    with archive.open(names[0]) as lines:
      for number, line in enumerate(lines, start=1):
        place = f"{path}/{names[0]}:{number}"
        yield json_object(line, place), place


def _gzip_rows(path: epath.Path) -> Iterator[tuple[dict[str, Any], str, int]]:
  """The rows of a JSONL file under gzip, each with its place and line number."""
  with _damage(path), path.open("rb") as file, gzip.GzipFile(fileobj=file) as lines:
    for number, line in enumerate(io.BufferedReader(lines), start=1):
      place = f"{path}:{number}"
      yield json_object(line, place), place, number


@contextlib.contextmanager
def _damage(path: epath.Path) -> Iterator[None]:
  """Turns what a cut or changed archive raises into a UserError."""
  try:
    yield
  except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as e:
    raise UserError(f"{path}: damaged or cut short ({e}); {_CLONE} anew, with git-lfs where it asks for it") from e
