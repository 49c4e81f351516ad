"""A file of candidates is scored: the same rows in the same format with scores, after a kill and in parts too."""

import dataclasses
import functools
import gzip
import json
import pathlib
import re
import subprocess
import sys

import jax
import processes
import pytest
import saved_runs
import yaml
from refusals import refused

import genrm_jax
from genrm_jax.pipeline import score_file as scoring_files
from genrm_jax.pipeline.score_file import Job, Shard, score_file
from genrm_jax.runtime import sharding
from genrm_jax.verifiers import scoring

LONG = "1 " * 3000


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  run = saved_runs.run_of(tmp_path_factory.mktemp("run"), "gsm8k", verifiers__genrm_cot__init_from="")
  return saved_runs.save(run, "genrm_cot")


@pytest.fixture(scope="module")
def verifier(checkpoint):
  return genrm_jax.load(checkpoint, mesh=sharding.make_mesh(devices=jax.devices()[:1]))


@pytest.fixture
def score(verifier, tmp_path, monkeypatch):
  """A function that scores a file and returns the result; `score.pairs` are the pairs that each chunk scored."""
  pairs = []

  def recorded(verifier, engine, chunk, how):
    pairs.append(list(chunk))
    return scoring.score_pairs(verifier, engine, chunk, how)

  def run(file, out="scored.jsonl", **options):
    return score_file(Job(tmp_path / file, tmp_path / out, **options), lambda: verifier)

  monkeypatch.setattr(scoring_files, "scoring", type("", (), {"score_pairs": staticmethod(recorded)}))
  run.pairs = pairs
  return run


def _rows(path):
  opened = gzip.open if path.suffix == ".gz" else open
  with opened(path, "rt") as lines:
    return [json.loads(line) for line in lines]


def _of(n):
  return {"question": f"{n} apples and {n + 1}?", "solution": f"{n + n + 1}"}


def test_rows_keep_their_bytes_and_get_the_scores_of_score(score, verifier, tmp_path, capsys):
  rows = [
    b'{"question":"2 apples and 3?",  "solution":"5", "big": 1e400000, "n": 1.50, "t": "\\u00e9"} ',
    b'  {"solution": "5", "question": "2 apples and 3?"}\r',
    json.dumps({"question": "4?", "solution": LONG}).encode(),
    json.dumps({"question": "4?", "solution": None}).encode(),
    json.dumps({"question": "4?", "solution": "4 \u4e16", "correct": False}).encode(),
  ]
  rows[0] = rows[0].replace(b"1e400000", b"123456789012345678901234567890")
  (tmp_path / "in.jsonl").write_bytes(rows[0] + b"\n\n" + b"\n".join(rows[1:]))
  out = score("in.jsonl", rationales=True)
  lines = out.read_bytes().splitlines()
  assert len(lines) == len(rows) and not (tmp_path / "scored.jsonl.parts").exists()
  for row, line in zip(rows, lines, strict=True):
    assert line.startswith(row.rstrip()[:-1] + b', "genrm_score": ')
  found = _rows(out)
  for row in (found[0], found[4]):
    votes = verifier.votes(row["question"], row["solution"])
    assert row["genrm_score"] == pytest.approx(verifier.score(row["question"], row["solution"]), rel=1e-5)
    assert [(v["state"], v["text"]) for v in row["genrm_votes"]] == [(v.state, v.text) for v in votes]
    assert [v["p_yes"] for v in row["genrm_votes"]] == pytest.approx([v.p_yes for v in votes], rel=1e-5)
  assert found[1]["genrm_score"] == found[0]["genrm_score"] and len(score.pairs[0]) == 3, "equal texts once"
  assert (found[2]["genrm_score"], [v["state"] for v in found[2]["genrm_votes"]]) == (None, ["truncated"] * 2)
  assert found[3]["genrm_score"] is None and found[3]["genrm_skipped"] == "empty solution"
  said = capsys.readouterr().err
  assert re.search(r"score: 4/4 solutions, \d+s elapsed, 0s left", said)
  assert f"3 scores; without a score: 1 truncated; skipped: 1 empty solution (first: {tmp_path}/in.jsonl:5)" in said
  (tmp_path / "scored.jsonl").rename(tmp_path / "again.jsonl")
  refused(('the row has a field "genrm_score" already', score, "again.jsonl"))
  one = _rows(score("in.jsonl", "one.jsonl.gz", num_votes=1))
  assert len(one[0]["genrm_votes"]) == 1 and set(one[0]["genrm_votes"][0]) == {"state", "p_yes"}
  assert one[0]["genrm_score"] == pytest.approx(verifier.score("2 apples and 3?", "5", num_votes=1), rel=1e-5)


