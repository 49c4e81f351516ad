"""Examples are aligned and packed whole, in memory and in files; solutions are chosen, and read from a user's file."""

import collections
import dataclasses
import json

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from refusals import refused

from genrm_jax.data import candidates, packing, row_file
from genrm_jax.data.readers import read_candidates
from genrm_jax.pytrees import KIND_PAD, KIND_SOLVE, PairBatch, TokenBatch
from genrm_jax.records import Candidate, Problem
from genrm_jax.tasks.gsm8k.task import GSM8K

FIELDS = [f.name for f in dataclasses.fields(TokenBatch)]
OF_EXAMPLE = ("tokens", "targets", "weights", "kind", "positions")


def _example(i, length):
  """An example whose tokens, targets and positions tell which one it is."""
  own = 1000 * (i + 1) + np.arange(length, dtype=np.int32)
  weights = (np.arange(length) % 3 == i % 3).astype(np.float32)
  kind = np.where(weights > 0, 1 + i % 2, KIND_PAD).astype(np.int32)
  segments = np.ones(length, np.int32)
  return packing.Example(f"example {i}", own, own + 1, weights, kind, (7 * own).astype(np.int32), segments)


def _rows(num_rows, row_length=2):
  return packing.pack([_example(i, row_length) for i in range(num_rows)], row_length)


def _same(got, want):
  assert type(got) is type(want)
  for field in dataclasses.fields(want):
    a, b = getattr(got, field.name), getattr(want, field.name)
    assert a.dtype == b.dtype == (np.float32 if field.name in ("weights", "reference") else np.int32), field.name
    np.testing.assert_array_equal(a, b, field.name)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=40), st.integers(0, 9))
