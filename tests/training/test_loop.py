"""A run that was stopped and started again leaves the same bits as one that was never stopped."""

import json
import os
import pathlib
import signal
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import processes
import pytest
import tiny_run
from jaxprs import compilations
from refusals import refused

from genrm_jax.runtime import sharding
from genrm_jax.training import loop, saved

HERE = pathlib.Path(__file__).parent


def _stop():
  raise InterruptedError


def _run(workdir):
  return workdir / "checkpoints" / "tiny"


def _lines(workdir):
  return [json.loads(line) for line in (workdir / "metrics" / "tiny.jsonl").read_text().splitlines()]


def _evaluated(workdir, key="eval/loss_verify"):
  return {line["step"]: line[key] for line in _lines(workdir) if key in line}


def _result(workdir):
  """Metrics as text, kept steps, and every array of every kept step as bytes."""
  states = {}
  for step in sorted(p.name for p in _run(workdir).iterdir()):
    with ocp.PyTreeCheckpointer() as reader:
      tree = reader.restore(_run(workdir) / step / "state")
    states[step] = [(jax.tree_util.keystr(k), np.asarray(v).tobytes()) for k, v in jax.tree.leaves_with_path(tree)]
    assert len(states[step]) > 5
  return (workdir / "metrics" / "tiny.jsonl").read_text(), states


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("whole")
  init = tiny_run.train(workdir)
  assert init["w"].is_deleted(), "donated"
  return workdir


@pytest.mark.parametrize("stops", [(0,), (8,), (2, 9, 23)])
def test_a_stopped_run_resumes_bit_exactly(stops, whole, tmp_path):
  for step in stops:
    with pytest.raises(InterruptedError):
      tiny_run.train(tmp_path, tiny_run.CallAt(step, _stop))
  tiny_run.train(tmp_path)
  assert _result(tmp_path) == _result(whole)
  tiny_run.train(tmp_path, tiny_run.CallAt(0, _stop))  # has nothing left to do
  assert _result(tmp_path) == _result(whole)


@pytest.mark.parametrize("at_step", [4, 7, 23], ids=["between reports", "save", "last"])
def test_sigterm_saves_the_current_step_and_the_run_resumes_bit_exactly(at_step, whole, tmp_path, capsys):
  with pytest.raises(SystemExit) as exit_:
    tiny_run.train(tmp_path, tiny_run.CallAt(at_step, lambda: os.kill(os.getpid(), signal.SIGTERM)))
  assert exit_.value.code == 143
  assert f"step {at_step + 1} of 24 is saved" in capsys.readouterr().err
  assert max(int(p.name) for p in _run(tmp_path).iterdir()) == at_step + 1
  tiny_run.train(tmp_path)
  assert _result(tmp_path) == _result(whole)


_COMMAND = """
import json, os, pathlib, sys, time
import tiny_run
from genrm_jax.pipeline import cli
from genrm_jax.pipeline.stages import Stage
from genrm_jax.training import checkpoint

def send():
  os.kill(os.getpid(), numbers.pop(0)) if numbers else None

wait = checkpoint.Checkpoints.wait

def sending_wait(self):
  if self._saving == (24 if moment == "last save" else 5):
    send()
  wait(self)

def sample():
  if moment == "sampling":
    send()
    time.sleep(600)

def make(run):
  rows = tiny_run.CallAt(4, send if moment == "training" else lambda: None)
  train = lambda: tiny_run.train(pathlib.Path(run.workdir), rows)
  return [Stage("train", train), Stage("sample", sample), Stage("report", lambda: None)]

checkpoint.Checkpoints.wait = sending_wait
folder, cases, codes = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]), []
for i, (moment, numbers) in enumerate(cases):  # each is forked from a process that has imported everything
  if not (pid := os.fork()):
    os.dup2(os.open(folder / f"{i}.err", os.O_WRONLY | os.O_CREAT), 2)
    sys.argv[1:] = [f"--config={folder / 'config.py'}", f"--workdir={folder / str(i)}"]
    cli.main("", make)
  codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
print(json.dumps(codes))
"""


@pytest.mark.one_python
def test_a_command_ends_with_the_code_of_a_signal_at_any_moment(tmp_path):
  config = "ml_collections.ConfigDict({'seed': 0, 'variant': '', 'cpu_devices': 1, 'task': {'name': ''}})"
  (tmp_path / "config.py").write_text(f"import ml_collections\ndef get_config():\n  return {config}\n")
  saved_at, again = "tiny: ended by {}, step {} of 24 is saved", "ended by {}; start the same command again to go on"
  cases = [  # moment, signals, exit code, last line, number of stages that begin
    ("training", [2], 130, saved_at.format("Ctrl-C", 5), 1),
    ("training", [2, 2], -2, "", 1),  # the second Ctrl-C comes while step 5 is saved
    ("last save", [15], 143, saved_at.format("SIGTERM", 24), 1),
    ("sampling", [15], 143, again.format("SIGTERM"), 2),
    ("sampling", [2], 130, again.format("Ctrl-C"), 2),
  ]
  env = {"PYTHONPATH": f"{HERE.parent / 'helpers'}:{HERE.parents[1]}"}
  done = processes.run("-c", _COMMAND, tmp_path, json.dumps([case[:2] for case in cases]), **env)
  assert done.returncode == 0, done.stderr
  for i, (case, code) in enumerate(zip(cases, json.loads(done.stdout), strict=True)):
    error = (tmp_path / f"{i}.err").read_text()
    _, _, want, last, num_begun = case
    assert (code, error.count(": starts"), "Traceback" in error) == (want, num_begun, False), (case, error)
    assert error.splitlines()[-1].startswith(last) or want < 0, (case, error)
    assert error.count("ended by") == (want > 0), (case, error)


