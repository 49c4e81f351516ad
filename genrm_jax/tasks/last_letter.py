"""Last Letter Concatenation (paper, section 4.1): join the last letters of a list of words.

The compact form for character models numbers the items, from any first number on, and ends a list with ";":

    question   3mike4dlih;      solution   3e4h;      answer   eh

The program's rationale walks the list (number, word, true letter, the solution's letter, mark), stops at the first
difference, and so ends in the verdict that the answer deserves:

    solution 3e4h;    3mike:ee+4dlih:hh+;+          solution 3e4i;    3mike:ee+4dlih:hi-
    solution 3e;      3mike:ee+4dlih:h;-            solution 3e4h5a;  3mike:ee+4dlih:hh+;a-
"""

import dataclasses
import re

import numpy as np

from genrm_jax.errors import UserError
from genrm_jax.types import Problem

END = ";"
_ITEM = re.compile(r"([0-9])([a-z]+)")
_LIST = re.compile(r"(?:[0-9][a-z]+)*;")
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_MAX_NUMBER = 9  # a number is one digit


def random_word(rng: np.random.Generator, min_length: int = 3, max_length: int = 5) -> str:
  """A word of random letters."""
  return "".join(_LETTERS[i] for i in rng.integers(26, size=rng.integers(min_length, max_length + 1)))


def write_list(items: list[str], first: int) -> str:
  """A numbered list: `["mike", "dlih"]` from 3 on is "3mike4dlih;"."""
  if first < 0 or first + len(items) - 1 > _MAX_NUMBER:
    raise UserError(f"a list of {len(items)} items from number {first} on leaves 0..{_MAX_NUMBER}")
  return "".join(f"{first + i}{item}" for i, item in enumerate(items)) + END


def read_list(text: str) -> tuple[list[str], int]:
  """The items and the first number of what `write_list` wrote; UserError for anything else."""
  items = _ITEM.findall(text)
  first = int(items[0][0]) if items else 0
  if not _LIST.fullmatch(text) or [int(number) for number, _ in items] != list(range(first, first + len(items))):
    raise UserError(f"not a numbered list that ends in {END!r}: {text!r}")
  return [word for _, word in items], first


@dataclasses.dataclass(frozen=True)
class LastLetter:
  """The task in its compact form."""

  name: str = "last_letter"

  def problem(self, rng: np.random.Generator, num_words: int, split: str, index: int) -> Problem:
    """A random problem; the first number is random where the list is short enough to allow it."""
    words = [random_word(rng) for _ in range(num_words)]
    first = int(rng.integers(0, _MAX_NUMBER + 2 - num_words))
    return Problem(
      id=f"{self.name}/{split}/{index:05d}",
      task=self.name,
      split=split,
      question=write_list(words, first),
      answer="".join(w[-1] for w in words),
      reference=write_list([w[-1] for w in words], first),
    )

  def extract_answer(self, text: str) -> str | None:
    """The letters of a well-formed solution (numbered without a break, ended by ";"), else None."""
    if not re.fullmatch(r"(?:[0-9][a-z])+;", text):
      return None
    numbers = [int(c) for c in text[:-1:2]]
    if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
      return None
    return text[1::2]

  def same_answer(self, a: str | None, b: str | None) -> bool:
    return a is not None and a == b

  def rationale(self, problem: Problem, solution: str) -> tuple[str, bool]:
    """The program's walk through the list, and the verdict that it comes to."""
    words, first = read_list(problem.question)
    steps = []
    for i, word in enumerate(words):
      given = self._given(solution, i, first + i)
      right = given == word[-1]
      steps.append(f"{first + i}{word}:{word[-1]}{given}{'+' if right else '-'}")
      if not right:
        return "".join(steps), False
    given = self._given(solution, len(words), first + len(words))
    steps.append("".join([END, "+" if given == END else f"{given}-"]))
    return "".join(steps), given == END

  def _given(self, solution: str, place: int, number: int) -> str:
    """What the solution has at this place: its letter, ";" where it has ended, "." where it is malformed."""
    rest = solution[2 * place :]
    if rest == END:
      return END
    letter = re.match(f"{number}([a-z])", rest)
    return letter[1] if letter else "."
