"""A run by two processes of four devices each, stopped, killed and resumed, equals a run by one process."""

import json
import signal

import numpy as np
import processes
import pytest

import genrm_jax
from genrm_jax.data import jsonl
from genrm_jax.records import Candidate, Score

_CHANGES = """
config.verifiers.genrm_cot.optim.num_steps = 24
config.mesh = dict(data=2, fsdp=-1, tensor=1)
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


def start_two(folder, workdir, seeds=(0, 0), signalled=()):
  """The command in two processes with four devices each; the second gets a signal: (training, step, number)."""
  places = [f"--coordinator=localhost:{processes.free_port()}", "--num_processes=2", "--distributed_timeout_s=30"]
  flags = [f"--config={folder / 'config.py'}", "--config.cpu_devices=4", f"--workdir={folder / workdir}", *places]
  starts = ["-m", "experiments.last_letter"], ["-c", _SIGNALLED, *signalled] if signalled else None
  commands = [
    [*(start or starts[0]), *flags, f"--config.seed={seed}", f"--process_id={i}"]
    for i, (start, seed) in enumerate(zip(starts, seeds, strict=True))
  ]
  return processes.finish(processes.start(commands))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("two")
  processes.write_config(folder / "config.py", "last_letter", "genrm_cot", changes=_CHANGES)
  return folder


@pytest.fixture(scope="module")
def done(folder):
  """What each start of the run by two processes ended with; "one" is the run that it is compared with."""
  config, out = genrm_jax.get_config(str(folder / "config.py")), {}
  genrm_jax.score(config, folder / "one")  # this process has eight devices
  out["stopped"] = start_two(folder, "two", signalled=("genrm_cot", 6, int(signal.SIGTERM)))
  out["steps after the stop"] = sorted(int(p.name) for p in (folder / "two/checkpoints/genrm_cot").iterdir())
  out["killed"] = start_two(folder, "two", signalled=("genrm_cot", 12, int(signal.SIGKILL)))
  genrm_jax.train(config, folder / "two", ["genrm_cot"])
  out["finished"] = start_two(folder, "two")
  return out


def test_both_stop_after_a_signal_to_one_and_one_process_or_two_resume_the_run(done):
  (code, _, error), (other_code, _, other_error) = done["stopped"]
  assert (code, other_code) == (143, 143), error + other_error
  assert "ended by SIGTERM, step " in error
  assert 6 <= done["steps after the stop"][-1] < 24
  (code, _, error), (killed, *_) = done["killed"]
  assert killed == -signal.SIGKILL
  assert code not in (0, 143), error
  (code, _, error), (other_code, out, other_error) = done["finished"]
  assert (code, other_code) == (0, 0), error + other_error
  assert "train_genrm_cot: done before" in error
  assert "score_genrm_cot: " in error and "report: " in error
  assert "score_genrm_cot" not in out + other_error and "report: " not in out + other_error


def test_losses_solutions_and_scores_match_one_process(folder, done):
  for run in ("generator", "genrm_cot"):
    lines = {}
    for workdir in ("one", "two"):
      text = (folder / workdir / "metrics" / f"{run}.jsonl").read_text()
      lines[workdir] = [json.loads(line) for line in text.splitlines()]
    assert len(lines["one"]) == len(lines["two"]) > 3
    for one, two in zip(lines["one"], lines["two"], strict=True):
      assert two == pytest.approx(one, rel=1e-3, abs=1e-5)
  assert not list((folder / "two").rglob("*.part-*")), "merged and removed"

  def read(workdir, name, cls):
    return jsonl.read_records(folder / workdir / name, cls)

  for split in ("train", "val", "eval"):
    one, two = (read(workdir, f"candidates/{split}.jsonl", Candidate) for workdir in ("one", "two"))
    assert one == two and len(one) > 20
  one, two = (read(workdir, "scores/genrm_cot.jsonl", Score) for workdir in ("one", "two"))
  assert [(s.problem_id, s.candidate_index) for s in one] == [(s.problem_id, s.candidate_index) for s in two]
  values = [np.array([s.value for s in scores], float) for scores in (one, two)]  # NaN where no vote has a number
  np.testing.assert_allclose(*values, atol=1e-4)
  assert np.isfinite(values[0]).mean() > 0.2
  assert [[v.text for v in s.votes] for s in one] == [[v.text for v in s.votes] for s in two]


def test_processes_with_different_configs_are_refused(folder):
  for code, _, error in start_two(folder, "refused", seeds=(0, 1)):
    assert code != 0 and "Traceback" not in error, error
    assert "the config of process 1 differs from that of process 0" in error, error
  assert not (folder / "refused").exists()
