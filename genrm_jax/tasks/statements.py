r"""Where a solution states its final answer, whatever the task: after "The answer is", or in a box of LaTeX."""

import re
from typing import NamedTuple

ANSWER_IS = re.compile(r"\banswer(?:\*\*|__)? is(?![a-z])(?:\s*:)?", re.IGNORECASE)

# What chat models write where their turn ends, and their other special tokens.
_TURN_END = re.compile(
  r"<[|｜](?:im_end|eot_id|eom_id|end|eot|return|endoftext|end_of_text|end_of_turn|end[▁_]of[▁_]sentence)[|｜]>"
  r"|<(?:end_of_turn|eos|pad|EOT|turn\|)>|</s>|\[/?INST\]"
)
_SPECIAL_TOKEN = re.compile(r"<[|｜][^<>|｜\n]{1,40}[|｜]>|<(?:start_of_turn|bos|s|\|turn)>")

_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])[ \t]*")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
# A box without braces extends to the end of its formula, or else over one word.
_UNBRACED = re.compile(r"([^$\n\\]*(?:\\[^)\]\n][^$\n\\]*)*)(?:\$|\\[)\]])|([^\s$]+)")


class Box(NamedTuple):
  """A box: where it begins, and its content; None where it does not end within the characters that were read."""

  start: int
  content: str | None
  read_to_end: bool  # of the text


def first_turn(text: str) -> str:
  """The text up to where the first turn ends, without special tokens."""
  if "<" not in text and "INST]" not in text:
    return text
  start = 0
  while leading := _TURN_END.match(text, start) or _SPECIAL_TOKEN.match(text, start):  # padding
    start = leading.end()
  end = _TURN_END.search(text, start)
  return _SPECIAL_TOKEN.sub(" ", text[start : end.start() if end else len(text)])


def after_answer_is(text: str) -> int | None:
  """Where the last "answer is" of a text ends, None where it has none."""
  near = max(text.rfind("answer is"), 0)  # most are written like this
  match = last_match(ANSWER_IS, text, near) or last_match(ANSWER_IS, text)
  return match.end() if match else None


def last_box(text: str, max_characters: int) -> Box | None:
  r"""The last `\boxed` or `\fbox`, with braces (nested ones, and `\{`) or without; None where there is none.

  "so $\boxed{\frac{1}{2}}$."  -> "\frac{1}{2}"      "$\boxed 5$" -> "5"      "\boxed{5" -> None
  """
  box = last_match(_BOX, text)
  if box is None:
    return None
  rest = text[box.end() : box.end() + max_characters + 2]
  if rest.startswith("{"):
    end = _closing(rest)
    return Box(box.start(), None if end is None else rest[1:end], box.end() + len(rest) == len(text))
  match = _UNBRACED.match(rest)
  return Box(box.start(), next(filter(None, match.groups()), "") if match else "", True)


def last_match(pattern: re.Pattern[str], text: str, start: int = 0) -> re.Match[str] | None:
  """The last of the matches that do not overlap, from `start` on."""
  last = None
  for last in pattern.finditer(text, start):  # noqa: B007
    pass
  return last


def _closing(text: str) -> int | None:
  """The index at which the opening brace of the text is closed. A brace after a backslash does not count."""
  depth = 0
  for match in _BRACE.finditer(text):
    depth += {"{": 1, "}": -1}.get(match[0], 0)
    if depth == 0 and match[0] == "}":
      return match.start()
  return None
