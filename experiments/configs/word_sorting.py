"""Word Sorting: the variants of experiments/configs/list_tasks.py."""

import ml_collections

from experiments.configs import list_tasks

NUMBERS = list_tasks.Numbers(
  name="word_sorting",
  train_words=(2, 4),
  eval_words=5,
  walk={},
  walks={},
  num_problems=20_000,
  num_solutions=2,
  generator=dict(num_steps=2000, eval_every=50, stop_at_loss=0.05),
  solution_tokens=48,
  rationale_tokens=184,
  row_length=208,
  verifiers=dict(
    dpo=dict(init_from="generator", num_steps=200, learning_rate=1e-4, beta=0.1),
    orm=dict(num_steps=1000, learning_rate=1e-3),
    genrm=dict(num_steps=1000, learning_rate=1e-3),
    genrm_cot=dict(num_steps=1200, learning_rate=1e-3),
  ),
  paper_problems=12288,
  paper_samples=64,
)


def get_config(variant: str = "tiny") -> ml_collections.ConfigDict:
  """The config of a variant. --config.task.eval.bbh=WORD_SORTING_JSON evaluates `paper` on BIG-Bench Hard."""
  config = list_tasks.get_config(NUMBERS, variant)
  if variant == "paper":
    with config.unlocked():
      config.task.eval.bbh = ""
  return config
