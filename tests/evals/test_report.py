"""The report from made-up records: what is in it, that it is stable, and that text cannot break the page."""

import dataclasses
import json
import re

import pytest
from evals_data import costs_of, toy_run

from genrm_jax.evals import browse, per_problem, plots, report, selection
from genrm_jax.records import Score
from genrm_jax.runtime.errors import UserError

META = {"task": "toy", "model": "tiny", "seed": 0, "wall_seconds": {"train": 3}, "notes": ["trained from <scratch>"]}


def results_of(run, **changes):
  problems, candidates, scores = run
  return report.build_results(
    problems, candidates, scores, **{"ns": [4, 1, 2], "ks": [1, 2, 64], "seed": 0, "meta": META} | changes
  )


@pytest.fixture(scope="module")
def run():
  return toy_run()


@pytest.fixture(scope="module")
def results(run):
  return results_of(run)


@pytest.fixture
def no_pictures(monkeypatch):
  """Figures are not drawn, which takes the time."""
  monkeypatch.setattr(plots, "png", lambda canvas: b"png")


def test_results_survive_json(results):
  assert json.loads(json.dumps(results, allow_nan=False)) == results


def test_metric_names_and_values(run, results):
  problems, candidates, _ = run
  flat = results["metrics"]
  for name in (
    "bon/orm/n=4/accuracy",
    "bon/oracle/n=2/accuracy",
    "bon/self_consistency/n=1/accuracy",
    "bon/weighted_self_consistency/genrm_cot/n=4/accuracy",
    "votes/genrm_cot/k=1/accuracy",
    "votes/genrm_cot/k=4/rm_accuracy",
    "eval/orm/rm_accuracy",
    "eval/pass1",
  ):
    assert 0 <= flat[name] <= 1
  assert not any(name.startswith("votes/orm") or "k=64" in name for name in flat)
  bank = selection.make_bank(problems, candidates)
  assert flat["eval/pass1"] == pytest.approx(selection.pass_at_1(bank).mean(), abs=1e-6)
  # All votes together are the score itself.
  assert flat["votes/genrm_cot/k=4/accuracy"] == flat["bon/genrm_cot/n=4/accuracy"]
  assert flat["votes/genrm_cot/k=4/rm_accuracy"] == flat["eval/genrm_cot/rm_accuracy"]


def test_structure(results):
  assert results["ns"] == [1, 2, 4] and results["pool_sizes"] == [3, 4]
  orm, cot = results["verifiers"]["orm"], results["verifiers"]["genrm_cot"]
  assert (orm["step"], cot["step"]) == (5, 7)
  assert set(orm["minus"]) == {"pass1", "self_consistency"}
  assert set(cot["minus"]) == {"pass1", "self_consistency", "orm"}
  minus = cot["minus"]["orm"]
  flat = results["metrics"]
  assert minus["value"] == pytest.approx(flat["bon/genrm_cot/n=4/accuracy"] - flat["bon/orm/n=4/accuracy"], abs=2e-6)
  assert minus["low"] <= minus["value"] <= minus["high"]
  assert cot["coverage"]["states"] == {"ok": 141, "forced": 0, "truncated": 0, "missing": 47, "contradictory": 0}
  assert [point["k"] for point in cot["by_votes"]] == [1, 2, 4]
  assert cot["by_votes"][0]["scored"]["value"] == pytest.approx(0.75)
  assert any("At n=4, 1 of 12 problems have fewer candidates" in note for note in results["notes"])


