"""Generic list tasks on which a tiny *base* model is trained, standing in for pretraining.

None of them is a task of the paper: a list of last letters alone is never asked for, nor is a solution judged. Each
example is a prompt and its completion, both in the numbered form of tasks/last_letter.py:

    copy            C3mike4dlih;=            3mike4dlih;
    zip             Z3mike4dlih;3a4b;=       3mike:a4dlih:b;
    first letters   F3mike4dlih;=            3m4d;
    word and last   W3mike4dlih;=            3mike:e4dlih:h;
    compare lists   M3a4b;3a4c;=             3aa+4bc-          (stops at the first difference)
    compare words   E3mike;3make;=           mm+ia-            (walks both words, stops at the first difference)
    find            I3mike4dlih;4=           dlih;
"""

import numpy as np

from genrm_jax.tasks.last_letter import END, random_first, random_word, write_list
from genrm_jax.tasks.word_sorting import STOP, draw_words, order, write_items

_ALIKE = 0.5  # of the words begin like others; see draw_words
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def _marked_walk(left: list[str], right: list[str], numbers: list[str]) -> str:
  steps = []
  for number, a, b in zip(numbers, left, right, strict=True):
    steps.append(f"{number}{a}{b}{'+' if a == b else '-'}")
    if a != b:
      break
  return "".join(steps)


def _spoil(rng: np.random.Generator, items: list[str]) -> list[str]:
  """The list, half the time with one letter changed."""
  items = list(items)
  if rng.random() < 0.5:
    items[rng.integers(len(items))] = _LETTERS[rng.integers(26)]
  return items


def example(rng: np.random.Generator, min_words: int = 1, max_words: int = 8) -> tuple[str, str]:
  """A random (prompt, completion): of ten four from `sorting_example`, two from `judging_example`, by chance."""
  draw = rng.integers(10)
  if draw < 4:
    return sorting_example(rng, min_words, max_words)
  if draw < 6:
    return judging_example(rng, min_words, max_words)
  n = int(rng.integers(min_words, max_words + 1))
  first = int(rng.integers(0, 11 - n))
  words = [random_word(rng) for _ in range(n)]
  letters = [_LETTERS[i] for i in rng.integers(26, size=n)]
  numbers = [str(first + i) for i in range(n)]
  listed = write_list(words, first)
  kind = rng.integers(7)
  if kind == 0:
    return f"C{listed}=", listed
  if kind == 1:
    zipped = write_list([f"{w}:{c}" for w, c in zip(words, letters, strict=True)], first)
    return f"Z{listed}{write_list(letters, first)}=", zipped
  if kind == 2:
    return f"F{listed}=", write_list([w[0] for w in words], first)
  if kind == 3:
    return f"W{listed}=", write_list([f"{w}:{w[-1]}" for w in words], first)
  if kind == 4:
    other = _spoil(rng, letters)
    return f"M{write_list(letters, first)}{write_list(other, first)}=", _marked_walk(letters, other, numbers)
  if kind == 5:
    word = words[0]
    other_word = "".join(_spoil(rng, list(word)))
    prompt = f"E{write_list([word], first)}{write_list([other_word], first)}="
    return prompt, _marked_walk(list(word), list(other_word), [""] * len(word))
  at = int(rng.integers(n))
  return f"I{listed}{numbers[at]}=", words[at] + END


def sorting_example(rng: np.random.Generator, min_words: int = 1, max_words: int = 8) -> tuple[str, str]:
  """A random (prompt, completion) on the order and the spelling of words; a list is never sorted, nor seen to be.

  order        O3mike;4make;=                   mm+ia>
  first        N3mike4dlih5make;=               4dlih.             (in alphabetical order)
  same number  Y3mike4dlih;4dlah,3mike.4=       4dlih:dlah-        (in both lists; ":-" where the second has none)
  next         V5make,4dlih,3mike.5=            5make,4dlih:md>    (the item that follows, and the order of the two)
  """
  n = int(rng.integers(min_words, max_words + 1))
  kind = rng.integers(4)
  if kind == 0:
    (left, right), first = draw_words(rng, 2, _ALIKE), random_first(rng, 2)
    return f"O{first}{left};{first + 1}{right};=", order(left, right)
  first = random_first(rng, n)
  items = list(enumerate(draw_words(rng, n, _ALIKE), first))
  if kind == 1:
    return f"N{_listed(items)}=", write_items([min(items, key=lambda item: item[1])])
  mixed = [items[i] for i in rng.permutation(n)]
  at = int(rng.integers(n))
  if kind == 2:
    number, word = items[at]
    given = "" if rng.random() < 0.15 else _misspell(rng, word)
    others = [(i, given if i == number else w) for i, w in mixed if i != number or given]
    mark = "+" if given == word else "-"
    return f"Y{_listed(items)}{write_items(others)}{number}=", f"{number}{word}:{given}{mark}"
  number, word = mixed[at]
  asked = f"V{write_items(mixed)}{number}="
  if at == n - 1:
    return asked, f"{number}{word}{STOP}"
  number_after, word_after = mixed[at + 1]
  return asked, f"{number}{word},{number_after}{word_after}:{order(word, word_after)}"


def judging_example(rng: np.random.Generator, min_words: int = 1, max_words: int = 8) -> tuple[str, str]:
  """A random (prompt, completion) that is answered at once, by one mark: what a verifier without a rationale does.

  same letters       A3a4b;3a4c;=             -
  first letters      G3mike4dlih;3m4d;=       +
  order              K3mike;4make;=           >

  Short lists are drawn more often: at once, long ones are learnt from short ones only.
  """
  n = int(rng.integers(min_words, rng.integers(min_words, max_words + 1) + 1))
  kind = rng.integers(3)
  if kind == 0:
    (left, right), first = draw_words(rng, 2, _ALIKE), random_first(rng, 2)
    return f"K{first}{left};{first + 1}{right};=", order(left, right)[-1]
  first = random_first(rng, n)
  if kind == 1:
    true, asked = [_LETTERS[i] for i in rng.integers(26, size=n)], "A"
    shown = true
  else:
    shown, asked = draw_words(rng, n, _ALIKE), "G"
    true = [word[0] for word in shown]
  given = _spoil(rng, true)
  return f"{asked}{write_list(shown, first)}{write_list(given, first)}=", "+" if given == true else "-"


def _listed(items: list[tuple[int, str]]) -> str:
  return write_list([word for _, word in items], items[0][0])


def _misspell(rng: np.random.Generator, word: str) -> str:
  """The word, half the time with one letter changed, left out or put in."""
  if rng.random() < 0.5:
    return word
  at, letter = int(rng.integers(len(word))), _LETTERS[rng.integers(26)]
  return word[:at] + (letter, "", letter + word[at])[rng.integers(3)] + word[at + 1 :]
