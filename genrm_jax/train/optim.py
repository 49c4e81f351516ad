"""AdamW with linear warm-up, cosine decay and gradient clipping, by optax."""

import dataclasses
import math

import jax
import optax

from genrm_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """`learning_rate` is the peak; it falls to `final_fraction` of it by the last step."""

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
      "final_fraction": (0 <= self.final_fraction <= 1, "in 0..1"),
      "weight_decay": (0 <= self.weight_decay < math.inf, "0 or more"),
      "beta1": (0 <= self.beta1 < 1, "in 0..1, less than 1"),
      "beta2": (0 <= self.beta2 < 1, "in 0..1, less than 1"),
      "clip_norm": (self.clip_norm > 0, "positive"),
    }
    for name, (is_good, what) in allowed.items():
      if not is_good:
        raise UserError(f"{name} must be {what}, not {getattr(self, name)}")


def schedule(config: OptimConfig) -> optax.Schedule:
  """Learning rate of an update, by the number of updates before it."""
  return optax.warmup_cosine_decay_schedule(
    init_value=0.0 if config.warmup_steps else config.learning_rate,
    peak_value=config.learning_rate,
    warmup_steps=config.warmup_steps,
    decay_steps=config.num_steps,
    end_value=config.learning_rate * config.final_fraction,
  )


def make_optimizer(config: OptimConfig) -> optax.GradientTransformation:
  """The optimiser; norm scales are not decayed."""

  def decayed(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: "norm" not in jax.tree_util.keystr(path), params)

  return optax.chain(
    optax.clip_by_global_norm(config.clip_norm),
    optax.adamw(schedule(config), b1=config.beta1, b2=config.beta2, weight_decay=config.weight_decay, mask=decayed),
  )
