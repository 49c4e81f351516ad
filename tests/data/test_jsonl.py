"""Records round-trip; errors name file, line and field; writes are atomic."""

import dataclasses
import errno
import json
import os
import pathlib
import re

import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused

from genrm_jax.data import jsonl
from genrm_jax.records import VOTE_STATES, Candidate, Problem, Rationale, Score, Vote
from genrm_jax.runtime.errors import UserError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)  # every code point but halves of surrogate pairs
ANY_TEXT = st.text(st.characters(), max_size=30)
INT = st.integers(-(2**63), 2**63)
PROBABILITY = st.none() | st.floats(0, 1)
VOTE = st.builds(Vote, st.sampled_from(VOTE_STATES), PROBABILITY, PROBABILITY, INT, TEXT)
RECORDS = {
  Problem: st.builds(Problem, TEXT, TEXT, TEXT, TEXT, TEXT, TEXT),
  Candidate: st.builds(Candidate, TEXT, INT, TEXT, st.none() | TEXT, st.booleans(), TEXT),
  Rationale: st.builds(Rationale, TEXT, INT, INT, TEXT, st.none() | st.booleans(), TEXT, st.booleans(), TEXT),
  Score: st.builds(Score, TEXT, INT, TEXT, INT, PROBABILITY, st.lists(VOTE, max_size=3).map(tuple)),
}
PROBLEM = Problem("last/0", "last", "train", 'Take "a\nb"\u2028\x85\r\n☃', "7")
VALID = {"schema": 1, "id": "p", "task": "t", "split": "train", "question": "q", "answer": "a"}
SCORE = {"schema": 1, "problem_id": "p", "candidate_index": 0, "verifier": "orm", "step": 1, "value": 0.5}
A_VOTE = {"state": "ok", "p_yes": 0.5, "p_no": 0.5, "num_tokens": 3}


@pytest.mark.parametrize("cls", RECORDS, ids=lambda cls: cls.__name__)
def test_round_trip(cls, tmp_path):
  path = tmp_path / "records.jsonl"

  @settings(max_examples=40, deadline=None)
  @given(st.lists(RECORDS[cls], max_size=4))
  def check(records):
    assert jsonl.write_records(path, iter(records)) == len(records)
    assert jsonl.read_records(path, cls) == records
    assert len(path.read_bytes().splitlines()) == len(records)  # line breaks inside a text are escaped
    assert os.listdir(tmp_path) == ["records.jsonl"]

  check()


def test_lines_have_a_schema_and_may_omit_defaults(tmp_path):
  path = tmp_path / "deep" / "er" / "p.jsonl"
  jsonl.write_records(path, [PROBLEM])
  line = path.read_text(encoding="utf-8")
  assert line.startswith('{"schema": 1, "id": "last/0"') and "☃" in line
  path.write_text(json.dumps(VALID))  # no newline at the end either
  assert jsonl.read_records(path, Problem) == [Problem("p", "t", "train", "q", "a", "")]
  path.write_text(json.dumps(SCORE | {"value": 1}) + "\nbroken\n")
  scores = jsonl.iter_records(path, Score)
  score = next(scores)  # the second line is not read yet
  assert score.value == 1.0 and type(score.value) is float and score.votes == ()
  refused((":2: not JSON", next, scores))
  path, scores = tmp_path / "orm.jsonl", [Score("p", i, "orm", 1, 0.5) for i in range(2)]
  jsonl.write_records(path, scores)
  assert jsonl.read_scores(path, "orm") == scores
  jsonl.write_records(path, [scores[0], dataclasses.replace(scores[1], verifier="genrm")])
  refused((r"orm\.jsonl:2: a score of verifier 'genrm' in the file of 'orm'", jsonl.read_scores, path, "orm"))


