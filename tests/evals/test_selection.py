"""Selection against brute force over all subsets of small pools."""

import itertools
from functools import partial

import numpy as np
from evals_data import NAN, bank_of, padded
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused

from genrm_jax.evals import selection
from genrm_jax.records import Candidate, Problem


def brute_force(pool, values, n, choose) -> float:
  """The mean of `choose` over all subsets of n (of all candidates, if there are fewer)."""
  subsets = list(itertools.combinations(range(len(pool)), min(n, len(pool))))
  return float(np.mean([choose([pool[i] for i in subset], [values[i] for i in subset]) for subset in subsets]))


def pick_best(pool, values) -> float:
  keys = [-1.0 if np.isnan(value) else value for value in values]
  return float(np.mean([correct for (_, correct), key in zip(pool, keys, strict=True) if key == max(keys)]))


def pick_answer(pool, values) -> float:
  totals: dict[str, float] = {}
  labels: dict[str, list[bool]] = {}
  for (answer, correct), value in zip(pool, values, strict=True):
    if answer is not None:
      totals[answer] = totals.get(answer, 0.0) + (0.0 if np.isnan(value) else value)
      labels.setdefault(answer, []).append(correct)
  winners = [answer for answer in totals if totals[answer] >= max(totals.values()) - 1e-9]
  return float(np.mean([np.mean(labels[answer]) for answer in winners])) if winners else 0.0


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
        brute_force(plain, ones[row], n, lambda chosen, _: float(any(correct for _, correct in chosen))),
      )
      np.testing.assert_allclose([one[row] for one in found], wanted, atol=1e-12)


def test_perfect_scores_match_the_oracle_in_large_pools():
  rng = np.random.default_rng(0)
  bank = bank_of([[("1", bool(correct)) for correct in rng.random(256) < 0.02] for _ in range(5)])
  for n in (1, 2, 64, 255, 256):
    found = selection.best_of_n(bank, bank.correct.astype(float), n)
    np.testing.assert_allclose(found, selection.oracle(bank, n), atol=1e-12)


def test_sampled_subsets_approximate_all_subsets():
  rng = np.random.default_rng(3)
  labels = rng.random((40, 12)) < 0.4
  bank = bank_of([[("1", True) if label else (f"w{i % 3}", False) for i, label in enumerate(row)] for row in labels])
  every, some = selection.draw_subsets(bank, 6, seed=0, draws=1000), selection.draw_subsets(bank, 6, seed=0, draws=400)
  assert every.members.shape[1] == 924 and some.members.shape[1] == 400
  assert (some.members.sum(axis=2) == 6).all()
  exact, near = selection.self_consistency(bank, every), selection.self_consistency(bank, some)
  assert abs(exact.mean() - near.mean()) < 0.5 / np.sqrt(400 * 40) * 3
  np.testing.assert_array_equal(some.members, selection.draw_subsets(bank, 6, seed=0, draws=400).members)
  assert (some.members != selection.draw_subsets(bank, 6, seed=1, draws=400).members).any()


def test_subsets_of_a_problem_do_not_depend_on_other_problems():
  pool = [(str(i), i == 0) for i in range(16)]
  two, three = bank_of([pool, pool]), bank_of([pool, pool, pool + pool])
  of_two, of_three = selection.draw_subsets(two, 8, seed=5), selection.draw_subsets(three, 8, seed=5)
  np.testing.assert_array_equal(of_two.members, of_three.members[:2, :, :16])
  assert (of_two.members[0] != of_two.members[1]).any()


def test_bad_records_and_sizes_are_refused():
  def make(problem_ids, *keys):
    problems = [Problem(name, "toy", "eval", "?", "1") for name in problem_ids]
    return selection.make_bank(problems, [Candidate(name, index, "", "1", True, "test") for name, index in keys])

  refused(
    *(("no problems", make, ""), ("'b'", make, "ab", ("a", 0)), ("'a'", make, "aa", ("a", 0))),
    *(("'z'", make, "a", ("a", 0), ("z", 0)), ("index 2", make, "a", ("a", 2), ("a", 2))),
  )
  bank = bank_of([[("1", True)] * 3, [("1", True)]])
  for n in (0, 4):  # beyond every pool
    for function, *args in (
      (selection.oracle, n),
      (partial(selection.draw_subsets, seed=0), n),
      (selection.best_of_n, np.ones((2, 3)), n),
    ):
      refused((f"n={n}", function, bank, *args))
