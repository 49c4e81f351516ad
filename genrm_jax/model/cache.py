"""The KV cache: made empty, written by `gemma.forward`, its rows replaced by copies of others.

    slot       0 1 2 3 4 5 6 7          S = 8
    row 0      a b c d . . . .          length 4, the next token goes to slot 4
    row 1      e f . . . . . .          length 2, the next token goes to slot 2

Rows have lengths of their own. What lies at `length` and beyond is never attended to.
"""

import jax
import jax.numpy as jnp

from genrm_jax.model.config import ModelConfig
from genrm_jax.pytrees import KVCache
from genrm_jax.runtime.sharding import FREE, constrain


def init(config: ModelConfig, batch: int, max_len: int) -> KVCache:
  """An empty cache for `batch` rows of up to `max_len` tokens, in the config's activation dtype."""
  shape = (config.num_layers, batch, max_len, config.num_kv_heads, config.head_dim)
  return pin(
    KVCache(
      k=jnp.zeros(shape, config.dtype),
      v=jnp.zeros(shape, config.dtype),
      positions=jnp.zeros((batch, max_len), jnp.int32),
      length=jnp.zeros(batch, jnp.int32),
    )
  )


def pin(cache: KVCache) -> KVCache:
  """Splits the rows over the batch shards, and the kv heads as those of the weights are split."""
  axes = (None, "batch", None, "kv_heads" if cache.k.shape[3] > 1 else None, None)
  return KVCache(
    k=constrain(cache.k, *axes),
    v=constrain(cache.v, *axes),
    positions=constrain(cache.positions, "batch", None),
    length=constrain(cache.length, "batch"),
  )


def replace_rows(cache: KVCache, prefixes: KVCache, source_B: jax.Array) -> KVCache:
  """Puts a copy of row `source_B[b]` of `prefixes` in the place of row b; where that is -1, row b stays.

      prefixes  p  q            cache  a b c d    ->    a q b q
      source_B  -1  1 -1  1

  Each copy then grows on its own. `prefixes` has at most as many slots as the cache; where other devices hold rows of
  it, it is gathered whole.
  """
  new_B, T = source_B >= 0, prefixes.positions.shape[1]

  def one(old: jax.Array, prefix: jax.Array, axis: int) -> jax.Array:
    prefix = constrain(prefix, *[FREE if a > axis + 1 else None for a in range(prefix.ndim)])
    new = jnp.take(prefix, source_B, axis=axis, mode="clip")
    at = (slice(None),) * (axis + 1) + (slice(T),)
    mask = jnp.expand_dims(new_B, [a for a in range(prefix.ndim) if a != axis])
    return old.at[at].set(jnp.where(mask, new, old[at]))

  return pin(
    KVCache(
      k=one(cache.k, prefixes.k, 1),
      v=one(cache.v, prefixes.v, 1),
      positions=one(cache.positions, prefixes.positions, 0),
      length=jnp.where(new_B, constrain(prefixes.length, None)[source_B], cache.length),
    )
  )


def copy_rows(cache: KVCache, source_B: jax.Array, num_shards: int) -> KVCache:
  """Puts a copy of row `source_B[b]` of the cache itself in the place of row b: its own number leaves a row as it is.

  Both rows are of the same batch shard, of which there are `num_shards`, so that devices exchange nothing.
  """
  per_shard = len(source_B) // num_shards
  local_NB = source_B.reshape(num_shards, per_shard) % per_shard

  def one(buffer: jax.Array, axis: int) -> jax.Array:
    split = buffer.reshape(*buffer.shape[:axis], num_shards, per_shard, *buffer.shape[axis + 1 :])
    take = jax.vmap(lambda rows, source: jnp.take(rows, source, axis=axis), (axis, 0), axis)
    return take(split, local_NB).reshape(buffer.shape)

  return pin(KVCache(one(cache.k, 1), one(cache.v, 1), one(cache.positions, 0), one(cache.length, 0)))


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
