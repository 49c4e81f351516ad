"""Selection against brute force over all subsets of small pools."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrm_jax.evals import selection
from genrm_jax.records import Candidate, Problem
from genrm_jax.runtime.errors import UserError

NAN = float("nan")


def bank_of(pools: list[list[tuple[str | None, bool]]]) -> selection.Bank:
  """A bank from (answer, correct) by problem."""
  problems = [Problem(f"p{row}", "toy", "eval", "?", "1") for row in range(len(pools))]
  candidates = [
    Candidate(f"p{row}", index, "", answer, correct, "test")
    for row, pool in enumerate(pools)
    for index, (answer, correct) in enumerate(pool)
  ]
  return selection.make_bank(problems, candidates)


def padded(rows: list[list[float]]) -> np.ndarray:
  width = max(map(len, rows))
  return np.array([row + [NAN] * (width - len(row)) for row in rows])


def brute_force(pool, values, n, choose) -> float:
  """The mean of `choose` over all subsets of n (of all, where there are fewer)."""
  subsets = list(itertools.combinations(range(len(pool)), min(n, len(pool))))
  return float(np.mean([choose([pool[i] for i in subset], [values[i] for i in subset]) for subset in subsets]))


def pick_best(pool, values) -> float:
  keys = [-1.0 if np.isnan(value) else value for value in values]
  return float(np.mean([right for (_, right), key in zip(pool, keys, strict=True) if key == max(keys)]))


def pick_answer(pool, values) -> float:
  totals: dict[str, float] = {}
  rights: dict[str, list[bool]] = {}
  for (answer, right), value in zip(pool, values, strict=True):
    if answer is not None:
      totals[answer] = totals.get(answer, 0.0) + (0.0 if np.isnan(value) else value)
      rights.setdefault(answer, []).append(right)
  winners = [answer for answer in totals if totals[answer] >= max(totals.values()) - 1e-9]
  return float(np.mean([np.mean(rights[answer]) for answer in winners])) if winners else 0.0


candidate = st.sampled_from([("1", True), ("2", False), ("3", False), (None, False), ("2", True)])
score = st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.9, NAN])
pools = st.lists(st.lists(st.tuples(candidate, score), min_size=1, max_size=7), min_size=1, max_size=4)


@settings(max_examples=80, deadline=None)
@given(pools=pools)
def test_expectations_equal_brute_force(pools):
  bank = bank_of([[one for one, _ in pool] for pool in pools])
  scores = [[value for _, value in pool] for pool in pools]
  values = padded(scores)
  for n in range(1, bank.mask.shape[1] + 1):
    subsets = selection.draw_subsets(bank, n, seed=0)
    majority, weighted = selection.self_consistency(bank, subsets), selection.self_consistency(bank, subsets, values)
    found = selection.best_of_n(bank, values, n), majority, weighted, selection.oracle(bank, n)
    ones = [[1.0] * len(row) for row in scores]
    for row, pool in enumerate(bank.candidates):
      plain = [(one.answer, one.correct) for one in pool]
      wanted = (
        brute_force(plain, scores[row], n, pick_best),
        brute_force(plain, ones[row], n, pick_answer),
        brute_force(plain, scores[row], n, pick_answer),
        brute_force(plain, ones[row], n, lambda chosen, _: float(any(right for _, right in chosen))),
      )
      np.testing.assert_allclose([one[row] for one in found], wanted, atol=1e-12)


@settings(max_examples=80, deadline=None)
@given(pools=pools)
def test_bounds(pools):
  bank = bank_of([[one for one, _ in pool] for pool in pools])
  values = padded([[value for _, value in pool] for pool in pools])
  np.testing.assert_allclose(selection.best_of_n(bank, values, 1), selection.pass_at_1(bank), atol=1e-12)
  np.testing.assert_allclose(selection.oracle(bank, 1), selection.pass_at_1(bank), atol=1e-12)
  before = np.zeros(len(pools))
  for n in range(1, bank.mask.shape[1] + 1):
    best, subsets = selection.oracle(bank, n), selection.draw_subsets(bank, n, seed=1)
    assert (best >= before - 1e-12).all()
    for method in (
      selection.best_of_n(bank, values, n),
      selection.self_consistency(bank, subsets),
      selection.self_consistency(bank, subsets, values),
    ):
      assert (method <= best + 1e-12).all() and (method >= -1e-12).all()
    before = best


def test_perfect_scores_reach_the_oracle_in_large_pools():
  rng = np.random.default_rng(0)
  bank = bank_of([[("1", bool(right)) for right in rng.random(256) < 0.02] for _ in range(5)])
  for n in (1, 2, 64, 255, 256):
    np.testing.assert_allclose(
      selection.best_of_n(bank, bank.correct.astype(float), n), selection.oracle(bank, n), atol=1e-12
    )


def test_the_drawn_example_of_the_docstring():
  bank = bank_of([[("1", True), ("2", False), ("1", True), ("3", False)]])
  assert selection.best_of_n(bank, np.array([[0.9, 0.7, 0.7, NAN]]), 2)[0] == pytest.approx(0.75)


def test_sampled_subsets_come_close_to_all_subsets_and_are_seeded():
  rng = np.random.default_rng(3)
  bank = bank_of(
    [
      [("1", True) if right else (f"w{i % 3}", False) for i, right in enumerate(rng.random(12) < 0.4)]
      for _ in range(40)
    ]
  )
  every, some = selection.draw_subsets(bank, 6, seed=0, draws=1000), selection.draw_subsets(bank, 6, seed=0, draws=400)
  assert every.members.shape[1] == 924 and some.members.shape[1] == 400
  assert (some.members.sum(axis=2) == 6).all()
  exact, near = selection.self_consistency(bank, every), selection.self_consistency(bank, some)
  assert abs(exact.mean() - near.mean()) < 0.5 / np.sqrt(400 * 40) * 3
  np.testing.assert_array_equal(some.members, selection.draw_subsets(bank, 6, seed=0, draws=400).members)
  assert (some.members != selection.draw_subsets(bank, 6, seed=1, draws=400).members).any()


def test_subsets_of_a_problem_do_not_depend_on_the_others():
  pool = [(str(i), i == 0) for i in range(16)]
  both, bigger = bank_of([pool, pool]), bank_of([pool, pool, pool + pool])
  ours, theirs = selection.draw_subsets(both, 8, seed=5), selection.draw_subsets(bigger, 8, seed=5)
  np.testing.assert_array_equal(ours.members, theirs.members[:2, :, :16])
  assert (ours.members[0] != ours.members[1]).any()


def test_candidates_are_put_in_order_of_index():
  problems = [Problem("a", "toy", "eval", "?", "1")]
  candidates = [Candidate("a", index, "", str(index), index == 1, "test") for index in (4, 1, 3)]
  bank = selection.make_bank(problems, candidates)
  assert [one.index for one in bank.candidates[0]] == [1, 3, 4]
  assert bank.correct.tolist() == [[True, False, False]]


@pytest.mark.parametrize(
  ("problem_ids", "candidate_keys", "message"),
  [
    ([], [], "no problems"),
    (["a", "b"], [("a", 0)], "'b' has no candidates"),
    (["a"], [("a", 0), ("z", 0)], "'z'"),
    (["a"], [("a", 2), ("a", 2)], "two candidates with index 2"),
    (["a", "a"], [("a", 0)], "'a' is given twice"),
  ],
)
def test_bad_input_is_named(problem_ids, candidate_keys, message):
  problems = [Problem(name, "toy", "eval", "?", "1") for name in problem_ids]
  candidates = [Candidate(name, index, "", "1", True, "test") for name, index in candidate_keys]
  with pytest.raises(UserError, match=message):
    selection.make_bank(problems, candidates)


@pytest.mark.parametrize("n", [0, 4])
def test_n_beyond_every_pool_is_refused(n):
  bank = bank_of([[("1", True)] * 3, [("1", True)]])
  for call in (selection.oracle, lambda *given: selection.draw_subsets(*given, seed=0)):
    with pytest.raises(UserError, match=f"n={n}"):
      call(bank, n)
  with pytest.raises(UserError, match=f"n={n}"):
    selection.best_of_n(bank, np.zeros((2, 3)), n)
