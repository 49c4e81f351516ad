"""Last Letter Concatenation (paper, section 4.1): join the last letters of a list of words.

The compact style, for character models, writes numbered lists (see compact.py):

    question   3mike4dlih;      solution   DeEh;      answer   eh

The program's rationale walks both lists at once: number, word, what ends it (";" after the last), true letter, place,
the solution's letter at that place and what follows it, mark. It stops at the first error, so it ends in the verdict
that the answer deserves:

    solution DeEh;    3mike:eDeE+4dlih;hEh;+        solution DeEi;    3mike:eDeE+4dlih;hEi-
    solution De;      3mike:eDe;-                   solution DeEhFa;  3mike:eDeE+4dlih;hEhF-

The place is written whether the solution has it or not: a walk that wrote "." instead taught small models that no list
has a fifth word.

The natural style, for a real Gemma, asks and verifies in English; its answer is read from free text.
"""

import dataclasses
import itertools
import re
import string
from collections.abc import Sequence

import numpy as np

from genrm_jax.records import Problem
from genrm_jax.runtime.errors import UserError
from genrm_jax.tasks import natural
from genrm_jax.tasks.compact import END, PLACES, random_first, random_word, read_list, write_list, write_placed
from genrm_jax.tasks.lists import ListTask

_QUOTED = re.compile(r'"([a-z]+(?: [a-z]+)*)"')
_SENTENCE_END = re.compile(r"[.!?](?:\s|$)")
_LETTERS = string.ascii_lowercase
_SHOTS = ("paper moon", "lamp basket orange", "quiet river stone window")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LastLetter(ListTask):
  """The task; see `ListTask` for its options.

  Options of `walk`:
    true_first: whether the compact walk writes the true letter before the solution's ("aDb-", the default) or after it
      ("Dba-").
    stop: whether the compact walk stops at the first error (the default) or goes on to the end of the list.
  """

  name = "last_letter"
  walk_options = ("true_first", "stop")

  def problem(self, rng: np.random.Generator, num_words: int, split: str, index: int) -> Problem:
    """A random problem; a compact list starts at a random number, as far as its length allows."""
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
    """Worked examples in the natural style; see `natural.few_shot`."""
    examples = [self._natural_problem(shot.split(), "few_shot", i) for i, shot in enumerate(_SHOTS)]
    return natural.few_shot(self.name, self.style, examples, solve)

  def extract_answer(self, text: str) -> str | None:
    """The letters of a solution, None where it gives none.

    Compact: of a well-formed solution (consecutive places, ended by ";"). Natural: of the final answer, one word or
    single letters ("eh", "e-h", "e, h").
    """
    if self.style == "natural":
      return _read_letters(natural.final_answer(text))
    if not re.fullmatch(r"(?:[A-J][a-z])+;", text) or text[:-1:2] not in PLACES:
      return None
    return text[1::2]

  def rationale(self, problem: Problem, solution: str) -> tuple[str, bool]:
    """The program's walk through the list, and its verdict."""
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
      written = f"{PLACES[number]}{letter}"
      pair = f"{word[-1]}{written}" if self.walk.get("true_first", True) else f"{written}{word[-1]}"
      after = after if letter == word[-1] else ""
      steps.append(f"{number}{word}{END if is_last else ':'}{pair}{after}{'+' if right else '-'}")
      if not right and self.walk.get("stop", True):
        break
    return "".join(steps), verdict

  def edited(self, problem: Problem, rng: np.random.Generator) -> str:
    """A worked solution in the natural style with one error: a wrong letter of a word, or letters joined wrongly."""
    words = _quoted_words(problem)
    letters = [w[-1] for w in words]
    i, joined = int(rng.integers(len(words))), list(letters)
    kind = rng.integers(5)
    if kind < 2:  # of the word, mostly
      letters[i] = joined[i] = words[i][rng.integers(len(words[i]))] if kind else _LETTERS[rng.integers(26)]
    elif kind == 2:
      joined[i] = _LETTERS[rng.integers(26)]
    elif kind == 3:
      joined[i : i + 1] = [] if rng.random() < 0.5 and len(joined) > 1 else [joined[i]] * 2
    else:
      joined[i : i + 2] = reversed(joined[i : i + 2])
    answer = "".join(joined)
    return self.edited(problem, rng) if answer == problem.answer else _natural_solution(words, letters, answer)

  def _natural_problem(self, words: list[str], split: str, index: int) -> Problem:
    answer = "".join(w[-1] for w in words)
    return Problem(
      id=f"{self.name}/{split}/{index:05d}",
      task=self.name,
      split=split,
      question=f'Take the last letters of each word in "{" ".join(words)}" and concatenate them.',
      answer=answer,
      reference=_natural_solution(words, answer, answer),
    )


def _quoted_words(problem: Problem) -> list[str]:
  quoted = _QUOTED.search(problem.question)
  if not quoted:
    raise UserError(f'{problem.id}: no words in double quotes, as in "paper moon", in {problem.question!r}')
  return quoted[1].split()


def _read_letters(final_answer: str | None) -> str | None:
  """One word, or single letters however separated; None for anything else."""
  sentence = _SENTENCE_END.split(final_answer or "", maxsplit=1)[0]
  words = re.findall(r"[a-z]+", sentence.rpartition("=")[2].lower())  # "e + h = eh"
  return "".join(words) if words and (len(words) == 1 or all(len(w) == 1 for w in words)) else None


def _natural_solution(words: Sequence[str], letters: Sequence[str], answer: str) -> str:
  """A worked solution: a line for each word with its letter, and the answer."""
  steps = [f'The last letter of "{word}" is "{letter}".' for word, letter in zip(words, letters, strict=True)]
  return "\n".join([*steps, f'Together they are "{answer}".', f"The answer is {answer}."])


def _natural_walk(words: list[str], letters: str | None) -> tuple[str, bool]:
  """The walk in English, one word and letter per line, up to the first error.

  It spells the answer and each word first: a subword model sees no letters inside a piece.
  """
  if letters is None:
    return "The solution gives no final answer. Wrong.", False
  lines = [f"Answer: {', '.join(f'{i} {letter}' for i, letter in enumerate(letters, 1))}."]
  for i, (word, letter) in enumerate(itertools.zip_longest(words, letters), 1):
    if word is None:
      return "\n".join([*lines, f"No more words, but answer {i} {letter}. Wrong."]), False
    right = letter == word[-1]
    has = f"Answer {i} {letter}." if letter else "The answer has ended."
    lines.append(f"{i}. {word}: {' '.join(word)}, so {word[-1]}. {has} {'Right' if right else 'Wrong'}.")
    if not right:
      return "\n".join(lines), False
  return "\n".join([*lines, "No more words, and no more letters. Right."]), True
