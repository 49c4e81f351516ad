"""The report from made-up records: what is in it, that it is stable, and that any verifier works."""

import dataclasses
import errno
import json
import os
import unittest.mock

import pytest
from evals_data import costs_of, toy_run

from genrm_jax.evals import browse, pages, plots, report, selection, tables
from genrm_jax.runtime.errors import UserError

META = {"task": "toy", "model": "tiny", "seed": 0, "train_steps": {"orm": 9, "genrm_cot": 9}, "notes": ["a note"]}


def results_of(run, **changes):
  return report.build_results(*run, **{"ns": [4, 1, 2], "ks": [1, 2, 64], "seed": 0, "meta": META} | changes)


def table_of(results, title):
  """The rows of a table, by first cell."""
  (table,) = [table for table in tables.result_tables(results) if table.title.startswith(title)]
  return {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}


@pytest.fixture(scope="module")
def run():
  return toy_run()


@pytest.fixture(scope="module")
def results(run):
  return results_of(run)


@pytest.fixture
def no_png(monkeypatch):
  """Rendering PNGs takes most of the time."""
  monkeypatch.setattr(plots, "png", lambda canvas: b"png")


def test_flat_metrics(run, results):
  problems, candidates, _ = run
  flat = results["metrics"]
  assert not any(name.startswith("votes/orm") or "k=64" in name for name in flat)
  bank = selection.make_bank(problems, candidates)
  assert flat["eval/pass1"] == pytest.approx(selection.pass_at_1(bank).mean(), abs=1e-6)
  # All votes together make the score.
  assert flat["votes/genrm_cot/k=4/accuracy"] == flat["bon/genrm_cot/n=4/accuracy"]
  assert flat["votes/genrm_cot/k=4/rm_accuracy"] == flat["eval/genrm_cot/rm_accuracy"]
  minus = results["verifiers"]["genrm_cot"]["minus"]["orm"]
  assert minus["value"] == pytest.approx(flat["bon/genrm_cot/n=4/accuracy"] - flat["bon/orm/n=4/accuracy"], abs=2e-6)
  assert minus["low"] <= minus["value"] <= minus["high"]


@pytest.mark.parametrize("names", [("mine", "other"), ("_mine", "a$^$ b=1|k={2}")])
def test_verifiers_of_any_name_work_everywhere(run, names, tmp_path, monkeypatch):
  """The same scores under other names give the same numbers, and all of the report can be drawn."""
  problems, candidates, scores = run
  own = problems, candidates, dict(zip(names, scores.values(), strict=True))
  known, custom = (results_of(records, costs=costs_of(records)) for records in (run, own))
  renamed = dict(zip(scores, names, strict=True))
  for part in (custom["verifiers"], custom["per_problem"]["rm_accuracy"], custom["costs"]["by_n"]):
    assert set(names) <= set(part)
  for old, new in renamed.items():
    ours, theirs = dict(custom["verifiers"][new]), dict(known["verifiers"][old])
    assert {renamed.get(name, name): point for name, point in theirs.pop("minus").items()} == ours.pop("minus")
    assert ours == theirs
    for kind in ("rm_accuracy", "auc_within_problems", "by_n"):
      assert custom["per_problem"][kind][new] == known["per_problem"][kind][old]
    assert tables.method_name(new) == new
    assert new in table_of(custom, "Verification") and new in table_of(custom, "Accuracy against cost")
  assert len(table_of(custom, "Differences")[names[0]]) == 5  # own name; over pass@1, self-consistency, both verifiers
  legends = []

  def keep_legends(canvas):
    legends.extend(axes.get_legend() for axes in canvas.axes if axes.get_legend())
    return png(canvas)

  png = plots.png
  monkeypatch.setattr(plots, "png", keep_legends)
  report.write_report(custom, tmp_path, entries=browse.pick_entries(*own))
  assert len(legends) == 5 and all(
    set(names) <= {text.get_text().strip() for text in legend.get_texts()} for legend in legends
  )


def test_likelihoods_have_no_calibration(run, no_png):
  problems, candidates, scores = run
  results = results_of((problems, candidates, {"orm": scores["orm"], "mine": scores["orm"]}), likelihoods={"mine", "x"})
  assert results["likelihoods"] == ["mine"]
  assert "reliability" in results["verifiers"]["orm"] and "reliability" not in results["verifiers"]["mine"]
  rows = table_of(results, "Verification")
  assert rows["mine"]["ECE"] == rows["mine"]["Brier"] == "–" and "–" not in rows["ORM"].values()
  only = results_of((problems, candidates, {"mine": scores["orm"]}), likelihoods={"mine"})
  assert not {"reliability.png", "length.png"} & {figure.file for figure in plots.draw(only)}
  # A name alone means nothing, except in results that do not list their likelihoods.
  named = results_of((problems, candidates, {"dpo": scores["orm"]}))
  assert table_of(named, "Verification")["DPO verifier"]["ECE"] != "–"
  del named["likelihoods"]
  assert table_of(named, "Verification")["DPO verifier"]["ECE"] == "–"


def test_metric_that_picked_the_checkpoint_is_shown_beside_the_steps(run, results):
  chosen = results_of(run, meta=META | {"best_by": {"genrm_cot": "loss_verify"}})
  rows = table_of(chosen, "Coverage")
  assert rows["GenRM-CoT"]["best by"] == "loss_verify" and rows["ORM"]["best by"] == "–"
  lines = dict(tables.meta_lines(chosen))
  assert "best held-out loss_verify" in lines["train steps"] and "best by" not in lines
  assert "best by" not in table_of(results, "Coverage")["ORM"]
  assert dict(tables.meta_lines(results))["train steps"] == "orm 9, genrm_cot 9"
  assert all(b"loss_verify" in page for page in pages.render(chosen, [], []).values())


