"""What the base models of the list tasks are trained on."""

import itertools

import numpy as np
import saved_runs

from experiments import base
from genrm_jax.tasks import string_base

COMPLETIONS = ("+", "<>", "mi<", "3mike4dlih;")


def test_answers_of_one_or_two_characters_weigh_more_and_no_others(tmp_path, monkeypatch):
  drawn = itertools.cycle(("K3a;4b;=", completion) for completion in COMPLETIONS)
  monkeypatch.setattr(string_base, "example", lambda rng: next(drawn))
  run = saved_runs.run_of(tmp_path, "base", base__num_examples=12, base__short_answer_weight=3.0)
  for i, example in enumerate(base.examples(run)):
    is_target = example.weights > 0
    completion = run.tokenizer.decode(example.targets[is_target].tolist())
    assert completion == COMPLETIONS[i % 4] and example.targets[is_target][-1] == run.tokenizer.eos_id
    np.testing.assert_array_equal(example.weights[is_target], 3 if completion in ("+", "<>") else 1)
