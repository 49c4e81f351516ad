"""The report from made-up records: its numbers and candidates to browse, its stability, and that any verifier works."""

import dataclasses
import errno
import json
import os
import re
import unittest.mock
from functools import partial

import pytest
from evals_data import costs_of, toy_run
from refusals import refused

from genrm_jax.evals import browse, pages, plots, report, selection, tables
from genrm_jax.records import Score

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
  monkeypatch.setattr(plots, "png", lambda canvas: b"png")  # rendering takes most of the time


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


def test_rows_of_the_paper_beside_the_scores(run, results):
  problems, candidates, scores = run
  rows = table_of(results, "Accuracy of the selected")
  assert {"GenRM-CoT, majority verdict", "Weighted self-consistency, GenRM-CoT"} <= rows.keys()
  assert "ORM, majority verdict" not in rows, "it has one vote"
  # Only the votes of the majority count, in Best-of-N at every n and in the RM accuracy.
  hard = [
    Score(s.problem_id, s.candidate_index, "v", 7, float(sum(v.p_yes > v.p_no for v in s.votes[:3]) >= 2))
    for s in scores["genrm_cot"]
  ]
  alone = results_of((problems, candidates, {"v": hard}))
  assert results["curves"]["majority_verdict/genrm_cot"] == alone["curves"]["v"]
  (rule,) = [r for r in results["verifiers"]["genrm_cot"]["by_rule"] if r["rule"] == "majority verdict"]
  assert rule["accuracy"] | {"n": 4} == alone["curves"]["v"][-1]
  assert rule["rm_accuracy"] == alone["verifiers"]["v"]["verification"]["rm_accuracy"]


def test_a_unified_model_is_measured_by_pass_at_n(run, results):
  problems, candidates, _ = run
  made = report.generation_results(problems, candidates, 0, [4, 2, 1, 9])
  assert [point["n"] for point in made["pass_at_n"]] == [1, 2, 4], "no pool has 9"
  assert made["pass_at_n"] == results["curves"]["oracle"] and made["pass1"] == results["pass1"]
  rows = table_of(
    results | {"generation": {"genrm_cot": made, "genrm": made | {"pass_at_n": []}}}, "Verifiers as generators"
  )
  base, cot, old = rows.values()
  assert [*cot.values()][1:] == [*base.values()][1:] and [*rows] == [
    "the generator of these solutions",
    "GenRM-CoT",
    "GenRM",
  ]
  assert old["pass@1"] == base["pass@1"] and old["pass@2"] == "–", "results without pass@n"


@pytest.mark.parametrize("names", [("mine", "other"), ("_mine", "a$^$ b=1|k={2}")])
def test_verifiers_of_any_name_work_everywhere(run, names, tmp_path, monkeypatch):
  """The same scores under other names give the same numbers, and all of the report can be drawn."""
  problems, candidates, scores = run
  own = problems, candidates, dict(zip(names, scores.values(), strict=True))
  known, custom = (results_of(records, costs=costs_of(records)) for records in (run, own))
  renamed = dict(zip(scores, names, strict=True))
  for old, new in renamed.items():
    ours, theirs = dict(custom["verifiers"][new]), dict(known["verifiers"][old])
    assert {renamed.get(name, name): point for name, point in theirs.pop("minus").items()} == ours.pop("minus")
    assert ours == theirs
    for kind in ("rm_accuracy", "auc_within_problems", "by_n"):
      assert custom["per_problem"][kind][new] == known["per_problem"][kind][old]
    assert tables.method_name(new) == new and new in custom["costs"]["by_n"]
    assert new in table_of(custom, "Verification") and new in table_of(custom, "Accuracy against cost")
  assert len(table_of(custom, "Differences")[names[0]]) == 5  # own name; over pass@1, self-consistency, both verifiers
  legends = []

  def keep_legends(canvas):
    legends.extend(axes.get_legend() for axes in canvas.axes if axes.get_legend())
    return png(canvas)

  png = plots.png
  monkeypatch.setattr(plots, "png", keep_legends)
  report.write_report(custom, tmp_path, entries=browse.pick_entries(*own))
  texts = [{text.get_text().strip() for text in legend.get_texts()} for legend in legends]
  assert len(texts) == 5 and all(set(names) <= of_legend for of_legend in texts)


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


def test_samples_come_from_verifiers_with_rationales():
  problems, candidates, scores = toy_run(num_problems=40)
  both = report.sample_records(problems, candidates, scores | {"judge": scores["genrm_cot"]})
  assert [sample["verifier"] for sample in both] == ["genrm_cot"] * 6 + ["judge"] * 6
  known = {(c.text, c.correct, "so it is right", "ok") for c in candidates}
  assert {tuple(s[key] for key in ("solution", "correct", "rationale", "state")) for s in both} <= known
  mistaken = [dataclasses.replace(score, value=1 - score.value) for score in scores["genrm_cot"]]
  kinds = [sample["kind"] for sample in report.sample_records(problems, candidates, {"genrm_cot": mistaken})]
  assert [kinds.count(kind) for kind in ("fooled", "missed", "typical")] == [4, 4, 4]


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
  """No text of a problem, name or setting becomes HTML, a cell, a link or a line."""
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


