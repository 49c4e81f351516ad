"""Selection and costs against brute force over all subsets of small pools; comparisons at equal cost."""

import itertools
from functools import partial

import numpy as np
import pytest
from evals_data import NAN, bank_of, costs_of, padded, score_of, toy_bank, toy_run, vote
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused

from genrm_jax.evals import costs, methods, metrics, plots, report, selection, tables
from genrm_jax.records import Candidate, Problem, Vote


def brute_force(pool, values, n, choose) -> float:
  """The mean of `choose` over all subsets of n (of all candidates, if there are fewer)."""
  subsets = list(itertools.combinations(range(len(pool)), min(n, len(pool))))
  return float(np.mean([choose([pool[i] for i in subset], [values[i] for i in subset]) for subset in subsets]))


def pick_best(pool, values) -> float:
  keys = [-1.0 if np.isnan(value) else value for value in values]
  return float(np.mean([correct for (_, correct), key in zip(pool, keys, strict=True) if key == max(keys)]))


def pick_answer(pool, values, top=None) -> float:
  weights: dict[str, list[float]] = {}
  labels: dict[str, list[bool]] = {}
  for (answer, correct), value in zip(pool, values, strict=True):
    if answer is not None:
      weights.setdefault(answer, []).append(0.0 if np.isnan(value) else value)
      labels.setdefault(answer, []).append(correct)
  totals = {answer: sum(sorted(each, reverse=True)[:top]) for answer, each in weights.items()}
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
    votes = [selection.self_consistency(bank, subsets, *how) for how in ((), (values,), (values, 1), (values, 2))]
    found = selection.best_of_n(bank, values, n), *votes, selection.oracle(bank, n)
    ones = [[1.0] * len(row) for row in scores]
    for row, pool in enumerate(bank.candidates):
      plain = [(one.answer, one.correct) for one in pool]
      wanted = (
        brute_force(plain, scores[row], n, pick_best),
        brute_force(plain, ones[row], n, pick_answer),
        *(brute_force(plain, scores[row], n, partial(pick_answer, top=top)) for top in (None, 1, 2)),
        brute_force(plain, ones[row], n, lambda chosen, _: float(any(correct for _, correct in chosen))),
      )
      np.testing.assert_allclose([one[row] for one in found], wanted, atol=1e-12)


def test_solutions_to_match_are_the_first_that_reach_the_level():
  rng = np.random.default_rng(5)
  labels = rng.random((30, 16)) < 0.3
  bank = toy_bank(labels.tolist())
  signal = {"good": 1.0, "fair": 0.5, "bad": -1.0}
  scores = {name: 1 / (1 + np.exp(-s * labels - rng.normal(size=labels.shape))) for name, s in signal.items()}
  tables = {
    name: metrics.align_scores(bank, name, [score_of(r, i, values[r, i]) for r in range(30) for i in range(16)])
    for name, values in scores.items()
  }
  selected = methods.Methods(bank, tables, top_scores=0, seed=0)
  found = methods.solutions_to_match(selected, ["self_consistency", *scores], [2, 4, 16])
  for name, row in found.items():
    for other, fewest in row.items():
      reached = [n for n in range(1, 17) if selected(name, n).mean() >= selected(other, 16).mean() - 1e-9]
      assert fewest == (reached[0] if reached else None), (name, other)
  assert found["bad"]["good"] is None and found["good"]["bad"] == 1 and 1 < found["good"]["fair"] < 16


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


def results_of(run, measured):
  return report.build_results(*run, ns=[1, 2, 4], ks=[1, 2, 4], seed=0, meta={}, costs=measured)


def cost_table(results):
  return next(table for table in tables.result_tables(results) if table.title == "Accuracy against cost")


@pytest.fixture(scope="module")
def run():
  return toy_run()


@pytest.fixture(scope="module")
def results(run):
  return results_of(run, costs_of(run))


