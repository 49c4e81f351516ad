"""The update is the same on every mesh and with adapters, and gives the recorded numbers; losses and the optimizer."""

import functools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
import train_steps
from random_params import random_params
from refusals import refused

from genrm_jax.model import gemma, lora
from genrm_jax.model.config import get_config
from genrm_jax.pytrees import KIND_SOLVE, KIND_VERIFY
from genrm_jax.runtime import sharding
from genrm_jax.training import losses as loss_functions
from genrm_jax.training import optim
from genrm_jax.training.optim import OptimConfig
from genrm_jax.verifiers.base import sft_loss

CONFIG = get_config(
  "tiny_gemma1", num_layers=1, embed_dim=32, ffw_dim=64, num_heads=4, num_kv_heads=1, head_dim=8, query_scale=8**-0.5
)
OPTIM = optim.OptimConfig(learning_rate=3e-3, num_steps=50, weight_decay=0.1)
NUM_STEPS = 4
LORA = lora.LoraConfig(rank=2, alpha=4.0, targets=("q", "k", "attn_out", "down"))
ROWS = tiny_run.rows(0, 40)


@functools.cache
def _params(adapted=False):
  """As NumPy, so that no device is chosen yet and the numbers depend on no version's random bits."""
  return jax.tree.map(np.asarray, random_params(CONFIG, adapters=LORA if adapted else None))


@functools.cache
def _trained(mesh_name, adapted=False, num_micro_batches=1):
  shape = {"one device": {}, "eight": {"data": 2, "fsdp": 2, "tensor": 2}}[mesh_name]
  mesh = sharding.make_mesh(**shape, devices=jax.devices()[: 8 if shape else 1])
  loss_fn, adapters = sft_loss(CONFIG, ROWS.max_targets, 0.5), LORA if adapted else None
  given = CONFIG, _params(adapted), loss_fn, mesh, OPTIM, adapters, num_micro_batches
  jitted, first, shardings, batch = train_steps.prepare(*given)
  with jax.set_mesh(mesh):
    state, losses = first, []
    train_step = jitted.lower(first, sharding.read_to_global(ROWS.take, ROWS.order(0, 0, 8), batch)).compile()
    for i in range(NUM_STEPS):
      state, sums = train_step(state, sharding.read_to_global(ROWS.take, ROWS.order(0, i, 8), batch))
      losses.append({name: float(total) / float(count) for name, (total, count) in jax.device_get(sums).items()})
  return train_step, shardings, first, state, losses


@pytest.mark.parametrize(
  ("mesh_name", "adapted", "num_micro_batches"),
  [("eight", False, 1), ("eight", True, 1), ("one device", False, 8), ("eight", False, 2)],
)
def test_the_update_depends_on_no_mesh_or_micro_batches_and_donates_the_state(mesh_name, adapted, num_micro_batches):
  *_, want, want_losses = _trained("one device", adapted)
  _, _, first, got, losses = _trained(mesh_name, adapted, num_micro_batches)
  assert [sorted(one) for one in losses] == [["grad_norm", "loss", "loss_solve", "loss_verify"]] * NUM_STEPS
  for one, other in zip(losses, want_losses, strict=True):
    assert one == pytest.approx(other, rel=1e-4)
  error = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), got.params, want.params)
  assert max(jax.tree.leaves(error)) < 1e-5, error
  assert int(got.step) == NUM_STEPS
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first))


def _check_shardings(arrays, shardings):
  jax.tree.map(lambda a, where: np.testing.assert_(a.sharding.is_equivalent_to(where, a.ndim)), arrays, shardings)


@pytest.mark.parametrize("adapted", [False, True])
def test_moments_are_sharded_like_their_parameters(adapted):
  _, shardings, _, state, _ = _trained("eight", adapted)
  (moments,) = [s for s in jax.tree.leaves(state.opt_state, is_leaf=lambda n: hasattr(n, "mu")) if hasattr(s, "mu")]
  for tree in (state.params, moments.mu, moments.nu):
    _check_shardings(tree, shardings.params)
  if adapted:
    split = {name: [tuple(leaf.sharding.spec) for leaf in ab.values()] for name, ab in state.params["lora"].items()}
    assert split["q"] == [(None, "fsdp", None), (None, None, "tensor", None)]
    assert split["k"] == [(None, "fsdp", None), (None, None, None, None)]
    assert split["attn_out"] == [(None, "tensor", None, None), (None, None, "fsdp")]
    assert split["down"] == [(None, "tensor", None), (None, None, "fsdp")]
  else:
    q = state.params["layers"]["q"]
    assert math.prod(q.sharding.shard_shape(q.shape)) * 4 == q.size
  assert moments.count.sharding.is_fully_replicated and state.step.sharding.is_fully_replicated


def test_only_adapters_are_trained():
  _, shardings, _, state, losses = _trained("eight", adapted=True)
  start = _params(adapted=True)
  assert list(state.params) == ["lora"] and state.frozen.keys() == start.keys() - {"lora"}
  for name, entry in state.frozen.items():
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), b), entry, start[name])
  _check_shardings(state.frozen, shardings.frozen)
  moved = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - b).min()), state.params["lora"], start["lora"])
  assert min(jax.tree.leaves(moved)) > 0, moved
  assert losses[-1]["loss"] < losses[0]["loss"] - 0.1


