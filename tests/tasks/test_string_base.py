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


def _order(a, b):
  """Letters side by side up to the first difference, as the walk over two words writes it."""
  n = next(i for i, (x, y) in enumerate(zip(a + "_", b + "_", strict=False)) if x != y)
  return "".join(f"{x}{x}+" for x in a[:n]) + (a + "_")[n] + (b + "_")[n] + "<>"[a > b]


def _solve(prompt):
  """The completion of a prompt that compares words, from its items ("3mike", "D3mike") alone."""
  kind, body = prompt[0], prompt[1:-1]
  numbered = re.findall(r"(?<![A-J])(\d)([a-z]+)", body)
  placed = re.findall(r"([A-J])(\d?)([a-z]+)", body)
  words = [word for _, word in numbered]
  match kind:
    case "O" | "K":
      return _order(*words)[-1 if kind == "K" else 0 :]
    case "R":
      return "+" if words == [word for _, _, word in placed] else "-"
    case "N":
      return "".join(min(numbered, key=lambda item: item[1])) + ";"
    case "Y":
      number, given = body[-1], {number: word for _, number, word in placed}.get(body[-1], "")
      right, between = dict(numbered)[number], ";" if number == numbered[-1][0] else ":"
      return f"{number}{right}{between}{given}{'-+'[given == right]}"
    case "V":
      at = [place for place, *_ in placed].index(body[-1])
      here, *after = ("".join(item) for item in placed[at : at + 2])
      return here + (f"{after[0]}:{_order(here[2:], after[0][2:])}" if after else ".")


@pytest.mark.parametrize(
  ("draw", "kinds", "recorded"),
  [
    (string_base.example, LISTS + SORTING + JUDGING, "10ba1a16ba13a5f3ce42c3df666a736d"),
    (string_base.sorting_example, SORTING, "2d5fde8f559840838983aff395f04cf9"),
    (string_base.judging_example, JUDGING, "b931e05f02320fd76b5cfc139476d768"),
  ],
)
def test_examples_are_as_recorded_right_and_no_task_of_the_paper(draw, kinds, recorded):
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
      assert completion == _solve(prompt), prompt
      assert len(re.findall(r"\d", completion)) <= {"N": 1, "Y": 1, "V": 2}.get(kind, 0), "no order of items but of two"
    assert len(tokenizer.encode(prompt + completion)) + 2 <= ROW, "with <bos> and <eos>"
    if completion[-1] in "+-<>":
      marks[kind].append(completion[-1] in "+<")
  assert set(counts) == set(kinds) and min(counts.values()) > 50
  assert all(0.3 < np.mean(found) < 0.7 for found in marks.values()), "no mark dominates"
