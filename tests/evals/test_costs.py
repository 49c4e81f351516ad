"""Costs: sums over subsets of a pool, votes that share what was read, and what the report says of them."""

import itertools

import numpy as np
import pytest
from evals_data import costs_of, score_of, toy_bank, toy_run, vote
from hypothesis import given, settings
from hypothesis import strategies as st

from genrm_jax.evals import costs, metrics, plots, report, tables
from genrm_jax.runtime.errors import UserError


def results_of(run, measured):
  return report.build_results(*run, ns=[1, 2, 4], ks=[1, 2, 4], seed=0, meta={}, costs=measured)


@pytest.fixture(scope="module")
def run():
  return toy_run()


@pytest.fixture(scope="module")
def results(run):
  return results_of(run, costs_of(run))


def one_pool(solution, read, voted):
  """A bank of one problem, with two votes a candidate, of which the first has all the tokens."""
  bank = toy_bank([[0] * len(solution)])
  cast = [[metrics.Vote("ok", 0.5, 0.5, count), vote("ok", 0.5)] for count in voted]
  table = metrics.align_scores(bank, "v", [score_of(0, index, 0.5, votes) for index, votes in enumerate(cast)])
  return bank, table, costs.Lengths(np.array([7]), np.array([solution]), {"v": np.array([read])})


@settings(max_examples=50, deadline=None)
@given(pool=st.lists(st.tuples(*[st.integers(0, 50)] * 3), min_size=1, max_size=6))
def test_costs_are_the_mean_over_all_subsets(pool):
  solution, read, voted = zip(*pool, strict=True)
  bank, table, found = one_pool(solution, read, voted)
  size = len(pool)
  for n in range(1, size + 2):
    subsets = list(itertools.combinations(range(size), min(n, size)))  # a smaller pool is used whole
    wanted = {
      key: np.mean([sum(values[index] for index in subset) for subset in subsets])
      for key, values in (("generator_sampled", solution), ("verifier_read", read))
    }
    wanted["verifier_sampled"] = np.mean([sum(voted[index] + 10 for index in subset) for subset in subsets])
    tokens = costs.tokens_of(bank, found, n, table)
    assert tokens == pytest.approx(wanted | {"generator_read": 7})
    # Half of the votes sample half as much, and read as much.
    half = costs.tokens_of(bank, found, n, table, k=1)
    assert half == pytest.approx(tokens | {"verifier_sampled": tokens["verifier_sampled"] / 2})
  assert costs.tokens_of(bank, found, 1)["verifier_read"] == 0


def test_costs_grow_in_line_with_n_up_to_the_smallest_pool(results):
  by_n = results["costs"]["by_n"]["genrm_cot"]
  for key in ("generator_sampled", "verifier_read", "verifier_sampled"):
    one, two, four = by_n[key]
    assert two == pytest.approx(2 * one, abs=1e-5) and 3 * one < four < 4 * one  # one pool has three candidates
  assert by_n["generator_read"] == [10, 10, 10] and by_n["k"] == [4, 4, 4]
  by_k = results["costs"]["by_k"]["genrm_cot"]
  assert by_k["n"] == [4, 4, 4] and by_k["k"] == [1, 2, 4]
  assert by_k["verifier_sampled"] == pytest.approx([by_n["verifier_sampled"][-1] * k / 4 for k in (1, 2, 4)])
  assert by_k["verifier_read"] == [by_n["verifier_read"][-1]] * 3


def test_flops_and_accuracies_stand_beside_the_tokens(results):
  measured = results["costs"]
  assert set(measured["by_n"]) == {"pass1", "self_consistency", "orm", "genrm_cot"} and set(measured["by_k"]) == {
    "genrm_cot"
  }
  cot = measured["by_n"]["genrm_cot"]
  for at, n in enumerate((1, 2, 4)):
    assert cot["generator_flops"][at] == pytest.approx(2 * 1_000 * (10 + cot["generator_sampled"][at]), abs=0.01)
    read_and_sampled = cot["verifier_read"][at] + cot["verifier_sampled"][at]
    assert cot["verifier_flops"][at] == pytest.approx(2 * 3_000 * read_and_sampled, abs=0.01)
    assert cot["accuracy"][at] == results["metrics"][f"bon/genrm_cot/n={n}/accuracy"]
    assert measured["by_k"]["genrm_cot"]["accuracy"][at] == results["metrics"][f"votes/genrm_cot/k={n}/accuracy"]
  assert cot["low"][0] <= cot["accuracy"][0] <= cot["high"][0]
  majority = measured["by_n"]["self_consistency"]
  assert majority["verifier_flops"] == [0, 0, 0] and majority["k"] == [0, 0, 0]
  assert measured["by_n"]["pass1"]["accuracy"] == [results["pass1"]["value"]]


