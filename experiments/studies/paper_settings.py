"""What the paper's settings of a verifier change: one small run with each of them on and off.

    python -m experiments.studies.paper_settings --workdir=DIR [--out=results/paper_settings.json] [--seed=0]

The run is `last_letter:tour` (100 problems with 16 solutions, K = 8) with more verifiers: the ORM without z-loss, DPO
with and without the reference, the judge, and one greedy rationale. Weighted self-consistency is replayed from the
recorded scores for several numbers of scores per answer. Takes about ten minutes on two CPU cores.
"""

import argparse
import dataclasses
from collections.abc import Mapping
from os.path import expanduser
from typing import Any

import ml_collections
import numpy as np

import genrm_jax
from experiments.configs import common, last_letter
from genrm_jax.data import jsonl
from genrm_jax.evals import metrics, selection
from genrm_jax.evals.methods import MAJORITY, WEIGHTED, Methods
from genrm_jax.pipeline import api
from genrm_jax.runtime.errors import one_message
from genrm_jax.runtime.progress import say

TOP_SCORES = (0, 1, 2, 4, 6)  # 0: all scores of an answer
COMPARED = (  # (setting, method with it, method without)
  ("z-loss of the ORM (1e-4)", "orm", "orm_plain"),
  ("DPO score without the reference", "dpo", "dpo_reference"),
  ("mean p(Yes) of the judge, not its majority verdict", "judge", f"{MAJORITY}/judge"),
  ("mean p(Yes) of GenRM-CoT, not its majority verdict", "genrm_cot", f"{MAJORITY}/genrm_cot"),
  ("8 sampled rationales, not one greedy one", "genrm_cot", "genrm_cot_greedy"),
)


def get_config(seed: int) -> ml_collections.ConfigDict:
  """The config of the run."""
  config, tiny = last_letter.get_config("tour"), last_letter.get_config("tiny")
  with config.unlocked():
    config.seed = seed
    verifiers = config.verifiers
    verifiers.orm_plain = verifiers.orm.to_dict() | dict(kind="orm", z_loss=0.0)
    verifiers.judge, verifiers.dpo = tiny.verifiers.judge, tiny.verifiers.dpo
    verifiers.dpo_reference = common.dpo_reference(init_from="generator", beta=tiny.verifiers.dpo.beta)
    verifiers.genrm_cot_greedy = common.greedy()
  return config


def replay(
  bank: selection.Bank, tables: Mapping[str, metrics.ScoreTable], n: int, seed: int
) -> tuple[dict[str, metrics.Quantity], dict[str, metrics.Quantity]]:
  """Differences of accuracy at n by setting, and weighted self-consistency by verifier and number of scores."""
  selected = Methods(bank, tables, top_scores=0, seed=seed)
  differences = {name: metrics.mean(selected(one, n) - selected(other, n)) for name, one, other in COMPARED}
  weighted: dict[str, metrics.Quantity] = {}
  for top in TOP_SCORES:
    by_top = Methods(bank, tables, top_scores=top, seed=seed)
    for name in tables:
      accuracy, of_all = by_top(f"{WEIGHTED}/{name}", n), selected(f"{WEIGHTED}/{name}", n)
      weighted[f"{name}/{top or 'all'}"] = metrics.mean(accuracy)
      if top:
        weighted[f"{name}/{top}/minus all"] = metrics.mean(accuracy - of_all)
  return differences, weighted


def effects(run: api.Run, results: Mapping[str, Any]) -> dict[str, Any]:
  """The contents of the file: accuracies are shares of problems, with 95% intervals over problems."""
  bank = selection.make_bank(run.problems("eval"), run.candidates("eval"))
  tables = {name: metrics.align_scores(bank, name, run.scores(name, "eval")) for name in run.verifier_names}
  n, seed = max(results["ns"]), run.config.seed
  found = [
    {name: _rounded(point) for name, point in metrics.intervals(quantities, seed=seed).items()}
    for quantities in replay(bank, tables, n, seed)
  ]
  return {
    "config": "last_letter:tour with the verifiers of experiments/studies/paper_settings.py",
    **{key: results["meta"][key] for key in ("code_version", "seed", "config_hash", "bank", "num_params")},
    **{key: results[key] for key in ("num_problems", "num_candidates", "pass1")},
    "n": n,
    "best_of_n": {name: points[-1] for name, points in results["curves"].items()},
    "rm_accuracy": {name: v["verification"]["rm_accuracy"] for name, v in results["verifiers"].items()},
    "differences": found[0],
    "weighted_self_consistency_by_top_scores": found[1],
    "genrm_cot_by_votes": [{"k": p["k"], **p["accuracy"]} for p in results["verifiers"]["genrm_cot"]["by_votes"]],
    "solutions_to_match": results["to_match"],
    "generation": {name: model["pass_at_n"] for name, model in results["generation"].items()},
  }


def _rounded(point: metrics.Interval) -> dict[str, float | None]:
  return {key: None if v is None else float(np.round(v, 6)) for key, v in dataclasses.asdict(point).items()}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--workdir", type=expanduser, required=True, help="folder of the run")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument(
    "--out", type=expanduser, default="results/paper_settings.json", help="file for the results, JSON"
  )
  args = parser.parse_args()
  with one_message():
    config = get_config(args.seed)
    results = genrm_jax.evaluate(config, args.workdir)
    jsonl.write_json(args.out, effects(api.open_run(config, args.workdir), results))
    say(f"results: {args.out}")


if __name__ == "__main__":
  main()
