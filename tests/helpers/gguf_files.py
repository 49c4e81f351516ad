"""Writes tiny GGUF files with the `gguf` package: its names of tensors and keys, its types, and llama.cpp's changes."""

import json

import numpy as np
from etils import epath
from sentencepiece import sentencepiece_model_pb2

from genrm_jax.checkpoints import hugging_face, hugging_face_config, safetensors

FLOATS = ("F32", "F16", "BF16")


def quantised_types():
  import gguf.quants

  return [t.name for t in sorted(gguf.quants._type_traits) if t.name not in FLOATS]


def metadata(writer, config, **changes):
  """Adds the entries of a converted Gemma."""
  values = {
    "block_count": config.num_layers,
    "embedding_length": config.embed_dim,
    "feed_forward_length": config.ffw_dim,
    "head_count": config.num_heads,
    "head_count_kv": config.num_kv_heads,
    "key_length": config.head_dim,
    "value_length": config.head_dim,
    "layer_norm_rms_eps": 1e-6,
    "attn_logit_softcapping": config.attn_softcap,
    "final_logit_softcapping": config.final_softcap,
    "sliding_window": config.window,
    "rope_freq_base": config.rope_base_global if config.qk_norm else None,
  }
  if config.rope_scale_global != 1:
    import gguf

    values |= {"rope_scaling_type": gguf.RopeScalingType.LINEAR, "rope_scaling_factor": config.rope_scale_global}
  for name, value in (values | changes).items():
    if value is not None:
      getattr(writer, f"add_{name}")(value)


def add_tokenizer(writer, file_bytes, spare_rows=0, by_config=True):
  """A SentencePiece file as llama.cpp converts it: with the tokenizer_config.json beside it, or without."""
  proto = sentencepiece_model_pb2.ModelProto.FromString(file_bytes)
  kinds, rows = proto.SentencePiece, []
  for piece in proto.pieces:
    name, score, kind = piece.piece, piece.score, piece.type
    if by_config and kind in (kinds.CONTROL, kinds.UNKNOWN, kinds.USER_DEFINED):
      is_special = kind != kinds.USER_DEFINED or name.startswith(("<unused", "<start", "<end", "<mask"))
      name, score, kind = name.replace("▁", " "), -1000.0, kinds.CONTROL if is_special else kind
    elif kind == kinds.USER_DEFINED:
      kind = kinds.NORMAL
    rows.append((name, score, kind))
  rows += [(f"[PAD{len(rows) + i}]", -10000.0, kinds.UNUSED) for i in range(spare_rows)]
  names, scores, types = zip(*rows, strict=True)
  writer.add_tokenizer_model("llama")
  writer.add_token_list(list(names))
  writer.add_token_scores(list(scores))
  writer.add_token_types(list(types))
  for special, i in (("bos", 2), ("eos", 1), ("unk", 3), ("pad", 0)):
    getattr(writer, f"add_{special}_token_id")(i)


def writer_of(path, config, **changes):
  """A writer with the metadata of a model; `changes` by their names as methods of the writer, None for none."""
  import gguf

  family = "gemma3" if config.qk_norm else "gemma2" if config.post_norms else "gemma"
  writer = gguf.GGUFWriter(path, family)
  metadata(writer, config, **changes)
  return writer


def write(path, config, folder=None, types=FLOATS[:1], change=lambda writer: None, seed=0, **changes):
  """A file of random weights, matrix after matrix in one of `types`, and a Hugging Face folder of the same weights.

  Args:
    path: of the file.
    config: the model.
    folder: of Hugging Face, with the weights of the file in float32; None for none.
    types: names of gguf's types, taken in turn.
    change: called with the writer before it writes.
    seed: of the weights.
    changes: as for `writer_of`.
  """
  import gguf
  import gguf.quants

  writer, rng = writer_of(path, config, **changes), np.random.default_rng(seed)
  arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == writer.arch)
  names = gguf.get_tensor_name_map(arch, config.num_layers)
  stored, num_matrices = {}, 0
  for tensor in hugging_face.tensors(config, "model."):
    name = names.get_name(tensor.name, try_suffixes=(".weight",))
    if len(tensor.shape) == 1:
      scale = rng.normal(scale=0.1, size=tensor.shape).astype(np.float32)
      writer.add_tensor(name, scale + 1)
      stored[tensor.name] = (scale + 1) - 1
      continue
    kind = gguf.GGMLQuantizationType[types[num_matrices % len(types)]]
    num_matrices += 1
    block, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    shape = (*tensor.shape[:-1], tensor.shape[-1] // block * num_bytes)
    if kind.name in FLOATS:
      values = rng.normal(scale=0.1, size=tensor.shape).astype(np.float32)
      data = gguf.quants.quantize(values, kind)
    else:  # with bytes this small, every scale in them is finite
      data = rng.integers(0, 0x40, shape).astype(np.uint8)
    writer.add_tensor(name, data, raw_dtype=kind)
    stored[tensor.name] = gguf.quants.dequantize(data, kind)
  change(writer)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  if folder is not None:
    _write_folder(epath.Path(folder), config, stored)


def _write_folder(folder, config, stored):
  fields = hugging_face_config.to_json(config, dtype="float32", bos_id=2, eos_id=1, pad_id=0)
  with safetensors.new_files(folder) as create:
    shapes = [(name, array.dtype, array.shape) for name, array in stored.items()]
    safetensors.write(create, stored.items(), shapes, 1 << 40)
    with create("config.json") as f:
      f.write(json.dumps(fields).encode())
