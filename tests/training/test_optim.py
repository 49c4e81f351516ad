"""What this library adds to optax's AdamW: the schedule, the mask of weight decay, clipping, and checked settings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genrm_jax.runtime.errors import UserError
from genrm_jax.training import optim
from genrm_jax.training.optim import OptimConfig


def test_the_rate_rises_linearly_to_the_peak_and_decays_along_a_cosine():
  schedule = optim.schedule(OptimConfig(learning_rate=0.5, num_steps=100, warmup_steps=20, final_fraction=0.1))
  rates = [float(schedule(step)) for step in (0, 10, 20, 60, 100)]
  assert rates == pytest.approx([0.0, 0.25, 0.5, 0.275, 0.05], abs=1e-6)
  assert float(optim.schedule(OptimConfig(learning_rate=0.5, num_steps=10))(0)) == 0.5, "no warm-up"


@pytest.mark.parametrize("norm_mask", [None, {"w": False, "scale": True}])
def test_an_update_is_that_of_adamw_on_clipped_gradients_without_decay_of_norms(norm_mask):
  config = OptimConfig(0.5, num_steps=10, weight_decay=0.1, beta1=0.75, beta2=0.5, clip_norm=2.0)
  params = {"w": jnp.array([2.0, 2.0]), "scale": jnp.array([2.0])}
  optimizer = optim.make_optimizer(config, norm_mask)
  grads = {"w": jnp.array([6.0, -8.0]), "scale": jnp.array([0.0])}
  updates, state = optimizer.update(grads, optimizer.init(params), params)
  np.testing.assert_allclose(updates["w"], [-0.5 * (1 + 0.1 * 2), -0.5 * (-1 + 0.1 * 2)], rtol=1e-4)
  np.testing.assert_allclose(updates["scale"], [0.0 if norm_mask else -0.5 * 0.1 * 2], rtol=1e-4)
  mu, nu = (leaf for leaf in jax.tree.leaves(state) if leaf.shape == (2,))
  np.testing.assert_allclose([mu, nu], [[0.25 * 1.2, 0.25 * -1.6], [0.5 * 1.2**2, 0.5 * 1.6**2]], rtol=1e-5)


INVALID = {"warmup_steps": 10, "num_steps": 0, "weight_decay": -0.1, "final_fraction": 1.5, "clip_norm": 0.0}
INVALID |= {"learning_rate": float("inf"), "beta1": 1.0, "beta2": -0.1}


@pytest.mark.parametrize("name", INVALID)
def test_invalid_settings_are_refused(name):
  with pytest.raises(UserError, match=name):
    OptimConfig(**{"learning_rate": 0.1, "num_steps": 10, name: INVALID[name]})
