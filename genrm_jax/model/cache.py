"""The KV cache: made empty, written by `gemma.forward`, forked when many votes share a prefix.

    slot       0 1 2 3 4 5 6 7          S = 8
    row 0      a b c d . . . .          length 4, the next token goes to slot 4
    row 1      e f . . . . . .          length 2, the next token goes to slot 2

Rows have lengths of their own. What lies at `length` and beyond is never attended to.
"""

import jax
import jax.numpy as jnp

from genrm_jax.model.config import ModelConfig
from genrm_jax.sharding import FREE, constrain
from genrm_jax.types import KVCache


def init(config: ModelConfig, batch: int, max_len: int) -> KVCache:
  """An empty cache for `batch` rows of up to `max_len` tokens, in the config's activation dtype."""
  shape = (config.num_layers, batch, max_len, config.num_kv_heads, config.head_dim)
  axes = (None, "batch", None, FREE, None)
  return KVCache(
    k=constrain(jnp.zeros(shape, config.dtype), *axes),
    v=constrain(jnp.zeros(shape, config.dtype), *axes),
    positions=constrain(jnp.zeros((batch, max_len), jnp.int32), "batch", None),
    length=constrain(jnp.zeros(batch, jnp.int32), "batch"),
  )


def fork(cache: KVCache, n: int) -> KVCache:
  """Repeats every row n times: rows b0, b1 become b0 x n, b1 x n. Each copy then grows on its own."""
  return KVCache(
    k=jnp.repeat(cache.k, n, axis=1),
    v=jnp.repeat(cache.v, n, axis=1),
    positions=jnp.repeat(cache.positions, n, axis=0),
    length=jnp.repeat(cache.length, n, axis=0),
  )


def slots(cache: KVCache, segments_BT: jax.Array) -> jax.Array:
  """The slot of every new token, i32[B, T]: length[b], length[b] + 1, ...; S for padding, where nothing is written."""
  index_T = jnp.arange(segments_BT.shape[1], dtype=jnp.int32)
  return jnp.where(segments_BT > 0, cache.length[:, None] + index_T, cache.positions.shape[1])


def write(buffer_LBSKH: jax.Array, new_BTKH: jax.Array, layer: jax.Array, slots_BT: jax.Array) -> jax.Array:
  """Writes one layer's keys or values at [layer, b, slots[b, t]]; a slot >= S is dropped.

  It touches B * T rows of the buffer only, so a loop that carries the buffer updates it in place.
  """
  rows_B1 = jnp.arange(slots_BT.shape[0])[:, None]
  return buffer_LBSKH.at[layer, rows_B1, slots_BT].set(new_BTKH.astype(buffer_LBSKH.dtype), mode="drop")


def write_positions(positions_BS: jax.Array, new_BT: jax.Array, slots_BT: jax.Array) -> jax.Array:
  """Writes the new tokens' positions at [b, slots[b, t]]; a slot >= S is dropped."""
  rows_B1 = jnp.arange(slots_BT.shape[0])[:, None]
  return positions_BS.at[rows_B1, slots_BT].set(new_BT, mode="drop")
