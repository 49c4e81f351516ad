"""Checkpoints by name: the real Gemma that pip installs, and models of a hub on loopback."""

import hashlib
import importlib.util
import os
import pathlib
import re
import shutil
import sys
import threading

import fake_hub
import gemma_like
import jax
import numpy as np
import processes
import pytest
import real_gemma
import saved_runs
from etils import epath
from make_goldens import our_logits
from random_params import random_params
from refusals import refused

import genrm_jax
from genrm_jax.checkpoints import gguf_file, hugging_face, names, pretrained
from genrm_jax.model.config import get_config
from genrm_jax.pipeline.fingerprints import fingerprint

PARTS = (b"one", b"two", b"three")


@pytest.fixture
def package(tmp_path, monkeypatch):
  """A package of three small parts in place of the real one; the folder of its parts."""
  pytest.importorskip("gguf")
  folder = tmp_path / "site" / "tiny_parts"
  folder.mkdir(parents=True)
  for i, part in enumerate(PARTS):
    (folder / f"{i}").write_bytes(part)
  text = f"import pathlib\ndef chunk_paths():\n  return [pathlib.Path({str(folder)!r}, str(i)) for i in range(3)]\n"
  (folder / "__init__.py").write_text(text)
  monkeypatch.syspath_prepend(folder.parent)
  monkeypatch.setattr(names, "_PACKAGE", "tiny_parts")
  monkeypatch.setattr(names, "_SHA256", hashlib.sha256(b"".join(PARTS)).hexdigest())
  monkeypatch.setenv("GENRM_JAX_CACHE", str(tmp_path / "cache"))
  yield folder
  sys.modules.pop("tiny_parts", None)


def _resolve():
  return names.resolve("gemma3_270m")


def test_the_file_is_assembled_once_and_whenever_it_is_damaged(package, monkeypatch):
  paths = []
  threads = [threading.Thread(target=lambda: paths.append(_resolve())) for _ in range(8)]
  [t.start() for t in threads]
  [t.join() for t in threads]
  (path,) = set(paths)
  assert path.read_bytes() == b"onetwothree" and len(paths) == 8
  _resolve()
  assert {p.name for p in path.parent.iterdir()} == {path.name, f"{path.stem}.checked"}
  shutil.rmtree(package)
  digests = []
  monkeypatch.setattr(names, "_digest", lambda blocks, real=names._digest: digests.append(1) or real(blocks))
  assert _resolve() == path and not digests, "what was checked is not read again"
  os.utime(path)
  assert _resolve() == path and len(digests) == 1, "it may have changed"
  path.write_bytes(b"onetwo")
  refused((r"/0 is missing; run pip install --force-reinstall", _resolve))
  package.mkdir()
  for i, part in enumerate(PARTS):
    (package / f"{i}").write_bytes(part)
  assert _resolve().read_bytes() == b"onetwothree"


def test_what_keeps_it_from_being_assembled_is_said_in_one_message(package, tmp_path, monkeypatch):
  (package / "1").write_bytes(b"tw0")
  refused((r"files of tiny_parts are damaged: SHA-256 .*--force-reinstall", _resolve))
  assert not list((tmp_path / "cache").iterdir()), "nothing is left"
  (package / "1").write_bytes(b"two")
  with monkeypatch.context() as patch:
    patch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(20, 10, 10))
    refused((r"takes 0.00 GiB, but its disk has 0.00 GiB free; .*GENRM_JAX_CACHE", _resolve))
  monkeypatch.setenv("GENRM_JAX_CACHE", str(package / "0"))
  refused((r"could not be written", _resolve))
  monkeypatch.setattr(names, "_PACKAGE", "not_installed")
  refused((r"pip install 'genrm-jax\[gemma3-270m\]'.*ai.google.dev/gemma/terms", _resolve))


