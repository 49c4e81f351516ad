"""Splits sampling and scoring over the processes of a run: each writes a part, and the parts are merged."""

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
  """Maps items to records in parallel; returns the records of each item, in order, on every process.

  Of n processes, process i handles items i, i + n, ... and writes their records to `<path>.part-i-of-n`. Every process
  reads all parts, then process 0 deletes them.

  Args:
    path: a file that all processes can see; the parts are written beside it.
    items: equal on all processes.
    work: maps the items of this process to a list of records each.
    record: class of the records.

  Raises:
    RuntimeError: a part does not have the records that its process wrote.
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
      raise RuntimeError(f"{part} has {len(records)} records, but process {k} wrote {sum(counts[k])}")
    start = 0
    for place, count in zip(range(k, len(items), n), counts[k], strict=True):
      out[place] = records[start : start + count]
      start += count
  distributed.barrier()
  if distributed.is_main():
    for part in parts:
      part.unlink()
  return out
