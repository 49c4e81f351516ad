"""Finds the verdict in a sampled rationale, and so the state of the vote that it casts.

    sampled ids    r a t i o n a l e  <conclude>  Yes  <eos>
                                                  ^ verdict_index: p(Yes) and p(No) are read at this token

States of a vote:
  ok             the rationale poses the verdict question; p(Yes) is read right after it
  forced         the token budget ran out first; the rest of `conclude` is appended and p(Yes) is read after it
  truncated      the token budget ran out first and the context has no room for the question: no number
  missing        the rationale ended on its own without the question: no number
  contradictory  the question occurs more than once, answered Yes in one place and No in another: no number
"""

import bisect
import dataclasses

from genrm_jax.text.prompts import Prompter


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
  tokenizer, question = prompter.tokenizer, prompter.format.verdict_question
  ended = bool(ids) and ids[-1] == prompter.end_id
  body = ids[:-1] if ended else ids
  text = tokenizer.decode(body)
  if question in text:
    answers = {a for a in (_answer(part, prompter) for part in text.split(question)[1:]) if a is not None}
    if len(answers) > 1:
      return VerdictLocation("contradictory")
    # The shortest prefix of ids that contains the question. Counting characters would not do: a character cut between
    # its bytes decodes to more than one.
    index = bisect.bisect_left(range(len(body)), True, key=lambda n: question in tokenizer.decode(body[:n]))
    if index < len(ids):
      return VerdictLocation("ok", verdict_index=index)
    return VerdictLocation("forced")
  if ended:
    return VerdictLocation("missing")
  suffix = tuple(tokenizer.encode(_rest_of(prompter.format.render(prompter.format.conclude), text)))
  return VerdictLocation("forced", suffix=suffix) if len(suffix) <= room else VerdictLocation("truncated")


def _answer(text: str, prompter: Prompter) -> bool | None:
  """The verdict that a text begins with; "Nothing" is no "No"."""
  for word, answer in ((prompter.format.yes, True), (prompter.format.no, False)):
    if text.startswith(word) and not text[len(word) : len(word) + 1].isalpha():
      return answer
  return None


def _rest_of(conclude: str, text: str) -> str:
  """The part of `conclude` that is still missing from a text, which may already end with its beginning."""
  for n in range(len(conclude) - 1, 0, -1):
    if text.endswith(conclude[:n]):
      return conclude[n:]
  return conclude
