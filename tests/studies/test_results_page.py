"""The page of results: from made-up runs with known answers, and from the committed JSON, word for word."""

import json
import pathlib
import re
import shutil

import pytest
from made_up_runs import POOL, PROBLEMS, RATIONALE, generation_of, place, results_of

from experiments.studies import results_page
from experiments.studies import runs as studies
from genrm_jax.runtime.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]
COMMITTED = ROOT / "results" / "list_tasks"


@pytest.fixture(scope="module")
def parts():
  """Results to build folders from: two seeds of a main run, and of a verifier that misses four more."""
  return {
    "main": [results_of("last_letter", seed, {"judge": 9, "orm": 3, "genrm_cot": seed}) for seed in (0, 1)],
    "worse": [results_of("last_letter", seed, {"genrm_cot": seed + 4}) for seed in (0, 1)],
    "inner": [results_of("last_letter", seed, {"orm": 0, "genrm_cot": 0}, in_distribution=True) for seed in (0, 1)],
    "other": results_of("word_sorting", 0, {"orm": 1, "genrm_cot": 0}),
  }


@pytest.fixture(scope="module")
def whole(parts, tmp_path_factory):
  """A main run with two seeds and a study of each kind; word_sorting has a main run only. Beside it the page."""
  home = tmp_path_factory.mktemp("whole")
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
  return home


@pytest.fixture(scope="module")
def page(whole):
  return (whole / "docs" / "results.md").read_text()


@pytest.fixture
def folder(whole, tmp_path):
  """The same results, to change."""
  return pathlib.Path(shutil.copytree(whole / "results", tmp_path / "results"))


def row_of(page, *cells, after=""):
  """The cells of the one row that begins with these; of the section with this heading, if one is given."""
  section = page.partition(f"\n## {after}")[2].partition("\n## ")[0] if after else page
  found = [line for line in section.splitlines() if line.startswith("| " + " | ".join(cells) + " |")]
  assert len(found) == 1, (cells, found)
  return found[0].strip("| ").split(" | ")


def test_the_page_tells_first_what_the_models_are(page):
  assert page.splitlines()[0].startswith("**No pretrained Gemma was used: a small Gemma-architecture base")


def test_table_1(page):
  # 9 of 12 are solvable; missed are 0 and 1, by the ORM 3; in word_sorting 0 and 1, one seed.
  assert row_of(page, "GenRM-CoT")[1].startswith("70.8 [") and row_of(page, "GenRM-CoT")[2:5:2] == [
    "75.0 / 66.7",
    "75.0",
  ]
  assert row_of(page, "ORM")[2] == "50.0 / 50.0"
  assert row_of(page, "Oracle (pass@N)")[2] == "75.0 / 75.0"
  assert row_of(page, "pass@1")[2] == "18.8 / 18.8"
  assert row_of(page, "Self-consistency, votes weighted by GenRM-CoT")[2] == "75.0 / 66.7"
  assert row_of(page, "GenRM-CoT, percent of the Oracle's accuracy")[2] == "100.0 / 88.9"
  assert row_of(page, "GenRM-CoT, percent of the Oracle's accuracy")[1].startswith("94.4 [")
  assert row_of(page, "GenRM-CoT minus ORM")[1].startswith("+20.8 [+")
  assert row_of(page, "GenRM-CoT minus ORM")[2:] == ["+25.0 / +16.7", "+8.3 [+0.0, +25.0]", "+8.3"]


def test_table_2_sets_in_distribution_beside_out(page):
  cot = row_of(page, "last_letter", "GenRM-CoT", after="Table 2")
  assert cot[2].startswith("75.0 [") and cot[3].startswith("70.8 [")
  # Of 48 solutions called right are one a problem: 9 right ones, 3 wrong ones; one missed makes two more errors.
  assert cot[4].startswith("93.8 [") and cot[5].startswith("91.7 [")
  assert cot[6] == "1.000 [1.000, 1.000]" and cot[7].startswith("0.963 [")
  assert row_of(page, "word_sorting", "GenRM-CoT", after="Table 2")[2] == "–"


