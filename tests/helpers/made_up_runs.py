"""Made-up results of runs with known answers, as files in a folder of results."""

import json

from genrm_jax.evals import report
from genrm_jax.records import Candidate, Problem, Score, Vote

PROBLEMS, SOLVED, POOL = 12, 9, 4
RATIONALE = "1mike2dan | e=e ```\nIs it correct? {{ Yes }}"
CONFIG = {
  "task": {"train": {"num_problems": 600}},
  "gaps": {"=": 40},
  "verifiers": {
    "judge": {"init_from": ""},
    "mine": {"init_from": ""},
    "orm": {"max_problems": 0, "optim": {"num_steps": 5}},
    "genrm_cot": {"max_problems": 0, "max_rationales": 4, "solve_weight": 0.0, "optim": {"num_steps": 5}},
  },
}


def results_of(task, seed, solved, *, votes=2):
  """Nine of twelve problems have one correct solution of four; each verifier selects it in the first `solved` ones."""
  problems = [Problem(f"p{row}", task, "eval", f"mike {row}", "a") for row in range(PROBLEMS)]
  pool = [
    Candidate(f"p{row}", i, f"={i}", "a" if i == 0 and row < SOLVED else str(i), i == 0 and row < SOLVED, "test")
    for row in range(PROBLEMS)
    for i in range(POOL)
  ]
  scores = {name: [] for name in solved}
  for name, rows in solved.items():
    for c in pool:
      value = 0.9 if c.index == (int(c.problem_id[1:]) >= rows) else 0.1
      num, text = (votes, RATIONALE) if name == "genrm_cot" else (1, "")
      scores[name].append(Score(c.problem_id, c.index, name, 1, value, (Vote("ok", value, 1 - value, 3, text),) * num))
  results = report.build_results(problems, pool, scores, ns=(1, POOL), ks=(1, 2), seed=seed, meta={"task": task})
  return results | {"samples": report.sample_records(problems, pool, scores)}


def place(folder, results, variant, seed):
  """Writes a run into a folder of results, with the meta of a finished run; returns the path."""
  task, names = results["meta"]["task"], results["verifiers"]
  verifiers = {name: CONFIG["verifiers"][name] for name in names}
  meta = {
    **{"task": task, "variant": variant, "seed": seed, "config_hash": f"{variant}-hash"},
    "config": CONFIG | {"variant": variant, "seed": seed, "bank": f"runs/{seed}", "verifiers": verifiers},
    **{"num_params": 570_000, "bank": f"bank of {task} {seed}", "commit": "c0ffee"},
    **{"finished": f"2026-11-2{seed}T10:00:00Z", "wall_seconds": {"base": 100.0 + seed, "score": 10.0}},
  }
  path = folder / task / f"{variant}-seed{seed}.json"
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps({**results, "meta": meta}))
  return path