def test_pack_keeps_every_example_once_and_whole(lengths, spare):
  examples = [_example(i, n) for i, n in enumerate(lengths)]
  rows = packing.pack(examples, max(lengths) + spare)
  data, found = rows.data, []
  assert (rows.num_examples, data.tokens.shape) == (len(examples), (rows.num_rows, max(lengths) + spare))
  for r, segments in enumerate(data.segments):
    used = int((segments > 0).sum())
    assert (segments[used:] == 0).all() and used > 0, "padding stands at the end, and no row is only padding"
    steps = np.diff(np.concatenate([[0], segments[:used]]))
    assert set(steps.tolist()) <= {0, 1}, "segments count from 1, each in one piece"
    for segment in range(1, segments.max() + 1):
      at = segments == segment
      found.append(int(data.tokens[r, at][0]) // 1000 - 1)
      for name in OF_EXAMPLE:
        np.testing.assert_array_equal(getattr(data, name)[r, at], getattr(examples[found[-1]], name), name)
    for name in FIELDS:
      assert not getattr(data, name)[r, used:].any(), f"{name} of the padding"
  assert sorted(found) == list(range(len(examples)))
  assert rows.max_targets == max(int(row.sum()) for row in data.weights)
  refused((r"example \d+ has \d+ tokens", packing.pack, examples, max(lengths) - 1))


def test_rows_are_filled_and_pairs_share_a_row():
  rows = packing.pack([_example(i, n) for i, n in enumerate([6, 5, 4, 3, 2])], 10)
  assert rows.num_rows == 2 and (rows.data.segments > 0).all()
  refused(("no training examples", packing.pack, [], 8))
  lengths = [(4, 4), (1, 2), (3, 1), (2, 2)]
  pairs = [packing.pair(f"{i}", _example(2 * i, n), _example(2 * i + 1, m)) for i, (n, m) in enumerate(lengths)]
  rows = packing.pack(pairs, 8)
  assert rows.num_rows == 3 and rows.max_pairs == 2 and packing.pack(pairs[:1], 9).max_pairs == 1
  assert sorted(row.max() for row in rows.data.segments) == [2, 2, 4]
  for tokens, segments in zip(rows.data.tokens, rows.data.segments, strict=True):
    for p in range(segments.max() // 2):
      chosen, rejected = (int(tokens[segments == 2 * p + half][0]) // 1000 - 1 for half in (1, 2))
      assert rejected == chosen + 1 and chosen % 2 == 0
  rows = _rows(3)
  assert _rows(3).digest == rows.digest
  digests = {rows.digest, packing.Rows(rows.take(np.array([1, 0, 2])), rows.num_examples).digest}
  for field in FIELDS:
    changed = getattr(rows.data, field).copy()
    changed[2, 1] += 1
    digests.add(dataclasses.replace(rows, data=rows.data.replace(**{field: changed})).digest)
  assert len(digests) == 2 + len(FIELDS)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 2**31))
def test_an_epoch_has_every_row_once_in_an_order_of_seed_and_step(num_rows, batch_size, seed):
  rows, num_epochs = _rows(num_rows), 3
  steps = -(-num_epochs * num_rows // batch_size)
  seen = [i for step in range(steps) for i in rows.order(seed, step, batch_size)]
  for epoch in range(num_epochs):
    assert sorted(seen[epoch * num_rows : (epoch + 1) * num_rows]) == list(range(num_rows))
  rows = _rows(50)
  orders = [rows.order(seed, step, 50).tolist() for seed, step in ((0, 0), (0, 1), (0, 2), (1, 0))]
  assert len({*map(tuple, orders), tuple(range(50))}) == 5, "orders differ by epoch and seed"
  assert [i for step in range(5) for i in _rows(50).order(0, step, 10)] == orders[0]


@settings(max_examples=60, deadline=None)
@given(
  st.lists(st.integers(0, 5), min_size=1, max_size=30),
  st.dictionaries(st.integers(0, 5), st.integers(0, 8)),
  st.integers(0, 2**31),
)
def test_gaps_follow_the_named_tokens_only(tokens, max_gaps, seed):
  e = packing.sft_example("e", tokens, [1, 2], KIND_SOLVE)
  got = packing.with_gaps(e, max_gaps, np.random.default_rng(seed))
  for name in ("tokens", "targets", "weights", "kind"):
    np.testing.assert_array_equal(getattr(got, name), getattr(e, name), name)
  assert got.name == e.name and got.positions.dtype == np.int32 and got.positions[0] == 0
  limits = np.array([max_gaps.get(t, 0) for t in e.tokens[:-1].tolist()])
  gaps = np.diff(got.positions) - 1
  assert ((gaps >= 0) & (gaps <= limits)).all()
  e, rng = packing.sft_example("e", [5] * 40, [5, 1], KIND_SOLVE), np.random.default_rng(0)
  drawn = [np.diff(packing.with_gaps(e, {5: 6}, rng).positions) - 1 for _ in range(20)]
  assert set(np.concatenate(drawn).tolist()) == set(range(7)), "every size up to the limit occurs"


def _file(path, rows):
  row_file.write(path, rows.num_rows, rows.take)
  return row_file.RowFile(path)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 4), st.data())
def test_rows_of_memory_and_of_a_file(tmp_path_factory, num_rows, at_a_time, data):
  rows, path = _rows(num_rows), tmp_path_factory.mktemp("rows") / "new" / "train.npy"
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(row_file, "_ROWS_AT_A_TIME", at_a_time)
    file = _file(path, rows)
  records = np.load(path)  # NumPy reads the file too
  _same(TokenBatch(**{name: records[name] for name in records.dtype.names}), rows.data)
  index = np.asarray(data.draw(st.lists(st.integers(-1, num_rows - 1), min_size=1, max_size=12)))
  want = {name: np.stack([field[i] * (i >= 0) for i in index]) for name, field in vars(rows.data).items()}
  for source in (rows, file):
    taken = source.take(index)
    for name in FIELDS:
      np.testing.assert_array_equal(getattr(taken, name), want[name], name)
    assert source.num_rows == num_rows
  _same(file.take(index), rows.take(index))
  np.testing.assert_array_equal(file.order(3, 2, 4), rows.order(3, 2, 4))
  log_probs = np.random.default_rng(0).normal(size=rows.data.tokens.shape).astype(np.float32)
  taken = file.with_reference(log_probs).take(index)
  assert isinstance(taken, PairBatch)
  _same(taken, rows.with_reference(log_probs).take(index))


