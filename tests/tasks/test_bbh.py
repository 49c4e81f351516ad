"""The problems of BIG-Bench Hard are read as they are, and a file that is not theirs is named."""

import collections
import json
import re

import pytest

from genrm_jax.runtime.errors import UserError
from genrm_jax.tasks.word_sorting import WordSorting, listed_words, read_bbh

NATURAL = WordSorting(style="natural")


def test_bbh(data_dir):
  problems = read_bbh(data_dir)
  assert len(problems) == 250
  lengths = collections.Counter(len(p.answer.split()) for p in problems)
  assert set(lengths) == set(range(2, 21)) and (lengths[2], lengths[5], lengths[20]) == (13, 12, 20)
  for i, p in enumerate(problems):
    words = p.question.partition("List: ")[2].split(" ")
    assert p.answer == " ".join(sorted(words)) and len(set(words)) == len(words)
    assert listed_words(p) == words, "no word loses its marks"
    assert (p.id, p.split, p.reference) == (f"word_sorting/bbh/{i:05d}", "bbh", "")
    assert NATURAL.rationale(p, f"So the answer is {p.answer}.")[1]
    assert not NATURAL.rationale(p, f"So the answer is {' '.join(reversed(p.answer.split()))}.")[1]
  assert sum(not w.isalpha() for p in problems for w in p.answer.split()) == 15
  clone = data_dir / "BIG-Bench-Hard"
  for place in (clone, clone / "bbh", clone / "bbh" / "word_sorting.json", str(clone)):
    assert read_bbh(place) == problems


GOOD = {"input": "Sort the following words alphabetically: List: b a", "target": "a b"}


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("{", "not a BIG-Bench Hard task"),
    ("[]", "not a BIG-Bench Hard task"),
    ('{"examples": [{"input": "x"}]}', "not a BIG-Bench Hard task.*'target'"),
    (json.dumps({"examples": [GOOD, {**GOOD, "target": "b a"}]}), "example 1 is not .* with the sorted list"),
    (json.dumps({"examples": [{**GOOD, "input": "Sort b a"}]}), "example 0 is not "),
    (json.dumps({"examples": [{**GOOD, "input": 3}]}), "example 0 is not "),
    (json.dumps({"examples": [{"input": GOOD["input"][:-4], "target": ""}]}), "example 0 is not "),
  ],
)
def test_bad_bbh_files_are_named(tmp_path, text, message):
  path = tmp_path / "word_sorting.json"
  path.write_text(json.dumps({"examples": [GOOD]}))
  assert [p.answer for p in read_bbh(path)] == ["a b"]
  path.write_text(text)
  with pytest.raises(UserError, match=f"{re.escape(str(path))}: {message}.*fresh clone"):
    read_bbh(tmp_path)


def test_a_missing_bbh_file_is_named_with_the_remedy(tmp_path):
  with pytest.raises(UserError, match=rf"looked for {re.escape(str(tmp_path))}.*git clone https://github.com/suzgun"):
    read_bbh(tmp_path)
