"""Evaluates verifiers of other runs on MATH500-style problems and given solutions.

paper  on a TPU, 32 votes, 16 candidates per problem; needs --config.verifier=RUN/checkpoints/NAME (or several,
       separated by commas), --config.problems=FILE and --config.solutions=FILE (format: tasks/math500/problems.py)
tiny   for a small verifier on 2 CPU cores; needs the same
smoke  a few made-up sums; needs only --config.verifier; for tests
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
        num_candidates=num_candidates,  # the first ones of each problem
        comparison_seconds=5.0,  # CPU time; answers whose comparison takes longer count as wrong
      ),
      votes=dict(
        num_votes=num_votes,
        sample=common.sampling(max_new_tokens=8 if smoke else 1024 if paper else 192, temperature=0.7),
      ),
      engine=common.engine(rows_per_batch=256 if paper else 64, max_tokens=4096 if paper else 2048),
      cpu_devices=1 if smoke else 2,  # has no effect on accelerators
      report=dict(
        ns=tuple(n for n in ladder if n <= num_candidates),
        ks=tuple(k for k in ladder if k <= num_votes),
        top_scores=4,  # per answer, that weighted self-consistency sums up (paper, appendix C)
      ),
    )
  )
