"""Reads candidates from a file or folder in any of the formats of formats.py.

found = genrm_jax.read_candidates("samples_gsm8k_2026-05-01.jsonl")
found.problems, found.candidates, found.labels, found.summary
"""

import collections
import dataclasses
import hashlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from genrm_jax.data.interchange import containers, formats
from genrm_jax.data.interchange.containers import PathLike, Place
from genrm_jax.data.interchange.fields import Unusable, keys_of
from genrm_jax.data.interchange.formats import FORMATS, Format, Row
from genrm_jax.records import Candidate, Problem, Vote
from genrm_jax.runtime.errors import UserError

_NUM_PLACES = 3
REPEATED = "the same document by another filter"


@dataclasses.dataclass
class Skipped:
  """How many rows, or single solutions of rows, were skipped for one reason, and the first places."""

  count: int = 0
  places: list[str] = dataclasses.field(default_factory=list)


class Tally:
  """Counts what is skipped, by reason."""

  def __init__(self) -> None:
    self.by_reason: dict[str, Skipped] = collections.defaultdict(Skipped)

  def add(self, reason: str, place: Place) -> None:
    found = self.by_reason[reason]
    found.count += 1
    if len(found.places) < _NUM_PLACES:
      found.places.append(str(place))

  def merge(self, other: "Tally") -> None:
    """Adds the counts of another part, which comes after this one."""
    for reason, skipped in other.by_reason.items():
      found = self.by_reason[reason]
      found.count += skipped.count
      found.places = (found.places + skipped.places)[:_NUM_PLACES]

  def __str__(self) -> str:
    reasons = sorted(self.by_reason.items(), key=lambda item: -item[1].count)
    return "; ".join(f"{s.count} {reason} (first: {', '.join(s.places)})" for reason, s in reasons)


@dataclasses.dataclass(frozen=True)
class CandidateFile:
  """What a file or folder of candidates holds.

  Attributes:
    format: its name in `formats.FORMATS`.
    problems: in order of first appearance.
    candidates: in file order. `correct` is False where the file does not say: see `labels`. `answer` is None unless the
      file has it.
    labels: whether a candidate is correct, by (problem id, index), for those that the file labels.
    votes: by (problem id, index), where the file has any. Their `num_tokens` is 0: unknown.
    num_rows: rows read.
    skipped: by reason, rows, and single solutions of rows, that were left out.
  """

  format: str
  problems: Sequence[Problem]
  candidates: Sequence[Candidate]
  labels: Mapping[tuple[str, int], bool]
  votes: Mapping[tuple[str, int], Sequence[Vote]]
  num_rows: int
  skipped: Mapping[str, Skipped]

  @property
  def summary(self) -> str:
    """Counts in a sentence."""
    tally = Tally()
    tally.by_reason.update(self.skipped)
    left_out = f"; skipped: {tally}" if self.skipped else ""
    counts = f"{len(self.candidates)} solutions to {len(self.problems)} problems"
    return f"{counts} in {self.num_rows} rows of format {self.format}{left_out}"


class Reader:
  """Rows of a file or folder, in order: the files of a folder follow each other by the numbers in their names."""

  def __init__(self, path: PathLike, name: str = "", inputs: PathLike = ""):
    """Reads the second file; the rows are read by iterating.

    Args:
      path: the candidates.
      name: of the format; "" recognises it by the keys of the first row.
      inputs: the second file or folder, for formats that keep the questions there.

    Raises:
      UserError: no such format or file, or a second file that the format does not need or that cannot be read.
    """
    if name and name not in FORMATS:
      raise UserError(f"unknown format {name!r}; the formats are {', '.join(FORMATS)}")
    self.path, self.files = path, containers.files_of(path)
    self.format = FORMATS[name] if name else self._recognise()
    self._named = bool(name)
    if inputs and not self.format.read_inputs:
      raise UserError(f"{os.fspath(inputs)}: candidates of format {self.format.name} have their questions with them")
    self._inputs = self.format.read_inputs(inputs) if inputs and self.format.read_inputs else None

  @property
  def lacks_questions(self) -> bool:
    """Whether the questions are in a second file that was not given."""
    return bool(self.format.read_inputs) and self._inputs is None

  def _recognise(self) -> Format:
    first = next(itertools.chain.from_iterable(map(containers.rows_of, self.files)), None)
    if first is None:
      raise UserError(f"{os.fspath(self.path)}: no row in it; give a file with candidates")
    return formats.recognise(*first)

  def rows(self) -> Iterator[tuple[Row, Place, dict[str, Any]]]:
    """Yields what each row holds, its place, and the row itself.

    Raises:
      UserError: no row; or names the place: a row that cannot be read or is in another format, a field of another type,
        an id twice in a file, or one of two questions.
    """
    question_of: dict[str, tuple[bytes, Place]] = {}
    num_rows = 0
    for file in self.files:
      seen: dict[str, Place] = {}
      for fields, place in containers.rows_of(file):
        num_rows += 1
        self._check_format(fields, place)
        row = self.format.parse(fields, place, self._inputs)
        if row.key and seen.setdefault(row.key, place) is not place:
          raise UserError(f"{place}: {row.key} again, after {seen[row.key]}; remove one of the two rows")
        if row.problem_id and row.question:
          mark = hashlib.sha256(_folded(row.question).encode()).digest()[:12]
          if question_of.setdefault(row.problem_id, (mark, place))[0] != mark:
            first = question_of[row.problem_id][1]
            raise UserError(f"{place}: problem {row.problem_id!r} has another question than at {first}; rename one")
        yield row, place, fields
    if not num_rows:
      raise UserError(f"{os.fspath(self.path)}: no row in it; give a file with candidates")

  def _check_format(self, fields: Mapping[str, Any], place: Place) -> None:
    fits = self.format.fits(fields)
    if self._named and not fits:
      raise UserError(f"{place}: a row of format {self.format} lacks one of its keys; it has {keys_of(fields)}")
    if not self._named and (found := formats.recognise(fields, place)) is not self.format:
      raise UserError(
        f"{place}: a row of format {found.name} in a file that begins with {self.format.name}; give them in two files"
      )


