"""Loads Gemma checkpoints of other projects, in any supported format.

    params, config = pretrained.load("gemma-2-9b-it", mesh, param_dtype="bfloat16")

To write them, see `hugging_face.save` and `released.save`.
"""

import os
from collections.abc import Mapping

from etils import epath
from jax.sharding import Mesh

from genrm_jax.checkpoints import hugging_face, released
from genrm_jax.checkpoints.tensor_map import CheckpointReader, place
from genrm_jax.model import gemma
from genrm_jax.model.config import ModelConfig
from genrm_jax.runtime.errors import UserError
from genrm_jax.runtime.sharding import MeshAxes


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
  """Whether a folder looks like a Gemma checkpoint of a supported format, complete or not."""
  folder = epath.Path(path).expanduser()
  return hugging_face.is_folder(folder) or released.is_folder(folder)


def open_checkpoint(path: str | os.PathLike[str], config: ModelConfig | None = None) -> CheckpointReader:
  """Reads a checkpoint's index and validates it against the table of sizes, without reading a tensor.

  Args:
    path: a local or gs:// folder: Hugging Face (config.json and *.safetensors) or Orbax as released for Flax.
    config: the model, needed for an Orbax checkpoint of a size outside the table, whose files do not say all of it.

  Raises:
    UserError: no such folder, no checkpoint in it, an unknown architecture or size, or a tensor that is missing or of
      another shape.
  """
  folder = epath.Path(path).expanduser()
  if not folder.is_dir():
    remote = " and your access to the bucket" if "://" in str(folder) else ""
    raise UserError(f"{folder}: no such folder; check the path{remote}. It must be the folder of a Gemma checkpoint")
  if hugging_face.is_folder(folder):
    return hugging_face.open_folder(folder)
  if released.is_folder(folder):
    return released.open_folder(folder, config)
  raise UserError(
    f"{folder}: no Gemma checkpoint: neither config.json with *.safetensors (Hugging Face) nor an Orbax checkpoint "
    "(_METADATA); give the folder that holds these files"
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
    path: as for `open_checkpoint`.
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
