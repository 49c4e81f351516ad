"""Sharing sampling and scoring out over the processes of a run: each writes its own part, and the parts are merged."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from etils import epath

from genrm_jax.data import jsonl
from genrm_jax.records import Candidate, Rationale, Score
from genrm_jax.runtime import distributed

Item = TypeVar("Item")
Record = TypeVar("Record", Candidate, Rationale, Score)


def map_records(
  path: epath.Path,
  items: Sequence[Item],
  work: Callable[[Sequence[Item]], Sequence[Sequence[Record]]],
  record: type[Record],
) -> list[list[Record]]:
  """The records of every item, in order, on every process; each item is worked on by one process.

  Of n processes, process i takes the items i, i + n, ... and leaves their records in `<path>.part-i-of-n`; all read all
  parts, and process 0 removes them.

  Args:
    path: a file that all processes see; the parts lie beside it.
    items: the same on all processes.
    work: gives the records of each of the items that fall to this process.
    record: their class.
  """
  n, i = distributed.num_processes(), distributed.process_index()
  if n == 1:
    return [list(records) for records in work(items)]
  found = work(items[i::n])
  parts = [path.parent / f"{path.name}.part-{k}-of-{n}" for k in range(n)]
  counts = distributed.exchange([len(records) for records in found])
  jsonl.write_records(parts[i], [r for records in found for r in records], every_process=True)
  distributed.barrier()
  out: list[list[Record]] = [[] for _ in items]
  for k, part in enumerate(parts):
    records = jsonl.read_records(part, record)
    if len(records) != sum(counts[k]):
      raise RuntimeError(f"{part} has {len(records)} records, process {k} wrote {sum(counts[k])}")
    start = 0
    for place, count in zip(range(k, len(items), n), counts[k], strict=True):
      out[place] = records[start : start + count]
      start += count
  distributed.barrier()
  if distributed.is_main():
    for part in parts:
      part.unlink()
  return out
