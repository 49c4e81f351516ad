"""Damaged inputs of studies, by systematic changes: each is read or refused; the results page; pooling over seeds."""

import dataclasses
import pathlib
import random

import made_up_runs
import numpy as np
import pytest
import saved_runs
from etils import epath
from sweep import Sweep

from experiments.studies import gsm8k_answers, gsm8k_rationales, gsm8k_slips, results_page, seeds
from genrm_jax.data import jsonl
from genrm_jax.evals import metrics
from genrm_jax.evals.metrics import Quantity
from genrm_jax.pipeline.experiment import make_stages
from genrm_jax.records import Score, Vote
from genrm_jax.tasks.gsm8k import sample
from genrm_jax.tasks.gsm8k.rows import BadRows, iter_pool


def _some_bits(sweep, name, number):
  size = (sweep.folder / name).stat().st_size
  sweep.bits(name, random.Random(name).sample(range(size), min(number, size)))


def test_results_of_runs(tmp_path):
  made_up_runs.place(tmp_path, made_up_runs.results_of("last_letter", 0, {"orm": 4, "genrm_cot": 8}), "tiny", 0)
  sweep, name = Sweep(tmp_path, results_page.read_runs, same=False), "last_letter/tiny-seed0.json"
  sweep.files(name)
  _some_bits(sweep, name, 300)
  sweep.values(name, keep=lambda keys: len(keys) < 4, every=3)
  assert sweep.counts["refused"] > 300 and sweep.counts["loaded"] > 50, sweep.counts


def test_a_finished_run(tmp_path):
  """A run without checkpoints; test_sweep.py damages those."""
  run = saved_runs.run_of(tmp_path, "gsm8k")
  for stage in make_stages(run)[:1]:
    stage.run()
  scores = [Score(c.problem_id, c.index, "orm", 1, 0.5, (Vote("ok", 0.5, 0.5, 1),)) for c in run.candidates("eval")]
  jsonl.write_records(run.path("scores", "orm.jsonl"), scores)
  meta = {"task": "gsm8k", "variant": "smoke", "seed": 0, "config_hash": "", "bank": ""}
  jsonl.write_json(
    run.path("report", "results.json"), {"meta": meta | {"config": {"verifiers": {"orm": {}, "genrm": {}}}}}
  )
  jsonl.write_records(
    run.path("scores", "genrm.jsonl"), [dataclasses.replace(score, verifier="genrm") for score in scores]
  )
  sweep = Sweep(pathlib.Path(run.workdir), lambda work: gsm8k_slips.measure(epath.Path(work)), same=False)
  for name in ("report/results.json", "scores/orm.jsonl", "candidates/eval.jsonl", "problems/eval.jsonl"):
    sweep.files(name)
    _some_bits(sweep, name, 100)
  sweep.values("report/results.json")
  assert sweep.counts["refused"] > 200 and sweep.counts["loaded"] > 20, sweep.counts


def test_the_release(tmp_path):
  def read(folder):
    gsm8k_answers.compare(folder)
    gsm8k_rationales.measure(iter_pool(folder, (0,), BadRows()), [])

  folder = sample.write(tmp_path, 5, 0)
  sweep = Sweep(pathlib.Path(folder), read, same=False)
  for path in sorted(p.relative_to(folder) for p in pathlib.Path(folder).rglob("*") if p.is_file()):
    sweep.files(str(path))
    _some_bits(sweep, str(path), 40)
  assert sweep.counts["refused"] > 100, sweep.counts


ROOT = pathlib.Path(__file__).parents[2]
COMMITTED = ROOT / "results" / "list_tasks"


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
  rng = np.random.default_rng(1)
  left = [rng.random(50) + shift for shift in (0, 5, 9)]
  right = [column - 0.25 for column in left]
  differences = [a - b for a, b in zip(left, right, strict=True)]
  found = seeds.pool({"left": means(*left), "difference": means(*differences)}, draws=500)
  assert found["left"].high - found["left"].low > 4
  assert (found["difference"].low, found["difference"].high) == (0.25, 0.25)


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
