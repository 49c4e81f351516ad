"""Examples of the base are those on which the shipped bases were trained; none is a task of the paper."""

import collections
import hashlib
import json
import re

import numpy as np
import pytest

from genrm_jax.tasks import string_base
from genrm_jax.text.tokenizer import CharTokenizer

LISTS, SORTING, JUDGING = "PZLWMXT", "ONYV", "RK"
ROW = 160  # tokens of a training row of the bases, experiments/configs/base.py


@pytest.mark.parametrize(
  ("draw", "kinds", "recorded"),
  [
    (string_base.example, LISTS + SORTING + JUDGING, "10ba1a16ba13a5f3ce42c3df666a736d"),
    (string_base.sorting_example, SORTING, "2d5fde8f559840838983aff395f04cf9"),
    (string_base.judging_example, JUDGING, "b931e05f02320fd76b5cfc139476d768"),
  ],
)
def test_examples_are_as_recorded_and_no_task_of_the_paper(draw, kinds, recorded):
  rng, tokenizer = np.random.default_rng(7), CharTokenizer()
  drawn = [draw(rng) for _ in range(2000)]
  assert hashlib.sha256(json.dumps(drawn[:300]).encode()).hexdigest().startswith(recorded)
  counts, marks = collections.Counter(prompt[0] for prompt, _ in drawn), collections.defaultdict(list)
  for prompt, completion in drawn:
    kind = prompt[0]
    # The tasks ask with S, and their verdict questions are ! and ?: no base prompt holds any of them.
    assert not set("S!?") & set(prompt + completion)
    assert not re.fullmatch(r"([A-J]\d[a-z]+){2,}\.", completion), "the solution of a list"
    if kind not in LISTS:
      assert len(re.findall(r"\d", completion)) <= {"N": 1, "Y": 1, "V": 2}.get(kind, 0), "no order of items but of two"
    assert len(tokenizer.encode(prompt + completion)) + 2 <= ROW, "with <bos> and <eos>"
    if completion[-1] in "+-<>":
      marks[kind].append(completion[-1] in "+<")
  assert set(counts) == set(kinds) and min(counts.values()) > 50
  assert all(0.3 < np.mean(found) < 0.7 for found in marks.values()), "no mark dominates"
