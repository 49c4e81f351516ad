"""The per-problem part of results.json, from which later analyses compare runs problem by problem.

    {"pass1": [.4062, ...], "by_n": {"orm": {"1": [...], "2": [...]}, ...}, "by_k": {"genrm_cot": {"1": [...], ...}},
     "rm_accuracy": {"orm": [[hits, ...], [scored, ...]]}, "auc_within_problems": {"orm": [.75, null, ...]}}

Shares have four decimals. Weighted votes are kept only at the largest n, to keep the file small.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from genrm_jax.evals.metrics import Quantity

_DECIMALS = 4


def per_problem_results(quantities: Mapping[str, Quantity], largest_n: int) -> dict[str, Any]:
  """The part of results.json described above, from the quantities of `report.build_results`."""
  by_n: dict[str, dict[str, list]] = {}
  by_k: dict[str, dict[str, list]] = {}
  checks: dict[str, Any] = {"rm_accuracy": {}, "auc_within_problems": {}}
  for name, quantity in quantities.items():
    numerator, denominator = quantity.parts[0]
    method, _, metric = name.rpartition("/")
    if metric == "rm_accuracy" and "/" not in method:
      checks[metric][method] = [numerator.astype(int).tolist(), denominator.astype(int).tolist()]
    elif metric == "auc_within_problems":
      known = zip(rounded_shares(numerator), denominator, strict=True)
      checks[metric][method] = [share if is_known else None for share, is_known in known]
    elif metric.startswith("n=") and ("/" not in method or metric == f"n={largest_n}"):
      by_n.setdefault(method, {})[metric.removeprefix("n=")] = rounded_shares(numerator)
    elif metric == "accuracy" and "/k=" in method:
      verifier, _, k = method.partition("/k=")
      by_k.setdefault(verifier, {})[k] = rounded_shares(numerator)
  return {"pass1": rounded_shares(quantities["pass1"].parts[0][0]), "by_n": by_n, "by_k": by_k, **checks}


def rounded_shares(values_P: np.ndarray) -> list[float]:
  """Rounded; 0 and 1, the most frequent values, as integers."""
  rounded = [round(float(value), _DECIMALS) for value in values_P]
  return [int(value) if value in (0, 1) else value for value in rounded]
