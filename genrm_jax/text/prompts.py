"""Every template, and the one place that turns a problem, a solution and a rationale into token ids.

Training targets and scoring prompts are built by the same `Prompter`, so a verdict is asked for with exactly the
tokens that it was trained on. With x a problem, y a solution, I the verdict question (paper, sections 3.1 and 3.2):

    solve    <bos> solve(x)                        -> y <end>
    direct   <bos> solve(x) y verify               -> Yes | No
    cot      <bos> solve(x) y verify_cot           -> rationale verdict_question Yes | No <end>

<end> is the tokenizer's eos or, in a chat, the piece that closes a turn.
"""

import dataclasses
from typing import NamedTuple

from genrm_jax.runtime.errors import UserError
from genrm_jax.text.tokenizer import END_OF_TURN, START_OF_TURN, TURN_MARKERS, Tokenizer


@dataclasses.dataclass(frozen=True)
class PromptFormat:
  """The templates of one way to ask. `solve` holds `{question}`; the other texts are appended as they stand."""

  name: str
  solve: str
  verify: str  # after the solution; ends with the verdict question, and the verdict follows
  verify_cot: str  # after the solution; the rationale follows
  verdict_question: str  # after the rationale; the verdict follows
  yes: str = " Yes"
  no: str = " No"
  end: str = ""  # the piece that ends what the model writes; "" is the tokenizer's eos


_INSTRUCTION = (
  'Solve the math problems and provide step-by-step solutions, ending with "The answer is [Insert Final Answer '
  'Here]".\nWhen asked "Verification: Is the answer correct (Yes/No)?", respond with " Yes" or " No" based on the '
  "answer's correctness.\nWhen asked \"Verification: Let's verify step by step.\", verify every step of the solution "
  'and conclude with "Verification: Is the answer correct (Yes/No)?" followed by " Yes" or " No".\n\n'
)
_VERDICT_QUESTION = "Verification: Is the answer correct (Yes/No)?"


def _user_turn(text: str) -> str:
  """A user's turn, and the opening of the model's that follows it, as Gemma's instruction-tuned models know them."""
  return f"{START_OF_TURN}user\n{text}{END_OF_TURN}\n{START_OF_TURN}model\n"


FORMATS = {
  f.name: f
  for f in (
    # As in the authors' released data.
    PromptFormat(
      name="genrm",
      solve=_INSTRUCTION + "Q: {question}\nA: Let's think step by step.\n",
      verify="\n" + _VERDICT_QUESTION,
      verify_cot="\nVerification: Let's verify step by step.\n",
      verdict_question="\n\n" + _VERDICT_QUESTION,
    ),
    # The same without the instruction, for models trained from scratch, which gain nothing from its 110 tokens.
    PromptFormat(
      name="genrm_short",
      solve="Q: {question}\nA: Let's think step by step.\n",
      verify="\n" + _VERDICT_QUESTION,
      verify_cot="\nVerification: Let's verify step by step.\n",
      verdict_question="\n\n" + _VERDICT_QUESTION,
    ),
    # For instruction-tuned models. The model's turn repeats the question, so that a verdict follows the same words.
    PromptFormat(
      name="genrm_chat",
      solve=_user_turn('{question}\n\nLet\'s think step by step. End with "The answer is ", then the final answer.'),
      verify=f"{END_OF_TURN}\n"
      + _user_turn(f'Is the answer correct? Respond with "{_VERDICT_QUESTION}" followed by " Yes" or " No".')
      + _VERDICT_QUESTION,
      verify_cot=f"{END_OF_TURN}\n"
      + _user_turn(
        "Let's verify step by step. Verify every step of the solution and conclude with "
        f'"{_VERDICT_QUESTION}" followed by " Yes" or " No".'
      ),
      verdict_question="\n\n" + _VERDICT_QUESTION,
      end=END_OF_TURN,
    ),
    # For character models: a mark for each of the texts above.
    PromptFormat(name="compact", solve="S{question}=", verify="?", verify_cot="!", verdict_question="?"),
  )
}


def get_format(name: str) -> PromptFormat:
  """The format called `name`; UserError if there is none."""
  if name not in FORMATS:
    raise UserError(f"unknown prompt format {name!r}; there are: {', '.join(FORMATS)}")
  return FORMATS[name]


