"""Verifiers that other runs have trained, on MATH500-style problems and someone's solutions to them.

paper  for a TPU: 32 votes on 16 candidates a problem; it needs --config.verifier=RUN/checkpoints/NAME (several with
       commas between), --config.problems=FILE and --config.solutions=FILE (format: tasks/math500/problems.py)
tiny   the same for a small verifier on 2 CPU cores
smoke  a handful of made-up sums; it needs --config.verifier alone; for tests
"""

import ml_collections

from experiments.configs import common


def get_config(variant: str = "tiny") -> ml_collections.ConfigDict:
  """The config of a variant."""
  common.check_variant(variant, ("paper", "tiny", "smoke"))
  paper, smoke = variant == "paper", variant == "smoke"
  num_votes = {"paper": 32, "tiny": 4, "smoke": 2}[variant]
  num_candidates = 2 if smoke else 16
  ladder = (1, 2, 4, 8, 16, 32)
  return common.locked(
    dict(
      variant=variant,
      seed=0,
      verifier="",
      problems="",
      solutions="",
      task=dict(
        name="math500",
        num_candidates=num_candidates,  # the first of each problem
        comparison_seconds=5.0,  # of CPU time; an answer whose comparison takes longer is wrong
      ),
      votes=dict(
        num_votes=num_votes,
        sample=common.sampling(max_new_tokens=8 if smoke else 1024 if paper else 192, temperature=0.7),
      ),
      engine=common.engine(rows_per_batch=256 if paper else 64, max_tokens=4096 if paper else 2048),
      cpu_devices=1 if smoke else 2,  # counts where there is no accelerator
      report=dict(ns=tuple(n for n in ladder if n <= num_candidates), ks=tuple(k for k in ladder if k <= num_votes)),
    )
  )
