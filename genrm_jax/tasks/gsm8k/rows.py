"""Streams the rows of the released GSM8K data (github.com/genrm-star/genrm-critiques) and counts the bad ones.

    critiques/rm_{correct,incorrect}_solutions_batch_NN[_val].zip         (problem, solution, Yes/No): `iter_direct`
    critiques/critiques_{correct,incorrect}_solutions_batch_NN[_val].zip  the same with a rationale: `iter_critiques`
    critiques/data_collection/critique_gen_*_round_R_shard_S.jsonl.gz     raw rationales, four per solution: `iter_pool`

A row that cannot be used is left out and counted by file and reason (`BadRows`); a file that is damaged, missing or
full of such rows raises a UserError.
"""

import contextlib
import dataclasses
import functools
import gzip
import io
import json
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any, NamedTuple, TypeVar

from etils import epath

from genrm_jax.runtime.errors import UserError
from genrm_jax.text.prompts import RELEASED
from genrm_jax.text.unicode import half_pair

PathLike = str | os.PathLike[str]
Row = TypeVar("Row")

MAX_ROW_BYTES = 1 << 20  # the longest row of the release has 10 KB
MAX_BAD_SHARE = 0.05

_FOLDERS = ("genrm-critiques/critiques", "critiques", "")
CLONE = "git clone https://github.com/genrm-star/genrm-critiques"
_QUESTION, _SOLUTION = "\n\nQ: ", "\nA: Let's think step by step.\n"
_ASK, _ASK_COT = RELEASED.render(RELEASED.verify), RELEASED.verify_cot.rstrip()
_LABELS = {" Yes": True, " No": False}
_OTHER_FILE = "label disagrees with the file's name"
_NUM_PLACES = 3


class Place(NamedTuple):
  """A line of a file; of a zip, the file is `archive.zip/name.jsonl`."""

  file: str
  line: int

  def __str__(self) -> str:
    return f"{self.file}:{self.line}"


class DirectRow(NamedTuple):
  """A solution and whether its final answer is right."""

  question: str
  solution: str
  correct: bool
  place: Place


class CritiqueRow(NamedTuple):
  """A solution and a filtered rationale, which ends with the verdict."""

  question: str
  solution: str
  rationale: str
  correct: bool
  place: Place


class PoolRow(NamedTuple):
  """A solution and one raw, unfiltered rationale; `round` says which of the four."""

  question: str
  solution: str
  solution_id: int
  extracted_answer: str
  target: str
  correct: bool
  rationale: str
  round: int
  place: Place


class RowError(Exception):
  """Why a row cannot be used."""


@dataclasses.dataclass
class _Tally:
  """One file: its number of rows (0 until it is read to the end), and the bad ones by reason."""

  num_rows: int = 0
  lines: dict[str, list[int]] = dataclasses.field(default_factory=dict)
  counts: dict[str, int] = dataclasses.field(default_factory=dict)


class BadRows:
  """Counts the rows that were left out, by file and reason. Counts of a file restart when it is read again."""

  def __init__(self) -> None:
    self._tallies: dict[str, _Tally] = {}

  def begin(self, file: str) -> None:
    """Starts the counts of a file."""
    self._tallies[file] = _Tally()

  def note(self, reason: str, place: Place) -> None:
    """Counts a row that was left out."""
    tally = self._tallies.setdefault(place.file, _Tally())
    tally.counts[reason] = tally.counts.get(reason, 0) + 1
    if tally.counts[reason] <= _NUM_PLACES:
      tally.lines.setdefault(reason, []).append(place.line)

  def end(self, file: str, num_rows: int) -> None:
    """Ends the counts of a file. Raises UserError if it has no row, or as `check` does."""
    if not num_rows:
      raise UserError(f"{file}: holds no row; {CLONE} again")
    self._tallies[file].num_rows = num_rows
    self._check(file)

  def check(self) -> None:
    """Raises UserError if more than 5% of the rows of a file are bad, so that it must be the wrong file or damaged."""
    for file in self._tallies:
      self._check(file)

  def _check(self, file: str) -> None:
    tally = self._tallies[file]
    bad = sum(tally.counts.values())
    if tally.num_rows and bad > MAX_BAD_SHARE * tally.num_rows:
      reason = max(tally.counts, key=lambda r: tally.counts[r])
      raise UserError(
        f"{file}: {bad} of {tally.num_rows} rows cannot be used, most of them because: {reason} (first in line "
        f"{tally.lines[reason][0]}); is this the right file? {CLONE} again"
      )

  def to_dict(self) -> dict[str, Any]:
    """The number of rows read and left out, and per file with any their number and first lines by reason."""
    files = {
      file: {
        "rows": t.num_rows,
        "left_out": {r: {"rows": n, "first_lines": t.lines[r]} for r, n in sorted(t.counts.items())},
      }
      for file, t in sorted(self._tallies.items())
      if t.counts
    }
    return {
      "rows": sum(t.num_rows for t in self._tallies.values()),
      "left_out": sum(sum(t.counts.values()) for t in self._tallies.values()),
      "files": files,
    }


