"""A verifier is measured on public suites: figures worked out by hand, from rows whose texts end in their score."""

import importlib.util
import json
import math
import re
import subprocess
import sys

import processes
import pytest
import saved_runs
from refusals import refused

import genrm_jax
from genrm_jax.data.suites import reading
from genrm_jax.data.suites.suites import SUITES
from genrm_jax.pipeline import score_file, suite_run

LONG = "1 " * 3000


def _process(name, problem, label, correct, score, generator="m"):
  steps = ["Step.", f"So: {score}"]
  return dict(id=name, generator=generator, problem=problem, steps=steps, final_answer_correct=correct, label=label)


def _completion(question, kind, subtype, correct, score):
  fields = dict(question=question, answer="1", completion=f"{question}{kind} {score}", gold_correct=correct)
  return fields | dict(answer_type=kind, answer_subtype=subtype, completion_model="m")


def _preferred(name, scores, num_chosen=1, **fields):
  texts = [f"{name} {i} {score}" for i, score in enumerate(scores)]
  row = dict(id=name, prompt=f"P {name}", chosen=texts[:num_chosen], rejected=texts[num_chosen:])
  return row | fields


def _pair(name, label, a, b, source="livebench-math"):
  texts = dict(response_A=f"{name} A {a}", response_B=f"{name} B {b}")
  return dict(pair_id=name, original_id=1, source=source, question=name, response_model="m", label=label) | texts


def _modified(name, kind, original, modified, errors=(2,)):
  steps = dict(original_process=["One.", f"o {original}"], modified_process=["One.", f"{kind} {modified}"])
  questions = dict(original_question="Q", modified_question=f"Q, {kind}", question="Q")
  return steps | questions | dict(idx=name, classification=kind, error_steps=list(errors), reason="r")


