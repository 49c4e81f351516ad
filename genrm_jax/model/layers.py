"""The parts of a Gemma layer, as pure functions of arrays.

Einsum legend: B batch, T query index, S key index, N query heads, K kv heads, G = N/K query heads that share a kv head,
H head dim, D model width, F ffw width. Norms, softmax, RoPE and soft-caps are computed in float32 and cast back.
"""

import jax
import jax.numpy as jnp

# Finite, so that a row in which every key is masked (a padding query) gives a finite mean instead of NaN.
_MASKED = -1e30
_NORM_EPSILON = 1e-6


def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
  """x / rms(x) * (1 + scale) over the last axis; `scale` has that axis' size and is 0 at initialisation."""
  x32 = x.astype(jnp.float32)
  normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + _NORM_EPSILON)
  return (normed * (1.0 + scale.astype(jnp.float32))).astype(x.dtype)


def soft_cap(logits: jax.Array, cap: float | None) -> jax.Array:
  """Squashes to (-cap, cap), nearly linear around 0; None leaves the logits as they are."""
  return logits if cap is None else cap * jnp.tanh(logits / cap)


def rope_angles(positions_BT: jax.Array, head_dim: int, base: float, scale: float) -> jax.Array:
  """Angles of rotary position embedding, f32[B, T, H/2]: position / scale * base^(-2i/H) for pair i."""
  exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
  return (positions_BT.astype(jnp.float32) / scale)[..., None] * base**-exponents


def apply_rope(x_BTNH: jax.Array, cos_BTH: jax.Array, sin_BTH: jax.Array) -> jax.Array:
  """Turns the pairs (x[i], x[i + H/2]) by their angles; cos and sin are f32[B, T, H/2], the result is float32."""
  first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  cos, sin = cos_BTH[:, :, None, :], sin_BTH[:, :, None, :]
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def packed_mask(positions_BT: jax.Array, segments_BT: jax.Array, window: int | None) -> jax.Array:
  """Which key a query may see in a packed row, bool[B, T, S] with S = T.

  Order is by index: training may leave gaps in positions, and padding repeats position 0. The window is a distance in
  positions, so a gap counts in full.

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
  slots_BT: jax.Array, positions_BT: jax.Array, key_positions_BS: jax.Array, window: int | None
) -> jax.Array:
  """Which cache slot a query may see, bool[B, T, S]: those up to its own slot, and within the window.

  A row's real tokens fill the slots from 0 without holes, so what lies before a real token's own slot is real too. A
  padding query has a slot >= S and sees whatever is there; nothing reads its result.

  Args:
    slots_BT: i32[B, T], where the query's own key was written.
    positions_BT: i32[B, T] of the queries.
    key_positions_BS: i32[B, S] of the cached keys.
    window: None for a global layer.
  """
  index_S = jnp.arange(key_positions_BS.shape[1])
  return (index_S <= slots_BT[:, :, None]) & _within(positions_BT, key_positions_BS, window)


def attention(
  q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array, softcap: float | None
) -> jax.Array:
  """Attention of N query heads over K shared key/value heads, [B, T, N, H].

  Head n reads kv head n // G. Queries come scaled and turned, keys turned. A query that sees no key gets a finite
  result without meaning.
  """
  B, T, N, H = q_BTNH.shape
  K = k_BSKH.shape[2]
  q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
  logits_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
  logits_BKGTS = jnp.where(mask_BTS[:, None, None], soft_cap(logits_BKGTS, softcap), _MASKED)
  probs_BKGTS = jax.nn.softmax(logits_BKGTS, axis=-1).astype(v_BSKH.dtype)
  return jnp.einsum("BKGTS,BSKH->BTKGH", probs_BKGTS, v_BSKH).reshape(B, T, N, H)


def gate_mlp(x_BTD: jax.Array, gate_DF: jax.Array, up_DF: jax.Array) -> jax.Array:
  """The hidden layer of Gemma's MLP, [B, T, F]: gelu(x gate) * (x up), gelu in its tanh approximation."""
  gate_BTF = jnp.einsum("BTD,DF->BTF", x_BTD, gate_DF)
  return jax.nn.gelu(gate_BTF, approximate=True) * jnp.einsum("BTD,DF->BTF", x_BTD, up_DF)


def _within(positions_BT: jax.Array, key_positions_BS: jax.Array, window: int | None) -> jax.Array:
  if window is None:
    return jnp.ones((), bool)
  return positions_BT[:, :, None] - key_positions_BS[:, None, :] < window
