"""GSM8K's problems are read from files and from TFDS; errors name file and line."""

import json
import sys
import types

import pytest

from genrm_jax.runtime.errors import UserError
from genrm_jax.tasks.gsm8k import problems as gsm8k
from genrm_jax.tasks.gsm8k.answers import extract_answer


def _write_problems(folder, rows):
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "train.jsonl").write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
  return folder


ROW = {"question": " How many? ", "answer": "Half is 48/2 = <<48/2=24>>24.\nAll is <<1000+24=1024>>1,024.\n#### 1,024"}


@pytest.mark.parametrize("inside", ["grade-school-math/grade_school_math/data", "grade_school_math/data", ""])
def test_problems_from_files(inside, tmp_path):
  _write_problems(tmp_path / inside, [ROW, ROW])
  first, second = gsm8k.read_problems(tmp_path, "train")
  assert (first.id, second.id, first.split, first.task) == ("gsm8k/train/00000", "gsm8k/train/00001", "train", "gsm8k")
  assert (first.question, first.answer) == ("How many?", "1024")
  assert first.reference == "Half is 48/2 = 24.\nAll is 1,024.\nThe answer is 1024."


@pytest.mark.parametrize(
  ("row", "message"),
  [
    *((row, "not JSON") for row in ("", "{", "[" * 100_000)),
    ("[]", "not a JSON object"),
    ({"answer": "#### 1"}, 'field "question" is missing'),
    ({"question": "q", "answer": 1}, 'field "answer" is not text'),
    *(({"question": "q", "answer": text}, 'field "answer" does not end in') for text in ("1", "1 #### ")),
  ],
)
def test_broken_problem_lines(row, message, tmp_path):
  _write_problems(tmp_path, [ROW, row])
  with pytest.raises(UserError, match=rf"train\.jsonl:2: {message}"):
    gsm8k.read_problems(tmp_path, "train")


def test_missing_problems(tmp_path):
  with pytest.raises(UserError, match=rf"{tmp_path / 'test.jsonl'}; git clone"):
    gsm8k.read_problems(tmp_path, "test")
  for read in (lambda split: gsm8k.read_problems(tmp_path, split), gsm8k.read_problems_tfds):
    with pytest.raises(UserError, match="no split 'val'"):
      read("val")


def test_real_problems(data_dir):
  train, test = gsm8k.read_problems(data_dir, "train"), gsm8k.read_problems(data_dir, "test")
  assert (len(train), len(test)) == (7473, 1319)
  for problem in train + test:
    assert int(problem.answer) is not None and "<<" not in problem.reference and "####" not in problem.reference
    assert extract_answer(problem.reference) == problem.answer
  assert len({gsm8k.problem_key(p.question) for p in train + test}) == 7473 + 1319


TFDS_MODULES = ("tensorflow_datasets", "tensorflow_datasets.text", "tensorflow_datasets.text.gsm8k")


def _fake_tfds(monkeypatch, builder):
  for name in ("importlib_resources", *TFDS_MODULES):
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
  sys.modules[TFDS_MODULES[-1]].gsm8k = types.SimpleNamespace(Gsm8k=builder)


def test_problems_from_tfds_rows(monkeypatch):
  class Builder:
    def __init__(self, data_dir, file_format):
      assert (data_dir, file_format) == ("somewhere", "array_record")

    def download_and_prepare(self):
      pass

    def as_data_source(self, split):
      assert split == "train"
      return [{k: v.encode() for k, v in ROW.items()} | {"annotation": b"", "short_answer": b""}]

  def no_network(**_):
    raise ConnectionError("no route")

  _fake_tfds(monkeypatch, Builder)
  (problem,) = gsm8k.read_problems_tfds("train", "somewhere")
  assert (problem.id, problem.question, problem.answer) == ("gsm8k/train/tfds-00000", "How many?", "1024")
  _fake_tfds(monkeypatch, no_network)
  with pytest.raises(UserError, match=r"TFDS could not give gsm8k/test .*ConnectionError: no route"):
    gsm8k.read_problems_tfds("test")
  monkeypatch.setitem(sys.modules, TFDS_MODULES[-1], None)
  with pytest.raises(UserError, match=r"pip install 'genrm-jax\[tfds\]'"):
    gsm8k.read_problems_tfds("train")


def test_problems_from_real_tfds(data_dir, tmp_path, monkeypatch):
  # Other packages bring TFDS without what it needs here.
  for package in ("importlib_resources", "array_record"):
    pytest.importorskip(package, reason="needs genrm-jax[tfds]")
  tfds = pytest.importorskip("tensorflow_datasets", reason="needs genrm-jax[tfds]")
  without = "tensorflow" not in sys.modules  # another test may have brought it
  files = data_dir / "grade-school-math/grade_school_math/data"

  def local(_, urls):  # the dataset's own builder, with files instead of downloads
    return {name: files / f"{name.removesuffix('_socratic')}.jsonl" for name in urls}

  monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", local)
  problems = gsm8k.read_problems_tfds("test", tmp_path)
  content = {(p.question, p.answer, p.reference) for p in problems}
  assert content == {(p.question, p.answer, p.reference) for p in gsm8k.read_problems(data_dir, "test")}
  assert ("tensorflow" not in sys.modules) == without
