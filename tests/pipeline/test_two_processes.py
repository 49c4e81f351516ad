"""A whole run by two real processes of four devices each, stopped, killed and handed on, is the run of one process."""

import json
import signal
import time

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


class Runs:
  """Runs of one config."""

  def __init__(self, folder):
    self.folder = folder
    (folder / "config.py").write_text(CONFIG)
    self._env = quick_compiles.environ(folder / "compiled")

  def start(self, workdir, num_devices, *args, num_processes=1):
    command = [
      "-m",
      "experiments.last_letter",
      f"--config={self.folder / 'config.py'}",
      f"--config.cpu_devices={num_devices}",
      f"--workdir={self.folder / workdir}",
      *args,
    ]
    if num_processes == 1:
      return processes.start([command], **self._env)
    together = [f"--coordinator=localhost:{processes.free_port()}", f"--num_processes={num_processes}"]
    together.append("--distributed_timeout_s=30")
    return processes.start([[*command, *together, f"--process_id={i}"] for i in range(num_processes)], **self._env)

  def steps(self, workdir, run):
    """Of the metrics that are there."""
    path = self.folder / workdir / "metrics" / f"{run}.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []

  def signal_at(self, started, workdir, run, step, number):
    """Sends process 1 a signal as soon as the run has reached a step."""
    deadline = time.monotonic() + 300
    while max(self.steps(workdir, run), default=0) < step:
      assert time.monotonic() < deadline and all(p.poll() is None for p in started), processes.finish(started, 10)
      time.sleep(0.02)
    started[1].send_signal(number)
    return processes.finish(started)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  return Runs(tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def done(runs):
  """What each start of the run by two processes ended with; "one" is the run that it is compared with."""
  out = {"one": processes.finish(runs.start("one", 8))}
  started = runs.start("two", 4, num_processes=2)
  out["told to stop"] = runs.signal_at(started, "two", "genrm", 6, signal.SIGTERM)
  out["steps after the stop"] = sorted(int(p.name) for p in (runs.folder / "two/checkpoints/genrm").iterdir())
  started = runs.start("two", 4, num_processes=2)
  out["killed"] = runs.signal_at(started, "two", "genrm", 12, signal.SIGKILL)
  out["handed to one"] = processes.finish(runs.start("two", 2, "--stages=train_genrm"))
  out["finished"] = processes.finish(runs.start("two", 4, num_processes=2))
  return out


def test_all_processes_end_at_the_same_step_when_one_is_told_to(done):
  (code, _, error), (other_code, _, other_error) = done["told to stop"]
  assert (code, other_code) == (143, 143), error + other_error
  assert "ended by SIGTERM, step " in error
  assert 6 <= done["steps after the stop"][-1] < 24


def test_a_process_that_is_killed_ends_the_other(done):
  (code, _, error), (killed, *_) = done["killed"]
  assert killed == -signal.SIGKILL
  assert code not in (0, 143), error


def test_the_run_is_finished_by_whoever_comes(done):
  for when in ("one", "handed to one", "finished"):
    for code, _, error in done[when]:
      assert code == 0, error


def test_only_the_first_process_speaks(done):
  (_, _, error), (_, *other_output) = done["finished"]
  for words in ("score_genrm_cot", "report"):
    assert words in error
    assert all(words not in text for text in other_output)  # native libraries may print there, lines interleaved


def test_losses_are_those_of_one_process(runs, done):
  for run in ("generator", "genrm", "genrm_cot"):
    lines = {}
    for workdir in ("one", "two"):
      text = (runs.folder / workdir / "metrics" / f"{run}.jsonl").read_text()
      lines[workdir] = [json.loads(line) for line in text.splitlines()]
    assert len(lines["one"]) == len(lines["two"]) > 3
    for one, two in zip(lines["one"], lines["two"], strict=True):
      assert two == pytest.approx(one, rel=1e-3, abs=1e-5)


def test_solutions_and_scores_are_those_of_one_process(runs, done):
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
  started = []
  port = processes.free_port()
  for i in range(2):
    flags = [f"--config={runs.folder / 'config.py'}", f"--config.seed={i}", f"--workdir={runs.folder / 'refused'}"]
    together = [f"--coordinator=localhost:{port}", "--num_processes=2", f"--process_id={i}"]
    started += processes.start([["-m", "experiments.last_letter", *flags, *together]])
  for code, _, error in processes.finish(started):
    assert code != 0 and "Traceback" not in error
    assert "the config of process 1 differs from that of process 0" in error
  assert not (runs.folder / "refused").exists()
