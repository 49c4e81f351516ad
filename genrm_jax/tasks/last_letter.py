"""Last Letter Concatenation (paper, section 4.1): join the last letters of a list of words.

The compact form for character models numbers the words, from any first number on, and ends a list with ";". In a
solution letters stand for the numbers (A for 0), so that what stands in it cannot be mixed up with what stands in the
question:

    question   3mike4dlih;      solution   DeEh;      answer   eh

The program's rationale walks both lists at once: number, word, what ends it (";" after the last), true letter, place,
the solution's letter at that place and what follows it, mark. It stops at the first error, and so ends in the verdict
that the answer deserves:

    solution DeEh;    3mike:eDeE+4dlih;hEh;+        solution DeEi;    3mike:eDeE+4dlih;hEi-
    solution De;      3mike:eDe;-                   solution DeEhFa;  3mike:eDeE+4dlih;hEhF-

The place is written whether the solution has it or not. A walk that wrote "." where it has none let small models learn
that no list has a fifth word.

The natural form, for a real Gemma, asks and verifies in English; its answer is read from free text.
"""

import dataclasses
import itertools
import re
from collections.abc import Sequence

import numpy as np

from genrm_jax.records import Candidate, Problem
from genrm_jax.runtime.errors import UserError
from genrm_jax.tasks import natural

END = ";"
PLACES = "ABCDEFGHIJ"
ITEM = re.compile(r"([0-9])([a-z]+)")
_LIST = re.compile(r"(?:[0-9][a-z]+)*;")
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_MAX_NUMBER = 9  # a number is one digit
_COUNTERS = ("0123456789", PLACES)
_QUOTED = re.compile(r'"([a-z]+(?: [a-z]+)*)"')
_SENTENCE_END = re.compile(r"[.!?](?:\s|$)")
_SHOTS = ("paper moon", "lamp basket orange", "quiet river stone window")


def random_word(rng: np.random.Generator, min_length: int = 3, max_length: int = 5) -> str:
  """A word of random letters."""
  return "".join(_LETTERS[i] for i in rng.integers(26, size=rng.integers(min_length, max_length + 1)))


def random_first(rng: np.random.Generator, num_items: int) -> int:
  """Any number from which a list of so many items can be written; UserError if there is none."""
  if num_items > _MAX_NUMBER + 1:
    raise UserError(f"a list of {num_items} items has no numbers of one digit; ask for {_MAX_NUMBER + 1} words at most")
  return int(rng.integers(0, _MAX_NUMBER + 2 - num_items))


def write_list(items: list[str], first: int) -> str:
  """A numbered list: `["mike", "dlih"]` from 3 on is "3mike4dlih;"."""
  if first < 0 or first + len(items) - 1 > _MAX_NUMBER:
    raise UserError(f"a list of {len(items)} items from number {first} on leaves 0..{_MAX_NUMBER}")
  return "".join(f"{first + i}{item}" for i, item in enumerate(items)) + END


def write_placed(items: Sequence[str], first: int, end: str = END) -> str:
  """A list in the form of a solution: `["e", "h"]` from 3 on is "DeEh;"."""
  return "".join(f"{PLACES[first + i]}{item}" for i, item in enumerate(items)) + end


def read_list(text: str) -> tuple[list[str], int]:
  """The items and the first number of what `write_list` wrote; UserError for anything else."""
  items = ITEM.findall(text)
  first = int(items[0][0]) if items else 0
  if not _LIST.fullmatch(text) or [int(number) for number, _ in items] != list(range(first, first + len(items))):
    raise UserError(f"not a numbered list that ends in {END!r}: {text!r}")
  return [word for _, word in items], first


def renumber(problems: Sequence[Problem], candidates: Sequence[Candidate]) -> tuple[list[Problem], list[Candidate]]:
  """The same lists in the compact form, each numbered from 0 on (places from A on); labels stay as they are."""
  first = {p.id: int(p.question[0]) for p in problems}

  def shift(problem_id: str, text: str) -> str:
    # In a circle, so that a wrong number before the first one does not become a right one.
    by = first[problem_id]
    table = {ord(c): counter[i - by] for counter in _COUNTERS for i, c in enumerate(counter)}
    return text.translate(table)

  moved = [
    dataclasses.replace(
      p, question=shift(p.id, p.question), answer=shift(p.id, p.answer), reference=shift(p.id, p.reference)
    )
    for p in problems
  ]
  return moved, [
    dataclasses.replace(
      c, text=shift(c.problem_id, c.text), answer=None if c.answer is None else shift(c.problem_id, c.answer)
    )
    for c in candidates
  ]


