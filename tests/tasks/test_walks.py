"""Compact walks are true at every step and end in the right verdict for any solution; BIG-Bench Hard is read."""

import collections
import json
import re

import numpy as np
from edited_texts import edited
from hypothesis import example, given, settings
from hypothesis import strategies as st
from refusals import refused

from genrm_jax.records import Problem
from genrm_jax.tasks.last_letter import PLACES, LastLetter, read_list, write_list, write_placed
from genrm_jax.tasks.word_sorting import WordSorting, listed_words, order, read_bbh, write_items
from genrm_jax.text.tokenizer import CharTokenizer

TASK, NATURAL, LAST = WordSorting(), WordSorting(style="natural"), LastLetter()
LETTERS = "abcdefghijklmnopqrstuvwxyz"
# Few letters, so that words often begin alike, begin other words, and are other words misspelt.
WORD = st.text("abc", min_size=1, max_size=4) | st.text(LETTERS, min_size=1, max_size=4)
WORDS = st.lists(WORD, min_size=1, max_size=5, unique=True)


def _write(items, first=3, end="."):
  return "".join(f"{PLACES[(first + i) % 10]}{number}{word}" for i, (number, word) in enumerate(items)) + end


def _sorted(words, first):
  return sorted(enumerate(words, first), key=lambda item: item[1])


def _problem(words, first):
  reference = _write(_sorted(words, first), first)
  return Problem("p", TASK.name, "train", write_list(words, first), reference[:-1], reference)


MIKE = _problem(["mike", "dlih", "make"], 3)


@st.composite
def _drawn(draw):
  """Lists and texts near the right solution: items swapped, dropped, repeated, added; words, numbers, places, marks."""
  words, first = draw(WORDS), draw(st.integers(0, 4))
  problem, right = _problem(words, first), _sorted(words, first)
  place, number, gap = st.integers(0, len(right) - 1), st.integers(0, 9), st.integers(0, len(right))

  def by_word(items):
    return sorted(items, key=lambda item: item[1])

  lists = st.one_of(
    st.permutations(right),
    st.builds(lambda i: right[:i] + right[i + 1 :], place),
    st.builds(lambda i, j: [*right[:j], right[i], *right[j:]], place, gap),
    st.builds(lambda i, j: [*right[:j], right[i], *right[j + 1 :]], place, place),
    st.builds(lambda i, w: [*right[:i], (right[i][0], w), *right[i + 1 :]], place, WORD),
    st.builds(lambda i, w: by_word([*right[:i], *right[i + 1 :], (right[i][0], w)]), place, WORD),
    st.builds(lambda i, n: [*right[:i], (n, right[i][1]), *right[i + 1 :]], place, number),
    st.builds(lambda n, w: by_word([*right, (n, w)]), number, WORD),
    st.builds(lambda ns: [(n, w) for n, (_, w) in zip(ns, right, strict=False)], st.permutations(range(first, 10))),
    st.builds(lambda by: [((n + by) % 10, w) for n, w in right], number),
    st.lists(st.tuples(number, WORD), max_size=6),
  )
  texts = st.one_of(
    lists.map(lambda items: _write(items, first)),
    st.builds(_write, lists, number, st.sampled_from([".", "", ";", "..", "J9a."])),
    st.sampled_from([write_list(words, first), write_list(sorted(words), first)]),
    st.just(re.sub("[A-J]", "", problem.reference)),
  )
  near = edited(problem.reference, characters="abcdABCD0123456789,.;_ \n")
  return problem, draw(st.booleans().flatmap(lambda of_items: texts if of_items else near))


ITEM = r"([A-J])([0-9])([a-z]+)"
STEP = re.compile(r"([0-9])([a-z]+)([:;])([a-z]*)(-|\+(?:(?P<placed>.*?)(?P<mark>-|\.\+|<|>)))")


