"""The program's walk is true at every step and ends in the right verdict for any solution; free text is read."""

import collections
import json
import re

import numpy as np
import pytest
from edited_texts import edited
from hypothesis import example, given, settings
from hypothesis import strategies as st

from genrm_jax.records import Problem
from genrm_jax.runtime.errors import UserError
from genrm_jax.tasks import word_sorting
from genrm_jax.tasks.last_letter import read_list, write_list
from genrm_jax.tasks.word_sorting import WordSorting, listed_words, order, read_bbh, write_items
from genrm_jax.text.tokenizer import CharTokenizer

TASK, NATURAL = WordSorting(), WordSorting(style="natural")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
# Few letters, so that words often begin alike, begin other words, and are other words misspelt.
WORD = st.text("abc", min_size=1, max_size=4) | st.text(LETTERS, min_size=1, max_size=4)
WORDS = st.lists(WORD, min_size=1, max_size=5, unique=True)
PLACES = "ABCDEFGHIJ"


def _write(items, first=3, end="."):
  return "".join(f"{PLACES[(first + i) % 10]}{number}{word}" for i, (number, word) in enumerate(items)) + end


def _sorted(words, first):
  return sorted(enumerate(words, first), key=lambda item: item[1])


def _problem(words, first):
  reference = _write(_sorted(words, first), first)
  return Problem("p", TASK.name, "train", write_list(words, first), reference[:-1], reference)


MIKE = _problem(["mike", "dlih", "make"], 3)


@pytest.mark.parametrize(
  ("text", "answer"),
  [
    ("D4dlihE5makeF3mike.", "D4dlihE5makeF3mike"),
    ("A4dlihA4dlihJ9a.", "A4dlihA4dlihJ9a"),
    ("A0a.", "A0a"),
    *[(text, None) for text in ("", ".", "D3dlih", "D3dlih.\n", "D3dlih..", "D3dlih;", ",D3dlih.", "D3dlih,E4make.")],
    *[(text, None) for text in ("D3dlihE4.", "D34dlih.", "D3dlih E4make.", "D3dlih4make.", "3dlih.", "DE3dlih.")],
    *[(text, None) for text in ("D3Dlih.", "D٣dlih.", "D3mik_.", "D3dlih.E4make.", "K3dlih.")],
  ],
)
def test_answers_are_read_from_well_formed_solutions_only(text, answer):
  assert TASK.extract_answer(text) == answer


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


@pytest.mark.parametrize("style", ["compact", "natural"])
def test_a_quarter_of_the_words_begins_like_another(style):
  rng = np.random.default_rng(0)
  questions = [WordSorting(style=style).problem(rng, 2, "train", i).question for i in range(600)]
  pairs = [re.findall("[a-z]+", question)[-2:] for question in questions]
  same = [np.mean([a[:n] == b[:n] for a, b in pairs]) for n in (1, 2)]
  assert abs(same[0] - 0.25) < 0.1 and 0.08 <= same[1] < 0.22


@settings(max_examples=60, deadline=None)
@given(WORD, WORD)
def test_words_are_walked_up_to_their_first_difference(a, b):
  assert order(a, b).endswith("<") == (a < b)
  for words, walk in (
    *((("make", "mike"), "mm+ai<"), (("mike", "make"), "mm+ia>"), (("a", "a"), "aa+__>")),
    *((("mik", "mike"), "mm+ii+kk+_e<"), (("mike", "mik"), "mm+ii+kk+e_>")),
  ):
    assert order(*words) == walk


def test_documented_walks():
  with pytest.raises(UserError, match="p: a word occurs twice"):
    TASK.rationale(_problem(["a", "a"], 0), "A0aB1a.")
  drawn = re.findall(r"solution (\S+) +ends in +(\S+)", word_sorting.__doc__)
  assert len(drawn) >= 7
  for solution, end in drawn:
    text, verdict = TASK.rationale(MIKE, solution)
    assert text.endswith(end) and not verdict, solution
  walk = re.findall(r"^    (\d[a-z]+[:;]\S+)(?:  |$)", word_sorting.__doc__, re.MULTILINE)
  assert "".join(walk) == TASK.rationale(MIKE, MIKE.reference)[0]
  assert write_items([(4, "dlih"), (3, "mike")], 0) == "A4dlihB3mike."