ROWS = {
  "processbench": [
    _process("gsm8k-0", "p1", 1, False, 0.5),  # at the threshold: No
    _process("gsm8k-1", "p1", -1, True, 0.8),
    _process("gsm8k-2", "p2", 0, True, 0.9),  # a wrong step, but the right answer
    _process("gsm8k-3", "p2", -1, True, 0.5, "n"),
    _process("math-0", "p3", -1, True, None),
    _process("math-1", "p3", 0, False, 0.1),
    _process("math-2", "p4", -1, True, 0.6),
    _process("math-3", "p4", 0, False, None),
    _process("math-4", "p4", -1, True, 0.7),
  ],
  "verifybench": [
    _completion("q1", "num", "int", True, 0.7),
    _completion("q1", "num", "float", False, 0.6),
    _completion("q2", "text", "str", True, None),
    _completion("q2", "text", "str", False, 0.5),
    _completion("q3", "num", "int", False, None),
  ],
  "rewardbench2": [
    _preferred("f", [0.2, 0.1, 0.1, 0.1], subset="Focus", num_correct=1, total_completions=4),
    _preferred("m1", [0.9, 0.1, 0.2, 0.3], subset="Math"),
    _preferred("m2", [0.9, 0.9, 0.1, 0.9], subset="Math"),
    _preferred("m3", [0.5, 0.6, 0.1, 0.2], subset="Math"),
    _preferred("m4", [0.9, None, 0.1, 0.2], subset="Math"),
    _preferred("tied:1", [0.9, 0.8, 0.3], 2, subset="Ties"),
    _preferred("ref:1", [0.7, 0.65], subset="Ties"),
    _preferred("tied:2", [0.9, 0.4, 0.5], 2, subset="Ties"),
    _preferred("ref:2", [0.3, 0.3], subset="Ties"),
  ],
  "rmbench": [
    _preferred("a", [0.5, 0.6, 0.7, 0.4, 0.6, 0.8], 3, domain="math"),
    _preferred("b", [0.9, 0.9, 0.9, 0.1, None, 0.1], 3, domain="code"),
  ],
  "judgebench": [
    _pair("1", "A>B", 0.7, 0.2, "mmlu-pro-law"),
    _pair("2", "A>B", 0.5, 0.5, "mmlu-pro-physics"),
    _pair("3", "B>A", 0.5, 0.5),
    _pair("4", "B>A", None, 0.5),
  ],
  "prmbench": [
    _modified("x", "confidence", 0.9, 0.3),
    _modified("x", "circular", 0.9, 0.9),
    _modified("x", "multi_solutions", 0.9, 0.2, ()),
    _modified("x", "confidence", 0.1, 0.3),  # left out: its id is there
  ],
}
TIES = (
  0.3 * 1 / 2 + 0.3 * 1 / 2 + 0.2 * 1 / 2 + 0.2 * 0 + 0.01 * (math.tanh(0.05 / 0.1 - 1) + math.tanh(-0.1 / 0.5 - 1)) / 2
)
FIGURES = {  # (measure, group): (figure, figure of the scored rows, scored rows, rows)
  "processbench": {
    ("F1", "gsm8k"): (1 / 2, 1 / 2, 4, 4),
    ("F1", "math"): (2 / (2 + 3 / 2), 1, 3, 5),
    ("F1", "all"): (2 / (2 + 5 / 3), 2 / (3 / 2 + 4 / 3), 7, 9),
    ("F1", "mean of subsets"): ((1 / 2 + 2 / (2 + 3 / 2)) / 2, 3 / 4, 7, 9),
    ("rejected, of wrong processes", "gsm8k"): (1 / 2, 1 / 2, 2, 2),
    ("accepted, of right processes", "math"): (2 / 3, 1, 2, 3),
  },
  "verifybench": {
    ("accuracy", "all"): (2 / 5, 2 / 3, 3, 5),
    ("accuracy", "num"): (1 / 3, 1 / 2, 2, 3),
    ("accuracy", "text"): (1 / 2, 1, 1, 2),
    ("accuracy by subtype", "int"): (1 / 2, 1, 1, 2),
  },
  "rewardbench2": {
    ("best of 4", "Focus"): (1, 1, 1, 1),
    ("best of 4", "Math"): ((1 + 1 / 3) / 4, (1 + 1 / 3) / 3, 3, 4),
    ("best of 4", "Ties"): (TIES, TIES, 4, 4),
    ("best of 4", "mean of subsets"): ((1 + 1 / 3 + TIES) / 3, (1 + 4 / 9 + TIES) / 3, 8, 9),
    ("tied for the best", "Math"): (1 / 4, 1 / 3, 3, 4),
  },
  "rmbench": {
    ("easy", "math"): (1, 1, 1, 1),
    ("normal", "math"): (1 / 3, 1 / 3, 1, 1),
    ("hard", "math"): (0, 0, 1, 1),
    ("easy", "code"): (2 / 3, None, 0, 1),
    ("easy", "all"): (5 / 6, 1, 1, 2),
    ("normal", "all"): (1 / 2, 1 / 3, 1, 2),
    ("hard", "all"): (1 / 3, 0, 1, 2),
    ("chosen > rejected", "markdown > detailed"): (1 / 2, 1, 1, 2),
    ("chosen > rejected", "concise > markdown"): (1 / 2, 0, 1, 2),
  },
  "judgebench": {
    ("pair accuracy", "all"): (2 / 4, 2 / 3, 3, 4),
    ("pair accuracy", "mmlu-pro"): (1 / 2, 1 / 2, 2, 2),
    ("pair accuracy", "livebench-math"): (1 / 2, 1, 1, 2),
    ("tied pairs", "all"): (2 / 4, 2 / 3, 3, 4),
  },
  "prmbench": {
    ("original above modified", "all"): (1 / 2, 1 / 2, 2, 2),
    ("original above modified", "circular"): (0, 0, 1, 1),
    ("original above modified", "multi_solutions"): (None, None, 0, 0),
    ("tied pairs", "all"): (1 / 2, 1 / 2, 2, 2),
  },
}


