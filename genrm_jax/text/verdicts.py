"""Finds the verdict in a sampled rationale, and so the state of the vote that it casts.

    sampled ids    r a t i o n a l e  <conclude>  Yes  <eos>
                                                  ^ verdict_index: p(Yes) and p(No) are read at this token

The question may occur more than once, quoted or posed again. Its last occurrence with an answer counts. Only the token
" Yes" or " No" right after it gives a number: p(Yes) is no measure of a verdict in other marks or words ("**Yes**").

States of a vote:
  ok             the verdict question is answered by a verdict token; p(Yes) is read at that token
  forced         the token budget ran out first; the rest of `conclude` is appended and p(Yes) is read after it
  truncated      the token budget ran out first and the context has no room for the question: no number
  missing        the rationale ended on its own without the question: no number
  malformed      the question is there, but what follows is no verdict token ("\\nYes", "Not sure"): no number
  contradictory  Yes in one place and No in another ("No. Wait, Yes", "Yes and no"): no number
"""

import bisect
import dataclasses
import functools
import re

from genrm_jax.text.prompts import Prompter, PromptFormat


@dataclasses.dataclass(frozen=True)
class VerdictLocation:
  """Where the verdict of a sampled rationale is read.

  Attributes:
    state: of the vote.
    verdict_index: the index of the verdict among the sampled ids, where the state is "ok".
    suffix: ids to append before the verdict can be read, where the state is "forced".
  """

  state: str
  verdict_index: int | None = None
  suffix: tuple[int, ...] = ()


def read_rationale(ids: list[int], prompter: Prompter, room: int) -> VerdictLocation:
  """Finds the verdict in sampled ids.

  Args:
    ids: sampled ids up to and including the end mark, which is there if the rationale ended on its own.
    prompter: holds the tokenizer and the prompt format.
    room: how many more tokens fit into the context after `ids`.
  """
  tokenizer, form = prompter.tokenizer, prompter.format
  ended = bool(ids) and ids[-1] == prompter.end_id
  body = ids[:-1] if ended else ids
  text = tokenizer.decode(body)
  _, *tails = text.split(form.verdict_question)
  answers = [_answers(tail, form) for tail in tails]
  if len(frozenset().union(*answers)) > 1:
    return VerdictLocation("contradictory")
  if answered := [number for number, found in enumerate(answers, start=1) if found]:
    index = _verdict_index(body, prompter, answered[-1], tails[answered[-1] - 1])
    return VerdictLocation("malformed") if index is None else VerdictLocation("ok", verdict_index=index)
  if ended:
    return VerdictLocation("malformed" if tails else "missing")
  asks = bool(tails) and not tails[-1]
  suffix = () if asks else tuple(tokenizer.encode(_rest_of(form.render(form.conclude), text)))
  return VerdictLocation("forced", suffix=suffix) if len(suffix) <= room else VerdictLocation("truncated")


def _verdict_index(body: list[int], prompter: Prompter, occurrence: int, tail: str) -> int | None:
  """The index of the verdict token right after an occurrence of the question; None if another token stands there."""
  question, decode = prompter.format.verdict_question, prompter.tokenizer.decode
  # The shortest prefix of ids with that many occurrences. Counting characters would not do: a character cut between
  # its bytes decodes to more than one.
  index = bisect.bisect_left(range(len(body)), occurrence, key=lambda n: decode(body[:n]).count(question))
  if index == len(body) or not decode(body[:index]).endswith(question):
    return None
  said = {prompter.yes_id: prompter.format.yes, prompter.no_id: prompter.format.no}.get(body[index])
  return index if said is not None and tail.startswith(said) else None


def _answers(tail: str, form: PromptFormat) -> set[bool]:
  """The verdicts in the text from one occurrence of the question to the next: none, one, or two that contradict."""
  first, joined, later = _patterns(form.yes, form.no)
  found = first.match(tail)
  if not found:
    return set()
  rest = tail[found.end() :]
  another = joined.match(rest)
  if another and another["choice"]:  # "Yes/No", "Yes or No": the question's words, no answer
    return set()
  words = [found[1], *([another["both"]] if another else []), *later.findall(rest)]
  return {_is_yes(word, form) for word in words}


def _is_yes(word: str, form: PromptFormat) -> bool:
  yes, no = form.yes.strip() or form.yes, form.no.strip() or form.no
  return word == yes or (word != no and word.casefold() == yes.casefold())


@functools.cache
def _patterns(yes: str, no: str) -> tuple[re.Pattern[str], re.Pattern[str], re.Pattern[str]]:
  """Patterns of the verdict that a text begins with, of another joined to it, and of one that stands by itself.

  Verdicts count in any case and marks, but only as whole words: "Nothing" and "no errors" are no "No".
  """
  words = [word.strip() or word for word in (yes, no)]
  word = rf"(?<![^\W_])(?:{'|'.join(map(re.escape, words))})(?![^\W_])"
  mark, alone = rf"(?:(?!{word})(?:</?[A-Za-z]+>|[\W_]))", r"(?=\s*(?:[^\w\s]|_|$))"
  later = rf"(?<![/-])({word})(?!\s*/|-\w|\.?\s*\d){alone}" if all(map(str.isalpha, words)) else "(?!)"
  return (
    re.compile(rf"{mark}*({word})", re.IGNORECASE),
    re.compile(
      rf"{mark}{{0,9}}?(?:(?P<choice>/|\bor\b){mark}{{0,9}}(?:{word})|(?:&|\band\b){mark}{{0,9}}(?P<both>{word}){alone})",
      re.IGNORECASE,
    ),
    re.compile(later, re.IGNORECASE),
  )


def _rest_of(conclude: str, text: str) -> str:
  """The part of `conclude` that is still missing from a text, which may already end with its beginning."""
  for n in range(len(conclude) - 1, 0, -1):
    if text.endswith(conclude[:n]):
      return conclude[n:]
  return conclude