def test_only_the_needed_rows_are_read_and_a_missing_or_truncated_file_is_named(tmp_path, monkeypatch):
  path, ranges = tmp_path / "train.npy", []
  refused((r"train\.npy: no such file", row_file.RowFile, path))
  file, row = _file(path, _rows(40)), 2 * len(FIELDS) * 4
  read, start = type(file._files).cat_ranges, path.stat().st_size - 40 * row  # the header precedes the rows

  def recorded(self, paths, starts, ends, **kwargs):
    ranges.extend(zip(starts, ends, strict=True))
    return read(self, paths, starts, ends, **kwargs)

  monkeypatch.setattr(type(file._files), "cat_ranges", recorded)
  file.take(np.array([7, -1, 30]))
  assert ranges == [(start + i * row, start + (i + 1) * row) for i in (7, 30)]
  path.write_bytes(path.read_bytes()[:-4])
  file.take(np.array([38]))
  refused((r"train\.npy: a row cannot be read \(the file was cut\)", file.take, np.array([38, 39])))
  path.unlink()
  refused((r"train\.npy: a row cannot be read \(.*No such file", file.take, np.array([38])))


def _candidates(marks):
  return [Candidate(f"p{p}", i, f"text {t}", None, correct, "test") for i, (p, t, correct) in enumerate(marks)]


POOLS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6), st.booleans()), max_size=60).map(_candidates)


@settings(max_examples=80, deadline=None)
@given(POOLS, st.integers(1, 4), st.booleans(), st.integers(0, 2**31))
def test_choice_is_capped_distinct_and_balanced(pool, max_per_label, balanced, seed):
  first = {(c.problem_id, c.text): c for c in reversed(pool)}
  distinct = candidates.distinct(pool)
  assert distinct == sorted(first.values(), key=lambda c: c.index)
  there = collections.Counter((c.problem_id, c.correct) for c in distinct)
  room = {label: sum(min(n, max_per_label) for (_, of), n in there.items() if of is label) for label in (True, False)}
  assume(room[True] and room[False])
  got = candidates.choose_for_training(pool, max_per_label, balanced, seed)
  indices = [c.index for c in got]
  assert len(set(indices)) == len(indices) and set(indices) <= {c.index for c in distinct}
  assert all(c is pool[c.index] for c in got)
  assert max(collections.Counter((c.problem_id, c.correct) for c in got).values()) <= max_per_label
  sizes = {label: sum(c.correct is label for c in got) for label in (True, False)}
  assert sizes == (dict.fromkeys(room, min(room.values())) if balanced else room)
  assert got == candidates.choose_for_training(pool, max_per_label, balanced, seed)


@settings(max_examples=80, deadline=None)
@given(POOLS, st.integers(1, 7), st.integers(0, 2**31))
def test_pairs_are_capped_distinct_and_of_one_problem(pool, max_pairs, seed):
  sides = collections.Counter((c.problem_id, c.correct) for c in candidates.distinct(pool))
  problems = {c.problem_id for c in pool}
  room = {p: min(max_pairs, sides[p, True] * sides[p, False]) for p in problems}
  assume(any(room.values()))
  got = candidates.choose_pairs(pool, max_pairs, seed)
  assert all(a.correct and not b.correct and a.problem_id == b.problem_id for a, b in got)
  assert len({(a.problem_id, a.text, b.text) for a, b in got}) == len(got)
  assert collections.Counter(a.problem_id for a, _ in got) == +collections.Counter(room)
  assert all(c is pool[c.index] for pair in got for c in pair)
  assert got == candidates.choose_pairs(pool, max_pairs, seed)


