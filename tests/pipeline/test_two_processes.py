"""A run by two processes of four devices each, stopped, killed and resumed, equals a run by one process."""

import json
import signal

import numpy as np
import processes
import pytest
import quick_compiles

from genrm_jax.data import jsonl
from genrm_jax.records import Candidate, Score

CONFIG = """
from experiments.configs import last_letter

def get_config():
  config = last_letter.get_config("smoke")
  with config.unlocked():
    del config.task.in_distribution
    config.verifiers = {name: config.verifiers[name] for name in ("genrm", "genrm_cot")}
    config.verifiers.genrm.optim.num_steps = 24
    config.verifiers.genrm_cot.optim.num_steps = 12
    config.mesh = dict(data=2, fsdp=-1, tensor=1)
  return config
"""


# The command; it sends itself a signal when a training has reached a step, and trains slowly from there on, since
# processes agree on where to stop within seconds.
_SIGNALLED = """
import os, sys, time
from genrm_jax.pipeline import cli
from genrm_jax.training import loop

run, last_step, number = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
del sys.argv[1:4]
sent = []

class Metrics(loop.Metrics):
  def __init__(self, directory, name, step):
    super().__init__(directory, name, step)
    self.is_chosen = name == run

  def write(self, step, values):
    super().write(step, values)
    if self.is_chosen and step >= last_step:
      if sent:
        time.sleep(1)
      else:
        sent.append(step)
        os.kill(os.getpid(), number)

loop.Metrics = Metrics
cli.main("last_letter")
"""


class Runs:
  """Runs of one config."""

  def __init__(self, folder):
    self.folder = folder
    (folder / "config.py").write_text(CONFIG)
    self._env = quick_compiles.environ(folder / "compiled")

  def __call__(self, workdir, num_devices, *args, seeds=(0,), signalled=()):
    """Runs one process per seed; the last gets a signal: (training, step, number)."""
    path, places = self.folder / workdir, [f"--coordinator=localhost:{processes.free_port()}"]
    places += [f"--num_processes={len(seeds)}", "--distributed_timeout_s=30"]
    flags = [f"--config={self.folder / 'config.py'}", f"--config.cpu_devices={num_devices}", f"--workdir={path}", *args]
    commands = []
    for i, seed in enumerate(seeds):
      start = ["-c", _SIGNALLED, *signalled] if signalled and i else ["-m", "experiments.last_letter"]
      together = [*places, f"--process_id={i}"] if len(seeds) > 1 else []
      commands.append([*start, *flags, f"--config.seed={seed}", *together])
    return processes.finish(processes.start(commands, **self._env))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  return Runs(tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def done(runs):
  """What each start of the run by two processes ended with; "one" is the run that it is compared with."""
  two = (0, 0)
  out = {"one": runs("one", 8)}
  out["stopped"] = runs("two", 4, seeds=two, signalled=("genrm", 6, int(signal.SIGTERM)))
  out["steps after the stop"] = sorted(int(p.name) for p in (runs.folder / "two/checkpoints/genrm").iterdir())
  out["killed"] = runs("two", 4, seeds=two, signalled=("genrm", 12, int(signal.SIGKILL)))
  out["by one process"] = runs("two", 2, "--stages=train_genrm")
  out["finished"] = runs("two", 4, seeds=two)
  return out


def test_all_processes_stop_at_the_same_step_after_a_sigterm_to_one(done):
  (code, _, error), (other_code, _, other_error) = done["stopped"]
  assert (code, other_code) == (143, 143), error + other_error
  assert "ended by SIGTERM, step " in error
  assert 6 <= done["steps after the stop"][-1] < 24


def test_a_process_that_is_killed_ends_the_other(done):
  (code, _, error), (killed, *_) = done["killed"]
  assert killed == -signal.SIGKILL
  assert code not in (0, 143), error


def test_one_process_and_two_resume_the_run(done):
  for when in ("one", "by one process", "finished"):
    for code, _, error in done[when]:
      assert code == 0, error


def test_only_the_first_process_reports(done):
  (_, _, error), (_, out, other_error) = done["finished"]
  assert "score_genrm_cot: " in error and "report: " in error
  assert "score_genrm_cot" not in out + other_error and "report: " not in out + other_error


def test_parts_are_merged_and_removed(runs, done):
  assert not list((runs.folder / "two").rglob("*.part-*"))


def test_losses_match_one_process(runs, done):
  for run in ("generator", "genrm", "genrm_cot"):
    lines = {}
    for workdir in ("one", "two"):
      text = (runs.folder / workdir / "metrics" / f"{run}.jsonl").read_text()
      lines[workdir] = [json.loads(line) for line in text.splitlines()]
    assert len(lines["one"]) == len(lines["two"]) > 3
    for one, two in zip(lines["one"], lines["two"], strict=True):
      assert two == pytest.approx(one, rel=1e-3, abs=1e-5)


def test_solutions_and_scores_match_one_process(runs, done):
  def read(workdir, name, cls):
    return jsonl.read_records(runs.folder / workdir / name, cls)

  for split in ("train", "val", "eval"):
    one, two = (read(workdir, f"candidates/{split}.jsonl", Candidate) for workdir in ("one", "two"))
    assert one == two and len(one) > 20
  for name in ("genrm", "genrm_cot"):
    one, two = (read(workdir, f"scores/{name}.jsonl", Score) for workdir in ("one", "two"))
    assert [(s.problem_id, s.candidate_index) for s in one] == [(s.problem_id, s.candidate_index) for s in two]
    np.testing.assert_allclose([s.value for s in one], [s.value for s in two], atol=1e-4)
    assert [[v.text for v in s.votes] for s in one] == [[v.text for v in s.votes] for s in two]


def test_processes_with_different_configs_are_refused(runs):
  for code, _, error in runs("refused", 4, seeds=(0, 1)):
    assert code != 0 and "Traceback" not in error, error
    assert "the config of process 1 differs from that of process 0" in error, error
  assert not (runs.folder / "refused").exists()
