"""Made-up results of runs with known answers, as files of a folder of results."""

import copy
import json

from genrm_jax.evals import report
from genrm_jax.records import Candidate, Problem, Score, Vote

PROBLEMS, SOLVED, POOL = 12, 9, 4
RATIONALE = "1mike2dan | e=e ```\nIs it correct? {{ Yes }}"
CONFIG = {
  "variant": "tiny",
  "seed": 0,
  "task": {"train": {"num_problems": 600}},
  "gaps": {"=": 40},
  "verifiers": {
    "judge": {"init_from": ""},
    "orm": {"max_problems": 0, "optim": {"num_steps": 5}},
    "genrm_cot": {"max_problems": 0, "max_rationales": 4, "solve_weight": 0.0, "optim": {"num_steps": 5}},
  },
}


def results_of(task, seed, missed, *, votes=2, in_distribution=False):
  """Nine of twelve problems have one right solution of four; each verifier picks it in all but `missed` of them."""
  problems = [Problem(f"p{row}", task, "eval", f"mike {row}", "a") for row in range(PROBLEMS)]
  pool = [
    Candidate(f"p{row}", i, f"={i}", "a" if (right := i == 0 and row < SOLVED) else str(i), right, "test")
    for row in range(PROBLEMS)
    for i in range(POOL)
  ]
  scores = {name: [] for name in missed}
  for name, rows in missed.items():
    for candidate in pool:
      value = 0.9 if candidate.index == (int(candidate.problem_id[1:]) < rows) else 0.1
      num, text = (votes, RATIONALE) if name == "genrm_cot" else (1, "")
      cast = (Vote("ok", value, 1 - value, 3, text),) * num
      scores[name].append(Score(candidate.problem_id, candidate.index, name, 1, value, cast))
  results = report.build_results(problems, pool, scores, ns=(1, POOL), ks=(1, 2), seed=seed, meta={"task": task})
  if in_distribution:
    return results
  return results | {"samples": report.sample_records(problems, pool, scores)}


def generation_of(seed, rights):
  """A generator with one solution a problem that is right in the first `rights` problems."""
  problems = [Problem(f"p{row}", "t", "eval", "?", "a") for row in range(PROBLEMS)]
  pool = [Candidate(f"p{row}", 0, "", "a", row < rights, "test") for row in range(PROBLEMS)]
  return {"genrm_cot": report.generation_results(problems, pool, seed)}


def place(folder, results, variant, seed, **changes):
  """Puts a run into a folder of results, with the meta that a finished run has."""
  task = results["meta"]["task"]
  config = (
    copy.deepcopy(CONFIG) | {"variant": variant, "seed": seed, "bank": f"runs/{seed}"} | changes.pop("config", {})
  )
  config["verifiers"] = {
    name: it | changes.get("settings", {}) for name, it in config["verifiers"].items() if name in results["verifiers"]
  }
  meta = {
    "task": task,
    "variant": variant,
    "seed": seed,
    "config": config,
    "config_hash": f"{variant}-hash",
    "num_params": 570_000,
    "bank": f"bank of {task} {seed}",
    "commit": "c0ffee",
    "finished": f"2026-11-2{seed}T10:00:00Z",
    "wall_seconds": {"base": 100.0 + seed, "score": 10.0},
  } | changes.get("meta", {})
  path = folder / task / f"{variant}-seed{seed}.json"
  path.parent.mkdir(parents=True, exist_ok=True)
  extra = {key: changes[key] for key in ("in_distribution", "generation") if key in changes}
  path.write_text(json.dumps({**results, **extra, "meta": meta}))
  return path
