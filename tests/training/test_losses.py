"""Losses match NumPy; the tests of verifiers compare whole losses with sequences read one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genrm_jax.pytrees import TokenBatch
from genrm_jax.training import losses

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(scale=3, size=(2, 4, 7)).astype(np.float32)
TARGETS = RNG.integers(7, size=(2, 4)).astype(np.int32)


def test_cross_entropies_match_numpy_and_stay_finite():
  exact = LOGITS.astype(np.float64)
  probs = np.exp(exact) / np.exp(exact).sum(-1, keepdims=True)
  want = -np.log(np.take_along_axis(probs, TARGETS[..., None], -1)[..., 0])
  np.testing.assert_allclose(losses.cross_entropy(LOGITS, TARGETS), want, rtol=1e-5)
  half = losses.cross_entropy(LOGITS.astype(jnp.bfloat16), TARGETS)
  assert half.dtype == jnp.float32
  np.testing.assert_allclose(half, want, atol=0.05)
  assert float(losses.cross_entropy(jnp.array([[[1000.0, 0.0]]]), jnp.array([[0]]))[0, 0]) == 0

  labels, p = TARGETS % 2, 1 / (1 + np.exp(-exact[..., 0]))
  want = -(labels * np.log(p) + (1 - labels) * np.log(1 - p))
  np.testing.assert_allclose(losses.binary_cross_entropy(LOGITS[..., 0], labels), want, rtol=1e-5)
  extreme = losses.binary_cross_entropy(jnp.array([[200.0, -200.0, 200.0]]), jnp.array([[1, 1, 0]]))
  np.testing.assert_allclose(extreme, [[0, 200, 200]])


def test_margins_match_a_loop_over_pairs_in_memory_that_grows_with_the_pairs():
  segments = np.array([[1, 1, 2, 2, 2, 3, 4, 0], [1, 2, 0, 0, 0, 0, 0, 0], [0] * 8], np.int32)
  logp = RNG.normal(size=segments.shape).astype(np.float32)
  batch = TokenBatch(segments, segments, (segments > 0).astype(np.float32), segments, segments, segments)
  want, is_pair = np.zeros((3, 2)), np.zeros((3, 2), bool)
  for row, pair in ((0, 0), (0, 1), (1, 0)):
    chosen, rejected = (segments[row] == 2 * pair + half for half in (1, 2))
    want[row, pair], is_pair[row, pair] = logp[row][chosen].sum() - logp[row][rejected].sum(), True
  got, got_is_pair = losses.margins(logp, batch, 2)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  np.testing.assert_array_equal(got_is_pair, is_pair)

  long = jax.tree.map(lambda a: jax.ShapeDtypeStruct((1, 4096), a.dtype), batch)
  jaxpr = jax.make_jaxpr(lambda logp, batch: losses.margins(logp, batch, 2))(long.weights, long)
  assert max(v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars) <= 2 * 4096


@pytest.mark.parametrize(
  ("verify", "solve", "weight", "want"),
  [((6, 4), (20, 5), 0.25, 2.5), ((6, 4), (0, 0), 0.5, 1.5), ((0, 0), (20, 5), 0.5, 2.0), ((0, 0), (0, 0), 0.5, 0.0)],
)
def test_unified_is_verify_plus_lambda_solve_and_an_absent_kind_adds_nothing(verify, solve, weight, want):
  given = jax.tree.map(jnp.float32, {"loss_verify": verify, "loss_solve": solve})
  loss, sums = losses.unified(given, weight)
  assert float(loss) == want
  assert jax.tree.map(float, sums) == {"loss": (want, 1), "loss_verify": verify, "loss_solve": solve}
  gradient = jax.grad(lambda sums: losses.unified(sums, weight)[0])(given)
  assert all(np.isfinite(g) for g in jax.tree.leaves(gradient))
