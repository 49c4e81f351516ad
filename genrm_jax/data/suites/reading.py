"""Reads the rows of a suite from the files of its authors: JSON lines, JSON or parquet."""

from collections.abc import Sequence
from typing import NamedTuple

from genrm_jax.data.interchange import containers
from genrm_jax.data.interchange.containers import PathLike, Place
from genrm_jax.data.interchange.fields import Fields, keys_of
from genrm_jax.data.suites.suites import SUITES, Suite
from genrm_jax.evals.scored_rows import SuiteRow
from genrm_jax.runtime.errors import UserError


class SuiteFile(NamedTuple):
  """The rows, and how many were left out since an earlier one has the same id."""

  rows: list[SuiteRow]
  num_repeated: int


def suite_of(name: str) -> Suite:
  """Raises UserError for a name that is none of `SUITES`."""
  if name not in SUITES:
    raise UserError(f"unknown suite {name!r}; the suites are {', '.join(SUITES)}")
  return SUITES[name]


def read(suite: Suite, paths: Sequence[PathLike]) -> SuiteFile:
  """Reads files or folders, one after the other.

  Raises:
    UserError: no row; or names the place: a row of another suite, a field of another type, no label, an id twice.
  """
  first: dict[str, Place] = {}
  rows, num_repeated = [], 0
  for file in (file for path in paths for file in containers.files_of(path)):
    for fields, place in containers.rows_of(file):
      _check_keys(suite, fields, place)
      row = suite.parse(fields, place)
      if row.id and row.id in first:
        if not suite.keeps_first:
          raise UserError(f"{place}: id {row.id!r} again, after {first[row.id]}; remove one of the two rows")
        num_repeated += 1
        continue
      first[row.id] = place
      rows.append(row)
  if not rows:
    raise UserError(f"{', '.join(map(str, paths))}: no row in it; give a file with rows of {suite.name}")
  return SuiteFile(rows, num_repeated)


def _check_keys(suite: Suite, fields: Fields, place: Place) -> None:
  missing = [key for key in suite.keys if key not in fields]
  if missing:
    others = [other.name for other in SUITES.values() if all(key in fields for key in other.keys)]
    is_other = f", those of {' and '.join(others)}" if others else ""
    raise UserError(
      f"{place}: no row of {suite.name} ({', '.join(suite.keys)}): it has the keys {keys_of(fields)}{is_other};"
      " give another suite or another --data"
    )
