"""References for graders, and what graders wrote as raw rationales.

Reference-guided grading (paper, section 3.3) shows the grader a solution with the right final answer
(`Prompter.grade`); its rationales are for training only. The plain way asks as at test time (`Prompter.cot`). What
comes back goes through a `rationales.Filter`.
"""

import collections
import zlib
from collections.abc import Sequence

import numpy as np

from genrm_jax.records import Candidate, Rationale
from genrm_jax.runtime.errors import UserError

WAYS = ("reference", "plain")


def choose_references(pool: Sequence[Candidate], fallback: str, seed: int, draw: int = 0) -> list[str]:
  """A reference solution for each candidate of one problem: a random correct one with another text.

  The choice depends on the seed, the draw, the candidate and the problem's set of correct solutions, not their order.

  Args:
    pool: the graded candidates of the problem.
    fallback: the problem's own reference, used where no other candidate is correct.
    seed: of the random choice.
    draw: which rationale of a candidate this is for, so that each may get its own reference, as in the release.

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
  """Sampled texts as raw rationales, one for each entry of `graded`, in which a candidate may occur several times.

  `index` counts the rationales of a candidate; the source is `<checkpoint>/<way>`. Verdicts have not been read yet.
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
