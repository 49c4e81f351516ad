"""Do a run's verifiers notice arithmetic slips? In its own solutions, and in correct ones with a planted slip.

    python -m experiments.studies.gsm8k_slips --workdir=DIR [--out=results/gsm8k/small-seed0/slips.json]

DIR is a finished run of experiments.gsm8k. A slip is a false equation (tasks/gsm8k/arithmetic.py), which does not catch
every slip. AUC within problems separates correct solutions from incorrect ones with a slip and, in a second column,
from incorrect ones without. A planted slip changes the last result of one correct solution per problem; the metric is
the share of problems in which the unchanged solution has the higher score (a tie counts half).
"""

import argparse
import dataclasses
import random
import zlib
from collections.abc import Mapping, Sequence
from os.path import expanduser
from typing import Any

import numpy as np
from etils import epath

import genrm_jax
from genrm_jax.data import candidates, jsonl
from genrm_jax.evals import metrics, selection
from genrm_jax.evals.tables import number, percent
from genrm_jax.records import Candidate, Problem, Score
from genrm_jax.runtime.errors import UserError, one_message
from genrm_jax.tasks.gsm8k.arithmetic import false_equations, plant_slip

_META = {"task": str, "variant": str, "seed": int, "config_hash": str, "bank": str, "config": {"verifiers": dict}}
_RESULTS = {"meta": _META}
KINDS = ("wrong with a slip", "wrong without")  # of incorrect solutions, as the results spell them


def natural(
  problems: Sequence[Problem], pool: Sequence[Candidate], scores: Mapping[str, Sequence[Score]], seed: int
) -> dict[str, Any]:
  """How many solutions have a slip, and each verifier's AUC within problems against either kind of incorrect ones."""
  bank = selection.make_bank(problems, pool)
  slipped = np.zeros(bank.mask.shape, bool)
  slipped[bank.mask] = [bool(false_equations(c.text)) for row in bank.candidates for c in row]
  wrong = bank.mask & ~bank.correct
  masks = dict(zip(KINDS, (wrong & slipped, wrong & ~slipped), strict=True))
  quantities = {}
  for name, of_verifier in scores.items():
    values = metrics.align_scores(bank, name, of_verifier).values
    for kind, mask in masks.items():
      of_kind = dataclasses.replace(bank, mask=bank.correct | mask)
      quantities[f"{name}/{kind}"] = metrics.auc_within(of_kind, values)
  intervals = metrics.intervals(quantities, seed=seed)
  return {
    "solutions": {"right with a slip": int((bank.correct & slipped).sum()), "right": int(bank.correct.sum())}
    | {kind: int(mask.sum()) for kind, mask in masks.items()},
    "problems": {kind: int((mask.any(axis=1) & bank.correct.any(axis=1)).sum()) for kind, mask in masks.items()},
    "auc_within_problems": {
      name: {kind: dataclasses.asdict(intervals[f"{name}/{kind}"]) for kind in masks} for name in scores
    },
  }


def plant(pool: Sequence[Candidate], seed: int) -> list[tuple[Candidate, str]]:
  """One correct solution per problem, where one can be changed, and its text with a slip."""
  pairs = []
  for problem_id, solutions in candidates.by_problem(pool).items():
    rng = random.Random(zlib.crc32(f"{seed} {problem_id}".encode()))
    changed = ((c, plant_slip(c.text, rng)) for c in rng.sample(solutions, len(solutions)) if c.correct)
    pairs += [(c, text) for c, text in changed if text][:1]
  return pairs


def planted(
  workdir: epath.Path,
  problems: Sequence[Problem],
  pairs: Sequence[tuple[Candidate, str]],
  names: Sequence[str],
  seed: int,
) -> dict[str, Any]:
  """Each verifier's share of pairs in which the solution without the planted slip has the higher score."""
  question = {p.id: p.question for p in problems}
  questions_and_texts = [(question[c.problem_id], text) for c, slipped in pairs for text in (c.text, slipped)]
  quantities = {}
  for name in names:
    verifier = genrm_jax.load(workdir / "checkpoints" / name, rows_per_batch=64)
    values = [np.nan if v is None else v for v in verifier.score_many(questions_and_texts, seed=seed)]
    pairs_of_values = np.array(values).reshape(-1, 2)
    known = ~np.isnan(pairs_of_values).any(axis=1)
    right, slipped = np.where(known[:, None], pairs_of_values, 0.0).T
    above = known * ((right > slipped) + 0.5 * (right == slipped))
    for metric, of_pair in (("prefers the right one", above), ("score", right), ("score with the slip", slipped)):
      quantities[f"{name}/{metric}"] = metrics.Quantity(((of_pair, known),))
  results: dict[str, dict[str, Any]] = {name: {} for name in names}
  for key, interval in metrics.intervals(quantities, seed=seed).items():
    name, _, metric = key.partition("/")
    results[name][metric] = dataclasses.asdict(interval)
  return {"pairs": len(pairs), "verifiers": results}


def measure(workdir: epath.Path) -> dict[str, Any]:
  """All results for a finished run.

  Raises:
    UserError: it is not a finished run of experiments.gsm8k, or one of its checkpoints is gone.
  """
  if not (workdir / "report" / "results.json").exists():
    raise UserError(f"{workdir}: not a finished run (report/results.json is missing); give the --workdir of one")
  meta = jsonl.read_object(workdir / "report" / "results.json", _RESULTS)["meta"]
  if meta["seed"] < 0:
    raise UserError(f"{workdir}/report/results.json: meta.seed is {meta['seed']}; run the stage report again")
  if meta["task"] != "gsm8k":
    raise UserError(f"{workdir}: a run of {meta['task']}; give the --workdir of a run of experiments.gsm8k")
  problems = jsonl.read_records(workdir / "problems" / "eval.jsonl", Problem)
  pool = jsonl.read_records(workdir / "candidates" / "eval.jsonl", Candidate)
  names, seed = list(meta["config"]["verifiers"]), meta["seed"]
  scores = {name: jsonl.read_scores(workdir / "scores" / f"{name}.jsonl", name) for name in names}
  trained = [name for name in names if (workdir / "checkpoints" / name).exists()]
  return {
    "run": {key: meta[key] for key in ("variant", "seed", "config_hash", "bank")},
    "natural": natural(problems, pool, scores, seed),
    "planted": planted(workdir, problems, plant(pool, seed), trained, seed),
  }


def table(results: Mapping[str, Any]) -> str:
  """The results as Markdown."""
  own, pairs = results["natural"], results["planted"]
  solutions = ", ".join(f"{count:,} {kind}" for kind, count in own["solutions"].items())
  lines = [
    f"Solutions: {solutions}. Planted pairs: {pairs['pairs']}.",
    "",
    f"| verifier | AUC, right against {KINDS[0]} | against {KINDS[1]} | prefers the unchanged solution, % |",
    "| --- | ---: | ---: | ---: |",
  ]
  for name, by_kind in own["auc_within_problems"].items():
    cells = [number(by_kind[kind]) for kind in KINDS]
    trained = pairs["verifiers"].get(name)
    cells.append(percent(trained["prefers the right one"]) if trained else "not trained")
    lines.append(f"| {name} | {' | '.join(cells)} |")
  return "\n".join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--workdir", type=expanduser, required=True, help="of a finished run of experiments.gsm8k")
  parser.add_argument("--out", type=expanduser, default="", help="file to write the results to, as JSON")
  args = parser.parse_args()
  with one_message():
    results = measure(epath.Path(args.workdir))
    if args.out:
      jsonl.write_json(args.out, results)
    print(table(results))


if __name__ == "__main__":
  main()