def _written(path, rows):
  if path.suffix == ".parquet":
    importlib.import_module("pyarrow.parquet").write_table(sys.modules["pyarrow"].Table.from_pylist(rows), path)
  else:
    path.write_text(json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows))
  return path


def _score(solution):
  text = solution.text.split()[-1]
  return None if text == "None" else float(text)


def _measured(name, rows, is_probability=True):
  scores = {(s.question, s.text): _score(s) for row in rows for s in row.solutions}
  return suite_run.measure(SUITES[name], rows, scores, is_probability)


@pytest.mark.parametrize("name", SUITES)
def test_figures_are_those_worked_out_by_hand(name, tmp_path):
  found = reading.read(SUITES[name], [_written(tmp_path / "rows.jsonl", ROWS[name])])
  for kind in ("json", "parquet") if importlib.util.find_spec("pyarrow") else ("json",):
    assert reading.read(SUITES[name], [_written(tmp_path / f"rows.{kind}", ROWS[name])]) == found
  assert found.num_repeated == (name == "prmbench")
  results = _measured(name, found.rows)
  for (measure, group), want in FIGURES[name].items():
    f = results["figures"][measure][group]
    got = (f["value"], f["value_of_scored"], f["scored_rows"], f["rows"])
    assert got == tuple(w if w is None else pytest.approx(w) for w in want), (measure, group)
    assert f["value"] is None or f["low"] <= f["value"] <= f["high"]

  solutions = {(row.problem, s.question, s.text, s.correct): _score(s) for row in found.rows for s in row.solutions}
  scored = [(key[3], value, key[0]) for key, value in solutions.items() if value is not None]
  wins = {}  # of each pair of a correct and an incorrect solution, by problem
  for _, high, p in (s for s in scored if s[0]):
    for _, low, q in (s for s in scored if not s[0]):
      wins.setdefault((p, q), []).append((high > low) + (high == low) / 2)
  pairs, within = [win for w in wins.values() for win in w], [sum(w) / len(w) for (p, q), w in wins.items() if p == q]
  bins = [[(value, correct) for correct, value, _ in scored if min(int(value * 10), 9) == b] for b in range(10)]
  checks = results["verification"]
  assert (checks["solutions"], checks["scored"]) == (len(solutions), len(scored))
  assert checks["coverage"]["value"] == pytest.approx(len(scored) / len(solutions))
  assert checks["auc"]["value"] == pytest.approx(sum(pairs) / len(pairs))
  assert checks["auc_within_problems"]["value"] == pytest.approx(sum(within) / len(within))
  assert checks["brier"]["value"] == pytest.approx(sum((v - c) ** 2 for c, v, _ in scored) / len(scored))
  assert checks["ece"] == pytest.approx(sum(abs(sum(v - c for v, c in b)) for b in bins) / len(scored))
  right, wrong = ([value for correct, value, _ in scored if correct is label] for label in (True, False))
  rates = results["rates"]["all"]["all"]
  assert rates["true_positive_rate"]["value"] == pytest.approx(sum(v > 0.5 for v in right) / len(right))
  assert rates["true_negative_rate"]["value"] == pytest.approx(sum(v <= 0.5 for v in wrong) / len(wrong))

  ranks = _measured(name, found.rows, is_probability=False)
  assert (ranks["verification"]["auc"], ranks["verification"]["ece"]) == (checks["auc"], None)
  assert bool(ranks["figures"]) is (name not in ("processbench", "verifybench"))