def test_studies_take_their_numbers_from_the_runs(page):
  few = row_of(page, "last_letter", "GenRM-CoT", "50")
  assert few[4] == "41.7 / 33.3" and few[5].startswith("-33.3 [") and few[6] == "0, 1"
  assert row_of(page, "last_letter", "GenRM-CoT", "600")[4:6] == ["75.0 / 66.7", "–"]
  assert row_of(page, "last_letter", "GenRM-CoT", "80,000")[4] == "41.7 / 33.3"
  assert row_of(page, "last_letter", "GenRM-CoT", "570,000")[4] == "75.0 / 66.7"


def test_lambda_verifies_and_generates(page):
  none, third = row_of(page, "last_letter", "0"), row_of(page, "last_letter", "0.33")
  assert none[3] == none[5] == "–" and none[4].startswith("25.0 [")
  assert third[3].startswith("-33.3 [") and third[4].startswith("50.0 [") and third[5] == "–", "nothing solves alone"
  assert third[7] == "50.0 / 50.0"


def place_solvers(folder, parts):
  """Runs that were trained on solutions alone, and solve all."""
  for seed in (0, 1):
    alone = {"solve_weight": 1.0, "max_rationales": 0}
    place(folder, parts["worse"][seed], "lambda_only", seed, settings=alone, generation=generation_of(seed, 12))


def test_lambdas_are_compared_with_0_and_with_solutions_alone(parts, folder):
  place_solvers(folder, parts)
  for seed in (0, 1):
    place(folder, parts["worse"][seed], "lambda_none", seed, generation=generation_of(seed, 0))
  page, _ = results_page.page_text(folder, folder)
  assert row_of(page, "last_letter", "0")[6] == "41.7 / 33.3"
  assert row_of(page, "last_letter", "0.33")[3] == "+0.0 [+0.0, +0.0]"
  assert row_of(page, "last_letter", "0.33")[5].startswith("-50.0 [")
  assert row_of(page, "last_letter", "0")[5].startswith("-100.0 [")
  only = row_of(page, "last_letter", "solutions only")
  assert (only[3], only[5]) == ("+0.0 [+0.0, +0.0]", "–")


def test_without_a_lambda_of_0_the_main_run_is_it(folder, parts):
  place_solvers(folder, parts)
  page, _ = results_page.page_text(folder, folder)
  assert row_of(page, "last_letter", "0")[5].startswith("-75.0 [")
  assert row_of(page, "last_letter", "solutions only")[3].startswith("-33.3 [")


def test_studies_are_compared_with_as_many_votes_of_the_main_run(folder):
  for seed in (0, 1):
    path = folder / "last_letter" / f"tiny-seed{seed}.json"
    main = json.loads(path.read_text())
    main["verifiers"]["genrm_cot"]["coverage"]["votes_per_candidate"] = 32
    by_k = main["per_problem"]["by_k"]["genrm_cot"]
    by_k |= {"32": by_k["2"], "2": [0] * PROBLEMS}
    path.write_text(json.dumps(main))
  page, _ = results_page.page_text(folder, folder)
  assert "GenRM-CoT with K = 2 votes." in page
  few = row_of(page, "last_letter", "GenRM-CoT", "50")
  assert few[4] == "41.7 / 33.3" and few[5].startswith("+37.5 [+")
  assert row_of(page, "last_letter", "GenRM-CoT", "600")[4] == "0.0 / 0.0"
  assert row_of(page, "last_letter", "tiny")[3].startswith("0.0 [")
  assert row_of(page, "GenRM-CoT")[2] == "75.0 / 66.7", "table 1 has all votes"


def test_an_ablation_tells_what_differs(page):
  cells = row_of(page, "last_letter", "no_gaps")
  assert cells[2] == 'gaps: {"=": 40} -> {}'
  assert cells[3].startswith("41.7 [") and cells[4].startswith("-33.3 [") and cells[6] == "0"


def test_what_was_not_run_is_named_in_one_line(page):
  (line,) = [line for line in page.splitlines() if line.startswith("Not run: ")]
  for missing in (
    "last_letter: dpo",
    "last_letter with seed 1: no_gaps",
    "word_sorting: model size",
    "word_sorting: in distribution",
    "word_sorting: ablations",
  ):
    assert f" {missing};" in line.replace("Not run:", "Not run:;").rstrip(".") + ";"
  assert "last_letter: in distribution" not in line and "last_letter: model size" not in line


