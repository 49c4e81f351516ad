"""What the library asks of a task."""

from typing import Protocol


class Task(Protocol):
  """A family of problems whose final answers can be read and compared."""

  @property
  def name(self) -> str: ...

  def extract_answer(self, text: str) -> str | None:
    """The normalised final answer of a solution, None where it gives none."""

  def same_answer(self, a: str | None, b: str | None) -> bool:
    """Whether two answers mean the same; None is the same as nothing, not even as None."""