def test_a_broken_line_is_named(tmp_path):
  path = tmp_path / "p.jsonl"
  for cls, line, message in (
    *((Problem, line, "not JSON") for line in ("{'a': 1}", '{"schema": 1', "1" * 5000, "[" * 100_000, "[" * 10**6)),
    (Problem, b'{"schema": \xff}', "not JSON: byte 12 is not UTF-8 (invalid start byte); save the file as UTF-8"),
    *(
      (Problem, {"question": f"a{half}b"}, 'field "question" has half of')
      for half in ("\ud83d", "\udc00", "\udc00\ud83d")
    ),
    (Problem, b'{"schema": 1, "id": "\xed\xa0\xbd"}', 'field "id" has half of a surrogate pair'),
    (Score, {"votes": [A_VOTE, A_VOTE | {"text": "\ud83d"}]}, 'field "votes[1].text" has half of a surrogate pair'),
    *((Problem, "[" * n + "]" * n, "") for n in (900, 9000)),
    *((Problem, '{"\\u0061": ' + "[" * n + '"\\ud83d"' + "]" * n + "}", "") for n in (900, 9000)),
    (Problem, {"\ud83d": "x"}, 'field "\\ud83d" has half of a surrogate pair'),
    *((Problem, line, "expected a JSON object") for line in ("[1]", "null", '"text"')),
    (Problem, {"schema": ...}, 'no field "schema"'),
    *((Problem, {"schema": schema}, f"schema {schema!r}") for schema in (2, True, "1")),
    (Problem, {"question": ...}, 'no field "question"'),
    (Problem, {"anwser": "7"}, 'unknown field "anwser"'),
    *((Problem, {"answer": answer}, 'field "answer" is ') for answer in (7, None, ["7"])),
    *((Score, {"value": value}, 'field "value" is ') for value in (True, "0.5", 10**400)),
    (Score, '{"schema": 1, "value": NaN}', "NaN"),
    (Score, json.dumps(SCORE).replace("0.5", "1e999"), 'field "value" is Infinity, expected a finite number'),
    *((Score, {"step": step}, 'field "step" is ') for step in (1.0, True)),
    *((Score, {"votes": votes}, f'"votes{name}" is ') for votes, name in (({}, ""), ([A_VOTE, 1], "[1]"))),
    (Score, {"votes": [A_VOTE | {"p": 1}]}, 'field "votes[0].p"'),
    (Score, {"votes": [{}]}, 'field "votes[0].state"'),
    (Score, {"votes": [A_VOTE | {"p_yes": "x"}]}, 'field "votes[0].p_yes" is'),
  ):
    valid = {Problem: VALID, Score: SCORE}[cls]
    if isinstance(line, dict):  # changes of a valid line
      line = json.dumps({k: v for k, v in (valid | line).items() if v is not ...})
    line = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(b"%s\n  \n%s\n" % (json.dumps(valid).encode(), line))  # blank lines are skipped, and counted
    refused((re.escape(f"{path}:3: ") + ".*" + re.escape(message), jsonl.read_records, path, cls))


@settings(max_examples=80, deadline=None)
@given(line=st.binary(max_size=60) | st.recursive(st.none() | st.booleans() | INT | ANY_TEXT, st.lists).map(json.dumps))
def test_no_line_raises_anything_but_user_error(line, tmp_path_factory):
  path = tmp_path_factory.getbasetemp() / "any.jsonl"
  path.write_bytes(line if isinstance(line, bytes) else line.encode())
  try:
    jsonl.read_records(path, Candidate)
  except UserError as e:
    assert str(path) in str(e)


