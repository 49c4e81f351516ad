"""Damaged checkpoints, by systematic changes: each loads with the same bits or is refused in one message.

Nothing is written on the way, and no other exception is raised.
"""

import collections
import dataclasses
import functools
import json
import pathlib

import gemma_like
import gguf_files
import jax
import numpy as np
import pytest
import saved_runs
from etils import epath
from random_params import random_params

import genrm_jax
from genrm_jax.checkpoints import gguf_file, hugging_face, pretrained, released
from genrm_jax.model.config import get_config
from genrm_jax.runtime.errors import UserError
from genrm_jax.training import saved

CONFIG = get_config("tiny_gemma3", num_layers=2, embed_dim=24, ffw_dim=40, num_heads=2, num_kv_heads=1, head_dim=4)
DEEP = "[" * 100_000 + "]" * 100_000
# JSON texts of every kind, for places that hold another.
VALUES = [
  *("null", "true", '""', '"2"', '"../x"', "-1", "0", "1.5", "NaN", "Infinity", "1e999", str(10**9), "9" * 400),
  *("[]", "[[]]", "[1, 2]", "{}", '{"a": 1}', DEEP),
]


class Sweep:
  """Counts what becomes of changed copies of a folder.

  Args:
    folder: the copy that is changed, and restored after every change.
    load: returns the parameters in it as a dict of arrays.
  """

  def __init__(self, folder, load):
    self.folder, self.load, self.want, self.counts = folder, load, load(folder), collections.Counter()

  def try_(self, what, change):
    """`change(path of the file `what`)`, then a load; then all is as before."""
    path = self.folder / what
    before = path.read_bytes()
    change(path)
    state = _listing(self.folder)
    try:
      got = self.load(self.folder)
    except UserError as e:
      self.counts["refused"] += 1
      assert len(str(e)) < 2000 and ("\n" not in str(e) or "made by something else" in str(e)), str(e)
    else:
      self.counts["loaded"] += 1
      assert got.keys() == self.want.keys()
      for name, array in self.want.items():
        np.testing.assert_array_equal(got[name], array, strict=True)
    finally:
      assert _listing(self.folder) == state, "written"
      if path.is_dir():
        path.rmdir()
      path.write_bytes(before)

  def files(self, what):
    """The file is gone, empty, cut, replaced by a folder, or no text."""
    size = (self.folder / what).stat().st_size
    for change in (
      lambda path: path.unlink(),
      lambda path: (path.unlink(), path.mkdir()),
      *(lambda path, n=n: path.write_bytes(path.read_bytes()[:n]) for n in (0, 1, 7, 8, 9, size // 2, size - 1)),
      *(lambda path, text=text: path.write_text(text) for text in ("[]", "null", '"x"', "3", "{}", DEEP)),
      lambda path: path.write_bytes(b"\xff\xfe\0" * 50),
      lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    ):
      self.try_(what, change)

  def bits(self, what, places):
    """One bit is flipped."""

    def flip(path, place, bit):
      data = bytearray(path.read_bytes())
      data[place] ^= 1 << bit
      path.write_bytes(data)

    for i, place in enumerate(places):
      self.try_(what, lambda path, place=place, bit=i % 8: flip(path, place, bit))

  def values(self, what, decode=json.loads, encode=lambda text: text.encode(), keep=lambda keys: True, every=1):
    """Each value of a JSON file is removed, or replaced by one after another of VALUES."""
    content = decode((self.folder / what).read_bytes())
    for i, keys in enumerate(filter(keep, _places(content))):
      for value in (None, *VALUES)[i % every :: every]:
        text = _replaced(content, keys, value)
        self.try_(what, lambda path, text=text: path.write_bytes(encode(text)))


def _listing(folder):
  return {p: (p.is_dir(), p.stat().st_mtime_ns) for p in folder.rglob("*")}


def _places(content, keys=()):
  """The keys of every value in JSON, but in a list only those of the first two."""
  pairs = content.items() if isinstance(content, dict) else enumerate(content[:2]) if isinstance(content, list) else ()
  for key, value in pairs:
    yield (*keys, key)
    yield from _places(value, (*keys, key))


def _replaced(content, keys, value):
  """JSON in which the value at some keys is another JSON text, or removed if that is None."""
  copy = json.loads(json.dumps(content))
  inner = copy
  for key in keys[:-1]:
    inner = inner[key]
  if value is None:
    del inner[keys[-1]]
    return json.dumps(copy)
  inner[keys[-1]] = "<here>"
  return json.dumps(copy).replace('"<here>"', value)


def _tensors(folder):
  """All tensors of a checkpoint of another project."""
  reader = pretrained.open_checkpoint(folder, None if hugging_face.is_folder(epath.Path(folder)) else CONFIG)
  return {tensor.name: reader.read(tensor.name) for tensor in reader.tensors}


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
    params, _ = genrm_jax.load_params(folder)
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
    """With a digest that fits, where there can be one."""
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
