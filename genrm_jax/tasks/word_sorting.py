"""Word Sorting (paper, section 4.1): put a list of words into alphabetical order.

The compact style, for character models, writes numbered lists (see compact.py). A solution is the sorted list, each
word with its number in the question, so that a problem has exactly one right solution:

    question   3mike4dlih5make;      solution   D4dlihE5makeF3mike.      answer   D4dlihE5makeF3mike

The program's rationale never sorts. With each number it advances by one item in both lists at once: the item of the
question, which the solution must have under the same number, and the item of the solution, which must precede the next
one in the alphabet. It stops at the first error:

    3mike:mike+D4dlihE5make:dm<       number 3 in question and solution; items D and E, letters up to where they differ
    4dlih:dlih+E5makeF3mike:mm+ai<
    5make;make+F3mike.+               ";" and ".": both lists end here

    solution D4dlihE3mikeF5make.      ends in  E3mikeF5make:mm+ia>    two words out of order
    solution D4dlihE5majeF3mike.      ends in  5make;maje-            a word misspelt
    solution D4dlihE3mike.            ends in  E3mike.-               a word missing
    solution D4dlihE5makeF3mikeG6x.   ends in  F3mikeG-               a word too many
    solution D4dlihE5makeF5make.      ends in  3mike:-                a word twice, so another is missing
    solution C6xD4dlihE5makeF3mike.   ends in  3mike:mike+C-          a beginning of its own
    solution D4dlihE5makeF3mike       ends in  F3mike-                no end

Why this walk suits models that see at most 4 words in training and are evaluated on 5:
  - Every lookup is by a number or a letter that occurs once in the list. Finding a word by its letters is beyond a
    small model where others begin alike; so is finding its place, which takes counting.
  - Number and letter increase together, as in the walk of last_letter.py, which is known to generalise to longer lists.
    The lists end together, so their lengths agree; each number is found; so each item occurs once.
  - What a mark depends on is written right before it.

The natural style, for a real Gemma, asks as BIG-Bench Hard does, whose problems `read_bbh` reads.
"""

import bisect
import dataclasses
import itertools
import json
import os
import re
import types
from collections.abc import Iterator, Sequence

import numpy as np
from etils import epath

from genrm_jax.records import Problem
from genrm_jax.runtime.errors import UserError
from genrm_jax.tasks import natural
from genrm_jax.tasks.compact import (
  END,
  ITEM,
  PLACES,
  random_first,
  random_word,
  read_list,
  write_list,
  write_placed,
)
from genrm_jax.tasks.lists import ListTask

_ASK = "Sort the following words alphabetically: List:"
STOP = "."
_PLACED = re.compile(r"([A-J])([0-9])([a-z]+)")
_SOLUTION = re.compile(rf"(?:{_PLACED.pattern})+\.")
_ALIKE = 0.25
_LAST_AND = re.compile(r",\s*and\s+(\w\S*)\W*\Z")  # before the last word; "and" may also be a word of the list
_SHOTS = ("plum apple pear", "stone river", "window basket table lamp bath")
_BBH_FOLDERS = ("BIG-Bench-Hard/bbh", "bbh", "")
_BBH_FILE = "word_sorting.json"


def draw_words(rng: np.random.Generator, num_words: int, alike: float, style: str = "compact") -> list[str]:
  """Distinct words, of which a share of about `alike` begins with the first 1 to 3 letters of an earlier one.

  Of independent random words 1 in 26 begin alike, so a verifier would hardly ever need second letters.
  """
  words: list[str] = []
  while len(words) < num_words:
    shared = int(rng.integers(1, 4)) if words and rng.random() < alike else 0
    beginning = words[rng.integers(len(words))][:shared] if shared else ""
    draw = natural.random_word if style == "natural" else _random_word
    word = draw(rng, beginning)
    if word not in words:
      words.append(word)
  return words


def _random_word(rng: np.random.Generator, beginning: str) -> str:
  return beginning + random_word(rng)[len(beginning) :]


def order(left: str, right: str) -> str:
  """Compares two words letter by letter up to the first difference: "<" if the left one comes first, else ">"."""
  steps: list[str] = []
  for a, b in itertools.zip_longest(left, right, fillvalue="_"):  # "_" sorts before every letter
    if a != b:
      return "".join([*steps, f"{a}{b}{'<' if a < b else '>'}"])
    steps.append(f"{a}{b}+")
  return "".join([*steps, "__>"])


