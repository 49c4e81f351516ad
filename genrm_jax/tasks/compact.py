"""What the list tasks share in their compact style, for character models: numbered lists.

The items of a question are numbered, from any first number on, and ";" ends the list. In a solution letters (places)
stand for the numbers, A for 0, so that what belongs to the solution cannot be confused with the question.
"""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from genrm_jax.records import Candidate, Problem
from genrm_jax.runtime.errors import UserError

END = ";"
PLACES = "ABCDEFGHIJ"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
ITEM = re.compile(r"([0-9])([a-z]+)")
_LIST = re.compile(r"(?:[0-9][a-z]+)*;")
_MAX_NUMBER = 9  # a number is one digit
_COUNTERS = ("0123456789", PLACES)


def random_word(rng: np.random.Generator, min_length: int = 3, max_length: int = 5) -> str:
  """A word of random letters."""
  return "".join(LETTERS[i] for i in rng.integers(26, size=rng.integers(min_length, max_length + 1)))


def random_first(rng: np.random.Generator, num_items: int) -> int:
  """A random first number for a list of `num_items` items; UserError if the list is too long for one-digit numbers."""
  if num_items > _MAX_NUMBER + 1:
    raise UserError(f"a list of {num_items} items has no numbers of one digit; ask for {_MAX_NUMBER + 1} words at most")
  return int(rng.integers(0, _MAX_NUMBER + 2 - num_items))


def write_list(items: list[str], first: int) -> str:
  """A numbered list: `["mike", "dlih"]` from 3 on is "3mike4dlih;"."""
  if first < 0 or first + len(items) - 1 > _MAX_NUMBER:
    raise UserError(f"a list of {len(items)} items from number {first} on leaves 0..{_MAX_NUMBER}")
  return "".join(f"{first + i}{item}" for i, item in enumerate(items)) + END


def write_placed(items: Sequence[str], first: int, end: str = END) -> str:
  """A list as a solution writes it: `["e", "h"]` from 3 on is "DeEh;"."""
  return "".join(f"{PLACES[first + i]}{item}" for i, item in enumerate(items)) + end


def read_list(text: str) -> tuple[list[str], int]:
  """The items and the first number of a list by `write_list`; UserError for anything else."""
  items = ITEM.findall(text)
  first = int(items[0][0]) if items else 0
  if not _LIST.fullmatch(text) or [int(number) for number, _ in items] != list(range(first, first + len(items))):
    raise UserError(f"not a numbered list that ends in {END!r}: {text!r}")
  return [word for _, word in items], first


def renumber(problems: Sequence[Problem], candidates: Sequence[Candidate]) -> tuple[list[Problem], list[Candidate]]:
  """The same lists, each numbered from 0 on and its places from A on; labels stay as they are."""
  first = {p.id: int(p.question[0]) for p in problems}

  def shift(problem_id: str, text: str) -> str:
    # Numbers wrap around, so that a wrong number below the first one does not become a right one.
    by = first[problem_id]
    table = {ord(c): counter[i - by] for counter in _COUNTERS for i, c in enumerate(counter)}
    return text.translate(table)

  shifted = [
    dataclasses.replace(
      p, question=shift(p.id, p.question), answer=shift(p.id, p.answer), reference=shift(p.id, p.reference)
    )
    for p in problems
  ]
  return shifted, [
    dataclasses.replace(
      c, text=shift(c.problem_id, c.text), answer=None if c.answer is None else shift(c.problem_id, c.answer)
    )
    for c in candidates
  ]
