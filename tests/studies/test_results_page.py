"""The results page, from made-up runs with known answers and from the committed JSON; pooling over seeds."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from made_up_runs import POOL, PROBLEMS, RATIONALE, generation_of, place, results_of
from refusals import refused

from experiments.studies import results_page, runs, seeds
from genrm_jax.evals import metrics
from genrm_jax.evals.metrics import Quantity

ROOT = pathlib.Path(__file__).parents[2]
COMMITTED = ROOT / "results" / "list_tasks"
COT = "GenRM-CoT"


@pytest.fixture(scope="module")
def parts():
  """Results to build folders from: two seeds of a main run, and of a verifier that fails on four more problems."""
  return {
    "main": [results_of("last_letter", seed, {"judge": 0, "orm": 6, "genrm_cot": 9 - seed}) for seed in (0, 1)],
    "worse": [results_of("last_letter", seed, {"genrm_cot": 5 - seed}) for seed in (0, 1)],
    "inner": [results_of("last_letter", seed, {"orm": 9, "genrm_cot": 9}) for seed in (0, 1)],
    "other": results_of("word_sorting", 0, {"mine": 7, "orm": 8, "genrm_cot": 9}),
  }


@pytest.fixture(scope="module")
def home(parts, tmp_path_factory):
  """A main run with two seeds and a study of each kind; word_sorting has only a main run. Beside them the page."""
  home = tmp_path_factory.mktemp("home")
  results = home / "results"
  for seed in (0, 1):
    main, worse = parts["main"][seed], parts["worse"][seed]
    place(results, main, "tiny", seed, in_distribution=parts["inner"][seed], generation=generation_of(seed, 3))
    place(results, worse, "train_few", seed, settings={"max_problems": 50})
    place(results, worse, "size_small", seed, meta={"num_params": 80_000})
    place(results, worse, "lambda_third", seed, settings={"solve_weight": 0.33}, generation=generation_of(seed, 6))
  place(results, parts["worse"][0], "no_gaps", 0, config={"gaps": {}})
  place(results, parts["other"], "tiny", 0)
  (home / "docs").mkdir()
  (home / "docs" / "results_notes.md").write_text("What {{ failed }} | and **why**.\n")
  results_page.write_page(results, home / "docs")
  files = {path.name: path.read_bytes() for path in (home / "docs" / "figures").iterdir()}
  assert set(files) == {"best_of_n.png", "votes.png", "train_size.png", "model_size.png"} and all(files.values())
  return home


@pytest.fixture(scope="module")
def page(home):
  return (home / "docs" / "results.md").read_text()


@pytest.fixture
def folder(home, tmp_path):
  """The same results, to change."""
  return pathlib.Path(shutil.copytree(home / "results", tmp_path / "results"))


def page_of(folder):
  return results_page.page_text(folder, folder)[0]


def row_of(page, *cells, after=""):
  """The cells of the only row that begins with these, in the section with this heading if one is given."""
  section = page.partition(f"\n## {after}")[2].partition("\n## ")[0] if after else page
  rows = [line for line in section.splitlines() if line.startswith("| " + " | ".join(cells) + " |")]
  assert len(rows) == 1, (cells, rows)
  return rows[0].strip("| ").split(" | ")


def change(path, edit):
  results = json.loads(path.read_text())
  edit(results)
  path.write_text(json.dumps(results))


def test_rows(page):
  assert "What {{ failed }} | and **why**." in page and f"rationale  {RATIONALE}\n````\n" in page, "verbatim"
  for row, after, wanted in (
    # 9 of 12 problems are solvable; GenRM-CoT solves 9 and 8, the ORM 6 of them; on word_sorting 9 and 8, one seed.
    ((COT,), "Table 1", {1: "70.8 [", 2: "75.0 / 66.7", 4: "75.0"}),
    (("ORM",), "Table 1", {2: "50.0 / 50.0"}),
    (("mine",), "Table 1", {4: "58.3"}),
    (("Weighted self-consistency, GenRM-CoT",), "", {2: "75.0 / 66.7"}),
    (("GenRM-CoT, percent of the Oracle's accuracy",), "", {1: "94.4 [", 2: "100.0 / 88.9"}),
    (("GenRM-CoT minus ORM",), "", {1: "+20.8 [+", 2: "+25.0 / +16.7", 3: "+8.3 [+0.0, +25.0]", 4: "+8.3"}),
    # One solution per problem is called correct: 9 correctly, 3 not; a problem not solved makes two more errors.
    (("last_letter", COT), "Table 2", {2: "75.0 [", 3: "70.8 [", 4: "93.8 [", 5: "91.7 [", 6: "1.000 [1.000, 1.000]"}),
    (("last_letter", COT), "Table 2", {7: "0.963 ["}),
    (("last_letter", COT, "50"), "", {4: "41.7 / 33.3", 5: "-33.3 [", 6: "0, 1"}),
    (("last_letter", COT, "600"), "", {4: "75.0 / 66.7", 5: "–"}),
    (("last_letter", "0"), "Unified", {3: "–", 4: "25.0 [", 5: "–"}),
    (("last_letter", "0.33"), "Unified", {3: "-33.3 [", 4: "50.0 [", 5: "–", 7: "50.0 / 50.0"}),
    (("last_letter", "no_gaps"), "", {2: 'gaps: {"=": 40} -> {}', 3: "41.7 [", 4: "-33.3 [", 6: "0"}),
    (("last_letter/lambda_third-seed0.json",), "", {1: "0", 2: "lambda_third", 3: "c0ffee", 4: "2026-11-20T10:00:00Z"}),
    (("all stages",), "", {1: "110", 2: "110"}),
  ):
    cells = row_of(page, *row, after=after)
    for column, start in wanted.items():
      assert cells[column].startswith(start), (column, cells)


def test_studies_are_compared_at_the_same_number_of_votes(folder):
  def more_votes(results):
    results["verifiers"]["genrm_cot"]["coverage"]["votes_per_candidate"] = 32
    by_k = results["per_problem"]["by_k"]["genrm_cot"]
    by_k |= {"32": by_k["2"], "2": [0] * PROBLEMS}

  for seed in (0, 1):
    change(folder / "last_letter" / f"tiny-seed{seed}.json", more_votes)
  page = page_of(folder)
  few = row_of(page, "last_letter", COT, "50")
  assert few[4] == "41.7 / 33.3" and few[5].startswith("+37.5 [+")
  assert row_of(page, "last_letter", COT, "600")[4] == "0.0 / 0.0"
  assert row_of(page, COT)[2] == "75.0 / 66.7", "table 1 uses all votes"


def test_points_of_a_figure_share_their_seeds(folder):
  (folder / "last_letter" / "size_small-seed1.json").unlink()
  task, _ = runs.make_tasks(results_page.read_runs(folder))
  by_size, by_train = task.with_seeds_of_all(runs.SIZE), task.with_seeds_of_all(runs.TRAIN)
  for variant in ("tiny", "size_small"):
    assert set(by_size.pooled[variant, task.best_of_n("genrm_cot")].by_seed) == {0}
  assert set(by_train.pooled["train_few", task.best_of_n("genrm_cot")].by_seed) == {0, 1}


def test_runs_that_cannot_be_compared_are_refused(parts, folder):
  few, gaps = folder / "last_letter" / "train_few-seed1.json", folder / "last_letter" / "no_gaps-seed0.json"
  seed_5 = few.with_name("train_few-seed5.json")

  def one_vote(results):
    results["verifiers"]["genrm_cot"]["coverage"]["votes_per_candidate"] = 1

  for path, message, make in (
    (few, "banks", lambda: place(folder, parts["worse"][1], "train_few", 1, meta={"bank": "b"})),
    (few, "set size", lambda: place(folder, parts["worse"][1], "train_few", 1, settings={"max_problems": 60})),
    (seed_5, "seed 5", lambda: place(folder, parts["worse"][1], "train_few", 5)),
    (gaps, "numbers of votes", lambda: change(gaps, one_vote)),
    (gaps, "has 4 votes", lambda: place(folder, results_of("last_letter", 0, {"genrm_cot": 9}, votes=4), "no_gaps", 0)),
    (gaps, "move it", lambda: shutil.copy(few, gaps)),
  ):
    before = path.read_bytes() if path.exists() else b""
    make()
    refused((f"(?=.*{path}).*{message}", page_of, folder))
    path.write_bytes(before) if before else path.unlink()


def test_damaged_files_are_named(folder):
  path = folder / "last_letter" / "tiny-seed0.json"
  whole = path.read_text()
  for damage in (
    *(lambda r: r.pop("per_problem"), lambda r: r["meta"].pop("bank"), lambda r: r.update(verifiers=[])),
    lambda r: r["per_problem"]["by_n"]["orm"].pop(str(POOL)),
    lambda r: r["meta"].update(seed="0"),
    lambda r: r["per_problem"]["pass1"].pop(),
    lambda r: r["per_problem"]["by_n"]["orm"]["1"].__setitem__(0, 1.5),
    lambda r: r["samples"][0].pop("p_yes"),
    *("{", "", "null"),
  ):
    path.write_text(damage if isinstance(damage, str) else whole)
    if not isinstance(damage, str):
      change(path, damage)
    refused((f"^{path}: not ", page_of, folder))


def test_committed_page_is_made_from_the_committed_results():
  text, figures = results_page.page_text(COMMITTED, ROOT / "docs")
  assert text == (ROOT / "docs" / results_page.PAGE).read_text(), "run python -m experiments.studies.results_page"
  assert {figure.file for figure in figures} <= {path.name for path in (ROOT / "docs" / "figures").iterdir()}


def means(*columns):
  return {seed: metrics.mean(np.array(column, float)) for seed, column in enumerate(columns)}


def test_value_is_the_mean_over_seeds_and_undefined_where_one_is():
  pooled = seeds.pool({"a": means([1, 0, 0, 1], [1, 1, 1, 1, 1, 0])}, draws=500)["a"]
  assert pooled.by_seed == {0: 0.5, 1: 0.833333}
  # Seeds count equally, whatever their number of problems.
  assert pooled.value == pytest.approx((0.5 + 5 / 6) / 2, abs=1e-6)
  assert pooled.low < pooled.value < pooled.high
  empty = Quantity(((np.zeros(3), np.zeros(3)),))
  pooled = seeds.pool({"a": {0: metrics.mean(np.ones(3)), 1: empty}}, draws=100)["a"]
  assert (pooled.value, pooled.low, pooled.high, pooled.by_seed) == (None, None, None, {0: 1, 1: None})


def test_differences_are_paired_by_seed_and_problem():
  rng = np.random.default_rng(1)
  left = [rng.random(50) + shift for shift in (0, 5, 9)]
  right = [column - 0.25 for column in left]
  differences = [a - b for a, b in zip(left, right, strict=True)]
  found = seeds.pool({"left": means(*left), "difference": means(*differences)}, draws=500)
  assert found["left"].high - found["left"].low > 4
  assert (found["difference"].low, found["difference"].high) == (0.25, 0.25)


def test_ratios_and_averages_of_ratios():
  over, under = np.array([1.0, 0, 1, 1]), np.array([2.0, 1, 1, 1])
  both = Quantity(((over, under), (under, under)))
  found = seeds.pool({"ratio": {0: Quantity(((over, under),))}, "both": {0: both}, "last": {0: both}}, draws=300)
  assert found["ratio"].value == 0.6
  assert found["both"] == found["last"] and found["both"].value == 0.8
  assert found == seeds.pool({name: {0: both} for name in ("both", "last")}, draws=300) | {"ratio": found["ratio"]}
  assert found["both"].low == pytest.approx((found["ratio"].low + 1) / 2)


def test_intervals_cover_a_mean_that_seeds_scatter_around():
  rng, trials = np.random.default_rng(2), 150
  hits = {"two levels": 0, "problems only": 0}
  for _ in range(trials):
    columns = [rng.normal(3 + shift, 1, 40) for shift in rng.normal(0, 0.5, 10)]
    pooled = seeds.pool({"a": means(*columns)}, draws=300)["a"]
    alone = metrics.bootstrap(metrics.mean(np.concatenate(columns)), seed=0, draws=300)
    for name, interval in zip(hits, (pooled, alone), strict=True):
      hits[name] += interval.low <= 3 <= interval.high
  assert hits["two levels"] / trials > 0.88
  assert hits["problems only"] / trials < 0.75
