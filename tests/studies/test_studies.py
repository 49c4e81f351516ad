"""Studies: of the answers and rationales of the GSM8K release; which runs are made in which order, and how."""

import json
import os
import sys
import zipfile

from refusals import refused

from experiments.studies import gsm8k_answers, gsm8k_rationales, reproduce
from experiments.studies.gsm8k_answers import Compared, classify
from genrm_jax.tasks.gsm8k import sample as gsm8k_sample
from genrm_jax.tasks.gsm8k.answers import extract_answer
from genrm_jax.tasks.gsm8k.rows import CritiqueRow, Place, PoolRow
from genrm_jax.text.prompts import RELEASED

ASK = RELEASED.verdict_question


def test_classes():
  for said, extracted, target, label, name in (
    ("The answer is 2 + 3 = 5. The answer is 5.", "5.theansweris5", "5", False, "two statements"),
    ("The answer is 5 - 1 = 4.", None, "5", True, "equation"),
    ("The answer is 90 thousand.", "90thousand", "90000", False, "scale"),
    ("The answer is 5 dozen.", "5", "5", True, "scale"),
    ("The answer is -$20.", "20", "20", True, "minus sign"),
    ("The answer is 6:45 pm.", "6", "6", True, "time of day"),
    ("The answer is 2 hours and 15 minutes.", "2", "2", True, "several units"),
    ("The answer is not given.", "notgiven", "1", False, "no number"),
    ("The answer is four.", "four", "4", False, "number in words"),
    ("The answer is 5 1/7.", "51/7", "5", False, "fraction"),
    ("The answer is 1¼.", "1", "1", True, "fraction"),
    ("The answer is $.16.", None, "16", True, "cents"),
    ("The answer is 14.5", "14", "14", True, "decimals"),
    ("The answer is about 51.", "about51", "72", False, "words beside the number"),
    ("The answer is 18 (a b).", None, "18", False, "words beside the number"),
    ("The answer is x + 11.", "11", "11", True, "expression"),
    ("The answer is 6 or 7.", "6", "6", True, "several numbers"),
    ("The answer is 24.", "36", "36", True, "other"),
  ):
    assert classify(Compared("raw pool", said, extract_answer(said), extracted, target, label)) == name, said


def test_comparison_with_a_small_release(tmp_path, monkeypatch):
  """Five problems with four solutions each, and two rows of the direct set for the first problem in each split."""
  folder, out = gsm8k_sample.write(tmp_path, 5, 0), tmp_path / "answers.json"
  train = folder / "grade-school-math/grade_school_math/data/train.jsonl"
  problem = json.loads(train.read_text().splitlines()[0])
  answer = problem["answer"].rpartition("#### ")[2]
  for label, said, target in (("correct", f"{answer}.5", " Yes"), ("incorrect", "unknown", " No")):
    inputs = f"I.\n\nQ: {problem['question']}\nA: Let's think step by step.\nThe answer is {said}.\n"
    row = {"inputs": inputs + ASK, "targets": target}
    for split in ("", "_val"):
      path = folder / f"genrm-critiques/critiques/rm_{label}_solutions_batch_00{split}.zip"
      with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("rows.jsonl", json.dumps(row))
  monkeypatch.setattr(sys, "argv", ["gsm8k_answers", f"--data_dir={folder}", f"--out={out}"])
  gsm8k_answers.main()
  results = json.loads(out.read_text())
  assert results["parts"] == {
    "raw pool": {"solutions": 20, "same_label": 20, "same_answer": 20},
    "direct set": {"solutions": 4, "same_label": 2},
  }
  (row,) = results["classes"]
  assert (row["name"], row["answers"], row["labels"], len(row["examples"])) == ("decimals", 0, 2, 2)
  assert row["examples"][0]["label"] and row["examples"][0]["ours"].endswith(".5")
  assert results["bad_rows"] == {"rows": 24, "left_out": 0}


