"""What the list tasks share: options, splits, problems, numbered lists, renumbering, worked examples, free text."""

import re
from functools import partial

import numpy as np
import pytest
from edited_texts import edited
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused

from genrm_jax.records import Candidate, Problem
from genrm_jax.tasks import base, natural, word_sorting
from genrm_jax.tasks.compact import random_word, read_list, renumber, write_list, write_placed
from genrm_jax.tasks.last_letter import LastLetter
from genrm_jax.tasks.word_sorting import WordSorting, listed_words

TASKS = (LastLetter, WordSorting)
SHORT = {"num_problems": 30, "min_words": 1, "max_words": 3}
WORD = st.text("abcdefghijklmnopqrstuvwxyz", min_size=1, max_size=6)


def _right_answer(make, words):
  return "".join(w[-1] for w in words) if make is LastLetter else " ".join(sorted(words))


def _words(make, question):
  if make is LastLetter:
    return re.search('"(.+?)"', question)[1].split()
  return listed_words(Problem("p", make.name, "", question, ""))


@pytest.mark.parametrize("make", TASKS)
@pytest.mark.parametrize("style", ["compact", "natural"])
def test_problems_of_a_split(make, style):
  task = make(style=style, train=SHORT, eval=SHORT | {"min_words": 3})
  assert task.splits == ("train", "eval")
  first, again, other = (base.checked_problems(task, "train", np.random.default_rng(seed)) for seed in (0, 0, 1))
  assert first == again and {p.question for p in first}.isdisjoint(p.question for p in other)
  assert [p.id for p in first] == [f"{task.name}/train/{i:05d}" for i in range(30)]
  assert {(p.task, p.split) for p in first} == {(task.name, "train")}
  for split, lengths in (("train", {1, 2, 3}), ("eval", {3})):
    problems = task.problems(split, np.random.default_rng(0))
    assert all(task.grade(p, p.reference) == base.Grade(p.answer, True) for p in problems)
    lists = [read_list(p.question)[0] if style == "compact" else _words(make, p.question) for p in problems]
    assert set(map(len, lists)) == lengths
    if style == "natural":
      assert {w for words in lists for w in words} <= set(natural.WORDS)
      assert [p.answer for p in problems] == [_right_answer(make, words) for words in lists]


@pytest.mark.parametrize("make", TASKS)
@pytest.mark.parametrize("num_words", [1, 2, 5, 10])
def test_compact_problems_have_their_words_and_every_first_number(make, num_words):
  rng, firsts = np.random.default_rng(num_words), set()
  for i in range(60):
    p = make().problem(rng, num_words, "val", i)
    words, first = read_list(p.question)
    assert len(words) == num_words and all(3 <= len(w) <= 5 for w in words)
    if make is LastLetter:
      right = (_right_answer(make, words), write_placed([w[-1] for w in words], first))
    else:
      placed = [f"{n}{w}" for n, w in sorted(enumerate(words, first), key=lambda item: item[1])]
      right = (write_placed(placed, first)[:-1], write_placed(placed, first)[:-1] + ".")
      assert len(set(words)) == num_words
    assert (p.answer, p.reference) == right
    firsts.add(first)
  assert firsts == set(range(11 - num_words))


