"""Candidates in other tools' formats: what each row gives, what is skipped, and which files are refused."""

import functools
import gzip
import importlib.util
import json
import sys

import pytest
import yaml
from refusals import refused

import genrm_jax
from genrm_jax.data import readers
from genrm_jax.data.interchange.formats import FORMATS
from genrm_jax.records import Problem, Vote
from genrm_jax.tasks.gsm8k.task import GSM8K

Q, Q2 = "What is 3 + 4?", "What is 1 + 1?"
GOLD = "3 + 4 = 7\n#### 7"
ARGUMENTS = {"gen_args_0": {"arg_0": f"Q: {Q}\nA:"}}


def _doc(doc_id, filter, resps, question=Q, match=1.0, target=GOLD):
  doc = {"question": question, "answer": target}
  same = dict(doc_id=doc_id, doc=doc, target=target, arguments=ARGUMENTS, resps=[resps], filtered_resps=["7"])
  return same | {"filter": filter, "exact_match": match}


def _batch(name, contents=(), **changes):
  choices = [{"index": i, "message": {"role": "assistant", "content": c}} for i, c in enumerate(contents)]
  response = {"status_code": 200, "request_id": "r", "body": {"choices": choices, "usage": {}}}
  return {"id": f"b-{name}", "custom_id": name, "response": response, "error": None} | changes


