"""Damaged inputs of the studies, by systematic changes: each is read, or refused in one message; nothing is written."""

import dataclasses
import pathlib
import random

import made_up_runs
import saved_runs
from etils import epath
from sweep import Sweep

from experiments.studies import gsm8k_answers, gsm8k_rationales, gsm8k_slips, results_page
from genrm_jax.data import jsonl
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
  """Without checkpoints: loading them has a sweep of its own."""
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
