"""What a grader is asked, and its answers as raw rationales: with a reference solution, or without.

Reference-guided grading (paper, section 3.3) shows the grader a solution with the right final answer; its rationales
are for training only. The plain way asks as at test time. Everything here is text: a stage hands the prompts to a
sampler, and what comes back goes through a `rationales.Filter`.
"""

import collections
import zlib
from collections.abc import Sequence

import numpy as np

from genrm_jax.records import Candidate, Rationale
from genrm_jax.runtime.errors import UserError
from genrm_jax.text.prompts import PromptFormat

WAYS = ("reference", "plain")

# As in the release's field `verifier_prompt` (its two spaces included): part of how that data was made.
_REFERENCE_PROMPT = (
  "You are a math teacher. Grade the Solution, verifying correctness step by step. Use Expected Answer to find any "
  "erroneous step in the Solution. At the end of the Solution verification, when you give your final grade, write it "
  'in the form "Verification: Is the answer correct (Yes/No)? X",  where X is either Yes or No.\n\n'
  "Question: {question}\nSolution: {solution}\nExpected Answer: {reference}"
)


def reference_prompt(question: str, reference_solution: str, solution: str) -> str:
  """Asks for a grade of `solution`, with a right solution beside it."""
  slots = {"question": question, "solution": solution, "reference": reference_solution}
  return _REFERENCE_PROMPT.format_map(slots)


def plain_prompt(question: str, solution: str, form: PromptFormat) -> str:
  """Asks for a verification step by step, as a verifier with rationales is asked in this format."""
  return form.solve.replace("{question}", question) + solution + form.verify_cot


def choose_references(pool: Sequence[Candidate], fallback: str, seed: int, draw: int = 0) -> list[str]:
  """A reference solution for each candidate of one problem: a random correct one whose text is another.

  A choice hangs on the seed, the draw, the candidate and the problem's correct solutions, not on their order.

  Args:
    pool: the graded candidates of the problem.
    fallback: the problem's own reference, taken where no other candidate is correct.
    seed: of the random choice.
    draw: which rationale of a candidate it is for, so that each may get a reference of its own, as in the release.

  Raises:
    UserError: there is neither another correct candidate nor a fallback.
  """
  right = sorted({c.text for c in pool if c.correct})
  references = []
  for c in pool:
    others = [text for text in right if text != c.text] or [fallback]
    rng = np.random.default_rng([seed, draw, zlib.crc32(c.problem_id.encode()), c.index])
    chosen = others[rng.integers(len(others))]
    if not chosen:
      raise UserError(
        f"no reference solution for candidate {c.index} of {c.problem_id}: no other candidate is correct and the "
        "problem has none; sample more candidates, leave the problem out, or grade in the plain way"
      )
    references.append(chosen)
  return references


def as_rationales(graded: Sequence[Candidate], texts: Sequence[str], checkpoint: str, way: str) -> list[Rationale]:
  """Sampled texts as raw rationales, one for each entry of `graded`, where a candidate may stand several times.

  They are numbered within their candidate; the source is `<checkpoint>/<way>`. Verdicts are yet to be read.
  """
  if way not in WAYS:
    raise UserError(f"unknown way of grading {way!r}; there are: {', '.join(WAYS)}")
  count: collections.Counter[tuple[str, int]] = collections.Counter()
  records = []
  for c, text in zip(graded, texts, strict=True):
    key = (c.problem_id, c.index)
    records.append(Rationale(c.problem_id, c.index, count[key], text, None, f"{checkpoint}/{way}", kept=True))
    count[key] += 1
  return records