@pytest.mark.parametrize("when", ["producer", "write", "fsync", "replace", "value", "text"])
def test_a_failed_write_leaves_the_old_file(when, tmp_path, monkeypatch):
  path, file_type = tmp_path / "p.jsonl", type(epath.Path("x"))
  jsonl.write_records(path, [PROBLEM])
  opened = file_type.open

  def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")

  def produce():
    yield Score("\ud83d" if when == "text" else "p", 0, "orm", 1, float("nan") if when == "value" else 0.5)
    for _ in range(5000):  # so that a buffer fails in the middle
      yield PROBLEM
    if when == "producer":
      full()

  with monkeypatch.context() as patch:
    if when == "write":
      if not pathlib.Path("/dev/full").exists():
        pytest.skip("needs /dev/full, a device that is always full")
      patch.setattr(file_type, "open", lambda self, mode: opened(epath.Path("/dev/full"), mode))
    elif when in ("fsync", "replace"):
      patch.setattr(os, when, full)
    error, message = {
      "producer": (OSError, "No space"),  # keeps its type: it may be about another file
      "value": (UserError, r"p\.jsonl:1: a value that JSON cannot hold"),
      "text": (UserError, r"p\.jsonl:1: the record has half of a surrogate pair, '.ud83d', at character \d+"),
    }.get(when, (UserError, r"p\.jsonl: the disk is full"))
    with pytest.raises(error, match=message):
      jsonl.write_records(path, produce())
  assert jsonl.read_records(path, Problem) == [PROBLEM]
  assert os.listdir(tmp_path) == ["p.jsonl"]


def test_places_that_cannot_be_used_and_json_of_another_shape_are_named(tmp_path):
  for read in (lambda p: jsonl.read_records(p, Problem), jsonl.read_json, jsonl.file_digest):
    refused((r"nowhere\.jsonl: no such file", read, tmp_path / "nowhere.jsonl"))
    refused(*(("could not be read", read, path) for path in (tmp_path, f"{tmp_path}/a\0b", "\ud83d")))
  (tmp_path / "file").write_text("")
  (tmp_path / "folder" / "inner").mkdir(parents=True)
  for path in (tmp_path / "file" / "p.jsonl", tmp_path / "folder", f"{tmp_path}/a\0b"):
    refused(("could not be written", jsonl.write_json, path, {}))
  assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
  path, shape = tmp_path / "o.json", {"train": {"rows": int, "of": float}}
  jsonl.write_json(path, {"train": {"rows": 3, "of": 1.5, "more": None}})
  assert jsonl.read_object(path, shape) == jsonl.read_json(path)
  for changes, message in (
    ({"train": [1]}, r':2: field "train" is a list, expected an object'),
    ({"train": {"rows": "3", "of": 1.5}}, r':3: field "train.rows" is the string "3", expected a whole number'),
    ({"train": {"rows": True, "of": 1.5}}, r':3: field "train.rows" is true, expected a whole number'),
    ({"train": {"of": 1.5}}, r': no field "train.rows"'),
    ([1], r":1: the content is a list, expected an object"),
  ):
    jsonl.write_json(path, changes)
    message = re.escape(str(path)) + message + ".*; correct it, or remove the file and rerun"
    refused((message, jsonl.read_object, path, shape))
  path.write_text('{\n"train": }')
  refused((r"o\.json:2: not JSON: .* at character 10", jsonl.read_object, path, shape))


@settings(max_examples=40, deadline=None)
@given(
  st.dictionaries(ANY_TEXT, st.none() | st.booleans() | INT | ANY_TEXT | st.lists(ANY_TEXT, max_size=2), max_size=4)
)
def test_json_files_and_digests(tmp_path_factory, obj):
  path = tmp_path_factory.getbasetemp() / "o.json"
  jsonl.write_json(path, obj)
  assert jsonl.read_json(path) == obj
  assert jsonl.digest_of(obj) == jsonl.digest_of(dict(reversed(obj.items()))) != jsonl.digest_of({"more": obj})
  path.write_text('{"a": ')
  refused((r"o\.json: not JSON", jsonl.read_json, path))
  path.write_bytes(b"abc")
  assert jsonl.file_digest(path).startswith("ba7816bf8f01cfea414140de5dae2223")
  assert jsonl.digest_of([]).startswith("4f53cda18c2baa0c0354bb5f9a3ecbe5")
