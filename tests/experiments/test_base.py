"""What the base models of the list tasks are trained on."""

import itertools

import ml_collections
import numpy as np

from experiments import base
from experiments.configs import base as base_config
from genrm_jax.pipeline.run import Run
from genrm_jax.tasks import string_base

COMPLETIONS = ("+", "<>", "mi<", "3mike4dlih;")


def test_answers_of_one_or_two_characters_weigh_more_and_no_others(tmp_path, monkeypatch):
  drawn = itertools.cycle(("K3a;4b;=", completion) for completion in COMPLETIONS)
  got = []
  monkeypatch.setattr(string_base, "example", lambda rng: next(drawn))
  monkeypatch.setattr(Run, "train", lambda self, name, make, *_: got.append((name, make())))
  config = base_config.get_config("smoke")
  config.base.update(num_examples=12, num_eval_examples=4, short_answer_weight=3.0)
  run = Run(ml_collections.FrozenConfigDict(config), tmp_path)
  base.train_base(run)
  ((name, parts),) = got
  train, val = parts["train"], parts["val"]
  assert (name, len(train), len(val)) == ("base", 8, 4)
  for i, example in enumerate([*val, *train]):
    is_target = example.weights > 0
    completion = run.tokenizer.decode(example.targets[is_target].tolist())
    assert completion == COMPLETIONS[i % 4] and example.targets[is_target][-1] == run.tokenizer.eos_id
    weight = 3 if completion in ("+", "<>") else 1
    np.testing.assert_array_equal(example.weights[is_target], weight)
