"""What each method reads, samples and computes per problem, to set beside its accuracy.

    tokens for n candidates with k votes each
      generator   reads the prompt once, samples n solutions
      verifier    reads n prompts with a solution, once each, and samples n k rationales

FLOPs are `FLOPS_PER_PARAMETER` x parameters x tokens for one forward pass, whether a token is read or sampled. All
parameters of the model count, the embedding table once (as the output projection). This overestimates reading, which
computes few logits (the table is 20% of Gemma 2B), and omits attention over earlier tokens (a few percent at a thousand
tokens).

Every candidate is paid for, even one that repeats the text of another: scoring a text only once is a saving that a
finite pool allows, not a property of the method. The expected cost of n candidates over all subsets of n is therefore n
times the mean over the pool.

Axis letters: P problem, C candidate (padded).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from genrm_jax.evals.metrics import ScoreTable
from genrm_jax.evals.selection import Bank
from genrm_jax.records import Candidate
from genrm_jax.runtime.errors import UserError

FLOPS_PER_PARAMETER = 2
TOKENS = ("generator_read", "generator_sampled", "verifier_read", "verifier_sampled")
FLOPS = ("generator_flops", "verifier_flops")

NOTE = (
  "Costs are means over problems, in expectation over all subsets of n candidates. The generator reads its prompt once"
  " per problem; a verifier reads its prompt once per candidate, however many votes it samples. Repeated candidates are"
  f" paid for again. FLOPs are {FLOPS_PER_PARAMETER} per parameter (the embedding table counted once) and token, read"
  " or sampled; attention over earlier tokens is left out."
)


@dataclasses.dataclass(frozen=True, eq=False)
class Costs:
  """Measured lengths in tokens, in the order of the records passed to `report.build_results`, and model sizes.

  The tokens that votes sample are not repeated here: each vote carries its own count.
  """

  prompt_tokens: Sequence[int]  # of the generator's prompt, one per problem
  solution_tokens: Sequence[int]  # sampled by the generator, one per candidate
  verifier_tokens: Mapping[str, Sequence[int]]  # by verifier: its whole prompt, one per candidate
  generator_params: int | None  # None: unknown, so the generator's FLOPs are too
  verifier_params: int


@dataclasses.dataclass(frozen=True, eq=False)
class TokenCounts:
  """The lengths of `Costs`, aligned with the bank; 0 in the padding."""

  prompt: np.ndarray  # i64[P]
  solution: np.ndarray  # i64[P, C]
  verifier: Mapping[str, np.ndarray]  # i64[P, C] each


def align_tokens(bank: Bank, candidates: Sequence[Candidate], verifiers: Sequence[str], costs: Costs) -> TokenCounts:
  """Aligns measured lengths with the bank.

  Args:
    bank: of the candidates.
    candidates: in the order of the lengths.
    verifiers: names of the verifiers that need lengths.
    costs: the lengths.

  Raises:
    UserError: a list whose length differs from the number of records, a negative length, or a verifier without lengths.
  """
  if unknown := [name for name in verifiers if name not in costs.verifier_tokens]:
    raise UserError(f"costs: verifier_tokens has no lengths for {', '.join(unknown)}: measure their prompts too")
  position = {(candidate.problem_id, candidate.index): at for at, candidate in enumerate(candidates)}
  order = [position[candidate.problem_id, candidate.index] for pool in bank.candidates for candidate in pool]

  def checked(field: str, lengths: Sequence[int], count: int) -> np.ndarray:
    column = np.asarray(lengths)
    if column.shape != (count,) or (column < 0).any():
      raise UserError(
        f"costs: {field} has {len(column)} numbers; it must have {count}, one per record, none of them negative"
      )
    return column

  def per_candidate(field: str, lengths: Sequence[int]) -> np.ndarray:
    padded = np.zeros(bank.mask.shape, int)
    padded[bank.mask] = checked(field, lengths, len(candidates))[order]
    return padded

  return TokenCounts(
    checked("prompt_tokens", costs.prompt_tokens, len(bank.problems)),
    per_candidate("solution_tokens", costs.solution_tokens),
    {name: per_candidate(f"verifier_tokens of {name}", costs.verifier_tokens[name]) for name in verifiers},
  )


def tokens_per_problem(
  bank: Bank, counts: TokenCounts, n: int, table: ScoreTable | None = None, k: int | None = None
) -> dict[str, float]:
  """Mean tokens per problem that a method reads and samples.

  Args:
    bank: the candidates.
    counts: their lengths.
    n: candidates to choose from; a smaller pool is used whole.
    table: the verifier's scores, None for a method without a verifier.
    k: votes per candidate, None for all.
  """
  taken = np.minimum(n, bank.sizes)

  def mean(tokens_PC: np.ndarray) -> float:
    return float((taken * tokens_PC.sum(axis=1) / bank.sizes).mean())

  tokens = {"generator_read": float(counts.prompt.mean()), "generator_sampled": mean(counts.solution)}
  if table is None:
    return tokens | {"verifier_read": 0.0, "verifier_sampled": 0.0}
  votes = (table.states >= 0).sum(axis=2)
  share = 1.0 if k is None else np.divide(k, votes, out=np.zeros(votes.shape), where=votes > 0)
  read = mean(counts.verifier[table.verifier])
  return tokens | {"verifier_read": read, "verifier_sampled": mean(table.tokens * share)}


def cost_results(
  bank: Bank,
  tables: Mapping[str, ScoreTable],
  counts: TokenCounts,
  costs: Costs,
  ns: Sequence[int],
  ks: Mapping[str, Sequence[int]],
  intervals: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
  """Tokens and FLOPs of each method beside its accuracy, as one list per column.

      {"generator_params": ..., "verifier_params": ..., "flops_per_parameter": 2,
       "by_n": {"pass1": COLUMNS, "self_consistency": COLUMNS, VERIFIER: COLUMNS (all of its votes), ...},
       "by_k": {VERIFIER with several votes: COLUMNS (at the largest n), ...}}

  COLUMNS are n, k (votes per candidate; 0 without a verifier), generator_read, generator_sampled, verifier_read,
  verifier_sampled (mean tokens per problem), generator_flops (None if the generator's size is unknown), verifier_flops,
  accuracy, low, high.

  Args:
    bank: the candidates.
    tables: the scores, by verifier.
    counts: from `align_tokens`.
    costs: what they were made from.
    ns: numbers of candidates, ascending.
    ks: by verifier, the numbers of votes on its curve.
    intervals: all intervals of `report.build_results`, by name.
  """

  def columns(points: Sequence[tuple[int, int | None, str]], table: ScoreTable | None) -> dict[str, list]:
    rows = []
    for n, k, name in points:
      votes = 0 if table is None else table.num_votes if k is None else k
      row: dict[str, Any] = {"n": n, "k": votes} | tokens_per_problem(bank, counts, n, table, k)
      for model, params in (("generator", costs.generator_params), ("verifier", costs.verifier_params)):
        tokens = row[f"{model}_read"] + row[f"{model}_sampled"]
        row[f"{model}_flops"] = None if params is None else FLOPS_PER_PARAMETER * params * tokens
      accuracy = intervals[name]
      rows.append(row | {"accuracy": accuracy["value"], "low": accuracy["low"], "high": accuracy["high"]})
    return {key: [row[key] for row in rows] for key in rows[0]}

  methods: dict[str, ScoreTable | None] = {"self_consistency": None, **tables}
  by_n = {"pass1": columns([(1, None, "pass1")], None)}
  by_n |= {name: columns([(n, None, f"{name}/n={n}") for n in ns], table) for name, table in methods.items()}
  by_k = {
    name: columns([(ns[-1], k, f"{name}/k={k}/accuracy") for k in curve], tables[name])
    for name, curve in ks.items()
    if curve
  }
  return {
    "generator_params": costs.generator_params,
    "verifier_params": costs.verifier_params,
    "flops_per_parameter": FLOPS_PER_PARAMETER,
    "by_n": by_n,
    "by_k": by_k,
  }


def totals(columns: Mapping[str, Sequence[Any]], unit: str) -> list[float]:
  """Total "tokens" or "FLOPs" per problem at each point of a curve of `cost_results`.

  Ask for FLOPs only if the generator's size is known.
  """
  parts = [columns[key] for key in (TOKENS if unit == "tokens" else FLOPS)]
  return [sum(row) for row in zip(*parts, strict=True)]
