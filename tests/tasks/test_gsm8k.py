"""GSM8K as a task: problems from files and TFDS, the release's splits and pools, agreement with the real release."""

import collections
import functools
import gc
import json
import pathlib
import sys

import numpy as np
import pytest
from refusals import refused

from genrm_jax.tasks import base
from genrm_jax.tasks.gsm8k import problems as gsm8k
from genrm_jax.tasks.gsm8k import released
from genrm_jax.tasks.gsm8k.answers import extract_answer, same_answer
from genrm_jax.tasks.gsm8k.rows import BadRows, iter_critiques, iter_direct
from genrm_jax.tasks.gsm8k.task import GSM8K

ROW = {"question": " How many? ", "answer": "Half is 48/2 = <<48/2=24>>24.\nAll is <<1000+24=1024>>1,024.\n#### 1,024"}
SMALL = dict(made_up=24, rounds=(0,), num_train=12, num_val=6, num_eval=6, eval_candidates=4)
TFDS = "tensorflow_datasets.text.gsm8k"


def _write(folder, *rows):
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "train.jsonl").write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))


@pytest.mark.parametrize("inside", ["grade-school-math/grade_school_math/data", "grade_school_math/data", ""])
def test_problems_from_files(inside, tmp_path):
  _write(tmp_path / inside, ROW, ROW)
  first, second = gsm8k.read_problems(tmp_path, "train")
  assert (first.id, second.id, first.split, first.task) == ("gsm8k/train/00000", "gsm8k/train/00001", "train", "gsm8k")
  assert (first.question, first.answer) == ("How many?", "1024")
  assert first.reference == "Half is 48/2 = 24.\nAll is 1,024.\nThe answer is 1024."
  _write(tmp_path / inside, ROW, " ", ROW)
  assert [p.id for p in gsm8k.read_problems(tmp_path, "train")] == ["gsm8k/train/00000", "gsm8k/train/00002"]
  _write(tmp_path / inside, "")
  refused((r"train\.jsonl: no problem in it; take it from a fresh clone", gsm8k.read_problems, tmp_path, "train"))


def test_broken_problem_lines(tmp_path):
  for row, message in (
    *((row, "not JSON") for row in ("{", "[" * 100_000)),
    ("[]", "not a JSON object"),
    ({"question": "\ud83d", "answer": "#### 1"}, "half of a surrogate pair in a text"),
    ({"answer": "#### 1"}, 'field "question" is missing'),
    ({"question": "q", "answer": 1}, 'field "answer" is not text'),
    *(({"question": "q", "answer": text}, 'field "answer" does not end in') for text in ("1", "1 #### ")),
  ):
    _write(tmp_path, ROW, row)
    refused((rf"train\.jsonl:2: {message}", gsm8k.read_problems, tmp_path, "train"))
  refused((r"test\.jsonl; git clone", gsm8k.read_problems, tmp_path, "test"))


def test_problems_from_tfds(data_dir, tmp_path, monkeypatch):
  refused(
    ("no split 'val'", gsm8k.read_problems, tmp_path, "val"),
    ("no split 'val'", gsm8k.read_problems_tfds, "val"),
    ("'csv'; it is files or tfds", lambda: GSM8K(problems="csv")),
  )
  with monkeypatch.context() as patch:
    patch.setitem(sys.modules, TFDS, None)
    refused((r"pip install 'genrm-jax\[tfds\]'", gsm8k.read_problems_tfds, "train"))
  # Other packages bring TFDS without what it needs here.
  for package in ("importlib_resources", "array_record", "tensorflow_datasets"):
    tfds = pytest.importorskip(package, reason="needs genrm-jax[tfds]")
  without = "tensorflow" not in sys.modules  # another test may have brought it
  files = data_dir / "grade-school-math/grade_school_math/data"

  def local(_, urls):  # the dataset's own builder, with files instead of downloads
    return {name: files / f"{name.removesuffix('_socratic')}.jsonl" for name in urls}

  monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", local)
  problems = gsm8k.read_problems_tfds("test", tmp_path)
  content = {(p.question, p.answer, p.reference) for p in problems}
  assert content == {(p.question, p.answer, p.reference) for p in gsm8k.read_problems(data_dir, "test")}
  assert problems[0].id == "gsm8k/test/tfds-00000" and ("tensorflow" not in sys.modules) == without


