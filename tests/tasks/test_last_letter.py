"""The compact walk is true at every step and ends in the right verdict for any solution."""

import re

from edited_texts import edited
from hypothesis import example, given, settings
from hypothesis import strategies as st

from genrm_jax.records import Problem
from genrm_jax.tasks import last_letter
from genrm_jax.tasks.last_letter import PLACES, LastLetter, read_list, write_list, write_placed
from genrm_jax.text.tokenizer import CharTokenizer

TASK = LastLetter()
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORD = st.text(LETTERS, min_size=1, max_size=6)


def _problem(words, first):
  letters = [w[-1] for w in words]
  question, reference = write_list(words, first), write_placed(letters, first)
  return Problem("p", TASK.name, "train", question, "".join(letters), reference)


MIKE = _problem(["mike", "dlih"], 3)


@st.composite
def _drawn(draw):
  problem = _problem(draw(st.lists(WORD, min_size=1, max_size=6)), draw(st.integers(0, 4)))
  others = st.builds(write_placed, st.lists(WORD, max_size=6), st.integers(0, 4))
  repeated = st.integers(0, 3).map(lambda n: problem.reference * n)
  return problem, draw(edited(problem.reference, characters="abczABCDEFJ09;", texts=others | repeated))


STEP = re.compile(r"([0-9])([a-z]+)([:;])([a-z])([A-J])([a-z]?)([A-J;]?)([+-])")


def _steps(text, problem, solution):
  """The steps of a walk, each checked as a reader with nothing but question and solution would."""
  words, first = read_list(problem.question)
  steps = STEP.findall(text)
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
@given(_drawn())
@example((MIKE, "DeEh;Fx;"))
@example((MIKE, "DexxEh;"))
@example((_problem(["mike", "dlih"], 8), "IeJhKa;"))
@example((_problem(["mike"], 9), "Je"))
def test_walk_ends_in_the_verdict_that_the_solution_deserves(drawn):
  problem, solution = drawn
  words, first = read_list(problem.question)
  text, verdict = TASK.rationale(problem, solution)
  assert verdict is (solution == problem.reference)
  # The answer does not say where its places begin.
  assert verdict is TASK.grade(problem, solution).correct or solution[:1] != PLACES[first]
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


def test_documented_walks():
  drawn = re.findall(r"solution (\S+) +(\S+[+-])(?= |\n)", last_letter.__doc__)
  assert len(drawn) >= 4
  for solution, text in drawn:
    assert TASK.rationale(MIKE, solution)[0] == text, solution