def test_the_pool_is_measured_beside_the_released_set():
  def row(question, solution, text, correct, line):
    return PoolRow(question, solution, line, "4", "4" if correct else "5", correct, text, 0, Place("shard", line))

  def released(question, solution, text, verdict):
    return CritiqueRow(question, solution, f"{text}\n\n{ASK} {verdict}", verdict == "Yes", Place("val", 1))

  pool = [
    row("How  many?", "four", f"**Verification:**\n\nfour\nis right\n\n**Final Grade:** {ASK} Yes", True, 1),
    row("How many?", "four", "fine\nVerification: Is the answer correct? Yes", True, 2),
    row("How many?", "five", f"as the Expected Answer\n\n{ASK} No", False, 3),
    row("How much?", "six", f"six\n\n{ASK} No", True, 4),
  ]
  known = [
    released("How many?", "four", "\nfour is right", "Yes"),
    released("How many?", "4", "another", "Yes"),
    released("Who?", "Ada", "Expected Answer: Bo", "No"),
  ]
  found, replay = gsm8k_rationales.measure(pool, known)
  assert found["rationales"] == 4
  right, wrong, both = found["ledgers"]["lenient-2"].values()
  assert (right["all"], right["kept"], right["dropped: verdict disagrees with the label"]) == (3, 2, 1)
  assert (right["solutions"], right["problems"]) == ({"all": 2, "kept": 1}, {"all": 2, "kept": 1})
  assert wrong["kept"] == 1
  assert both == {"all": 1, "kept": 1}
  assert found["ledgers"]["lenient-2+drop_leaks"]["incorrect"]["kept"] == 0
  ours, theirs, search = found["released_validation"].values()
  assert search == {
    "correct": {"rows": 2, "problem in the pool": 2, "solution in the pool": 1, "rationale in the pool": 1},
    "incorrect": {"rows": 1, "problem in the pool": 0, "solution in the pool": 0, "rationale in the pool": 0},
  }
  for table, starts in ((ours, 0), (theirs, 0.5)):
    assert (table["correct"]["rows"], table["correct"]["starts with a line break"]) == (2, starts)
  shares = ("ends in the verdict question and the verdict", "verdict is the label", "empty line before the question")
  for label in ("correct", "incorrect"):
    assert [ours[label][name] for name in (*shares, "heading 'Final Grade' before the question")] == [1, 1, 1, 0]
  assert theirs["incorrect"]["names the reference"] == ours["incorrect"]["names the reference"] == 1
  differences = dict.fromkeys(("kept -> dropped", "kept with another text", "verdict Yes -> none"), 1)
  assert replay.table()["lenient-1"] == {"correct": differences, "incorrect": {}}
  assert replay.table()["lenient-2+drop_leaks"] == {"correct": {}, "incorrect": {"kept -> dropped": 1}}
  [(_, before, after)] = replay.examples["lenient-1", "correct", "verdict Yes -> none"]
  assert (before.verdict, after.verdict) == (True, None)


def test_banks_come_before_the_studies_that_use_them():
  runs = reproduce.list_runs(["last_letter", "word_sorting"], ["0", "1"], [])
  assert runs[:4] == [(task, "tiny", seed) for task in ("last_letter", "word_sorting") for seed in ("0", "1")]
  assert "tiny" not in {variant for _, variant, _ in runs[4:]}
  assert len(set(runs)) == len(runs) == 2 * sum(map(len, reproduce.VARIANTS.values()))
  chosen = reproduce.list_runs(["word_sorting"], ["2"], ["lambda_1", "tiny"])
  assert chosen == [("word_sorting", "tiny", "2"), ("word_sorting", "lambda_1", "2")]
  refused(("gsm", reproduce.list_runs, ["gsm"], ["0"], []))


def fake_python(tmp_path, monkeypatch, lines):
  """A shell script in place of Python, which writes its arguments to a file."""
  script = tmp_path / "python"
  script.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/args\n{lines}\n')
  script.chmod(0o755)
  monkeypatch.setattr(sys, "executable", str(script))


def test_a_run_gets_its_workdir_seed_and_bank_and_a_failed_one_shows_the_end_of_its_log(tmp_path, monkeypatch):
  core, place = min(os.sched_getaffinity(0)), f"{tmp_path}/work/last_letter"
  for variant, bank in (("tiny", []), ("lambda_0.3", [f"--config.bank={place}/tiny-seed2"])):
    fake_python(tmp_path, monkeypatch, "echo some output")
    reproduce.run_one(tmp_path / "work", "last_letter", variant, "2", core)
    args = (tmp_path / "args").read_text().splitlines()
    assert args[:2] == ["-m", "experiments.last_letter"] and args[2].endswith(f"last_letter.py:{variant}")
    assert args[3:] == [f"--workdir={place}/{variant}-seed2", "--config.seed=2", *bank]
  fake_python(tmp_path, monkeypatch, "echo train: starts\necho 'error: no luck' >&2\nexit 1")
  refused(("error: no luck", reproduce.run_one, tmp_path / "work", "last_letter", "lambda_0.3", "2", core))
  log = tmp_path / "work/last_letter/lambda_0.3-seed2.log"
  assert log.read_text() == "some output\ntrain: starts\nerror: no luck\n"
