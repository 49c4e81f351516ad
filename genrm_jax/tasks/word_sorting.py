"""Word Sorting (paper, section 4.1): put a list of words into alphabetical order.

The compact form for character models numbers the items as last_letter.py does. A solution is the sorted list, each
word with the number that it has in the question, so that there is one right solution to a problem. Its marks are not
the question's, so that what stands in it cannot be mixed up with what stands there:

    question   3mike4dlih5make;      solution   4dlih,5make,3mike.      answer   4dlih,5make,3mike

The program's rationale never sorts. It goes through the question, finds each word in the solution by its number, and
shows that it is the same and that the word after it comes later in the alphabet. It stops at the first error:

    3mike:mike.+               the word of the question, that of the solution, which ends there
    4dlih:dlih,5make:dm<       the word that follows, and the letters of both up to where they differ
    5make:make,3mike:mm+ai<
    ;+                         the first item of the solution is one of the question's, too

    solution 4dlih,3mike,5make.         ends in  3mike:mike,5make:mm+ia>    two words out of order
    solution 4dlih,5maje,3mike.         ends in  5make:maje-                a word misspelt
    solution 4dlih,3mike.               ends in  5make:-                    a word missing
    solution 4dlih,5make,3mike,6x.      ends in  3mike:mike,6-              a number that the question has not
    solution 4dlih,5make,3mike,4zz.     ends in  3mike:mike,4-              a number that was there before
    solution 6x,4dlih,5make,3mike.      ends in  mm+ai<;-                   and at the beginning
    solution 4dlih,5make,5make,3mike.   ends in  5make:make,5make:mm+aa+kk+ee+__>    a word twice
    solution 4dlih,5make,3mike          ends in  3mike:mike-                no end

Why this walk, for models that see at most 4 words in training and meet 5:
  - It goes through the question as the walk of last_letter.py does, number by number, which is known to carry over to
    longer lists. A word is found by its number, and what follows it by reading on. To find a word by its letters is
    beyond a small model where others begin alike; so is the number that it would have in the sorted list, which has to
    be counted. In a walk through the solution a slip leads on to the end and so to a Yes; here mostly to a No.
  - Before a mark stands what it depends on.
  - Neighbours are enough: items that all are the question's and rise strictly hold each word once.

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

from genrm_jax.errors import UserError
from genrm_jax.tasks import natural
from genrm_jax.tasks.last_letter import END, ITEM, random_first, random_word, read_list, write_list
from genrm_jax.types import Problem

_ASK = "Sort the following words alphabetically: List:"
STOP = "."
_ITEMS = re.compile(r"[0-9][a-z]+(?:,[0-9][a-z]+)*\.")
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


def write_items(items: Sequence[tuple[int, str]]) -> str:
  """Items with their numbers, in any order: `[(4, "dlih"), (3, "mike")]` is "4dlih,3mike."."""
  return f"{','.join(f'{number}{word}' for number, word in items)}{STOP}"


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
    reference = write_items(sorted(enumerate(words, first), key=lambda item: item[1]))
    answer = reference.removesuffix(STOP)
    return Problem(problem_id, self.name, split, write_list(words, first), answer, reference)

  def few_shot(self, solve: str) -> str:
    """Worked examples of the natural form; see `natural.few_shot`."""
    examples = [self._natural_problem(shot.split(), "few_shot", "few_shot") for shot in _SHOTS]
    return natural.few_shot(self.name, self.style, examples, solve)

  def extract_answer(self, text: str) -> str | None:
    """The sorted list of a solution, or None.

    Compact: the items with their numbers, if there are any and "." ends them. Natural: the words of the final answer in
    lower case with a space between, without numbers, quotes, commas and other marks around them.
    """
    if self.style == "natural":
      return " ".join(_read_words(natural.final_answer(text) or "")) or None
    return text.removesuffix(STOP) if _ITEMS.fullmatch(text) else None

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
  """The steps of the walk, each with its mark at the end; what follows the first error means nothing.

  Words are looked for wherever a number and letters stand; what follows each shows whether these make one list.
  """
  given: dict[int, re.Match[str]] = {}
  for item in ITEM.finditer(solution):
    given.setdefault(int(item[1]), item)
  numbers = range(first, first + len(words))

  for number, word in zip(numbers, words, strict=True):
    found = given.get(number)
    step = f"{number}{word}:{found[2] if found else ''}"
    if not found or found[2] != word:
      yield f"{step}-"
      return
    rest = solution[found.end() :]
    following = ITEM.match(rest, 1) if rest.startswith(",") else None
    if rest == STOP:
      yield f"{step}{STOP}+"
    elif following and int(following[1]) in numbers:
      walk = order(word, following[2])
      is_new = given[int(following[1])].start() == found.end() + 1
      yield f"{step},{following[0]}:{walk}" if is_new or walk.endswith(">") else f"{step},{following[1]}-"
    else:
      yield f"{step},{following[1]}-" if following else f"{step}-"
  start = ITEM.match(solution)
  yield f"{END}+" if start and int(start[1]) in numbers else f"{END}-"


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
