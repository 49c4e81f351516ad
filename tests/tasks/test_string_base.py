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
PLACES = "ABCDEFGHIJ"
ROW = 160  # tokens of a training row of the bases, experiments/configs/base.py


def _items(text):
  """The items of a consecutively numbered list."""
  found = re.findall(r"(\d)([a-z]+)", text)
  assert "".join(n + w for n, w in found) == text
  assert [int(n) for n, _ in found] == list(range(int(found[0][0]), int(found[0][0]) + len(found)))
  return found


def _placed(text):
  """The items of a solution's list without numbers."""
  found = re.findall(r"([A-J])([a-z]+)", text)
  assert "".join(p + w for p, w in found) == text and "".join(p for p, _ in found) in PLACES
  return [(str(PLACES.index(p)), w) for p, w in found]


def _distinct(items):
  assert len({w for _, w in items}) == len(items)
  return items


def _read_solution(text):
  """The items {number: word} of a solution's list, in any order, and its places; may be empty."""
  found = re.findall(r"([A-J])(\d)([a-z]+)", text)
  assert text == "".join(map("".join, found)) + "."
  places, items = "".join(place for place, _, _ in found), {n: w for _, n, w in found}
  assert places in PLACES and len(items) == len(found)
  return items, places


def _order(left, right):
  out = ""
  for a, b in zip(left + "_", right + "_", strict=False):
    if a != b:
      return out + a + b + "<>"[a > b]
    out += a + b + "+"
  raise AssertionError


def _parts(prompt, num_lists, rest=""):
  """The lists of a prompt; the rest after the last one must match a pattern."""
  *parts, last = prompt[1:-1].split(";")
  assert prompt[-1] == "=" and len(parts) == num_lists and re.fullmatch(rest, last)
  return [*parts, last]


def _solve_sorting(prompt):
  match prompt[0]:
    case "O":
      first, second, _ = _parts(prompt, 2)
      (_, left), (_, right) = _distinct(_items(first + second))
      return _order(left, right)
    case "N":
      number, word = min(_distinct(_items(_parts(prompt, 1)[0])), key=lambda item: item[1])
      return f"{number}{word};"
    case "Y":
      listed, rest = _parts(prompt, 1, r".*\.\d")
      number, items = rest[-1], _distinct(_items(listed))
      one, (other, places) = dict(items), _read_solution(rest[:-1])
      assert not places or PLACES.index(places[0]) == int(items[0][0]), "places and numbers begin alike"
      assert set(one) - {number} <= set(other) <= set(one)
      assert all(one[n] == w for n, w in other.items() if n != number), "all others are the same"
      given = other.get(number, "")
      between = ";" if number == items[-1][0] else ":"
      return f"{number}{one[number]}{between}{given}{'-+'[given == one[number]]}"
    case "V":
      mixed, place = re.fullmatch(r"V(.*\.)([A-J])=", prompt).groups()
      items, places = _read_solution(mixed)
      numbers, at = list(_distinct(list(items.items()))), places.index(place)
      numbers = [n for n, _ in numbers]
      assert "".join(sorted(numbers)) in "0123456789" and min(numbers) == str(PLACES.index(places[0]))
      here = numbers[at] + items[numbers[at]]
      if at == len(items) - 1:
        return f"{place}{here}."
      after = numbers[at + 1] + items[numbers[at + 1]]
      return f"{place}{here}{places[at + 1]}{after}:{_order(here[1:], after[1:])}"
  raise AssertionError(prompt)


def _solve_judging(prompt):
  first, second, _ = _parts(prompt, 2)
  match prompt[0]:
    case "R":
      right = _items(first) == _placed(second)
      assert all(len(w) == 1 for _, w in _items(first)) and len(first) == len(second)
    case "K":
      (_, left), (_, right) = _distinct(_items(first + second))
      return "<" if left < right else ">"
    case _:
      raise AssertionError(prompt)
  return "+" if right else "-"


def _marked(rows):
  out = ""
  for number, a, place, b in rows:
    out += number + a + place + b + ("+" if a == b else "-")
    if a != b:
      return out
  return out


def _solve_list(prompt):
  kind, body = prompt[0], prompt[1:-1]
  assert prompt[-1] == "="
  lists = [part + ";" for part in body.split(";")[:-1]]
  rest = body.rpartition(";")[2]
  items = [_placed(text[:-1]) if i and kind in "ZM" else _items(text[:-1]) for i, text in enumerate(lists)]
  assert len(items) == (2 if kind in "ZMX" else 1) and len({len(i) for i in items}) == 1
  assert bool(rest) == (kind == "T")
  match kind:
    case "P":
      return lists[0]
    case "Z":
      return "".join(f"{n}{w}:{PLACES[int(n)]}{c}" for (n, w), (_, c) in zip(*items, strict=True)) + ";"
    case "L":
      return "".join(n + w[0] for n, w in items[0]) + ";"
    case "W":
      return "".join(f"{n}{w}:{w[-1]}" for n, w in items[0]) + ";"
    case "M":
      return _marked([(n, a, PLACES[int(n)], b) for (n, a), (_, b) in zip(*items, strict=True)])
    case "X":
      (left,), (right,) = items
      return _marked([("", a, "", b) for a, b in zip(left[1], right[1], strict=True)])
    case "T":
      return dict(items[0])[rest] + ";"
  raise AssertionError(prompt)


SOLVERS = {
  **dict.fromkeys(LISTS, _solve_list),
  **dict.fromkeys(SORTING, _solve_sorting),
  **dict.fromkeys(JUDGING, _solve_judging),
}


@pytest.mark.parametrize(
  ("draw", "kinds"),
  [
    (string_base.example, LISTS + SORTING + JUDGING),
    (string_base.sorting_example, SORTING),
    (string_base.judging_example, JUDGING),
  ],
)
def test_examples_match_their_solvers_and_no_task_of_the_paper(draw, kinds):
  rng = np.random.default_rng(0)
  tokenizer = CharTokenizer()
  counts, marks = collections.Counter(), collections.defaultdict(list)
  for _ in range(3000):
    prompt, completion = draw(rng)
    kind = prompt[0]
    assert completion == SOLVERS[kind](prompt), prompt
    # The tasks ask with S, and their verdict questions are ! and ?: no base prompt holds any of them.
    assert not set("S!?") & set(prompt + completion)
    assert not re.fullmatch(r"([A-J]\d[a-z]+){2,}\.", completion), "the solution of a list"
    if kind not in LISTS:
      assert len(re.findall(r"\d", completion)) <= {"N": 1, "Y": 1, "V": 2}.get(kind, 0), "no order of items but of two"
    assert len(tokenizer.encode(prompt + completion)) + 2 <= ROW, "with <bos> and <eos>"
    counts[kind] += 1
    if completion[-1] in "+-<>":
      marks[kind].append(completion[-1] in "+<")
  assert set(counts) == set(kinds) and min(counts.values()) > 80
  assert all(0.3 < np.mean(drawn) < 0.7 for drawn in marks.values()), "no mark dominates"


def test_examples_of_a_seed_are_recorded():
  rng = np.random.default_rng(7)
  drawn = json.dumps([string_base.example(rng) for _ in range(300)])
  recorded = "10ba1a16ba13a5f3ce42c3df666a736d02a88c9d154b3b2076551d22b492bcb2"
  assert hashlib.sha256(drawn.encode()).hexdigest() == recorded, "the bases of experiments/assets were trained on these"
