"""A digest per array, independent of its sharding, to compare what is read from a checkpoint with what was written.

Storage libraries return a flipped byte without an error. The digest is a sum over the elements, each mixed with its
index, in 32-bit integer arithmetic: it is computed where the shards are, is the same in any order and on any mesh, and
only two numbers per array reach the host. It detects accidental damage and is no protection against tampering.
"""

from typing import Any

import jax
import jax.numpy as jnp

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
_SALTS = (0x9E3779B9, 0x7F4A7C15)


def names_of(tree: Any) -> dict[str, Any]:
  """Leaves by path, such as "params/layers/q"."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def of_tree(tree: Any) -> dict[str, str]:
  """The digest of every leaf (16 hex digits), by path."""
  # One at a time: on CPU, two programs whose collectives overlap deadlock.
  pairs = {name: jax.device_get(_digest(leaf)) for name, leaf in names_of(tree).items()}
  return {name: "".join(f"{int(half):08x}" for half in pair) for name, pair in pairs.items()}


@jax.jit
def _digest(x: jax.Array) -> jax.Array:
  """u32[2]: for each salt, the sum of mix(bits + mix(index + salt)) over all elements, modulo 2^32."""
  if jnp.issubdtype(x.dtype, jnp.bool_):
    x = x.astype(jnp.uint8)
  bits = jax.lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize]).astype(jnp.uint32)
  index = jnp.zeros(x.shape, jnp.uint32)
  for axis, size in enumerate(x.shape):
    index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
  return jnp.stack([jnp.sum(_mix(bits + _mix(index + jnp.uint32(salt))), dtype=jnp.uint32) for salt in _SALTS])


def _mix(h: jax.Array) -> jax.Array:
  """A bijection on 32 bits in which every output bit depends on every input bit (MurmurHash3's finalizer)."""
  h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
  h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
  return h ^ (h >> 16)
