"""An engine without devices: its own code, batches and widths, but the jitted functions are recorded and not run."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from genrm_jax.infer import slots
from genrm_jax.infer.engine import Engine
from genrm_jax.model import cache as kv_cache


class Call(NamedTuple):
  """A jitted function, the shapes of its arguments, and its static options."""

  function: Any
  args: tuple[Any, ...]
  options: dict[str, Any]

  @property
  def prompts(self) -> tuple[int, ...]:
    """The padded shape [P, T] of the prompts that it reads or inserts, for each of which it is compiled; else ()."""
    given = self.args[1] if len(self.args) > 1 else None
    given = given.cache.positions if isinstance(given, slots.Prefilled) else given
    return given.shape if isinstance(given, jax.ShapeDtypeStruct) and len(given.shape) == 2 else ()


@dataclasses.dataclass(frozen=True)
class DryEngine(Engine):
  """Records calls. All probabilities are 0; no rollout ends on its own, and all but a prompt's first diverge."""

  calls: list[Call] = dataclasses.field(default_factory=list)

  def run(self, function, *args, **options):
    rows, rules = self._batch_sharding(), self.config.rules
    of_cache = NamedSharding(self.mesh, PartitionSpec(None, rules["cache_batch"], None, rules["cache_kv_heads"]))

    def placed(a: Any) -> Any:  # keys and values are f[L, B, S, K, H]
      return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=(rows, of_cache)[a.ndim == 5] if a.ndim else None)

    args = tuple(placed(a) if isinstance(a, np.ndarray | np.generic) else a for a in args)
    self.calls.append(Call(function, args, {**options, "config": self.config}))
    if function is slots.init:
      return jax.tree.map(placed, jax.eval_shape(lambda: slots.init(config=self.config, **options)))
    if function is slots.decode:
      return args[1], self._sampled(args[1].sampled)
    if isinstance(args[0], slots.Slots):  # changed in place
      return args[0]
    num_rows, width = args[1].shape
    if function is slots.prefill:
      cache = jax.eval_shape(lambda: kv_cache.init(self.config, num_rows, width))
      x_PD = jax.ShapeDtypeStruct((num_rows, self.config.embed_dim), jnp.dtype(self.config.dtype))
      return jax.tree.map(placed, slots.Prefilled(cache, x_PD))
    return np.zeros((num_rows, len(options.get("token_ids", range(width)))), np.float32)

  def _sampled(self, shapes: slots.Sampled) -> slots.Sampled:
    """All slots are full, and finished unless it is the first call: what has diverged then moves into a free slot."""
    sampled: Any = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), shapes)
    is_first = sum(call.function is slots.decode for call in self.calls) == 1
    sampled.length[:], sampled.live[:], sampled.diverged_at[:] = sampled.ids.shape[1], is_first, -1
    sampled.diverged_at[:, 1:] += is_first
    return sampled
