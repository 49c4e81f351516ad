"""Small made-up records for the tests of evals."""

from collections.abc import Sequence

import numpy as np

from genrm_jax.evals import costs, selection
from genrm_jax.records import Candidate, Problem, Score, Vote

NAN = float("nan")


def bank_of(pools: Sequence[Sequence[tuple[str | None, bool]]]) -> selection.Bank:
  problems = [Problem(f"p{row}", "toy", "eval", "?", "1") for row in range(len(pools))]
  candidates = [
    Candidate(f"p{row}", index, "", answer, correct, "test")
    for row, pool in enumerate(pools)
    for index, (answer, correct) in enumerate(pool)
  ]
  return selection.make_bank(problems, candidates)


def toy_bank(labels: Sequence[Sequence[int]]) -> selection.Bank:
  return bank_of([[("1" if label else "0", bool(label)) for label in pool] for pool in labels])


def padded(rows: Sequence[Sequence[float]]) -> np.ndarray:
  """Scores of pools of different sizes, `f64[P, C]`."""
  width = max(map(len, rows))
  return np.array([[*row, *[NAN] * (width - len(row))] for row in rows])


def vote(state: str, p_yes: float | None = None, text: str = "") -> Vote:
  return Vote(state, p_yes, None if p_yes is None else 1 - p_yes, 10, text)


def score_of(row: int, index: int, value: float | None, votes: Sequence[Vote] = ()) -> Score:
  return Score(f"p{row}", index, "v", 1, value, tuple(votes))


def toy_run(num_problems: int = 12, rationale: str = "so it is right") -> tuple[list, list, dict[str, list[Score]]]:
  """Problems, unequal pools of 3 or 4 candidates, and scores of an ORM and of a verifier with four votes."""
  rng = np.random.default_rng(0)
  problems = [Problem(f"p{row}", "toy", "eval", f"What is {row} & 1?", "1") for row in range(num_problems)]
  candidates: list[Candidate] = []
  scores: dict[str, list[Score]] = {"orm": [], "genrm_cot": []}
  for row in range(num_problems):
    for index in range(3 + (row > 0)):
      correct = bool(rng.random() < 0.4)
      answer = "1" if correct else [None, "2", "3"][rng.integers(3)]
      candidates.append(Candidate(f"p{row}", index, f"It is {answer}.", answer, correct, "test"))
      value = float(np.clip(0.5 + (0.2 if correct else -0.2) + 0.3 * rng.normal(), 0, 1))
      scores["orm"].append(Score(f"p{row}", index, "orm", 5, value, (Vote("ok", value, 1 - value, 0),)))
      votes = [vote("ok", float(rng.random() / 2 + correct / 2), rationale) for _ in range(3)] + [vote("missing")]
      mean = float(np.mean([ok.p_yes for ok in votes[:3]]))
      scores["genrm_cot"].append(Score(f"p{row}", index, "genrm_cot", 7, mean, tuple(votes)))
  return problems, candidates, scores


def costs_of(run, **changes) -> costs.Costs:
  """Made-up lengths for `toy_run`, in the order of its records."""
  problems, candidates, scores = run
  fields = {
    "prompt_tokens": [10] * len(problems),
    "solution_tokens": [5 + candidate.index for candidate in candidates],
    "verifier_tokens": {name: [20 + candidate.index for candidate in candidates] for name in scores},
    "generator_params": 1_000,
    "verifier_params": 3_000,
  }
  return costs.Costs(**fields | changes)