class _Ids(NamedTuple):
  yes: int
  no: int
  end: int


def _checked_ids(tokenizer: Tokenizer, form: PromptFormat) -> _Ids:
  """The ids that a format turns on; UserError where the tokenizer has not one id for one of its pieces."""
  place = _place(tokenizer)
  yes, no = (_one_id(tokenizer, text, f"the verdict {text!r}") for text in (form.yes, form.no))
  if yes == no:
    raise UserError(f"tokenizer {place} maps both verdicts to id {yes}")
  for context in (form.verify, form.verdict_question):
    for text, i in ((form.yes, yes), (form.no, no)):
      apart, joined = [*tokenizer.encode(context), i], tokenizer.encode(context + text)
      if apart != joined:
        raise UserError(
          f"tokenizer {place} does not keep the verdict {text!r} apart from the question before it "
          f"(prompt format {form.name!r}); use another tokenizer.\n"
          f"  question, then verdict: {apart}\n  as one text:            {joined}"
        )
  templates = form.solve + form.verify + form.verify_cot + form.verdict_question + form.end
  for marker in TURN_MARKERS:
    if marker in templates:
      _one_id(tokenizer, marker, f"the turn marker {marker!r} of prompt format {form.name!r}")
  end = _one_id(tokenizer, form.end, f"the end mark {form.end!r}") if form.end else tokenizer.eos_id
  return _Ids(yes, no, end)


def _place(tokenizer: Tokenizer) -> str:
  """The path of a tokenizer's file, or its name where it has none."""
  return tokenizer.spec().get("path", tokenizer.name)


def _one_id(tokenizer: Tokenizer, text: str, what: str) -> int:
  ids = tokenizer.encode(text)
  if len(ids) != 1:
    raise UserError(
      f"{what} must be one token, but tokenizer {_place(tokenizer)} gives ids {ids}; "
      "use a tokenizer with that piece, or another prompt format"
    )
  return ids[0]


@dataclasses.dataclass(frozen=True)
class Prompter:
  """Token ids of every prompt and target, for one tokenizer and one format.

  Each part (prompt, solution, question) is encoded by itself and the ids are joined, so that no token straddles a
  boundary between what is given and what is predicted.
  """

  tokenizer: Tokenizer
  format: PromptFormat
  _ids: _Ids = dataclasses.field(init=False, repr=False, compare=False)

  def __post_init__(self):
    object.__setattr__(self, "_ids", _checked_ids(self.tokenizer, self.format))

  @property
  def yes_id(self) -> int:
    return self._ids.yes

  @property
  def no_id(self) -> int:
    return self._ids.no

  @property
  def end_id(self) -> int:
    """The id that ends a solution and a rationale, where sampling stops."""
    return self._ids.end

  def verdict_id(self, correct: bool) -> int:
    """The id of " Yes" or " No"."""
    return self.yes_id if correct else self.no_id

  def solve(self, question: str) -> list[int]:
    """The prompt for a solution."""
    return [self.tokenizer.bos_id, *self.tokenizer.encode(self.format.solve.replace("{question}", question))]

  def solution(self, text: str) -> list[int]:
    """The target of `solve`: the solution and the end mark."""
    return [*self.tokenizer.encode(text), self.end_id]

  def direct(self, question: str, solution: str) -> list[int]:
    """The prompt whose next token is the verdict (GenRM), or at whose last token the ORM reads its score."""
    return [*self.solve(question), *self.tokenizer.encode(solution), *self.tokenizer.encode(self.format.verify)]

  def cot(self, question: str, solution: str) -> list[int]:
    """The prompt for a rationale (GenRM-CoT)."""
    return [*self.solve(question), *self.tokenizer.encode(solution), *self.tokenizer.encode(self.format.verify_cot)]

  def rationale(self, text: str, correct: bool) -> list[int]:
    """The target of `cot`: the rationale, the verdict question, the verdict and the end mark."""
    encode = self.tokenizer.encode
    question = encode(self.format.verdict_question)
    return [*encode(text), *question, self.verdict_id(correct), self.end_id]
