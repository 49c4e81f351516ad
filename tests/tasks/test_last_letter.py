"""The program's walk is true at every step and ends in the right verdict for any solution; free text is read."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrm_jax.records import Problem
from genrm_jax.tasks import last_letter, natural
from genrm_jax.tasks.last_letter import PLACES, LastLetter, read_list, write_list, write_placed
from genrm_jax.text.tokenizer import CharTokenizer

TASK = LastLetter()
WORD = st.text("abcdefghijklmnopqrstuvwxyz", min_size=1, max_size=6)
WORDS = st.lists(WORD, min_size=1, max_size=6)


def _problem(words, first):
  letters = [w[-1] for w in words]
  question, reference = write_list(words, first), write_placed(letters, first)
  return Problem("p", TASK.name, "train", question, "".join(letters), reference)


@pytest.mark.parametrize("num_words", [1, 2, 5, 10])
def test_problems_have_their_words_and_answer(num_words):
  rng = np.random.default_rng(num_words)
  firsts = set()
  for i in range(60):
    p = TASK.problem(rng, num_words, "val", i)
    words, first = read_list(p.question)
    assert len(words) == num_words and all(3 <= len(w) <= 5 for w in words)
    assert p.answer == "".join(w[-1] for w in words)
    assert p.reference == write_placed(list(p.answer), first)
    assert TASK.grade(p, p.reference).correct
    firsts.add(first)
  assert firsts == set(range(11 - num_words))


@pytest.mark.parametrize(
  ("text", "answer"),
  [
    *(("DeEh;", "eh"), ("Aa;", "a"), ("IaJb;", "ab")),
    *[(text, None) for text in ("", ";", "DeEh", "DeEh;;", "DeEh; ", "DeEh;\n", " DeEh;", "٣e;", "²e;")],
    *[(text, None) for text in ("DeFh;", "EeDh;", "JaAb;", "DeeEh;", "DEEh;")],
  ],
)
def test_answers_are_read_from_well_formed_solutions_only(text, answer):
  assert TASK.extract_answer(text) == answer


def _edits(problem):
  """Solutions near the right one: a changed, missing or further character; another first number; anything."""
  right = problem.reference
  at, char = st.integers(0, len(right)), st.characters() | st.sampled_from("abczABCDEFJ09;")
  return st.one_of(
    st.just(right),
    st.builds(lambda i, c: right[:i] + c + right[i + 1 :], at, char),
    st.builds(lambda i, c: right[:i] + c + right[i:], at, char),
    st.builds(lambda i, n: right[:i] + right[i + n :], at, st.integers(1, 4)),
    st.builds(lambda s: right + s, st.text(max_size=6)),
    st.builds(lambda n: right * n, st.integers(0, 3)),
    st.builds(lambda ls, first: write_placed(ls, first), st.lists(WORD, max_size=6), st.integers(0, 4)),
    st.text(max_size=20),
  )


@st.composite
def _drawn(draw):
  problem = _problem(draw(WORDS), draw(st.integers(0, 4)))
  return problem, draw(_edits(problem))


MIKE = _problem(["mike", "dlih"], 3)


LETTERS = "abcdefghijklmnopqrstuvwxyz"
STEP = re.compile(r"([0-9])([a-z]+)([:;])([a-z])([A-J])([a-z]?)([A-J;]?)([+-])")


def _check_step(step, word, number, solution, done, is_last):
  """A step says what question and solution hold, as a reader with nothing but the two texts would find it."""
  place, rest = PLACES[number], solution[2 * done :]
  there = rest[:1] == place and rest[1:2] in tuple(LETTERS)
  letter = rest[1] if there else ""
  after = rest[2:3] if letter == word[-1] and rest[2:3] in (*PLACES, ";") else ""
  assert step[:5] == (str(number), word, ";" if is_last else ":", word[-1], place) and step[5:7] == (letter, after)
  goes_on = rest[2:] == ";" if is_last else after == PLACES[number + 1]
  assert step[7] == ("+" if letter == word[-1] and goes_on else "-")


def _check_walk(problem, solution):
  words, first = read_list(problem.question)
  text, verdict = TASK.rationale(problem, solution)
  assert verdict is (solution == problem.reference)
  assert verdict is TASK.grade(problem, solution).correct or first != _first_of(solution)
  steps = STEP.findall(text)
  assert "".join(map("".join, steps)) == text
  for i, step in enumerate(steps):
    _check_step(step, words[i], first + i, solution, i, i == len(words) - 1)
  # A walk that goes wrong stops there; only one that is right to the last word comes to the end of the list.
  assert "-" not in text[:-1] and text[-1] == ("+" if verdict else "-")
  assert verdict is (len(steps) == len(words) and text[-1] == "+")
  CharTokenizer().encode(text)


@settings(max_examples=250, deadline=None)
@given(_drawn())
def test_walk_ends_in_the_verdict_that_the_solution_deserves(drawn):
  _check_walk(*drawn)


def test_walks_of_chosen_solutions():
  for text in (*("", "DeEh", "DeEh;;", "DeEh;Fx;", "DeEhFx;", "DeEhF;", ";", "٣eEh;", "ADeEh;", "DexxEh;", "DeAEh;"),):
    _check_walk(MIKE, text)
  for problem, text in ((_problem(["mike", "dlih"], 8), "IeJhKa;"), (_problem(["mike"], 9), "Je")):
    _check_walk(problem, text)


def _first_of(solution):
  return PLACES.find(solution[:1]) if solution else None


@settings(max_examples=150, deadline=None)
@given(_drawn())
def test_other_walks_reorder_the_steps_or_go_to_the_end(drawn):
  problem, solution = drawn
  words, first = read_list(problem.question)
  text, verdict = TASK.rationale(problem, solution)
  given_first, same = LastLetter(walk={"true_first": False}).rationale(problem, solution)
  assert same is verdict
  assert given_first == re.sub(r"([:;])([a-z])([A-J][a-z]?)(?=[A-J;]?[+-])", r"\1\3\2", text)
  to_the_end, same = LastLetter(walk={"stop": False}).rationale(problem, solution)
  assert same is verdict and to_the_end.startswith(text) and ("-" not in to_the_end) is verdict
  steps = STEP.findall(to_the_end)
  assert "".join(map("".join, steps)) == to_the_end and len(steps) == len(words)
  for i, step in enumerate(steps):
    _check_step(step, words[i], first + i, solution, i, i == len(words) - 1)


def test_documented_walks():
  drawn = re.findall(r"solution (\S+) +(\S+[+-])(?= |\n)", last_letter.__doc__)
  assert len(drawn) >= 4
  for solution, text in drawn:
    assert TASK.rationale(MIKE, solution)[0] == text, solution


# The natural form

NATURAL = LastLetter(style="natural")


def test_natural_problems():
  p = NATURAL.problem(np.random.default_rng(0), 3, "train", 7)
  words = re.fullmatch(r'Take the last letters of each word in "(\w+ \w+ \w+)" and concatenate them\.', p.question)[
    1
  ].split()
  assert set(words) <= set(natural.WORDS)
  assert p.answer == "".join(w[-1] for w in words) == NATURAL.extract_answer(p.reference)
  assert re.findall(r'last letter of "(\w+)" is "(\w)"', p.reference) == [(w, w[-1]) for w in words]


@pytest.mark.parametrize(
  ("text", "answer"),
  [
    *((f"The answer is {text}", "eh") for text in ('"EH".', "e-h", "\ne, h", "xy.\nThe answer is eh. That is all.")),
    ("The answer is eh.\n\nQ: Next?\nA: The answer is no.", "eh"),
    ("The answer is e", "e"),
    *((text, None) for text in ("The answer is eh because they end so", "The answer is 12.", "The answer is", "eh")),
  ],
)
def test_answers_are_read_from_free_text(text, answer):
  assert NATURAL.extract_answer(text) == answer


@settings(max_examples=150, deadline=None)
@given(WORDS, st.data())
def test_natural_walk_ends_in_the_verdict_that_the_answer_deserves(words, data):
  problem = NATURAL._natural_problem(words, "train", 0)
  right, at = problem.reference, st.integers(0, len(problem.reference))
  said = st.text("abce", max_size=7) | st.builds(lambda s: problem.answer + s, st.text("ab", max_size=2))
  solution = data.draw(
    st.one_of(
      st.just(right),
      st.builds(lambda s: f"So the answer is {s}.", said),
      st.builds(lambda n: right[:n], at),
      st.builds(lambda i, c: right[:i] + c + right[i + 1 :], at, st.characters()),
      st.builds(lambda i: f"The answer is {problem.answer[:i]}", st.integers(0, len(words))),
    )
  )
  text, verdict = NATURAL.rationale(problem, solution)
  assert verdict is NATURAL.grade(problem, solution).correct
  assert text.endswith("Right." if verdict else "Wrong.") and "Wrong." not in text.removesuffix("Wrong.")


@pytest.mark.parametrize(
  ("said", "end"),
  [
    ("eh", "The words have ended, and so has the answer. Right."),
    ("ei", '2. The last letter of "dlih" is "h"; the answer has "i". Wrong.'),
    ("e", '2. The last letter of "dlih" is "h"; the answer has ended. Wrong.'),
    ("eha", 'The words have ended, but the answer goes on with "a". Wrong.'),
  ],
)
def test_natural_walk_names_the_error(said, end):
  text, verdict = NATURAL.rationale(NATURAL._natural_problem(["mike", "dlih"], "train", 0), f"The answer is {said}.")
  assert (
    text
    == '1. The last letter of "mike" is "e"; the answer has "e". Right.\n'
    + ('2. The last letter of "dlih" is "h"; the answer has "h". Right.\n' if said.startswith("eh") else "")
    + end
  )
  assert verdict is (said == "eh")
