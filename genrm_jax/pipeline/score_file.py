"""Scores a file of candidates and writes the same rows, in the same order and format, with the scores beside them.

    {"question": "...", "solution": "...", "genrm_score": 0.93, "genrm_votes": [{"state": "ok", "p_yes": 0.93}]}

A row of several solutions gets `genrm_scores` and a list of votes for each. A score is null if no vote could be read;
`genrm_skipped` says why a solution was not scored at all.

The file is read first, so that a row that cannot be read is named before anything is scored. The scores of each chunk
of rows are then written to OUT.parts, and at last joined with the rows to OUT. Chunks depend on the file alone, so that
a job that was killed and started again writes the same bytes.
"""

import dataclasses
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from genrm_jax.data import jsonl
from genrm_jax.data.interchange import containers, reading
from genrm_jax.data.interchange.formats import Row, Unusable
from genrm_jax.data.interchange.reading import PathLike
from genrm_jax.pipeline import fingerprints
from genrm_jax.pipeline.trained import TrainedVerifier
from genrm_jax.records import Vote
from genrm_jax.runtime import files
from genrm_jax.runtime.errors import UserError
from genrm_jax.runtime.progress import say
from genrm_jax.text.json_lines import iter_objects
from genrm_jax.verifiers import scoring
from genrm_jax.verifiers.base import Verifier, VoteConfig

SKIPPED = "genrm_skipped"
_VOTES_PER_CHUNK = 1024
_MAX_ROWS_PER_CHUNK = 10_000  # where most have no solution
_SECONDS_BETWEEN_LINES = 15.0
_UNENCODABLE = "text that the tokenizer cannot encode"
_ABOUT = "about.json"