def test_words_lists_and_repeated_questions():
  class Few(LastLetter):  # draws from 12 problems of each length
    def problem(self, rng, num_words, split, index):
      return super().problem(np.random.default_rng(int(rng.integers(12))), num_words, split, index)

  settings = {"num_problems": 12, "min_words": 2, "max_words": 2}
  assert len({p.question for p in Few(val=settings).problems("val", np.random.default_rng(0))}) == 12
  more = Few(val=settings | {"num_problems": 13})
  refused(("only 12 of 13 problems of split val", more.problems, "val", np.random.default_rng(0)))
  words = [random_word(np.random.default_rng(i), 2, 4) for i in range(300)]
  assert {len(w) for w in words} == {2, 3, 4} and set("".join(words)) == set("abcdefghijklmnopqrstuvwxyz")
  assert len(natural.WORDS) == len(set(natural.WORDS)) > 500
  assert all(re.fullmatch("[a-z]{3,}", w) for w in natural.WORDS)
  assert write_list(["a"] * 10, 0) and write_list(["a"], 9) and write_placed(["e", "h"], 3) == "DeEh;"
  for num_items, first in ((2, 9), (1, -1), (11, 0)):
    refused((f"a list of {num_items} items from number {first} ", write_list, ["a"] * num_items, first))
  texts = ("", "3mike", "mike;", "3mike;4dlih;", "3;", "3Mike;", "3mike; ", "12mike;", "3mike;\n", "3mike5dlih;")
  refused(*(("not a numbered list", read_list, text) for text in (*texts, "٣mike;")))


def test_wrong_options():
  for options, said in (
    ({"style": "latin"}, "unknown style 'latin'"),
    ({"style": "natural", "index_shift": False}, ".*index_shift"),
    ({"walk": {"backwards": True}}, "unknown option 'backwards'"),
    ({"train": {"num_problems": 3}}, "train sets num_problems; it sets num_problems, min_words"),
    ({"train": SHORT | {"bbh": "DIR"}}, "train sets .*bbh; it sets"),
    ({"train": SHORT | {"min_words": 4}}, "train asks for 30 problems of 4 to 3 words"),
    ({"train": SHORT | {"num_problems": 0}}, "train asks for 0 problems"),
  ):
    refused(*((f"task {make.name}: {said}", partial(make, **options)) for make in TASKS))


@pytest.mark.parametrize("make", TASKS)
def test_without_index_shift_training_lists_start_at_0(make):
  splits = {split: SHORT for split in ("train", "val", "eval")}
  task, shifted = make(index_shift=False, **splits), make(**splits)
  for split in splits:
    problems, as_drawn = (t.problems(split, np.random.default_rng(0)) for t in (task, shifted))
    assert problems == (as_drawn if split == "eval" else renumber(as_drawn, [])[0])
    assert ({read_list(p.question)[1] for p in problems} == {0}) is (split != "eval")


def _candidate(task, problem, text, index=0):
  grade = task.grade(problem, text)
  return Candidate(problem.id, index, text, grade.answer, grade.correct, "generator/4")


def _shift(text, by):
  for counter in ("0123456789", "ABCDEFGHIJ"):
    text = re.sub(f"[{counter}]", lambda found, c=counter: c[(c.index(found[0]) + by) % 10], text)
  return text


@pytest.mark.parametrize("make", TASKS)
@settings(max_examples=120, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5), st.data())
def test_renumbered_lists_keep_walk_verdict_and_label(make, seed, num_words, data):
  task = make()
  problem = task.problem(np.random.default_rng(seed), num_words, "train", 0)
  words, first = read_list(problem.question)
  shifted = st.integers(0, 9).map(lambda by: _shift(problem.reference, by))
  solution = data.draw(edited(problem.reference, characters="abc0123456789ABCJ;,.", texts=shifted))
  other = task.problem(np.random.default_rng(seed + 1), 3, "train", 1)  # has a first number of its own
  pool = [_candidate(task, other, other.reference), _candidate(task, problem, solution, index=3)]
  (moved, with_other), (of_other, got) = renumber([problem, other], pool)
  assert of_other.text == with_other.reference == _shift(other.reference, -read_list(other.question)[1])
  candidate = pool[1]
  assert read_list(moved.question) == (words, 0) and moved.reference == _shift(problem.reference, -first)
  assert _candidate(task, moved, moved.reference).correct
  assert (got.index, got.correct, got.source) == (3, candidate.correct, "generator/4")
  (text, verdict), (walk, same) = task.rationale(problem, solution), task.rationale(moved, got.text)
  assert same is verdict
  # Where a list ends with number 9, Last Letter's walk has no number for a further item; from 0 on it has one.
  if make is WordSorting or first + num_words < 10:
    assert walk == _shift(text, -first)