def test_splits_of_the_release_are_disjoint_and_held_out_candidates_from_the_pool_alone():
  release = GSM8K(**SMALL).released(0)
  ids = {split: {p.id for p in problems} for split, problems in release.problems.items()}
  assert {split: len(found) for split, found in ids.items()} == {"train": 12, "val": 6, "eval": 6}
  assert len(set.union(*ids.values())) == 24
  assert {split: {c.problem_id for c in pool} for split, pool in release.candidates.items()} == ids
  gc.collect()  # made-up data lives until it has been read
  rationales = list(release.rationales)
  assert {r.problem_id for r in rationales} == set.union(*ids.values()) and len(rationales) == 24 * 4
  assert release.left_out() == {"rows": 24 * 6, "left_out": 0, "files": {}}
  # Held-out candidates are drawn from the pool alone: the direct set was selected by label.
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
  task = GSM8K(**SMALL | {"num_train": 0})
  found = {split: base.checked_problems(task, split, np.random.default_rng(0)) for split in task.splits}
  ids = {split: [p.id for p in problems] for split, problems in found.items()}
  assert [len(i) for i in ids.values()] == [18, 6, 6] and len({i for found in ids.values() for i in found}) == 30
  assert all(p.id.startswith("gsm8k/test/") for p in found["eval"])
  other = task.problems("train", np.random.default_rng(1))
  assert {p.id for p in other} == set(ids["train"]) and [p.id for p in other] != ids["train"]
  problem, folder = found["eval"][0], pathlib.Path(task.data_dir)
  assert task.grade(problem, f"The answer is ${problem.answer}.00") == base.Grade(problem.answer, True)
  assert task.grade(problem, "No idea") == base.Grade(None, False)
  assert folder.is_dir()
  del task
  gc.collect()
  assert not folder.exists(), "made-up data goes with its task"


# The real release has the counts in its description, and our answers agree with it as committed.


@pytest.fixture(scope="module")
def train(data_dir):
  return gsm8k.read_problems(data_dir, "train")


@pytest.fixture
def release_dir(data_dir):
  if not (data_dir / "genrm-critiques").is_dir():
    pytest.skip(f"no {data_dir / 'genrm-critiques'}; git clone https://github.com/genrm-star/genrm-critiques there")
  return data_dir


def test_real_problems(data_dir, train):
  test = gsm8k.read_problems(data_dir, "test")
  assert (len(train), len(test)) == (7473, 1319)
  for problem in train + test:
    assert int(problem.answer) is not None and "<<" not in problem.reference and "####" not in problem.reference
    assert extract_answer(problem.reference) == problem.answer
  assert len({gsm8k.problem_key(p.question) for p in train + test}) == 7473 + 1319


def test_counts_of_the_filtered_sets(release_dir, train):
  bad, counts = BadRows(), {True: collections.Counter(), False: collections.Counter()}
  key = functools.cache(gsm8k.problem_key)
  for split, so_far in (("val", [125, 87]), ("train", [113_387, 52_477])):
    for row in iter_direct(release_dir, split, bad):
      counts[row.correct][key(row.question)] += 1
    assert [c.total() for c in counts.values()] == so_far
  assert bad.to_dict() == {"rows": 165_864, "left_out": 0, "files": {}}
  assert [(len(c), max(c.values())) for c in counts.values()] == [(7399, 16), (6565, 16)]
  assert not set.union(*map(set, counts.values())) - {gsm8k.problem_key(p.question) for p in train}
  critiques = list(iter_critiques(release_dir, "val", BadRows()))
  assert collections.Counter(r.correct for r in critiques) == {True: 125, False: 134}
  assert all(r.rationale.endswith(" Yes" if r.correct else " No") for r in critiques)
  assert all("Verification:" not in r.solution and extract_answer(r.solution) is not None for r in critiques)


def test_counts_of_the_pool(release_dir, train):
  bad = BadRows()
  found = released.scan(release_dir, train, (0,), bad)
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
