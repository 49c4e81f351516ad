"""Checkpoints and whole runs on gs://, against an emulator.

gcsfs and tensorstore learn of it when a process starts, hence a child.
"""

import os
import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from etils import epath

pytest.importorskip("gcsfs")
pytest.importorskip("gcp_storage_emulator")

import gcs_emulator
import gcsfs
import quick_compiles
import saved_runs

import genrm_jax
from experiments import gsm8k, math500
from experiments.configs import math500 as math500_config
from genrm_jax.checkpoints import hugging_face, pretrained, released, safetensors
from genrm_jax.data import jsonl
from genrm_jax.export import export
from genrm_jax.pipeline import list_tasks, verifier_stages
from genrm_jax.pipeline import stages as staging
from genrm_jax.pipeline.run import Run
from genrm_jax.pipeline.stages import Stage
from genrm_jax.records import Candidate, Problem
from genrm_jax.runtime import sharding
from genrm_jax.runtime.errors import UserError
from genrm_jax.train import metrics, saved

TESTS = pathlib.Path(__file__).parent
MIB = 2**20
CONFIG = """
from experiments.configs import gsm8k

def get_config():
  config = gsm8k.get_config("smoke")
  with config.unlocked():
    config.verifiers = {"genrm": config.verifiers.genrm}
  return config
"""


def weights_go_and_come():
  mesh = sharding.make_mesh(data=-1)
  params, config = pretrained.load(TESTS / "peers/goldens/hf_gemma2/checkpoint", mesh)
  hugging_face.save(params, config, "gs://bucket/hf", max_shard_bytes=100_000)
  assert len(list(epath.Path("gs://bucket/hf").glob("*.safetensors"))) == 2
  _same(pretrained.load("gs://bucket/hf", mesh)[0], params)
  released.save(params, config, "gs://bucket/released")
  _same(pretrained.load("gs://bucket/released", mesh, config=config)[0], params)


