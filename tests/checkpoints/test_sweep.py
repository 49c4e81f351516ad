"""Damaged checkpoints, by systematic changes: each loads with the same bits or is refused in one message.

Nothing is written on the way, and no other exception is raised.
"""

import dataclasses
import functools
import json
import pathlib

import gemma_like
import gguf_files
import jax
import pytest
import saved_runs
from etils import epath
from random_params import random_params
from refusals import refused
from sweep import DEEP, Sweep

import genrm_jax
from genrm_jax.checkpoints import gguf_file, hugging_face, pretrained, released
from genrm_jax.export import export
from genrm_jax.model.config import get_config
from genrm_jax.runtime.errors import UserError
from genrm_jax.training import saved

CONFIG = get_config("tiny_gemma3", num_layers=2, embed_dim=24, ffw_dim=40, num_heads=2, num_kv_heads=1, head_dim=4)


def _tensors(folder):
  """All tensors of a checkpoint of another project; each refusal names its folder."""
  try:
    reader = pretrained.open_checkpoint(folder, None if hugging_face.is_folder(epath.Path(folder)) else CONFIG)
    return {tensor.name: reader.read(tensor.name) for tensor in reader.tensors}
  except UserError as e:
    assert str(folder) in str(e), str(e)
    raise


def _header(data):
  return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def test_hugging_face_folders(tmp_path):
  hugging_face.save(random_params(CONFIG), CONFIG, tmp_path, max_shard_bytes=8000)
  shards = sorted(p.name for p in tmp_path.glob("*.safetensors"))
  assert len(shards) > 1
  config, index, shard = "config.json", "model.safetensors.index.json", shards[1]
  sweep, data = Sweep(tmp_path, _tensors), (tmp_path / shard).read_bytes()
  for name in (config, index, shard):
    sweep.files(name)
  for name in (config, index):
    sweep.bits(name, range(0, (tmp_path / name).stat().st_size, 5))
  sweep.values(config)
  sweep.values(index, keep=lambda keys: keys[-1] in ("weight_map", "model.norm.weight", "metadata"))
  start = 8 + int.from_bytes(data[:8], "little")
  sweep.bits(shard, [place for place in range(8) for _ in range(8)])
  sweep.bits(shard, range(8, start, 5))

  def encode(text):
    return len(text).to_bytes(8, "little") + text.encode() + data[start:]

  first = list(_header(data))[1]
  sweep.values(shard, _header, encode, keep=lambda keys: keys[0] in ("__metadata__", first))
  assert sweep.counts["loaded"] > 50 and sweep.counts["refused"] > 500, sweep.counts


def test_released_folders(tmp_path):
  released.save(random_params(CONFIG), CONFIG, tmp_path / "whole")
  sweep, index = Sweep(tmp_path / "whole", _tensors), "_METADATA"
  sweep.files(index)
  sweep.files("manifest.ocdbt")
  for path in (p.relative_to(sweep.folder) for p in sorted((tmp_path / "whole" / "ocdbt.process_0" / "d").iterdir())):
    sweep.files(str(path))
  sweep.bits(index, range(0, (tmp_path / "whole" / index).stat().st_size, 97))
  first = "('transformer/embedder', 'input_embedding')"
  sweep.values(index, keep=lambda keys: len(keys) == 1 or (keys[1] == first and "value_metadata" not in keys))
  assert sweep.counts["loaded"] > 20 and sweep.counts["refused"] > 50, sweep.counts


def test_gguf_files(tmp_path):
  pytest.importorskip("gguf")
  tokenizer, path = gemma_like.write(tmp_path / "tokenizer.model", 3), tmp_path / "model" / "x.gguf"
  config = dataclasses.replace(CONFIG, vocab_size=tokenizer.vocab_size, embed_dim=32, ffw_dim=64)
  path.parent.mkdir()
  change = functools.partial(gguf_files.add_tokenizer, file_bytes=tokenizer.file_bytes)
  gguf_files.write(path, config, types=["Q8_0", "F16", "BF16"], change=change)

  def load(folder):
    reader = pretrained.open_checkpoint(folder / path.name)
    reader.tokenizer()  # a flipped letter makes another piece, which nothing can tell
    return {tensor.name: reader.read(tensor.name) for tensor in reader.tensors}

  sweep, index = Sweep(path.parent, load), gguf_file.read_index(path)
  sweep.files(path.name)
  end = min(entry.begin for entry in index.tensors.values())
  first = path.read_bytes().index(b"tokenizer.ggml.tokens")
  last = path.read_bytes().index(b"tokenizer.ggml.bos_token_id")
  sweep.bits(path.name, [*range(0, first, 2), *range(first, last, 199), *range(last, end, 7)])
  assert sweep.counts["loaded"] > 50 and sweep.counts["refused"] > 400, sweep.counts


def test_checkpoints_of_a_run(tmp_path, capfd):
  run = saved_runs.run_of(tmp_path, "gsm8k", verifiers__genrm__init_from="", verifiers__genrm__lora__rank=2)
  step = pathlib.Path(saved_runs.save(run, "genrm")) / "4"
  manifest, tokenizer = "manifest/metadata", "files/tokenizer.model"

  def load(folder):
    to = tmp_path / "exported"
    try:
      params, _ = genrm_jax.load_params(folder)
    except UserError:
      refused((".", export, folder, to))
      assert not to.exists()
      raise
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}

  sweep = Sweep(step, load)
  for name in (manifest, tokenizer, "state/_METADATA"):
    sweep.files(name)
  for path in sorted(p.relative_to(step) for p in step.rglob("*") if p.is_file()):
    sweep.try_(str(path), lambda path: path.unlink())
    sweep.try_(str(path), lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]))
    size = (step / path).stat().st_size
    sweep.bits(str(path), [size // 3, 2 * size // 3] if size else [])

  def encode(text):
    if DEEP in text:
      return text.encode()
    content = json.loads(text)
    return json.dumps({**content, "digest": saved.manifest_digest(content)}).encode()

  arrays = json.loads((step / manifest).read_text())["arrays"]
  first = [next(name for name in arrays if name.startswith(part)) for part in ("params/lora", "frozen", "opt_state")]

  def keep(keys):
    return keys[1:2] in [(), *zip(first, strict=True)] if keys[0] == "arrays" else len(keys) < 3

  sweep.values(manifest, encode=encode, keep=keep, every=5)
  assert sweep.counts["loaded"] > 80 and sweep.counts["refused"] > 250, sweep.counts
  assert "Traceback" not in capfd.readouterr().err