ANSWERS = {
  (LastLetter, "compact"): {
    **{"eh": ["DeEh;"], "a": ["Aa;"], "ab": ["IaJb;"]},
    None: [
      "",
      ";",
      *["DeEh", "DeEh;;", "DeEh; ", "DeEh;\n", " DeEh;", "٣e;", "²e;", "DeFh;", "EeDh;", "JaAb;", "DEEh;"],
    ],
  },
  (WordSorting, "compact"): {
    **{text[:-1]: [text] for text in ("D4dlihE5makeF3mike.", "A4dlihA4dlihJ9a.", "A0a.")},
    None: [
      *("", ".", "D3dlih", "D3dlih.\n", "D3dlih..", "D3dlih;", ",D3dlih.", "D3dlih,E4make.", "D3dlihE4.", "D34dlih."),
      *("D3dlih E4make.", "D3dlih4make.", "3dlih.", "DE3dlih.", "D3Dlih.", "D٣dlih.", "D3mik_.", "K3dlih."),
    ],
  },
  (LastLetter, "natural"): {
    "eh": [
      *(f"The answer is {text}" for text in ('"EH".', "e-h", "\ne, h", "xy.\nThe answer is eh. That is all.")),
      "The answer is eh.\n\nQ: Next?\nA: The answer is no.",
      *("The answer is eh<end_of_turn>", "The answer is eh.<|im_end|>\n<|im_start|>user\nThe answer is no"),
      *(f"The answer is {end}" for end in ("**eh**<eos>", '"eh".<|eot_id|>', "e + h = eh.", "eh<｜end▁of▁sentence｜>")),
      *(rf"So {box}." for box in (r"\boxed{eh}", r"$\boxed{\text{eh}}$", r"\[\boxed{\text{e}\,\text{h}}\]")),
      *("The answer is xy, no: \\boxed{eh}", "The answer is:\n\ne\nh", "The answer is:\n- e\n- h\n\nEach is last."),
    ],
    "e": ["The answer is e"],
    None: ["The answer is eh because they end so", "The answer is 12.", "The answer is", "eh"],
  },
  (WordSorting, "natural"): {
    "bar foo": [
      *(f"the answer is {text}" for text in ("**Bar Foo**", '"bar foo".', "1. bar 2. foo", ": bar, foo")),
      "The answer is bar foo.\n\nQ: Sort these: List: b a\nA: The answer is a b.",
      "The answer is foo bar. No, wait.\nSo the answer is bar foo.",
      *(
        f"The answer is:\n{items}" for items in ("1. bar\n2. foo", "* bar\n\n* foo\n\nDone, all.", "bar\nfoo\n\nDone.")
      ),
      *(f"The answer is as follows:\n\n{items}" for items in ("1) bar.\n2) foo.", "```\nbar\nfoo\n```", "bar, foo")),
      *(rf"So \boxed{{{words}}}" for words in ("bar foo", r"\text{bar, foo}", "\n\\text{bar} \\\\ \\text{foo}\n")),
      *(f"The answer is {words}" for words in ("bar foo<end_of_turn>", "bar, and foo.", "_bar foo_", "bar foo. So.")),
    ],
    "able and zebra": ["The answer is able, and, zebra."],
    "it&t o'connell shouldn't": ["The answer is\n\nit&t o'connell shouldn't"],
    None: ["bar foo", "The answer is ...", "Q: the answer is bar", ""],
  },
}


@pytest.mark.parametrize(("make", "style"), ANSWERS)
def test_answers_are_read(make, style):
  for answer, texts in ANSWERS[make, style].items():
    assert [make(style=style).extract_answer(text) for text in texts] == [answer] * len(texts), texts


