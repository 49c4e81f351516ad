"""GSM8K as a task: splits of the release, draws from the pools, a user's own solutions, made-up data."""

import gc
import pathlib

import numpy as np
import pytest

from genrm_jax.runtime.errors import UserError
from genrm_jax.tasks import base
from genrm_jax.tasks.gsm8k import released, sample
from genrm_jax.tasks.gsm8k.task import GSM8K

SMALL = dict(made_up=24, rounds=(0,), num_train=12, num_val=6, num_eval=6, eval_candidates=4)


@pytest.fixture(scope="module")
def release():
  return GSM8K(**SMALL).released(0)


def test_splits_of_the_release_are_disjoint_and_of_the_configured_sizes(release):
  ids = {split: {p.id for p in problems} for split, problems in release.problems.items()}
  assert {split: len(found) for split, found in ids.items()} == {"train": 12, "val": 6, "eval": 6}
  assert len(set.union(*ids.values())) == 24
  assert {split: {c.problem_id for c in pool} for split, pool in release.candidates.items()} == ids
  gc.collect()  # made-up data lives until it has been read
  rationales = list(release.rationales)
  assert {r.problem_id for r in rationales} == set.union(*ids.values()) and len(rationales) == 24 * 4
  assert release.left_out() == {"rows": 24 * 6, "left_out": 0, "files": {}}
  everything = GSM8K(**SMALL | {"num_train": 0, "candidates": "own.jsonl"}).released(0)
  assert "eval" not in everything.candidates and {p.split for p in everything.problems["eval"]} == {"test"}
  assert len(everything.problems["train"]) == 24 - 6, "no problem of the pool is held out in vain"


def test_held_out_candidates_are_drawn_from_the_pool_alone():
  """The direct set was selected by label, so it is for training only."""
  drawn = []
  for seed, num in ((0, 3), (0, 3), (1, 3), (0, 9)):
    got = GSM8K(**SMALL | {"eval_candidates": num}).released(seed)
    drawn.append({(c.problem_id, c.index) for c in got.candidates["eval"]})
    assert {c.source for split in ("val", "eval") for c in got.candidates[split]} == {released.SOURCE}
    assert {c.source for c in got.candidates["train"]} == {released.SOURCE, released.DIRECT_SOURCE}
    assert len(drawn[-1]) == 6 * min(num, 4)
  assert drawn[0] == drawn[1] != drawn[2]
  of_all = {problem: {i for p, i in drawn[3] if p == problem} for problem, _ in drawn[3]}
  left_out = {min(of_all[p] - {i for q, i in drawn[0] if q == p}) for p in of_all}
  assert len(left_out) > 1, "each problem has its own draw"


def test_its_own_problems_are_disjoint_and_in_random_order():
  task = GSM8K(**SMALL | {"num_train": 0})
  assert set(task.splits) <= set(base.SPLITS)
  found = {split: base.checked_problems(task, split, np.random.default_rng(0)) for split in task.splits}
  ids = {split: [p.id for p in problems] for split, problems in found.items()}
  assert [len(i) for i in ids.values()] == [18, 6, 6] and len({i for found in ids.values() for i in found}) == 30
  assert all(p.id.startswith("gsm8k/test/") for p in found["eval"])
  other = task.problems("train", np.random.default_rng(1))
  assert {p.id for p in other} == set(ids["train"]) and [p.id for p in other] != ids["train"]
  problem = found["eval"][0]
  assert task.grade(problem, f"The answer is ${problem.answer}.00") == base.Grade(problem.answer, True)
  assert task.grade(problem, "No idea") == base.Grade(None, False)


def test_made_up_data_is_removed_with_the_task():
  task = GSM8K(**SMALL)
  folder = pathlib.Path(task.data_dir)
  assert folder.is_dir()
  del task
  gc.collect()
  assert not folder.exists()


def test_missing_data_and_wrong_options(tmp_path):
  with pytest.raises(UserError, match=r"grade-school-math and genrm-critiques.*data_dir=DIR"):
    GSM8K().released(0)
  with pytest.raises(UserError, match="'csv'; it is files or tfds"):
    GSM8K(problems="csv")
  folder = str(sample.write(tmp_path, 5, 0))
  with pytest.raises(UserError, match=r"asks for 12 \+ 6 \+ 6 problems .* hold 5"):
    GSM8K(**SMALL | {"made_up": 0, "data_dir": folder}).released(0)
