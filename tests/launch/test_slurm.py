"""The script that slurm.sh gives to sbatch."""

import json
import sys

import launchers
import pytest

COMMAND = ("python", "-m", "experiments.gsm8k", "--config=c.py:gemma_2b", "--workdir=/shared/a b")
SIZE = ("--nodes=2", "--gpus=8", "--time=24:00:00")


@pytest.fixture
def bench(tmp_path):
  return launchers.Bench(tmp_path)


def script_of(bench, *options, command=COMMAND):
  printed = launchers.dry_run(bench, "slurm.sh", "run", "r", *SIZE, *options, "--", *command)
  sbatch, text = launchers.heredoc(printed)
  assert sbatch == ["sbatch"]
  return text


def options_of(text):
  lines = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]
  words = [word for line in lines for word in line.split()]
  return dict([*word.removeprefix("--").split("=", 1), ""][:2] for word in words)


def test_one_task_for_each_gpu(bench):
  """jax.distributed gives task i of a node its GPU i, so that each task has to see all of them."""
  options = options_of(script_of(bench))
  assert options["nodes"] == "2" and options["time"] == "24:00:00" and options["job-name"] == "r"
  assert options["ntasks-per-node"] == "8" and options["gres"] == "gpu:8"
  assert not any(name.startswith(("gpus-per-task", "gpu-bind", "ntasks=")) for name in options)


def test_time_to_save_before_the_end(bench):
  options = options_of(script_of(bench))
  assert options["signal"] == "TERM@300" and "requeue" in options and options["open-mode"] == "append"
  assert options_of(script_of(bench, "--grace=60"))["signal"] == "TERM@60"


def test_cpus_are_said_twice(bench):
  text = script_of(bench, "--cpus=12")
  assert options_of(text)["cpus-per-task"] == "12"
  assert "srun --kill-on-bad-exit=1 --cpus-per-task=12 python" in text
  assert "cpus" not in script_of(bench)


@pytest.mark.parametrize("code, queued_again", [(0, False), (1, False), (137, False), (143, True)])
def test_a_run_that_has_saved_is_queued_again(code, queued_again, bench):
  bench.stand_in("srun", code=code).stand_in("scontrol")
  done = bench.bash(script_of(bench), SLURM_JOB_ID="7")
  assert done.returncode == code
  (srun, *then) = [words for words, _ in bench.calls()]
  assert srun == ["srun", "--kill-on-bad-exit=1", *COMMAND, "--distributed=auto"]
  assert then == ([["scontrol", "requeue", "7"]] if queued_again else [])


def test_words_arrive_as_they_are(bench):
  words = ["it's", 'a "b"', "$HOME `id` \\", "", "* ?", "a;b\nc"]
  code = "import json, sys; print(json.dumps(sys.argv[1:]))"
  text = script_of(bench, command=[sys.executable, "-c", code, *words])
  srun = bench.folder / "bin" / "srun"
  srun.parent.mkdir()
  srun.write_text('#!/bin/sh\nshift\nexec "$@"\n')
  srun.chmod(0o755)
  assert json.loads(bench.bash(text).stdout) == [*words, "--distributed=auto"]


def test_what_is_printed_is_what_is_run(bench):
  bench.stand_in("sbatch", "mkdir")
  called = launchers.check_printed_is_run(bench, "slurm.sh", "run", "r", *SIZE, "--", *COMMAND)
  assert called == [["mkdir", "-p", str(launchers.ROOT / "runs" / "logs")], ["sbatch"]]
  options = options_of(script_of(bench))
  assert options["chdir"] == str(launchers.ROOT) and options["output"] == "runs/logs/%x.%j.log"


@pytest.mark.parametrize("missing", ["nodes", "gpus", "time"])
def test_a_missing_setting_is_named(missing, bench):
  size = [option for option in SIZE if not option.startswith(f"--{missing}")]
  message = launchers.error_of(bench.stand_in("sbatch").run("slurm.sh", "run", "r", *size, "--", *COMMAND))
  assert f"--{missing}=" in message and message.count("--") == 1
  assert not bench.calls()


@pytest.mark.parametrize(
  "words, told",
  [
    (("run", *SIZE), "run RUN"),
    (("run", "a/b", *SIZE, "--", "true"), "a/b"),
    (("run", "r", *SIZE), "after --"),
    (("run", "r", *SIZE, "--gpus=all", "--", "true"), "--gpus=all"),
    (("run", "r", "--partition=p", "--", "true"), "--partition"),
  ],
)
def test_wrong_words_end_with_one_message(words, told, bench):
  assert told in launchers.error_of(bench.stand_in("sbatch").run("slurm.sh", *words))
  assert not bench.calls()
