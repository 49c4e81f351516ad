"""Reads and writes Gemma checkpoints in Hugging Face's format: config.json and *.safetensors.

Projections are stored as [outputs, inputs] with flattened heads. Norms are stored as our scales: RMSNorm multiplies by
1 + scale there too.
"""

import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from genrm_jax.checkpoints import hugging_face_config, safetensors, tensor_map
from genrm_jax.checkpoints.tensor_map import CheckpointReader, Tensor
from genrm_jax.model import gemma
from genrm_jax.model.config import ModelConfig
from genrm_jax.runtime.errors import UserError

_CONFIG = "config.json"
_INDEX = "model.safetensors.index.json"
_TABLE = "embed_tokens.weight"

# Names of a layer's parameters: ours, and in the files.
_PROJECTIONS = {
  "q": "self_attn.q_proj",
  "k": "self_attn.k_proj",
  "v": "self_attn.v_proj",
  "attn_out": "self_attn.o_proj",
  "gate": "mlp.gate_proj",
  "up": "mlp.up_proj",
  "down": "mlp.down_proj",
}
# post_attention_layernorm normalises the output of attention, except in Gemma 1, where it is the norm before the MLP.
_NORMS_GEMMA1 = {"pre_attention_norm": "input_layernorm", "pre_ffw_norm": "post_attention_layernorm"}
_NORMS = {
  "pre_attention_norm": "input_layernorm",
  "post_attention_norm": "post_attention_layernorm",
  "pre_ffw_norm": "pre_feedforward_layernorm",
  "post_ffw_norm": "post_feedforward_layernorm",
  "q_norm": "self_attn.q_norm",
  "k_norm": "self_attn.k_norm",
}
# Text models, Gemma 3 with images as released, and the latter as in newer exports.
_PREFIXES = ("model.", "language_model.model.", "model.language_model.")
_BUFFER = "rotary_emb.inv_freq"  # in some exports; it follows from the configuration
_HEAD = "lm_head"


class _Location(NamedTuple):
  path: epath.Path
  entry: safetensors.Entry


def is_folder(folder: epath.Path) -> bool:
  """Whether it has at least some files of a Hugging Face model."""
  return (folder / _CONFIG).exists() or any(folder.glob("*.safetensors"))


def open_folder(folder: epath.Path) -> CheckpointReader:
  """Reads and validates config.json and the headers of the safetensors files.

  Raises:
    UserError: a file or a shard is missing, truncated, malformed or outside of the folder; the architecture or the size
      is unknown; a tensor is missing, quantised or of another shape; the output layer is not the embedding.
  """
  where = str(folder)
  if not (folder / _CONFIG).exists():
    raise UserError(f"{where}: *.safetensors, but no {_CONFIG}; copy it from the source of the model")
  fields = read_json(folder / _CONFIG)
  config = hugging_face_config.from_json(str(folder / _CONFIG), fields, folder.name or where)
  config = tensor_map.check_size(where, config)
  locations: dict[str, _Location] = {}
  for shard in _shards(folder):
    for name, entry in safetensors.read_index(shard).items():
      if name in locations:
        raise UserError(
          f"{where}: tensor {name} is in {locations[name].path.name} and in {shard.name}; the files are of different "
          "models: copy all from one place"
        )
      locations[name] = _Location(shard, entry)
  prefixes = [p for p in _PREFIXES if p + _TABLE in locations] or [_PREFIXES[0]]
  if len(prefixes) > 1:
    raise UserError(
      f"{where}: two text models, {prefixes[0]}{_TABLE} and {prefixes[1]}{_TABLE}; give a folder that holds one"
    )
  named = tensors(config, prefixes[0])
  _check_tensors(where, config, prefixes[0], named, locations)
  _check_head(where, hugging_face_config.is_tied(fields), prefixes[0] + _TABLE, locations)
  tokenizer = tensor_map.tokenizer_in(folder)
  return CheckpointReader(where, config, named, lambda name: safetensors.read_tensor(*locations[name]), tokenizer)


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
  """Writes a folder that transformers and vLLM load, in the dtype of the parameters. The caller adds tokenizer files.

  At most one tensor is on the host at a time. The files get their final names after all of them are written.

  Args:
    params: on the host or on devices, without adapters.
    config: their model.
    folder: local or gs://; created if needed.
    bos_id: of the tokenizer; the defaults are those of the released Gemma tokenizers.
    eos_id: one or several ids that end a generation.
    pad_id: of the tokenizer.
    max_shard_bytes: size limit of a file.

  Raises:
    UserError: the folder already holds a model, the format cannot express the model, or the files cannot be written.
  """
  path = epath.Path(folder)
  if path.exists() and is_folder(path):
    raise UserError(f"{path}: already holds a model; give another folder, or delete its files")
  dtype = np.dtype(params["embedder"]["input_embedding"].dtype)
  fields = hugging_face_config.to_json(config, dtype=dtype.name, bos_id=bos_id, eos_id=eos_id, pad_id=pad_id)
  named = tensors(config, _PREFIXES[0])
  with safetensors.new_files(path) as create:
    shapes = [(tensor.name, dtype, tensor.shape) for tensor in named]
    safetensors.write(create, tensor_map.unstack(params, named), shapes, max_shard_bytes)
    with create(_CONFIG) as f:
      f.write((json.dumps(fields, indent=2) + "\n").encode())


