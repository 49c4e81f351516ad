"""Word Sorting (paper, section 4.1): put a list of words into alphabetical order.

The compact form for character models numbers the words, and gives letters to the places of a solution, as
last_letter.py does. A solution is the sorted list, each word with the number that it has in the question, so that there
is one right solution to a problem:

    question   3mike4dlih5make;      solution   D4dlihE5makeF3mike.      answer   D4dlihE5makeF3mike

The program's rationale never sorts. With each number it goes one item on in both lists at once: the item of the
question, which the solution must have under the same number, and the item of the solution, which the next one must
follow in the alphabet. It stops at the first error:

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

Why this walk, for models that see at most 4 words in training and meet 5:
  - All that is looked up is looked up by a number or a letter that stands in the list once. To find a word by its
    letters is beyond a small model where others begin alike; so is the place that it would have, which must be counted.
  - Number and letter go up together, as in the walk of last_letter.py, which is known to carry over to longer lists.
    The lists end together, so they have the same length; each number is found; so each item is there once.
  - Before a mark stands what it depends on.

The natural form, for a real Gemma, asks as BIG-Bench Hard does, whose problems `read_bbh` reads.
"""

import dataclasses
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence

import numpy as np
from etils import epath

from genrm_jax.records import Problem
from genrm_jax.runtime.errors import UserError
from genrm_jax.tasks import natural
from genrm_jax.tasks.last_letter import (
  END,
  ITEM,
  PLACES,
  random_first,
  random_word,
  read_list,
  write_list,
  write_placed,
)

_ASK = "Sort the following words alphabetically: List:"
STOP = "."
_PLACED = re.compile(r"([A-J])([0-9])([a-z]+)")
_SOLUTION = re.compile(rf"(?:{_PLACED.pattern})+\.")
_ALIKE = 0.25
_SHOTS = ("plum apple pear", "stone river", "window basket table lamp bath")
_BBH_FOLDERS = ("BIG-Bench-Hard/bbh", "bbh", "")
_BBH_FILE = "word_sorting.json"


def draw_words(rng: np.random.Generator, num_words: int, alike: float, style: str = "compact") -> list[str]:
  """Distinct words; that share of them, by chance, begins with 1 to 3 letters of one before it.

  Of random words drawn apart 1 in 26 begin alike, and a verifier would hardly ever see what second letters are for.
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
  """Two words letter by letter up to the first difference, marked "<" if the left one comes first, else ">"."""
  steps: list[str] = []
  for a, b in itertools.zip_longest(left, right, fillvalue="_"):  # "_" sorts before every letter
    if a != b:
      return "".join([*steps, f"{a}{b}{'<' if a < b else '>'}"])
    steps.append(f"{a}{b}+")
  return "".join([*steps, "__>"])


def write_items(items: Sequence[tuple[int, str]], first: int) -> str:
  """Items with their numbers, in any order, at the places from `first` on: `[(4, "dlih")]` from 3 on is "D4dlih."."""
  return write_placed([f"{number}{word}" for number, word in items], first, STOP)


@dataclasses.dataclass(frozen=True)
class WordSorting:
  """The task. `style` is "compact", for character models, or "natural", for a real Gemma."""

  name: str = "word_sorting"
  style: str = "compact"

  def __post_init__(self):
    natural.check_style(self.style)

  def problem(self, rng: np.random.Generator, num_words: int, split: str, index: int) -> Problem:
    """A random problem; in the compact form the first number is random where the list is short enough to allow it."""
    words = draw_words(rng, num_words, _ALIKE, self.style)
    problem_id = f"{self.name}/{split}/{index:05d}"
    if self.style == "natural":
      return self._natural_problem(words, problem_id, split)
    first = random_first(rng, num_words)
    reference = write_items(sorted(enumerate(words, first), key=lambda item: item[1]), first)
    answer = reference.removesuffix(STOP)
    return Problem(problem_id, self.name, split, write_list(words, first), answer, reference)

  def few_shot(self, solve: str) -> str:
    """Worked examples of the natural form; see `natural.few_shot`."""
    examples = [self._natural_problem(shot.split(), "few_shot", "few_shot") for shot in _SHOTS]
    return natural.few_shot(self.name, self.style, examples, solve)

  def extract_answer(self, text: str) -> str | None:
    """The sorted list of a solution, or None.

    Compact: the items, if there are any and "." ends them. Natural: the words of the final answer in lower case with a
    space between, without numbers, quotes, commas and other marks around them.
    """
    if self.style == "natural":
      return " ".join(_read_words(natural.final_answer(text) or "")) or None
    return text.removesuffix(STOP) if _SOLUTION.fullmatch(text) else None

  def same_answer(self, a: str | None, b: str | None) -> bool:
    return a is not None and a == b

  def rationale(self, problem: Problem, solution: str) -> tuple[str, bool]:
    """The program's walk through question and solution, and the verdict that it comes to."""
    if self.style == "natural":
      answer = self.extract_answer(solution)
      return _natural_walk(listed_words(problem), answer.split() if answer else [])
    words, first = read_list(problem.question)
    if len(set(words)) < len(words):
      raise UserError(
        f"{problem.id}: a word stands twice in {problem.question!r}; the compact form needs distinct words"
      )
    steps = []
    for step in _compact_steps(words, first, solution):
      steps.append(step)
      if step[-1] not in "+<":
        return "".join(steps), False
    return "".join(steps), True

  def _natural_problem(self, words: list[str], problem_id: str, split: str) -> Problem:
    answer = " ".join(sorted(words))
    done: list[str] = []
    lines = ["Put in one word at a time."]
    for word in words:
      done = sorted([*done, word])
      lines.append(f"{word}: {' '.join(done)}")
    reference = "\n".join([*lines, f"The answer is {answer}."])
    return Problem(problem_id, self.name, split, f"{_ASK} {' '.join(words)}", answer, reference)