def test_a_seed_that_lacks_a_verifier_leaves_its_place_empty(parts, folder):
  without_orm = results_of("last_letter", 1, {"genrm_cot": 1})
  place(folder, without_orm, "tiny", 1)
  page, _ = results_page.page_text(folder, folder)
  assert row_of(page, "ORM")[2] == "50.0 / –"
  assert "last_letter with seed 1: judge, orm, in distribution, no_gaps" in page


def test_notes_samples_and_sources(page):
  assert "What {{ failed }} | and **why**." in page
  assert f"rationale  {RATIONALE}\n````\n" in page, "verbatim, in a longer fence"
  assert "p(Yes) 0.900" in page and "fooled**: the solution is wrong" in page
  for variant, seed in (("tiny", 1), ("lambda_third", 0)):
    cells = row_of(page, f"last_letter/{variant}-seed{seed}.json")
    assert cells[1:5] == [str(seed), f"{variant}-hash"[:12], "c0ffee", f"2026-11-2{seed}T10:00:00Z"]
  assert row_of(page, "base")[1:] == ["100", "100"] and row_of(page, "all stages")[1] == "110"


def test_how_long_all_of_it_took(page):
  # base and score of 9 runs of last_letter (994 s) and one of word_sorting (110 s)
  assert "in hours of one core: last_letter 0.3, word_sorting 0.0." in page


def test_every_table_is_whole(page):
  for table in re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE):
    lines = table.replace("\\|", "").splitlines()
    assert len(lines) > 2 and len({line.count("|") for line in lines}) == 1


def test_the_figures_and_the_same_bytes_twice(page, whole):
  files = {path.name: path.read_bytes() for path in (whole / "docs" / "figures").iterdir()}
  assert set(files) == {"best_of_n.png", "votes.png", "train_size.png", "model_size.png"}
  assert all(f"](figures/{name})" in page for name in files)
  text, figures = results_page.page_text(whole / "results", whole / "docs")
  assert text == page and {figure.file: figure.png for figure in figures} == files


def test_the_points_of_a_figure_are_of_the_same_seeds(folder):
  (folder / "last_letter" / "size_small-seed1.json").unlink()
  task, _ = studies.gather(results_page.read_runs(folder))
  of_size, of_train = task.with_seeds_of_all(studies.SIZE), task.with_seeds_of_all(studies.TRAIN)
  for variant in ("tiny", "size_small"):
    assert set(of_size.figures[variant, task.best_of_n("genrm_cot")].by_seed) == {0}
  assert set(of_size.runs) == {"tiny", "size_small"}
  assert set(of_train.figures["train_few", task.best_of_n("genrm_cot")].by_seed) == {0, 1}


def test_a_table_tells_of_votes_where_there_are_some(folder):
  place(folder, results_of("last_letter", 0, {"orm": 3}), "steps_9", 0, settings={"optim": {"num_steps": 9}})
  page, _ = results_page.page_text(folder, folder)
  section = {name: page.partition(f"## Accuracy by {name}")[2].partition("## ")[0] for name in studies.STUDIES[:3]}
  assert "votes." not in section[studies.STEPS] and "9" in section[studies.STEPS]
  assert "GenRM-CoT with K = 2 votes." in section[studies.TRAIN] and "K = 2 votes." in section[studies.SIZE]


def test_one_task_alone_makes_a_page(parts, tmp_path):
  place(tmp_path / "results", parts["other"], "tiny", 0)
  page, figures = results_page.page_text(tmp_path / "results", tmp_path)
  assert "Not run: last_letter;" in page and "Unified training: " not in page
  assert [figure.file for figure in figures] == ["best_of_n.png", "votes.png"]


# What cannot be compared or read.


def refusal(folder):
  with pytest.raises(UserError) as error:
    results_page.page_text(folder, folder)
  return str(error.value)


def test_another_bank_is_refused_and_both_files_named(parts, folder):
  path = place(folder, parts["worse"][1], "train_few", 1, meta={"bank": "another bank"})
  message = refusal(folder)
  assert str(path) in message and str(folder / "last_letter" / "tiny-seed1.json") in message
  assert "different banks" in message


