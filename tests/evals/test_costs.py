"""Costs: expectations over subsets of a pool, votes that share one read prompt, and comparisons at equal cost."""

import itertools

import numpy as np
import pytest
from evals_data import costs_of, score_of, toy_bank, toy_run, vote
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused

from genrm_jax.evals import costs, metrics, plots, report, tables
from genrm_jax.records import Vote


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


def test_lengths_follow_their_records(run, results):
  problems, candidates, scores = run
  shuffled = [candidates[at] for at in np.random.default_rng(1).permutation(len(candidates))]
  again = results_of((problems, shuffled, scores), costs_of((problems, shuffled, scores)))
  assert again["costs"] == results["costs"] and again["length"] == results["length"]
  length = results["length"]
  assert (length["unit"], length["shortest"][0], length["longest"][-1]) == ("tokens", 5, 8)


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


def test_lengths_that_do_not_fit_are_refused(run):
  for message, changes in {
    **{"11": {"prompt_tokens": [1] * 11}, "negative": {"solution_tokens": [-1] * 47}},
    **{"genrm_cot": {"verifier_tokens": {"orm": [1] * 47}}, "46": {"solution_tokens": [1] * 46}},
  }.items():
    refused((message, results_of, run, costs_of(run, **changes)))