def test_paths_come_before_names(package, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  pathlib.Path("gemma3_270m").mkdir()
  assert str(_resolve()) == "gemma3_270m"
  for path in ("gemma3_271m", "gs://bucket/gemma3_270m", "/gemma3_270m/x", "a/b/c", "../a"):
    assert str(names.resolve(path)) == path
  refused((r"3_271m: no such folder or file.* gemma3_270m, or ORG/NAME", pretrained.open_checkpoint, "gemma3_271m"))


@pytest.mark.skipif(not importlib.util.find_spec(names._PACKAGE), reason="needs the extra gemma3-270m")
def test_the_real_gemma(tmp_path, monkeypatch):
  """Its logits are those of transformers, and its ids those of llama.cpp, which read the file by themselves."""
  monkeypatch.setenv("GENRM_JAX_CACHE", str(tmp_path))
  params, config, tokenizer = genrm_jax.pretrained("gemma3_270m")
  assert config.name == "gemma3_270m"
  golden = np.load(real_gemma.GOLDEN)
  assert [tokenizer.bos_id, *tokenizer.encode(real_gemma.TEXT)] == golden["tokens"].tolist()
  got = our_logits(params, config, golden["tokens"][None])[0]
  assert golden["logits"].std() > 4
  np.testing.assert_allclose(got[:, golden["ids"]], golden["logits"], atol=1e-4)
  np.testing.assert_allclose(jax.nn.logsumexp(got, axis=-1), golden["logsumexp"], atol=1e-4)
  metadata, corpus = gguf_file.read_index(_resolve()).metadata, real_gemma.corpus()
  assert real_gemma.llama_ids(metadata, corpus) == [tokenizer.encode(text) for text in corpus]
  assert real_gemma.llama_ids(metadata, corpus, special=False) == [tokenizer.encode_plain(text) for text in corpus]
  assert all(tokenizer.decode(tokenizer.encode_plain(text)) == text for text in corpus)
  # Adapters saved alone find it by its name.
  run = saved_runs.run_of(
    tmp_path / "run", "gsm8k", "gemma3_270m", mesh__data=1, mesh__fsdp=-1, verifiers__genrm__lora__targets=("q",)
  )
  run.workdir.mkdir()
  run.path("tokenizer.model").write_bytes(tokenizer.file_bytes)
  adapted, manifest = genrm_jax.load_params(saved_runs.save(run, "genrm"))
  assert manifest["left_out"] and np.abs(adapted["layers"]["q"] - np.asarray(params["layers"]["q"])).max() > 1e-4
  np.testing.assert_array_equal(adapted["layers"]["up"], params["layers"]["up"].astype("bfloat16"))
  _resolve().unlink()  # pytest keeps the folders of three runs


_OPEN = """
import sys
from genrm_jax.checkpoints import pretrained
from genrm_jax.runtime.errors import UserError
for name in sys.argv[1:]:
  try:
    reader = pretrained.open_checkpoint(name)
    print(reader.path, reader.config.num_layers, reader.tokenizer and reader.tokenizer().vocab_size)
  except UserError as e:
    print(e)
"""


def test_models_of_a_hub(tmp_path):
  pytest.importorskip("huggingface_hub")
  tiny, folder, weights = get_config("tiny_gemma2", vocab_size=gemma_like.VOCAB_SIZE), tmp_path / "model", "model.safet"
  hugging_face.save(random_params(tiny), tiny, folder)
  gemma_like.write(folder / "tokenizer.model", 2)
  (folder / "README.md").write_text("A model.")
  for name, file, text in (("llama", "config.json", '{"model_type": "llama"}'), ("empty", "README.md", "")):
    (tmp_path / name).mkdir()
    (tmp_path / name / file).write_text(text)
  shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
  shutil.copy(folder / "model.safetensors", tmp_path / "llama")
  own = {f"org/{name}": tmp_path / name for name in ("model", "llama", "empty", "bare")}
  hub = fake_hub.Hub({**own, "org/gated": folder, "org/vast": folder}, gated=["org/gated"], vast=["org/vast"])
  env = {
    "HF_HOME": str(tmp_path / "hf"),
    "GENRM_JAX_CACHE": str(tmp_path / "cache"),
    "HF_TOKEN": "",
    "HF_HUB_CACHE": "",
  }
  view = rf"{tmp_path}/cache/hub/org--(\w+)/{fake_hub.REVISION} 4 {gemma_like.VOCAB_SIZE}"

  def opened(wanted, **more):
    """Each name, with what must be said of it."""
    done = processes.run("-c", _OPEN, *wanted, cwd=tmp_path / "cwd", **{**env, **more})
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(wanted), lines
    for line, want in zip(lines, wanted.values(), strict=True):
      assert re.fullmatch(want, line), (want, line)

  (tmp_path / "cwd").mkdir()
  with hub.serve() as address:
    env["HF_ENDPOINT"] = address
    wanted = {
      "org/model": view,
      "org/llama": r"org/llama on the hub: config.json: model_type \"llama\" is not supported.*",
      "org/vast": r"org/vast takes \d+\.0 GiB, but the disk of .* HF_HUB_CACHE.*",
      "org/bare": r"org/bare on the hub has no \*\.safetensors; .*",
      "org/empty": r"org/empty on the hub has no config\.json, .*",
      "org/none": r"org/none: no such folder here, and no such model on the hub .* private; .*HF_TOKEN",
      "org/gated": rf"org/gated: .* accepted its licence; accept it at {address}/org/gated, .* set HF_TOKEN",
    }
    opened(wanted)
    read = [path for path in hub.requests if path.startswith("GET") and (weights in path or "README" in path)]
    assert len(read) == 1 and "/org/model/resolve/" in read[0], "the weights of a model that is loaded, once"
    opened({"org/gated": view, "org/model": view}, HF_TOKEN="right")
    assert len([path for path in hub.requests if path.startswith("GET") and weights in path]) == 2
  names_of = {p.name for p in (tmp_path / "cache/hub/org--model" / fake_hub.REVISION).iterdir()}
  assert names_of == {"config.json", "model.safetensors", "tokenizer.model"}
  out = r"org/other: no such folder here, the hub .* cannot be reached, and its cache .* does not hold the model; .*"
  opened({"org/model": view, "org/other": out})  # the hub is gone
  found = epath.Path(tmp_path / "cache/hub/org--model" / fake_hub.REVISION)
  shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("README.md"))
  assert fingerprint(found, whole=True) == fingerprint(epath.Path(tmp_path / "copy"), whole=True)


def test_without_the_hubs_package(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  refused((r"org/model: no such folder here.*pip install 'genrm-jax\[hub\]'", pretrained.open_checkpoint, "org/model"))
