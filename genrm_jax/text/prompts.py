"""Every template, and the one place that turns a problem, a solution and a rationale into token ids.

Training targets and scoring prompts are built by the same `Prompter`, so a verdict is asked for with exactly the
tokens that it was trained on. With x a problem, y a solution, I the verdict question (paper, sections 3.1 and 3.2):

    solve    <bos> solve(x)                        -> y <eos>
    direct   <bos> solve(x) y verify               -> Yes | No
    cot      <bos> solve(x) y verify_cot           -> rationale verdict_question Yes | No <eos>
"""

import dataclasses

from genrm_jax.errors import UserError
from genrm_jax.text.tokenizer import Tokenizer


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


_INSTRUCTION = (
  'Solve the math problems and provide step-by-step solutions, ending with "The answer is [Insert Final Answer '
  'Here]".\nWhen asked "Verification: Is the answer correct (Yes/No)?", respond with " Yes" or " No" based on the '
  "answer's correctness.\nWhen asked \"Verification: Let's verify step by step.\", verify every step of the solution "
  'and conclude with "Verification: Is the answer correct (Yes/No)?" followed by " Yes" or " No".\n\n'
)
_VERDICT_QUESTION = "Verification: Is the answer correct (Yes/No)?"

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
    # For character models: a mark for each of the texts above.
    PromptFormat(name="compact", solve="S{question}=", verify="?", verify_cot="!", verdict_question="?"),
  )
}


def get_format(name: str) -> PromptFormat:
  """The format called `name`; UserError if there is none."""
  if name not in FORMATS:
    raise UserError(f"unknown prompt format {name!r}; there are: {', '.join(FORMATS)}")
  return FORMATS[name]


@dataclasses.dataclass(frozen=True)
class Prompter:
  """Token ids of every prompt and target, for one tokenizer and one format.

  Each part (prompt, solution, question) is encoded by itself and the ids are joined, so that no token straddles a
  boundary between what is given and what is predicted.
  """

  tokenizer: Tokenizer
  format: PromptFormat

  def __post_init__(self):
    for text in (self.format.yes, self.format.no):
      ids = self.tokenizer.encode(text)
      if len(ids) != 1:
        raise UserError(
          f"the verdict {text!r} must be one token, but tokenizer {self.tokenizer.name} gives ids {ids}; "
          "use a tokenizer with that piece"
        )
    if self.yes_id == self.no_id:
      raise UserError(f"tokenizer {self.tokenizer.name} maps both verdicts to id {self.yes_id}")

  @property
  def yes_id(self) -> int:
    return self.tokenizer.encode(self.format.yes)[0]

  @property
  def no_id(self) -> int:
    return self.tokenizer.encode(self.format.no)[0]

  def verdict_id(self, correct: bool) -> int:
    """The id of " Yes" or " No"."""
    return self.yes_id if correct else self.no_id

  def solve(self, question: str) -> list[int]:
    """The prompt for a solution."""
    return [self.tokenizer.bos_id, *self.tokenizer.encode(self.format.solve.replace("{question}", question))]

  def solution(self, text: str) -> list[int]:
    """The target of `solve`: the solution and the end mark."""
    return [*self.tokenizer.encode(text), self.tokenizer.eos_id]

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
    return [*encode(text), *question, self.verdict_id(correct), self.tokenizer.eos_id]