def _check_steps(problem, solution, text):
  """Every step says what question and solution hold, as a reader with nothing but the two texts would find it."""
  words, first = read_list(problem.question)
  at = 0
  for i, word in enumerate(words):
    number, is_last = str(first + i), i == len(words) - 1
    step = STEP.match(text, at)
    at = step.end()
    found = re.search(f"{number}([a-z]+)", solution)
    assert step.groups()[:4] == (number, word, ";" if is_last else ":", found[1] if found else "")
    if step[4] != word:
      assert step[5] == "-"
      return at
    # The solution's item at this place, and what follows it: all before it has been found in order.
    before, placed = re.match(f"(?:{ITEM}){{{i}}}", solution).end(), step["placed"]
    here = re.compile(ITEM).match(solution, before)
    if not here or here[1] != PLACES[first + i]:
      assert (placed, step["mark"]) == (here[1] if here else "", "-")
      return at
    rest, place_after = solution[here.end() :], PLACES[first + i + 1 : first + i + 2]
    after = re.match(ITEM, rest)
    if rest == ".":
      assert placed + step["mark"] == here[0] + (".+" if is_last else ".-")
    elif after and not is_last and after[1] == place_after:
      assert placed + step["mark"] == f"{here[0]}{after[0]}:{order(here[3], after[3])}"
    else:
      assert placed + step["mark"] == f"{here[0]}{after[1] if after else ''}-"
    if text[at - 1] in "->":
      return at
  return len(text)


@settings(max_examples=250, deadline=None)
@given(_drawn())
@example((MIKE, ",D4dlihE5makeF3mike."))
@example((MIKE, "D4dlihE4dlihF5makeG3mike."))
@example((MIKE, "D4dlihE5makeF3mikeG4zzz."))
@example((MIKE, "D4dlihE5makeF3mike.G3mike"))
@example((MIKE, "D٤dlihE5makeF3mike."))
@example((_problem(["a", "aa"], 0), "A1aaB0a."))
@example((_problem(["a"], 9), "xJ9a."))
@example((_problem(["a"], 9), "J9aK9b."))
@example((_problem(list(LETTERS[:10]), 0), _write(list(enumerate(LETTERS[:10])), 0, "A0k.")))
def test_walk_ends_in_the_verdict_that_the_answer_deserves(drawn):
  problem, solution = drawn
  text, verdict = TASK.rationale(problem, solution)
  assert verdict is TASK.grade(problem, solution).correct
  assert verdict is (solution == problem.reference)
  assert _check_steps(problem, solution, text) == len(text)
  assert not set("->") & set(text[:-1]) and text[-1] in ("+" if verdict else "->"), "stops at the first error"
  CharTokenizer().encode(text)
  assert not set("S=!?") & set(text), "the marks of the prompts"


def test_orders_and_repeated_words():
  refused(("p: a word occurs twice", TASK.rationale, _problem(["a", "a"], 0), "A0aB1a."))
  assert write_items([(4, "dlih"), (3, "mike")], 0) == "A4dlihB3mike."
  assert [order(*words.split()) for words in ("make mike", "mike make", "a a")] == ["mm+ai<", "mm+ia>", "aa+__>"]
  assert [order(*words.split()) for words in ("mik mike", "mike mik")] == ["mm+ii+kk+_e<", "mm+ii+kk+e_>"]


def test_bbh(data_dir, tmp_path):
  problems = read_bbh(data_dir)
  assert len(problems) == 250
  lengths = collections.Counter(len(p.answer.split()) for p in problems)
  assert set(lengths) == set(range(2, 21)) and (lengths[2], lengths[5], lengths[20]) == (13, 12, 20)
  for i, p in enumerate(problems):
    words = p.question.partition("List: ")[2].split(" ")
    assert p.answer == " ".join(sorted(words)) and len(set(words)) == len(words)
    assert listed_words(p) == words, "no word loses its marks"
    assert (p.id, p.split, p.reference) == (f"word_sorting/bbh/{i:05d}", "bbh", "")
    assert NATURAL.rationale(p, f"So the answer is {p.answer}.")[1]
    assert not NATURAL.rationale(p, f"So the answer is {' '.join(reversed(p.answer.split()))}.")[1]
  clone = data_dir / "BIG-Bench-Hard"
  for place in (clone, clone / "bbh", clone / "bbh" / "word_sorting.json", str(clone)):
    assert read_bbh(place) == problems
  task = WordSorting(style="natural", eval={"num_problems": 9, "min_words": 2, "max_words": 2, "bbh": str(clone)})
  assert task.problems("eval", np.random.default_rng(0)) == problems
  path = tmp_path / "word_sorting.json"
  good = {"input": "Sort the following words alphabetically: List: b a", "target": "a b"}
  for examples, message in (
    ([good, {**good, "target": "b a"}], "example 1 is not .* with the sorted list"),
    *(([{**good, "input": text}], "example 0 is not ") for text in ("Sort b a", 3)),
    ([{"input": good["input"][:-4], "target": ""}], "example 0 is not "),
    *((text, "not a BIG-Bench Hard task") for text in ("{", "[]", '{"examples": [{"input": "x"}]}')),
  ):
    path.write_text(examples if isinstance(examples, str) else json.dumps({"examples": examples}))
    refused((f"{re.escape(str(path))}: {message}.*fresh clone", read_bbh, tmp_path))
  refused((r"none.*git clone", read_bbh, tmp_path / "none"))


