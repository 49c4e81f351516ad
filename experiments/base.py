"""Trains a base model for the list tasks: a small Gemma from scratch on generic string tasks, in place of pretraining.

    python -m experiments.base --config=experiments/configs/base.py:medium --workdir=DIR

Stage `base` trains it on tasks/string_base.py, which contains no task of the paper. Stage `export` writes DIR/asset in
Hugging Face's layout. The bases in experiments/assets were made this way; set `--config.model.checkpoint` to use one.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from genrm_jax import export
from genrm_jax.data.packing import Example, sft_example
from genrm_jax.pipeline import cli, fitting
from genrm_jax.pipeline.run import Run
from genrm_jax.pipeline.stages import Stage
from genrm_jax.pytrees import KIND_SOLVE
from genrm_jax.tasks import string_base
from genrm_jax.verifiers.base import sft_loss


def examples(run: Run) -> Iterator[Example]:
  """Random examples of the string tasks; the first `num_eval_examples` are held out."""
  c = run.config.base
  rng = np.random.default_rng([run.config.seed, 0])
  encode, bos, eos = run.tokenizer.encode, run.tokenizer.bos_id, run.tokenizer.eos_id
  for i in range(c.num_examples):
    prompt, completion = string_base.example(rng)
    example = sft_example(f"base example {i}", [bos, *encode(prompt)], [*encode(completion), eos], KIND_SOLVE)
    # Without a weight, one-character answers would hardly count beside lists of forty characters.
    weight = c.short_answer_weight if len(completion) <= 2 else 1.0
    yield dataclasses.replace(example, weights=example.weights * weight)


def train_base(run: Run) -> None:
  """Trains the base model."""
  rows = fitting.write_rows(run, "base", fitting.held_out(run, "base", fitting.with_gaps(run, examples(run))))
  fitting.fit(run, "base", sft_loss(run.model, rows.counts.max_targets, 1.0, run.remat("base")), rows)


def make_stages(run: Run) -> list[Stage]:
  """The stages: training, and export to the folder that other runs start from."""
  trained, decided_by = "checkpoints/base", ("base", "model", "tokenizer", "prompts", "gaps", "seed", "task.name")
  scratch = ("rows_base", "metrics/base.jsonl", "metrics/base.examples.json")
  return [
    Stage("base", lambda: train_base(run), (), (trained,), {}, decided_by, scratch, uses_devices=True),
    Stage("export", lambda: export.export(run.path(trained), run.path("asset")), reads=(trained,), writes=("asset",)),
  ]


if __name__ == "__main__":
  cli.main("string_base", make_stages)
