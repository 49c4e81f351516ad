"""Gemma checkpoints as Hugging Face keeps them, in and out: config.json and *.safetensors.

A projection lies there as [outputs, inputs], with heads flattened; norms are the same numbers as ours (RMSNorm
multiplies by 1 + scale on both sides).
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from genrm_jax.checkpoints import hugging_face_config, safetensors, tensor_map
from genrm_jax.checkpoints.tensor_map import Opened, Tensor
from genrm_jax.model import gemma
from genrm_jax.model.config import ModelConfig
from genrm_jax.runtime.errors import UserError

_CONFIG = "config.json"
_INDEX = "model.safetensors.index.json"
_TABLE = "embed_tokens.weight"

# Our parameter of a layer, and its name there.
_PROJECTIONS = {
  "q": "self_attn.q_proj",
  "k": "self_attn.k_proj",
  "v": "self_attn.v_proj",
  "attn_out": "self_attn.o_proj",
  "gate": "mlp.gate_proj",
  "up": "mlp.up_proj",
  "down": "mlp.down_proj",
}
# post_attention_layernorm is the norm after attention's output, but in Gemma 1, which has none, the one before the MLP.
_NORMS_GEMMA1 = {"pre_attention_norm": "input_layernorm", "pre_ffw_norm": "post_attention_layernorm"}
_NORMS = {
  "pre_attention_norm": "input_layernorm",
  "post_attention_norm": "post_attention_layernorm",
  "pre_ffw_norm": "pre_feedforward_layernorm",
  "post_ffw_norm": "post_feedforward_layernorm",
  "q_norm": "self_attn.q_norm",
  "k_norm": "self_attn.k_norm",
}
# Text models; Gemma 3 with images as released, and as newer exports have it.
_PREFIXES = ("model.", "language_model.model.", "model.language_model.")
_BUFFER = "rotary_emb.inv_freq"  # Some exports hold it; it follows from the configuration.
_HEADS = ("lm_head.weight", "language_model.lm_head.weight")


class _Place(NamedTuple):
  """Where a tensor is."""

  path: epath.Path
  entry: safetensors.Entry


def is_folder(folder: epath.Path) -> bool:
  """Whether it has the files of a Hugging Face model, or some of them."""
  return (folder / _CONFIG).exists() or any(folder.glob("*.safetensors"))


def open_folder(folder: epath.Path) -> Opened:
  """Reads config.json and the headers of the safetensors files, and checks them.

  Raises:
    UserError: a file or a shard is missing, cut short or malformed; the architecture or the size is unknown; a tensor
      is missing, of another shape, or quantised; the output layer is not the embedding.
  """
  where = str(folder)
  if not (folder / _CONFIG).exists():
    raise UserError(f"{where}: *.safetensors, but no {_CONFIG}; copy it from where the model came from")
  fields = _read_json(folder / _CONFIG)
  config = hugging_face_config.from_json(str(folder / _CONFIG), fields, folder.name or where)
  config = tensor_map.check_size(where, config)
  places: dict[str, _Place] = {}
  for shard in _shards(folder):
    places |= {name: _Place(shard, entry) for name, entry in safetensors.read_index(shard).items()}
  prefix = next((p for p in _PREFIXES if p + _TABLE in places), _PREFIXES[0])
  named = tensors(config, prefix)
  _check_tensors(where, config, prefix, named, places)
  if not hugging_face_config.is_tied(fields):
    head = next((places[name] for name in _HEADS if name in places), None)
    if head is None or not safetensors.same_bytes(*head, *places[prefix + _TABLE]):
      raise UserError(
        f"{where}: tie_word_embeddings is false and lm_head.weight is not the embedding; a Gemma of this library has "
        "one table for both, as the released ones do"
      )
  return Opened(where, config, named, lambda name: safetensors.read_tensor(*places[name]))


def save(
  params: gemma.Params,
  config: ModelConfig,
  folder: str | os.PathLike[str],
  *,
  bos_id: int = 2,
  eos_id: int | Sequence[int] = 1,
  pad_id: int = 0,
  max_shard_bytes: int = 5_000_000_000,
) -> None:
  """Writes a folder that transformers and vLLM load, in the dtype of the parameters. Tokenizer files are the caller's.

  One tensor is on the host at a time. The files get their names when all are written.

  Args:
    params: on the host or on devices.
    config: their model.
    folder: local or gs://; made if it is not there.
    bos_id: of the tokenizer; the defaults are those of the released Gemma tokenizers.
    eos_id: one, or several that end a generation.
    pad_id: of the tokenizer.
    max_shard_bytes: of one file.

  Raises:
    UserError: the folder holds a model, the model cannot be said in that format, or the files cannot be written.
  """
  path = epath.Path(folder)
  if path.exists() and is_folder(path):
    raise UserError(f"{path}: holds a model already; give another folder, or delete its files")
  dtype = np.dtype(params["embedder"]["input_embedding"].dtype)
  fields = hugging_face_config.to_json(config, dtype=dtype.name, bos_id=bos_id, eos_id=eos_id, pad_id=pad_id)
  named = tensors(config, _PREFIXES[0])
  with safetensors.new_files(path) as create:
    shapes = [(tensor.name, dtype, tensor.shape) for tensor in named]
    safetensors.write(create, tensor_map.take(params, named), shapes, max_shard_bytes)
    with create(_CONFIG) as f:
      f.write((json.dumps(fields, indent=2) + "\n").encode())


def tensors(config: ModelConfig, prefix: str) -> list[Tensor]:
  """The layout: every tensor of a text model, in the order of the layers, with the prefix before each name."""
  specs = gemma.param_specs(config)
  norms = _NORMS if config.post_norms else _NORMS_GEMMA1
  found = [_same(f"{prefix}{_TABLE}", "embedder/input_embedding", None, specs["embedder"]["input_embedding"].shape)]
  for layer in range(config.num_layers):
    for ours, spec in specs["layers"].items():
      shape, path = spec.shape[1:], f"layers/{ours}"
      if ours in _PROJECTIONS:
        # The heads are outputs of q, k and v, and inputs of attn_out.
        num_inputs = 2 if ours == "attn_out" else 1
        name = f"{prefix}layers.{layer}.{_PROJECTIONS[ours]}.weight"
        found.append(_projection(name, path, layer, shape, num_inputs))
      else:
        found.append(_same(f"{prefix}layers.{layer}.{norms[ours]}.weight", path, layer, shape))
  return [*found, _same(f"{prefix}norm.weight", "final_norm", None, specs["final_norm"].shape)]


def _read_json(path: epath.Path) -> dict[str, Any]:
  try:
    fields = json.loads(path.read_bytes())
  except ValueError as e:
    raise UserError(f"{path}: not JSON ({e}); copy it again") from e
  if not isinstance(fields, dict):
    raise UserError(f"{path}: not a JSON object; copy it again")
  return fields


def _shards(folder: epath.Path) -> list[epath.Path]:
  """The safetensors files, all of them there."""
  there = sorted(folder.glob("*.safetensors"))
  if (folder / _INDEX).exists():
    names = _read_json(folder / _INDEX).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
      raise UserError(f"{folder / _INDEX}: no weight_map from tensors to files in it; copy it again")
    shards = [folder / name for name in sorted(set(names.values()))]
    missing = [shard.name for shard in shards if not shard.exists()]
    if missing:
      raise UserError(
        f"{folder}: {len(shards) - len(missing)} of {len(shards)} shards are there, {', '.join(missing)} missing; copy "
        "the rest"
      )
    return shards
  if not there:
    other = sorted(path.name for pattern in ("*.bin", "*.gguf", "*.pth") for path in folder.glob(pattern))
    found = f"; {', '.join(other)} cannot be read" if other else ""
    raise UserError(f"{folder}: {_CONFIG}, but no *.safetensors{found}; give a folder with the weights as safetensors")
  if len(there) > 1:
    raise UserError(f"{folder}: {len(there)} *.safetensors, but no {_INDEX}, which says what is where; copy it too")
  return there


def _check_tensors(
  where: str, config: ModelConfig, prefix: str, named: Sequence[Tensor], places: Mapping[str, _Place]
) -> None:
  """The files hold the tensors of the model, and no others below the prefix."""
  for tensor in named:
    dtype = places[tensor.name].entry.dtype if tensor.name in places else None
    if dtype is not None and dtype not in safetensors.DTYPES:
      raise UserError(
        f"{where}: tensor {tensor.name} is of dtype {dtype}; known: {', '.join(safetensors.DTYPES)}; give a checkpoint "
        "that is not quantised"
      )
  tensor_map.check_shapes(where, {name: place.entry.shape for name, place in places.items()}, named, config)
  below = {name for name in places if name.startswith(prefix) and not name.endswith(_BUFFER)}
  foreign = sorted(below - {tensor.name for tensor in named})
  if foreign:
    raise UserError(
      f"{where}: {len(foreign)} tensors are of no {config.name} as {_CONFIG} has it, the first is {foreign[0]}; the "
      "files are of another model than they say"
    )


def _same(name: str, path: str, layer: int | None, shape: tuple[int, ...]) -> Tensor:
  return Tensor(name, shape, ((path, layer),), lambda theirs: [theirs], lambda ours: ours[0])


def _projection(name: str, path: str, layer: int, shape: tuple[int, ...], num_inputs: int) -> Tensor:
  """Ours is [inputs..., outputs...], theirs the transposed matrix."""
  inputs, outputs = math.prod(shape[:num_inputs]), math.prod(shape[num_inputs:])

  def to_ours(theirs: np.ndarray) -> list[np.ndarray]:
    return [theirs.T.reshape(shape)]

  def to_theirs(ours: Sequence[np.ndarray]) -> np.ndarray:
    return ours[0].reshape(inputs, outputs).T

  return Tensor(name, (outputs, inputs), ((path, layer),), to_ours, to_theirs)
