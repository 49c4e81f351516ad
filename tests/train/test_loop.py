"""A run that was stopped and started again is the run that was never stopped, bit for bit."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny_run
from jax.experimental.compilation_cache import compilation_cache

from genrm_jax.runtime import sharding
from genrm_jax.runtime.errors import UserError
from genrm_jax.train import loop, optim
from genrm_jax.train.checkpoint import Checkpoints

HERE = pathlib.Path(__file__).parent
STEPS = range(1, tiny_run.NUM_STEPS + 1)


class Stopped(Exception):
  pass


def _stop():
  raise Stopped


def _result(workdir):
  """Metrics as text, kept steps, and every array of every kept step as bytes."""
  directory = workdir / "checkpoints" / "tiny"
  states = {}
  for step in sorted(p.name for p in directory.iterdir()):
    with ocp.PyTreeCheckpointer() as reader:
      tree = reader.restore(directory / step / "state")
    states[step] = [(jax.tree_util.keystr(k), np.asarray(v).tobytes()) for k, v in jax.tree.leaves_with_path(tree)]
    assert len(states[step]) > 5
  return (workdir / "metrics" / "tiny.jsonl").read_text(), states


@pytest.fixture(scope="module", autouse=True)
def _compile_once(tmp_path_factory):
  """Runs share what they compile."""
  wanted = {
    "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": 0,
  }
  before = {name: getattr(jax.config, name) for name in wanted}
  for name, value in wanted.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()
  yield
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A run that was never stopped."""
  workdir = tmp_path_factory.mktemp("whole")
  tiny_run.train(workdir)
  return workdir


@pytest.mark.parametrize("stops", [(0,), (3,), (4,), (2, 7, 11)])
def test_a_stopped_run_goes_on_bit_for_bit(stops, whole, tmp_path):
  for step in stops:
    with pytest.raises(Stopped):
      tiny_run.train(tmp_path, tiny_run.Killing(step, _stop))
  tiny_run.train(tmp_path)
  assert _result(tmp_path) == _result(whole)


def test_a_run_stopped_between_metrics_and_checkpoint_goes_on(whole, tmp_path, monkeypatch):
  with monkeypatch.context() as patch, pytest.raises(Stopped):
    patch.setattr(
      Checkpoints, "save", lambda self, state, *_: _stop() if int(state.step) == 8 else _save(self, state, *_)
    )
    tiny_run.train(tmp_path)
  assert '"step": 8' in (tmp_path / "metrics" / "tiny.jsonl").read_text()
  tiny_run.train(tmp_path)
  assert _result(tmp_path) == _result(whole)


_save = Checkpoints.save


def _signalled(workdir, name, at_step):
  """A process that gets the signal while it reads the batch of a step."""
  code = (
    "import os, pathlib, signal, sys, tiny_run\n"
    f"kill = lambda: os.kill(os.getpid(), signal.{name})\n"
    f"tiny_run.train(pathlib.Path(sys.argv[1]), tiny_run.Killing({at_step}, kill))\n"
  )
  env = {**os.environ, "PYTHONPATH": f"{HERE.parent / 'helpers'}:{HERE.parents[1]}"}
  return subprocess.run([sys.executable, "-c", code, str(workdir)], env=env, capture_output=True, text=True)


@pytest.mark.parametrize("at_step", [4, 7])
def test_sigterm_saves_the_step_at_hand_and_the_run_goes_on_bit_for_bit(at_step, whole, tmp_path):
  """Step 5 lies between two lines of metrics, step 8 is saved anyhow."""
  done = _signalled(tmp_path, "SIGTERM", at_step)
  assert done.returncode == 143, done.stderr
  assert f"tiny: ended by SIGTERM, step {at_step + 1} of 12 is saved; the same command goes on" in done.stderr
  assert int(max(p.name for p in (tmp_path / "checkpoints" / "tiny").iterdir())) == at_step + 1
  tiny_run.train(tmp_path)
  assert _result(tmp_path) == _result(whole)


def test_a_killed_process_goes_on_bit_for_bit(whole, tmp_path):
  assert _signalled(tmp_path, "SIGKILL", 7).returncode == -9
  metrics = tmp_path / "metrics" / "tiny.jsonl"
  assert '"step": 6' in metrics.read_text()
  with metrics.open("a") as f:
    f.write('{"step": 8, "train/lo')  # a line that was being written
  tiny_run.train(tmp_path)
  assert _result(tmp_path) == _result(whole)