def test_old_results_can_be_drawn_and_a_failed_write_leaves_the_old_report(results, tmp_path, monkeypatch, no_png):
  old = json.loads(json.dumps(results))
  del old["length"], old["likelihoods"], old["to_match"], old["top_scores"]
  for verifier in old["verifiers"].values():
    del verifier["length"], verifier["ties"], verifier["reliability"]
  names = {path.name for path in report.write_report(old, tmp_path)}
  assert not {"reliability.png", "length.png", "costs.png"} & names and "votes.png" in names
  before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
  assert json.loads(before["results.json"]) == old
  monkeypatch.setattr(os, "replace", unittest.mock.Mock(side_effect=OSError(errno.ENOSPC, "")))
  refused(("the disk is full, nothing was written", report.write_report, results | {"seed": 9}, tmp_path))
  assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_bad_arguments_are_refused(run):
  problems, candidates, scores = run

  def build(name="orm", **changes):
    return results_of((problems, candidates, {name: scores["orm"]}), **changes)

  for name in ("oracle", "weighted_self_consistency", "majority_verdict", "a/b", ""):
    refused((f"'{name}'", build, name))
  for changes, message in (({"ns": []}, "ns"), ({"ks": [0]}, "ks"), ({"ns": [5]}, "n=5")):
    refused((message, partial(build, **changes)))


ATTACK = "</pre></script><script>alert('x')</script><img src=x onerror=alert(1)> \"' {{ 1 }} ```"


def render(run, entries) -> tuple[str, str]:
  """index.html and report.md, with a fake figure."""
  results = results_of(run, ns=[4], ks=[4], meta={"notes": ["trained from <scratch>"]})
  files = pages.render(results, [plots.Figure("a.png", "A caption.", b"png")], entries)
  return files["index.html"].decode(), files["report.md"].decode()


def test_entries_match_their_kind(run):
  problems, candidates, scores = run
  entries = browse.pick_entries(problems, candidates, scores, per_kind=2, votes_shown=1)
  kinds = {kind: [entry for entry in entries if entry.kind == kind] for kind in ("fooled", "missed", "typical")}
  assert all(kinds.values())
  assert all(entry.value > 0.5 and not entry.candidate.correct for entry in kinds["fooled"])
  assert all(entry.value <= 0.5 and entry.candidate.correct for entry in kinds["missed"])
  assert all(len(entry.votes) == 1 for entry in entries)
  assert {entry.num_votes for entry in entries if entry.verifier == "genrm_cot"} == {4}
  worst = max(score.value for score, candidate in zip(scores["orm"], candidates, strict=True) if not candidate.correct)
  assert next(entry for entry in kinds["fooled"] if entry.verifier == "orm").value == worst
  for entry in entries:
    of_problem = [s.value for s in scores[entry.verifier] if s.problem_id == entry.problem.id]
    assert entry.is_best == (entry.value == max(of_problem))


def test_likelihoods_are_judged_by_their_median(run):
  problems, candidates, scores = run
  small = [Score(s.problem_id, s.candidate_index, "mine", 5, s.value * 1e-6) for s in scores["orm"]]
  entries = browse.pick_entries(problems, candidates, {"mine": small}, likelihoods=frozenset({"mine"}))
  fooled, missed = ([entry.value for entry in entries if entry.kind == kind] for kind in ("fooled", "missed"))
  assert fooled and missed and min(fooled) > max(missed)
  assert "fooled" not in {entry.kind for entry in browse.pick_entries(problems, candidates, {"mine": small})}
  unscored = [dataclasses.replace(score, value=None) for score in small]
  assert browse.pick_entries(problems, candidates, {"mine": unscored}) == []


def test_text_cannot_break_the_page():
  problems, candidates, scores = toy_run(rationale=ATTACK)
  problems = [dataclasses.replace(p, question=ATTACK + p.id, reference="reference " + ATTACK) for p in problems]
  candidates = [dataclasses.replace(c, text=ATTACK, answer=ATTACK) for c in candidates]
  run = problems, candidates, {ATTACK.replace("/", ""): scores["orm"], "genrm_cot": scores["genrm_cot"]}
  entries = browse.pick_entries(*run)
  page, markdown = render(run, entries)
  assert page.count("<script") == page.count("</script") == page.count("<img") == 1  # ours, and the figure
  texts = sum(4 + sum(vote.text == ATTACK for vote in entry.votes) for entry in entries)  # question, answer, ...
  assert page.count("alert(&#39;x&#39;)") >= texts and "trained from &lt;scratch&gt;" in page
  assert not re.search(r"(src|href)=\"(?!data:)|url\(|@import|fetch\(", page), "the page is self-contained"
  # In Markdown the text is fenced by more backticks than it contains.
  assert markdown.count("````text\n") == len({(e.verifier, e.kind) for e in entries if e.kind != "typical"})


def test_page_size_is_bounded_and_the_first_entries_of_each_kind_are_kept(run, monkeypatch):
  entries = browse.pick_entries(*toy_run(num_problems=40))
  kinds = [(entry.verifier, entry.kind) for entry in entries]
  ranks = [kinds[:at].count(kind) for at, kind in enumerate(kinds)]
  by_rank = sorted(range(len(entries)), key=lambda at: ranks[at])
  for count in (1, 7, len(entries)):
    assert browse.most_telling(entries, [10] * len(entries), 10 * count + 5) == sorted(by_rank[:count])
  entries = browse.pick_entries(*run)
  room = len(render(run, entries)[0].encode()) - 8_000
  monkeypatch.setattr(pages, "PAGE_BYTES", room)
  page, _ = render(run, entries)
  assert len(page.encode()) <= room and 0 < page.count("<details") < len(entries)
  monkeypatch.setattr(pages, "PAGE_BYTES", 10**9)
  long = run[0], [dataclasses.replace(c, text="7" * 1_000_000) for c in run[1]], run[2]
  page, markdown = render(long, browse.pick_entries(*long))
  assert "994,000 more characters" in page and len(page) < 1_000_000 and len(markdown) < 100_000
