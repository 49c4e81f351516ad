"""Candidates to browse: which are picked, what the page shows of them, and that no text can break it."""

import dataclasses
import html.parser
import re

import pytest
from evals_data import toy_run, vote

from genrm_jax.evals import browse, pages, plots, report
from genrm_jax.records import Candidate, Problem, Score

ATTACK = "</pre></script><script>alert('x')</script><img src=x onerror=alert(1)> \"' {{ 1 }} ```"


def results_of(run):
  return report.build_results(*run, ns=[4], ks=[4], seed=0, meta={"notes": ["trained from <scratch>"]})


def render(run, examples) -> tuple[str, str]:
  """index.html and report.md; no figures, which take the time."""
  files = pages.render(results_of(run), [plots.Figure("a.png", "A caption.", b"png")], examples)
  return files["index.html"].decode(), files["report.md"].decode()


class Reader(html.parser.HTMLParser):
  """What a browser makes of a page: its elements, the text of each case, the scripts."""

  def __init__(self, page: str) -> None:
    super().__init__()
    self.tags: list[str] = []
    self.cases: list[str] = []
    self.attributes: list[dict[str, str | None]] = []
    self.scripts: list[str] = []
    self._open: list[str] = []
    self.feed(page)

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    if tag not in ("meta", "img", "input"):
      self._open.append(tag)
    if tag == "details":
      self.cases.append("")
      self.attributes.append(dict(attrs))

  def handle_endtag(self, tag):
    assert self._open.pop() == tag, f"</{tag}> closes nothing"

  def handle_data(self, data):
    if "script" in self._open:
      self.scripts.append(data)
    elif "details" in self._open:
      self.cases[-1] += data


@pytest.fixture(scope="module")
def run():
  return toy_run()


@pytest.fixture(scope="module")
def mistaken():
  """A larger run, in which GenRM-CoT is always wrong."""
  problems, candidates, scores = toy_run(num_problems=40)
  turned = [dataclasses.replace(score, value=1 - score.value) for score in scores["genrm_cot"]]
  return problems, candidates, scores | {"genrm_cot": turned}


def test_examples_are_what_they_are_called(run):
  examples = browse.pick_examples(*run, per_kind=2, votes_shown=1)
  kinds = {kind: [one for one in examples if one.kind == kind] for kind in ("fooled", "missed", "typical")}
  assert all(kinds.values())
  assert all(one.value > 0.5 and not one.candidate.correct for one in kinds["fooled"])
  assert all(one.value <= 0.5 and one.candidate.correct for one in kinds["missed"])
  assert all(len(one.votes) == 1 for one in examples)
  assert {one.num_votes for one in examples if one.verifier == "genrm_cot"} == {4}
  worst = max(score.value for score, candidate in zip(run[2]["orm"], run[1], strict=True) if not candidate.correct)
  assert next(one for one in kinds["fooled"] if one.verifier == "orm").value == worst
  best = {}
  for score in run[2]["orm"]:
    best[score.problem_id] = max(score.value, best.get(score.problem_id, 0))
  found = {(one.problem.id, one.is_best) for one in examples if one.verifier == "orm"}
  values = {(one.problem.id, one.value == best[one.problem.id]) for one in examples if one.verifier == "orm"}
  assert found == values and {is_best for _, is_best in found} == {True, False}


def test_a_likelihood_is_judged_by_its_median():
  problems, candidates, scores = toy_run()
  small = [Score(s.problem_id, s.candidate_index, "dpo", 5, s.value * 1e-6) for s in scores["orm"]]
  examples = browse.pick_examples(problems, candidates, {"dpo": small})
  fooled, missed = ([one.value for one in examples if one.kind == kind] for kind in ("fooled", "missed"))
  assert fooled and missed and min(fooled) > max(missed)
  unscored = [Score(s.problem_id, s.candidate_index, "dpo", 5, None) for s in small]
  assert browse.pick_examples(problems, candidates, {"dpo": unscored}) == []


