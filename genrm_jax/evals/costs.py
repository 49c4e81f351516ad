"""What each method reads, samples and computes for a problem, beside its accuracy.

    tokens of n candidates with k votes each
      generator   reads the prompt once, samples n solutions
      verifier    reads n prompts with a solution, each once, and samples n k rationales

FLOPs are `FLOPS_PER_PARAMETER` x parameters x tokens, read or sampled alike: one forward pass. The parameters are all
of the model's, the embedding table once, as the matrix that makes the logits; so reading, of which few logits are
needed, counts for a little too much (the table is 20% of Gemma 2B). Attention over earlier tokens is left out: at a
thousand tokens it adds a few percent.

Every candidate is paid for, also one that repeats the text of another: that a text is scored once is a saving of a
finite pool and not of the method. So the cost of n candidates, in expectation over all subsets of n, is n times the
mean over the pool.

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
  "Costs are means over problems, in expectation over all subsets of n candidates. The generator's prompt is read once"
  " a problem, the verifier's once a candidate, whatever the number of votes; a candidate that repeats another is paid"
  f" for again. FLOPs are {FLOPS_PER_PARAMETER} a parameter (the embedding table counted once) and token, read or"
  " sampled; attention over earlier tokens is left out."
)


@dataclasses.dataclass(frozen=True, eq=False)
class Costs:
  """Measured lengths in tokens, in the order of the records that `report.build_results` is given with them.

  What votes sample is not here: each vote carries it.
  """

  prompt_tokens: Sequence[int]  # of the generator's prompt, a number for each problem
  solution_tokens: Sequence[int]  # sampled by the generator, a number for each candidate
  verifier_tokens: Mapping[
    str, Sequence[int]
  ]  # by verifier, a number for each candidate: what it reads, problem and all
  generator_params: int | None  # None: not known, so there are no FLOPs of the generator
  verifier_params: int


@dataclasses.dataclass(frozen=True, eq=False)
class Lengths:
  """`Costs` lined up with the bank; 0 in the padding."""

  prompt: np.ndarray  # i64[P]
  solution: np.ndarray  # i64[P, C]
  verifier: Mapping[str, np.ndarray]  # i64[P, C] each


def line_up(bank: Bank, candidates: Sequence[Candidate], names: Sequence[str], costs: Costs) -> Lengths:
  """Lines measured lengths up with the bank.

  Args:
    bank: of the candidates.
    candidates: in the order of the lengths.
    names: the verifiers whose lengths are wanted.
    costs: the lengths.

  Raises:
    UserError: a list of another length than the records, a negative length, or a verifier without lengths.
  """
  if unknown := [name for name in names if name not in costs.verifier_tokens]:
    raise UserError(f"costs: verifier_tokens has no lengths for {', '.join(unknown)}: measure its prompts too")
  place = {(candidate.problem_id, candidate.index): order for order, candidate in enumerate(candidates)}
  order = [place[candidate.problem_id, candidate.index] for pool in bank.candidates for candidate in pool]

  def column(what: str, lengths: Sequence[int], count: int) -> np.ndarray:
    found = np.asarray(lengths)
    if found.shape != (count,) or (found < 0).any():
      raise UserError(
        f"costs: {what} has {len(found)} numbers; it must have {count}, one for each record, none below 0"
      )
    return found

  def of_candidates(what: str, lengths: Sequence[int]) -> np.ndarray:
    padded = np.zeros(bank.mask.shape, int)
    padded[bank.mask] = column(what, lengths, len(candidates))[order]
    return padded

  return Lengths(
    column("prompt_tokens", costs.prompt_tokens, len(bank.problems)),
    of_candidates("solution_tokens", costs.solution_tokens),
    {name: of_candidates(f"verifier_tokens of {name}", costs.verifier_tokens[name]) for name in names},
  )


def tokens_of(
  bank: Bank, lengths: Lengths, n: int, table: ScoreTable | None = None, k: int | None = None
) -> dict[str, float]:
  """The mean tokens that a method reads and samples for a problem.

  Args:
    bank: the candidates.
    lengths: their lengths.
    n: candidates to choose from; a smaller pool is used whole.
    table: of the verifier, None for a method without one.
    k: votes a candidate, None for all there are.
  """
  taken = np.minimum(n, bank.sizes)

  def mean(of_candidate_PC: np.ndarray) -> float:
    return float((taken * of_candidate_PC.sum(axis=1) / bank.sizes).mean())

  tokens = {"generator_read": float(lengths.prompt.mean()), "generator_sampled": mean(lengths.solution)}
  if table is None:
    return tokens | {"verifier_read": 0.0, "verifier_sampled": 0.0}
  votes = (table.states >= 0).sum(axis=2)
  share = 1.0 if k is None else np.divide(k, votes, out=np.zeros(votes.shape), where=votes > 0)
  read = mean(lengths.verifier[table.verifier])
  return tokens | {"verifier_read": read, "verifier_sampled": mean(table.tokens * share)}


def cost_results(
  bank: Bank,
  tables: Mapping[str, ScoreTable],
  lengths: Lengths,
  costs: Costs,
  ns: Sequence[int],
  ks: Mapping[str, Sequence[int]],
  found: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
  """Tokens and FLOPs of each method beside its accuracy, as columns: a list for each figure.

      {"generator_params": ..., "verifier_params": ..., "flops_per_parameter": 2,
       "by_n": {"pass1": COLUMNS, "self_consistency": COLUMNS, VERIFIER: COLUMNS (all of its votes), ...},
       "by_k": {VERIFIER of several votes: COLUMNS (at the largest n), ...}}

  COLUMNS are n, k (votes a candidate; 0 without a verifier), generator_read, generator_sampled, verifier_read,
  verifier_sampled (mean tokens a problem), generator_flops (None where the size is not known), verifier_flops,
  accuracy, low, high.

  Args:
    bank: the candidates.
    tables: the scores, by verifier.
    lengths: from `line_up`.
    costs: what they were lined up from.
    ns: numbers of candidates, ascending.
    ks: by verifier, the numbers of votes that there are figures for.
    found: the intervals of `report.build_results`, by name.
  """

  def columns(points: Sequence[tuple[int, int | None, str]], table: ScoreTable | None) -> dict[str, list]:
    rows = []
    for n, k, name in points:
      votes = 0 if table is None else table.num_votes if k is None else k
      row: dict[str, Any] = {"n": n, "k": votes} | tokens_of(bank, lengths, n, table, k)
      for model, params in (("generator", costs.generator_params), ("verifier", costs.verifier_params)):
        passed = row[f"{model}_read"] + row[f"{model}_sampled"]
        row[f"{model}_flops"] = None if params is None else FLOPS_PER_PARAMETER * params * passed
      it = found[name]
      rows.append(row | {"accuracy": it["value"], "low": it["low"], "high": it["high"]})
    return {key: [row[key] for row in rows] for key in rows[0]}

  methods: dict[str, ScoreTable | None] = {"self_consistency": None, **tables}
  by_n = {"pass1": columns([(1, None, "pass1")], None)}
  by_n |= {name: columns([(n, None, f"{name}/n={n}") for n in ns], table) for name, table in methods.items()}
  by_k = {
    name: columns([(ns[-1], k, f"{name}/k={k}/accuracy") for k in of_table], tables[name])
    for name, of_table in ks.items()
    if of_table
  }
  return {
    "generator_params": costs.generator_params,
    "verifier_params": costs.verifier_params,
    "flops_per_parameter": FLOPS_PER_PARAMETER,
    "by_n": by_n,
    "by_k": by_k,
  }


def totals(columns: Mapping[str, Sequence[Any]], unit: str) -> list[float]:
  """All "tokens", or all "FLOPs", a problem at each point of a curve of `cost_results`.

  FLOPs are summed only where those of the generator are known.
  """
  parts = [columns[key] for key in (TOKENS if unit == "tokens" else FLOPS)]
  return [sum(row) for row in zip(*parts, strict=True)]
