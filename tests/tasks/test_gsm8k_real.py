"""The release has the counts in its description, and our answers agree with it as committed."""

import collections
import json
import pathlib

import pytest

from genrm_jax.tasks.gsm8k import problems
from genrm_jax.tasks.gsm8k.answers import extract_answer, same_answer
from genrm_jax.tasks.gsm8k.released import scan
from genrm_jax.tasks.gsm8k.rows import BadRows, iter_critiques, iter_direct


@pytest.fixture(scope="module")
def released_dir(data_dir):
  if not (data_dir / "genrm-critiques").is_dir():
    pytest.skip(f"no {data_dir / 'genrm-critiques'}; git clone https://github.com/genrm-star/genrm-critiques there")
  return data_dir


@pytest.fixture(scope="module")
def train(released_dir):
  return problems.read_problems(released_dir, "train")


def test_counts_of_the_direct_set(released_dir, train):
  known = {problems.problem_key(p.question) for p in train}
  bad, counts = BadRows(), {True: collections.Counter(), False: collections.Counter()}
  for split, so_far in (("val", [125, 87]), ("train", [113_387, 52_477])):
    for row in iter_direct(released_dir, split, bad):
      counts[row.correct][row.question] += 1
    assert [c.total() for c in counts.values()] == so_far
  assert bad.to_dict() == {"rows": 165_864, "left_out": 0, "files": {}}
  for label, num_problems in ((True, 7399), (False, 6565)):
    per_problem = collections.Counter()
    for question, number in counts[label].items():
      per_problem[problems.problem_key(question)] += number
    assert (len(per_problem), max(per_problem.values())) == (num_problems, 16)
    assert not per_problem.keys() - known


def test_validation_file_of_the_cot_set(released_dir):
  critiques = list(iter_critiques(released_dir, "val", BadRows()))
  assert collections.Counter(r.correct for r in critiques) == {True: 125, False: 134}
  assert all(r.rationale.endswith(" Yes" if r.correct else " No") for r in critiques)
  assert all("Verification:" not in r.solution and extract_answer(r.solution) is not None for r in critiques)


def test_counts_of_the_pool(released_dir, train):
  bad = BadRows()
  found = scan(released_dir, train, (0,), bad)
  assert bad.to_dict() == {"rows": 61_556, "left_out": 0, "files": {}}
  pools = list(found.candidates.values())
  assert len(found.problems) == 1556 and sum(map(len, pools)) == 61_475
  assert (min(map(len, pools)), max(map(len, pools))) == (1, 64)
  assert sum(len({c.correct for c in pool}) == 2 for pool in pools) == 1324
  assert sum(c.correct for pool in pools for c in pool) == 44_836
  # As the committed comparison of answers says.
  answers = {p.id: p.answer for p in found.problems}
  agree = sum(same_answer(c.answer, answers[c.problem_id]) == c.correct for pool in pools for c in pool)
  committed = pathlib.Path(__file__).parents[2] / "results/gsm8k/answers.json"
  compared = json.loads(committed.read_text())["parts"]["raw pool"]
  assert (compared["solutions"], compared["same_label"]) == (61_475, agree)