def read_candidates(path: PathLike, format: str = "", *, inputs: PathLike = "") -> CandidateFile:
  """Candidates from a file or folder in this library's simple format or one of other tools' (docs/candidates.md).

  Args:
    path: JSON lines, a JSON or YAML document, or parquet; or a folder of such files. Local or gs://, gzipped or not.
    format: a name in `formats.FORMATS`; "" recognises the format by the keys of a row.
    inputs: for formats without questions: the requests of a batch, or the folder of the samples.

  Returns:
    Problems, candidates, labels and votes, and what was skipped.

  Raises:
    UserError: the path, the format or `inputs` is wrong, or as `Reader.rows`.
  """
  reader = Reader(path, format, inputs)
  if reader.lacks_questions:
    raise UserError(
      f"{os.fspath(path)}: rows of format {reader.format.name} lack the questions; give the file or folder that they "
      "answer as inputs"
    )
  problems: dict[str, Problem] = {}
  pool: dict[tuple[str, int], Candidate] = {}
  labels: dict[tuple[str, int], bool] = {}
  votes: dict[tuple[str, int], Sequence[Vote]] = {}
  counts: collections.Counter[str] = collections.Counter()
  tally, num_rows, repeated = Tally(), 0, dict[tuple[str, str], tuple[str, int]]()
  for row, place, _ in reader.rows():
    num_rows += 1
    if not row.question and not row.why:
      raise UserError(f'{place}: no question in it; add "question" to the row')
    name = row.problem_id or _by_question(row.question)
    if row.repeats and (first := repeated.get((place.file, name))):
      tally.add(REPEATED, place)
      if labels.get(first) is not (row.labels or (None,))[0]:  # the filters disagree
        labels.pop(first, None)
      continue
    if row.question:
      problems.setdefault(name, _problem(name, row, reader.format))
    repeated[place.file, name] = name, counts[name]
    for at, text in usable(row, place, tally):
      index = counts[name] if row.index is None else row.index
      counts[name] += 1
      label = row.labels[at] if row.labels else None
      answer = row.answers[at] if row.answers else None
      source = place.file.rpartition("/")[2]
      if (name, index) in pool:
        raise UserError(f"{place}: solution {index} to problem {name!r} again; remove one of the two")
      pool[name, index] = Candidate(name, index, text, answer, False, source)
      if label is not None:
        labels[name, index] = label
      if row.votes:
        votes[name, index] = row.votes
  graded = [dataclasses.replace(c, correct=labels.get(key, False)) for key, c in pool.items()]
  skipped = dict(tally.by_reason)
  return CandidateFile(reader.format.name, list(problems.values()), graded, labels, votes, num_rows, skipped)


def usable(row: Row, place: Place, tally: Tally) -> Iterator[tuple[int, str]]:
  """Yields (position, text) of the usable solutions of a row, and counts the others."""
  if row.why:
    tally.add(row.why, place)
    return
  for at, solution in enumerate(row.solutions):
    if isinstance(solution, Unusable):
      tally.add(solution.why, place)
    else:
      yield at, solution


def _problem(name: str, row: Row, form: Format) -> Problem:
  return Problem(name, row.task or form.name, row.split or "eval", row.question, row.answer, row.reference)


def _by_question(question: str) -> str:
  """An id for a problem that has none."""
  return f"q-{hashlib.sha256(_folded(question).encode()).hexdigest()[:16]}"


def _folded(question: str) -> str:
  return " ".join(question.split())
