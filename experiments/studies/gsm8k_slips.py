"""Do a run's verifiers see arithmetic slips? From its scores, and on slips that are planted in right solutions.

    python -m experiments.studies.gsm8k_slips --workdir=DIR [--out=results/gsm8k/small-seed0/slips.json]

DIR is a finished run of experiments.gsm8k. A slip is a false equation (tasks/gsm8k/arithmetic.py), so some are not
seen. AUC within problems tells right solutions from wrong ones with a slip and, apart, from those without. A planted
slip changes the last result of a right solution, one a problem; the figure is the share of problems in which the
solution as it was has the higher score (a tie counts half).
"""

import argparse
import dataclasses
import random
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

import genrm_jax
from genrm_jax.data import candidates
from genrm_jax.data import jsonl as store
from genrm_jax.evals import metrics
from genrm_jax.evals import selection as select
from genrm_jax.records import Candidate, Problem, Score
from genrm_jax.runtime.errors import UserError, one_message
from genrm_jax.tasks.gsm8k.arithmetic import false_equations, plant_slip

AMONG = ("wrong with a slip", "wrong without")


def natural(
  problems: Sequence[Problem], pool: Sequence[Candidate], scores: Mapping[str, Sequence[Score]], seed: int
) -> dict[str, Any]:
  """How many solutions have a slip, and the AUC within problems of each verifier against either kind of wrong ones."""
  bank = select.make_bank(problems, pool)
  slipped = np.zeros(bank.mask.shape, bool)
  slipped[bank.mask] = [bool(false_equations(c.text)) for row in bank.candidates for c in row]
  wrong = bank.mask & ~bank.correct
  kinds = dict(zip(AMONG, (wrong & slipped, wrong & ~slipped), strict=True))
  quantities = {}
  for name, listed in scores.items():
    values = metrics.align_scores(bank, name, listed).values
    for kind, among in kinds.items():
      of_kind = dataclasses.replace(bank, mask=bank.correct | among)
      quantities[f"{name}/{kind}"] = metrics.auc_within(of_kind, values)
  found = metrics.intervals(quantities, seed=seed)
  return {
    "solutions": {"right with a slip": int((bank.correct & slipped).sum()), "right": int(bank.correct.sum())}
    | {kind: int(among.sum()) for kind, among in kinds.items()},
    "problems": {kind: int((among.any(axis=1) & bank.correct.any(axis=1)).sum()) for kind, among in kinds.items()},
    "auc_within_problems": {
      name: {kind: dataclasses.asdict(found[f"{name}/{kind}"]) for kind in kinds} for name in scores
    },
  }


def plant(pool: Sequence[Candidate], seed: int) -> list[tuple[Candidate, str]]:
  """A right solution of each problem where one can be changed, and its text with a slip."""
  pairs = []
  for problem_id, mine in candidates.by_problem(pool).items():
    rng = random.Random(zlib.crc32(f"{seed} {problem_id}".encode()))
    changed = ((c, plant_slip(c.text, rng)) for c in rng.sample(mine, len(mine)) if c.correct)
    pairs += [(c, text) for c, text in changed if text][:1]
  return pairs


def planted(
  workdir: epath.Path,
  problems: Sequence[Problem],
  pairs: Sequence[tuple[Candidate, str]],
  names: Sequence[str],
  seed: int,
) -> dict[str, Any]:
  """Each verifier's share of pairs in which the solution without the slip has the higher score."""
  question = {p.id: p.question for p in problems}
  asked = [(question[c.problem_id], text) for c, slipped in pairs for text in (c.text, slipped)]
  quantities = {}
  for name in names:
    verifier = genrm_jax.load(workdir / "checkpoints" / name, rows_per_batch=64)
    values = np.array([np.nan if v is None else v for v in verifier.score_many(asked, seed=seed)]).reshape(-1, 2)
    known = ~np.isnan(values).any(axis=1)
    right, slipped = np.where(known[:, None], values, 0.0).T
    above = known * ((right > slipped) + 0.5 * (right == slipped))
    for what, of_pair in (("prefers the right one", above), ("score", right), ("score with the slip", slipped)):
      quantities[f"{name}/{what}"] = metrics.Quantity(((of_pair, known),))
  found = metrics.intervals(quantities, seed=seed)
  figures: dict[str, dict[str, Any]] = {name: {} for name in names}
  for key, interval in found.items():
    name, _, what = key.partition("/")
    figures[name][what] = dataclasses.asdict(interval)
  return {"pairs": len(pairs), "verifiers": figures}


def measure(workdir: epath.Path) -> dict[str, Any]:
  """All figures of a finished run.

  Raises:
    UserError: it is no finished run of experiments.gsm8k, or one of its checkpoints is gone.
  """
  if not (workdir / "report" / "results.json").exists():
    raise UserError(f"{workdir}: there is no finished run (report/results.json is missing); give the --workdir of one")
  meta = store.read_json(workdir / "report" / "results.json")["meta"]
  if meta["task"] != "gsm8k":
    raise UserError(f"{workdir}: a run of {meta['task']}; slips are looked for in solutions to GSM8K")
  problems = store.read_records(workdir / "problems" / "eval.jsonl", Problem)
  pool = store.read_records(workdir / "candidates" / "eval.jsonl", Candidate)
  names, seed = list(meta["config"]["verifiers"]), meta["seed"]
  scores = {name: store.read_records(workdir / "scores" / f"{name}.jsonl", Score) for name in names}
  trained = [name for name in names if (workdir / "checkpoints" / name).exists()]
  return {
    "run": {key: meta[key] for key in ("variant", "seed", "config_hash", "bank")},
    "natural": natural(problems, pool, scores, seed),
    "planted": planted(workdir, problems, plant(pool, seed), trained, seed),
  }


def table(results: Mapping[str, Any]) -> str:
  """The results as Markdown."""
  found, tried = results["natural"], results["planted"]
  solutions = ", ".join(f"{count:,} {kind}" for kind, count in found["solutions"].items())
  lines = [
    f"Solutions: {solutions}. Planted pairs: {tried['pairs']}.",
    "",
    f"| verifier | AUC, right against {AMONG[0]} | against {AMONG[1]} | prefers what has no planted slip, % |",
    "| --- | ---: | ---: | ---: |",
  ]
  for name, of_kind in found["auc_within_problems"].items():
    figures = tried["verifiers"].get(name)
    cells = [_cell(of_kind[kind], 1) for kind in AMONG]
    cells.append(_cell(figures["prefers the right one"], 100) if figures else "not trained")
    lines.append(f"| {name} | {' | '.join(cells)} |")
  return "\n".join(lines)


def _cell(it: Mapping[str, Any], scale: int) -> str:
  if it["value"] is None:
    return "none"
  digits = 1 if scale == 100 else 3
  value, low, high = (f"{scale * it[key]:.{digits}f}" for key in ("value", "low", "high"))
  return f"{value} [{low}, {high}]"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--workdir", required=True, help="of a finished run of experiments.gsm8k")
  parser.add_argument("--out", default="", help="where the results are written as JSON")
  args = parser.parse_args()
  with one_message():
    results = measure(epath.Path(args.workdir).expanduser())
    if args.out:
      store.write_json(args.out, results)
    print(table(results))


if __name__ == "__main__":
  main()
