"""Checkpoints and whole runs on gs://, against an emulator.

gcsfs and tensorstore read the address of the emulator at process start, so each check runs in a child.
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

import fsspec.core
import gcs_emulator
import gcsfs
import quick_compiles
import saved_runs

import genrm_jax
from genrm_jax.checkpoints import hugging_face, pretrained, released, safetensors
from genrm_jax.data import jsonl
from genrm_jax.export import export
from genrm_jax.pipeline import cli
from genrm_jax.pipeline import stages as staging
from genrm_jax.pipeline.stages import Stage
from genrm_jax.runtime import sharding
from genrm_jax.runtime.errors import UserError
from genrm_jax.training import metrics, saved

TESTS = pathlib.Path(__file__).parent
GEMMA = TESTS / "peers/goldens/hf_gemma2/checkpoint"
MIB = 2**20
CONFIG = """
from experiments.configs import gsm8k

def get_config():
  config = gsm8k.get_config("smoke")
  with config.unlocked():
    config.verifiers = {"genrm": config.verifiers.genrm}
  return config
"""


def check_weights():
  mesh = sharding.make_mesh(data=-1)
  params, config = pretrained.load(GEMMA, mesh)
  hugging_face.save(params, config, "gs://bucket/hf", max_shard_bytes=100_000)
  assert len(list(epath.Path("gs://bucket/hf").glob("*.safetensors"))) == 2
  assert_equal(pretrained.load("gs://bucket/hf", mesh)[0], params)
  released.save(params, config, "gs://bucket/released")
  assert_equal(pretrained.load("gs://bucket/released", mesh, config=config)[0], params)


def check_one_tensor():
  tensors = {f"t{i}": np.full((8 * MIB // 4,), i, np.float32) for i in range(4)}
  with safetensors.new_files(epath.Path("gs://bucket/one")) as create:
    shapes = [(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
    safetensors.write(create, tensors.items(), shapes, 100 * MIB)
  path = epath.Path("gs://bucket/one/model.safetensors")
  np.testing.assert_array_equal(safetensors.read_tensor(path, safetensors.read_index(path)["t2"]), tensors["t2"])


def check_checkpoints():
  work = saved_runs.run_of(epath.Path("gs://bucket/work"), "gsm8k")
  saved_runs.save(work, "base")
  path = saved_runs.save(work, "genrm")
  params, manifest = genrm_jax.load_params("gs://bucket/work/checkpoints/genrm")
  assert_equal(params, genrm_jax.load_params("gs://bucket/work/checkpoints/base")[0])
  assert manifest["step"] == 4 == genrm_jax.load("gs://bucket/work/checkpoints/genrm/4").step

  export(path, "gs://bucket/out")
  assert_equal(pretrained.load("gs://bucket/out", work.mesh)[0], params)
  assert epath.Path("gs://bucket/out/tokenizer.model").read_bytes() == work.path("tokenizer.model").read_bytes()
  with pytest.raises(UserError, match="not empty"):
    export(path, "gs://bucket/out")

  # Through a file system without a cache, like another process.
  gcsfs.GCSFileSystem(skip_instance_cache=True).copy(f"{path}/4", f"{path}/9", recursive=True)
  assert [step.name for step in saved.finished_steps(path)] == ["9", "4"]
  (path / "9" / "commit_success.txt").unlink()
  assert [step.name for step in saved.finished_steps(path)] == ["4"]


def check_closed_buckets():
  params, config = pretrained.load(GEMMA, sharding.make_mesh(data=-1))
  for save, bucket in ((hugging_face.save, "readonly"), (hugging_face.save, "none"), (released.save, "readonly")):
    with pytest.raises(UserError, match=f"gs://{bucket}/a"):
      save(params, config, f"gs://{bucket}/a")
  with pytest.raises(UserError, match="gs://private/c"):
    genrm_jax.load("gs://private/c")
  for bucket in ("none", "readonly", "private", "closed"):
    with pytest.raises(UserError, match=f"^gs://{bucket}/work[^\n]*$"):
      staging.claim_workdir(epath.Path(f"gs://{bucket}/work"), {})


def check_workdirs():
  marked, new = epath.Path("gs://bucket/marked"), epath.Path("gs://bucket/new/work")
  gcsfs.GCSFileSystem().touch(f"{marked}/")  # a folder created in the browser
  for place in (marked, new):
    staging.claim_workdir(place, {"seed": 0})
    staging.claim_workdir(place, {"seed": 1})
    (place / "file").write_text("of a stage")
    with pytest.raises(UserError, match=f"{place}.*seed"):
      staging.claim_workdir(place, {"seed": 2})
  with pytest.raises(UserError, match="gs://bucket/new is not empty"):
    staging.claim_workdir(new.parent, {})
  source, said = pathlib.Path(sys.argv[1]), []
  source.write_text("on a local disk")
  copy, writes = (lambda: (new / "to/copy").write_text(source.read_text())), ("to", "to/copy")
  stage = Stage("copy", copy, writes=writes, sources={"data_dir": str(source)})
  for _ in range(2):
    staging.run_stages(new, [stage], [], said.append)
  assert sum("copy: starts" in line for line in said) == 1
  (new / "to/more").write_text("")
  with pytest.raises(UserError, match="stage copy"):
    staging.run_stages(new, [stage], [], said.append)


def stop_at_first_metrics():
  """Runs the command in sys.argv; SIGTERM arrives with the first metrics."""
  write = metrics.Metrics.write

  def stop_and_write(*args):
    os.kill(os.getpid(), signal.SIGTERM)
    write(*args)

  metrics.Metrics.write = stop_and_write
  cli.main("gsm8k")


def check_equals_local_run():
  """The run in the bucket equals the local one in sys.argv[1], except for times and checkpoint files."""
  remote, local = epath.Path("gs://bucket/run"), pathlib.Path(sys.argv[1])
  files = {at: {n for n in names_in(at) if not n.startswith("checkpoints/")} for at in (remote, local)}
  events = {folder: sorted(n.split("/")[1] for n in names if "tfevents" in n) for folder, names in files.items()}
  assert events == {remote: ["base", "base", "genrm"], local: ["base", "genrm"]}  # one file per start
  names = {n for n in files[remote] if "tfevents" not in n}
  assert names == {n for n in files[local] if "tfevents" not in n}
  with_times = ("stages/", "report/results.json", "report/report.md", "report/index.html")
  same = {name for name in names if not name.startswith(with_times)}
  assert {"config.json", "tokenizer.model", "metrics/base.jsonl", "scores/genrm.jsonl"} < same
  assert [name for name in same if (remote / name).read_bytes() != (local / name).read_bytes()] == []
  results = [jsonl.read_json(folder / "report/results.json") for folder in (remote, local)]
  assert all(found["meta"].pop("wall_seconds") for found in results)
  assert results[0] == results[1]


@pytest.fixture(scope="module")
def emulator():
  with gcs_emulator.running() as started:
    yield started


@pytest.mark.parametrize("check", [check_weights, check_checkpoints, check_closed_buckets, check_workdirs])
def test_on_gs(check, emulator, tmp_path):
  run(check, emulator, tmp_path, tmp_path / "source")


def test_a_tensor_is_read_without_the_rest_of_its_file(emulator, tmp_path):
  run(check_one_tensor, emulator, tmp_path)
  ranges = [read for name, read in emulator.reads if name == "one/model.safetensors"]
  assert ranges and all(ranges)
  ends = (text.removeprefix("bytes=").split("-") for text in ranges)
  num_bytes = sum(1 + int(end) - int(begin) for begin, end in ends)
  # The tensor and the header; older versions of gcsfs read 5 MiB ahead after each.
  assert 8 * MIB <= num_bytes < 19 * MIB


def test_stopped_and_resumed_run_equals_a_local_one(emulator, tmp_path):
  (tmp_path / "config.py").write_text(CONFIG)
  more = quick_compiles.environ(tmp_path / "compiled")
  config, remote = f"--config={tmp_path / 'config.py'}", "--workdir=gs://bucket/run"
  output = run(stop_at_first_metrics, emulator, tmp_path, config, remote, code=128 + signal.SIGTERM, **more)
  assert "base: ended by SIGTERM" in output
  output = run("experiments.gsm8k", emulator, tmp_path, config, remote, **more)
  assert "tokenizer: done before" in output and "gs://bucket/run/report/index.html" in output
  run("experiments.gsm8k", emulator, tmp_path, config, f"--workdir={tmp_path / 'run'}", **more)
  run(check_equals_local_run, emulator, tmp_path, tmp_path / "run")


def run(what, emulator, home, *args, code=0, **more):
  """Calls a function of this module, or runs a module by name, with the emulator as gs://; returns stderr."""
  start = ["-m", what] if isinstance(what, str) else ["-c", f"import test_gcs; test_gcs.{what.__name__}()"]
  paths = os.pathsep.join((str(TESTS.parent), str(TESTS), str(TESTS / "helpers")))
  environ = {key: value for key, value in os.environ.items() if not key.startswith(("GOOGLE_", "XLA_FLAGS"))}
  environ |= {**emulator.environ, "CLOUDSDK_CONFIG": str(home), "PYTHONPATH": paths, **more}
  command = [sys.executable, *start, *map(str, args)]
  done = subprocess.run(command, cwd=TESTS.parent, env=environ, capture_output=True, text=True, timeout=1200)
  assert done.returncode == code, done.stderr[-4000:]
  return done.stderr


def names_in(folder):
  """All files below a folder, local or on gs://."""
  files, root = fsspec.core.url_to_fs(str(folder))
  return {name.removeprefix(f"{root}/") for name in files.find(root)}


def assert_equal(found, wanted):
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(wanted))
