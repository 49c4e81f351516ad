"""AdamW with linear warm-up, cosine decay and gradient clipping (optax)."""

import dataclasses
import math
import operator
from typing import Any

import jax
import optax

from genrm_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """`learning_rate` is the peak; it decays to `final_fraction` of it by the last step."""

  learning_rate: float
  num_steps: int
  warmup_steps: int = 0
  final_fraction: float = 0.1
  weight_decay: float = 0.0
  beta1: float = 0.9
  beta2: float = 0.95
  clip_norm: float = 1.0

  def __post_init__(self):
    if not 0 <= self.warmup_steps < self.num_steps:
      raise UserError(f"warmup_steps {self.warmup_steps} must lie in 0..num_steps - 1 = {self.num_steps - 1}")
    allowed = {
      "learning_rate": (0 < self.learning_rate < math.inf, "positive and finite"),
      "final_fraction": (0 <= self.final_fraction <= 1, "in [0, 1]"),
      "weight_decay": (0 <= self.weight_decay < math.inf, "0 or more"),
      "beta1": (0 <= self.beta1 < 1, "in [0, 1)"),
      "beta2": (0 <= self.beta2 < 1, "in [0, 1)"),
      "clip_norm": (self.clip_norm > 0, "positive"),
    }
    for name, (is_valid, what) in allowed.items():
      if not is_valid:
        raise UserError(f"{name} must be {what}, not {getattr(self, name)}")


def schedule(config: OptimConfig) -> optax.Schedule:
  """Learning rate as a function of the number of updates already applied."""
  return optax.warmup_cosine_decay_schedule(
    init_value=0.0 if config.warmup_steps else config.learning_rate,
    peak_value=config.learning_rate,
    warmup_steps=config.warmup_steps,
    decay_steps=config.num_steps,
    end_value=config.learning_rate * config.final_fraction,
  )


def make_optimizer(config: OptimConfig, norm_mask: Any = None) -> optax.GradientTransformation:
  """The optimizer.

  Args:
    norm_mask: a tree of bool like the trained parameters; where it is true (norm scales) no weight decay is applied.
      None decays every parameter.
  """

  def decayed(params: Any) -> Any:
    if norm_mask is None:
      return jax.tree.map(lambda _: True, params)
    return jax.tree.map(operator.not_, norm_mask)

  return optax.chain(
    optax.clip_by_global_norm(config.clip_norm),
    optax.adamw(schedule(config), b1=config.beta1, b2=config.beta2, weight_decay=config.weight_decay, mask=decayed),
  )
