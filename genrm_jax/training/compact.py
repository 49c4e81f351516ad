"""Adapters in one small file: a checkpoint without frozen weights, tokenizer and optimizer state, in bfloat16.

    DIR/manifest/metadata       as of the step that it was made from; its arrays as they are here
    DIR/adapters.safetensors    the adapters, by path: "lora/q/a"

It is opened as any step is. Weights and tokenizer are those of the checkpoint that the adapters were trained on.
"""

import hashlib
import io
import json
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from genrm_jax.checkpoints import safetensors
from genrm_jax.runtime import files
from genrm_jax.runtime.errors import UserError
from genrm_jax.training import saved

_FILE = "adapters.safetensors"


def is_compact(step: epath.Path) -> bool:
  """Whether a folder is such a checkpoint."""
  return (step / _FILE).exists()


def write(checkpoint: Any, folder: epath.Path) -> dict[str, Any]:
  """Writes the adapters of the best whole step into a new folder, and returns their manifest.

  Raises:
    UserError: as for `saved.find` and `saved.first_whole`; the checkpoint has no adapters, or has the frozen weights in
      it; the folder cannot be written.
  """

  def read(step: epath.Path) -> tuple[dict[str, Any], dict[str, Any]]:
    manifest = saved.read_manifest(step)
    if manifest["lora"] is None or not manifest["left_out"]:
      raise UserError(
        f"{step} is not of adapters that were saved alone (lora.rank above 0, lora.save_frozen=False); use another "
        "layout"
      )
    return manifest, saved.read_params(step, manifest, None)

  (manifest, params), _ = saved.first_whole(saved.find(checkpoint), read)
  lora = flax.traverse_util.flatten_dict({"lora": params["lora"]}, sep="/")
  rounded = {name: np.asarray(array).astype(jnp.bfloat16) for name, array in sorted(lora.items())}
  shapes = [(name, array.dtype, array.shape) for name, array in rounded.items()]
  content = io.BytesIO()
  safetensors.write_file(content, iter(rounded.items()), shapes)
  arrays = {"arrays": saved.describe({"params": _tree(rounded)}), "pending": []}
  entries = manifest | arrays | {"sha256": hashlib.sha256(content.getvalue()).hexdigest()}
  entries["digest"] = saved.manifest_digest(entries)
  with safetensors.new_files(folder) as create, create(_FILE) as f:
    f.write(content.getvalue())
  with safetensors.new_files(folder / "manifest") as create, create("metadata") as f:
    f.write(json.dumps(entries, indent=1).encode())
  return entries


def copy(folder: epath.Path, target: epath.Path) -> None:
  """Copies the checkpoint to where a run keeps a step; what is there is replaced."""
  if target.exists():
    target.rmtree()
  for name in (_FILE, "manifest/metadata"):
    with files.atomic_writer(target / name) as write:
      write((folder / name).read_bytes())


def read_params(step: epath.Path, manifest: Mapping[str, Any], shardings: Mapping[str, Any] | None) -> dict[str, Any]:
  """The adapters in float32, checked against the file's SHA-256.

  Args:
    step: the folder.
    manifest: its manifest.
    shardings: by path ("lora/q/a"); None gives NumPy arrays.

  Raises:
    Damaged: the file differs from what was written.
  """
  path = step / _FILE
  if hashlib.sha256(path.read_bytes()).hexdigest() != manifest.get("sha256"):
    raise saved.Damaged(f"checkpoint {step} is damaged: {_FILE} differs from what was written")
  flat = {name: safetensors.read_tensor(path, entry) for name, entry in safetensors.read_index(path).items()}
  arrays = {name: array.astype(np.float32) for name, array in flat.items()}
  if shardings is not None:
    arrays = {name: jax.device_put(array, shardings[name]) for name, array in arrays.items()}
  return _tree(arrays)


def _tree(flat: Mapping[str, Any]) -> dict[str, Any]:
  return flax.traverse_util.unflatten_dict(flat, sep="/")