def one_tensor():
  tensors = {f"t{i}": np.full((8 * MIB // 4,), i, np.float32) for i in range(4)}
  folder = epath.Path("gs://bucket/one")
  with safetensors.new_files(folder) as create:
    shapes = [(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
    safetensors.write(create, tensors.items(), shapes, 100 * MIB)
  path = folder / "model.safetensors"
  np.testing.assert_array_equal(safetensors.read_tensor(path, safetensors.read_index(path)["t2"]), tensors["t2"])


def runs():
  run = saved_runs.run_of(epath.Path("gs://bucket/work"), "gsm8k")
  saved_runs.save(run, "base")
  path = saved_runs.save(run, "genrm")
  params, manifest = genrm_jax.load_params("gs://bucket/work/checkpoints/genrm")
  _same(params, genrm_jax.load_params("gs://bucket/work/checkpoints/base")[0])
  assert manifest["step"] == 4
  assert genrm_jax.load("gs://bucket/work/checkpoints/genrm/4").step == 4

  export(path, "gs://bucket/out")
  _same(pretrained.load("gs://bucket/out", run.mesh)[0], params)
  file_bytes = epath.Path("gs://bucket/work/tokenizer.model").read_bytes()
  assert epath.Path("gs://bucket/out/tokenizer.model").read_bytes() == file_bytes
  with pytest.raises(UserError, match="not empty"):
    export(path, "gs://bucket/out")

  # A file system of its own, as another process has it.
  gcsfs.GCSFileSystem(skip_instance_cache=True).copy(f"{path}/4", f"{path}/9", recursive=True)
  assert [step.name for step in saved.finished_steps(path)] == ["9", "4"]
  (path / "9" / "commit_success.txt").unlink()
  assert [step.name for step in saved.finished_steps(path)] == ["4"]


def places_that_are_closed():
  params, config = pretrained.load(TESTS / "peers/goldens/hf_gemma2/checkpoint", sharding.make_mesh(data=-1))
  for bucket in ("readonly", "none"):
    with pytest.raises(UserError, match=f"gs://{bucket}/a: could not write the model here"):
      hugging_face.save(params, config, f"gs://{bucket}/a")
  with pytest.raises(UserError, match="gs://readonly/b"):
    released.save(params, config, "gs://readonly/b")
  with pytest.raises(UserError, match=r"no checkpoint at gs://private/c: .*who may read the bucket"):
    genrm_jax.load("gs://private/c")


def run_that_is_told_to_stop():
  """The command on the command line; SIGTERM comes with the first metrics."""
  write = metrics.Metrics.write

  def write_and_be_told(self, step, values):
    write(self, step, values)
    os.kill(os.getpid(), signal.SIGTERM)

  metrics.Metrics.write = write_and_be_told
  verifier_stages.main(gsm8k.make_stages)


def same_as_on_disk():
  """The run in the bucket and the one in the folder that is named on the command line."""
  there, here = epath.Path("gs://bucket/run"), pathlib.Path(sys.argv[1])
  names = [str(p.relative_to(here)) for p in here.rglob("*") if p.is_file()]
  kept = [name for name in _names(there) if "tfevents" not in name and not name.startswith("checkpoints/")]
  assert kept == sorted(name for name in names if "tfevents" not in name and not name.startswith("checkpoints/"))
  told_time = ("stages/", "report/results.json", "report/report.md", "report/index.html", "data/genrm-critiques/")
  equal = [name for name in kept if not name.startswith(told_time)]
  assert {"config.json", "tokenizer.model", "metrics/base.jsonl", "scores/genrm.jsonl"} < set(equal)
  assert [name for name in equal if (there / name).read_bytes() != (here / name).read_bytes()] == []
  results, markers = ([], [])
  for folder in (there, here):
    results.append(jsonl.read_json(folder / "report/results.json"))
    assert results[-1]["meta"].pop("wall_seconds")
    markers.append({p.name: jsonl.read_json(p) for p in (folder / "stages").iterdir()})
    for marker in markers[-1].values():
      assert marker.pop("seconds") >= 0
      for files in marker.values():  # a checkpoint's files have names of their own; the report tells times
        for name in [name for name in files if name.startswith(("checkpoints/", "report/"))]:
          files[name] = ""
  assert results[0] == results[1]
  assert markers[0] == markers[1] and len(markers[0]) == 6
  events = [name.split("/")[1] for name in _names(there) if "tfevents" in name]
  assert sorted(events) == ["base", "base", "genrm"], "one of each start"


def workdirs():
  marked = epath.Path("gs://bucket/marked")
  gcsfs.GCSFileSystem().touch(f"{marked}/")  # as a browser makes a folder
  assert list(marked.iterdir())
  for place in (marked, epath.Path("gs://bucket/new/work")):
    staging.claim_workdir(place, {"seed": 0})
    staging.claim_workdir(place, {"seed": 1})
    (place / "file").write_text("made by a stage")
    with pytest.raises(UserError, match=f"{place} was made by another config; different: seed"):
      staging.claim_workdir(place, {"seed": 2})
  with pytest.raises(UserError, match="gs://bucket/new is not empty and holds no config"):
    staging.claim_workdir(epath.Path("gs://bucket/new"), {})
  place, source, said = epath.Path("gs://bucket/new/work"), pathlib.Path(sys.argv[1]), []
  source.write_text("on a disk")
  stage = Stage("copy", lambda: (place / "to/copy").write_text(source.read_text()), (str(source),), ("to", "to/copy"))
  for _ in range(2):
    staging.run_stages(place, [stage], [], said.append)
  assert said[-1] == f"{place}: all was done before; nothing was run"
  (place / "to/more").write_text("")
  with pytest.raises(UserError, match="stage copy was done with another to than gs://bucket/new/work holds now"):
    staging.run_stages(place, [stage], [], said.append)

  for bucket, what in (
    ("none", "/config.json: no such bucket"),
    ("readonly", "/config.json: could not be written: Forbidden"),
    ("private", " cannot be the workdir: Forbidden"),
    ("closed", " cannot be the workdir: refused, 401"),
  ):
    with pytest.raises(UserError) as error:
      staging.claim_workdir(epath.Path(f"gs://{bucket}/work"), {})
    assert str(error.value).startswith(f"gs://{bucket}/work{what}") and "\n" not in str(error.value)


def banks_and_problems():
  run = saved_runs.run_of(epath.Path("gs://bucket/study"), bank="gs://bucket/bank")
  with pytest.raises(UserError, match=r"gs://bucket/bank has no problems/train\.jsonl"):
    list_tasks.copy_bank(run)
  for split in ("train", "val", "eval", "in_distribution"):
    jsonl.write_records(f"gs://bucket/bank/problems/{split}.jsonl", [Problem("a", "last_letter", split, "?", "x")])
    jsonl.write_records(f"gs://bucket/bank/candidates/{split}.jsonl", [Candidate("a", 0, "x", "x", True, "me")])
  list_tasks.copy_bank(run)
  assert run.candidates("eval") == [Candidate("a", 0, "x", "x", True, "me")]
  assert _names(run.workdir) == _names(epath.Path("gs://bucket/bank"))

  run = Run(math500_config.get_config("smoke"), epath.Path("gs://bucket/math"))
  math500.read_problems(run)
  assert _names(run.workdir) == ["data/problems.jsonl", "data/solutions.jsonl", "problems/eval.jsonl"]


@pytest.fixture(scope="module")
def emulator():
  with gcs_emulator.running() as started:
    yield started


def test_hugging_face_and_released_folders(emulator, tmp_path):
  _in_child(weights_go_and_come, emulator, tmp_path)


def test_a_tensor_is_read_without_the_rest_of_its_file(emulator, tmp_path):
  _in_child(one_tensor, emulator, tmp_path)
  ranges = [read.range for read in emulator.reads if read.name == "one/model.safetensors"]
  assert ranges and all(ranges)
  ends = [text.removeprefix("bytes=").split("-") for text in ranges]
  # The tensor and the header; an older gcsfs reads 5 MiB ahead after each.
  assert 8 * MIB <= sum(1 + int(end) - int(begin) for begin, end in ends) < 19 * MIB


def test_our_checkpoints_are_written_opened_and_exported(emulator, tmp_path):
  _in_child(runs, emulator, tmp_path)


def test_buckets_that_are_closed_or_missing_give_one_message(emulator, tmp_path):
  _in_child(places_that_are_closed, emulator, tmp_path)


def test_a_workdir_is_claimed_or_refused_with_one_message(emulator, tmp_path):
  _in_child(workdirs, emulator, tmp_path, tmp_path / "source")


def test_a_study_takes_the_problems_and_solutions_of_a_run_there(emulator, tmp_path):
  _in_child(banks_and_problems, emulator, tmp_path)


def test_a_run_there_stopped_and_started_again_is_the_run_on_disk(emulator, tmp_path):
  (tmp_path / "config.py").write_text(CONFIG)
  more = quick_compiles.environ(tmp_path / "compiled")
  config, there = f"--config={tmp_path / 'config.py'}", "--workdir=gs://bucket/run"
  told = _in_child(run_that_is_told_to_stop, emulator, tmp_path, config, there, code=128 + signal.SIGTERM, **more)
  assert "base: ended by SIGTERM, step 2 of 4 is saved" in told
  command = ["-m", "experiments.gsm8k", config]
  told = _python([*command, there], emulator, tmp_path, **more)
  assert "tokenizer: done before" in told and "report: gs://bucket/run/report/index.html" in told
  _python([*command, f"--workdir={tmp_path / 'run'}"], emulator, tmp_path, **more)
  _in_child(same_as_on_disk, emulator, tmp_path, tmp_path / "run")


def _in_child(check, emulator, home, *args, **more):
  return _python(["-c", f"import test_gcs; test_gcs.{check.__name__}()", *args], emulator, home, **more)


def _python(args, emulator, home, code=0, **more):
  """What a Python that sees the emulator says on stderr."""
  paths = os.pathsep.join((str(TESTS.parent), str(TESTS)))
  environ = {key: value for key, value in os.environ.items() if not key.startswith(("GOOGLE_", "XLA_FLAGS"))}
  environ |= {**emulator.environ, "CLOUDSDK_CONFIG": str(home), "PYTHONPATH": paths, **more}
  command = [sys.executable, *map(str, args)]
  done = subprocess.run(command, cwd=TESTS.parent, env=environ, capture_output=True, text=True, timeout=600)
  assert done.returncode == code, done.stderr[-4000:]
  return done.stderr


def _names(folder):
  """Of all files in it, in order."""
  files = gcsfs.GCSFileSystem().find(str(folder))
  return sorted(
    str(pathlib.PurePosixPath(f"gs://{name}").relative_to(pathlib.PurePosixPath(str(folder)))) for name in files
  )


def _same(found, wanted):
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(wanted))