ANY_WORD = st.text(LETTERS, min_size=1, max_size=6)


def _letters(words, first):
  letters = [w[-1] for w in words]
  question, reference = write_list(words, first), write_placed(letters, first)
  return Problem("p", LAST.name, "train", question, "".join(letters), reference)


LAST_MIKE = _letters(["mike", "dlih"], 3)


@st.composite
def _drawn_letters(draw):
  problem = _letters(draw(st.lists(ANY_WORD, min_size=1, max_size=6)), draw(st.integers(0, 4)))
  others = st.builds(write_placed, st.lists(ANY_WORD, max_size=6), st.integers(0, 4))
  repeated = st.integers(0, 3).map(lambda n: problem.reference * n)
  return problem, draw(edited(problem.reference, characters="abczABCDEFJ09;", texts=others | repeated))


LETTER_STEP = re.compile(r"([0-9])([a-z]+)([:;])([a-z])([A-J])([a-z]?)([A-J;]?)([+-])")


def _steps(text, problem, solution):
  """The steps of a walk, each checked as a reader with nothing but question and solution would."""
  words, first = read_list(problem.question)
  steps = LETTER_STEP.findall(text)
  assert "".join(map("".join, steps)) == text
  for i, step in enumerate(steps):
    word, place, rest, is_last = words[i], PLACES[first + i], solution[2 * i :], i == len(words) - 1
    there = rest[:1] == place and rest[1:2] in tuple(LETTERS)
    letter = rest[1] if there else ""
    after = rest[2:3] if letter == word[-1] and rest[2:3] in (*PLACES, ";") else ""
    assert step[:5] == (str(first + i), word, ";" if is_last else ":", word[-1], place)
    assert step[5:7] == (letter, after)
    goes_on = rest[2:] == ";" if is_last else after == PLACES[first + i + 1]
    assert step[7] == ("+" if letter == word[-1] and goes_on else "-")
  return steps


@settings(max_examples=200, deadline=None)
@given(_drawn_letters())
@example((LAST_MIKE, "DeEh;Fx;"))
@example((LAST_MIKE, "DexxEh;"))
@example((_letters(["mike", "dlih"], 8), "IeJhKa;"))
@example((_letters(["mike"], 9), "Je"))
def test_last_letter_walk_ends_in_the_verdict_that_the_solution_deserves(drawn):
  problem, solution = drawn
  words, first = read_list(problem.question)
  text, verdict = LAST.rationale(problem, solution)
  assert verdict is (solution == problem.reference)
  # The answer does not say where its places begin.
  assert verdict is LAST.grade(problem, solution).correct or solution[:1] != PLACES[first]
  steps = _steps(text, problem, solution)
  # A walk that goes wrong stops there; only one that is right to the last word comes to the end of the list.
  assert "-" not in text[:-1] and text[-1] == ("+" if verdict else "-")
  assert verdict is (len(steps) == len(words) and text[-1] == "+")
  CharTokenizer().encode(text)
  # The other walks.
  given_first, same = LastLetter(walk={"true_first": False}).rationale(problem, solution)
  assert same is verdict
  assert given_first == re.sub(r"([:;])([a-z])([A-J][a-z]?)(?=[A-J;]?[+-])", r"\1\3\2", text)
  to_the_end, same = LastLetter(walk={"stop": False}).rationale(problem, solution)
  assert same is verdict and to_the_end.startswith(text) and ("-" not in to_the_end) is verdict
  assert len(_steps(to_the_end, problem, solution)) == len(words)