def test_text_of_data_is_text_on_the_page():
  problems, candidates, scores = toy_run(rationale=ATTACK)
  problems = [Problem(p.id, p.task, p.split, ATTACK + p.id, p.answer, "reference " + ATTACK) for p in problems]
  candidates = [Candidate(c.problem_id, c.index, ATTACK, ATTACK, c.correct, "test") for c in candidates]
  scores = {ATTACK.replace("/", ""): scores["orm"], "genrm_cot": scores["genrm_cot"]}
  run = problems, candidates, scores
  examples = browse.pick_examples(*run)
  page, text = render(run, examples)
  reader = Reader(page)
  assert "alert(" not in "".join(reader.scripts) and len(reader.scripts) == 1
  assert reader.tags.count("script") == 1 and reader.tags.count("img") == 1  # the figure
  assert len(reader.cases) == len(examples)
  for example, shown, attributes in zip(examples, reader.cases, reader.attributes, strict=True):
    rationales = sum(vote.text == ATTACK for vote in example.votes)
    assert shown.count(ATTACK) >= 4 + rationales  # question, answer, solution, reference
    assert attributes["data-kind"] == example.kind
    assert attributes["data-verifier"] == browse_name(example.verifier)
  assert "trained from &lt;scratch&gt;" in page
  # Nothing is fetched from elsewhere.
  assert not re.search(r"(src|href)=\"(?!data:)|url\(|@import|fetch\(", page)
  # In Markdown the text is fenced by more backticks than it has.
  assert text.count("````text\n") == len({(one.verifier, one.kind) for one in examples if one.kind != "typical"})


def browse_name(verifier: str) -> str:
  return {"genrm_cot": "GenRM-CoT"}.get(verifier, verifier)


def test_the_page_can_be_read_without_scripts_and_filtered_with_them(mistaken):
  examples = browse.pick_examples(*mistaken)
  page, text = render(mistaken, examples)
  assert '<div class="filters" hidden>' in page  # no dead controls where scripts do not run
  assert "<details hidden" not in page
  for name in ("ORM", "GenRM-CoT", "fooled", "missed", "typical"):
    assert f"<option>{name}</option>" in page
  cot = next(shown for shown in Reader(page).cases if "GenRM-CoT" in shown)
  assert len(re.findall(r"Vote \d of 4", cot)) == 3 and "p(Yes) of the other votes" in cot and "missing" in cot
  # report.md has the worst of each kind and no more.
  part = text.partition("## Candidates to look at")[2]
  assert re.findall(r"^\*\*(.*)\*\*", part, re.MULTILINE) == [
    f"{name}, {kind}" for name in ("ORM", "GenRM-CoT") for kind in ("fooled", "missed")
  ]
  plain, plain_text = render(mistaken, [])
  assert "<script>" not in plain and "Candidates to look at" not in plain + plain_text


def test_the_page_keeps_its_size_by_leaving_out_the_least_telling(run, monkeypatch):
  examples = browse.pick_examples(*run)
  whole, _ = render(run, examples)
  assert "left out" not in whole
  monkeypatch.setattr(pages, "PAGE_BYTES", len(whole.encode()) - 8_000)
  page, _ = render(run, examples)
  assert len(page.encode()) <= pages.PAGE_BYTES
  kept = Reader(page).cases
  left_out = len(examples) - len(kept)
  assert 0 < left_out < len(examples) and f"{left_out:,} more, the least\n  telling, are left out" in page
  assert [shown for shown in Reader(whole).cases if shown in kept] == kept


def test_the_first_of_each_list_stay(mistaken):
  examples = browse.pick_examples(*mistaken)
  kinds = [(one.verifier, one.kind) for one in examples]
  kept = browse.most_telling(examples, [10] * len(examples), 10 * 9 + 5)
  assert len(kept) == 9 and kept == sorted(kept)
  assert len(set(kinds)) == 6
  for kind in set(kinds):
    of_kind = [at for at, other in enumerate(kinds) if other == kind]
    held = [at for at in of_kind if at in kept]
    assert held == of_kind[: len(held)] and len(held) in (1, 2)
  assert browse.most_telling(examples, [10] * len(examples), 10 * len(examples)) == [*range(len(examples))]


def test_a_text_of_megabytes_is_cut_and_says_so(run):
  problems, candidates, scores = run
  long = [Candidate(c.problem_id, c.index, "7" * 1_000_000, c.answer, c.correct, "test") for c in candidates]
  told = problems, long, {"orm": scores["orm"]}
  page, text = render(told, browse.pick_examples(*told))
  assert "… (994,000 more characters)" in page and "… (994,000 more characters)" in text
  assert len(page) < 400_000 and len(text) < 50_000


def test_votes_in_a_state_that_gives_no_number_are_told_as_they_are():
  problem, candidate = Problem("p0", "toy", "eval", "?", "1"), Candidate("p0", 0, "1", "1", True, "test")
  cast = tuple(vote(state, p) for state, p in [("ok", 0.2)] * 3 + [("forced", 0.25), ("truncated", None), ("ok", 1.0)])
  score = Score("p0", 0, "genrm_cot", 1, 0.3, cast)
  run = [problem], [candidate], {"genrm_cot": [score]}
  page = pages.render(report.build_results(*run, ns=[1], ks=[1], seed=0, meta={}), [], browse.pick_examples(*run))[
    "index.html"
  ].decode()
  assert '<p class="votes">0.25 (forced) truncated 1.00</p>' in page
