"""Each part of a layer against a few lines of NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genrm_jax.model import layers


def _normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_rms_norm():
  x, scale = _normal(0, 3, 8), _normal(1, 8)
  want = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * (1 + scale)
  np.testing.assert_allclose(layers.rms_norm(jnp.array(x), jnp.array(scale)), want, rtol=1e-5)


def test_soft_cap():
  x = jnp.array([-1e4, -0.1, 0.0, 0.1, 1e4])
  np.testing.assert_allclose(layers.soft_cap(x, 30.0), [-30, -0.1, 0, 0.1, 30], atol=1e-5)
  assert layers.soft_cap(x, None) is x


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


def test_packed_mask_matches_its_docstring():
  segments = jnp.array([[1, 1, 1, 2, 2, 0]])
  positions = jnp.array([[0, 1, 2, 0, 1, 0]])
  whole = ["1.....", "11....", "111...", "...1..", "...11.", "......"]
  window = ["1.....", "11....", ".11...", "...1..", "...11.", "......"]
  for size, rows in ((None, whole), (2, window)):
    want = np.array([[c == "1" for c in row] for row in rows])
    np.testing.assert_array_equal(layers.packed_mask(positions, segments, size)[0], want)


def test_packed_mask_is_causal_by_index_and_windows_are_by_position():
  segments = jnp.ones((1, 4), jnp.int32)
  positions = jnp.array([[0, 1, 5, 6]])
  want = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
  np.testing.assert_array_equal(layers.packed_mask(positions, segments, 3)[0], np.array(want, bool))
  np.testing.assert_array_equal(layers.packed_mask(positions, segments, 6)[0].sum(axis=1), [1, 2, 3, 3])


def test_cached_mask():
  # Row 0 holds 2 tokens and gets 2; row 1 holds 1 and gets 1 and padding (slot 5 = S).
  entries = jnp.array([[2, 3], [1, 5]])
  positions = jnp.array([[4, 5], [1, 0]])
  keys = jnp.array([[0, 3, 4, 5, 0], [0, 1, 0, 0, 0]])
  got = np.asarray(layers.cached_mask(entries, positions, keys, None))
  np.testing.assert_array_equal(got[0], np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]], bool))
  np.testing.assert_array_equal(got[1, 0], np.array([1, 1, 0, 0, 0], bool))
  got = np.asarray(layers.cached_mask(entries, positions, keys, 2))
  np.testing.assert_array_equal(got[0], np.array([[0, 1, 1, 0, 0], [0, 0, 1, 1, 0]], bool))


@pytest.mark.parametrize(("num_kv_heads", "cap"), [(1, None), (2, 2.0), (4, None)])
def test_attention(num_kv_heads, cap):
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


def test_gate_mlp():
  x, gate, up = _normal(0, 1, 2, 3), _normal(1, 3, 5), _normal(2, 3, 5)
  g = x @ gate
  gelu = 0.5 * g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3)))
  got = layers.gate_mlp(*(jnp.array(a) for a in (x, gate, up)))
  np.testing.assert_allclose(got, gelu * (x @ up), atol=1e-5)
