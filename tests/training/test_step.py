"""The update is the same on every mesh and with adapters, donates its state, and gives the recorded numbers."""

import functools
import math

import jax
import numpy as np
import pytest
import tiny_run
from random_params import random_params

from genrm_jax.model import gemma, lora
from genrm_jax.model.config import get_config
from genrm_jax.pytrees import KIND_SOLVE, KIND_VERIFY
from genrm_jax.runtime import sharding
from genrm_jax.training import optim, step
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
  """The compiled step, its shardings, the state before and after `NUM_STEPS` updates, and the losses."""
  shape = {"one device": {}, "eight": {"data": 2, "fsdp": 2, "tensor": 2}}[mesh_name]
  mesh = sharding.make_mesh(**shape, devices=jax.devices()[: 8 if shape else 1])
  specs = gemma.param_specs(CONFIG) | (lora.param_specs(CONFIG, LORA) if adapted else {})
  optimizer, batch = optim.make_optimizer(OPTIM), sharding.batch_sharding(mesh)
  params, frozen = lora.split(_params(adapted))
  with jax.set_mesh(mesh):
    abstract = jax.eval_shape(lambda: step.init_state(params, optimizer, frozen))
    shardings = step.state_shardings(abstract, sharding.param_shardings(specs, mesh, CONFIG.rules), mesh)
    first = jax.device_put(step.init_state(params, optimizer, frozen), shardings)
    loss_fn = sft_loss(CONFIG, ROWS.max_targets, 0.5)
    jitted = step.make_train_step(loss_fn, optimizer, batch, shardings, num_micro_batches)
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


def test_moments_are_sharded_like_their_parameters():
  _, shardings, _, state, _ = _trained("eight")
  (moments,) = [s for s in jax.tree.leaves(state.opt_state, is_leaf=lambda n: hasattr(n, "mu")) if hasattr(s, "mu")]
  for tree in (state.params, moments.mu, moments.nu):
    _check_shardings(tree, shardings.params)
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


def test_micro_batches_take_a_part_of_the_memory():
  whole, parts = (_trained("one device", num_micro_batches=n)[0].memory_analysis() for n in (1, 8))
  assert parts.temp_size_in_bytes < 0.5 * whole.temp_size_in_bytes


def test_frozen_parameters_have_no_gradients_in_memory():
  """All gradients would be as large as the parameters; one layer's weights are a twelfth of that."""
  config = get_config("tiny_gemma1", num_layers=12, ffw_dim=512, dtype="bfloat16")
  rows = jax.tree.map(lambda a: a[:1], ROWS.data)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  optimizer, batch = optim.make_optimizer(OPTIM), sharding.batch_sharding(mesh)
  params = jax.eval_shape(lambda key: gemma.init(config, key) | lora.init(config, LORA, key), jax.random.key(0))
  trained, frozen = lora.split(params)
  state = jax.eval_shape(lambda *given: step.init_state(given[0], optimizer, given[1]), trained, frozen)
  shardings = step.state_shardings(state, jax.tree.map(lambda _: sharding.replicated(mesh), params), mesh)
  train_step = step.make_train_step(sft_loss(config, 4, 0.5), optimizer, batch, shardings)
  used = train_step.lower(state, rows).compile().memory_analysis().temp_size_in_bytes
  assert used < 0.3 * sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(frozen))


def test_losses_match_the_recorded_ones():
  """Micro-batches are compared with whole batches on these rows, so their numbers of targets must differ."""
  *_, losses = _trained("one device")
  batch = ROWS.take(ROWS.order(0, 0, 8))
  for kind in (KIND_VERIFY, KIND_SOLVE):
    assert len(set(((batch.kind == kind) * batch.weights).sum(axis=1).tolist())) > 2
  assert [one["loss"] for one in losses] == pytest.approx([8.591396, 7.566521, 7.101130, 6.535764], rel=1e-3)
  assert [one["grad_norm"] for one in losses] == pytest.approx([5.301626, 4.261647, 4.199170, 4.437280], rel=1e-3)
