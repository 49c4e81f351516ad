"""Random parameters at natural scale, with norm scales that are not zero."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from genrm_jax.model import gemma, lora
from genrm_jax.model.config import ModelConfig


def random_params(
  config: ModelConfig,
  *,
  norm_std: float = 0.1,
  std: float | None = None,
  adapters: lora.LoraConfig | None = None,
  seed: int = 0,
) -> dict[str, Any]:
  """Parameters in `config.param_dtype`, with random float32 adapters if given; `std` defaults to 1 / sqrt(D)."""
  rng = np.random.default_rng(seed)
  std = config.embed_dim**-0.5 if std is None else std

  def fill(spec: gemma.ParamSpec) -> jax.Array:
    return jnp.asarray(rng.normal(scale=norm_std if spec.is_norm else std, size=spec.shape), config.param_dtype)

  params = jax.tree.map(fill, gemma.param_specs(config))
  if adapters is None:
    return params
  specs = lora.param_specs(config, adapters)["lora"]
  added = jax.tree.map(lambda spec: jnp.asarray(rng.normal(scale=0.2, size=spec.shape), jnp.float32), specs)
  return {**params, "lora": added, "lora_scale": jnp.float32(adapters.alpha / adapters.rank)}