def test_metrics_hold_each_step_once(whole):
  lines = [json.loads(line) for line in (whole / "metrics" / "tiny.jsonl").read_text().splitlines()]
  trained = [line["step"] for line in lines if "train/loss" in line]
  evaluated = [line["step"] for line in lines if "eval/loss" in line]
  assert trained == [s for s in STEPS if s % tiny_run.LOG_EVERY == 0]
  assert evaluated == [s for s in STEPS if s % tiny_run.SAVE_EVERY == 0]
  assert len(lines) == len(trained) + len(evaluated)
  names = {"loss", "loss_verify", "loss_solve", "grad_norm", "learning_rate"}
  assert set(lines[0]) == {"step", *(f"train/{name}" for name in names)}
  assert lines[-1]["eval/loss"] < lines[2]["eval/loss"], "it learns"
  rate = optim.schedule(optim.OptimConfig(0.1, tiny_run.NUM_STEPS, warmup_steps=3))
  assert [line["train/learning_rate"] for line in lines if "train/loss" in line] == [
    pytest.approx(float(rate(s - 1))) for s in trained
  ]


def test_a_finished_run_does_nothing(whole):
  before = _result(whole)
  tiny_run.train(whole, tiny_run.Killing(0, _stop))
  assert _result(whole) == before


def _evaluated(workdir):
  lines = [json.loads(line) for line in (workdir / "metrics" / "tiny.jsonl").read_text().splitlines()]
  return {line["step"]: line["eval/loss_verify"] for line in lines if "eval/loss_verify" in line}


def test_a_run_ends_when_its_loss_is_low_enough_and_stays_there(whole, tmp_path):
  losses = _evaluated(whole)
  assert list(losses) == [4, 8, 12] and losses[4] > losses[8] > losses[12]
  goal = {"stop_at_loss": losses[8]}
  with pytest.raises(Stopped):
    tiny_run.train(tmp_path, tiny_run.Killing(6, _stop), **goal)
  tiny_run.train(tmp_path, **goal)
  assert _evaluated(tmp_path) == {4: losses[4], 8: losses[8]}
  ended = _result(tmp_path)
  assert "8" in ended[1]
  tiny_run.train(tmp_path, tiny_run.Killing(8, _stop), **goal)
  assert _result(tmp_path) == ended, "it does not go on when it is started again"


def test_what_a_run_starts_from_is_given_over_and_takes_no_memory(tmp_path):
  init = tiny_run.train(tmp_path)
  assert init["w"].is_deleted()


def test_a_damaged_newest_step_is_set_aside_and_the_run_goes_on_from_the_last_whole_one(whole, tmp_path, capsys):
  with pytest.raises(Stopped):
    tiny_run.train(tmp_path, tiny_run.Killing(9, _stop))
  directory = tmp_path / "checkpoints" / "tiny"
  assert sorted(p.name for p in directory.iterdir()) == ["8"], "loss falls: the newest is the best"
  shutil.copytree(whole / "checkpoints" / "tiny" / "12", directory / "12")
  (directory / "12" / "manifest" / "metadata").write_text("{")
  capsys.readouterr()
  tiny_run.train(tmp_path)
  said = capsys.readouterr().err
  assert f"checkpoint {directory}/12 is damaged" in said and f"{directory}/8 is whole and is used instead" in said
  shutil.rmtree(directory / "12.damaged")
  assert _result(tmp_path) == _result(whole)


def test_a_run_goes_on_only_with_what_it_was_made_of(whole):
  with pytest.raises(UserError, match="data: the checkpoint has 'abc', the config 'xyz'"):
    tiny_run.train(whole, manifest={**tiny_run.MANIFEST, "data": "xyz"})


class _Spoilt(tiny_run.Killing):
  """Rows whose losses are no numbers from a step on."""

  def __init__(self, at_step):
    super().__init__(-1, _stop)
    self.spoilt_from, self.take = at_step, self._spoilt

  def order(self, seed, step, batch_size):
    self.step = step
    return super().order(seed, step, batch_size)

  def _spoilt(self, index):
    batch = self.rows.take(index)
    return batch.replace(weights=batch.weights * np.float32(np.nan if self.step >= self.spoilt_from else 1))


def test_a_loss_that_is_no_number_ends_the_run(tmp_path):
  with pytest.raises(UserError, match=r"tiny: the loss is nan at step 6; lower optim.learning_rate"):
    tiny_run.train(tmp_path, _Spoilt(5))
  assert sorted(p.name for p in (tmp_path / "checkpoints" / "tiny").iterdir()) == ["4"]