# The natural style


def test_natural_solutions_insert_one_word_at_a_time():
  p = NATURAL.problem(np.random.default_rng(0), 4, "train", 7)
  words = listed_words(p)
  assert p.question == "Sort the following words alphabetically: List: " + " ".join(words)
  steps = [line.split(": ") for line in p.reference.split("\n")[1:-1]]
  assert steps == [[word, " ".join(sorted(words[: i + 1]))] for i, word in enumerate(words)]


@pytest.mark.parametrize(
  ("text", "answer"),
  [
    ("The answer is: bar, foo, zap", "bar foo zap"),
    ("The answer is bar foo. No, wait.\nSo the answer is foo bar.", "foo bar"),
    ("the answer is **Bar Foo**", "bar foo"),
    ('The answer is "bar foo".', "bar foo"),
    ("The answer is 1. bar 2. foo", "bar foo"),
    ("The answer is\n\nit&t o'connell shouldn't", "it&t o'connell shouldn't"),
    ("The answer is bar foo.\n\nQ: Sort these: List: b a\nA: The answer is a b.", "bar foo"),
    *((text, None) for text in ("bar foo", "The answer is ...", "Q: the answer is bar", "")),
  ],
)
def test_answers_are_read_from_free_text(text, answer):
  assert NATURAL.extract_answer(text) == answer


@pytest.mark.parametrize(
  ("words", "answer", "end"),
  [
    ("plum apple pear", "apple pear plum", "All the words are there, in alphabetical order."),
    ("plum apple pear", "apple plum pear", 'letter 2 is the first that differs, and "l" comes after "e". Wrong.'),
    ("plum apple pear", "apple plum", '"apple" is word 1 of the answer. Right.\n"pear" is not in the answer. Wrong.'),
    ("plum apple pear", "apple paer plum", '"pear" is not in the answer. Wrong.'),
    ("plum apple pear", "apple pear plum plum", 'also has "plum", which is one word too many. Wrong.'),
    ("pear pearl pear", "pear pear pearl", "All the words are there, in alphabetical order."),
    ("pear pearl pear", "pear pearl pear", "ends where the first goes on, so it should come first. Wrong."),
    ("pear pearl pear", "pear pearl", '"pear" is not in the answer again. Wrong.'),
  ],
)
def test_natural_walk_names_the_error(words, answer, end):
  problem = NATURAL._natural_problem(words.split(), "p", "train")
  text, verdict = NATURAL.rationale(problem, f"The answer is {answer}.")
  assert text.endswith(end) and verdict is (answer == problem.answer)


def test_bbh(data_dir):
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


def test_bad_bbh_files_are_named(tmp_path):
  path = tmp_path / "word_sorting.json"
  good = {"input": "Sort the following words alphabetically: List: b a", "target": "a b"}
  path.write_text(json.dumps({"examples": [good]}))
  assert [p.answer for p in read_bbh(path)] == ["a b"]
  for examples, message in (
    ([good, {**good, "target": "b a"}], "example 1 is not .* with the sorted list"),
    *(([{**good, "input": text}], "example 0 is not ") for text in ("Sort b a", 3)),
    ([{"input": good["input"][:-4], "target": ""}], "example 0 is not "),
    *((text, "not a BIG-Bench Hard task") for text in ("{", "[]", '{"examples": [{"input": "x"}]}')),
  ):
    path.write_text(examples if isinstance(examples, str) else json.dumps({"examples": examples}))
    with pytest.raises(UserError, match=f"{re.escape(str(path))}: {message}.*fresh clone"):
      read_bbh(tmp_path)
  with pytest.raises(UserError, match=rf"{re.escape(str(tmp_path / 'none'))}.*git clone"):
    read_bbh(tmp_path / "none")
