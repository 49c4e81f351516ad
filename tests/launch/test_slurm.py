"""The script that slurm.sh submits."""

import json
import sys

import launchers
import pytest

SIZE = ("--nodes=2", "--gpus=8", "--time=24:00:00")


@pytest.fixture
def bench(tmp_path):
  return launchers.Bench(tmp_path)


def script_of(bench, *options, command=("python", "-m", "a b")):
  sbatch, text = launchers.heredoc(bench.dry_run("slurm.sh", "run", "r", *SIZE, *options, "--", *command))
  assert sbatch == ["sbatch"]
  return text


def options_of(text):
  words = " ".join(line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")).split()
  return dict([*word.removeprefix("--").split("=", 1), ""][:2] for word in words)


def test_one_task_per_gpu_sees_all_gpus_of_its_node(bench):
  """jax.distributed assigns GPU i of a node to task i."""
  options = options_of(script_of(bench))
  assert options["nodes"] == "2" and options["time"] == "24:00:00" and options["job-name"] == "r"
  assert options["ntasks-per-node"] == "8" and options["gres"] == "gpu:8"
  assert not any(name.startswith(("gpus-per-task", "gpu-bind", "ntasks=")) for name in options)
  assert options["chdir"] == str(launchers.ROOT) and options["output"] == "runs/logs/%x.%j.log"


def test_time_to_save(bench):
  options = options_of(script_of(bench))
  assert options["signal"] == "TERM@300" and "requeue" in options and options["open-mode"] == "append"
  assert options_of(script_of(bench, "--grace=60"))["signal"] == "TERM@60"


def test_cpus_for_sbatch_and_srun(bench):
  text = script_of(bench, "--cpus=12")
  assert options_of(text)["cpus-per-task"] == "12"
  assert "srun --kill-on-bad-exit=1 --cpus-per-task=12 python" in text
  assert "cpus" not in script_of(bench)


@pytest.mark.parametrize("code, requeued", [(0, False), (1, False), (137, False), (143, True)])
def test_a_saved_run_is_requeued(code, requeued, bench):
  bench.stub("srun", code=code).stub("scontrol")
  assert bench.bash(script_of(bench), SLURM_JOB_ID="7").returncode == code
  (srun, *then) = [words for words, _ in bench.calls()]
  assert srun == ["srun", "--kill-on-bad-exit=1", "python", "-m", "a b", "--distributed=auto"]
  assert then == ([["scontrol", "requeue", "7"]] if requeued else [])


def test_command_arrives_unchanged(bench):
  code = "import json, sys; print(json.dumps(sys.argv[1:]))"
  text = script_of(bench, command=[sys.executable, "-c", code, *launchers.ODD_WORDS])
  bench.program("srun", '#!/bin/sh\nshift\nexec "$@"\n')
  assert json.loads(bench.bash(text).stdout) == [*launchers.ODD_WORDS, "--distributed=auto"]
