"""GGUF files of Gemma 1, 2 and 3, written by the `gguf` package, and the tokenizer inside them."""

import dataclasses

import gemma_like
import gguf_files
import jax
import numpy as np
import pytest
import real_gemma
from refusals import refused
from sentencepiece import sentencepiece_model_pb2

from genrm_jax.checkpoints import gguf, gguf_file, pretrained, tensor_map
from genrm_jax.checkpoints.hf_tokenizer import export_tokenizer
from genrm_jax.model.config import PUBLISHED_COUNTS, get_config
from genrm_jax.runtime import sharding
from genrm_jax.text.tokenizer import SentencePieceTokenizer

package = pytest.importorskip("gguf")

# Rows of 256 values, the block of most types.
WIDE = dict(num_layers=2, embed_dim=256, ffw_dim=256, num_heads=2, head_dim=128, vocab_size=32)
SMALL = get_config("tiny_gemma3", num_layers=2, embed_dim=32, ffw_dim=64, num_heads=2, num_kv_heads=1, head_dim=16)


def _load(path, config=None, **options):
  return pretrained.load(path, sharding.make_mesh(data=2, fsdp=2, tensor=2), config=config, **options)


def _assert_same(a, b):
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y), strict=True), a, b)


def test_every_type_and_family_is_read_as_the_folder_of_its_weights(tmp_path):
  types, used = [*gguf_files.FLOATS, *gguf_files.quantised_types()], set()
  for i, name in enumerate(("tiny_gemma1", "tiny_gemma2", "tiny_gemma3")):
    path, folder = tmp_path / f"{name}.gguf", tmp_path / name
    config = get_config(name, num_kv_heads=max(1, i), query_scale=WIDE["head_dim"] ** -0.5, **WIDE)
    gguf_files.write(path, config, folder, types[9 * i :] + types[: 9 * i])  # 15 matrices each
    (got, found), (want, config) = _load(path), _load(folder)
    assert dataclasses.replace(found, name=config.name) == config
    _assert_same(got, want)
    _assert_same(_load(path, param_dtype="bfloat16")[0], _load(folder, param_dtype="bfloat16")[0])
    used |= {entry.type for entry in gguf_file.read_index(path).tensors.values()}
  assert used == {package.GGMLQuantizationType[t] for t in types}


@pytest.mark.parametrize("name", PUBLISHED_COUNTS)
def test_what_the_metadata_of_released_sizes_do_not_say(name):
  want = get_config(name, vocab_size=PUBLISHED_COUNTS[name].hub_vocab)
  variants = [{}]
  if want.qk_norm:  # newer converters say more
    kinds = [kind == "local" for kind in want.layer_kinds]
    variants += [{"rope_freq_base_swa": 1e4, "sliding_window_pattern": 6}, {"sliding_window_pattern": kinds}]
  for changes in variants:
    writer = gguf_files.writer_of("none.gguf", want, **changes)
    entries = {key: np.array(v.value) if isinstance(v.value, list) else v.value for key, v in writer.kv_data[0].items()}
    assert tensor_map.check_size("path", gguf.config_of("path", entries, want.vocab_size, "x")) == want, changes


def _file(path, change=lambda writer: None, **changes):
  gguf_files.write(path, SMALL, None, change=change, **changes)
  return path


def _raw(**entries):
  """A change of metadata by key, with __ for the dot."""

  def change(writer):
    for key, value in entries.items():
      add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
      writer.kv_data[0].pop(key := key.replace("__", "."), None)
      add[type(value)](key, value)

  return change


def _tensor(name, shape):
  return lambda writer: writer.add_tensor(name, np.zeros(shape, np.float32))


