"""Candidates to browse: which are picked, that they fit, and that no text can break the page."""

import dataclasses
import re

from evals_data import toy_run

from genrm_jax.evals import browse, pages, plots, report
from genrm_jax.records import Score

ATTACK = "</pre></script><script>alert('x')</script><img src=x onerror=alert(1)> \"' {{ 1 }} ```"


def render(run, entries) -> tuple[str, str]:
  """index.html and report.md, with a fake figure."""
  results = report.build_results(*run, ns=[4], ks=[4], seed=0, meta={"notes": ["trained from <scratch>"]})
  files = pages.render(results, [plots.Figure("a.png", "A caption.", b"png")], entries)
  return files["index.html"].decode(), files["report.md"].decode()


def test_entries_match_their_kind():
  problems, candidates, scores = toy_run()
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


def test_likelihoods_are_judged_by_their_median():
  problems, candidates, scores = toy_run()
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


def test_page_size_is_bounded(monkeypatch):
  run = toy_run()
  entries = browse.pick_entries(*run)
  whole, _ = render(run, entries)
  monkeypatch.setattr(pages, "PAGE_BYTES", len(whole.encode()) - 8_000)
  page, _ = render(run, entries)
  assert len(page.encode()) <= pages.PAGE_BYTES and 0 < page.count("<details") < len(entries)
  long = [dataclasses.replace(candidate, text="7" * 1_000_000) for candidate in run[1]]
  monkeypatch.setattr(pages, "PAGE_BYTES", 10**9)
  page, markdown = render((run[0], long, run[2]), browse.pick_entries(run[0], long, run[2]))
  assert "994,000 more characters" in page and len(page) < 1_000_000 and len(markdown) < 100_000


def test_first_entries_of_each_kind_are_kept():
  entries = browse.pick_entries(*toy_run(num_problems=40))
  kinds = [(entry.verifier, entry.kind) for entry in entries]
  ranks = [kinds[:at].count(kind) for at, kind in enumerate(kinds)]
  by_rank = sorted(range(len(entries)), key=lambda at: ranks[at])
  for count in (1, 7, len(entries)):
    assert browse.most_telling(entries, [10] * len(entries), 10 * count + 5) == sorted(by_rank[:count])
