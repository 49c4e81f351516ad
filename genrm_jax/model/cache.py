"""The KV cache: created empty, appended to by `gemma.forward`, and its rows overwritten by copies of other rows.

    entry      0 1 2 3 4 5 6 7          S = 8
    row 0      a b c d . . . .          length 4, the next token goes to entry 4
    row 1      e f . . . . . .          length 2, the next token goes to entry 2

Each row has its own length. Slots at `length` and beyond are never attended to.

Keys and values lie as attention multiplies them, [K, S, H] per row. In bfloat16 they are stored as bit patterns: XLA on
CPU updates an array of uint16 in place, but copies one of bfloat16 at every step.
"""

import jax
import jax.numpy as jnp

from genrm_jax.model.config import ModelConfig
from genrm_jax.pytrees import KVCache
from genrm_jax.runtime.sharding import FREE, Rules, constrain


def init(config: ModelConfig, batch: int, max_len: int) -> KVCache:
  """An empty cache for `batch` rows of up to `max_len` tokens, in the config's activation dtype."""
  shape = (config.num_layers, batch, config.num_kv_heads, max_len, config.head_dim)
  empty = _stored(jnp.zeros(shape, config.dtype))
  return pin(
    KVCache(
      k=empty,
      v=empty,
      positions=jnp.zeros((batch, max_len), jnp.int32),
      length=jnp.zeros(batch, jnp.int32),
    ),
    config.rules,
  )


def pin(cache: KVCache, rules: Rules) -> KVCache:
  """Constrains the cache's sharding to the rules of "cache_batch" and "cache_kv_heads"."""
  axes = (None, "cache_batch", "cache_kv_heads", None, None)
  return KVCache(
    k=constrain(cache.k, axes, rules),
    v=constrain(cache.v, axes, rules),
    positions=constrain(cache.positions, ("cache_batch", None), rules),
    length=constrain(cache.length, ("cache_batch",), rules),
  )


def replace_rows(cache: KVCache, prefixes: KVCache, source_B: jax.Array, rules: Rules) -> KVCache:
  """Overwrites row b with a copy of row `source_B[b]` of `prefixes`; -1 keeps row b.

      prefixes  p  q            cache  a b c d    ->    a q c q
      source_B  -1  1 -1  1

  Each copy then grows on its own. `prefixes` has at most as many entries as the cache. Every device may need any of its
  rows, so they are gathered.
  """
  new_B, T = source_B >= 0, prefixes.positions.shape[1]

  def replace(old: jax.Array, prefix: jax.Array, axis: int, entry_axis: int) -> jax.Array:
    # Heads may be sharded; layers, rows and entries are not.
    prefix = constrain(prefix, [None if a in (0, axis, entry_axis) else FREE for a in range(prefix.ndim)], rules)
    new = jnp.take(prefix, source_B, axis=axis, mode="clip")
    block = (slice(None),) * entry_axis + (slice(T),)
    mask = jnp.expand_dims(new_B, [a for a in range(prefix.ndim) if a != axis])
    return old.at[block].set(jnp.where(mask, new, old[block]))

  return pin(
    KVCache(
      k=replace(cache.k, prefixes.k, 1, 3),
      v=replace(cache.v, prefixes.v, 1, 3),
      positions=replace(cache.positions, prefixes.positions, 0, 1),
      length=jnp.where(new_B, constrain(prefixes.length, (None,), rules)[source_B], cache.length),
    ),
    rules,
  )


def copy_rows(cache: KVCache, source_B: jax.Array, num_shards: int, rules: Rules) -> KVCache:
  """Overwrites row b with a copy of row `source_B[b]` of the same cache; `source_B[b] == b` keeps row b.

  Both rows must lie in the same of the `num_shards` batch shards, so that devices exchange nothing.
  """
  per_shard = len(source_B) // num_shards
  local_NB = source_B.reshape(num_shards, per_shard) % per_shard

  def copy(buffer: jax.Array, axis: int) -> jax.Array:
    split = buffer.reshape(*buffer.shape[:axis], num_shards, per_shard, *buffer.shape[axis + 1 :])
    take = jax.vmap(lambda rows, source: jnp.take(rows, source, axis=axis), (axis, 0), axis)
    return take(split, local_NB).reshape(buffer.shape)

  copied = KVCache(copy(cache.k, 1), copy(cache.v, 1), copy(cache.positions, 0), copy(cache.length, 0))
  return pin(copied, rules)


def entries(cache: KVCache, segments_BT: jax.Array) -> jax.Array:
  """The cache entry of each new token, i32[B, T]: length[b], length[b] + 1, ...; S for padding (not written)."""
  index_T = jnp.arange(segments_BT.shape[1], dtype=jnp.int32)
  return jnp.where(segments_BT > 0, cache.length[:, None] + index_T, cache.positions.shape[1])


def write(buffer_LBKSH: jax.Array, new_BTKH: jax.Array, layer: jax.Array, entries_BT: jax.Array) -> jax.Array:
  """Writes one layer's keys or values to [layer, b, :, entries[b, t]]; entries >= S are dropped.

  Only B * T entries of the buffer are touched, so a loop that carries the buffer updates it in place.
  """
  rows_B1 = jnp.arange(entries_BT.shape[0])[:, None]
  return buffer_LBKSH.at[layer, rows_B1, :, entries_BT].set(_stored(new_BTKH), mode="drop")


def read(buffer_LBKSH: jax.Array, layer: jax.Array) -> jax.Array:
  """One layer's keys or values, [B, K, S, H]."""
  stored_BKSH = jax.lax.dynamic_index_in_dim(buffer_LBKSH, layer, keepdims=False)
  return jax.lax.bitcast_convert_type(stored_BKSH, jnp.bfloat16) if stored_BKSH.dtype == jnp.uint16 else stored_BKSH


def write_positions(positions_BS: jax.Array, new_BT: jax.Array, entries_BT: jax.Array) -> jax.Array:
  """Writes the new tokens' positions to [b, entries[b, t]]; entries >= S are dropped."""
  rows_B1 = jnp.arange(entries_BT.shape[0])[:, None]
  return positions_BS.at[rows_B1, entries_BT].set(new_BT, mode="drop")


def _stored(x: jax.Array) -> jax.Array:
  return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x
