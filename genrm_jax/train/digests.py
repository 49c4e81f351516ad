"""A digest of every array of a tree, the same on any devices: what is read back is compared with what was written.

Storage libraries give back a flipped byte in silence. The digest is a sum over the elements, each mixed with its place,
in 32-bit integer arithmetic: it is computed where the shards lie, in any order and split, to the same bits, and
nothing travels but two numbers an array. It finds damage by accident; it is no protection against intent.
"""

from typing import Any

import jax
import jax.numpy as jnp

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
_SALTS = (0x9E3779B9, 0x7F4A7C15)


def names_of(tree: Any) -> dict[str, Any]:
  """Leaves by their path, "params/layers/q"."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def of_tree(tree: Any) -> dict[str, str]:
  """The digest (16 hex digits) of every leaf, by its path."""
  # One after another: on a CPU, programs whose collectives are under way together wait for each other for ever.
  pairs = {name: jax.device_get(_digest(leaf)) for name, leaf in names_of(tree).items()}
  return {name: "".join(f"{int(half):08x}" for half in pair) for name, pair in pairs.items()}


@jax.jit
def _digest(x: jax.Array) -> jax.Array:
  """u32[2]: for each salt the sum of mix(bits + mix(place + salt)) over all elements, modulo 2^32."""
  if jnp.issubdtype(x.dtype, jnp.bool_):
    x = x.astype(jnp.uint8)
  bits = jax.lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize]).astype(jnp.uint32)
  place = jnp.zeros(x.shape, jnp.uint32)
  for axis, size in enumerate(x.shape):
    place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
  return jnp.stack([jnp.sum(_mix(bits + _mix(place + jnp.uint32(salt))), dtype=jnp.uint32) for salt in _SALTS])


def _mix(h: jax.Array) -> jax.Array:
  """A bijection of 32 bits in which every bit of the result depends on all of the argument (MurmurHash3's end)."""
  h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
  h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
  return h ^ (h >> 16)
