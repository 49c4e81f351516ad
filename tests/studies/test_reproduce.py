"""Which runs are made in which order, how each is started, and what is kept of it."""

import os
import sys

import pytest
from refusals import refused

from experiments.studies import reproduce


def test_banks_come_before_the_studies_that_use_them():
  runs = reproduce.list_runs(["last_letter", "word_sorting"], ["0", "1"], [])
  assert runs[:4] == [(task, "tiny", seed) for task in ("last_letter", "word_sorting") for seed in ("0", "1")]
  assert "tiny" not in {variant for _, variant, _ in runs[4:]}
  assert len(set(runs)) == len(runs) == 2 * sum(map(len, reproduce.VARIANTS.values()))
  chosen = reproduce.list_runs(["word_sorting"], ["2"], ["lambda_1", "tiny"])
  assert chosen == [("word_sorting", "tiny", "2"), ("word_sorting", "lambda_1", "2")]
  refused(("gsm", reproduce.list_runs, ["gsm"], ["0"], []))


def fake_python(tmp_path, monkeypatch, lines):
  """A shell script in place of Python, which writes its arguments to a file."""
  script = tmp_path / "python"
  script.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/args\n{lines}\n')
  script.chmod(0o755)
  monkeypatch.setattr(sys, "executable", str(script))


@pytest.mark.parametrize("variant", ["tiny", "lambda_0.3"])
def test_a_run_gets_its_workdir_seed_and_bank(variant, tmp_path, monkeypatch):
  fake_python(tmp_path, monkeypatch, "echo some output")
  reproduce.run_one(tmp_path / "work", "last_letter", variant, "2", min(os.sched_getaffinity(0)))
  args = (tmp_path / "args").read_text().splitlines()
  place = f"{tmp_path}/work/last_letter"
  assert args[:2] == ["-m", "experiments.last_letter"] and args[2].endswith(f"last_letter.py:{variant}")
  assert args[3:5] == [f"--workdir={place}/{variant}-seed2", "--config.seed=2"]
  assert args[5:] == ([f"--config.bank={place}/tiny-seed2"] if variant != "tiny" else [])


def test_a_failed_run_shows_the_end_of_its_log(tmp_path, monkeypatch):
  fake_python(tmp_path, monkeypatch, "echo train: starts\necho 'error: no luck' >&2\nexit 1")
  log = tmp_path / "work/last_letter/lambda_0.3-seed0.log"
  log.parent.mkdir(parents=True)
  log.write_text("of an earlier start\n")
  core = min(os.sched_getaffinity(0))
  refused(("error: no luck", reproduce.run_one, tmp_path / "work", "last_letter", "lambda_0.3", "0", core))
  assert log.read_text() == "of an earlier start\ntrain: starts\nerror: no luck\n"
