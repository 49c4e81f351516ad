"""Completions of the base's examples match independent solvers; no example is a task of the paper."""

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


def _walk(left, right, prefixes=None):
  """Pairs of letters with marks, up to the first that differs."""
  out = ""
  for prefix, a, place, b in prefixes or [("", a, "", b) for a, b in zip(left, right, strict=True)]:
    out += prefix + a + place + b + ("+" if a == b else "-")
    if a != b:
      break
  return out


def _order(a, b):
  walk = _walk(a + "_", b + "_", [("", x, "", y) for x, y in zip(a + "_", b + "_", strict=False)])
  return walk[:-1] + "<>"[a > b]


def _solve(prompt):
  """The completion of a prompt, from its numbered items ("3mike") and placed ones ("De", "D3mike") alone."""
  kind, body = prompt[0], prompt[1:-1]
  numbered = re.findall(r"(?<![A-J])(\d)([a-z]+)", body)
  placed = re.findall(r"([A-J])(\d?)([a-z]+)", body)
  words = [word for _, word in numbered]
  pairs = [(number, word, place, other) for (number, word), (place, _, other) in zip(numbered, placed, strict=False)]
  match kind:
    case "P":
      return body
    case "Z":
      return "".join(f"{number}{word}:{place}{other}" for number, word, place, other in pairs) + ";"
    case "L":
      return "".join(number + word[0] for number, word in numbered) + ";"
    case "W":
      return "".join(f"{number}{word}:{word[-1]}" for number, word in numbered) + ";"
    case "M":
      return _walk("", "", pairs)
    case "X":
      return _walk(*words)
    case "T":
      return dict(numbered)[body[-1]] + ";"
    case "O":
      return _order(*words)
    case "K":
      return "<" if words[0] < words[1] else ">"
    case "R":
      return "+" if words == [word for _, _, word in placed] else "-"
    case "N":
      return "".join(min(numbered, key=lambda item: item[1])) + ";"
    case "Y":
      asked, given = body[-1], {number: word for _, number, word in placed}.get(body[-1], "")
      right, between = dict(numbered)[asked], ";" if asked == numbered[-1][0] else ":"
      return f"{asked}{right}{between}{given}{'-+'[given == right]}"
    case "V":
      at = [place for place, *_ in placed].index(body[-1])
      here, *after = ("".join(item) for item in placed[at : at + 2])
      return here + (f"{after[0]}:{_order(here[2:], after[0][2:])}" if after else ".")
  raise AssertionError(prompt)


@pytest.mark.parametrize(
  ("draw", "kinds"),
  [
    (string_base.example, LISTS + SORTING + JUDGING),
    (string_base.sorting_example, SORTING),
    (string_base.judging_example, JUDGING),
  ],
)
def test_examples_match_their_solvers_and_no_task_of_the_paper(draw, kinds):
  rng, tokenizer = np.random.default_rng(0), CharTokenizer()
  counts, marks = collections.Counter(), collections.defaultdict(list)
  for _ in range(2000):
    prompt, completion = draw(rng)
    kind = prompt[0]
    assert completion == _solve(prompt), prompt
    # The tasks ask with S, and their verdict questions are ! and ?: no base prompt holds any of them.
    assert not set("S!?") & set(prompt + completion)
    assert not re.fullmatch(r"([A-J]\d[a-z]+){2,}\.", completion), "the solution of a list"
    if kind not in LISTS:
      assert len(re.findall(r"\d", completion)) <= {"N": 1, "Y": 1, "V": 2}.get(kind, 0), "no order of items but of two"
    assert len(tokenizer.encode(prompt + completion)) + 2 <= ROW, "with <bos> and <eos>"
    counts[kind] += 1
    if completion[-1] in "+-<>":
      marks[kind].append(completion[-1] in "+<")
  assert set(counts) == set(kinds) and min(counts.values()) > 50
  assert all(0.3 < np.mean(drawn) < 0.7 for drawn in marks.values()), "no mark dominates"


def test_examples_of_a_seed_are_recorded():
  rng = np.random.default_rng(7)
  drawn = json.dumps([string_base.example(rng) for _ in range(300)])
  recorded = "10ba1a16ba13a5f3ce42c3df666a736d02a88c9d154b3b2076551d22b492bcb2"
  assert hashlib.sha256(drawn.encode()).hexdigest() == recorded, "the bases of experiments/assets were trained on these"
