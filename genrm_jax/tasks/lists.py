"""What the list tasks share: their splits, how problems are drawn, and how solutions are graded."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from genrm_jax.records import Problem
from genrm_jax.runtime.errors import UserError
from genrm_jax.tasks import base, compact, natural

STYLES = ("compact", "natural")
_NUMBERS = ("num_problems", "min_words", "max_words")
_RENUMBERED = ("train", "val")
_MAX_REPEATS = 1000  # in a row


@dataclasses.dataclass(frozen=True, kw_only=True)
class ListTask:
  """Problems about lists of words.

  Attributes:
    style: "compact", for character models, or "natural", for a real Gemma.
    walk: options of the compact rationale; {} for the defaults.
    index_shift: whether lists start at a random number in all splits. If not, those of train and val start at 0.
    generator: settings of this split, `{"num_problems", "min_words", "max_words"}`; None: the task has no such split.
    train: likewise, as the others.
  """

  name: ClassVar[str]
  walk_options: ClassVar[tuple[str, ...]] = ()
  split_options: ClassVar[Mapping[str, tuple[str, ...]]] = {}  # further settings, by split

  style: str = "compact"
  walk: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  index_shift: bool = True
  generator: Mapping[str, Any] | None = None
  train: Mapping[str, Any] | None = None
  val: Mapping[str, Any] | None = None
  eval: Mapping[str, Any] | None = None
  in_distribution: Mapping[str, Any] | None = None

  def __post_init__(self):
    if self.style not in STYLES:
      raise UserError(f"task {self.name}: unknown style {self.style!r}; the styles are {', '.join(STYLES)}")
    if self.style == "natural" and not self.index_shift:
      raise UserError(f"task {self.name}: lists in the natural style have no numbers; set index_shift=True")
    for option in self.walk:
      if option not in self.walk_options:
        known = ", ".join(self.walk_options) or "none"
        raise UserError(f"task {self.name}: unknown option {option!r} of walk; the options are: {known}")
    for split in self.splits:
      self._check_split(split)

  @property
  def splits(self) -> tuple[str, ...]:
    """The splits that have settings."""
    return tuple(split for split in base.SPLITS if getattr(self, split) is not None)

  @property
  def notes(self) -> tuple[str, ...]:
    """For the report: on which lengths verifiers are trained and evaluated."""
    if self.train is None or self.eval is None:
      return ()
    lengths = "those of BIG-Bench Hard (2-20)" if self.eval.get("bbh") else _lengths(self.eval)
    return (
      f"Generator and verifiers are trained on lists of {_lengths(self.train)} words and evaluated on {lengths}.",
    )

  def _check_split(self, split: str) -> None:
    settings, known = {**getattr(self, split)}, (*_NUMBERS, *self.split_options.get(split, ()))
    if not set(_NUMBERS) <= set(settings) <= set(known):
      raise UserError(f"task {self.name}: {split} sets {', '.join(settings) or 'nothing'}; it sets {', '.join(known)}")
    least, most = settings["min_words"], settings["max_words"]
    if not (1 <= least <= most and settings["num_problems"] >= 1):
      raise UserError(
        f"task {self.name}: {split} asks for {settings['num_problems']} problems of {least} to {most} words; "
        "ask for 1 or more of each"
      )

  def problems(self, split: str, rng: np.random.Generator) -> list[Problem]:
    """Random problems; a question that was drawn before in this split is drawn again."""
    settings = getattr(self, split)
    seen: set[str] = set()
    drawn: list[Problem] = []
    repeats = 0
    while len(drawn) < settings["num_problems"]:
      num_words = int(rng.integers(settings["min_words"], settings["max_words"] + 1))
      problem = self.problem(rng, num_words, split, len(drawn))
      repeats = repeats + 1 if problem.question in seen else 0
      if repeats > _MAX_REPEATS:
        raise UserError(
          f"task {self.name}: only {len(drawn)} of {settings['num_problems']} problems of split {split} were found to "
          "differ; ask for fewer, or for longer lists"
        )
      if not repeats:
        seen.add(problem.question)
        drawn.append(problem)
    return drawn if self.index_shift or split not in _RENUMBERED else compact.renumber(drawn, [])[0]

  def grade(self, problem: Problem, text: str) -> base.Grade:
    """Reads the answer of a solution; it is correct if it is the problem's to the character."""
    answer = self.extract_answer(text)
    return base.Grade(answer, answer is not None and answer == problem.answer)

  def first_solution(self, text: str) -> str:
    """The solution alone, cut where a base model starts to invent the next question."""
    return natural.first_solution(text)

  def problem(self, rng: np.random.Generator, num_words: int, split: str, index: int) -> Problem:
    """A random problem with so many words."""
    raise NotImplementedError

  def extract_answer(self, text: str) -> str | None:
    """The answer of a solution, None where it gives none."""
    raise NotImplementedError


def _lengths(split: Mapping[str, Any]) -> str:
  return "-".join(str(n) for n in sorted({split["min_words"], split["max_words"]}))
