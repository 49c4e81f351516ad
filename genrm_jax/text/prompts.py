"""Every template, and the one place that turns a problem, a solution and a rationale into token ids.

Training targets and scoring prompts come from the same `Prompter`, so a verdict is scored after exactly the tokens it
was trained on. With x a problem, y a solution and I the verdict question (paper, sections 3.1 and 3.2):

    solve    <bos> solve(x)                    -> y <end>
    direct   <bos> solve(x) y verify           -> Yes | No
    cot      <bos> solve(x) y verify_cot       -> rationale conclude Yes | No <end>
    grade    <bos> grade(x, y, reference)      -> rationale, for training only

`verify` and `conclude` end with I. <end> is the tokenizer's eos or, in a chat, the piece that closes a turn.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from genrm_jax.runtime.errors import UserError
from genrm_jax.text.tokenizer import END_OF_TURN, START_OF_TURN, TURN_MARKERS, Tokenizer

_SLOT = re.compile(r"\{(question|solution|reference|verdict_question)\}")
_NEEDED = {
  "solve": ("question",),
  "verify": ("verdict_question",),
  "conclude": ("verdict_question",),
  "grade": ("question", "solution", "reference"),
}


@dataclasses.dataclass(frozen=True)
class PromptFormat:
  """The templates of one prompt format.

  Every template may hold the placeholder `{verdict_question}`; use `render` to fill it in.

  Attributes:
    name: of the format.
    verdict_question: the bare question that the verdict answers.
    solve: asks for a solution; holds `{question}`.
    verify: follows the solution; ends with the verdict question.
    verify_cot: follows the solution; the model then writes a rationale.
    conclude: follows the rationale; ends with the verdict question.
    grade: asks a grader for a rationale, given a reference; holds `{question}`, `{solution}` and `{reference}`.
    yes: the verdict on a correct solution.
    no: the verdict on an incorrect solution.
    end: the piece that ends what the model writes; "" for the tokenizer's eos.

  Raises:
    UserError: a template lacks its placeholder.
  """

  name: str
  verdict_question: str
  solve: str
  verify: str
  verify_cot: str
  conclude: str
  grade: str
  yes: str = " Yes"
  no: str = " No"
  end: str = ""

  def __post_init__(self) -> None:
    if not self.verdict_question or self.verdict_question != self.verdict_question.strip():
      raise UserError(
        f"prompt format {self.name!r}: verdict_question is {self.verdict_question!r}; give the bare question, without "
        "white space around it"
      )
    for field, slots in _NEEDED.items():
      for slot in slots:
        if f"{{{slot}}}" not in getattr(self, field):
          raise UserError(f"prompt format {self.name!r}: {field} lacks the placeholder {{{slot}}}; add it")
    for field in ("verify", "conclude"):
      if not getattr(self, field).endswith("{verdict_question}"):
        raise UserError(
          f"prompt format {self.name!r}: {field} must end with {{verdict_question}}, since the verdict follows it; "
          "move the placeholder to the end"
        )

  def render(self, template: str, **slots: str) -> str:
    """A template with the verdict question and these slots filled in; braces in a slot's text stay as they are."""
    return _filled(template, {"verdict_question": self.verdict_question, **slots})


def _filled(template: str, slots: Mapping[str, str]) -> str:
  return _SLOT.sub(lambda match: slots.get(match[1], match[0]), template)


# As in the release's field `verifier_prompt`, its two spaces included: part of how that data was made.
_GRADE = (
  "You are a math teacher. Grade the Solution, verifying correctness step by step. Use Expected Answer to find any "
  "erroneous step in the Solution. At the end of the Solution verification, when you give your final grade, write it "
  'in the form "{verdict_question} X",  where X is either Yes or No.\n\n'
  "Question: {question}\nSolution: {solution}\nExpected Answer: {reference}"
)
_INSTRUCTION = (
  'Solve the math problems and provide step-by-step solutions, ending with "The answer is [Insert Final Answer '
  'Here]".\nWhen asked "{verdict_question}", respond with " Yes" or " No" based on the '
  "answer's correctness.\nWhen asked \"Verification: Let's verify step by step.\", verify every step of the solution "
  'and conclude with "{verdict_question}" followed by " Yes" or " No".\n\n'
)
_VERDICT_QUESTION = "Verification: Is the answer correct (Yes/No)?"


def _user_turn(text: str) -> str:
  """A user turn and the opening of the model's turn after it, as Gemma's instruction-tuned models expect them."""
  return f"{START_OF_TURN}user\n{text}{END_OF_TURN}\n{START_OF_TURN}model\n"


FORMATS = {
  f.name: f
  for f in (
    # As in the authors' released data.
    PromptFormat(
      name="genrm",
      verdict_question=_VERDICT_QUESTION,
      solve=_INSTRUCTION + "Q: {question}\nA: Let's think step by step.\n",
      verify="\n{verdict_question}",
      verify_cot="\nVerification: Let's verify step by step.\n",
      conclude="\n\n{verdict_question}",
      grade=_GRADE,
    ),
    # Without the instruction, for models trained from scratch: they gain nothing from its 110 tokens.
    PromptFormat(
      name="genrm_short",
      verdict_question=_VERDICT_QUESTION,
      solve="Q: {question}\nA: Let's think step by step.\n",
      verify="\n{verdict_question}",
      verify_cot="\nVerification: Let's verify step by step.\n",
      conclude="\n\n{verdict_question}",
      grade=_GRADE,
    ),
    # For instruction-tuned models. The model's turn repeats the question, so that a verdict follows the same words.
    PromptFormat(
      name="genrm_chat",
      verdict_question=_VERDICT_QUESTION,
      solve=_user_turn('{question}\n\nLet\'s think step by step. End with "The answer is ", then the final answer.'),
      verify=f"{END_OF_TURN}\n"
      + _user_turn('Is the answer correct? Respond with "{verdict_question}" followed by " Yes" or " No".')
      + "{verdict_question}",
      verify_cot=f"{END_OF_TURN}\n"
      + _user_turn(
        "Let's verify step by step. Verify every step of the solution and conclude with "
        '"{verdict_question}" followed by " Yes" or " No".'
      ),
      conclude="\n\n{verdict_question}",
      grade=_GRADE,
      end=END_OF_TURN,
    ),
    # For character models: one mark per template.
    PromptFormat(
      name="compact",
      verdict_question="?",
      solve="S{question}=",
      verify="{verdict_question}",
      verify_cot="!",
      conclude="{verdict_question}",
      grade=_GRADE,
    ),
  )
}
RELEASED = FORMATS["genrm"]  # the format of the authors' released data


