"""Lists are read as written; the program's walk ends in the right verdict for any solution; free text is read."""

import re

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from genrm_jax.records import Problem
from genrm_jax.runtime.errors import UserError
from genrm_jax.tasks import last_letter, natural
from genrm_jax.tasks.last_letter import PLACES, LastLetter, random_word, read_list, write_list, write_placed
from genrm_jax.text.tokenizer import CharTokenizer

TASK = LastLetter()
WORD = st.text("abcdefghijklmnopqrstuvwxyz", min_size=1, max_size=6)
WORDS = st.lists(WORD, min_size=1, max_size=6)


def _problem(words, first):
  letters = [w[-1] for w in words]
  question, reference = write_list(words, first), write_placed(letters, first)
  return Problem("p", TASK.name, "train", question, "".join(letters), reference)


@settings(max_examples=100, deadline=None)
@given(WORDS, st.integers(0, 4))
def test_list_round_trip(words, first):
  text = write_list(words, first)
  assert read_list(text) == (words, first)
  assert text == "".join(f"{first + i}{w}" for i, w in enumerate(words)) + ";"


def test_documented_lists():
  assert write_list(["mike", "dlih"], 3) == "3mike4dlih;" and write_placed(["e", "h"], 3) == "DeEh;"
  assert write_list([], 0) == ";" and read_list(";") == ([], 0)


@pytest.mark.parametrize(("items", "first"), [(["a", "b"], 9), (["a"], -1), (["a"] * 11, 0)])
def test_numbers_have_one_digit(items, first):
  assert write_list(["a"] * 10, 0) and write_list(["a"], 9)
  with pytest.raises(UserError, match=rf"a list of {len(items)} items from number {first} "):
    write_list(items, first)


def test_problems_have_ten_words_at_most():
  with pytest.raises(UserError, match="a list of 11 items has no numbers of one digit; ask for 10 words"):
    TASK.problem(np.random.default_rng(0), 11, "val", 0)


@pytest.mark.parametrize(
  "text",
  ["", "3mike", "mike;", "3mike;4dlih;", "3;", "3Mike;", "3mike; ", "12mike;", "3mike;\n", "3mike5dlih;", "٣mike;"],
)
def test_what_is_no_list_is_refused(text):
  with pytest.raises(UserError, match="not a numbered list"):
    read_list(text)


@pytest.mark.parametrize("num_words", range(1, 11))
def test_problems_have_their_words_and_answer(num_words):
  rng = np.random.default_rng(num_words)
  firsts = set()
  for i in range(60):
    p = TASK.problem(rng, num_words, "val", i)
    words, first = read_list(p.question)
    assert len(words) == num_words and all(3 <= len(w) <= 5 for w in words)
    assert p.answer == "".join(w[-1] for w in words)
    assert p.reference == write_placed(list(p.answer), first)
    assert TASK.same_answer(TASK.extract_answer(p.reference), p.answer)
    assert (p.id, p.task, p.split) == (f"last_letter/val/{i:05d}", "last_letter", "val")
    firsts.add(first)
  assert firsts == set(range(11 - num_words))


def test_words_have_all_lengths_and_letters():
  words = [random_word(np.random.default_rng(i), 2, 4) for i in range(300)]
  assert {len(w) for w in words} == {2, 3, 4}
  assert set("".join(words)) == set("abcdefghijklmnopqrstuvwxyz")


@pytest.mark.parametrize(
  ("text", "answer"),
  [
    ("DeEh;", "eh"),
    ("Aa;", "a"),
    ("IaJb;", "ab"),
    ("", None),
    (";", None),
    ("DeEh", None),
    ("DeEh;;", None),
    ("DeEh; ", None),
    ("DeEh;\n", None),
    ("DeFh;", None),
    ("EeDh;", None),
    ("JaAb;", None),
    ("DeeEh;", None),
    ("DEEh;", None),
    (" DeEh;", None),
    ("٣e;", None),
    ("²e;", None),
  ],
)
def test_answers_are_read_from_well_formed_solutions_only(text, answer):
  assert TASK.extract_answer(text) == answer


def test_no_answer_is_the_same_as_nothing():
  assert TASK.same_answer("eh", "eh")
  assert not TASK.same_answer("eh", "he")
  assert not TASK.same_answer(None, None)
  assert not TASK.same_answer(None, "eh") and not TASK.same_answer("eh", None)


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
def _asked(draw):
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