def test_every_format_gets_its_scores_beside_its_solutions(score, verifier, tmp_path):
  question, texts = "2 apples and 3?", ["5", "", "6"]
  logged = [
    dict(doc_id=i, doc={"question": question}, target="5", resps=[[text]], filter=f, exact_match=1.0)
    for f in ("strict", "flexible")
    for i, text in enumerate(("5", "6"))
  ]
  choices = [{"index": i, "message": {"content": text}} for i, text in enumerate(texts)]
  batch = [
    {"custom_id": "b", "response": {"status_code": 500, "body": {}}, "error": None},
    {"custom_id": "a", "response": {"status_code": 200, "body": {"choices": choices}}, "error": None},
  ]
  request = {"custom_id": "a", "body": {"messages": [{"role": "user", "content": question}]}}
  (tmp_path / "requests").write_text(f"{json.dumps(request)}\n{json.dumps(request | {'custom_id': 'b'})}\n")
  reward = dict(data_source="d", prompt=[{"role": "user", "content": question}], reward_model={"ground_truth": "5"})
  sampled = dict(question=question, samples=texts, gt_answer=5)
  value = {text: verifier.score(question, text) for text in texts if text}
  several = [value["5"], None, value["6"]]

  def check(rows, originals, *scores):
    assert [{k: v for k, v in row.items() if not k.startswith("genrm_")} for row in rows] == originals
    for row, want in zip(rows, scores, strict=True):
      if isinstance(want, list):
        assert row["genrm_scores"] == [score and pytest.approx(score, rel=1e-5) for score in want]
        assert [len(votes) for votes in row["genrm_votes"]] == [0 if s is None else 2 for s in want]
      else:
        assert row["genrm_score"] == pytest.approx(want, rel=1e-5)

  def lines(name, rows):
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows

  check(_rows(score("logged", lines("logged", logged) and "logged.out")), logged, *[[value[t]] for t in "5656"])
  check(_rows(score("batch", lines("batch", batch) and "b.out", inputs=tmp_path / "requests")), batch, [], several)
  assert _rows(tmp_path / "b.out")[0]["genrm_skipped"] == "status code 500"
  nemo = [{"problem": question, "expected_answer": "5", "generation": "", "error": "e"}]
  refused(("no solution to score; skipped: 1 a soft failure", lambda: score("nemo", lines("nemo", nemo) and "n.out")))
  learn = [{"problem": question, "answer": "5", "completions": texts, "scores": []}]
  check(_rows(score("learn", lines("learn", learn) and "l.out")), learn, several)
  for name, document in (("one.json", sampled), ("list.json", [sampled])):
    (tmp_path / name).write_text(json.dumps(document))
    found = json.loads(score(name, f"out-{name}").read_text())
    check(found if isinstance(document, list) else [found], [sampled], several)
  (tmp_path / "samples").mkdir()
  for i in (2, 10):
    (tmp_path / f"samples/{i}.yaml").write_text(yaml.safe_dump(sampled | {"prompt": str(i)}))
  score("samples", "scored")
  for i in (2, 10):
    found = yaml.safe_load((tmp_path / f"scored/{i}.yaml").read_text())
    check([found], [sampled | {"prompt": str(i)}], several)
  refused((r"/scored: exists already", score, "samples", "scored"))
  parquet = pytest.importorskip("pyarrow.parquet")
  table = pytest.importorskip("pyarrow").Table.from_pylist(
    [reward | {"responses": texts}, reward | {"responses": None}]
  )
  parquet.write_table(table, tmp_path / "in.parquet")
  found = parquet.read_table(score("in.parquet", "out.parquet")).to_pylist()
  assert found[1].pop("genrm_skipped") == "no responses"
  check(found, table.to_pylist(), several, [])