def tensors(config: ModelConfig, prefix: str) -> list[Tensor]:
  """The tensors of a text model in the order of its layers, with the prefix before each name."""
  specs = gemma.param_specs(config)
  norms = _NORMS if config.post_norms else _NORMS_GEMMA1
  found = [
    _unchanged(f"{prefix}{_TABLE}", "embedder/input_embedding", None, specs["embedder"]["input_embedding"].shape)
  ]
  for layer in range(config.num_layers):
    for param, spec in specs["layers"].items():
      shape, path = spec.shape[1:], f"layers/{param}"
      if param in _PROJECTIONS:
        # The heads are outputs of q, k and v, and inputs of attn_out.
        num_inputs = 2 if param == "attn_out" else 1
        name = f"{prefix}layers.{layer}.{_PROJECTIONS[param]}.weight"
        found.append(_projection(name, path, layer, shape, num_inputs))
      else:
        found.append(_unchanged(f"{prefix}layers.{layer}.{norms[param]}.weight", path, layer, shape))
  return [*found, _unchanged(f"{prefix}norm.weight", "final_norm", None, specs["final_norm"].shape)]


def read_json(path: epath.Path | pathlib.Path) -> dict[str, Any]:
  """The object in a JSON file. Raises UserError if there is none."""
  try:
    fields = json.loads(path.read_bytes())
  except OSError as e:
    raise UserError(f"{path}: could not be read: {e.strerror or e}; copy it again") from e
  except (ValueError, RecursionError) as e:
    raise UserError(f"{path}: not JSON ({e}); copy it again") from e
  if not isinstance(fields, dict):
    raise UserError(f"{path}: not a JSON object; copy it again")
  return fields


def _shards(folder: epath.Path) -> list[epath.Path]:
  """The safetensors files; UserError if some are missing."""
  found = sorted(folder.glob("*.safetensors"))
  if (folder / _INDEX).exists():
    names = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
      raise UserError(f"{folder / _INDEX}: has no weight_map from tensors to files; copy it again")
    outside = sorted({name for name in names.values() if pathlib.PurePath(name).name != name or name == ".."})
    if outside:
      raise UserError(
        f"{folder / _INDEX}: {outside[0]!r} is no file of this folder; name the files without a path, beside the index"
      )
    shards = [folder / name for name in sorted(set(names.values()))]
    missing = [shard.name for shard in shards if not shard.exists()]
    if missing:
      raise UserError(
        f"{folder}: {len(missing)} of {len(shards)} shards are missing ({', '.join(missing)}); copy them too"
      )
    return shards
  if not found:
    other = sorted(path.name for pattern in ("*.bin", "*.gguf", "*.pth") for path in folder.glob(pattern))
    unread = f" ({', '.join(other)} cannot be read)" if other else ""
    raise UserError(f"{folder}: {_CONFIG}, but no *.safetensors{unread}; give a folder with the weights as safetensors")
  if len(found) > 1:
    raise UserError(f"{folder}: {len(found)} *.safetensors, but no {_INDEX}, their index; copy it too")
  return found


def _check_tensors(
  where: str, config: ModelConfig, prefix: str, named: Sequence[Tensor], locations: Mapping[str, _Location]
) -> None:
  """Raises UserError unless the files hold all tensors of the model, and no others with its prefix."""
  for tensor in named:
    dtype = locations[tensor.name].entry.dtype if tensor.name in locations else None
    if dtype is not None and dtype not in safetensors.DTYPES:
      raise UserError(
        f"{where}: tensor {tensor.name} has dtype {dtype}; known: {', '.join(safetensors.DTYPES)}; give a checkpoint "
        "that is not quantised"
      )
  tensor_map.check_shapes(where, {name: place.entry.shape for name, place in locations.items()}, named, config)
  below = {name for name in locations if name.startswith(prefix) and not (name.endswith(_BUFFER) or _is_head(name))}
  unknown = sorted(below - {tensor.name for tensor in named})
  if unknown:
    raise UserError(
      f"{where}: {len(unknown)} tensors do not belong to the {config.name} of {_CONFIG}, the first is {unknown[0]}; "
      "the files are of different models: copy all from one place"
    )


def _is_head(name: str) -> bool:
  return _HEAD in name.split(".")


def _check_head(where: str, is_tied: bool, table: str, locations: Mapping[str, _Location]) -> None:
  """Raises UserError unless the output layer, whatever the configuration says, is the embedding."""
  heads = [name for name in locations if _is_head(name)]
  for name in heads:
    if not name.endswith(f"{_HEAD}.weight") or not safetensors.same_values(*locations[name], *locations[table]):
      raise UserError(
        f"{where}: {name} is not the embedding ({table}); this library supports only models that share one table for "
        "input and output, as all released Gemmas do. Train the model with tied embeddings, or, if its output layer "
        f"was never trained, delete {name}"
      )
  if not heads and not is_tied:
    raise UserError(
      f"{where}: tie_word_embeddings is false, but there is no {_HEAD}.weight; copy all files of the model, or set "
      "tie_word_embeddings to true if it shares the embedding"
    )


def _unchanged(name: str, path: str, layer: int | None, shape: tuple[int, ...]) -> Tensor:
  return Tensor(name, shape, ((path, layer),), lambda stored: [stored], lambda params: params[0])


def _projection(name: str, path: str, layer: int, shape: tuple[int, ...], num_inputs: int) -> Tensor:
  """Our parameter is [inputs..., outputs...]; the file has the transposed matrix."""
  inputs, outputs = math.prod(shape[:num_inputs]), math.prod(shape[num_inputs:])

  def to_params(stored: np.ndarray) -> list[np.ndarray]:
    return [stored.T.reshape(shape)]

  def from_params(params: Sequence[np.ndarray]) -> np.ndarray:
    return params[0].reshape(inputs, outputs).T

  return Tensor(name, (outputs, inputs), ((path, layer),), to_params, from_params)