def test_lengths_follow_their_records_not_their_place(run, results):
  problems, candidates, scores = run
  order = np.random.default_rng(1).permutation(len(candidates))
  shuffled = [candidates[at] for at in order]
  found = results_of((problems, shuffled, scores), costs_of((problems, shuffled, scores)))
  assert found["costs"] == results["costs"] and found["length"] == results["length"]


def test_the_table_compares_at_equal_cost(run, results):
  (table,) = [one for one in tables.result_tables(results) if one.title == "Accuracy against cost"]
  majority = results["costs"]["by_n"]["self_consistency"]
  spent = costs.totals(majority, "FLOPs")
  rows = {row[:3]: row for row in table.rows}
  assert len(table.rows) == len(rows) == 1 + 3 + 3 + 3 + 2, "all votes at the largest n stand there once"
  for name, method in (("ORM", "orm"), ("GenRM-CoT", "genrm_cot")):
    columns = results["costs"]["by_n"][method]
    for at, cost in enumerate(costs.totals(columns, "FLOPs")):
      best = max(index for index in range(3) if spent[index] <= cost)
      row = rows[name, str(columns["n"][at]), str(columns["k"][at])]
      assert row[-1] == f"{100 * majority['accuracy'][best]:.1f} (n = {majority['n'][best]})"
  # A verifier that costs nothing to speak of is compared at its own n, not above.
  free = {name: [0] * len(run[1]) for name in run[2]}
  (cheap,) = [
    one
    for one in tables.result_tables(results_of(run, costs_of(run, verifier_tokens=free)))
    if one.title == "Accuracy against cost"
  ]
  assert [row[-1].partition("(")[2] for row in cheap.rows if row[0] == "ORM"] == ["n = 1)", "n = 2)", "n = 4)"]


def test_without_the_generators_size_there_are_tokens_only(run, results, monkeypatch):
  found = results_of(run, costs_of(run, generator_params=None))
  assert found["costs"]["by_n"]["orm"]["generator_flops"] == [None] * 3
  assert None not in found["costs"]["by_n"]["orm"]["verifier_flops"]
  (table,) = [one for one in tables.result_tables(found) if one.title == "Accuracy against cost"]
  assert "unknown number of parameters" in table.note and "that cost no more tokens than this" in table.note
  assert {row[7] for row in table.rows} == {"–"} and "–" not in {row[8] for row in table.rows}

  def labels(drawn):
    """Of the x axes of the figure of costs."""
    canvases = []
    monkeypatch.setattr(plots, "png", lambda canvas: canvases.append(canvas) or b"")
    files = [figure.file for figure in plots.draw(drawn)]
    return [axes.get_xlabel() for axes in canvases[files.index("costs.png")].axes]

  assert labels(found) == ["tokens a problem"]
  assert labels(results) == ["tokens a problem", "FLOPs a problem"]


def test_length_is_in_tokens_where_they_are_known(run, results):
  assert results["length"]["unit"] == "tokens"
  assert (results["length"]["shortest"][0], results["length"]["longest"][-1]) == (5, 8)
  plain = report.build_results(*run, ns=[4], ks=[4], seed=0, meta={})
  assert plain["length"]["unit"] == "characters" and "costs" not in plain


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"prompt_tokens": [1] * 11}, "prompt_tokens has 11 numbers; it must have 12"),
    ({"solution_tokens": [1] * 46}, "solution_tokens has 46 numbers; it must have 47"),
    ({"solution_tokens": [-1] * 47}, "none below 0"),
    ({"verifier_tokens": {"orm": [1] * 47}}, "no lengths for genrm_cot"),
    ({"verifier_tokens": {"orm": [1] * 47, "genrm_cot": [1]}}, "verifier_tokens of genrm_cot has 1 numbers"),
  ],
)
def test_lengths_that_do_not_fit_are_named(run, changes, message):
  with pytest.raises(UserError, match=message):
    results_of(run, costs_of(run, **changes))
