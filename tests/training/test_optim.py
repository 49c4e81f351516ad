"""The learning rate schedule, weight decay, clipping, and invalid settings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genrm_jax.runtime.errors import UserError
from genrm_jax.training import optim
from genrm_jax.training.optim import OptimConfig

CONFIG = OptimConfig(learning_rate=0.5, num_steps=100, warmup_steps=20, final_fraction=0.1)


@pytest.mark.parametrize(
  ("step", "want"), [(0, 0.0), (5, 0.125), (10, 0.25), (20, 0.5), (60, 0.275), (100, 0.05), (120, 0.05)]
)
def test_rate_rises_linearly_to_the_peak_and_decays_along_a_cosine(step, want):
  assert float(optim.schedule(CONFIG)(step)) == pytest.approx(want, abs=1e-6)
  assert float(optim.schedule(OptimConfig(learning_rate=0.5, num_steps=10))(0)) == 0.5, "no warm-up"


@pytest.mark.parametrize("norm_mask", [None, {"scale": True, "abnormal": False}])
def test_weight_decay_spares_what_the_mask_marks_whatever_its_name(norm_mask):
  params = {"scale": jnp.ones(1), "abnormal": jnp.ones(1)}
  config = OptimConfig(learning_rate=0.5, num_steps=10, weight_decay=0.1)
  optimizer = optim.make_optimizer(config, norm_mask)
  updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
  assert float(updates["abnormal"][0]) == pytest.approx(-0.05)
  assert float(updates["scale"][0]) == pytest.approx(0.0 if norm_mask else -0.05)


def test_an_update_is_that_of_adamw_on_clipped_gradients():
  config = OptimConfig(0.5, num_steps=10, weight_decay=0.1, beta1=0.75, beta2=0.5, clip_norm=2.0)
  optimizer, params = optim.make_optimizer(config), {"w": jnp.array([2.0, 2.0])}
  updates, state = optimizer.update({"w": jnp.array([6.0, -8.0])}, optimizer.init(params), params)
  np.testing.assert_allclose(updates["w"], [-0.5 * (1 + 0.1 * 2), -0.5 * (-1 + 0.1 * 2)], rtol=1e-4)
  mu, nu = (leaf for leaf in jax.tree.leaves(state) if leaf.ndim)
  np.testing.assert_allclose([mu, nu], [[0.25 * 1.2, 0.25 * -1.6], [0.5 * 1.2**2, 0.5 * 1.6**2]], rtol=1e-5)


@pytest.mark.parametrize(
  ("name", "values"),
  [
    ("warmup_steps", (10, -1)),
    ("num_steps", (0,)),
    ("learning_rate", (0.0, -1.0, float("nan"), float("inf"))),
    ("weight_decay", (-0.1,)),
    ("beta1", (1.0,)),
    ("beta2", (-0.1,)),
    ("clip_norm", (0.0,)),
    ("final_fraction", (1.5,)),
  ],
)
def test_invalid_settings_are_refused(name, values):
  for value in values:
    with pytest.raises(UserError, match=name):
      OptimConfig(**{"learning_rate": 0.1, "num_steps": 10, name: value})