@settings(max_examples=50, deadline=None)
@given(pool=st.lists(st.tuples(*[st.integers(0, 50)] * 3), min_size=1, max_size=6))
def test_costs_are_the_mean_over_all_subsets(pool):
  solution, read, voted = zip(*pool, strict=True)
  bank = toy_bank([[0] * len(pool)])
  votes = [[Vote("ok", 0.5, 0.5, count), vote("ok", 0.5)] for count in voted]
  table = metrics.align_scores(bank, "v", [score_of(0, index, 0.5, cast) for index, cast in enumerate(votes)])
  counts = costs.TokenCounts(np.array([7]), np.array([solution]), {"v": np.array([read])})
  size = len(pool)
  for n in range(1, size + 2):
    subsets = list(itertools.combinations(range(size), min(n, size)))  # a smaller pool is used whole
    wanted = {
      key: np.mean([sum(values[index] for index in subset) for subset in subsets])
      for key, values in (("generator_sampled", solution), ("verifier_read", read))
    }
    wanted["verifier_sampled"] = np.mean([sum(voted[index] + 10 for index in subset) for subset in subsets])
    tokens = costs.tokens_per_problem(bank, counts, n, table)
    assert tokens == pytest.approx(wanted | {"generator_read": 7})
    # Half of the votes sample half as much and read as much.
    half = costs.tokens_per_problem(bank, counts, n, table, k=1)
    assert half == pytest.approx(tokens | {"verifier_sampled": tokens["verifier_sampled"] / 2})
  assert costs.tokens_per_problem(bank, counts, 1)["verifier_read"] == 0


def test_columns_of_tokens_flops_and_accuracy(results):
  measured, flat = results["costs"], results["metrics"]
  cot, by_k = measured["by_n"]["genrm_cot"], measured["by_k"]["genrm_cot"]
  assert cot["generator_read"] == [10, 10, 10] and cot["k"] == [4, 4, 4]
  assert by_k["n"] == [4, 4, 4] and by_k["k"] == [1, 2, 4]
  assert by_k["verifier_sampled"] == pytest.approx([cot["verifier_sampled"][-1] * k / 4 for k in (1, 2, 4)])
  for at, n in enumerate((1, 2, 4)):
    assert cot["generator_flops"][at] == pytest.approx(2 * 1_000 * (10 + cot["generator_sampled"][at]), abs=0.01)
    tokens = cot["verifier_read"][at] + cot["verifier_sampled"][at]
    assert cot["verifier_flops"][at] == pytest.approx(2 * 3_000 * tokens, abs=0.01)
    assert cot["accuracy"][at] == flat[f"bon/genrm_cot/n={n}/accuracy"]
    assert by_k["accuracy"][at] == flat[f"votes/genrm_cot/k={n}/accuracy"]
  majority = measured["by_n"]["self_consistency"]
  assert majority["verifier_flops"] == [0, 0, 0] and majority["k"] == [0, 0, 0]


def test_lengths_follow_their_records_and_must_fit_them(run, results):
  problems, candidates, scores = run
  shuffled = [candidates[at] for at in np.random.default_rng(1).permutation(len(candidates))]
  again = results_of((problems, shuffled, scores), costs_of((problems, shuffled, scores)))
  assert again["costs"] == results["costs"] and again["length"] == results["length"]
  length = results["length"]
  assert (length["unit"], length["shortest"][0], length["longest"][-1]) == ("tokens", 5, 8)
  for message, changes in {
    **{"11": {"prompt_tokens": [1] * 11}, "negative": {"solution_tokens": [-1] * 47}},
    **{"genrm_cot": {"verifier_tokens": {"orm": [1] * 47}}, "46": {"solution_tokens": [1] * 46}},
  }.items():
    refused((message, results_of, run, costs_of(run, **changes)))


def test_table_compares_at_equal_cost(results):
  majority = results["costs"]["by_n"]["self_consistency"]
  spent = costs.totals(majority, "FLOPs")
  rows = {row[:3]: row for row in cost_table(results).rows}
  assert len(rows) == len(cost_table(results).rows) == 1 + 3 + 3 + 3 + 2, "all votes at the largest n appear once"
  for name, method in (("ORM", "orm"), ("GenRM-CoT", "genrm_cot")):
    columns = results["costs"]["by_n"][method]
    for at, cost in enumerate(costs.totals(columns, "FLOPs")):
      best = max(index for index in range(3) if spent[index] <= cost)
      row = rows[name, str(columns["n"][at]), str(columns["k"][at])]
      assert row[-1] == f"{100 * majority['accuracy'][best]:.1f} (n = {majority['n'][best]})"


def test_unknown_generator_size_leaves_tokens_only(run, results, monkeypatch):
  unknown = results_of(run, costs_of(run, generator_params=None))
  assert unknown["costs"]["by_n"]["orm"]["generator_flops"] == [None] * 3
  assert None not in unknown["costs"]["by_n"]["orm"]["verifier_flops"]
  assert {row[7] for row in cost_table(unknown).rows} == {"–"}
  monkeypatch.setattr(plots, "png", lambda canvas: len(canvas.axes))
  for drawn, panels in ((unknown, 1), (results, 2)):
    assert {figure.file: figure.png for figure in plots.draw(drawn)}["costs.png"] == panels