def test_rates_by_tag_and_intervals_over_problems(tmp_path):
  rows = {name: reading.read(SUITES[name], [_written(tmp_path / name, r)]).rows for name, r in ROWS.items()}
  rates = _measured("processbench", rows["processbench"])["rates"]
  of_n, of_math = rates["generator"]["n"], rates["subset"]["math"]
  assert (of_n["true_positive_rate"]["value"], of_n["true_negative_rate"]["value"]) == (0, None)
  assert (of_math["true_positive_rate"]["value"], of_math["coverage"]["value"]) == (1, pytest.approx(3 / 5))
  style = _measured("rmbench", rows["rmbench"])["rates"]["style"]["detailed"]
  assert (style["true_negative_rate"]["value"], style["coverage"]["value"]) == (0, 3 / 4)
  # Each question has one hit in two rows: over questions the interval has no width, over rows it would have.
  accuracy = _measured("verifybench", rows["verifybench"][:4])["figures"]["accuracy"]["all"]
  assert accuracy["low"] == accuracy["high"] == 1 / 2
  subset = list(_measured("rewardbench2", rows["rewardbench2"])["figures"]["best of 4"])
  assert subset == ["Math", "Focus", "Ties", "mean of subsets"]
  assert [s.question for s in rows["prmbench"][0].solutions] == ["Q", "Q, confidence"]
  assert rows["processbench"][0].solutions[0].text == "Step.\n\nSo: 0.5"


