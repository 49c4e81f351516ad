"""The released data is streamed; bad rows are counted, bad files are errors; records are as documented."""

import gzip
import itertools
import json
import zipfile

import pytest
from refusals import refused

from genrm_jax.tasks.gsm8k import problems
from genrm_jax.tasks.gsm8k import rows as gsm8k_rows
from genrm_jax.tasks.gsm8k.released import iter_rationales, scan, with_direct_set
from genrm_jax.tasks.gsm8k.rows import BadRows, iter_critiques, iter_direct, iter_pool
from genrm_jax.text.prompts import RELEASED

INSTRUCTION = f'Solve ... When asked "{RELEASED.verdict_question}", respond.'
ASK, ASK_COT = RELEASED.verdict_question, RELEASED.verify_cot.lstrip()


def _inputs(question, solution, ask=ASK):
  return f"{INSTRUCTION}\n\nQ: {question}\nA: Let's think step by step.\n{solution}\n{ask}"


def _lines(rows):
  return "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows)


def _write_zip(path, rows):
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
    archive.writestr("__MACOSX/._x.jsonl", "")
    archive.writestr("rows.jsonl", _lines(rows))


def _write_pool(path, rows):
  path.write_bytes(gzip.compress(_lines(rows).encode()))


def _pool_row(question, solution_id, solution, correct, rationale):
  row = {"question": question, "model_output": solution, "model_output_id": solution_id, "target": "1"}
  return row | {"extracted_answer": str(int(correct)), "correctness": correct, "verifier_output": rationale}


def _changed(row, change):
  return change if isinstance(change, str) else {k: v for k, v in (row | change).items() if v is not ...}


QUESTIONS = ["How many a?", "How  many\nb?", "How many c?"]


@pytest.fixture
def release(tmp_path):
  root = tmp_path / "data"
  folder = root / "grade-school-math/grade_school_math/data"
  folder.mkdir(parents=True)
  (folder / "train.jsonl").write_text(_lines({"question": q, "answer": "#### 1"} for q in QUESTIONS))
  folder = root / "genrm-critiques/critiques"
  (folder / "data_collection").mkdir(parents=True)
  for label, target in (("correct", " Yes"), ("incorrect", " No")):
    for batch in ("0", "10", "2", "11_val"):
      row = {"inputs": _inputs("q\n\nQ: q", f"{label} {batch}"), "targets": target}
      _write_zip(folder / f"rm_{label}_solutions_batch_{batch}.zip", [row])
    row = {"inputs": _inputs("q", "s", ASK_COT), "targets": f"Fine.\n{ASK}{target}"}
    _write_zip(folder / f"critiques_{label}_solutions_batch_16_val.zip", [row])
  for number, shard, (correct, label) in itertools.product((0, 1), (0, 1), enumerate(("incorrect", "correct"))):
    question, texts = QUESTIONS[2 - shard], [f"{label} {i % 2}. The answer is {correct}." for i in range(3)]
    rows = [_pool_row(question, 2 * i + correct, texts[i], correct, f"r{number} {i}") for i in (2, 1, 0)]
    _write_pool(_pool_path(root, label, number, shard), rows)
  return root


def _scan(root, rounds, bad):
  return scan(root, problems.read_problems(root, "train"), rounds, bad)


def _pool_path(root, label="correct", number=0, shard=0):
  name = f"critique_gen_{label}_solutions_round_{number}_shard_{shard}.jsonl.gz"
  return root / "genrm-critiques/critiques/data_collection" / name


