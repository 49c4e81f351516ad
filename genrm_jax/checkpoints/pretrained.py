"""Other people's Gemma checkpoints in, whatever their layout.

    params, config = weights.load("gemma-2-9b-it", mesh, param_dtype="bfloat16")

Out: `hugging_face.save` and `released.save`.
"""

import os

from etils import epath
from jax.sharding import Mesh

from genrm_jax.checkpoints import hugging_face, released
from genrm_jax.checkpoints.tensor_map import Opened, place
from genrm_jax.model import gemma
from genrm_jax.model.config import ModelConfig
from genrm_jax.runtime.errors import UserError


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
  """Whether a folder looks like a Gemma checkpoint of one of the layouts, whole or not."""
  folder = epath.Path(path)
  return hugging_face.is_folder(folder) or released.is_folder(folder)


def open_checkpoint(path: str | os.PathLike[str], config: ModelConfig | None = None) -> Opened:
  """Reads the index of a checkpoint and checks it against the size table; no tensor is read.

  Args:
    path: a folder, local or gs://: a Hugging Face one (config.json and *.safetensors) or a released Orbax one.
    config: the model, for an Orbax checkpoint of a size that is not in the table (its files do not say all of it).

  Raises:
    UserError: no such folder, no checkpoint in it, an architecture or a size that is unknown, a tensor that is missing
      or of another shape.
  """
  folder = epath.Path(path)
  if not folder.is_dir():
    remote = ", and who may read the bucket" if "://" in str(folder) else ""
    raise UserError(f"{folder}: no such folder; check the path{remote}. It is to be the folder of a Gemma checkpoint")
  if hugging_face.is_folder(folder):
    return hugging_face.open_folder(folder)
  if released.is_folder(folder):
    return released.open_folder(folder, config)
  raise UserError(
    f"{folder}: no checkpoint of Gemma in it: neither config.json with *.safetensors (Hugging Face) nor an Orbax "
    "checkpoint (_METADATA); give the folder that holds these files"
  )


def load(
  path: str | os.PathLike[str],
  mesh: Mesh,
  *,
  dtype: str = "float32",
  param_dtype: str = "float32",
  config: ModelConfig | None = None,
) -> tuple[gemma.Params, ModelConfig]:
  """Parameters on the mesh in `param_dtype`, and the model that they are of, computing in `dtype`.

  Raises:
    UserError: as `open_checkpoint`; or too little memory, or a file that is cut short.
  """
  opened = open_checkpoint(path, config)
  model = ModelConfig.from_dict(opened.config.to_dict() | {"dtype": dtype, "param_dtype": param_dtype})
  return place(opened, mesh, model), model