def _request(name, *messages):
  return {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": {"messages": list(messages)}}


def _verl(index, **changes):
  extra = {"question": Q, "answer": GOLD, "split": "test", "index": index}
  prompt, reward = [{"role": "user", "content": f"{Q} Think."}], {"style": "rule", "ground_truth": "7"}
  return {"data_source": "openai/gsm8k", "prompt": prompt, "reward_model": reward, "extra_info": extra} | changes


_nemo = functools.partial(dict, problem=Q, expected_answer="7", num_generated_tokens=9)
REQUESTS = (
  _request("a", {"role": "system", "content": "Be brief."}, {"role": "user", "content": Q}),
  _request("b", {"role": "user", "content": [{"type": "text", "text": Q2}]}),
  *(_request(name, {"role": "user", "content": "Why?"}) for name in "cde"),
)

# Format: rows; [(problem, index, text, label)]; {reason: rows}; (question, answer, reference) of the first problem.
ROWS = {
  "simple": (
    [
      {"question": Q, "solution": "7", "correct": True, "problem_id": "p", "answer": 7},
      {"question": Q, "solution": "7", "problem_id": "p", "note": {"any": 1}},
      {"problem": Q, "solution": "8", "correct": False, "problem_id": "p"},
      {"problem": Q2, "solution": " ", "unique_id": "u"},
    ],
    [("p", 0, "7", True), ("p", 1, "7", None), ("p", 2, "8", False)],
    {"empty solution": [4]},
    (Q, "7", ""),
  ),
  "lm_eval": (
    [
      _doc(0, "strict-match", ["It is 7."]),
      _doc(1, "strict-match", ["seven"], Q2, 0.0),
      _doc(2, "strict-match", ["a", "b"], "Twice?", "1.0"),
      _doc(3, "strict-match", [["-3.0", "False"]], "Choose."),
      _doc(0, "flexible-extract", ["It is 7."]),
      _doc(1, "flexible-extract", ["seven"], Q2, 1.0),
    ],
    [("0", 0, "It is 7.", True), ("1", 0, "seven", None), ("2", 0, "a", None), ("2", 1, "b", None)],
    {"log-likelihoods of choices, no text": [4], "the same document by another filter": [5, 6]},
    (Q, "7", GOLD),
  ),
  "openai_batch": (
    [
      _batch("b", ["2"]),
      _batch("a", ["7", None, "8"]),
      _batch("c", response={"status_code": 429, "body": {"error": {"message": "slow down"}}}),
      _batch("d", response=None, error={"code": "batch_expired", "message": "expired"}),
      _batch("x", ["7"]),
      _batch("e"),
    ],
    [("b", 0, "2", None), ("a", 0, "7", None), ("a", 1, "8", None)],
    {
      "empty solution": [2],
      "status code 429": [3],
      "an error in place of a response": [4],
      "custom_id is not in the input file": [5],
      "a response without choices": [6],
    },
    (Q2, "", ""),
  ),
  "nemo_skills": (
    [
      _nemo(generation="It is 7.", predicted_answer="7", symbolic_correct=True),
      _nemo(generation="", error="context window exceeded", predicted_answer=None, symbolic_correct=False),
      _nemo(generation="It is 8.", predicted_answer=None, symbolic_correct=False),
      _nemo(generation=""),
    ],
    [(None, 0, "It is 7.", True), (None, 1, "It is 8.", False)],
    {"a soft failure in place of a generation": [2], "empty solution": [4]},
    (Q, "7", ""),
  ),
  "search_and_learn": (
    [
      dict(
        problem=Q, answer="7", unique_id="t/1", solution="\\boxed{7}", completions=["7", "8", ""], scores=[[0.1]] * 3
      ),
      dict(problem=Q2, answer="2", unique_id="t/2", solution="So 2.", completions=[], scores=[]),
    ],
    [("t/1", 0, "7", None), ("t/1", 1, "8", None)],
    {"empty solution": [1]},
    (Q, "7", "\\boxed{7}"),
  ),
  "verl": (
    [
      _verl(5, responses=["7", "8"]),
      _verl(5, responses=["9"]),
      _verl(6, extra_info={"index": 6}, responses=None),
    ],
    [("openai/gsm8k/test/5", i, text, None) for i, text in enumerate("789")],
    {"no responses": [3]},
    (Q, "7", GOLD),
  ),
  "large_language_monkeys": (
    [dict(question=Q, samples=["7", "8"], is_corrects=[True, False], gt_answer=GOLD)],
    [(None, 0, "7", True), (None, 1, "8", False)],
    {},
    (Q, "7", GOLD),
  ),
  "sc_genrm": (
    [dict(prompt="P", question=Q, samples=["7", ""], gt_answer="So $\\boxed{7}$.")],
    [(None, 0, "7", None)],
    {"empty solution": [1]},
    (Q, "7", "So $\\boxed{7}$."),
  ),
}


def _lines(*rows):
  return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


def _parquet(rows):
  table = pytest.importorskip("pyarrow").Table.from_pylist(rows)
  sink = sys.modules["pyarrow"].BufferOutputStream()
  pytest.importorskip("pyarrow.parquet").write_table(table, sink)
  return sink.getvalue().to_pybytes()


WRITERS = {
  "x.jsonl": lambda rows: _lines(*rows),
  "x.jsonl.gz": lambda rows: gzip.compress(_lines(*rows)),
  "x.json": lambda rows: json.dumps(rows, indent=1).encode(),
  "lines.json": lambda rows: _lines(rows[0], b"", *rows[1:], b""),
  "x.yaml": lambda rows: yaml.safe_dump(rows).encode(),
  "x.parquet": _parquet,
}


@pytest.mark.parametrize("name", ROWS)
def test_each_format_in_each_kind_of_file(name, tmp_path):
  rows, expected, skipped, (question, answer, reference) = ROWS[name]
  (tmp_path / "requests.jsonl").write_bytes(_lines(*REQUESTS))
  kwargs = {"inputs": tmp_path / "requests.jsonl"} if name == "openai_batch" else {}
  for file, write in WRITERS.items():
    if (file == "x.parquet" and name != "verl") or (file == "lines.json" and len(rows) == 1):
      continue  # the rows have several schemas; one line of JSON is a document
    path = tmp_path / file
    path.write_bytes(write(rows))
    found = genrm_jax.read_candidates(path, **kwargs)
    assert found == genrm_jax.read_candidates(str(path), name, **kwargs) and found.format == name, file
    assert (found.num_rows, found.problems[0].question) == (len(rows), question)
    assert (found.problems[0].answer, found.problems[0].reference) == (answer, reference)
    want = [(problem or found.problems[0].id, *rest) for problem, *rest in expected]
    got = [(c.problem_id, c.index, c.text, found.labels.get((c.problem_id, c.index))) for c in found.candidates]
    assert got == want, file
    assert all(
      c.correct is (label is True) and c.source == file for c, (*_, label) in zip(found.candidates, want, strict=True)
    )
    sign = {"x.json": ", item ", "x.yaml": ", item ", "x.parquet": ", row "}.get(file, ":")
    lines = [1, *range(3, len(rows) + 2)] if file == "lines.json" else range(1, len(rows) + 1)  # after a blank line
    places = {reason: [f"{path}{sign}{lines[row - 1]}" for row in at] for reason, at in skipped.items()}
    assert {reason: s.places for reason, s in found.skipped.items()} == places, file
    assert [s.count for s in found.skipped.values()] == [len(at) for at in skipped.values()]
    assert all(f"{len(at)} {reason} (first: " in found.summary for reason, at in skipped.items())
  if name == "nemo_skills":
    assert [c.answer for c in found.candidates] == ["7", None]


def test_a_folder_of_samples_and_their_verifications(tmp_path):
  def write(name, value):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(yaml.safe_dump(value).encode())

  for i, question in ((2, Q), (10, Q2)):
    write(f"samples/{i}.yaml", dict(prompt="P", question=question, samples=[f"{i}a", f"{i}b"], gt_answer=7.0))
  read = {"verification": "So.", "p(yes)": 0.75, "p(no)": 0.25}
  for name, votes in (
    ("problem_2/solution_1", [read, read | {"p(yes)": -1.0}, read | {"p(yes)": 0.5, "p(no)": -1}]),
    ("problem_10/solution_0", [{"verification": "", "p(yes)": -1, "p(no)": -1}]),
  ):
    write(f"verified/{name}.yaml", dict(prompt="P", verifications=votes))
  samples, verified = tmp_path / "samples", tmp_path / "verified"
  found = genrm_jax.read_candidates(samples)
  assert [(p.id, p.answer) for p in found.problems] == [("2", "7"), ("10", "7")], "2 before 10"
  assert [(c.problem_id, c.text) for c in found.candidates] == [("2", "2a"), ("2", "2b"), ("10", "10a"), ("10", "10b")]
  found = genrm_jax.read_candidates(verified, inputs=samples)
  assert [(c.problem_id, c.index, c.text) for c in found.candidates] == [("2", 1, "2b"), ("10", 0, "10a")]
  ok = functools.partial(Vote, "ok", num_tokens=0, text="So.")
  votes = (ok(0.75, 0.25), ok(0.75, 0.25), ok(0.5, None))  # p(yes) is 1 - p(no) where only p(no) was recorded
  assert found.votes == {("2", 1): votes, ("10", 0): (Vote("missing", None, None, 0),)}
  lines = dict(verification="v", **{"p(yes)": 7, "p(no)": 0})
  for name, value, message in (
    ("problem_2/solution_2", dict(prompt="P", verifications=[read]), "has 2 samples, none of number 2"),
    ("problem_3/solution_0", dict(prompt="P", verifications=[read]), "no 3.yaml"),
    ("problem_2/other", dict(prompt="P", verifications=[read]), "problem_I/solution_J.yaml"),
    ("problem_2/solution_0", dict(prompt="P", verifications=[lines]), r'"verifications\[\].p\(yes\)" is 7'),
    ("problem_2/solution_5", dict(prompt="P", samples=[], question=Q), "sc_genrm in a file that begins with"),
  ):
    write(f"verified/{name}.yaml", value)
    refused((message, functools.partial(genrm_jax.read_candidates, verified, inputs=samples)))
    (verified / f"{name}.yaml").unlink()
  refused(("lack the questions", genrm_jax.read_candidates, verified))
  seeds = tmp_path / "seeds"
  seeds.mkdir()
  (seeds / "metrics.json").write_text("{}")
  for seed in range(2):
    (seeds / f"output-rs{seed}.jsonl").write_bytes(_lines(_nemo(generation=f"by {seed}")))
  found = genrm_jax.read_candidates(seeds)
  assert [(c.index, c.text, c.source) for c in found.candidates] == [
    (i, f"by {i}", f"output-rs{i}.jsonl") for i in range(2)
  ]


GOOD = {"question": Q, "solution": "7"}


def test_what_cannot_be_read_is_refused_with_its_place(tmp_path, monkeypatch):
  row = {name: rows[0][0] for name, rows in ROWS.items()}
  twice = {name: rows[0][:1] * 2 for name, rows in ROWS.items()}
  deep, huge = b'{"question": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", b'{"question": ' + b"9" * 5000 + b"}"
  other = row["search_and_learn"] | {"completions": "7"}
  cases = [
    ("x.jsonl", _lines(GOOD, line), "", rf"x\.jsonl:2: {message}")
    for line, message in (
      *((line, "not JSON") for line in (b"{", deep, huge, b"\xff", b'{"question": NaN}')),
      ([1], "expected a JSON object"),
      (b'{"question": "half \\ud83d", "solution": "7"}', 'field "question" has half of a surrogate pair'),
      (row["lm_eval"], "a row of format lm_eval in a file that begins with simple"),
      ({"question": Q, "text": "7"}, r"no known format has the keys of this row, \['question', 'text'\]; .*lm_eval \("),
      ({"question": 3, "solution": "7"}, 'field "question" is 3, expected a string'),
      ({"question": Q, "solution": ["7"]}, r"field \"solution\" is \['7'\]"),
      ({"problem_id": "p", "solution": "7"}, "no question in it"),
      (GOOD | {"correct": "maybe"}, "field \"correct\" is 'maybe'"),
    )
  ]
  cases += [
    ("x.jsonl", b"", "", "no row in it"),
    ("x.json", b" \n", "", "no row in it"),
    ("x.jsonl", _lines(GOOD), "csv", "unknown format 'csv'; the formats are lm_eval, .*simple"),
    ("x.jsonl", _lines(GOOD), "verl", r"format verl \(data_source, prompt, reward_model\) lacks one of its keys"),
    ("x.jsonl", _lines(other), "", "field \"completions\" is '7', expected a list"),
    ("x.jsonl", _lines(*twice["search_and_learn"]), "", r"x\.jsonl:2: t/1 again, after .*x\.jsonl:1"),
    ("x.jsonl", _lines(*twice["lm_eval"]), "", "0, filter strict-match again"),
    ("x.jsonl", _lines(row["simple"], row["simple"] | {"question": Q2}), "", "problem 'p' has another question"),
    ("x.jsonl", _lines(row["openai_batch"]), "", "lack the questions; give the file"),
    ("x.json", b'{"question": 1e400, "solution": "7"}', "", "a value that JSON cannot hold"),
    ("x.json", b'{"question": "\\ud83d", "solution": "7"}', "", "a value that JSON cannot hold"),
    ("x.json", b'["7"]', "", "item 1: expected an object"),
    ("x.yaml", b"a: [1", "", r"x\.yaml:2: not YAML"),
    ("x.yaml", b"a: " + b"[" * 5000, "", "not YAML"),
    ("x.yaml", b"samples: [7]\nquestion: " + b"9" * 5000, "", "not YAML"),
    ("x.yaml", b'samples: ["\\ud83d"]\nquestion: q', "", "half of a surrogate pair|not YAML"),
    ("x.jsonl.gz", gzip.compress(_lines(GOOD))[:-9], "", "could not be read"),
    ("x.jsonl", b"\x1f\x8bno gzip", "", "could not be read"),
  ]
  for file, data, name, message in cases:
    (tmp_path / file).write_bytes(data)
    refused((message, genrm_jax.read_candidates, tmp_path / file, name))
    (tmp_path / file).unlink()
  refused(("a folder without files that end in", genrm_jax.read_candidates, tmp_path))
  refused(("could not be read", genrm_jax.read_candidates, tmp_path / "none.jsonl"))
  (tmp_path / "x.jsonl").write_bytes(_lines(GOOD))
  refused(("have their questions with them", functools.partial(genrm_jax.read_candidates, tmp_path, inputs=tmp_path)))
  (tmp_path / "out.jsonl").write_bytes(_lines(row["openai_batch"]))
  read = functools.partial(genrm_jax.read_candidates, tmp_path / "out.jsonl", inputs=tmp_path / "in.jsonl")
  (tmp_path / "in.jsonl").write_bytes(_lines(REQUESTS[0], REQUESTS[0]))
  refused((r"in\.jsonl:2: custom_id 'a' again", read))
  (tmp_path / "x.parquet").write_bytes(b"PAR1 or not")
  if importlib.util.find_spec("pyarrow"):
    refused(("no parquet file that can be read", genrm_jax.read_candidates, tmp_path / "x.parquet"))
  monkeypatch.setitem(sys.modules, "pyarrow", None)
  refused((r"pip install 'genrm-jax\[parquet\]'", genrm_jax.read_candidates, tmp_path / "x.parquet"))
  problems = [Problem("p", "gsm8k", "eval", Q, "7")]
  refused((r"genrm-jax\[parquet\]", readers.read_candidates, tmp_path / "x.parquet", problems, GSM8K()))


def test_solutions_to_known_problems_come_from_any_format(tmp_path, capsys):
  problems = [Problem("p", "gsm8k", "eval", f" {Q}", "7"), Problem("a", "gsm8k", "eval", "By id?", "8")]
  path = tmp_path / "own.jsonl"
  answers = [_batch("a", ["The answer is 7.", None, "The answer is 8."]), _batch("b", ["7"])]
  solved = [r | {"generation": r["generation"].replace("It", "The answer")} for r in ROWS["nemo_skills"][0]]
  logged = [_doc(0, "strict", ["The answer is 7."], match=0.0), *ROWS["lm_eval"][0][1:5]]
  for rows, expected, said in (
    (logged, [("p", 0, "7", True)], "3 about none of the problems (first: "),
    (answers, [("a", 0, "7", False), ("a", 1, "8", True)], "1 empty solution"),
    (solved, [("p", 0, "7", True), ("p", 1, "8", False)], "1 a soft failure"),
  ):
    path.write_bytes(_lines(*rows))
    found = readers.read_candidates(path, problems, GSM8K())
    assert [(c.problem_id, c.index, c.answer, c.correct) for c in found] == expected, said
    assert said in capsys.readouterr().err
  solutions = readers.read_solutions(path, problems[:1])
  assert [(s.text, s.correct) for s in solutions["p"]] == [("The answer is 7.", True), ("The answer is 8.", False)]
  refused(("no solution to 'a'", readers.read_solutions, path, problems))
  refused(("no solution to one of the 1 problems; skipped: 4 about none", readers.read_solutions, path, problems[1:]))
  path.write_bytes(_lines({"unique_id": "p", "solution": "7"}))
  assert [s.text for s in readers.read_solutions(path, problems[:1])["p"]] == ["7"], "the simple format, as before"


def test_every_format_is_tested():
  assert set(ROWS) | {"sc_genrm_votes"} == set(FORMATS)
