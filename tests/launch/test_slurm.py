"""The script that slurm.sh submits."""

import json
import sys

import launchers
import pytest


def script_of(bench, *options, command=("python", "-m", "a b")):
  _, text = launchers.heredoc(bench.dry_run("slurm.sh", "run", "r", *options, "--", *command))
  return text


def options_of(text):
  words = " ".join(line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")).split()
  return dict([*word.removeprefix("--").split("=", 1), ""][:2] for word in words)


def test_one_task_per_gpu_sees_all_gpus_of_its_node(bench):
  """jax.distributed assigns GPU i of a node to task i."""
  options = options_of(script_of(bench))
  assert options["nodes"] == "2" and options["ntasks-per-node"] == "8" and options["gres"] == "gpu:8"
  assert not {"gpus-per-task", "gpu-bind", "ntasks"} & set(options) and options["chdir"] == str(launchers.ROOT)


def test_options(bench):
  assert "--distributed=auto" not in script_of(bench, command=("true", "--distributed=off"))
  options = options_of(script_of(bench))
  assert options["signal"] == "TERM@300" and "requeue" in options and options["open-mode"] == "append"
  assert "cpus-per-task" not in options
  text = script_of(bench, "--cpus=12", "--grace=60")
  assert options_of(text)["signal"] == "TERM@60" and options_of(text)["cpus-per-task"] == "12"
  assert "srun --kill-on-bad-exit=1 --cpus-per-task=12 python" in text


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
