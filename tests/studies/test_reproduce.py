"""Which runs are made in which order, what is kept of them, and what is said of one that fails."""

import datetime
import json
import os
import pathlib
import subprocess
import sys

import pytest

from experiments.configs import last_letter, word_sorting
from experiments.studies import reproduce
from genrm_jax.runtime.errors import UserError


def test_banks_come_before_the_studies_that_use_them():
  runs = reproduce.plan(["last_letter", "word_sorting"], ["0", "1"], [])
  assert runs[:4] == [(task, "tiny", seed) for task in ("last_letter", "word_sorting") for seed in ("0", "1")]
  assert "tiny" not in {variant for _, variant, _ in runs[4:]}
  assert len(set(runs)) == len(runs) == 2 * sum(map(len, reproduce.VARIANTS.values()))
  assert reproduce.plan(["word_sorting"], ["2"], ["lambda_1", "tiny"]) == [
    ("word_sorting", "tiny", "2"),
    ("word_sorting", "lambda_1", "2"),
  ]


def test_all_its_variants_are_there():
  for task, module in (("last_letter", last_letter), ("word_sorting", word_sorting)):
    assert [module.get_config(v).variant for v in reproduce.VARIANTS[task]] == list(reproduce.VARIANTS[task])


def test_an_unknown_task_is_named_by_the_command(tmp_path):
  command = [
    sys.executable,
    "-m",
    "experiments.studies.reproduce",
    f"--workdir={tmp_path / 'work'}",
    "--tasks=word_sorting,gsm",
  ]
  done = subprocess.run(command, cwd=pathlib.Path(__file__).parents[2], capture_output=True, text=True)
  assert (done.returncode, done.stdout) == (1, "")
  assert done.stderr == "error: no task gsm; there are: last_letter, word_sorting\n"
  assert not list(tmp_path.iterdir())


def test_a_bucket_is_refused(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr("sys.argv", ["reproduce", "--workdir=gs://bucket/work"])
  with pytest.raises(SystemExit):
    reproduce.main()
  assert capsys.readouterr().err.startswith("error: --workdir=gs://bucket/work: ")
  assert not list(tmp_path.iterdir())


def _interpreter(tmp_path, monkeypatch, lines):
  """A shell script that stands for Python; it writes its arguments to a file."""
  script = tmp_path / "python"
  script.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/args\n{lines}\n')
  script.chmod(0o755)
  monkeypatch.setattr(sys, "executable", str(script))


@pytest.mark.parametrize("variant", ["tiny", "lambda_0.3"])
def test_a_run_has_its_folder_its_seed_and_its_bank(variant, tmp_path, monkeypatch):
  _interpreter(tmp_path, monkeypatch, "echo some output")
  core = min(os.sched_getaffinity(0))
  reproduce.run_one(tmp_path / "work", "last_letter", variant, "2", core)
  place = f"{tmp_path}/work/last_letter"
  assert (tmp_path / "args").read_text().splitlines() == [
    "-m",
    "experiments.last_letter",
    f"--config=experiments/configs/last_letter.py:{variant}",
    f"--workdir={place}/{variant}-seed2",
    "--config.seed=2",
    *([f"--config.bank={place}/tiny-seed2"] if variant != "tiny" else []),
  ]
  assert [p.name for p in pathlib.Path(place).iterdir()] == [f"{variant}-seed2.log"]


def test_a_run_that_fails_is_one_message_with_the_end_of_its_log(tmp_path, monkeypatch):
  _interpreter(tmp_path, monkeypatch, "echo train: starts\necho 'error: no luck' >&2\nexit 1")
  log = tmp_path / "work/last_letter/lambda_0.3-seed0.log"
  log.parent.mkdir(parents=True)
  log.write_text("of an earlier start\n")
  with pytest.raises(UserError) as error:
    reproduce.run_one(tmp_path / "work", "last_letter", "lambda_0.3", "0", min(os.sched_getaffinity(0)))
  said = f"last_letter:lambda_0.3, seed 0 ended with code 1; the end of {log}: error: no luck"
  assert str(error.value) == said
  assert log.read_text() == "of an earlier start\ntrain: starts\nerror: no luck\n"
  _interpreter(tmp_path, monkeypatch, "kill -9 $$")
  log.unlink()
  with pytest.raises(UserError, match=rf"seed 0 ended with code -9; the end of {log}: empty"):
    reproduce.run_one(tmp_path / "work", "last_letter", "lambda_0.3", "0", min(os.sched_getaffinity(0)))


def test_the_figures_are_kept_with_the_commit_and_the_time(tmp_path):
  report = tmp_path / "work/last_letter/no_stop-seed1/report/results.json"
  report.parent.mkdir(parents=True)
  found = {"meta": {"task": "last_letter", "seed": 1}, "ns": [1, 2], "verifiers": {"orm": {"accuracy": 0.25}}}
  report.write_text(json.dumps(found))
  then = datetime.datetime(2026, 3, 4, 5, 6, 7, tzinfo=datetime.UTC)
  os.utime(report, (then.timestamp(),) * 2)
  reproduce.collect(tmp_path / "work", "last_letter", "no_stop", "1", "abc1234-dirty", tmp_path / "results")
  kept = json.loads((tmp_path / "results/last_letter/no_stop-seed1.json").read_text())
  assert kept.pop("meta") == {**found.pop("meta"), "commit": "abc1234-dirty", "finished": "2026-03-04T05:06:07+00:00"}
  assert kept == found
  assert json.loads(report.read_text())["meta"] == {"task": "last_letter", "seed": 1}, "the run's own stay as they are"