def make_format(settings: Mapping[str, Any] | str) -> PromptFormat:
  """The format of a name of `FORMATS`, or of a mapping that holds every field, as `config.prompts` does.

  Raises:
    UserError: unknown name; a field that is missing, unknown or no text; or as `PromptFormat` does.
  """
  if isinstance(settings, str):
    if settings not in FORMATS:
      raise UserError(f"unknown prompt format {settings!r}; the formats are {', '.join(FORMATS)}")
    return FORMATS[settings]
  fields, given = [f.name for f in dataclasses.fields(PromptFormat)], {**settings}
  if unknown := [name for name in given if name not in fields]:
    raise UserError(f"prompt format: unknown field {unknown[0]!r}; the fields are {', '.join(fields)}")
  if missing := [name for name in fields if name not in given]:
    raise UserError(f"prompt format: no field {missing[0]!r}; give all of {', '.join(fields)}")
  for name, value in given.items():
    if not isinstance(value, str):
      raise UserError(f"prompt format: field {name!r} is {value!r}, expected a string; correct the value")
  return PromptFormat(**given)


class _Ids(NamedTuple):
  yes: int
  no: int
  end: int


def _checked_ids(tokenizer: Tokenizer, form: PromptFormat) -> _Ids:
  """The ids a format depends on. Raises UserError where the tokenizer does not give one id for one of its pieces."""
  place = _place(tokenizer)
  yes, no = (_one_id(tokenizer, text, f"the verdict {text!r}") for text in (form.yes, form.no))
  if yes == no:
    raise UserError(f"tokenizer {place} maps both verdicts to id {yes}")
  for context in map(form.render, (form.verify, form.conclude)):
    for text, i in ((form.yes, yes), (form.no, no)):
      apart, joined = [*tokenizer.encode(context), i], tokenizer.encode(context + text)
      if apart != joined:
        raise UserError(
          f"tokenizer {place} merges the verdict {text!r} with the question before it "
          f"(prompt format {form.name!r}); use another tokenizer.\n"
          f"  question, then verdict: {apart}\n  as one text:            {joined}"
        )
  templates = form.solve + form.verify + form.verify_cot + form.conclude + form.end
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

  Each part (prompt, solution, question) is encoded on its own and the ids are joined, so no token straddles the
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
    """The id that ends a solution or a rationale; sampling stops at it."""
    return self._ids.end

  def template(self, name: str) -> str:
    """A template of the format, such as "verify", with the verdict question filled in."""
    return self.format.render(getattr(self.format, name))

  def verdict_id(self, correct: bool) -> int:
    """The id of the verdict on a correct or an incorrect solution."""
    return self.yes_id if correct else self.no_id

  def encode(self, template: str, **slots: str) -> list[int]:
    """The ids of a template with the verdict question and these slots filled in; only its own controls have an effect.

    What spells a turn marker or another control piece in a slot stays text.
    """
    encode, plain = self.tokenizer.encode, self.tokenizer.encode_plain
    template = template.replace("{verdict_question}", self.format.verdict_question)
    texts = enumerate(self.tokenizer.controls.split(template))  # alternately text and a control piece
    return [i for n, text in texts for i in (encode(text) if n % 2 else plain(_filled(text, slots)))]

  def solve(self, question: str) -> list[int]:
    """The prompt for a solution."""
    return [self.tokenizer.bos_id, *self.encode(self.format.solve, question=question)]

  def solution(self, text: str) -> list[int]:
    """The target of `solve`: the solution and the end mark."""
    return [*self.tokenizer.encode_plain(text), self.end_id]

  def ask(self, question: str, solution: str, template: str) -> list[int]:
    """A prompt about a solution: `solve`, the solution, then `template`, which may hold `{verdict_question}`."""
    return [*self.solve(question), *self.tokenizer.encode_plain(solution), *self.encode(template)]

  def direct(self, question: str, solution: str) -> list[int]:
    """The prompt whose next token is the verdict (GenRM); the ORM reads its score at the last token."""
    return self.ask(question, solution, self.format.verify)

  def cot(self, question: str, solution: str) -> list[int]:
    """The prompt for a rationale (GenRM-CoT)."""
    return self.ask(question, solution, self.format.verify_cot)

  def rationale(self, text: str, correct: bool) -> list[int]:
    """The target of `cot`: the rationale, `conclude`, the verdict and the end mark."""
    concluded = [*self.tokenizer.encode_plain(text), *self.encode(self.format.conclude)]
    return [*concluded, self.verdict_id(correct), self.end_id]

  def grade(self, question: str, solution: str, reference: str) -> list[int]:
    """The prompt for a reference-guided rationale (paper, section 3.3)."""
    slots = {"question": question, "solution": solution, "reference": reference}
    return [self.tokenizer.bos_id, *self.encode(self.format.grade, **slots)]
