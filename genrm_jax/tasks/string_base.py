"""Generic list tasks that stand in for pretraining of a tiny base model.

None of them is a task of the paper: none asks for last letters alone, and none judges a solution. Each example is a
prompt and its completion, both in the compact style of tasks/compact.py:

    copy            P3mike4dlih;=            3mike4dlih;
    zip             Z3mike4dlih;DaEb;=       3mike:Da4dlih:Eb;
    first letters   L3mike4dlih;=            3m4d;
    word and last   W3mike4dlih;=            3mike:e4dlih:h;
    compare lists   M3a4b;DaEc;=             3aDa+4bEc-          (stops at the first difference)
    compare words   X3mike;3make;=           mm+ia-            (walks both words, stops at the first difference)
    find            T3mike4dlih;4=           dlih;
"""

from collections.abc import Sequence

import numpy as np

from genrm_jax.tasks.compact import END, LETTERS, PLACES, random_first, random_word, write_list, write_placed
from genrm_jax.tasks.word_sorting import STOP, draw_words, order, write_items

_ALIKE = 0.5  # share of the words that begin like others; see draw_words


def _marked_walk(left: list[str], right: list[str], numbers: Sequence[str], places: Sequence[str]) -> str:
  steps = []
  for number, a, place, b in zip(numbers, left, places, right, strict=True):
    steps.append(f"{number}{a}{place}{b}{'+' if a == b else '-'}")
    if a != b:
      break
  return "".join(steps)


def _spoil(rng: np.random.Generator, items: list[str]) -> list[str]:
  """The list, with one letter changed half the time."""
  items = list(items)
  if rng.random() < 0.5:
    items[rng.integers(len(items))] = LETTERS[rng.integers(26)]
  return items


def example(rng: np.random.Generator, min_words: int = 1, max_words: int = 8) -> tuple[str, str]:
  """A random (prompt, completion): half of them by `sorting_example`, a fifth by `judging_example`."""
  draw = rng.integers(10)
  if draw < 5:
    return sorting_example(rng, min_words, max_words)
  if draw < 7:
    return judging_example(rng, min_words, max_words)
  n = int(rng.integers(min_words, max_words + 1))
  first = int(rng.integers(0, 11 - n))
  words = [random_word(rng) for _ in range(n)]
  letters = [LETTERS[i] for i in rng.integers(26, size=n)]
  numbers, places = [str(first + i) for i in range(n)], PLACES[first : first + n]
  listed = write_list(words, first)
  kind = rng.integers(7)
  if kind == 0:
    return f"P{listed}=", listed
  if kind == 1:
    zipped = write_list([f"{w}:{p}{c}" for w, p, c in zip(words, places, letters, strict=True)], first)
    return f"Z{listed}{write_placed(letters, first)}=", zipped
  if kind == 2:
    return f"L{listed}=", write_list([w[0] for w in words], first)
  if kind == 3:
    return f"W{listed}=", write_list([f"{w}:{w[-1]}" for w in words], first)
  if kind == 4:
    other = _spoil(rng, letters)
    walk = _marked_walk(letters, other, numbers, places)
    return f"M{write_list(letters, first)}{write_placed(other, first)}=", walk
  if kind == 5:
    word = words[0]
    other_word = "".join(_spoil(rng, list(word)))
    prompt = f"X{write_list([word], first)}{write_list([other_word], first)}="
    return prompt, _marked_walk(list(word), list(other_word), [""] * len(word), [""] * len(word))
  at = int(rng.integers(n))
  return f"T{listed}{numbers[at]}=", words[at] + END


def sorting_example(rng: np.random.Generator, min_words: int = 1, max_words: int = 8) -> tuple[str, str]:
  """A random (prompt, completion) on the order and the spelling of words; no example sorts a list.

  order        O3mike;4make;=                   mm+ia>
  first        N3mike4dlih5make;=               4dlih;             (in alphabetical order)
  same number  Y3mike4dlih;D4dlahE3mike.4=      4dlih;dlah-        (in both lists; ";" at the end of the first)
  next         VD5makeE4dlihF3mike.D=           D5makeE4dlih:md>   (the item that follows, and the order of the two)
  """
  n = int(rng.integers(min_words, max_words + 1))
  kind = rng.integers(4)
  if kind == 0:
    (left, right), first = draw_words(rng, 2, _ALIKE), random_first(rng, 2)
    return f"O{first}{left};{first + 1}{right};=", order(left, right)
  first = random_first(rng, n)
  items = list(enumerate(draw_words(rng, n, _ALIKE), first))
  if kind == 1:
    number, word = min(items, key=lambda item: item[1])
    return f"N{_listed(items)}=", f"{number}{word}{END}"
  mixed = [items[i] for i in rng.permutation(n)]
  at = int(rng.integers(n))
  if kind == 2:
    number, word = items[at]
    written = "" if rng.random() < 0.15 else _misspell(rng, word)
    others = [(i, written if i == number else w) for i, w in mixed if i != number or written]
    mark, between = "+" if written == word else "-", END if number == items[-1][0] else ":"
    return f"Y{_listed(items)}{write_items(others, first)}{number}=", f"{number}{word}{between}{written}{mark}"
  place = PLACES[first + at]
  prompt, (number, word) = f"V{write_items(mixed, first)}{place}=", mixed[at]
  if at == n - 1:
    return prompt, f"{place}{number}{word}{STOP}"
  number_after, word_after = mixed[at + 1]
  following = f"{PLACES[first + at + 1]}{number_after}{word_after}"
  return prompt, f"{place}{number}{word}{following}:{order(word, word_after)}"


def judging_example(rng: np.random.Generator, min_words: int = 1, max_words: int = 8) -> tuple[str, str]:
  """A random (prompt, completion) whose completion ends in one mark, as the answer of a direct verifier does.

  same letters       R3a4b;DaEc;=             -
  order              K3mike;4make;=           >

  Short lists are drawn more often, since a model learns long ones only after short ones.
  """
  if rng.random() < 0.5:
    (left, right), first = draw_words(rng, 2, _ALIKE), random_first(rng, 2)
    return f"K{first}{left};{first + 1}{right};=", order(left, right)[-1]
  longest = int(rng.integers(min_words, max_words + 1))
  n = int(rng.integers(min_words, longest + 1))
  first = random_first(rng, n)
  letters = [LETTERS[i] for i in rng.integers(26, size=n)]
  other = _spoil(rng, letters)
  return f"R{write_list(letters, first)}{write_placed(other, first)}=", "+" if other == letters else "-"


def _listed(items: list[tuple[int, str]]) -> str:
  return write_list([word for _, word in items], items[0][0])


def _misspell(rng: np.random.Generator, word: str) -> str:
  """The word, with one letter changed, left out or inserted half the time."""
  if rng.random() < 0.5:
    return word
  at, letter = int(rng.integers(len(word))), LETTERS[rng.integers(26)]
  return word[:at] + (letter, "", letter + word[at])[rng.integers(3)] + word[at + 1 :]
