"""The TPU kernel matches plain attention, values and gradients, on one device and on a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genrm_jax.model import attention, gemma, layers
from genrm_jax.model.config import get_config
from genrm_jax.runtime import sharding

B, T, H = 2, 256, 128


def test_a_query_without_keys_has_a_finite_result_and_gradient():
  q = k = v = jnp.ones((1, 3, 1, 4))
  mask = jnp.zeros((1, 3, 3), bool)
  value, grads = jax.value_and_grad(lambda *a: layers.attention(*a, mask, 2.0).sum(), argnums=(0, 1, 2))(q, k, v)
  assert np.isfinite(value) and all(np.isfinite(g).all() for g in grads)


def _inputs(num_kv_heads):
  rng = np.random.default_rng(0)
  q, k, v = (rng.normal(size=(B, T, n, H)).astype(np.float32) for n in (2, num_kv_heads, num_kv_heads))
  segments = np.array([[1] * 100 + [2] * 120 + [0] * 36, [1] * 30 + [2] * 226], np.int32)
  return q / H**0.5, k, v, segments


def _plain(segments, window=None, softcap=None):
  starts = np.stack([[int(np.argmax(row == s)) for s in row] for row in segments])
  mask = layers.packed_mask(jnp.asarray(np.arange(T) - starts), jnp.asarray(segments), window)
  return lambda q, k, v: layers.attention(q, k, v, mask, softcap)


def _loss(attend, segments, q, k, v):
  """Depends on all results except those at padding."""
  out = jnp.where((segments > 0)[..., None, None], attend(q, k, v), 0.0)
  return jnp.sum(jnp.sin(out) * jnp.cos(jnp.arange(out.size).reshape(out.shape))), out


@pytest.mark.parametrize(
  ("window", "softcap", "num_kv_heads"), [(None, None, 1), (40, 5.0, 2)], ids=["gemma_1", "gemma_2"]
)
def test_kernel_matches_plain_attention(window, softcap, num_kv_heads):
  q, k, v, segments = _inputs(num_kv_heads)
  options = {"window": window, "softcap": softcap, "rules": sharding.DEFAULT_RULES, "interpret": True}
  kernel = functools.partial(attention.splash_attention, segments_BT=segments, **options)
  grad = functools.partial(jax.grad, has_aux=True, argnums=(0, 1, 2))
  got, want = (
    jax.jit(grad(functools.partial(_loss, attend, segments)))(q, k, v)
    for attend in (kernel, _plain(segments, window, softcap))
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, want)


@pytest.mark.parametrize(("num_kv_heads", "heads", "batch"), [(1, "tensor", "data"), (2, "data", "tensor")])
def test_kernel_on_a_mesh(num_kv_heads, heads, batch):
  q, k, v, segments = _inputs(num_kv_heads)
  rules = {"activation_batch": batch, "activation_heads": heads}
  rules |= {"activation_kv_heads": heads} if num_kv_heads > 1 else {}
  rules = get_config("tiny_gemma2", num_kv_heads=num_kv_heads, sharding=rules).rules
  kernel = functools.partial(attention.splash_attention, window=None, softcap=None, rules=rules, interpret=True)
  with jax.set_mesh(sharding.make_mesh(data=2, tensor=2, devices=jax.devices()[:4])):
    got = jax.jit(kernel)(q, k, v, segments)
  assert got.sharding.shard_shape(got.shape) == (1, T, 1, H)
  np.testing.assert_allclose(
    np.asarray(got)[segments > 0], np.asarray(_plain(segments)(q, k, v))[segments > 0], atol=2e-5
  )


def test_only_long_rows_of_wide_heads_on_tpus_use_the_kernel():
  config = get_config("tiny_gemma2", head_dim=128)

  def lowered(num_tokens, platform):
    params = jax.eval_shape(lambda key: gemma.init(config, key), jax.random.key(0))
    rows = [jax.ShapeDtypeStruct((1, num_tokens), jnp.int32)] * 3
    forward = jax.jit(jax.grad(lambda p, *rows: gemma.forward(p, config, *rows, remat="dots")[0].sum()))
    return forward.trace(params, *rows).lower(lowering_platforms=(platform,)).as_text()

  assert "tpu_custom_call" in lowered(1024, "tpu")
  assert "tpu_custom_call" not in lowered(512, "tpu")
  assert "tpu_custom_call" not in lowered(1024, "cpu")