def test_samples_come_from_verifiers_with_rationales():
  problems, candidates, scores = toy_run(num_problems=40, rationale="e=e\n| `x`")
  samples = report.sample_records(problems, candidates, scores)
  assert len(samples) == 12 and {sample["verifier"] for sample in samples} == {"genrm_cot"}
  assert {sample["correct"] for sample in samples} == {True, False}
  known = {(c.text, c.correct) for c in candidates}
  assert all((sample["solution"], sample["correct"]) in known for sample in samples)
  assert {(sample["rationale"], sample["state"]) for sample in samples} == {("e=e\n| `x`", "ok")}
  both = report.sample_records(problems, candidates, scores | {"judge": scores["genrm_cot"]})
  assert [sample["verifier"] for sample in both] == ["genrm_cot"] * 6 + ["judge"] * 6
  mistaken = [dataclasses.replace(score, value=1 - score.value) for score in scores["genrm_cot"]]
  kinds = [sample["kind"] for sample in report.sample_records(problems, candidates, {"genrm_cot": mistaken})]
  assert [kinds.count(kind) for kind in ("fooled", "missed", "typical")] == [4, 4, 4]


def test_generation_and_second_split(run, results):
  problems, candidates, _ = run
  generation = report.generation_results(problems, candidates, seed=0)
  assert generation["pass1"] == results["pass1"]  # the same solutions
  assert generation["per_problem"] == results["per_problem"]["pass1"]
  inner = results_of(run, ns=[4], ks=[4], meta={})
  whole = results | {"generation": {"genrm_cot": generation}, "in_distribution": inner}
  rows = table_of(whole, "In distribution")
  assert {"pass@1", "ORM", "GenRM-CoT", "Oracle (pass@N)"} <= set(rows)
  assert rows["ORM"]["n = 4"].startswith(f"{100 * inner['curves']['orm'][-1]['value']:.1f} [")
  assert tables.percent(results["pass1"]) in tables.generation_lines(whole)[0]


def test_same_input_gives_the_same_bytes(run, tmp_path):
  first, again = (results_of(run, costs=costs_of(run)) for _ in range(2))
  paths = report.write_report(first, tmp_path / "a", entries=browse.pick_entries(*run))
  again = json.loads(json.dumps(again, allow_nan=False))
  others = report.write_report(again, tmp_path / "b" / "deep", entries=browse.pick_entries(*run))
  assert {path.name for path in paths} == {path.name for path in (tmp_path / "a").iterdir()}
  for one, other in zip(paths, others, strict=True):
    assert one.read_bytes() == other.read_bytes(), one.name
  text = (tmp_path / "a" / "results.json").read_text()
  assert json.loads(text) == first
  assert max(map(len, text.splitlines())) < 400 and len(text.splitlines()) < 1_500  # compact, but not one long line


def test_report_md_shows_texts_of_users_as_they_are(run, no_png):
  """No text of a problem, name or setting becomes HTML, a cell, a link or a line of its own."""
  texts = "<script>", "| a |", "[x](y)", "*b* _c_ `d`", "p\n# h", "a_b", "&lt;"
  shown = "&lt;script&gt;", r"\| a \|", r"[x\](y)", r"\*b\* \_c\_ \`d\`", "p # h", "a_b", "&amp;lt;"
  for text, expected in zip(texts, shown, strict=True):
    problems, candidates, scores = run
    new_id = {p.id: f"{p.id}{text}" for p in problems}
    problems = [dataclasses.replace(p, id=new_id[p.id]) for p in problems]
    candidates = [dataclasses.replace(c, problem_id=new_id[c.problem_id]) for c in candidates]
    own = {text: [dataclasses.replace(s, problem_id=new_id[s.problem_id], verifier=text) for s in scores["orm"]]}
    meta = {"task": text, "model": text, "notes": [text], "steps": {text: text}}
    results = results_of((problems, candidates, own), meta=meta)
    page = pages.render(results, [], browse.pick_entries(problems, candidates, own))["report.md"].decode()
    assert page.count(expected) >= 12 and "problem p" in page
    assert text == expected or text not in page


def test_results_without_newer_parts_can_be_drawn(results, tmp_path, no_png):
  old = json.loads(json.dumps(results))
  newer = {"length", "ties", "reliability"}
  del old["length"], old["likelihoods"]
  for verifier in old["verifiers"].values():
    for part in newer:
      del verifier[part]
  names = {path.name for path in report.write_report(old, tmp_path)}
  assert not {"reliability.png", "length.png", "costs.png"} & names and "votes.png" in names
  assert json.loads((tmp_path / "results.json").read_text()) == old


def test_failed_write_leaves_the_old_report(results, tmp_path, monkeypatch, no_png):
  report.write_report(results, tmp_path)
  before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
  monkeypatch.setattr(os, "replace", unittest.mock.Mock(side_effect=OSError(errno.ENOSPC, "")))
  with pytest.raises(UserError, match="the disk is full, nothing was written"):
    report.write_report(results | {"seed": 9}, tmp_path)
  assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    *(({"ns": []}, "ns"), ({"ks": [0]}, "ks"), ({"ns": [5]}, "n=5")),
    *(({"name": name}, f"'{name}'") for name in ("oracle", "weighted_self_consistency", "a/b", "")),
  ],
)
def test_bad_arguments_are_refused(run, changes, message):
  problems, candidates, scores = run
  with pytest.raises(UserError, match=message):
    results_of((problems, candidates, {changes.pop("name", "orm"): scores["orm"]}), **changes)