def test_a_state_whose_held_out_loss_is_no_number_is_not_saved(tmp_path, monkeypatch):
  with monkeypatch.context() as patch, pytest.raises(UserError, match="loss on held-out rows is nan at step 4; lower"):
    rows = tiny_run.rows
    spoilt = rows(1, 9)
    spoilt.data.weights[-1] *= np.nan
    patch.setattr(tiny_run, "rows", lambda seed, n=22: spoilt if seed == 1 else rows(seed, n))
    tiny_run.train(tmp_path)
  assert not any((tmp_path / "checkpoints" / "tiny").iterdir())


def test_evaluation_is_the_mean_over_all_rows_each_once():
  rows = tiny_run.rows(1)
  assert rows.num_rows % 4, "the last batch is filled up with empty rows"
  mesh = tiny_run.mesh()
  w = np.random.default_rng(0).normal(size=(tiny_run.VOCAB, tiny_run.VOCAB)).astype(np.float32)
  with jax.set_mesh(mesh):
    params = jax.device_put({"w": w}, sharding.replicated(mesh))
    got = loop.evaluate(jax.jit(lambda p, b: tiny_run.loss_fn(p, b)[1]), params, rows, 4, mesh)
  logits = w[rows.data.tokens].astype(np.float64)
  nll = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, rows.data.targets[..., None], -1)[..., 0]
  for name, kind in (("loss_verify", 1), ("loss_solve", 2)):
    assert got[name] == pytest.approx(nll[rows.data.kind == kind].mean(), rel=1e-5)


def test_means_are_sums_over_counts_and_absent_kinds_are_left_out():
  sums = [{"a": (jnp.float32(6), jnp.float32(2)), "b": (jnp.float32(0), jnp.float32(0))}] * 2
  sums.append({"a": (jnp.float32(0), jnp.float32(4)), "b": (jnp.float32(0), jnp.float32(0))})
  assert loop._means(sums) == {"a": 1.5}


def test_held_out_rows_are_read_as_many_at_a_time_as_a_micro_batch_and_each_once(tmp_path, monkeypatch):
  def evaluated(number):
    sizes = set()
    step = loop.make_eval_step

    def counting(*args):
      read = step(*args)
      return lambda params, batch: (sizes.add(len(batch.tokens)), read(params, batch))[1]

    with monkeypatch.context() as patch:
      patch.setattr(loop, "make_eval_step", counting)
      tiny_run.train(tmp_path / str(number), num_micro_batches=number)
    lines = map(json.loads, (tmp_path / str(number) / "metrics" / "tiny.jsonl").read_text().splitlines())
    return sizes, [(line["eval/loss_verify"], line["eval/loss_solve"]) for line in lines if "eval/loss_verify" in line]

  (whole, losses), (parts, losses_of_parts) = evaluated(1), evaluated(2)
  assert (whole, parts) == ({4}, {2})
  assert len(losses) == tiny_run.NUM_STEPS // tiny_run.SAVE_EVERY
  np.testing.assert_allclose(losses_of_parts, losses, rtol=1e-5)


def test_rows_that_do_not_divide_over_the_devices_are_refused(tmp_path, monkeypatch):
  with pytest.raises(UserError, match="batch_size 4 of tiny does not divide over 1 data devices in 3 micro-batches"):
    tiny_run.train(tmp_path, num_micro_batches=3)
  monkeypatch.setattr(tiny_run, "mesh", lambda: sharding.make_mesh(data=4, tensor=2, devices=jax.devices()[:8]))
  with pytest.raises(UserError, match="batch_size 6 of tiny does not divide over 4 data devices"):
    tiny_run.train(tmp_path, batch_size=6)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"save_every_steps": 5}, "save_every_steps 5 must be a multiple of log_every_steps 2"),
    ({"log_every_steps": 0}, "log_every_steps must be 1 or more"),
    ({"save_every_steps": 0}, "save_every_steps must be 1 or more"),
    ({"batch_size": 0}, "batch_size must be 1 or more"),
    ({"num_micro_batches": 0}, "num_micro_batches must be 1 or more"),
  ],
)
def test_senseless_settings_are_refused(changes, message, tmp_path):
  with pytest.raises(UserError, match=message):
    tiny_run.train(tmp_path, **changes)