def json_object(line: bytes) -> dict[str, Any]:
  """The object in a line of JSONL; RowError where there is none."""
  if len(line) > MAX_ROW_BYTES:
    raise RowError(f"longer than {MAX_ROW_BYTES} bytes")
  try:
    row = json.loads(line)
  except (ValueError, RecursionError) as e:
    raise RowError("not JSON") from e
  if not isinstance(row, dict):
    raise RowError("not a JSON object")
  if any(isinstance(text, str) and half_pair(text) for text in row.values()):
    raise RowError("half of a surrogate pair in a text")
  return row


def text_field(row: dict[str, Any], name: str) -> str:
  """A text field of a row; RowError where it is missing or not text."""
  value = row.get(name)
  if not isinstance(value, str):
    raise RowError(f'field "{name}" is {"not text" if name in row else "missing"}')
  return value


def iter_direct(data_dir: PathLike, split: str, bad: BadRows) -> Iterator[DirectRow]:
  """The rows of the direct Yes/No set, correct solutions first.

  Args:
    data_dir: the folder that holds a clone of genrm-critiques, or the clone.
    split: "train" or "val", the release's own split of rows (not of problems).
    bad: counts the rows that are left out.

  Raises:
    UserError: no such files, or one that is damaged or has too many bad rows.
  """
  for path in _batches(data_dir, "rm", split):
    yield from _zip_rows(path, functools.partial(_direct_row, _is_of_correct(path)), bad)


def iter_critiques(data_dir: PathLike, split: str, bad: BadRows) -> Iterator[CritiqueRow]:
  """The rows of the CoT set, correct solutions first; arguments and errors as in `iter_direct`."""
  for path in _batches(data_dir, "critiques", split):
    yield from _zip_rows(path, functools.partial(_critique_row, _is_of_correct(path)), bad)


def iter_pool(data_dir: PathLike, rounds: Sequence[int], bad: BadRows) -> Iterator[PoolRow]:
  """The raw pool: all rows of these rounds, by round, then shard, correct solutions first.

  A row whose label contradicts its own `extracted_answer` and `target` is left out: in the release they never disagree,
  so one of the three was changed, and there is no telling which.

  Raises:
    UserError: a round has no file, or lacks a shard that another round has; or as `iter_direct` does.
  """
  for number, path in _pool_files(data_dir, rounds):
    parse = functools.partial(_pool_row, number, _is_of_correct(path))
    with _damage(path), path.open("rb") as file, gzip.GzipFile(fileobj=file) as stream:
      yield from _rows(stream, str(path), parse, bad)


def _direct_row(of_correct: bool, row: dict[str, Any], place: Place) -> DirectRow:
  question, solution = _parse_inputs(text_field(row, "inputs"), _ASK)
  target = text_field(row, "targets")
  if target not in _LABELS:
    raise RowError('field "targets" is not " Yes" or " No"')
  if _LABELS[target] != of_correct:
    raise RowError(_OTHER_FILE)
  return DirectRow(question, solution, of_correct, place)


def _critique_row(of_correct: bool, row: dict[str, Any], place: Place) -> CritiqueRow:
  question, solution = _parse_inputs(text_field(row, "inputs"), _ASK_COT)
  return CritiqueRow(question, solution, _full_field(row, "targets", "rationale"), of_correct, place)


def _pool_row(number: int, of_correct: bool, row: dict[str, Any], place: Place) -> PoolRow:
  label = _int_field(row, "correctness")
  if label not in (0, 1):
    raise RowError('field "correctness" is not 0 or 1')
  answer, target = text_field(row, "extracted_answer"), text_field(row, "target")
  if (answer == target) != (label == 1):
    raise RowError("label disagrees with extracted_answer and target")
  if (label == 1) != of_correct:
    raise RowError(_OTHER_FILE)
  return PoolRow(
    question=text_field(row, "question"),
    solution=_full_field(row, "model_output", "solution"),
    solution_id=_int_field(row, "model_output_id"),
    extracted_answer=answer,
    target=target,
    correct=of_correct,
    rationale=_full_field(row, "verifier_output", "rationale"),
    round=number,
    place=place,
  )


def _rows(stream: Any, file: str, parse: Callable[[dict[str, Any], Place], Row], bad: BadRows) -> Iterator[Row]:
  """The rows of a JSONL stream that `parse` accepts; counts the others."""
  bad.begin(file)
  number = 0
  for number, line in enumerate(_lines(io.BufferedReader(stream, 1 << 16)), start=1):
    place = Place(file, number)
    try:
      row = parse(json_object(line), place)
    except RowError as e:
      bad.note(str(e), place)
      continue
    yield row
  bad.end(file, number)