@settings(max_examples=250, deadline=None)
@given(_asked())
@example((MIKE, ""))
@example((MIKE, "DeEh"))
@example((MIKE, "DeEh;;"))
@example((MIKE, "DeEh;Fx;"))
@example((MIKE, "DeEhFx;"))
@example((MIKE, "DeEhF;"))
@example((MIKE, ";"))
@example((MIKE, "٣eEh;"))
@example((MIKE, "ADeEh;"))
@example((MIKE, "DexxEh;"))
@example((MIKE, "DeAEh;"))
@example((_problem(["mike", "dlih"], 8), "IeJhKa;"))
@example((_problem(["mike"], 9), "Je"))
def test_walk_ends_in_the_verdict_that_the_solution_deserves(asked):
  problem, solution = asked
  words, first = read_list(problem.question)
  text, verdict = TASK.rationale(problem, solution)
  assert verdict is (solution == problem.reference)
  assert verdict is TASK.same_answer(TASK.extract_answer(solution), problem.answer) or first != _first_of(solution)
  steps = STEP.findall(text)
  assert "".join(map("".join, steps)) == text
  for i, step in enumerate(steps):
    _check_step(step, words[i], first + i, solution, i, i == len(words) - 1)
  # A walk that goes wrong stops there; only one that is right to the last word comes to the end of the list.
  assert "-" not in text[:-1] and text[-1] == ("+" if verdict else "-")
  assert verdict is (len(steps) == len(words) and text[-1] == "+")
  CharTokenizer().encode(text)


def _first_of(solution):
  return PLACES.find(solution[:1]) if solution else None


@settings(max_examples=150, deadline=None)
@given(_asked())
@example((MIKE, "DeEh;"))
@example((MIKE, "DaEh;"))
@example((MIKE, "DeEhFx;"))
def test_other_walks_say_the_same_in_another_order_or_to_the_end(asked):
  problem, solution = asked
  words, first = read_list(problem.question)
  text, verdict = TASK.rationale(problem, solution)
  given_first, same = LastLetter(true_first=False).rationale(problem, solution)
  assert same is verdict
  assert given_first == re.sub(r"([:;])([a-z])([A-J][a-z]?)(?=[A-J;]?[+-])", r"\1\3\2", text)
  to_the_end, same = LastLetter(stop=False).rationale(problem, solution)
  assert same is verdict and to_the_end.startswith(text) and ("-" not in to_the_end) is verdict
  steps = STEP.findall(to_the_end)
  assert "".join(map("".join, steps)) == to_the_end and len(steps) == len(words)
  for i, step in enumerate(steps):
    _check_step(step, words[i], first + i, solution, i, i == len(words) - 1)


def test_a_walk_that_does_not_stop():
  assert LastLetter(stop=False).rationale(MIKE, "DaEh;") == ("3mike:eDa-4dlih;hEh;+", False)


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
  assert (p.id, p.task) == ("last_letter/train/00007", "last_letter")


@pytest.mark.parametrize(
  ("text", "answer"),
  [
    ("So the answer is eh.", "eh"),
    ('The answer is "EH".', "eh"),
    ("the answer is: e-h", "eh"),
    ("The answer is\ne, h", "eh"),
    ("The answer is xy. No.\nThe answer is eh. That is all.", "eh"),
    ("The answer is eh.\n\nQ: Next?\nA: The answer is no.", "eh"),
    ("The answer is e", "e"),
    ("The answer is eh because they end so", None),
    ("The answer is 12.", None),
    ("The answer is", None),
    ("eh", None),
  ],
)
def test_answers_are_read_from_free_text(text, answer):
  assert NATURAL.extract_answer(text) == answer


@pytest.mark.parametrize(
  ("text", "solution"),
  [
    ("The answer is eh.\n\nQ: Next?\nA: e", "The answer is eh."),
    ("The answer is eh. Q: what?\n", "The answer is eh. Q: what?"),
    ("Q: Next?", ""),
  ],
)
def test_a_solution_ends_where_a_base_model_asks_on(text, solution):
  assert natural.first_solution(text) == solution


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
  assert verdict is NATURAL.same_answer(NATURAL.extract_answer(solution), problem.answer)
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


def test_worked_examples_stand_in_the_form_of_the_prompt():
  parts = NATURAL.few_shot("Q: {question}\nA: ").split("\n\n")
  assert parts.pop() == "" and len(parts) == 3
  for part in parts:
    words = re.search('"(.+?)"', part)[1].split()
    assert part.startswith('Q: Take the last letters of each word in "')
    assert NATURAL.extract_answer(part.partition("\nA: ")[2]) == "".join(w[-1] for w in words)
  with pytest.raises(UserError, match='worked examples in the style "natural" only'):
    TASK.few_shot("{question}")


def test_unknown_styles_and_questions_are_refused():
  with pytest.raises(UserError, match="unknown task style 'latin'; there are: compact, natural"):
    LastLetter(style="latin")
  with pytest.raises(UserError, match="p: no words in double quotes"):
    NATURAL.rationale(MIKE, "The answer is eh")