def test_rows_of_the_three_sets(release):
  for inside in ("", "genrm-critiques", "genrm-critiques/critiques"):
    rows = list(iter_direct(release / inside, "train", BadRows()))
    assert [r.solution for r in rows] == [f"{label} {b}" for label in ("correct", "incorrect") for b in (0, 2, 10)]
    assert [r.correct for r in rows] == [True] * 3 + [False] * 3
  question, solution, correct, place = next(iter_direct(release, "val", BadRows()))
  assert (question, solution, correct) == ("q\n\nQ: q", "correct 11_val", True)
  assert str(place).endswith("rm_correct_solutions_batch_11_val.zip/rows.jsonl:1")
  right, wrong = iter_critiques(release, "val", BadRows())
  assert right[:4] == ("q", "s", f"Fine.\n{ASK} Yes", True)
  assert (wrong.rationale, wrong.correct) == (f"Fine.\n{ASK} No", False)
  pool = list(iter_pool(release, (1, 0), BadRows()))
  assert [r.round for r in pool] == [1] * 12 + [0] * 12
  assert (pool[12].rationale, pool[12].place) == ("r0 2", (str(_pool_path(release)), 1))
  expected = [(QUESTIONS[2], True, 1), *((QUESTIONS[2], False, i) for i in (4, 2, 0)), (QUESTIONS[1], True, 5)]
  assert [(r.question, r.correct, r.solution_id) for r in pool[14:19]] == expected
  bad = BadRows()
  found = _scan(release, (0, 1), bad)
  assert [p.id for p in found.problems] == ["gsm8k/train/00001", "gsm8k/train/00002"]
  pool = found.candidates["gsm8k/train/00001"]
  # Of six samples four are distinct, in the order of their first ids 0, 1, 2, 3.
  expected = [(0, False, "0", "0"), (1, True, "1", "0"), (2, False, "0", "1"), (3, True, "1", "1")]
  assert [(c.index, c.correct, c.answer, c.text[-19]) for c in pool] == expected
  rationales = list(iter_rationales(release, found, (0, 1), bad))
  assert [(r.candidate_index, r.index, r.text) for r in rationales if r.problem_id == pool[0].problem_id] == [
    *((1, 0, "r0 2"), (3, 0, "r0 1"), (1, 1, "r0 0"), (0, 0, "r0 2"), (2, 0, "r0 1"), (0, 1, "r0 0")),
    *((1, 2, "r1 2"), (3, 1, "r1 1"), (1, 3, "r1 0"), (0, 2, "r1 2"), (2, 1, "r1 1"), (0, 3, "r1 0")),
  ]
  assert {(r.kept, r.verdict, r.why_dropped) for r in rationales} == {(True, None, "")}
  assert {r.source for r in rationales[:12]} == {"genrm-critiques/round-0"}
  assert bad.to_dict() == {"rows": 24, "left_out": 0, "files": {}}
  assert [r.text for r in iter_rationales(release, found, (1,), bad)][:3] == ["r1 2", "r1 1", "r1 0"]
  _write_pool(_pool_path(release), [_pool_row(QUESTIONS[2], 0, "another", 1, "r")])
  again = iter_rationales(release, found, (0,), bad)
  refused((r"shard_0\.jsonl\.gz:1: a solution that is new .* Run the command again", list, again))


def test_solutions_of_the_direct_set_come_after_those_of_the_pool(release):
  known = "correct 0. The answer is 1."  # is in the pool too
  solutions = {"correct": ["new", known, "new"], "incorrect": ["wrong"]}
  for path in (release / "genrm-critiques/critiques").glob("rm_*.zip"):
    label = path.name.split("_")[1]
    target = {"correct": " Yes", "incorrect": " No"}[label]
    _write_zip(path, [{"inputs": _inputs("How many\nb?", text), "targets": target} for text in solutions[label]])
  bad = BadRows()
  found = with_direct_set(_scan(release, (0,), bad), release, bad)
  pool = found.candidates["gsm8k/train/00001"]
  assert pool[:4] == _scan(release, (0,), BadRows()).candidates["gsm8k/train/00001"] and pool[1].text == known
  assert [(c.index, c.text, c.correct) for c in pool[4:]] == [(4, "new", True), (5, "wrong", False)]
  assert {c.source for c in pool[4:]} == {"genrm-critiques/direct"}
  assert bad.to_dict() == {"rows": 28, "left_out": 0, "files": {}}
  path = release / "genrm-critiques/critiques/rm_correct_solutions_batch_0.zip"
  _write_zip(path, [{"inputs": _inputs("Who?", "s"), "targets": " Yes"}])
  message = "1 of 1 rows cannot be used, .*: question is no GSM8K train problem"
  refused((message, with_direct_set, found, release, BadRows()))


BAD_POOL_ROWS = {
  **{"not JSON": "{", "not a JSON object": "[]"},
  **{f'field "{name}" is missing': {name: ...} for name in ("question", "extracted_answer", "target", "correctness")},
  **{f'field "{name}" is not text': {name: value} for name, value in (("model_output", None), ("verifier_output", 3))},
  'field "model_output_id" is not a whole number': {"model_output_id": "3"},
  'field "correctness" is not a whole number': {"correctness": True},
  'field "correctness" is not 0 or 1': {"correctness": 2},
  "empty solution": {"model_output": " \n"},
  "empty rationale": {"verifier_output": ""},
  "label disagrees with extracted_answer and target": {"extracted_answer": "2"},
  "label disagrees with the file's name": {"correctness": 0, "extracted_answer": "2"},
  "question is no GSM8K train problem": {"question": "How many d?"},
  "target is not GSM8K's answer": {"target": "7", "extracted_answer": "7"},
}
SAME_SOLUTION = "same solution with two labels"


@pytest.mark.parametrize("reason", [*BAD_POOL_ROWS, SAME_SOLUTION])
def test_a_bad_row_is_left_out_and_counted_in_both_passes(reason, release):
  good = [_pool_row(QUESTIONS[0], i, f"s{i}", 1, f"r{i}") for i in range(99)]
  row, path = _pool_row(QUESTIONS[0], 99, "s99", 1, "r99"), _pool_path(release)
  if reason == SAME_SOLUTION:
    _write_pool(path, good)
    row, path = _pool_row(QUESTIONS[0], 200, "s7", 0, "r"), _pool_path(release, "incorrect")
    good = [_pool_row(QUESTIONS[0], 100 + i, f"t{i}", 0, "r") for i in range(99)]
  _write_pool(path, [*good[:50], _changed(row, BAD_POOL_ROWS.get(reason, {})), *good[50:]])
  bad = BadRows()
  found = _scan(release, (0,), bad)
  expected = {str(path): {"rows": 100, "left_out": {reason: {"rows": 1, "first_lines": [51]}}}}
  pool = found.candidates["gsm8k/train/00000"]
  assert len(pool) == (198 if reason == SAME_SOLUTION else 99) and "s99" not in {c.text for c in pool}
  rationales = [r for r in iter_rationales(release, found, (0,), bad) if r.problem_id == "gsm8k/train/00000"]
  assert [r.candidate_index for r in rationales] == list(range(len(pool)))
  assert (bad.to_dict()["left_out"], bad.to_dict()["files"]) == (1, expected), "counted once"