def write_items(items: Sequence[tuple[int, str]], first: int) -> str:
  """Items with their numbers, in any order, at the places from `first` on: `[(4, "dlih")]` from 3 on is "D4dlih."."""
  return write_placed([f"{number}{word}" for number, word in items], first, STOP)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WordSorting(ListTask):
  """The task; see `ListTask` for its options. `eval` may set `bbh`: the problems are then those of `read_bbh(bbh)`."""

  name = "word_sorting"
  split_options = types.MappingProxyType({"eval": ("bbh",)})

  def problems(self, split: str, rng: np.random.Generator) -> list[Problem]:
    """Random problems, or those of BIG-Bench Hard."""
    bbh = getattr(self, split).get("bbh")
    return read_bbh(bbh) if bbh else super().problems(split, rng)

  def problem(self, rng: np.random.Generator, num_words: int, split: str, index: int) -> Problem:
    """A random problem; a compact list starts at a random number, as far as its length allows."""
    words = draw_words(rng, num_words, _ALIKE, self.style)
    problem_id = f"{self.name}/{split}/{index:05d}"
    if self.style == "natural":
      return self._natural_problem(words, problem_id, split)
    first = random_first(rng, num_words)
    reference = write_items(sorted(enumerate(words, first), key=lambda item: item[1]), first)
    answer = reference.removesuffix(STOP)
    return Problem(problem_id, self.name, split, write_list(words, first), answer, reference)

  def few_shot(self, solve: str) -> str:
    """Worked examples in the natural style; see `natural.few_shot`."""
    examples = [self._natural_problem(shot.split(), "few_shot", "few_shot") for shot in _SHOTS]
    return natural.few_shot(self.name, self.style, examples, solve)

  def extract_answer(self, text: str) -> str | None:
    """The sorted list of a solution, None where it gives none.

    Compact: the items, if there are any and "." ends them. Natural: the words of the final answer in lower case,
    separated by spaces, without numbers, quotes, commas and other marks around them.
    """
    if self.style == "natural":
      listed = _LAST_AND.sub(r", \1", natural.final_answer(text) or "")
      return " ".join(_read_words(listed)) or None
    return text.removesuffix(STOP) if _SOLUTION.fullmatch(text) else None

  def rationale(self, problem: Problem, solution: str) -> tuple[str, bool]:
    """The program's walk through question and solution, and its verdict."""
    if self.style == "natural":
      answer = self.extract_answer(solution)
      return _natural_walk(listed_words(problem), answer.split() if answer else [])
    words, first = read_list(problem.question)
    if len(set(words)) < len(words):
      raise UserError(
        f"{problem.id}: a word occurs twice in {problem.question!r}; the compact style needs distinct words"
      )
    steps = []
    for step in _compact_steps(words, first, solution):
      steps.append(step)
      if step[-1] not in "+<":
        return "".join(steps), False
    return "".join(steps), True

  def edited(self, problem: Problem, rng: np.random.Generator) -> str:
    """A worked solution in the natural style in which one word is misplaced, forgotten or misspelt."""
    words, steps, done = listed_words(problem), list[tuple[str, list[str]]](), list[str]()
    at, kind = rng.integers(len(words)), rng.integers(4)
    for i, word in enumerate(words):
      place, put = bisect.bisect(done, word), [word]
      if i == at and kind < 2:
        place = int(rng.integers(len(done) + 1))
      elif i == at:
        cut = int(rng.integers(1, len(word) + 1))
        swapped, doubled = (
          word[: cut - 1] + word[cut : cut + 1] + word[cut - 1] + word[cut + 1 :],
          word[:cut] + word[cut - 1 :],
        )
        put = [] if kind == 2 else [swapped if rng.random() < 0.5 else doubled]
      done = [*done[:place], *put, *done[place:]]
      steps.append((word, done))
    wrong = done and done != sorted(words)
    return _natural_solution(steps) if wrong else self.edited(problem, rng)

  def _natural_problem(self, words: list[str], problem_id: str, split: str) -> Problem:
    steps = [(word, sorted(words[: i + 1])) for i, word in enumerate(words)]
    reference, answer = _natural_solution(steps), " ".join(sorted(words))
    return Problem(problem_id, self.name, split, f"{_ASK} {' '.join(words)}", answer, reference)


def _compact_steps(words: list[str], first: int, solution: str) -> Iterator[str]:
  """The steps of the walk, each ending in its mark. Steps after the first error are meaningless."""
  written: dict[int, str] = {}
  for number, word in ITEM.findall(solution):
    written.setdefault(int(number), word)

  end = 0  # of the part of the solution that has been walked
  for number, word in enumerate(words, first):
    is_last = number == first + len(words) - 1
    found = written.get(number, "")
    yield f"{number}{word}{END if is_last else ':'}{found}{'+' if found == word else '-'}"

    item = _PLACED.match(solution, end)
    if not item or item[1] != PLACES[number]:
      yield f"{item[1] if item else ''}-"
      return
    end = item.end()
    following = _PLACED.match(solution, end)
    if solution[end:] == STOP:
      yield f"{item[0]}{STOP}{'+' if is_last else '-'}"
    elif following and not is_last and following[1] == PLACES[number + 1]:
      yield f"{item[0]}{following[0]}:{order(item[3], following[3])}"
    else:
      yield f"{item[0]}{following[1] if following else ''}-"


