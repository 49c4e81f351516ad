"""The base models of the list tasks; see experiments/base.py.

medium       0.6M parameters; the tasks' :tiny variants start from it
small, mini  for the study of model sizes
smoke        for tests
"""

import ml_collections

from experiments.configs import common

WIDTHS = {
  "smoke": dict(num_layers=1, embed_dim=32, ffw_dim=64),
  "mini": dict(num_layers=2, embed_dim=32, ffw_dim=64),
  "small": dict(num_layers=3, embed_dim=64, ffw_dim=128),
  "medium": dict(num_layers=4, embed_dim=128, ffw_dim=256),
}


def get_config(variant: str = "medium") -> ml_collections.ConfigDict:
  """The config of a size."""
  common.check_variant(variant, tuple(WIDTHS))
  smoke = variant == "smoke"
  return common.locked(
    dict(
      variant=variant,
      seed=0,
      task=dict(name="string_base"),
      tokenizer=dict(type="char"),
      prompts=common.prompts("compact"),
      model=common.model(size="tiny_gemma1", overrides=WIDTHS[variant]),
      cpu_devices=1,
      mesh=dict(data=-1, fsdp=1, tensor=1),
      gaps=common.LIST_GAPS,
      base=dict(
        num_examples=400 if smoke else 350_000,
        num_eval_examples=100 if smoke else 500,
        short_answer_weight=8.0,
        **common.training(
          num_steps=4 if smoke else 5000,
          learning_rate=2.5e-3,
          batch_size=16,
          row_length=160,
          best_by="loss_solve",
          smoke=smoke,
        ),
      ),
      verifiers=dict(),
    )
  )