def test_one_bad_row_in_twenty_is_tolerated(release, monkeypatch):
  bad = BadRows()

  def write(num_bad, total):
    good = [_pool_row(QUESTIONS[0], i, f"s{i}", 1, "r") for i in range(total - num_bad)]
    _write_pool(_pool_path(release), ["{", *good, *(["[]"] * (num_bad - 1))])

  write(5, 100)
  assert len(list(iter_pool(release, (0,), bad))) == 95 + 9
  bad.check()
  (file,) = bad.to_dict()["files"].values()
  assert file["left_out"]["not a JSON object"] == {"rows": 4, "first_lines": [97, 98, 99]}
  write(6, 100)
  message = r"shard_0\.jsonl\.gz: 6 of 100 rows cannot be used, .* \(first in line 96\)"
  refused((message, list, iter_pool(release, (0,), bad)), (message, bad.check))
  monkeypatch.setattr(gsm8k_rows, "MAX_ROW_BYTES", 1000)
  rows = [_pool_row(QUESTIONS[0], i, f"s{i}", 1, "r") for i in range(60)]
  long = _pool_row(QUESTIONS[0], 99, "9" * 1_000_000, 1, "r")
  _write_pool(_pool_path(release), [rows[0], "x" * 1000, long, *rows[1:], "y" * 2500])
  lengths, read = [], gsm8k_rows.json_object
  monkeypatch.setattr(gsm8k_rows, "json_object", lambda line: lengths.append(len(line)) or read(line))
  bad = BadRows()
  assert [r.solution for r in iter_pool(release, (0,), bad)][:60] == [f"s{i}" for i in range(60)]
  (file,) = bad.to_dict()["files"].values()
  assert file["left_out"] == {"longer than 1000 bytes": {"rows": 3, "first_lines": [2, 3, 63]}}
  assert max(lengths) == 1001


DIRECT = {"inputs": _inputs("q", "s"), "targets": " Yes"}
COT = {"inputs": _inputs("q", "s", ASK_COT), "targets": "Fine."}


def test_bad_rows_of_the_filtered_sets(release):
  bad_direct = (
    *(({"inputs": t}, 'field "inputs" is not') for t in ("Q: q", COT["inputs"], DIRECT["inputs"] + " Y")),
    *(({"inputs": _inputs("q", " ")}, "empty solution"), ({"inputs": ...}, 'field "inputs" is missing')),
    ({"targets": "Yes"}, 'field "targets" is not " Yes" or " No"'),
    ({"targets": " No"}, "label disagrees with the file's name"),
  )
  for read, name, good, changes in (
    (iter_direct, "rm_correct_solutions_batch_11_val.zip", DIRECT, bad_direct),
    (iter_critiques, "critiques_correct_solutions_batch_16_val.zip", COT, [({"targets": " "}, "empty rationale")]),
  ):
    for change, reason in changes:
      bad = BadRows()
      _write_zip(release / "genrm-critiques/critiques" / name, [good] * 30 + [_changed(good, change)])
      assert len(list(read(release, "val", bad))) == 31
      (file,) = bad.to_dict()["files"].values()
      ((found, count),) = file["left_out"].items()
      assert found.startswith(reason) and count == {"rows": 1, "first_lines": [31]}


def test_missing_files_and_empty_archives(release, tmp_path):
  path = release / "genrm-critiques/critiques/rm_incorrect_solutions_batch_0.zip"

  def fails(read, message):
    refused((message, list, read))

  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("a.txt", "")
  fails(iter_direct(release, "train", BadRows()), r"batch_0\.zip: holds 0 JSONL files")
  _write_zip(path, [])
  fails(iter_direct(release, "train", BadRows()), r"batch_0\.zip/rows\.jsonl: holds no row")
  fails(iter_direct(tmp_path / "nowhere", "train", BadRows()), "nowhere.*; git clone")
  fails(iter_critiques(release, "train", BadRows()), r"critiques_correct_solutions_batch_\*\.zip; git clone")
  fails(iter_direct(release, "test", BadRows()), "no split 'test'")
  # Every round needs both files of each shard; those of other rounds do not matter.
  fails(iter_pool(release, (3,), BadRows()), r"no file .*_correct_solutions_round_3_shard_0\.jsonl\.gz; .*git clone")
  _pool_path(release, "incorrect", 1, 1).unlink()
  fails(iter_pool(release, (0, 1), BadRows()), r"no file .*_incorrect_solutions_round_1_shard_1\.jsonl\.gz")
  assert len(list(iter_pool(release, (0,), BadRows()))) == 12