def test_per_problem_figures_average_to_the_reports_own(run, results):
  quantities = per_problem.read(json.loads(json.dumps(results)))
  found = {name: it.parts[0][0].sum() / it.parts[0][1].sum() for name, it in quantities.items()}
  flat = results["metrics"]
  assert found["pass1"] == pytest.approx(flat["eval/pass1"], abs=1e-4)
  for method in ("oracle", "self_consistency", "orm", "genrm_cot"):
    for n in (1, 2, 4):
      assert found[f"{method}/n={n}"] == pytest.approx(flat[f"bon/{method}/n={n}/accuracy"], abs=1e-4)
  for key in ("rm_accuracy", "auc_within_problems"):
    assert found[f"orm/{key}"] == pytest.approx(flat[f"eval/orm/{key}"], abs=1e-4)
  for k in (1, 2, 4):
    assert found[f"genrm_cot/k={k}"] == pytest.approx(flat[f"votes/genrm_cot/k={k}/accuracy"], abs=1e-4)
  minus = results["verifiers"]["genrm_cot"]["minus"]["orm"]["value"]
  assert found["genrm_cot-orm"] == pytest.approx(minus, abs=1e-4)
  ratio = flat["bon/genrm_cot/n=4/accuracy"] / flat["bon/oracle/n=4/accuracy"]
  assert found["genrm_cot/oracle"] == pytest.approx(ratio, abs=1e-3)
  # Weighted votes are kept at the largest n only.
  weighted = [name for name in found if name.startswith("weighted_self_consistency/genrm_cot/")]
  assert weighted == ["weighted_self_consistency/genrm_cot/n=4"]


def test_samples_are_of_verifiers_with_rationales_and_verbatim(run):
  problems, candidates, scores = toy_run(num_problems=40, rationale="e=e\n| `x`")
  samples = report.sample_records(problems, candidates, scores)
  assert len(samples) == 12 and {it["verifier"] for it in samples} == {"genrm_cot"}
  assert {it["correct"] for it in samples} == {True, False}
  for it in samples:
    text = {(c.text, c.correct) for p in problems if p.question == it["question"] for c in candidates}
    assert (it["solution"], it["correct"]) in text and it["rationale"] == "e=e\n| `x`" and it["state"] == "ok"
    assert 0 <= it["p_yes"] <= 1 and it["answer"] == "1"
  two = scores | {"judge": [dataclasses.replace(score, verifier="judge") for score in scores["genrm_cot"]]}
  both = report.sample_records(problems, candidates, two)
  assert [it["verifier"] for it in both] == ["genrm_cot"] * 6 + ["judge"] * 6
  mistaken = [dataclasses.replace(score, value=1 - score.value) for score in scores["genrm_cot"]]
  kinds = [it["kind"] for it in report.sample_records(problems, candidates, {"genrm_cot": mistaken})]
  assert [kinds.count(kind) for kind in ("fooled", "missed", "typical")] == [4, 4, 4]


def test_generation_and_the_second_split_are_shown(run, results, tmp_path, no_pictures):
  problems, candidates, _ = run
  generation = report.generation_results(problems, candidates, seed=0)
  assert generation["pass1"] == results["pass1"]  # the same solutions
  assert generation["per_problem"] == results["per_problem"]["pass1"]
  inner = results_of(run, ns=[4], ks=[4], meta={})
  report.write_report(
    results | {"generation": {"genrm_cot": generation}, "in_distribution": inner, "meta": META | {"config": {"a": 1}}},
    tmp_path,
  )
  share = f"{100 * results['pass1']['value']:.1f} ["
  text = (tmp_path / "report.md").read_text()
  assert f"\n- GenRM-CoT as a generator: pass@1 {share}" in text
  assert "- config" not in text, "it stands in config.json"
  table = text.partition("## In distribution\n")[2].partition("##")[0]
  for name, cells in (("pass@1", 3), ("ORM", 3), ("GenRM-CoT", 3), ("Oracle (pass@N)", 3)):
    assert re.search(rf"^\| {re.escape(name)} \|( [^|]*\|){{{cells}}}$", table, re.MULTILINE), name
  assert "weighted" not in table
  assert "GenRM-CoT as a generator" in (tmp_path / "index.html").read_text()


def test_lists_of_numbers_stand_on_one_line(results, tmp_path, no_pictures):
  report.write_report(results, tmp_path)
  lines = (tmp_path / "results.json").read_text().splitlines()
  assert sum(line.lstrip().startswith('"pass1": [') for line in lines) == 1
  assert '  "ns": [1,2,4],' in lines
  assert len(lines) < 320


