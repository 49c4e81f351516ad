"""Loads Gemma checkpoints of other projects, in any supported format.

    params, config, tokenizer = genrm_jax.pretrained("gemma3_270m")
    params, config = pretrained.load("gemma-2-9b-it", mesh, param_dtype="bfloat16")

To write them, see `hugging_face.save` and `released.save`.
"""

import os
from collections.abc import Mapping
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from genrm_jax.checkpoints import gguf, hugging_face, names, released
from genrm_jax.checkpoints.tensor_map import CheckpointReader, place
from genrm_jax.model import gemma
from genrm_jax.model.config import ModelConfig
from genrm_jax.runtime import sharding as shardings
from genrm_jax.runtime.errors import UserError
from genrm_jax.runtime.sharding import MeshAxes
from genrm_jax.text.tokenizer import SentencePieceTokenizer, check_vocab


class Pretrained(NamedTuple):
  """A model of another project.

  Attributes:
    params: on the devices of a mesh.
    config: their model, whose forward pass is `model.gemma.forward`.
    tokenizer: from inside or beside the files; None if there is none.
  """

  params: gemma.Params
  config: ModelConfig
  tokenizer: SentencePieceTokenizer | None


def pretrained(
  name: str | os.PathLike[str], *, mesh: Mesh | None = None, dtype: str = "float32", param_dtype: str = "float32"
) -> Pretrained:
  """Loads a Gemma by name or path.

  Args:
    name: "gemma3_270m", from the extra of that name; "ORG/NAME" on the Hugging Face hub, such as "google/gemma-2-2b"; a
      .gguf file; or a folder, as for `open_checkpoint`.
    mesh: the devices; if None, the first one.
    dtype: of activations.
    param_dtype: of parameters.

  Returns:
    Parameters, config and tokenizer.

  Raises:
    UserError: as for `names.resolve`, `open_checkpoint` and `load`, or the tokenizer does not fit the embedding.
  """
  reader = open_checkpoint(name)
  tokenizer = reader.tokenizer() if reader.tokenizer else None
  if tokenizer:
    check_vocab(tokenizer, reader.config.vocab_size)
  mesh = shardings.make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
  model = ModelConfig.from_dict(reader.config.to_dict() | {"dtype": dtype, "param_dtype": param_dtype})
  return Pretrained(place(reader, mesh, model), model, tokenizer)


def is_checkpoint(name: str | os.PathLike[str]) -> bool:
  """Whether a name, file or folder looks like a Gemma checkpoint of a supported format, complete or not."""
  path = names.resolve(name)
  return path.is_file() or hugging_face.is_folder(path) or released.is_folder(path)


def open_checkpoint(name: str | os.PathLike[str], config: ModelConfig | None = None) -> CheckpointReader:
  """Reads a checkpoint's index and validates it against the table of sizes, without reading a tensor.

  Args:
    name: as for `names.resolve`. A path is local or gs://: a folder of Hugging Face (config.json and *.safetensors), an
      Orbax folder as released for Flax, or a .gguf file.
    config: the model, needed for an Orbax checkpoint of a size outside the table, whose files do not say all of it.

  Raises:
    UserError: no such file or folder, no checkpoint in it, an unknown architecture or size, or a tensor that is missing
      or of another shape.
  """
  path = names.resolve(name)
  if path.is_file():
    return gguf.open_file(path)
  if not path.is_dir():
    remote = " and your access to the bucket" if "://" in str(path) else ""
    raise UserError(
      f"{path}: no such folder or file; check the path{remote}. It must be a folder or .gguf file of a Gemma, or a "
      f"name: {names.GEMMA3_270M}, or ORG/NAME on the Hugging Face hub"
    )
  if hugging_face.is_folder(path):
    return hugging_face.open_folder(path)
  if released.is_folder(path):
    return released.open_folder(path, config)
  inside = sorted(file.name for file in path.glob("*.gguf"))
  raise UserError(
    f"{path}: no Gemma checkpoint: neither config.json with *.safetensors (Hugging Face) nor an Orbax checkpoint "
    f"(_METADATA); give {f'the path of {inside[0]} in it' if inside else 'the folder that holds these files'}"
  )


def load(
  path: str | os.PathLike[str],
  mesh: Mesh,
  *,
  dtype: str = "float32",
  param_dtype: str = "float32",
  config: ModelConfig | None = None,
  sharding: Mapping[str, MeshAxes] | None = None,
) -> tuple[gemma.Params, ModelConfig]:
  """Loads parameters onto the mesh in `param_dtype`, with their model, which computes in `dtype`.

  Args:
    path: a name or path, as for `open_checkpoint`.
    mesh: the devices.
    dtype: of activations.
    param_dtype: of parameters.
    config: as for `open_checkpoint`.
    sharding: rules that replace the default ones; None means those of `config`.

  Raises:
    UserError: as for `open_checkpoint`; or too little memory, or a truncated file.
  """
  reader = open_checkpoint(path, config)
  rules = dict(sharding or ()) if sharding is not None or config is None else dict(config.sharding)
  fields = {"dtype": dtype, "param_dtype": param_dtype, "sharding": rules}
  model = ModelConfig.from_dict(reader.config.to_dict() | fields)
  return place(reader, mesh, model), model
