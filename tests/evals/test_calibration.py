"""Reliability bins and ties, against their meaning."""

import numpy as np
import pytest
from evals_data import score_of, toy_bank, toy_run
from hypothesis import given, settings
from hypothesis import strategies as st

from genrm_jax.evals import calibration, metrics, plots, report, selection, tables
from genrm_jax.records import Candidate, Problem

NAN = float("nan")

values = st.sampled_from([0.0, 0.05, 0.1, 0.3, 0.35, 0.999, 1.0, NAN])
pools = st.lists(st.lists(st.tuples(st.booleans(), values), min_size=1, max_size=6), min_size=1, max_size=5)


def bank_and_values(drawn):
  bank = toy_bank([[right for right, _ in pool] for pool in drawn])
  scores = np.full(bank.mask.shape, NAN)
  for row, pool in enumerate(drawn):
    scores[row, : len(pool)] = [value for _, value in pool]
  return bank, scores


def reliability_of(bank, scores):
  found = metrics.intervals(calibration.reliability_quantities(bank, scores), seed=0, draws=50)
  told = {name: {"value": it.value, "low": it.low, "high": it.high} for name, it in found.items()}
  return calibration.reliability(bank, scores, told)


@settings(max_examples=40, deadline=None)
@given(drawn=pools)
def test_the_bins_hold_every_score_once_and_make_up_the_ece(drawn):
  bank, scores = bank_and_values(drawn)
  bins = reliability_of(bank, scores)
  scored = ~np.isnan(scores)
  assert sum(bins["count"]) == scored.sum()
  held = [at for at, count in enumerate(bins["count"]) if count]
  if held:
    gaps = [bins["count"][at] * abs(bins["score"][at] - bins["right"][at]) for at in held]
    assert sum(gaps) / scored.sum() == pytest.approx(metrics.expected_calibration_error(bank, scores))
    rights = sum(bins["count"][at] * bins["right"][at] for at in held)
    assert rights == pytest.approx((bank.correct & scored).sum())
  for at in range(10):
    if at in held:
      assert at / 10 - 1e-9 <= bins["score"][at] <= (at + 1) / 10
    else:
      assert all(bins[key][at] is None for key in ("score", "right", "low", "high"))


def test_intervals_of_bins_are_over_problems():
  # The bin is right in all of one problem and in none of the other: a problem more or less moves it as far as it goes.
  bank = toy_bank([[1] * 50, [0] * 50])
  bins = reliability_of(bank, np.full(bank.mask.shape, 0.55))
  assert (bins["low"][5], bins["right"][5], bins["high"][5]) == (0, 0.5, 1)


@settings(max_examples=100, deadline=None)
@given(drawn=pools)
def test_a_coin_decides_where_best_of_n_is_neither_right_nor_wrong(drawn):
  bank, scores = bank_and_values(drawn)
  found = calibration.ties(bank, scores)
  chance = selection.best_of_n(bank, scores, bank.mask.shape[1])
  assert found["labels_differ"] == ((chance > 1e-9) & (chance < 1 - 1e-9)).sum()
  assert found["labels_differ"] <= found["tied"] <= found["pools"] == len(drawn)
  assert found["unscored"] == sum(all(np.isnan(value) for _, value in pool) for pool in drawn)
  tops = [[key for key in keys if key == max(keys)] for keys in [[-1 if v != v else v for _, v in p] for p in drawn]]
  sizes = [len(top) for top in tops if len(top) > 1]
  assert (found["candidates"], found["largest"]) == (sum(sizes), max(sizes, default=0))


def test_ties_of_one_text_are_told_apart():
  problems = [Problem(f"p{row}", "toy", "eval", "?", "1") for row in range(3)]
  texts = [["a", "a", "b"], ["a", "b", "b"], ["a", "b", "c"]]
  pool = [
    Candidate(f"p{row}", index, text, text, False, "test")
    for row, of_row in enumerate(texts)
    for index, text in enumerate(of_row)
  ]
  bank = selection.make_bank(problems, pool)
  found = calibration.ties(bank, np.array([[0.9, 0.9, 0.1], [0.7, 0.7, 0.7], [0.3, 0.2, 0.1]]))
  assert found == {
    "pools": 3, "unscored": 0, "tied": 2, "candidates": 5, "largest": 3, "texts_differ": 1, "labels_differ": 0,
  }  # fmt: skip


def test_a_likelihood_has_no_calibration_in_the_report(monkeypatch):
  problems, candidates, scores = toy_run()
  scores = {name: scores["orm"] for name in ("orm", "dpo")}
  results = report.build_results(problems, candidates, scores, ns=[1], ks=[1], seed=0, meta={})
  assert "reliability" in results["verifiers"]["orm"] and "reliability" not in results["verifiers"]["dpo"]
  (table,) = [one for one in tables.result_tables(results) if one.title.startswith("Verification")]
  rows = {row[0]: row for row in table.rows}
  assert rows["DPO verifier"][-2:] == ("–", "–") and "–" not in rows["ORM"]
  assert "DPO verifier is no probability" in table.note
  monkeypatch.setattr(plots, "png", lambda canvas: b"")
  captions = {figure.file: figure.caption for figure in plots.draw(results)}
  assert "DPO verifier is no probability" in captions["reliability.png"]
  only = report.build_results(problems, candidates, {"dpo": scores["dpo"]}, ns=[1], ks=[1], seed=0, meta={})
  assert not {"reliability.png", "length.png"} & {figure.file for figure in plots.draw(only)}


def test_the_table_of_ties_counts_pools():
  bank = toy_bank([[1, 0], [1, 0], [0, 0]])
  candidates = [candidate for pool in bank.candidates for candidate in pool]
  listed = [score_of(row, index, value) for row, pair in enumerate([(0.5, 0.5), (0.9, 0.1), (None, None)])
            for index, value in enumerate(pair)]  # fmt: skip
  results = report.build_results(bank.problems, candidates, {"v": listed}, ns=[2], ks=[1], seed=0, meta={})
  (table,) = [one for one in tables.result_tables(results) if one.title == "Ties at the top"]
  assert table.rows == (("v", "2 (66.7%)", "2.0", "2", "0", "1 (33.3%)", "1 (33.3%)"),)