def test_other_numbers_of_votes_are_refused(folder):
  path = place(folder, results_of("last_letter", 0, {"genrm_cot": 0}, votes=4), "no_gaps", 0)
  assert f"{path} has 4 votes of genrm_cot a candidate, and" in refusal(folder)


def test_studies_with_other_numbers_of_votes_are_refused(parts, folder):
  path = folder / "last_letter" / "no_gaps-seed0.json"
  results = json.loads(path.read_text())
  results["verifiers"]["genrm_cot"]["coverage"]["votes_per_candidate"] = 1
  path.write_text(json.dumps(results))
  assert "other numbers of votes of genrm_cot; make them equal" in refusal(folder)


def test_a_study_without_its_main_run_is_refused(parts, folder):
  path = place(folder, parts["worse"][1], "train_few", 5)
  assert f"{path}: there is no main run (tiny) of last_letter with seed 5" in refusal(folder)


def test_seeds_of_a_variant_must_be_the_same_study(parts, folder):
  place(folder, parts["worse"][1], "train_few", 1, settings={"max_problems": 60})
  assert "last_letter train_few: seeds of one variant differ in training-set size: 50 in" in refusal(folder)


def test_a_file_in_another_runs_place_is_refused(folder):
  path = folder / "last_letter" / "tiny-seed1.json"
  (folder / "last_letter" / "tiny-seed0.json").write_text(path.read_text())
  assert "tiny-seed0.json: holds last_letter tiny with seed 1, so its place is" in refusal(folder)


def _without(*keys):
  def change(results):
    inner = results
    for key in keys[:-1]:
      inner = inner[key]
    del inner[keys[-1]]

  return change


@pytest.mark.parametrize(
  ("change", "told"),
  [
    (_without("per_problem"), "no 'per_problem'"),
    (_without("meta", "bank"), "no 'bank'"),
    (_without("per_problem", "by_n", "orm", str(POOL)), f"no '{POOL}'"),
    (lambda r: r["meta"].update(seed="0"), "meta.seed is no int"),
    (lambda r: r["per_problem"]["pass1"].pop(), "does not hold 12 numbers from 0 to 1"),
    (lambda r: r["per_problem"]["by_n"]["orm"]["1"].__setitem__(0, 1.5), "does not hold 12 numbers from 0 to 1"),
    (lambda r: r["samples"][0].pop("p_yes"), "no 'p_yes'"),
    (lambda r: r.update(verifiers=[]), "'list' object"),
  ],
)
def test_what_is_no_run_of_this_version_is_told_in_one_message(change, told, folder):
  path = folder / "last_letter" / "tiny-seed0.json"
  results = json.loads(path.read_text())
  change(results)
  path.write_text(json.dumps(results))
  message = refusal(folder)
  assert message.startswith(f"{path}: not the results.json of a run (") and told in message


@pytest.mark.parametrize("text", ["{", "", "[1, 2]", "null", '"text"'])
def test_broken_json_is_named(text, folder):
  path = folder / "last_letter" / "tiny-seed0.json"
  path.write_text(text)
  assert refusal(folder).startswith(f"{path}: not ")


def test_an_empty_folder_is_told_with_the_remedy(tmp_path):
  assert f"copy each run's report/results.json to {tmp_path}/<task>/" in refusal(tmp_path)


def test_studies_by_name():
  assert [studies.study_of(name) for name in ("tiny", "train_500", "size_big", "lambda_0.1", "no_stop")] == [
    "",
    studies.TRAIN,
    studies.SIZE,
    studies.LAMBDA,
    studies.ABLATIONS,
  ]


# The committed page.


@pytest.mark.skipif(not COMMITTED.exists(), reason="no results are committed yet")
def test_the_committed_page_is_made_of_the_committed_results():
  text, figures = results_page.page_text(COMMITTED, ROOT / "docs")
  assert text == (ROOT / "docs" / results_page.PAGE).read_text(), "run python -m experiments.studies.results_page"
  assert {figure.file for figure in figures} <= {path.name for path in (ROOT / "docs" / "figures").iterdir()}
  assert sum(path.stat().st_size for path in COMMITTED.rglob("*.json")) < 3_000_000