def _lines(stream: IO[bytes]) -> Iterator[bytes]:
  """Lines in bounded memory: of a line longer than `MAX_ROW_BYTES` the rest is skipped."""
  while line := stream.readline(MAX_ROW_BYTES + 1):
    yield line
    while len(line) > MAX_ROW_BYTES and not line.endswith(b"\n"):
      line = stream.readline(MAX_ROW_BYTES + 1)
      if len(line) <= MAX_ROW_BYTES:
        break


def _parse_inputs(inputs: str, request: str) -> tuple[str, str]:
  """The question and solution of `instruction, Q: ..., A: Let's think step by step. ..., Verification: ...`."""
  _, is_question, rest = inputs.partition(_QUESTION)
  question, is_solution, rest = rest.partition(_SOLUTION)
  solution, is_request, after = rest.rpartition(request)
  if not (is_question and is_solution and is_request) or after.strip():
    raise RowError(f'field "inputs" is not of the form "Q: ... A: Let\'s think step by step. ... {request.strip()}"')
  if not solution.strip():
    raise RowError("empty solution")
  return question, solution


def _int_field(row: dict[str, Any], name: str) -> int:
  value = row.get(name)
  if type(value) is not int:
    raise RowError(f'field "{name}" is {"not a whole number" if name in row else "missing"}')
  return value


def _full_field(row: dict[str, Any], name: str, what: str) -> str:
  text = text_field(row, name)
  if not text.strip():
    raise RowError(f"empty {what}")
  return text


def _is_of_correct(path: epath.Path) -> bool:
  """Whether a file holds correct solutions, by its name."""
  return "_correct_" in path.name


def _batches(data_dir: PathLike, kind: str, split: str) -> list[epath.Path]:
  """The zip files of a set and split, correct solutions first."""
  if split not in ("train", "val"):
    raise UserError(f"the released data has no split {split!r}; it has train and val")
  name = re.compile(rf"{kind}_(correct|incorrect)_solutions_batch_(\d+){'_val' if split == 'val' else ''}\.zip")
  folder = _folder(data_dir)
  found = {(m[1], int(m[2])): p for p in folder.iterdir() if (m := name.fullmatch(p.name))}
  labels = {label for label, _ in found}
  for label in ("correct", "incorrect"):
    if label not in labels:
      pattern = f"{kind}_{label}_solutions_batch_*{'_val' if split == 'val' else ''}.zip"
      raise UserError(f"no file {folder / pattern}; {CLONE}")
  return [found[key] for key in sorted(found)]


def _pool_files(data_dir: PathLike, rounds: Sequence[int]) -> list[tuple[int, epath.Path]]:
  """(round, file) by round, then shard, correct solutions first."""
  folder = _folder(data_dir) / "data_collection"
  name = re.compile(r"critique_gen_(correct|incorrect)_solutions_round_(\d+)_shard_(\d+)\.jsonl\.gz")
  matches = [m for p in (folder.iterdir() if folder.exists() else ()) if (m := name.fullmatch(p.name))]
  shards = sorted({int(m[3]) for m in matches if int(m[2]) in rounds}) or [0]
  files = []
  for number in rounds:
    for shard in shards:
      for label in ("correct", "incorrect"):
        path = folder / f"critique_gen_{label}_solutions_round_{number}_shard_{shard}.jsonl.gz"
        if not path.exists():
          raise UserError(
            f"no file {path}; a shard needs both files in every round that is read "
            f"({', '.join(map(str, rounds))}); {CLONE}"
          )
        files.append((number, path))
  return files


def _folder(data_dir: PathLike) -> epath.Path:
  places = [epath.Path(data_dir) / folder for folder in _FOLDERS]
  found = next((p for p in places if (p / "data_collection").exists() or any(p.glob("rm_*.zip"))), None)
  if found is None:
    raise UserError(
      f"no released GenRM data; looked in {', '.join(str(p) for p in places)}; "
      f"{CLONE} {epath.Path(data_dir) / 'genrm-critiques'}"
    )
  return found


def _zip_rows(path: epath.Path, parse: Callable[[dict[str, Any], Place], Row], bad: BadRows) -> Iterator[Row]:
  """The rows of the JSONL file in a zip."""
  with _damage(path), path.open("rb") as file, zipfile.ZipFile(file) as archive:
    names = [n for n in archive.namelist() if n.endswith(".jsonl") and not n.startswith("__MACOSX")]
    if len(names) != 1:
      raise UserError(f"{path}: holds {len(names)} JSONL files, expected one; {CLONE} again")
    with archive.open(names[0]) as stream:
      yield from _rows(stream, f"{path}/{names[0]}", parse, bad)


@contextlib.contextmanager
def _damage(path: epath.Path) -> Iterator[None]:
  """Turns the errors of a truncated or corrupt archive into a UserError."""
  try:
    yield
  except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError) as e:
    what = str(e)[:100]  # zipfile quotes what it finds instead of a name
    raise UserError(f"{path}: damaged or truncated ({what}); {CLONE} again, with git-lfs where it asks for it") from e
