"""The kernel for TPUs gives the numbers of plain attention, values and gradients, on one device and on a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genrm_jax.model import attention, gemma, layers
from genrm_jax.model.config import get_config
from genrm_jax.runtime import sharding

B, T, H = 2, 256, 128


@functools.cache
def _inputs(num_heads=2, num_kv_heads=1):
  rng = np.random.default_rng(0)
  q, k, v = (rng.normal(size=(B, T, n, H)).astype(np.float32) for n in (num_heads, num_kv_heads, num_kv_heads))
  segments = np.array([[1] * 100 + [2] * 120 + [0] * 36, [1] * 30 + [2] * 226], np.int32)
  return q / H**0.5, k, v, segments


def _positions(segments):
  starts = np.stack([[int(np.argmax(row == s)) for s in row] for row in segments])
  return np.arange(T) - starts


def _loss(attend, segments, q, k, v):
  """Something of every number that means anything."""
  out = jnp.where((segments > 0)[..., None, None], attend(q, k, v), 0.0)
  return jnp.sum(jnp.sin(out) * jnp.cos(jnp.arange(out.size).reshape(out.shape))), out


def _both(segments, q, k, v, window, softcap):
  mask = layers.packed_mask(jnp.asarray(_positions(segments)), segments, window)

  def plain(q, k, v):
    return layers.attention(q, k, v, mask, softcap)

  def kernel(q, k, v):
    return attention.splash_attention(q, k, v, segments, window=window, softcap=softcap, interpret=True)

  grad = functools.partial(jax.grad, has_aux=True, argnums=(0, 1, 2))
  return [jax.jit(grad(functools.partial(_loss, attend, segments)))(q, k, v) for attend in (kernel, plain)]


@pytest.mark.parametrize(
  ("window", "softcap", "num_kv_heads"), [(None, None, 1), (40, 5.0, 2)], ids=["gemma_1", "gemma_2"]
)
def test_kernel_gives_values_and_gradients_of_plain_attention(window, softcap, num_kv_heads):
  q, k, v, segments = _inputs(num_kv_heads=num_kv_heads)
  got, want = _both(segments, q, k, v, window, softcap)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, want)


@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_kernel_on_a_mesh(num_kv_heads):
  q, k, v, segments = _inputs(num_kv_heads=num_kv_heads)
  mesh = sharding.make_mesh(data=2, tensor=2, devices=jax.devices()[:4])
  with jax.set_mesh(mesh):
    got = jax.jit(lambda *a: attention.splash_attention(*a, window=None, softcap=None, interpret=True))(
      q, k, v, segments
    )
  want = layers.attention(q, k, v, layers.packed_mask(_positions(segments), jnp.asarray(segments), None), None)
  there = segments > 0
  np.testing.assert_allclose(np.asarray(got)[there], np.asarray(want)[there], atol=2e-5)


def test_long_rows_of_wide_heads_take_the_kernel_on_a_tpu_and_nowhere_else():
  config = get_config("tiny_gemma2", head_dim=128)

  def lowered(num_tokens, platform):
    params = jax.eval_shape(lambda key: gemma.init(config, key), jax.random.key(0))
    rows = [jax.ShapeDtypeStruct((1, num_tokens), jnp.int32)] * 3
    forward = jax.jit(jax.grad(lambda p, *rows: gemma.forward(p, config, *rows, remat="dots")[0].sum()))
    return forward.trace(params, *rows).lower(lowering_platforms=(platform,)).as_text()

  assert "tpu_custom_call" in lowered(1024, "tpu")
  assert "tpu_custom_call" not in lowered(512, "tpu")
  assert "tpu_custom_call" not in lowered(1024, "cpu")