@pytest.mark.parametrize("place", ["metrics", "events", "opening"])
def test_metrics_that_cannot_be_written_end_the_run_in_one_message_and_it_resumes(place, whole, tmp_path):
  """/dev/full takes no byte, as a full disk."""
  file = tmp_path / "metrics" / "tiny.jsonl"

  def fill():
    if place == "metrics":
      file.rename(tmp_path / "aside")
      file.symlink_to("/dev/full")
    elif place == "events":
      links = {path: os.readlink(path) for path in pathlib.Path("/proc/self/fd").iterdir() if path.is_symlink()}
      (events,) = (path for path, target in links.items() if f"{file.parent}/tiny/events" in target)
      os.dup2(os.open("/dev/full", os.O_WRONLY), int(events.name))

  if place == "opening":
    file.parent.write_text("no folder")
  why = "(No space left on device|File exists|Not a directory)"
  message = rf"the metrics in {file} cannot be written: {why}; check"
  refused((message, tiny_run.train, tmp_path, tiny_run.CallAt(10, fill)))
  if place == "metrics":
    (tmp_path / "aside").replace(file)
  elif place == "opening":
    file.parent.unlink()
  tiny_run.train(tmp_path)
  assert _result(tmp_path) == _result(whole)


def test_damaged_lines_of_metrics_are_kept_aside(whole, tmp_path, capsys):
  with pytest.raises(InterruptedError):
    tiny_run.train(tmp_path, tiny_run.CallAt(17, _stop))
  file = tmp_path / "metrics" / "tiny.jsonl"
  lines = file.read_text().splitlines(keepends=True)
  damages = (b"[1]\n", b'{"step": "2"}\n', b"\xff\n", lines[0][:9].encode(), b"[" * 10**5 + b"\n")
  for number, damage in enumerate(damages, 1):
    data = lines[0].encode() + damage + "".join(lines[1:]).encode()
    file.write_bytes(data)
    with pytest.raises(InterruptedError):
      tiny_run.train(tmp_path, tiny_run.CallAt(16, _stop))
    kept = file.parent / f"tiny.jsonl.damaged{f'_{number}' if number > 1 else ''}"
    assert kept.read_bytes() == data and f"{file}:2 is not a line of metrics" in capsys.readouterr().err
    assert set(file.read_text().splitlines(keepends=True)) >= set(lines[:1] + lines[2:16])
  file.write_text("".join(lines).rstrip())  # the last line is whole
  tiny_run.train(tmp_path)
  assert _result(tmp_path) == _result(whole)


_KILLED_WHILE_SAVING = """
import os, pathlib, signal, sys, threading
import tiny_run

rename = os.rename


def rename_but_16(source, destination, **kwargs):
  if pathlib.Path(destination).name == "16":
    threading.Event().wait()
  rename(source, destination, **kwargs)


os.rename = os.replace = rename_but_16
tiny_run.train(pathlib.Path(sys.argv[1]), tiny_run.CallAt(21, lambda: os.kill(os.getpid(), signal.SIGKILL)))
"""


def test_a_process_killed_while_saving_loses_that_step_only(whole, tmp_path, capsys):
  """Training goes on during the save of step 16; the kill comes at step 21."""
  env = {**os.environ, "PYTHONPATH": f"{HERE.parent / 'helpers'}:{HERE.parents[1]}"}
  done = subprocess.run([sys.executable, "-c", _KILLED_WHILE_SAVING, tmp_path], env=env, capture_output=True, text=True)
  assert done.returncode == -9, done.stderr
  assert _lines(tmp_path)[-1]["step"] == 20
  with (tmp_path / "metrics" / "tiny.jsonl").open("a") as f:
    f.write('{"step": 22, "train/lo')  # cut off by a kill
  assert saved.unfinished_steps(_run(tmp_path)) == [16]
  assert [p.name for p in saved.finished_steps(_run(tmp_path))] == ["8"]
  tiny_run.train(tmp_path)
  assert "resuming from step 8 of 24; step 16" in capsys.readouterr().err
  assert _result(tmp_path) == _result(whole)