@dataclasses.dataclass(frozen=True)
class LastLetter:
  """The task.

  Attributes:
    name: of the task.
    style: "compact", for character models, or "natural", for a real Gemma.
    true_first: whether the compact walk writes the true letter before the solution's ("aDb-") or after it ("Dba-").
    stop: whether the compact walk ends at the first error, or goes on to the end of the list.
  """

  name: str = "last_letter"
  style: str = "compact"
  true_first: bool = True
  stop: bool = True

  def __post_init__(self):
    natural.check_style(self.style)

  def problem(self, rng: np.random.Generator, num_words: int, split: str, index: int) -> Problem:
    """A random problem; in the compact form the first number is random where the list is short enough to allow it."""
    if self.style == "natural":
      return self._natural_problem([natural.random_word(rng) for _ in range(num_words)], split, index)
    words = [random_word(rng) for _ in range(num_words)]
    first = random_first(rng, num_words)
    return Problem(
      id=f"{self.name}/{split}/{index:05d}",
      task=self.name,
      split=split,
      question=write_list(words, first),
      answer="".join(w[-1] for w in words),
      reference=write_placed([w[-1] for w in words], first),
    )

  def few_shot(self, solve: str) -> str:
    """Worked examples of the natural form; see `natural.few_shot`."""
    examples = [self._natural_problem(shot.split(), "few_shot", i) for i, shot in enumerate(_SHOTS)]
    return natural.few_shot(self.name, self.style, examples, solve)

  def extract_answer(self, text: str) -> str | None:
    """The letters of a solution, or None.

    Compact: of a well-formed one (places without a gap, ended by ";"). Natural: of the final answer, one word or
    single letters ("eh", "e-h", "e, h").
    """
    if self.style == "natural":
      return _read_letters(natural.final_answer(text))
    if not re.fullmatch(r"(?:[A-J][a-z])+;", text) or text[:-1:2] not in PLACES:
      return None
    return text[1::2]

  def same_answer(self, a: str | None, b: str | None) -> bool:
    return a is not None and a == b

  def rationale(self, problem: Problem, solution: str) -> tuple[str, bool]:
    """The program's walk through the list, and the verdict that it comes to."""
    if self.style == "natural":
      return _natural_walk(_quoted_words(problem), self.extract_answer(solution))
    words, first = read_list(problem.question)
    steps, verdict = [], True
    for i, word in enumerate(words):
      number, is_last, rest = first + i, i == len(words) - 1, solution[2 * i :]
      found = re.match(f"{PLACES[number]}([a-z])([A-J;]?)", rest)
      letter, after = found.groups() if found else ("", "")
      ends = rest[2:] == END if is_last else after == PLACES[number + 1]
      right = letter == word[-1] and ends
      verdict &= right
      given = f"{PLACES[number]}{letter}"
      pair = f"{word[-1]}{given}" if self.true_first else f"{given}{word[-1]}"
      after = after if letter == word[-1] else ""
      steps.append(f"{number}{word}{END if is_last else ':'}{pair}{after}{'+' if right else '-'}")
      if not right and self.stop:
        break
    return "".join(steps), verdict

  def _natural_problem(self, words: list[str], split: str, index: int) -> Problem:
    answer = "".join(w[-1] for w in words)
    steps = [f'The last letter of "{w}" is "{w[-1]}".' for w in words]
    return Problem(
      id=f"{self.name}/{split}/{index:05d}",
      task=self.name,
      split=split,
      question=f'Take the last letters of each word in "{" ".join(words)}" and concatenate them.',
      answer=answer,
      reference="\n".join([*steps, f'Together they are "{answer}".', f"The answer is {answer}."]),
    )


def _quoted_words(problem: Problem) -> list[str]:
  quoted = _QUOTED.search(problem.question)
  if not quoted:
    raise UserError(f'{problem.id}: no words in double quotes, as in "paper moon", in {problem.question!r}')
  return quoted[1].split()


def _read_letters(said: str | None) -> str | None:
  """One word, or single letters however they are set apart; None for anything else."""
  words = re.findall(r"[a-z]+", _SENTENCE_END.split(said, maxsplit=1)[0].lower()) if said else []
  return "".join(words) if words and (len(words) == 1 or all(len(w) == 1 for w in words)) else None


def _natural_walk(words: list[str], letters: str | None) -> tuple[str, bool]:
  """The walk in English: one word and letter a line, up to the first that is wrong."""
  if letters is None:
    return "The solution gives no final answer. Wrong.", False
  lines: list[str] = []
  for i, (word, letter) in enumerate(itertools.zip_longest(words, letters)):
    if word is None:
      return "\n".join([*lines, f'The words have ended, but the answer goes on with "{letter}". Wrong.']), False
    has = f'the answer has "{letter}"' if letter else "the answer has ended"
    right = letter == word[-1]
    lines.append(f'{i + 1}. The last letter of "{word}" is "{word[-1]}"; {has}. {"Right" if right else "Wrong"}.')
    if not right:
      return "\n".join(lines), False
  return "\n".join([*lines, "The words have ended, and so has the answer. Right."]), True