def test_missing_scores_and_strange_values_are_told(run):
  problems, candidates, scores = run
  changed = [dataclasses.replace(scores["orm"][0], value=None), dataclasses.replace(scores["orm"][1], value=0.0)]
  notes = results_of((problems, candidates, {"orm": changed + scores["orm"][2:]}))["notes"]
  assert any("orm: 1 of 47 candidates have no score" in note for note in notes)
  assert any("orm: recorded values differ" in note for note in notes)


def test_the_same_bytes_twice(run, tmp_path):
  examples = browse.pick_examples(*run)
  results = results_of(run, costs=costs_of(run))
  first = report.write_report(results, tmp_path / "a", examples=examples)
  again = report.write_report(
    json.loads(json.dumps(results_of(run, costs=costs_of(run)))), tmp_path / "b" / "deep", examples=examples
  )
  pictures = ("best_of_n", "weighted_self_consistency", "votes", "costs", "reliability", "length")
  names = {*(f"{name}.png" for name in pictures), "report.md", "index.html", "results.json"}
  assert {path.name for path in first} == names == {path.name for path in (tmp_path / "a").iterdir()}
  for one, other in zip(first, again, strict=True):
    assert one.read_bytes() == other.read_bytes(), one.name
  assert json.loads((tmp_path / "a" / "results.json").read_text()) == results


def test_results_without_what_came_later_are_shown_as_before(results, tmp_path, no_pictures):
  old = json.loads(json.dumps(results))
  later = {"length", "ties", "reliability"}
  del old["length"]
  for name, verifier in old["verifiers"].items():
    assert later <= set(verifier), name
    old["verifiers"][name] = {key: it for key, it in verifier.items() if key not in later}
  names = {path.name for path in report.write_report(old, tmp_path)}
  assert not {"reliability.png", "length.png", "costs.png"} & names and "votes.png" in names
  text = (tmp_path / "report.md").read_text()
  assert "Coverage" in text and "Ties" not in text and "length" not in text
  assert json.loads((tmp_path / "results.json").read_text()) == old


def test_markdown(results, tmp_path, no_pictures):
  report.write_report(results, tmp_path)
  text = (tmp_path / "report.md").read_text()
  assert text.startswith(
    "# Report: toy\n\n- task: toy\n- model: tiny\n- seed: 0\n- wall_seconds: train 3\n- problems: 12\n"
  )
  assert "- note: trained from <scratch>\n" in text
  for table in text.split("\n## ")[1:-2]:
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert len(lines) > 2 and len({line.count("|") for line in lines}) == 1


def test_no_verifiers_no_examples_and_one_n(run, tmp_path):
  results = results_of((*run[:2], {}), ns=[2], meta={})
  assert {path.name for path in report.write_report(results, tmp_path)} == {
    "best_of_n.png",
    "report.md",
    "index.html",
    "results.json",
  }
  assert (tmp_path / "report.md").read_text().startswith("# Report\n")
  assert "<script>" not in (tmp_path / "index.html").read_text()


def test_a_failed_write_leaves_the_old_report(results, tmp_path, monkeypatch, no_pictures):
  report.write_report(results, tmp_path)
  before = (tmp_path / "results.json").read_bytes()

  def fail(*_):
    raise OSError("disk full")

  monkeypatch.setattr(report.os, "replace", fail)
  with pytest.raises(OSError, match="disk full"):
    report.write_report(results | {"seed": 9}, tmp_path)
  assert (tmp_path / "results.json").read_bytes() == before
  assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]


@pytest.mark.parametrize(
  ("changes", "message"),
  [({"ns": []}, "at least one n"), ({"ks": [0]}, "positive"), ({"ns": [5]}, "n=5")],
)
def test_bad_numbers_are_refused(run, changes, message):
  with pytest.raises(UserError, match=message):
    results_of(run, **changes)


@pytest.mark.parametrize("name", ["oracle", "a/b"])
def test_bad_names_are_refused(run, name):
  scores: dict[str, list[Score]] = {name: run[2]["orm"]}
  with pytest.raises(UserError, match=name):
    results_of((*run[:2], scores))