def test_frozen_parameters_have_no_gradients_and_micro_batches_take_a_part_of_the_memory():
  """All gradients would be as large as the parameters; one layer's weights are a twelfth of that."""
  config = get_config("tiny_gemma1", num_layers=12, ffw_dim=512, dtype="bfloat16")
  rows = jax.tree.map(lambda a: a[:1], ROWS.data)
  params = jax.eval_shape(lambda key: gemma.init(config, key) | lora.init(config, LORA, key), jax.random.key(0))
  given = config, params, sft_loss(config, 4, 0.5), tiny_run.mesh(), OPTIM, LORA
  train_step, state, *_ = train_steps.prepare(*given)
  used = train_step.lower(state, rows).compile().memory_analysis().temp_size_in_bytes
  assert used < 0.3 * sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state.frozen))
  whole, parts = (_trained("one device", num_micro_batches=n)[0].memory_analysis() for n in (1, 8))
  assert parts.temp_size_in_bytes < 0.5 * whole.temp_size_in_bytes


def test_losses_match_the_recorded_ones():
  """Micro-batches are compared with whole batches on these rows, so their numbers of targets must differ."""
  *_, losses = _trained("one device")
  batch = ROWS.take(ROWS.order(0, 0, 8))
  for kind in (KIND_VERIFY, KIND_SOLVE):
    assert len(set(((batch.kind == kind) * batch.weights).sum(axis=1).tolist())) > 2
  assert [one["loss"] for one in losses] == pytest.approx([8.591396, 7.566521, 7.101130, 6.535764], rel=1e-3)
  assert [one["grad_norm"] for one in losses] == pytest.approx([5.301626, 4.261647, 4.199170, 4.437280], rel=1e-3)


def test_cross_entropies_and_unified_losses_match_numpy_and_stay_finite():
  rng = np.random.default_rng(0)
  logits, targets = rng.normal(scale=3, size=(2, 4, 7)).astype(np.float32), rng.integers(7, size=(2, 4))
  exact = logits.astype(np.float64)
  probs = np.exp(exact) / np.exp(exact).sum(-1, keepdims=True)
  want = -np.log(np.take_along_axis(probs, targets[..., None], -1)[..., 0])
  np.testing.assert_allclose(loss_functions.cross_entropy(logits, targets), want, rtol=1e-5)
  half = loss_functions.cross_entropy(logits.astype(jnp.bfloat16), targets)
  assert half.dtype == jnp.float32
  np.testing.assert_allclose(half, want, atol=0.05)
  assert float(loss_functions.cross_entropy(jnp.array([[[1000.0, 0.0]]]), jnp.array([[0]]))[0, 0]) == 0

  labels, p = targets % 2, 1 / (1 + np.exp(-exact[..., 0]))
  want = -(labels * np.log(p) + (1 - labels) * np.log(1 - p))
  np.testing.assert_allclose(loss_functions.binary_cross_entropy(logits[..., 0], labels), want, rtol=1e-5)
  extreme = loss_functions.binary_cross_entropy(jnp.array([[200.0, -200.0, 200.0]]), jnp.array([[1, 1, 0]]))
  np.testing.assert_allclose(extreme, [[0, 200, 200]])
  full, none = ((6, 4), (20, 5)), (0, 0)
  for (verify, solve), weight, want in (
    *((full, 0.25, 2.5), (full, 0.0, 1.5), ((full[0], none), 0.5, 1.5)),
    *(((none, full[1]), 0.5, 2.0), ((none, none), 0.5, 0.0)),
  ):
    given = jax.tree.map(jnp.float32, {"loss_verify": verify, "loss_solve": solve})
    loss, sums = loss_functions.unified(given, weight)
    assert float(loss) == want
    assert jax.tree.map(float, sums) == {"loss": (want, 1), "loss_verify": verify, "loss_solve": solve}
    gradient = jax.grad(lambda sums, weight=weight: loss_functions.unified(sums, weight)[0])(given)
    assert all(np.isfinite(g) for g in jax.tree.leaves(gradient))


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


def test_warm_up_is_linear_decay_a_cosine_and_invalid_settings_are_refused():
  schedule = optim.schedule(OptimConfig(learning_rate=0.5, num_steps=100, warmup_steps=20, final_fraction=0.1))
  assert [float(schedule(s)) for s in (0, 10, 20, 60, 100)] == pytest.approx([0.0, 0.25, 0.5, 0.275, 0.05], abs=1e-6)
  invalid = {"warmup_steps": 10, "num_steps": 0, "weight_decay": -0.1, "final_fraction": 1.5, "clip_norm": 0.0}
  for name, value in {**invalid, "learning_rate": float("inf"), "beta1": 1.0, "beta2": -0.1}.items():
    refused((name, partial(OptimConfig, **{"learning_rate": 0.1, "num_steps": 10, name: value})))
