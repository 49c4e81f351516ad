"""A base for the list tasks: a small Gemma from scratch on generic string tasks, where no pretrained one is at hand.

    python -m experiments.base --config=experiments/configs/base.py:medium --workdir=DIR

Stage `base` trains it (tasks/string_base.py: never a task of the paper), stage `export` writes DIR/asset, a folder as
of Hugging Face. Those of experiments/assets were made so; a list task starts from one by `--config.model.checkpoint`.
"""

import dataclasses

import numpy as np

from genrm_jax import export, verifiers
from genrm_jax.data import packing
from genrm_jax.pipeline import list_tasks, verifier_stages
from genrm_jax.pipeline.run import Run
from genrm_jax.pipeline.stages import Stage
from genrm_jax.pytrees import KIND_SOLVE
from genrm_jax.tasks import string_base


def train_base(run: Run) -> None:
  """The stand-in for pretraining."""
  c = run.config.base

  def make_examples() -> dict[str, list[packing.Example]]:
    rng = np.random.default_rng([run.config.seed, 0])
    encode, bos, eos = run.tokenizer.encode, run.tokenizer.bos_id, run.tokenizer.eos_id
    examples = []
    for i in range(c.num_examples):
      prompt, completion = string_base.example(rng)
      ids = [bos, *encode(prompt)], [*encode(completion), eos]
      made = packing.sft_example(f"base example {i}", *ids, KIND_SOLVE)
      # An answer of one mark would hardly count among lists of forty.
      weight = c.short_answer_weight if len(completion) <= 2 else 1.0
      examples.append(dataclasses.replace(made, weights=made.weights * weight))
    examples = list_tasks.with_gaps(run, examples)
    return {"train": examples[c.num_eval_examples :], "val": examples[: c.num_eval_examples]}

  run.train("base", make_examples, lambda m: verifiers.sft_loss(run.model, m, 1.0, c.remat), c)


def make_stages(run: Run) -> list[Stage]:
  """Training, and the folder that other runs start from."""
  trained = "checkpoints/base"
  return [
    Stage("base", lambda: train_base(run), writes=(trained,), uses_devices=True),
    Stage("export", lambda: export.export(run.path(trained), run.path("asset")), reads=(trained,), writes=("asset",)),
  ]


if __name__ == "__main__":
  verifier_stages.main(make_stages)
