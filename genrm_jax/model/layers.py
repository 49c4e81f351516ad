"""The parts of a Gemma layer, as pure functions of arrays.

Axis letters: B batch, T query, S key, N query heads, K kv heads, G = N/K query heads per kv head, Q = T * G, H head
dim, D model width, F ffw width, R rank of an adapter. Norms, softmax, RoPE and soft-caps are computed in float32.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# The name of the results of products with weights, for a policy of what a backward pass keeps.
PRODUCT = "product"

# Finite, so that a query whose keys are all masked (padding) gets a finite mean instead of NaN.
_MASKED = -1e30
_NORM_EPSILON = 1e-6


def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
  """x / rms(x) * (1 + scale) over the last axis; `scale` is 0 at initialisation."""
  x32 = x.astype(jnp.float32)
  normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + _NORM_EPSILON)
  return (normed * (1.0 + scale.astype(jnp.float32))).astype(x.dtype)


def soft_cap(logits: jax.Array, cap: float | None) -> jax.Array:
  """cap * tanh(logits / cap): within (-cap, cap), nearly linear around 0. None returns the logits unchanged."""
  return logits if cap is None else cap * jnp.tanh(logits / cap)


def rope_angles(positions_BT: jax.Array, head_dim: int, base: float, scale: float) -> jax.Array:
  """Angles of rotary position embedding, f32[B, T, H/2]: position / scale * base^(-2i/H) for pair i."""
  exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
  return (positions_BT.astype(jnp.float32) / scale)[..., None] * base**-exponents


def apply_rope(x_BTNH: jax.Array, cos_BTH: jax.Array, sin_BTH: jax.Array) -> jax.Array:
  """Rotates the pairs (x[i], x[i + H/2]) by their angles; cos and sin are f32[B, T, H/2], the result is float32."""
  first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  cos, sin = cos_BTH[:, :, None, :], sin_BTH[:, :, None, :]
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def packed_mask(positions_BT: jax.Array, segments_BT: jax.Array, window: int | None) -> jax.Array:
  """Which keys a query may attend to in a packed row, bool[B, T, S] with S = T.

  Causality goes by index, since positions may have gaps and padding repeats position 0. The window is a distance in
  positions, so gaps count.

      segments 1 1 1 2 2 0      window None        window 2
                                1 . . . . .        1 . . . . .
                                1 1 . . . .        1 1 . . . .
                                1 1 1 . . .        . 1 1 . . .
                                . . . 1 . .        . . . 1 . .
                                . . . 1 1 .        . . . 1 1 .
                                . . . . . .        . . . . . .

  Args:
    positions_BT: i32[B, T].
    segments_BT: i32[B, T], 0 is padding.
    window: None for a global layer.
  """
  index = jnp.arange(segments_BT.shape[1])
  causal_TS = index[:, None] >= index[None, :]
  same_BTS = (segments_BT[:, :, None] == segments_BT[:, None, :]) & (segments_BT > 0)[:, None, :]
  return causal_TS & same_BTS & _within(positions_BT, positions_BT, window)


def cached_mask(
  entries_BT: jax.Array, positions_BT: jax.Array, key_positions_BS: jax.Array, window: int | None
) -> jax.Array:
  """Which cache entries a query may attend to, bool[B, T, S]: those up to its own, within the window.

  A row's tokens fill its entries from 0 without holes, so every entry before a token's own holds a token. A padding
  query has an entry >= S and sees all entries; its result is never used.

  Args:
    entries_BT: i32[B, T], the entry that holds the query's own key.
    positions_BT: i32[B, T] of the queries.
    key_positions_BS: i32[B, S] of the cached keys.
    window: None for a global layer.
  """
  index_S = jnp.arange(key_positions_BS.shape[1])
  return (index_S <= entries_BT[:, :, None]) & _within(positions_BT, key_positions_BS, window)


def attention(
  q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask_BTS: jax.Array, softcap: float | None
) -> jax.Array:
  """Attention of N query heads over K shared key/value heads, [B, T, N, H].

  Head n reads kv head n // G. q is pre-scaled; RoPE has been applied to q and k. The result of a query without keys is
  finite and has no meaning.
  """
  B, T, N, H = q_BTNH.shape
  K, S = k_BKSH.shape[1:3]
  # One batched product per row and kv head, [T * G, H] by [H, S]: 2 to 8 times faster on CPU than the einsum over five
  # axes, and the same work on other backends.
  q_BKQH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 1, 3, 4).reshape(B, K, -1, H)
  logits_BKQS = einsum_to_float32("BKQH,BKSH->BKQS", q_BKQH, k_BKSH)
  logits_BKTGS = soft_cap(logits_BKQS, softcap).reshape(B, K, T, N // K, S)
  probs_BKTGS = jax.nn.softmax(jnp.where(mask_BTS[:, None, :, None], logits_BKTGS, _MASKED), axis=-1)
  probs_BKQS = probs_BKTGS.astype(v_BKSH.dtype).reshape(B, K, -1, S)
  attended_BKQH = einsum_to_float32("BKQS,BKSH->BKQH", probs_BKQS, v_BKSH).astype(v_BKSH.dtype)
  return attended_BKQH.reshape(B, K, T, N // K, H).transpose(0, 2, 1, 3, 4).reshape(B, T, N, H)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def einsum_to_float32(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
  """The einsum of two arrays of one dtype, accumulated and returned in float32; gradients have the operands' dtype.

  JAX's own gradient would multiply the float32 cotangent by a and by b. On GPUs that copies both to float32 (2 GB for
  the embedding of Gemma 2B), and float32 products are slower than bfloat16 ones.
  """
  return _product(subscripts, a, b)


def _einsum_forward(subscripts: str, a: jax.Array, b: jax.Array):
  return einsum_to_float32(subscripts, a, b), (a, b)


def _einsum_backward(subscripts: str, operands: tuple[jax.Array, jax.Array], gradient: jax.Array):
  a, b = operands
  gradient = gradient.astype(a.dtype)
  inputs, out = subscripts.split("->")
  left, right = inputs.split(",")
  gradient_a = _product(f"{out},{right}->{left}", gradient, b).astype(a.dtype)
  return gradient_a, _product(f"{left},{out}->{right}", a, gradient).astype(b.dtype)


einsum_to_float32.defvjp(_einsum_forward, _einsum_backward)


def layer_of(stacked: Any, index: jax.Array) -> Any:
  """The weights of one layer, from those of all layers; not differentiable.

  On CPU, weights in bfloat16 are read as bit patterns: XLA slices them there at a tenth of the speed of uint16.
  """

  def as_bits(weight: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(row(jax.lax.bitcast_convert_type(weight, jnp.uint16), index), weight.dtype)

  def row(weight: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(weight, index, keepdims=False)

  def read(weight: jax.Array) -> jax.Array:
    if weight.dtype == jnp.bfloat16:
      return jax.lax.platform_dependent(weight, index, cpu=as_bits, default=row)
    return row(weight, index)

  return jax.tree.map(read, stacked)


class Adapted(NamedTuple):
  """The matrix W + A B, kept as its factors: A B is never formed, and x A has only R columns."""

  weight: jax.Array  # [in ..., out ...]
  a: jax.Array  # [in ..., R]
  b: jax.Array  # [R, out ...]


def project(x: jax.Array, weight: jax.Array | Adapted, num_axes: int = 1) -> jax.Array:
  """Contracts the last `num_axes` axes of x with the first of the weight: [B, T, D], [D, N, H] -> [B, T, N, H].

  The weight is cast to the dtype of x.
  """
  if isinstance(weight, Adapted):
    return project(x, weight.weight, num_axes) + project(project(x, weight.a, num_axes), weight.b)
  return checkpoint_name(_project(x, weight, num_axes), PRODUCT)


# Its backward pass starts from the weight as stored: a scan over layers would otherwise save a second copy of all
# weights, cast and reshaped. Everything is one matrix product over B * T rows: with an einsum, XLA on CPU contracts two
# axes for the gradient of the weight, which takes twice as long. Products are asked for in float32, as they are
# accumulated: for a result in bfloat16, XLA on CPU first converts the operands, which takes four times as long.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _project(x: jax.Array, weight: jax.Array, num_axes: int) -> jax.Array:
  leading, outer = x.shape[: x.ndim - num_axes], weight.shape[num_axes:]
  return _product("ti,io->to", *_matrices(x, weight, num_axes)).astype(x.dtype).reshape(*leading, *outer)


def _project_forward(x: jax.Array, weight: jax.Array, num_axes: int):
  return _project(x, weight, num_axes), (x, weight)


def _project_backward(num_axes: int, operands: tuple[jax.Array, jax.Array], gradient: jax.Array):
  x, weight = operands
  x_ti, weight_io = _matrices(x, weight, num_axes)
  gradient_to = gradient.reshape(len(x_ti), -1)
  gradient_x = _product("to,io->ti", gradient_to, weight_io).astype(x.dtype).reshape(x.shape)
  return gradient_x, _product("ti,to->io", x_ti, gradient_to).astype(weight.dtype).reshape(weight.shape)


_project.defvjp(_project_forward, _project_backward)


def _matrices(x: jax.Array, weight: jax.Array, num_axes: int) -> tuple[jax.Array, jax.Array]:
  size = math.prod(weight.shape[:num_axes])
  return x.reshape(-1, size), weight.astype(x.dtype).reshape(size, -1)


def _product(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def gate_mlp(x_BTD: jax.Array, gate_DF: jax.Array | Adapted, up_DF: jax.Array | Adapted) -> jax.Array:
  """The hidden layer of Gemma's MLP, [B, T, F]: gelu(x gate) * (x up), with the tanh approximation of gelu."""
  return jax.nn.gelu(project(x_BTD, gate_DF), approximate=True) * project(x_BTD, up_DF)


def _within(positions_BT: jax.Array, key_positions_BS: jax.Array, window: int | None) -> jax.Array:
  if window is None:
    return jnp.ones((), bool)
  return positions_BT[:, :, None] - key_positions_BS[:, None, :] < window
