"""The report from made-up records: what is in it, that it is stable, and that text cannot break the page."""

import dataclasses
import json
import re

import pytest
from evals_data import toy_run

from genrm_jax.errors import UserError
from genrm_jax.evals import report, select, tables
from genrm_jax.types import Score

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
  bank = select.make_bank(problems, candidates)
  assert flat["eval/pass1"] == pytest.approx(select.pass_at_1(bank).mean(), abs=1e-6)
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


def test_missing_scores_and_strange_values_are_told(run):
  problems, candidates, scores = run
  changed = [dataclasses.replace(scores["orm"][0], value=None), dataclasses.replace(scores["orm"][1], value=0.0)]
  notes = results_of((problems, candidates, {"orm": changed + scores["orm"][2:]}))["notes"]
  assert any("orm: 1 of 47 candidates have no score" in note for note in notes)
  assert any("orm: recorded values differ" in note for note in notes)


def test_the_same_bytes_twice(run, results, tmp_path):
  examples = tables.pick_examples(*run)
  first = report.write_report(results, tmp_path / "a", examples=examples)
  again = report.write_report(json.loads(json.dumps(results_of(run))), tmp_path / "b" / "deep", examples=examples)
  names = {"best_of_n.png", "weighted_self_consistency.png", "votes.png", "report.md", "index.html", "results.json"}
  assert {path.name for path in first} == names == {path.name for path in (tmp_path / "a").iterdir()}
  for one, other in zip(first, again, strict=True):
    assert one.read_bytes() == other.read_bytes(), one.name
  assert json.loads((tmp_path / "a" / "results.json").read_text()) == results


def test_markdown(results, tmp_path):
  report.write_report(results, tmp_path)
  text = (tmp_path / "report.md").read_text()
  assert text.startswith(
    "# Report: toy\n\n- task: toy\n- model: tiny\n- seed: 0\n- wall_seconds: train 3\n- problems: 12\n"
  )
  assert "- note: trained from <scratch>\n" in text
  for table in text.split("\n## ")[1:-2]:
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert len(lines) > 2 and len({line.count("|") for line in lines}) == 1


def test_page_escapes_what_models_and_users_write(tmp_path):
  attack = "<script>alert('x')</script><img src=x onerror=alert(1)>"
  run = toy_run(rationale=attack)
  report.write_report(results_of(run), tmp_path, examples=tables.pick_examples(*run))
  page = (tmp_path / "index.html").read_text()
  assert "alert('x')" not in page and "<img src=x" not in page
  assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;" in page
  assert "trained from &lt;scratch&gt;" in page
  assert page.count("<script>") == 1
  # Nothing is fetched from elsewhere.
  assert not re.search(r"(src|href)=\"(?!data:)", page)


def test_examples_are_what_they_are_called(run):
  examples = tables.pick_examples(*run, per_kind=2, votes_shown=1)
  kinds = {kind: [one for one in examples if one.kind == kind] for kind in ("fooled", "missed", "typical")}
  assert all(kinds.values())
  assert all(one.value > 0.5 and not one.candidate.correct for one in kinds["fooled"])
  assert all(one.value <= 0.5 and one.candidate.correct for one in kinds["missed"])
  assert all(len(one.votes) == 1 for one in examples)
  worst = max(score.value for score, candidate in zip(run[2]["orm"], run[1], strict=True) if not candidate.correct)
  assert next(one for one in kinds["fooled"] if one.verifier == "orm").value == worst


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


def test_a_failed_write_leaves_the_old_report(results, tmp_path, monkeypatch):
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


def test_remote_folders_are_refused(results):
  with pytest.raises(UserError, match="gs://"):
    report.write_report(results, "gs://bucket/report")