def test_a_run_stops_at_the_wanted_loss_and_does_not_go_on_when_started_again(whole, tmp_path):
  losses = _evaluated(whole)
  assert list(_evaluated(whole, "train/loss")) == list(range(2, 25, 2)) and list(losses) == list(range(4, 25, 4))
  assert len(_lines(whole)) == 12 + 6, "each step is reported once"
  assert list(losses.values()) == sorted(losses.values(), reverse=True)
  goal = {"stop_at_loss": losses[12]}  # a step that is evaluated and would not be saved
  with pytest.raises(InterruptedError):
    tiny_run.train(tmp_path, tiny_run.CallAt(10, _stop), **goal)
  tiny_run.train(tmp_path, **goal)
  assert _evaluated(tmp_path) == {step: losses[step] for step in (4, 8, 12)}
  ended = _result(tmp_path)
  assert "12" in ended[1]
  tiny_run.train(tmp_path, tiny_run.CallAt(12, _stop), **goal)
  assert _result(tmp_path) == ended


@pytest.mark.parametrize("best_by", ["loss", "loss_solve"])
def test_best_by_names_the_metric_of_the_best_step(best_by, tmp_path):
  tiny_run.train(tmp_path, best_by=best_by, learning_rate=3.0, eval_every_steps=2, save_every_steps=2)
  losses = _evaluated(tmp_path, f"eval/{best_by}")
  best = saved.find(_run(tmp_path))[0]
  manifest = saved.read_manifest(best)
  assert manifest["best_by"] == best_by and manifest["eval_loss"] == min(losses.values())
  assert int(best.name) == min(losses, key=losses.get) < tiny_run.NUM_STEPS


def test_a_loss_that_is_not_finite_or_absent_ends_the_run_unsaved(tmp_path):
  rows, nan = tiny_run.CallAt(9, lambda: setattr(rows, "take", spoil)), np.float32(np.nan)

  def spoil(index):
    batch = rows.rows.take(index)
    return batch.replace(weights=batch.weights * nan)

  refused(("loss is nan at step 10", tiny_run.train, tmp_path, rows))
  assert [p.name for p in _run(tmp_path).iterdir()] == ["8"]
  eval_rows = tiny_run.rows(1, 9)
  eval_rows.data.weights[-1] *= nan
  refused(("held-out loss is nan at step 4", tiny_run.train, tmp_path / "held out", None, eval_rows))
  eval_rows = tiny_run.rows(1, 9)
  eval_rows.data.kind[eval_rows.data.kind == 2] = 1
  train = partial(tiny_run.train, tmp_path / "absent", eval_rows=eval_rows, best_by="loss_solve")
  refused((r"loss_solve.* loss, loss_verify", train))
  assert not [step for name in ("held out", "absent") for step in _run(tmp_path / name).iterdir()]


@pytest.mark.parametrize(("max_rows", "read"), [(0, range(10)), (3, [0, 3, 6])])
def test_evaluation_is_the_mean_over_rows_each_read_once(max_rows, read):
  rows, mesh = tiny_run.rows(1), tiny_run.mesh()
  assert rows.num_rows == 10, "4 does not divide it: the last batch has empty rows"
  w = np.random.default_rng(0).normal(size=(tiny_run.VOCAB, tiny_run.VOCAB)).astype(np.float32)
  with jax.set_mesh(mesh):
    params = jax.device_put({"w": w}, sharding.replicated(mesh))
    step = jax.jit(lambda p, b: tiny_run.loss_fn(p, b)[1])
    got = loop.evaluate(step, params, rows, 4, sharding.batch_sharding(mesh), max_rows)
  data = rows.take(np.array(read))
  logits = w[data.tokens].astype(np.float64)
  nll = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, data.targets[..., None], -1)[..., 0]
  for name, kind in (("loss_verify", 1), ("loss_solve", 2)):
    assert got[name] == pytest.approx(nll[data.kind == kind].mean(), rel=1e-5)


def test_each_step_function_is_compiled_once_and_no_other_shape_is_accepted(tmp_path):
  with compilations() as compiled:
    tiny_run.train(tmp_path / "one")
    rows = tiny_run.CallAt(5, lambda: setattr(rows, "take", lambda index: rows.rows.take(index).replace(**wide)))
    wide = {"tokens": np.zeros((4, 9), np.int32)}
    with pytest.raises(TypeError):
      tiny_run.train(tmp_path / "two", rows)
  assert [compiled[name] for name in ("train_step", "eval_step")] == [2, 2], compiled


def test_invalid_settings_are_refused(tmp_path):
  for named, changes in {
    "eval_every_steps 3 .*log_every_steps 2": {"eval_every_steps": 3},
    "save_every_steps 6 .*eval_every_steps 4": {"save_every_steps": 6},
    "best_by .*loss_solve": {"best_by": "accuracy"},
    "batch_size 4 .*1 batch shards x 3 micro-batches": {"num_micro_batches": 3},
    "batch_size 6 .*4 batch shards": {"batch_size": 6, "on": sharding.make_mesh(data=4, tensor=2)},
    r"w is bfloat16.*param_dtype=float32": {"dtype": jnp.bfloat16},
  }.items():
    refused((named, partial(tiny_run.train, tmp_path, **changes)))