def _compact_steps(words: list[str], first: int, solution: str) -> Iterator[str]:
  """The steps of the walk, each with its mark at the end; what follows the first error means nothing."""
  given: dict[int, str] = {}
  for number, word in ITEM.findall(solution):
    given.setdefault(int(number), word)

  end = 0  # of the solution's part that has been walked
  for number, word in enumerate(words, first):
    is_last = number == first + len(words) - 1
    found = given.get(number, "")
    yield f"{number}{word}{END if is_last else ':'}{found}{'+' if found == word else '-'}"

    here = _PLACED.match(solution, end)
    if not here or here[1] != PLACES[number]:
      yield f"{here[1] if here else ''}-"
      return
    end = here.end()
    following = _PLACED.match(solution, end)
    if solution[end:] == STOP:
      yield f"{here[0]}{STOP}{'+' if is_last else '-'}"
    elif following and not is_last and following[1] == PLACES[number + 1]:
      yield f"{here[0]}{following[0]}:{order(here[3], following[3])}"
    else:
      yield f"{here[0]}{following[1] if following else ''}-"


def _shared(a: str, b: str) -> int:
  """How many letters two words have in common at their beginning."""
  return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


# ---------------------------------------------------------------------------------------------------------------------
# The natural form


def listed_words(problem: Problem) -> list[str]:
  """The words that a question in the natural form lists; UserError if it lists none."""
  words = _read_words(problem.question.partition(_ASK)[2])
  if not words:
    raise UserError(f'{problem.id}: no words after "{_ASK}" in {problem.question!r}')
  return words


def _read_words(text: str) -> list[str]:
  """The words of a list in free text: lower case, without marks at their ends, without numbers."""
  words = [re.sub(r"^\W+|\W+$", "", w) for w in re.split(r"[\s,;]+", text.lower())]
  return [w for w in words if w and not w.isdigit()]


def _natural_walk(words: list[str], answer: list[str]) -> tuple[str, bool]:
  """The walk in English, one line a step, up to the first error."""
  if not answer:
    return "The solution gives no final answer. Wrong.", False
  lines: list[str] = []
  left: list[str | None] = list(answer)  # None: found already
  for word in words:
    if word not in left:
      return "\n".join([*lines, f'"{word}" is not in the answer{" again" * (word in answer)}. Wrong.']), False
    place = left.index(word)
    left[place] = None
    lines.append(f'"{word}" is word {place + 1} of the answer. Right.')
  more = next((w for w in left if w is not None), None)
  if more is not None:
    return "\n".join([*lines, f'The answer also has "{more}", which is one word too many. Wrong.']), False
  lines.append("The answer has no other words. Right.")
  for before, after in itertools.pairwise(answer):
    lines.append(f'"{before}", "{after}": {_why(before, after)}. {"Right" if before <= after else "Wrong"}.')
    if before > after:
      return "\n".join(lines), False
  return "\n".join([*lines, "All the words are there, in alphabetical order."]), True


def _why(before: str, after: str) -> str:
  """What decides the order of two words that stand one after the other."""
  if before == after:
    return "the same word"
  place = _shared(before, after)
  if place == len(before):
    return "the first ends where the second goes on, so it comes first"
  if place == len(after):
    return "the second ends where the first goes on, so it should come first"
  a, b = before[place], after[place]
  return f'letter {place + 1} is the first that differs, and "{a}" comes {"before" if a < b else "after"} "{b}"'


# ---------------------------------------------------------------------------------------------------------------------
# BIG-Bench Hard


def read_bbh(path: str | os.PathLike[str]) -> list[Problem]:
  """The 250 problems of BIG-Bench Hard (2 to 20 words), in the natural form; for evaluation only, never for training.

  Args:
    path: `word_sorting.json` of suzgunmirac/BIG-Bench-Hard, the folder that holds it, the clone, or the clone's folder.

  Raises:
    UserError: no such file, or an example that is no sorting problem or whose target is not its sorted list.
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