def test_a_document_that_is_repeated_is_scored_once_even_in_a_later_chunk(score, tmp_path, monkeypatch):
  monkeypatch.setattr(scoring_files, "_VOTES_PER_CHUNK", 4)
  rows = [
    dict(doc_id=i, doc={"question": "q?"}, resps=[[f"{i}"]], filter=f) for f in ("strict", "flexible") for i in range(3)
  ]
  (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  found = _rows(score("in.jsonl"))
  assert [[text for _, text in chunk] for chunk in score.pairs] == [["0", "1"], ["2"], []]
  assert [row["genrm_scores"] for row in found[3:]] == [row["genrm_scores"] for row in found[:3]]
  assert all(row["genrm_scores"] != [None] for row in found)


def test_after_a_kill_the_bytes_are_those_of_an_uninterrupted_run(score, tmp_path, monkeypatch):
  monkeypatch.setattr(scoring_files, "_VOTES_PER_CHUNK", 4)  # 2 solutions of 2 votes
  (tmp_path / "in.jsonl").write_text("".join(json.dumps(_of(n)) + "\n" for n in (1, 2, 3, 1, 4, 5, 6)))
  whole = score("in.jsonl", "whole.jsonl").read_bytes()
  assert [len(chunk) for chunk in score.pairs] == [2, 2, 2, 1]
  score.pairs.clear()
  real, limit = scoring_files.scoring.score_pairs, [2]

  def killed(*args):
    if len(score.pairs) == limit[0]:
      raise KeyboardInterrupt
    return real(*args)

  monkeypatch.setattr(scoring_files.scoring, "score_pairs", staticmethod(killed))
  with pytest.raises(KeyboardInterrupt):
    score("in.jsonl")
  parts = tmp_path / "scored.jsonl.parts"
  assert not (tmp_path / "scored.jsonl").exists() and len(list(parts.iterdir())) == 3
  refused(
    (r"parts: holds scores of another job \(votes, votes_per_chunk differ\)", score_other, score, monkeypatch),
    ("of another job .rationales differ", functools.partial(score, "in.jsonl", rationales=True)),
  )
  limit[0] = 99
  assert score("in.jsonl").read_bytes() == whole
  assert [len(chunk) for chunk in score.pairs] == [2, 2, 2, 1], "the first two chunks were not scored again"
  refused(("scored.jsonl: exists already; give another --out", score, "in.jsonl"))

  # In parts: the same rows in order, and the same scores but for the rounding of other batches.
  shards = [Shard.parse(f"{i}/3") for i in range(3)]
  files = [score("in.jsonl", shard=shard) for shard in shards]
  assert [f.name for f in files] == [f"scored-0000{i}-of-00003.jsonl" for i in range(3)]
  joined = [row for file in files for row in _rows(file)]
  assert len({len(_rows(file)) for file in files}) <= 2 and len(joined) == 7
  for row, want in zip(joined, _rows(tmp_path / "whole.jsonl"), strict=True):
    assert (row["question"], row["genrm_score"]) == (want["question"], pytest.approx(want["genrm_score"], rel=1e-4))
  refused(
    ("has 7 rows, too few for --shard=0/9", functools.partial(score, "in.jsonl", shard=Shard.parse("0/9"))),
    *((f"--shard={text}: give I/N", Shard.parse, text) for text in ("3/3", "1", "-1/2", "a/b")),
  )


def score_other(score, monkeypatch):
  with monkeypatch.context() as changed:
    changed.setattr(scoring_files, "_VOTES_PER_CHUNK", 8)
    score("in.jsonl", num_votes=3)


def test_what_cannot_be_scored_is_refused_before_anything_is_loaded_or_written(tmp_path):
  good, unloaded = json.dumps(_of(1)), functools.partial(pytest.fail, "the verifier was loaded")
  for name, text, message in (
    ("in.jsonl", good + "\n{", r"in\.jsonl:2: not JSON"),
    ("in.jsonl", good + "\n" + json.dumps({"custom_id": "a", "response": None}), "format openai_batch in a file that"),
    ("in.jsonl", json.dumps({"custom_id": "a", "response": None}), "give --inputs=FILE"),
    ("in.jsonl", json.dumps({"problem_id": "a", "solution": "7"}), "no question in it"),
    ("in.yaml", "prompt: a\nverifications: []", "give the folder of the samples"),
    ("in.jsonl", "", "no row in it"),
  ):
    (tmp_path / name).write_text(text)
    refused((message, score_file, Job(tmp_path / name, tmp_path / "out"), unloaded))
    (tmp_path / name).unlink()
  (tmp_path / "in.jsonl").write_text(good)
  refused(("in.jsonl: exists already", score_file, Job(tmp_path / "in.jsonl", tmp_path / "in.jsonl"), unloaded))
  assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_text_that_the_tokenizer_lacks_is_no_score_of_0(tmp_path, monkeypatch):
  run = saved_runs.run_of(tmp_path / "run", verifiers__genrm__init_from="")  # a tokenizer of characters
  verifier = genrm_jax.load(saved_runs.save(run, "genrm"), mesh=sharding.make_mesh(devices=jax.devices()[:1]))
  (tmp_path / "in.jsonl").write_text("".join(json.dumps(dict(question="3mike4dan;", solution=s)) + "\n" for s in "e世"))
  first, second = _rows(score_file(Job(tmp_path / "in.jsonl", tmp_path / "out.jsonl"), lambda: verifier))
  assert first["genrm_score"] == pytest.approx(verifier.score("3mike4dan;", "e"), rel=1e-5)
  assert second["genrm_score"] is None and "the tokenizer cannot encode" in second["genrm_skipped"]
  nan = dataclasses.replace(verifier.votes("3mike4dan;", "e")[0], p_yes=float("nan"))
  monkeypatch.setattr(scoring, "score_pairs", lambda *args: [[nan]] * len(args[2]))
  refused(
    (r"in\.jsonl:1: the score is no number", score_file, Job(tmp_path / "in.jsonl", tmp_path / "b"), lambda: verifier)
  )


def test_the_examples_of_the_page(checkpoint, tmp_path):
  page = (processes.ROOT / "docs/candidates.md").read_text()
  python, shell = re.findall(r"```python\n(.*?)```", page, re.DOTALL), re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
  rows = re.search(r"```json\n(.*?)```", page, re.DOTALL)[1]
  (tmp_path / "mine.jsonl").write_text(rows)
  exec("".join(python).replace('"mine.jsonl"', repr(str(tmp_path / "mine.jsonl"))), {})
  command = shell[0].replace("\\\n", " ").replace("RUN/checkpoints/genrm_cot", str(checkpoint)).split()
  assert command[:2] == ["genrm-jax", "score"]
  code = "from genrm_jax.pipeline.cli import console; console()"
  environ = {"cwd": tmp_path, "capture_output": True, "text": True}
  done = subprocess.run([sys.executable, "-c", code, *command[1:]], **environ)
  assert done.returncode == 0, done.stderr
  scored = _rows(pathlib.Path(tmp_path / "scored.jsonl"))
  assert len(scored) == rows.count("\n") and all(0 <= row["genrm_score"] <= 1 for row in scored)
