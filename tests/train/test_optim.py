"""The learning rate schedule, weight decay, clipping, and invalid settings."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from genrm_jax.runtime.errors import UserError
from genrm_jax.train import optim
from genrm_jax.train.optim import OptimConfig

CONFIG = OptimConfig(learning_rate=0.5, num_steps=100, warmup_steps=20, final_fraction=0.1)


def _update(config, params, grads, norm_mask=None):
  optimizer = optim.make_optimizer(config, norm_mask)
  updates, state = optimizer.update(grads, optimizer.init(params), params)
  (adam,) = [s for s in jax.tree.leaves(state, is_leaf=_is_adam) if _is_adam(s)]
  return updates, adam


def _is_adam(node):
  return isinstance(node, optax.ScaleByAdamState)


@pytest.mark.parametrize(
  ("step", "want"), [(0, 0.0), (5, 0.125), (10, 0.25), (20, 0.5), (60, 0.275), (100, 0.05), (120, 0.05)]
)
def test_rate_rises_linearly_to_the_peak_and_decays_along_a_cosine(step, want):
  assert float(optim.schedule(CONFIG)(step)) == pytest.approx(want, abs=1e-6)


def test_without_warm_up_the_first_step_has_the_peak_rate():
  rate = optim.schedule(OptimConfig(learning_rate=0.5, num_steps=10))
  assert float(rate(0)) == 0.5 and float(rate(10)) == pytest.approx(0.05)


@pytest.mark.parametrize("norm_mask", [None, {"scale": True, "abnormal": False}])
def test_weight_decay_spares_what_the_mask_marks_whatever_its_name(norm_mask):
  params = {"scale": jnp.ones(1), "abnormal": jnp.ones(1)}
  config = OptimConfig(learning_rate=0.5, num_steps=10, weight_decay=0.1)
  updates, _ = _update(config, params, jax.tree.map(jnp.zeros_like, params), norm_mask)
  assert float(updates["abnormal"][0]) == pytest.approx(-0.05)
  assert float(updates["scale"][0]) == pytest.approx(0.0 if norm_mask else -0.05)


@pytest.mark.parametrize(("norm", "seen"), [(10.0, 2.0), (1.0, 1.0)])
def test_gradients_are_clipped_by_their_global_norm(norm, seen):
  config = OptimConfig(learning_rate=0.5, num_steps=10, clip_norm=2.0, beta1=0.9)
  grads = {"a": jnp.array([0.6 * norm]), "b": jnp.array([0.8 * norm])}
  _, adam = _update(config, grads, grads)
  np.testing.assert_allclose([adam.mu["a"][0], adam.mu["b"][0]], [0.1 * 0.6 * seen, 0.1 * 0.8 * seen], rtol=1e-5)


def test_first_update_is_adamw():
  config = OptimConfig(learning_rate=0.5, num_steps=10, weight_decay=0.1, clip_norm=1e9)
  updates, _ = _update(config, {"w": jnp.array([2.0, 2.0])}, {"w": jnp.array([3.0, -7.0])})
  np.testing.assert_allclose(updates["w"], [-0.5 * (1 + 0.1 * 2), -0.5 * (-1 + 0.1 * 2)], rtol=1e-4)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(warmup_steps=10), "warmup_steps 10 must lie in 0..num_steps - 1 = 9"),
    (dict(warmup_steps=-1), "warmup_steps -1"),
    (dict(num_steps=0), "warmup_steps 0 must lie in"),
    (dict(learning_rate=0.0), "learning_rate"),
    (dict(learning_rate=-1.0), "learning_rate"),
    (dict(learning_rate=float("nan")), "learning_rate"),
    (dict(learning_rate=float("inf")), "learning_rate"),
    (dict(weight_decay=-0.1), "weight_decay"),
    (dict(beta1=1.0), "beta1"),
    (dict(beta2=-0.1), "beta2"),
    (dict(clip_norm=0.0), "clip_norm"),
    (dict(final_fraction=1.5), "final_fraction"),
  ],
)
def test_invalid_settings_are_refused(changes, message):
  with pytest.raises(UserError, match=message):
    OptimConfig(**{"learning_rate": 0.1, "num_steps": 10, **changes})