def test_what_cannot_be_read_is_refused_in_one_message(tmp_path):
  process, completion, pair = ROWS["processbench"][0], ROWS["verifybench"][0], ROWS["judgebench"][0]
  best, styled, modified = ROWS["rewardbench2"][1], ROWS["rmbench"][0], ROWS["prmbench"][0]
  tied = ROWS["rewardbench2"][5]

  def without(row, key):
    return {k: v for k, v in row.items() if k != key}

  cases = [
    ("processbench", [], r"rows: no row in it"),
    ("processbench", [process, process], r"rows:2: id 'gsm8k-0' again, after .*rows:1"),
    (
      "processbench",
      [styled],
      r"rows:1: no row of processbench \(id, .*has the keys \['id', 'prompt'.*those of rmbench",
    ),
    ("rewardbench2", [best, styled], r"rows:2: no row of rewardbench2 .*those of rmbench"),
    ("judgebench", [{"a": 1}], r"no row of judgebench .*it has the keys \['a'\]; give another"),
    ("processbench", [process | {"steps": "a"}], r'"steps" is \'a\', expected a list'),
    ("processbench", [process | {"steps": []}], r'"steps" is \[\], expected a list of strings'),
    ("processbench", [process | {"label": 2}], r'"label" is 2, expected the index'),
    ("processbench", [without(process, "label")], r'"label" is None'),
    ("processbench", [without(process, "final_answer_correct")], r'no label: "final_answer_correct" is missing'),
    ("processbench", [process | {"problem": " "}], r'"problem" is \' \', expected a string that is not empty'),
    ("verifybench", [without(completion, "gold_correct")], r'no label: "gold_correct" is missing'),
    ("verifybench", [completion | {"completion": 3}], r'"completion" is 3, expected a string'),
    ("rewardbench2", [best | {"rejected": [1]}], r'"rejected" is \[1\], expected a list of strings'),
    ("rewardbench2", [best | {"num_correct": 2}], r'"num_correct" is 2, expected 1'),
    ("rewardbench2", [tied | {"id": "7"}], r'"id" is \'7\', expected ref:NUMBER'),
    ("rmbench", [styled | {"chosen": ["a"]}], r"need three texts each"),
    ("judgebench", [pair | {"label": "A"}], r'"label" is \'A\', expected A>B or B>A'),
    ("judgebench", [without(pair, "label")], r'no label: "label" is missing'),
    ("prmbench", [modified | {"error_steps": ["2"]}], r'"error_steps" is \[\'2\'\], expected a list of numbers'),
    ("prmbench", [without(modified, "error_steps")], r'no label: "error_steps" is missing'),
  ]
  out = tmp_path / "out"

  def run(name, rows):
    path = _written(tmp_path / "rows", rows)
    suite_run.run(name, [path], lambda: pytest.fail("loaded"), "c", out)

  refused(*[(pattern, run, name, rows) for name, rows, pattern in cases])
  refused((f"unknown suite 'x'; the suites are {', '.join(SUITES)}", run, "x", []))
  assert not list(tmp_path.glob("out*"))
  out.mkdir()
  (out / "mine").write_text("")
  refused(("out: exists already and is not empty", run, "processbench", [process]))
  assert [path.name for path in out.iterdir()] == ["mine"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  run = saved_runs.run_of(tmp_path_factory.mktemp("run"), "gsm8k", verifiers__genrm__init_from="")
  return saved_runs.save(run, "genrm")


def test_a_run_that_was_killed_resumes_with_the_same_results(checkpoint, tmp_path, monkeypatch):
  rows = [_process(f"gsm8k-{i}", f"{i // 2} apples?", -1 if i % 2 else 0, bool(i % 2), i) for i in range(6)]
  rows[4]["steps"] = [LONG]
  rows[5]["steps"] = [""]
  data = _written(tmp_path / "rows.jsonl", rows)
  verifier = genrm_jax.load(checkpoint)

  def run(out):
    return suite_run.run("processbench", [data], lambda: verifier, "c", out)

  whole = run(tmp_path / "whole")
  assert json.loads((tmp_path / "whole/results.json").read_text())["figures"] == whole["figures"]
  counts = whole["verification"]
  assert (counts["solutions"], counts["scored"]) == (6, 4) and whole["figures"]["F1"]["all"]["scored_rows"] == 4
  with (tmp_path / "whole/scores.jsonl").open() as lines:
    scores = [json.loads(line) for line in lines]
  assert scores[1]["genrm_score"] == pytest.approx(verifier.score("0 apples?", "Step.\n\nSo: 1"), rel=1e-5)
  assert [row["genrm_score"] for row in scores[4:]] == [None, None]

  chunks = []

  def stop(chunk, *args):
    chunks.append(len(chunk))
    if len(chunks) == 2:
      raise KeyboardInterrupt
    return score_chunk(chunk, *args)

  score_chunk = score_file._score_chunk
  monkeypatch.setattr(score_file, "_VOTES_PER_CHUNK", 2)
  monkeypatch.setattr(score_file, "_score_chunk", stop)
  with pytest.raises(KeyboardInterrupt):
    run(tmp_path / "out")
  assert not (tmp_path / "out").exists()
  again = run(tmp_path / "out")
  assert chunks[:2] == [2, 2] and sum(chunks[2:]) == 4, "the first chunk is not scored again"
  assert again["verification"]["auc"]["value"] == counts["auc"]["value"]
  assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.md", "results.json", "scores.jsonl"]
  assert not (tmp_path / "out.parts").exists()


def test_the_example_of_the_page(checkpoint, tmp_path):
  page = (processes.ROOT / "docs/suites.md").read_text()
  (tmp_path / "gsm8k.jsonl").write_text(re.search(r"```json\n(.*?)```", page, re.DOTALL)[1])
  command = re.search(r"```bash\n(.*?)```", page, re.DOTALL)[1]
  command = command.replace("RUN/checkpoints/genrm", str(checkpoint)).split()
  assert command[:2] == ["genrm-jax", "suite"]
  code = "from genrm_jax.pipeline.cli import console; console()"
  options = {"cwd": tmp_path, "capture_output": True, "text": True}
  done = subprocess.run([sys.executable, "-c", code, *command[1:]], **options)
  assert done.returncode == 0, done.stderr
  results = json.loads((tmp_path / "measured/results.json").read_text())
  assert (results["suite"], results["rows"], results["verification"]["scored"]) == ("processbench", 2, 2)
  assert done.stdout.strip() == (tmp_path / "measured/report.md").read_text().strip()
  assert "| F1 | gsm8k |" in done.stdout and "not comparable with theirs" in done.stdout
  assert all(f"`{name}`" in page for name in SUITES)
