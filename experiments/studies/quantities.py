"""The metrics of one run, read back problem by problem from its results.json, to compare and pool runs."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from genrm_jax.evals import metrics
from genrm_jax.evals.metrics import Quantity

COT, ORACLE, SELF_CONSISTENCY = "genrm_cot", "oracle", "self_consistency"


def read_quantities(results: Mapping[str, Any]) -> dict[str, Quantity]:
  """Every metric of a results.json that can be pooled, by name.

  `pass1`, `METHOD/n=N`, `VERIFIER/k=K`, `VERIFIER/rm_accuracy`, `VERIFIER/auc_within_problems`, `generation/VERIFIER`;
  at the largest n the paired differences `genrm_cot-METHOD` and the ratio `genrm_cot/oracle`; and all of these for the
  second split, prefixed with `in_distribution/`.

  Raises:
    ValueError, KeyError, TypeError: not the results of this version.
  """
  per_problem, largest_n, size = results["per_problem"], str(max(results["ns"])), results["num_problems"]
  quantities = {"pass1": metrics.mean(_column(per_problem["pass1"], size))}
  at_largest_n = {"pass1": quantities["pass1"].parts[0][0]}
  for method, by_n in per_problem["by_n"].items():
    at_largest_n[method] = _column(by_n[largest_n], size)
    quantities |= {f"{method}/n={n}": metrics.mean(_column(values, size)) for n, values in by_n.items()}
  for verifier, by_k in per_problem["by_k"].items():
    quantities |= {f"{verifier}/k={k}": metrics.mean(_column(values, size)) for k, values in by_k.items()}
  for verifier, (hits, scored) in per_problem["rm_accuracy"].items():
    parts = _column(hits, size, np.inf), _column(scored, size, np.inf)
    quantities[f"{verifier}/rm_accuracy"] = Quantity((parts,))
  for verifier, values in per_problem["auc_within_problems"].items():
    known = np.array([value is not None for value in values], float)
    aucs = _column([value or 0 for value in values], size)
    quantities[f"{verifier}/auc_within_problems"] = Quantity(((aucs, known),))
  if COT in at_largest_n:
    others = [method for method in at_largest_n if method != COT and "/" not in method]
    quantities |= {f"{COT}-{other}": metrics.mean(at_largest_n[COT] - at_largest_n[other]) for other in others}
    quantities[f"{COT}/{ORACLE}"] = Quantity(((at_largest_n[COT], at_largest_n[ORACLE]),))
  for name, generated in results.get("generation", {}).items():
    quantities[f"generation/{name}"] = metrics.mean(_column(generated["per_problem"], size))
  if "in_distribution" in results:
    inner = read_quantities(results["in_distribution"])
    quantities |= {f"in_distribution/{name}": quantity for name, quantity in inner.items()}
  return quantities


def _column(values: list[float], size: int, largest: float = 1) -> np.ndarray:
  column = np.array(values, float)
  if column.shape != (size,) or not ((column >= 0) & (column <= largest)).all():
    raise ValueError(f"a list of per_problem does not hold {size} numbers from 0 to {largest:g}")
  return column