@pytest.mark.parametrize("make", TASKS)
@settings(max_examples=120, deadline=None)
@given(st.lists(WORD | st.text("abc", min_size=1, max_size=3), min_size=1, max_size=5), st.data())
def test_natural_walk_ends_in_the_verdict_that_the_answer_deserves(make, words, data):
  task = make(style="natural")
  problem = task._natural_problem(words, *(("train", 0) if make is LastLetter else ("p", "train")))
  parts = st.permutations(problem.answer.split()) | st.lists(st.sampled_from(words) | WORD, max_size=6)
  said = parts.map(" ".join) | st.text("abce", max_size=7) | edited(problem.answer, characters="ab ")
  solution = data.draw(edited(problem.reference, texts=said.map(lambda answer: f"So the answer is {answer}.")))
  text, verdict = task.rationale(problem, solution)
  assert verdict is task.grade(problem, solution).correct
  assert text.endswith("Wrong.") is not verdict and "Wrong." not in text.removesuffix("Wrong.")
  # The walk names the words of the problem only, those of the answer, and letters.
  named = set(re.findall(r"^(?:\d\. )?([a-z]+)[:,]|, ([a-z]+):|after ([a-z]+)\.", text, re.MULTILINE))
  assert {name for names in named for name in names if name} <= {
    *words,
    *(task.extract_answer(solution) or "").split(),
  }
  # An edited solution is wrong for as long as its text differs from the reference in one thing.
  edit = task.edited(problem, np.random.default_rng(data.draw(st.integers(0, 99))))
  assert not task.grade(problem, edit).correct and not task.rationale(problem, edit)[1]


def test_natural_walks_spell_what_they_compare():
  words = ["moon", "lamp"]
  for task, answer, walk in (
    (LastLetter, "np", ["Answer: 1 n, 2 p.", *_SPELLED, "No more words, and no more letters. Right."]),
    (LastLetter, "npe", ["Answer: 1 n, 2 p, 3 e.", *_SPELLED, "No more words, but answer 3 e. Wrong."]),
    (LastLetter, "no", ["Answer: 1 n, 2 o.", _SPELLED[0], "2. lamp: l a m p, so p. Answer 2 o. Wrong."]),
    (LastLetter, "n", ["Answer: 1 n.", _SPELLED[0], "2. lamp: l a m p, so p. The answer has ended. Wrong."]),
    (
      WordSorting,
      "lamp moon",
      [*_FOUND, "No other words. Right.", "lamp, moon: l m. Right.", "All words in order. Right."],
    ),
    (WordSorting, "lamp moon moo", [*_FOUND, "moo: one word too many. Wrong."]),
    (WordSorting, "lamp mon", ["moon: not in the answer. Wrong."]),
  ):
    made = task(style="natural")
    problem = made._natural_problem(words, *(("train", 0) if task is LastLetter else ("p", "train")))
    assert made.rationale(problem, f"The answer is {answer}.")[0].split("\n") == walk
  compared = {
    "pea pear": "p p, e e, a a, pea ends",
    "pear peach": "p p, e e, a a, r c",
    "pea pea": "p p, e e, a a, pea ends",
  }
  assert {pair: word_sorting._compared(*pair.split()) for pair in compared} == compared


_SPELLED = ["1. moon: m o o n, so n. Answer 1 n. Right.", "2. lamp: l a m p, so p. Answer 2 p. Right."]
_FOUND = ["moon: after lamp. Right.", "lamp: first. Right."]


@pytest.mark.parametrize("make", TASKS)
def test_worked_examples_follow_the_template_and_are_right(make):
  task = make(style="natural")
  parts = task.few_shot("Q: {question}\nA: ").split("\n\n")
  assert parts.pop() == "" and len(parts) == 3
  for part in parts:
    question, _, solution = part.removeprefix("Q: ").partition("\nA: ")
    problem = Problem("p", task.name, "", question, "")
    assert task.grade(problem, solution).answer == _right_answer(make, _words(make, question))
    assert task.rationale(problem, solution)[1]
  compact = Problem("p", make.name, "eval", "0a1b;", "ab")
  refused(
    ('style "natural" only', make().few_shot, "{question}"),
    (r"p: no words (in double quotes|after)", task.rationale, compact, "The answer is a b"),
  )
