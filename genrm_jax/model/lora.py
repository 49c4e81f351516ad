"""Low-rank adapters (LoRA, arXiv 2106.09685): small trained matrices beside the frozen ones.

With an adapter, a layer's matrix W acts as W + alpha / R * A B, where A is [in, R] and B is [R, out]. B starts at zero,
so training starts from the unchanged model. Adapters are two more entries among the model's parameters:

    lora        {name: {"a": [L, in ..., R], "b": [L, R, out ...]}}    trained
    lora_scale  alpha / R                                              frozen, like all other parameters

`gemma.forward` applies them where they are present. They are float32 whatever the dtype of the model: with the 8
significant bits of bfloat16, small updates would be lost.

google/qwix (0.1.8) is not used: it takes Flax modules, not functions, and around `gemma.forward` it adapts the
embedding only, since it does not recognise the matrices inside the scan.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from genrm_jax.model import gemma
from genrm_jax.model.config import ModelConfig
from genrm_jax.model.gemma import Params, ParamSpec
from genrm_jax.runtime.errors import UserError

# The matrices of a layer, and how many of each one's axes (after L) are inputs.
TARGETS = {"q": 1, "k": 1, "v": 1, "attn_out": 2, "gate": 1, "up": 1, "down": 1}


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Which matrices get an adapter, and its size.

  Attributes:
    rank: R.
    alpha: adapters are scaled by alpha / R, so that a new R needs no new learning rate.
    targets: names of matrices, from TARGETS.

  Raises:
    UserError: a field is out of range.
  """

  rank: int
  alpha: float
  targets: tuple[str, ...]

  def __post_init__(self) -> None:
    if not isinstance(self.rank, int) or self.rank < 1:
      raise UserError(f"lora.rank must be a whole number of at least 1, not {self.rank!r}")
    if not 0 < self.alpha < math.inf:
      raise UserError(f"lora.alpha must be positive and finite, not {self.alpha!r}")
    unknown = [name for name in self.targets if name not in TARGETS]
    if not isinstance(self.targets, tuple) or not self.targets or unknown:
      raise UserError(f"lora.targets must be a non-empty tuple of {', '.join(TARGETS)}; not {self.targets!r}")


def param_specs(model: ModelConfig, config: LoraConfig) -> dict[str, Any]:
  """The entries that adapters add to `gemma.param_specs(model)`."""
  matrices = gemma.param_specs(model)["layers"]

  def pair(name: str) -> dict[str, ParamSpec]:
    shape, axes = matrices[name].shape, matrices[name].axes
    first_out = 1 + TARGETS[name]
    inputs = slice(1, first_out)
    normal = jax.nn.initializers.normal(math.prod(shape[inputs]) ** -0.5)
    return {
      "a": ParamSpec((*shape[:first_out], config.rank), (*axes[:first_out], "rank"), normal),
      "b": ParamSpec(
        (shape[0], config.rank, *shape[first_out:]),
        (axes[0], "rank", *axes[first_out:]),
        jax.nn.initializers.zeros,
      ),
    }

  scale = ParamSpec((), (), jax.nn.initializers.constant(config.alpha / config.rank))
  return {"lora": {name: pair(name) for name in config.targets}, "lora_scale": scale}


def init(model: ModelConfig, config: LoraConfig, key: jax.Array) -> Params:
  """New adapters, which do not change the model yet; use them as `{**params, **lora.init(...)}`."""
  return gemma.init_specs(param_specs(model, config), key, "float32")


def split(params: Params) -> tuple[Params, Params]:
  """(trained, frozen): the adapters and all other parameters; without adapters, all parameters and nothing.

  Leaves may also be shapes, ParamSpecs or shardings.
  """
  if "lora" not in params:
    return params, {}
  return {"lora": params["lora"]}, {name: entry for name, entry in params.items() if name != "lora"}


def merge(params: Params) -> Params:
  """Merges adapters into their matrices: W + alpha / R * A B, computed in float32 and returned in the dtype of W."""

  def merged(weight: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    num_layers, rank = b.shape[:2]
    a_LIR, b_LRO = a.reshape(num_layers, -1, rank), b.reshape(num_layers, rank, -1)
    change = jnp.einsum("LIR,LRO->LIO", a_LIR, b_LRO, precision=jax.lax.Precision.HIGHEST).reshape(weight.shape)
    return (weight.astype(jnp.float32) + params["lora_scale"] * change).astype(weight.dtype)

  matrices = params["layers"]
  changed = {name: merged(matrices[name], ab["a"], ab["b"]) for name, ab in params["lora"].items()}
  base = {name: entry for name, entry in params.items() if name not in ("lora", "lora_scale")}
  return base | {"layers": matrices | changed}
