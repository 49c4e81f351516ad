"""Checkpoints and whole runs on gs://, against an emulator.

gcsfs and tensorstore read the address of the emulator at process start, so each check runs in a child.
"""

import os
import pathlib
import signal
import sys

import jax
import numpy as np
import pytest
from etils import epath
from refusals import refused

pytest.importorskip("gcsfs")
pytest.importorskip("gcp_storage_emulator")

import fsspec.core
import gcs_emulator
import gcsfs
import processes
import saved_runs

import genrm_jax
from genrm_jax.checkpoints import hugging_face, pretrained, released, safetensors
from genrm_jax.data import jsonl
from genrm_jax.export import export
from genrm_jax.pipeline import cli
from genrm_jax.pipeline import stages as staging
from genrm_jax.pipeline.stages import Stage
from genrm_jax.runtime import sharding
from genrm_jax.training import metrics, saved

TESTS = pathlib.Path(__file__).parent
GEMMA = TESTS / "peers/goldens/hf_gemma2/checkpoint"
MIB = 2**20


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
  refused(("not empty", export, path, "gs://bucket/out"))

  # Through a file system without a cache, like another process.
  gcsfs.GCSFileSystem(skip_instance_cache=True).copy(f"{path}/4", f"{path}/9", recursive=True)
  assert [step.name for step in saved.finished_steps(path)] == ["9", "4"]
  (path / "9" / "commit_success.txt").unlink()
  assert [step.name for step in saved.finished_steps(path)] == ["4"]


def check_closed_buckets():
  params, config = pretrained.load(GEMMA, sharding.make_mesh(data=-1))
  for save, bucket in ((hugging_face.save, "readonly"), (hugging_face.save, "none"), (released.save, "readonly")):
    refused((f"gs://{bucket}/a", save, params, config, f"gs://{bucket}/a"))
  refused(("gs://private/c", genrm_jax.load, "gs://private/c"))
  for bucket in ("none", "readonly", "private", "closed"):
    refused((f"^gs://{bucket}/work[^\n]*$", staging.run_stages, epath.Path(f"gs://{bucket}/work"), {}, [], [], print))


def check_workdirs():
  marked, new = epath.Path("gs://bucket/marked"), epath.Path("gs://bucket/new/work")
  gcsfs.GCSFileSystem().touch(f"{marked}/")  # a folder created in the browser
  (marked.parent / "notes/thesis").write_text("")
  refused(("gs://bucket/notes is not empty", staging.run_stages, marked.parent / "notes", {}, [], [], print))
  source, said = pathlib.Path("source"), []
  source.write_text("on a local disk")
  copy, writes = (lambda: (new / "to/copy").write_text(source.read_text())), ("to", "to/copy")
  stage = Stage("copy", copy, writes=writes, sources={"data_dir": str(source)}, settings=("seed",))
  for place in (marked, new):
    staging.run_stages(place, {"seed": 0}, [], [], print)
  for _ in range(2):
    staging.run_stages(new, {"seed": 1}, [stage], [], said.append)
  assert sum("copy: starts" in line for line in said) == 1
  refused((r"copy .*seed has changed", staging.run_stages, new, {"seed": 2}, [stage], [], said.append))
  (new / "to/more").write_text("")
  refused((r"stage copy .*to has changed", staging.run_stages, new, {"seed": 1}, [stage], [], said.append))
  staging.run_stages(new, {"seed": 2}, [stage], [], said.append, rerun=True)
  assert not (new / "to/more").exists() and said.count("copy: starts") == 2


def stop_at_first_metrics():
  """Runs the command in sys.argv; SIGTERM arrives with the first metrics."""
  write = metrics.Metrics.write

  def stop_and_write(*args):
    os.kill(os.getpid(), signal.SIGTERM)
    write(*args)

  metrics.Metrics.write = stop_and_write
  cli.main("gsm8k")


def resume_and_compare():
  """Runs the command in sys.argv, and once more with a local workdir; they differ in times and checkpoint files."""
  with pytest.raises(SystemExit) as ended:
    cli.main("gsm8k")
  assert not ended.value.code
  remote, local = epath.Path("gs://bucket/run"), pathlib.Path("run")
  genrm_jax.evaluate(genrm_jax.get_config("config.py"), local)
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


def check_all():
  """One process for all: each takes seconds to start."""
  for check in (check_weights, check_one_tensor, check_checkpoints, check_closed_buckets, check_workdirs):
    print(check.__name__, file=sys.stderr)
    check()


def test_on_gs(emulator, tmp_path):
  call("check_all", emulator, tmp_path)
  ranges = [read for name, read in emulator.reads if name == "one/model.safetensors"]
  assert ranges and all(ranges), "a tensor is read without the rest of its file"
  ends = (text.removeprefix("bytes=").split("-") for text in ranges)
  num_bytes = sum(1 + int(end) - int(begin) for begin, end in ends)
  # The tensor and the header; older versions of gcsfs read 5 MiB ahead after each.
  assert 8 * MIB <= num_bytes < 19 * MIB


def test_stopped_and_resumed_run_equals_a_local_one(emulator, tmp_path):
  processes.write_config(tmp_path / "config.py", "gsm8k", "genrm")
  flags = "--config=config.py", "--workdir=gs://bucket/run"
  output = call("stop_at_first_metrics", emulator, tmp_path, *flags, code=128 + signal.SIGTERM)
  assert "base: ended by SIGTERM" in output
  output = call("resume_and_compare", emulator, tmp_path, *flags)
  assert "tokenizer: done before" in output and "gs://bucket/run/report/index.html" in output


def call(function, emulator, folder, *args, code=0):
  """Calls a function of this module in another process, in `folder`, with the emulator as gs://; returns stderr."""
  paths = os.pathsep.join((str(TESTS.parent), str(TESTS), str(TESTS / "helpers")))
  removed = {key: "" for key in os.environ if key.startswith("GOOGLE_")}
  environ = {**removed, **emulator.environ, "CLOUDSDK_CONFIG": str(folder), "PYTHONPATH": paths}
  done = processes.run("-c", f"import test_gcs; test_gcs.{function}()", *args, cwd=folder, **environ)
  assert done.returncode == code, done.stderr[-4000:]
  return done.stderr


def names_in(folder):
  files, root = fsspec.core.url_to_fs(str(folder))
  return {name.removeprefix(f"{root}/") for name in files.find(root)}


def assert_equal(found, wanted):
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(wanted))