def test_choices_are_drawn_from_everything_and_need_both_labels():
  pool = _candidates([(p, t, t < 3) for p in range(2) for t in range(7)])
  drawn = [candidates.choose_pairs(pool, 2, seed) for seed in range(40)]
  assert len({(a.index, b.index) for pairs in drawn for a, b in pairs}) > 22, "nearly each of 24 pairs"
  assert len(candidates.choose_pairs(pool, 99, 0)) == 24
  pool = _candidates([(p, t, t == 0) for p in range(4) for t in range(9)])
  drawn = [candidates.choose_for_training(pool, 2, True, seed) for seed in range(20)]
  assert len({c.index for chosen in drawn for c in chosen}) > 28, "nearly each of 36 solutions"
  right, wrong = _candidates([(0, 0, True), (1, 1, True)]), _candidates([(2, 2, False)])
  refused(
    ("none of 3 problems has both", candidates.choose_pairs, [*right, *wrong], 4, 0),
    ("2 correct and 0 incorrect", candidates.choose_for_training, right, 16, True, 0),
    ("0 correct and 1 incorrect", candidates.choose_for_training, wrong, 16, True, 0),
  )


QUESTIONS = ("How  many\na?", "How many b?", "Twice?", "Twice?")
OF_USER = [Problem(f"p{i}", "gsm8k", "train", q, "7") for i, q in enumerate(QUESTIONS)]
GOOD = {"question": "How many b?", "solution": "The answer is 7."}


def _read(tmp_path, *rows):
  path = tmp_path / "mine.jsonl"
  path.write_bytes(b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows))
  return read_candidates(path, OF_USER, GSM8K())


def test_lines_are_matched_graded_and_counted(tmp_path):
  rows, expected = zip(
    ({"question": " How many  a?", "solution": "The answer is $7.00."}, ("p0", 0, "7", True)),
    ({"problem_id": "p1", "solution": "Twice: \\boxed{8}."}, ("p1", 0, "8", False)),
    ({"problem_id": "p1", "solution": "No: $\\boxed{7}$"}, ("p1", 1, "7", True)),
    ({"problem_id": "p0", "solution": "The answer is 8."}, ("p0", 1, "8", False)),
    ({"problem_id": "p2", "solution": "Seven it is.", "correct": True}, ("p2", 0, None, True)),
    ({"question": "How many a?", "solution": "The answer is 7.", "correct": False}, ("p0", 2, "7", False)),
    strict=True,
  )
  found = _read(tmp_path, *rows)
  assert [(c.problem_id, c.index, c.answer, c.correct) for c in found] == list(expected)
  assert [c.text for c in found] == [row["solution"] for row in rows]
  assert {c.source for c in found} == {"mine.jsonl"}


def test_a_wrong_line_or_file_is_named(tmp_path):
  for row, message in (
    *((line, "not JSON") for line in (b"{", b"[" * 100_000, b"\xff", b'{"solution": NaN}')),
    ([1], "expected a JSON object"),
    *((GOOD | {f: "half \ud83d"}, f'field "{f}" has half of a surrogate pair') for f in ("solution", "question")),
    (GOOD | {"label": 1}, 'unknown field "label"'),
    *((row, 'give one of the fields "question"') for row in (GOOD | {"problem_id": "p1"}, {"solution": "s"})),
    ({"problem_id": "p1"}, 'field "solution" is missing'),
    *((GOOD | {"solution": value}, 'field "solution" is ') for value in (" \n", None)),
    (GOOD | {"question": 3}, 'field "question" is 3'),
    (GOOD | {"question": "Who?" * 30}, r'field "question" is "Who\?.*\.\.\., none of'),
    (GOOD | {"question": "Twice?"}, 'field "question" is "Twice[?]", that of 2 problems'),
    ({"problem_id": "p9", "solution": "s"}, 'field "problem_id" is "p9", none of the 4 problems'),
    *((GOOD | {"correct": value}, 'field "correct" is ') for value in (1, None)),
  ):
    refused((rf"mine\.jsonl:3: {message}", _read, tmp_path, GOOD, b" ", row, GOOD))
  assert len(_read(tmp_path, GOOD, b"", GOOD, b"\t", b"")) == 2, "blank lines are skipped"
  for path, shown in ((tmp_path / "none.jsonl", r"none\.jsonl"), (tmp_path, ""), (f"{tmp_path}/\0", "\0")):
    refused((f"{shown}: could not be read", read_candidates, path, OF_USER, GSM8K()))
  refused((r"mine\.jsonl: no line", _read, tmp_path))