def test_bad_files_are_refused_before_a_tensor_is_read(tmp_path, monkeypatch):
  changes = {
    r"architecture 'llama' is not supported; .* gemma, gemma2, gemma3": _raw(general__architecture="llama"),
    r"mmproj.*give the file of the language model": _raw(general__architecture="clip"),
    r"general.type is 'adapter'": _raw(general__type="adapter"),
    r"one of 3 parts .*--merge": _raw(split__count=3),
    r"block_count is '2.0', but it must be a whole number": _raw(gemma3__block_count=2.0),
    r"block_count is missing|num_layers": _raw(gemma3__block_count=0),
    r"layer_norm_rms_epsilon is 1e-05.*supports 1e-06": lambda w: w.add_layer_norm_rms_eps(1e-5),
    r"value_length is 8; .* supports 16": lambda w: w.add_value_length(8),
    r"RoPE scaling of type 'yarn'": _raw(gemma3__rope__scaling__type="yarn"),
    r"head_dim = 6.*|shape": _raw(gemma3__attention__key_length=6, gemma3__attention__value_length=6),
    r"tensor blk.0.ffn_gate.weight has shape \(64, 32\), but \(65, 32\)": _raw(gemma3__feed_forward_length=65),
    r"tensors of x are missing, the first is blk.2.": _raw(gemma3__block_count=3),
    r"1 tensors do not belong to x, the first is rope_freqs.weight": _tensor("rope_freqs.weight", 8),
    r"output.weight is not the embedding": _tensor("output.weight", (SMALL.vocab_size, SMALL.embed_dim)),
    r"cannot dequantise tensors of type 9": lambda w: w.add_tensor(
      "output.weight", np.zeros((1, 40), np.uint8), raw_dtype=package.GGMLQuantizationType.Q8_1
    ),
  }
  read = []
  monkeypatch.setattr(gguf_file, "read_tensor", lambda path, entry: read.append(entry) or np.zeros(len(read)))
  for i, (pattern, change) in enumerate(changes.items()):
    (tmp_path / str(i)).mkdir()
    refused((f"x.gguf: .*{pattern}", pretrained.open_checkpoint, _file(tmp_path / str(i) / "x.gguf", change)))
  assert len(read) == 2, "only an output layer is compared with the embedding"
  good = _file(tmp_path / "good.gguf", types=["Q8_0"]).read_bytes()
  contents = {
    r"starts with b'vers'": b"version https://git-lfs.github.com/spec/v1\n",
    r"GGUF version 1; .* versions 2 and 3": good[:4] + b"\1" + good[5:],
    r"GGUF version 9; .* current llama.cpp": good[:4] + b"\t" + good[5:],
    r"big-endian": good[:4] + good[7:3:-1] + good[8:],
    r"cut off or damaged": good[: len(good) // 2],
    r"cut off or damaged.*its 30 bytes": good[:30],
    r"starts with b''": b"",
  }
  for pattern, content in contents.items():
    (tmp_path / "bad.gguf").write_bytes(content)
    refused((rf"bad.gguf: .*{pattern}", pretrained.open_checkpoint, tmp_path / "bad.gguf"))
  refused(
    (r"the path of bad.gguf in it", pretrained.open_checkpoint, tmp_path),
    (r"none.gguf: no such folder or file", pretrained.open_checkpoint, tmp_path / "none.gguf"),
  )

  def missing():
    raise ImportError

  monkeypatch.setattr(gguf_file, "_package", missing)
  refused((r"quantised .*pip install 'genrm-jax\[gguf\]'", pretrained.open_checkpoint, tmp_path / "good.gguf"))
  assert pretrained.open_checkpoint(_file(tmp_path / "plain.gguf", types=["BF16"])), "needs no package"


@pytest.mark.parametrize("family", [2, 3])
def test_the_tokenizer_is_that_which_was_converted(family, tmp_path):
  original = gemma_like.write(tmp_path / "tokenizer.model", family)
  pieces = sentencepiece_model_pb2.ModelProto.FromString(original.file_bytes).pieces
  config = dataclasses.replace(SMALL, vocab_size=len(pieces) + 18)
  for by_config in (False, True):

    def change(writer, by_config=by_config):
      gguf_files.add_tokenizer(writer, original.file_bytes, 18, by_config)
      if by_config:  # as for a chat model
        _raw(tokenizer__ggml__eos_token_id=[p.piece for p in pieces].index("<end_of_turn>"))(writer)

    gguf_files.write(tmp_path / "x.gguf", config, change=change)
    found = pretrained.open_checkpoint(tmp_path / "x.gguf").tokenizer()
    proto = sentencepiece_model_pb2.ModelProto.FromString(found.file_bytes)
    assert [(p.piece, p.score, p.type) for p in proto.pieces] == [(p.piece, p.score, p.type) for p in pieces]
    assert found.controls == original.controls
    for name in ("pad_id", "bos_id", "eos_id", "cls_id", "vocab_size"):
      assert getattr(found, name) == getattr(original, name)
    for text in real_gemma.corpus():
      assert found.encode(text) == original.encode(text) and found.encode_plain(text) == original.encode_plain(text)
  export_tokenizer(found, tmp_path / "exported", chat=True)
  assert (tmp_path / "exported" / "tokenizer.model").read_bytes() == found.file_bytes
  proto.trainer_spec.ClearField("bos_piece")
  refused((r"no bos piece.*'<s>'; set its bos_piece", SentencePieceTokenizer, "x", proto.SerializeToString()))


def test_bad_tokenizers_are_refused(tmp_path):
  original = gemma_like.write(tmp_path / "tokenizer.model", 3)
  changes = {
    r"tokenizer is 'gpt2', not a SentencePiece model": _raw(tokenizer__ggml__model="gpt2"),
    r"no score and type for each": _raw(tokenizer__ggml__scores=[1.0, 2.0]),
    r"piece 0 of its tokenizer has type 9": _raw(tokenizer__ggml__token_type=[9] * original.vocab_size),
  }
  for i, (pattern, change) in enumerate(changes.items()):

    def add(writer, change=change):
      gguf_files.add_tokenizer(writer, original.file_bytes)
      change(writer)

    (tmp_path / str(i)).mkdir()
    reader = pretrained.open_checkpoint(_file(tmp_path / str(i) / "x.gguf", add))
    refused((pattern, reader.tokenizer))
  refused((r"tokenizer is 'None'", pretrained.open_checkpoint(_file(tmp_path / "x.gguf")).tokenizer))
