"""Last Letter Concatenation: the variants of experiments/configs/list_tasks.py, and two more ablations.

given_first  rationales write the letter in the solution before the true one
no_stop      rationales continue after the first error
"""

import ml_collections

from experiments.configs import list_tasks

NUMBERS = list_tasks.Numbers(
  name="last_letter",
  train_words=(2, 4),
  eval_words=6,
  walk=dict(true_first=True, stop=True),
  walks=dict(given_first=dict(true_first=False, stop=True), no_stop=dict(true_first=True, stop=False)),
  num_problems=20_000,
  num_solutions=4,
  generator=dict(num_steps=60, eval_every=2, stop_at_loss=0.15),
  solution_tokens=24,
  rationale_tokens=80,
  row_length=128,
  verifiers=dict(
    dpo=dict(init_from="generator", num_steps=200, learning_rate=1e-4, beta=0.1),
    orm=dict(num_steps=1000, learning_rate=1e-3),
    genrm=dict(num_steps=1000, learning_rate=1e-3),
    genrm_cot=dict(num_steps=1000, learning_rate=1e-3),
  ),
  paper_problems=1050,
  paper_samples=128,
)


def get_config(variant: str = "tiny") -> ml_collections.ConfigDict:
  """The config of a variant."""
  return list_tasks.get_config(NUMBERS, variant)