@dataclasses.dataclass(frozen=True)
class Shard:
  """Part `index`, from 0, of `count` parts of equal size, in file order."""

  index: int = 0
  count: int = 1

  @classmethod
  def parse(cls, text: str) -> "Shard":
    """From "i/n"; "" is the whole file. Raises UserError for anything else."""
    if not text:
      return cls()
    numbers = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not numbers or int(numbers[1]) >= int(numbers[2]):
      raise UserError(f"--shard={text}: give I/N, with I from 0 to N - 1")
    return cls(int(numbers[1]), int(numbers[2]))

  def path(self, out: epath.Path) -> epath.Path:
    """Where this part is written: of 2 parts of scored.jsonl, scored-00000-of-00002.jsonl and the other."""
    if self.count == 1:
      return out
    stem, dot, endings = out.name.partition(".")
    return out.parent / f"{stem}-{self.index:05d}-of-{self.count:05d}{dot}{endings}"

  def rows(self, num_rows: int) -> range:
    return range(self.index * num_rows // self.count, (self.index + 1) * num_rows // self.count)


@dataclasses.dataclass(frozen=True)
class Job:
  """What to score and how.

  Attributes:
    candidates, format, inputs: as for `genrm_jax.read_candidates`.
    out: a file, or a folder if `candidates` is one.
    num_votes: per solution; None for what the checkpoint says.
    rationales: whether votes are written with their texts.
    shard: the part of the rows to score.
  """

  candidates: PathLike
  out: PathLike
  format: str = ""
  inputs: PathLike = ""
  num_votes: int | None = None
  rationales: bool = False
  shard: Shard = dataclasses.field(default_factory=Shard)


class Survey(NamedTuple):
  """What a first pass found: the rows of each file, the part to score, its number of solutions, what is skipped."""

  rows_of_file: Mapping[str, int]
  part: range
  num_solutions: int
  skipped: reading.Tally


def score_file(job: Job, load: Callable[[], TrainedVerifier]) -> epath.Path:
  """Scores and writes the file; returns its path.

  Args:
    job: what to score.
    load: opens the verifier, once the candidates have been found to be readable.

  Raises:
    UserError: the candidates cannot be read or have no solution, the result exists, or the parts of an unfinished one
      are of another job.
  """
  out = job.shard.path(epath.Path(job.out))
  parts = out.parent / f"{out.name}.parts"
  with files.named(out, "read"):
    if out.exists() and not parts.exists():
      raise UserError(f"{out}: exists already; give another --out, or remove it to score again")
  reader = reading.Reader(job.candidates, job.format, job.inputs)
  columns = _columns(reader.format.several, job.rationales)
  survey = _survey(reader, job, columns)
  trained = load()
  how = VoteConfig(
    trained.how.num_votes if job.num_votes is None else job.num_votes, trained.how.seed, trained.how.sample
  )
  _begin(parts, _about(job, reader, trained, how))
  counts = _score_chunks(reader, survey, trained, how, parts, job.rationales)
  _join(reader, survey, parts, out, columns)
  with files.named(parts, "written"):
    parts.rmtree()
  say(f"{out}: {counts}" + (f"; skipped: {survey.skipped}" if survey.skipped.by_reason else ""))
  return out


def _columns(several: bool, rationales: bool) -> dict[str, Any]:
  """The fields that are added to a row, with their types."""
  vote = {"state": "text", "p_yes": "number"} | ({"text": "text"} if rationales else {})
  if several:
    return {"genrm_scores": ["number"], "genrm_votes": [[vote]], SKIPPED: "text"}
  return {"genrm_score": "number", "genrm_votes": [vote], SKIPPED: "text"}


def _survey(reader: reading.Reader, job: Job, columns: Mapping[str, Any]) -> Survey:
  """Reads all rows once. Raises UserError as `score_file`."""
  name = os.fspath(job.candidates)
  if reader.format.name == "sc_genrm_votes":
    raise UserError(f"{name}: holds verifications; give the folder of the samples that they are of")
  if reader.lacks_questions:
    raise UserError(f"{name}: rows of format {reader.format.name} lack the questions; give --inputs=FILE, the requests")
  rows_of_file: dict[str, int] = dict.fromkeys(reader.files, 0)
  solutions: list[int] = []
  tallies: list[reading.Tally | None] = []
  for row, place, fields in reader.rows():
    if taken := [column for column in columns if column in fields]:
      raise UserError(f'{place}: the row has a field "{taken[0]}" already; give a file without scores')
    if not row.question and not row.why:
      raise UserError(f'{place}: no question in it; add "question" to the row')
    rows_of_file[place.file] += 1
    tally = reading.Tally()
    solutions.append(len(list(reading.usable(row, place, tally))))
    tallies.append(tally if tally.by_reason else None)
  part = job.shard.rows(len(solutions))
  if not part:
    raise UserError(f"{name}: has {len(solutions)} rows, too few for --shard={job.shard.index}/{job.shard.count}")
  skipped = reading.Tally()
  for found in filter(None, tallies[part.start : part.stop]):
    skipped.merge(found)
  num_solutions = sum(solutions[part.start : part.stop])
  if not num_solutions:
    raise UserError(f"{name}: no solution to score; skipped: {skipped}")
  return Survey(rows_of_file, part, num_solutions, skipped)


def _about(job: Job, reader: reading.Reader, trained: TrainedVerifier, how: VoteConfig) -> dict[str, Any]:
  """What the scores depend on."""
  inputs = fingerprints.fingerprint(epath.Path(job.inputs), whole=True) if job.inputs else ""
  return {
    "candidates": fingerprints.fingerprint(epath.Path(job.candidates), whole=True),
    "inputs": inputs,
    "format": reader.format.name,
    "checkpoint": jsonl.digest_of(dict(trained.manifest)),
    "votes": {"num_votes": how.num_votes, "seed": how.seed, **dataclasses.asdict(how.sample)},
    "rationales": job.rationales,
    "shard": [job.shard.index, job.shard.count],
    "votes_per_chunk": _VOTES_PER_CHUNK,
  }


def _begin(parts: epath.Path, about: dict[str, Any]) -> None:
  """Begins a folder of parts, or checks that the one of an unfinished job is of this one."""
  path = parts / _ABOUT
  if not path.exists():
    jsonl.write_json(path, about)
    return
  before = jsonl.read_json(path)
  other = [key for key, value in about.items() if not isinstance(before, dict) or before.get(key) != value]
  if other:
    raise UserError(
      f"{parts}: holds scores of another job ({', '.join(other)} differ); remove it, or give another --out"
    )


def _score_chunks(
  reader: reading.Reader,
  survey: Survey,
  trained: TrainedVerifier,
  how: VoteConfig,
  parts: epath.Path,
  rationales: bool,
) -> str:
  """Writes the fields of each chunk of rows, unless they are there; returns a sentence with counts."""
  num_votes = trained.verifier.num_votes(how.num_votes)
  earlier: dict[tuple[str, str], dict[str, Any]] = {}  # of documents that may be repeated
  states: dict[str, int] = {}
  start, last, done, resumed = time.monotonic(), -math.inf, 0, 0
  for number, chunk in enumerate(_chunks(reader, survey.part, max(1, _VOTES_PER_CHUNK // num_votes))):
    path, size = _part(parts, number), sum(_num_solutions(row) for row, _ in chunk)
    if path.exists():
      added = [fields for fields, _ in iter_objects(path)]
      resumed += size
    else:
      added = _score_chunk(chunk, reader.format.several, trained, how, earlier, rationales)
      with files.atomic_writer(path, every_process=True) as write:
        for (_, place), fields in zip(chunk, added, strict=True):
          write(_line(fields, place))
    for (row, place), fields in zip(chunk, added, strict=True):
      if row.repeats:
        earlier.setdefault((place.file, row.problem_id), fields)
      if fields.get(SKIPPED, "").startswith(_UNENCODABLE):
        survey.skipped.add(_UNENCODABLE, place)
      _count(fields, states)
    done += size
    now = time.monotonic()
    if done > resumed and (now - last >= _SECONDS_BETWEEN_LINES or done == survey.num_solutions):
      last = now
      left = (now - start) / (done - resumed) * (survey.num_solutions - done)
      say(f"score: {done}/{survey.num_solutions} solutions, {now - start:.0f}s elapsed, {left:.0f}s left")
  failed = ", ".join(f"{count} {state}" for state, count in sorted(states.items()) if state)
  return f"{states.get('', 0)} scores" + (f"; without a score: {failed}" if failed else "")


def _chunks(reader: reading.Reader, part: range, size: int) -> Iterator[list[tuple[Row, containers.Place]]]:
  """Yields the rows of a part in chunks of `size` solutions or a few more."""
  chunk: list[tuple[Row, containers.Place]] = []
  num = 0
  for at, (row, place, _) in enumerate(reader.rows()):
    if at in part:
      chunk.append((row, place))
      num += _num_solutions(row)
    if num >= size or len(chunk) == _MAX_ROWS_PER_CHUNK or (at + 1 == part.stop and chunk):
      yield chunk
      chunk, num = [], 0
    if at + 1 == part.stop:
      return


def _num_solutions(row: Row) -> int:
  return 0 if row.why else sum(isinstance(solution, str) for solution in row.solutions)


def _score_chunk(
  chunk: Sequence[tuple[Row, containers.Place]],
  several: bool,
  trained: TrainedVerifier,
  how: VoteConfig,
  earlier: Mapping[tuple[str, str], dict[str, Any]],
  rationales: bool,
) -> list[dict[str, Any]]:
  """The fields to add to each row. Equal texts are scored once, and rows that repeat an earlier one not at all."""
  faults: dict[tuple[str, str], str] = {}  # why a pair is not scored, "" if it is
  for row, place in chunk:
    if not (row.why or (place.file, row.problem_id) in earlier):
      for solution in row.solutions:
        if isinstance(solution, str) and (row.question, solution) not in faults:
          faults[row.question, solution] = _fault(trained.verifier, (row.question, solution))
  scored = [pair for pair, fault in faults.items() if not fault]
  votes = dict(zip(scored, scoring.score_pairs(trained.verifier, trained.engine, scored, how), strict=True))

  def fields_of(question: str, solution: str | Unusable) -> dict[str, Any]:
    if isinstance(solution, Unusable):
      return _fields(solution.why, [])
    if fault := faults[question, solution]:
      return _fields(fault, [])
    found = votes[question, solution]
    return _fields("", found, trained.verifier.value(found), rationales)

  return [
    earlier.get((place.file, row.problem_id))
    or _of_row(row, [fields_of(row.question, s) for s in (() if row.why else row.solutions)], several)
    for row, place in chunk
  ]


def _fault(verifier: Verifier, pair: tuple[str, str]) -> str:
  """Why a pair cannot be scored, "" if it can."""
  try:
    verifier.tokens_needed(*pair, 0)
  except UserError as e:
    return f"{_UNENCODABLE}: {e}"
  return ""


def _fields(why: str, votes: Sequence[Vote], value: float | None = None, rationales: bool = False) -> dict[str, Any]:
  shown = [{"state": v.state, "p_yes": v.p_yes} | ({"text": v.text} if rationales else {}) for v in votes]
  return {"genrm_score": value, "genrm_votes": shown} | ({SKIPPED: why} if why else {})


def _of_row(row: Row, found: Sequence[dict[str, Any]], several: bool) -> dict[str, Any]:
  """The fields of a row from those of its solutions."""
  why = row.why or next((f[SKIPPED] for f in found if SKIPPED in f), "")
  skipped = {SKIPPED: why} if why else {}
  if several:
    return {
      "genrm_scores": [f["genrm_score"] for f in found],
      "genrm_votes": [f["genrm_votes"] for f in found],
    } | skipped
  return (found[0] if found else _fields("", [])) | skipped


def _count(fields: Mapping[str, Any], states: dict[str, int]) -> None:
  """Counts the scores under "", and solutions without one by the states of their votes."""
  several = "genrm_scores" in fields
  values = fields["genrm_scores"] if several else [fields["genrm_score"]]
  for value, votes in zip(values, fields["genrm_votes"] if several else [fields["genrm_votes"]], strict=True):
    if value is not None:
      states[""] = states.get("", 0) + 1
    elif votes:
      state = "/".join(sorted({vote["state"] for vote in votes}))
      states[state] = states.get(state, 0) + 1


def _line(fields: Mapping[str, Any], place: containers.Place) -> bytes:
  try:
    return json.dumps(fields, ensure_ascii=False, allow_nan=False).encode() + b"\n"
  except ValueError as e:
    raise UserError(f"{place}: the score is no number ({e}); check the checkpoint, or load it in float32") from e


def _part(parts: epath.Path, number: int) -> epath.Path:
  return parts / f"{number:06d}.jsonl"


def _join(
  reader: reading.Reader, survey: Survey, parts: epath.Path, out: epath.Path, columns: Mapping[str, Any]
) -> None:
  """Writes the rows of the part with their fields; of a folder, each file under its name."""
  added = _added(survey, parts)
  is_folder = list(reader.files) != [os.fspath(reader.path)]
  first = 0
  for file, num_rows in survey.rows_of_file.items():
    if range(max(first, survey.part.start), min(first + num_rows, survey.part.stop)):
      inside = os.path.relpath(file, os.fspath(reader.path)) if is_folder else ""
      containers.write_with(file, out / inside if inside else out, added, columns)
    else:
      for _ in range(num_rows):
        next(added)
    first += num_rows


def _added(survey: Survey, parts: epath.Path) -> Iterator[containers.Added]:
  """The fields of every row, None for rows outside the part."""
  rows = (fields for number in range(survey.part.stop) for fields in _rows_of_part(parts, number))
  for at in range(sum(survey.rows_of_file.values())):
    yield next(rows) if at in survey.part else None


def _rows_of_part(parts: epath.Path, number: int) -> Iterator[dict[str, Any]]:
  yield from (fields for fields, _ in iter_objects(_part(parts, number)))