def _shared(a: str, b: str) -> int:
  """The length of the common prefix of two words."""
  return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


# ---------------------------------------------------------------------------------------------------------------------
# The natural style


def listed_words(problem: Problem) -> list[str]:
  """The words that a question in the natural style lists; UserError if it lists none."""
  words = _read_words(problem.question.partition(_ASK)[2])
  if not words:
    raise UserError(f'{problem.id}: no words after "{_ASK}" in {problem.question!r}')
  return words


def _read_words(text: str) -> list[str]:
  """The words of a list in free text, in lower case, without marks at their ends and without numbers."""
  words = [re.sub(r"^[\W_]*(?:\d+[.)][\W_]*)?|[\W_]+$", "", w) for w in re.split(r"[\s,;]+", text.lower())]
  return [w for w in words if w and not w.isdigit()]


def _natural_solution(steps: Sequence[tuple[str, Sequence[str]]]) -> str:
  """A worked solution: one step per word, as (word, the list so far)."""
  lines = [f"{word}: {' '.join(done)}" for word, done in steps]
  return "\n".join(["Put in one word at a time.", *lines, f"The answer is {' '.join(steps[-1][1])}."])


def _natural_walk(words: list[str], answer: list[str]) -> tuple[str, bool]:
  """The walk in English, one step per line, up to the first error."""
  if not answer:
    return "The solution gives no final answer. Wrong.", False
  lines: list[str] = []
  left: list[str | None] = list(answer)  # None where the word has been found
  for word in words:
    if word not in left:
      return "\n".join([*lines, f"{word}: not in the answer{' again' * (word in answer)}. Wrong."]), False
    place = left.index(word)
    left[place] = None
    lines.append(f"{word}: {f'after {answer[place - 1]}' if place else 'first'}. Right.")
  more = next((w for w in left if w is not None), None)
  if more is not None:
    return "\n".join([*lines, f"{more}: one word too many. Wrong."]), False
  lines.append("No other words. Right.")
  for before, after in itertools.pairwise(answer):
    lines.append(f"{before}, {after}: {_compared(before, after)}. {'Right' if before <= after else 'Wrong'}.")
    if before > after:
      return "\n".join(lines), False
  return "\n".join([*lines, "All words in order. Right."]), True


def _compared(before: str, after: str) -> str:
  """Two neighbouring words letter by letter up to the first difference: a subword model sees no letters in a piece."""
  place = _shared(before, after)
  pairs = [f"{a} {b}" for a, b in zip(before[: place + 1], after[: place + 1], strict=False)]
  ends = [] if place < min(len(before), len(after)) else [f"{before if place == len(before) else after} ends"]
  return ", ".join([*pairs, *ends])


# ---------------------------------------------------------------------------------------------------------------------
# BIG-Bench Hard


def read_bbh(path: str | os.PathLike[str]) -> list[Problem]:
  """The 250 problems of BIG-Bench Hard (2 to 20 words), in the natural style; for evaluation only.

  Args:
    path: `word_sorting.json` of suzgunmirac/BIG-Bench-Hard, the folder that holds it, the clone, or the clone's folder.

  Raises:
    UserError: no such file, an example that is no sorting problem, or a target that is not the sorted list.
  """
  found = _bbh_path(epath.Path(path))
  fresh = f"take {_BBH_FILE} from a fresh clone of https://github.com/suzgunmirac/BIG-Bench-Hard"
  try:
    examples = json.loads(found.read_bytes())["examples"]
    pairs = [(e["input"], e["target"]) for e in examples]
  except (ValueError, TypeError, KeyError) as e:
    raise UserError(
      f'{found}: not a BIG-Bench Hard task, {{"examples": [{{"input", "target"}}]}} ({type(e).__name__}: {e}); {fresh}'
    ) from e
  problems = []
  for i, (question, target) in enumerate(pairs):
    words = question.removeprefix(_ASK).split() if isinstance(question, str) and question.startswith(_ASK) else []
    if not words or target != " ".join(sorted(words)):
      raise UserError(f'{found}: example {i} is not "{_ASK} ..." with the sorted list as its target; {fresh}')
    problems.append(Problem(f"word_sorting/bbh/{i:05d}", "word_sorting", "bbh", question, target))
  return problems


def _bbh_path(path: epath.Path) -> epath.Path:
  if path.is_file():
    return path
  places = [path / folder / _BBH_FILE for folder in _BBH_FOLDERS]
  found = next((p for p in places if p.is_file()), None)
  if found is None:
    raise UserError(
      f"no Word Sorting problems of BIG-Bench Hard; looked for {', '.join(str(p) for p in places)}; "
      f"git clone https://github.com/suzgunmirac/BIG-Bench-Hard {path / 'BIG-Bench-Hard'}"
    )
  return found
