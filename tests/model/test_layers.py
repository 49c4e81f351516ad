"""RoPE, masks and attention against plain loops; the parity tests cover norms, soft-caps and the MLP."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genrm_jax.model import layers


def _normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_rope_rotates_each_pair_by_its_angle():
  positions, base, scale = np.array([[0, 1, 7]]), 100.0, 8.0
  x = _normal(0, 1, 3, 2, 4)
  angles = layers.rope_angles(jnp.array(positions), 4, base, scale)
  got = layers.apply_rope(jnp.array(x), jnp.cos(angles), jnp.sin(angles))
  for t, position in enumerate(positions[0]):
    for pair in range(2):
      turn = np.exp(1j * position / scale * base ** (-pair / 2))
      want = (x[0, t, :, pair] + 1j * x[0, t, :, pair + 2]) * turn
      np.testing.assert_allclose(got[0, t, :, pair], want.real, atol=1e-6)
      np.testing.assert_allclose(got[0, t, :, pair + 2], want.imag, atol=1e-6)


@pytest.mark.parametrize("window", [None, 2, 3])
def test_masks_match_a_loop_over_queries_and_keys(window):
  """Causal by index, windows by position; positions have a gap in the first segment."""
  segments, positions = np.array([[1, 1, 1, 2, 2, 0]]), np.array([[0, 1, 5, 0, 1, 0]])
  got = layers.packed_mask(jnp.array(positions), jnp.array(segments), window)[0]
  for t in range(6):
    for s in range(6):
      near = window is None or positions[0, t] - positions[0, s] < window
      assert got[t, s] == (s <= t and segments[0, s] > 0 and segments[0, t] == segments[0, s] and near)
  # A cache of 5 slots. Row 0 holds 2 tokens and gets 2; row 1 holds 1 and gets 1, and padding (slot 5).
  slots, queries = np.array([[2, 3], [1, 5]]), np.array([[4, 5], [1, 0]])
  keys = np.array([[0, 3, 4, 5, 0], [0, 1, 0, 0, 0]])
  got = layers.cached_mask(jnp.array(slots), jnp.array(queries), jnp.array(keys), window)
  for b, t in ((0, 0), (0, 1), (1, 0)):
    for s in range(5):
      near = window is None or queries[b, t] - keys[b, s] < window
      assert got[b, t, s] == (s <= slots[b, t] and near)


@pytest.mark.parametrize(("num_kv_heads", "cap"), [(1, None), (2, 2.0), (4, None)])
def test_attention_matches_a_loop_over_heads(num_kv_heads, cap):
  B, T, N, H = 2, 5, 4, 6
  q, k, v = _normal(0, B, T, N, H), _normal(1, B, T, num_kv_heads, H), _normal(2, B, T, num_kv_heads, H)
  mask = np.tril(np.ones((B, T, T), bool))
  mask[1, :, 0] = [True, False, False, True, False]
  got = layers.attention(*(jnp.array(a) for a in (q, k, v, mask)), cap)
  for b in range(B):
    for n in range(N):
      shared = n // (N // num_kv_heads)
      logits = q[b, :, n] @ k[b, :, shared].T
      logits = logits if cap is None else cap * np.tanh(logits / cap)
      weights = np.exp(logits) * mask[b]
      want = weights / weights.sum(-1, keepdims=True) @ v[b, :, shared]
      np.testing.assert_allclose(got[b, :, n], want, atol=1e-5)


def test_a_query_without_keys_has_a_finite_result_and_gradient():
  q = k = v = jnp.array(_normal(0, 1, 3, 1, 4))
  mask = jnp.zeros((1, 3, 3), bool)
  value, grads = jax.value_and_grad(lambda *a: layers.attention(*a, mask, 2.0).sum(), argnums=(0, 1, 2))(q, k, v)
  assert np.isfinite(value) and all(np.isfinite(g).all() for g in grads)
