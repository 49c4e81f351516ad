"""The update is the same on every mesh, compiled once, in place, also of adapters alone; its numbers do not drift."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genrm_jax import verifiers
from genrm_jax.data.packing import pack, sft_example
from genrm_jax.model import gemma, lora
from genrm_jax.model.config import get_config
from genrm_jax.pytrees import KIND_SOLVE, KIND_VERIFY, TrainState
from genrm_jax.runtime import sharding
from genrm_jax.train import optim, step

CONFIG = get_config(
  "tiny_gemma1", num_layers=1, embed_dim=32, ffw_dim=64, num_heads=4, num_kv_heads=1, head_dim=8, query_scale=8**-0.5
)
MESHES = {"one device": {}, "data": {"data": 8}, "fsdp": {"fsdp": 8}, "all": {"data": 2, "fsdp": 2, "tensor": 2}}
OPTIM = optim.OptimConfig(learning_rate=3e-3, num_steps=50, weight_decay=0.1)
NUM_STEPS = 4
LORA = lora.LoraConfig(rank=2, alpha=4.0, targets=("q", "k", "attn_out", "down"))


@functools.cache
def _rows():
  """Counting up and down in packed rows: something to learn."""
  rng = np.random.default_rng(0)
  examples = []
  for i in range(32):
    start, n = int(rng.integers(20, 100)), int(rng.integers(4, 9))
    by = 1 if i % 2 else -1
    ids = start + by * np.arange(n)
    examples.append(sft_example(f"{i}", ids[:2], ids[2:], KIND_SOLVE if i % 4 == 0 else KIND_VERIFY))
  return pack(examples, 16)


def _batch():
  """Of the first step."""
  return _rows().take(_rows().order(0, 0, 8))


def _specs(adapted):
  return gemma.param_specs(CONFIG) | (lora.param_specs(CONFIG, LORA) if adapted else {})


@functools.cache
def _params(adapted=False):
  """As NumPy, so that no device is chosen yet and the numbers depend on no version's random bits."""
  rng = np.random.default_rng(1)

  def fill(path, spec):
    std = 0.1 if path[-1].key.endswith("norm") else spec.shape[-1] ** -0.5
    return rng.normal(scale=std, size=spec.shape).astype(np.float32)

  params = jax.tree_util.tree_map_with_path(fill, gemma.param_specs(CONFIG))
  if not adapted:
    return params
  adapters = jax.tree_util.tree_map_with_path(fill, lora.param_specs(CONFIG, LORA)["lora"])
  return {**params, "lora": adapters, "lora_scale": np.float32(2)}


@functools.cache
def _trained(mesh_name, adapted=False, num_micro_batches=1):
  """The compiled step, its shardings, the state before and after `NUM_STEPS` updates, and the losses."""
  devices = jax.devices()[:1] if mesh_name == "one device" else jax.devices()[:8]
  mesh = sharding.make_mesh(**MESHES[mesh_name], devices=devices)
  where = sharding.param_shardings(_specs(adapted), mesh, CONFIG.rules)
  optimizer = optim.make_optimizer(OPTIM)
  rows = _rows()
  params, frozen = lora.split(_params(adapted))
  with jax.set_mesh(mesh):
    abstract = jax.eval_shape(lambda: step.init_state(params, optimizer, frozen))
    shardings = step.state_shardings(abstract, where, mesh)
    first = jax.device_put(step.init_state(params, optimizer, frozen), shardings)
    loss_fn = verifiers.sft_loss(CONFIG, rows.max_targets, 0.5)
    train_step = step.make_train_step(loss_fn, optimizer, mesh, shardings, num_micro_batches)
    state, losses = first, []
    for i in range(NUM_STEPS):
      state, sums = train_step(
        state, sharding.read_to_global(rows.take, rows.order(0, i, 8), sharding.batch_sharding(mesh))
      )
      losses.append({name: float(total) / float(count) for name, (total, count) in jax.device_get(sums).items()})
  return train_step, shardings, first, state, losses


HOW = [*((name, False, 1) for name in MESHES), ("all", True, 1), ("one device", False, 8), ("all", False, 2)]


def test_rows_have_different_numbers_of_targets():
  batch = _batch()
  for kind in (KIND_VERIFY, KIND_SOLVE):
    assert len(set(((batch.kind == kind) * batch.weights).sum(axis=1).tolist())) > 2


@pytest.mark.parametrize(("mesh_name", "adapted", "num_micro_batches"), HOW)
def test_every_mesh_trains_alike(mesh_name, adapted, num_micro_batches):
  *_, want, want_losses = _trained("one device", adapted)
  *_, got, losses = _trained(mesh_name, adapted, num_micro_batches)
  assert [sorted(one) for one in losses] == [["grad_norm", "loss", "loss_solve", "loss_verify"]] * NUM_STEPS
  for one, other in zip(losses, want_losses, strict=True):
    assert one == pytest.approx(other, rel=1e-4)
  error = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), got.params, want.params)
  assert max(jax.tree.leaves(error)) < 1e-5, error
  assert int(got.step) == NUM_STEPS


@pytest.mark.parametrize(("mesh_name", "adapted", "num_micro_batches"), HOW)
def test_the_step_is_compiled_once_and_its_state_donated(mesh_name, adapted, num_micro_batches):
  train_step, _, first, _, _ = _trained(mesh_name, adapted, num_micro_batches)
  assert train_step._cache_size() == 1
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first))


@pytest.mark.parametrize("mesh_name", MESHES)
def test_moments_lie_as_their_parameters(mesh_name):
  _, shardings, _, state, _ = _trained(mesh_name)
  moments = [s for s in jax.tree.leaves(state.opt_state, is_leaf=_has_moments) if _has_moments(s)]
  assert len(moments) == 1
  for tree in (state.params, moments[0].mu, moments[0].nu):
    jax.tree.map(lambda a, s: _check_sharding(a, s), tree, shardings.params)
  q = state.params["layers"]["q"]
  assert math.prod(q.sharding.shard_shape(q.shape)) * {"fsdp": 8, "all": 4}.get(mesh_name, 1) == q.size
  assert moments[0].count.sharding.is_fully_replicated and state.step.sharding.is_fully_replicated


def _has_moments(node):
  return hasattr(node, "mu")


def _check_sharding(array, where):
  assert array.sharding.is_equivalent_to(where, array.ndim), (array.sharding, where)


@pytest.mark.parametrize("mesh_name", ["one device", "all"])
def test_adapters_are_trained_and_nothing_else(mesh_name):
  _, shardings, _, state, losses = _trained(mesh_name, adapted=True)
  start = _params(adapted=True)
  assert list(state.params) == ["lora"] and state.frozen.keys() == start.keys() - {"lora"}
  for name, entry in state.frozen.items():
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), b), entry, start[name])
  jax.tree.map(_check_sharding, state.frozen, shardings.frozen)
  moved = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - b).min()), state.params["lora"], start["lora"])
  assert min(jax.tree.leaves(moved)) > 0, moved
  adapters = [a.shape for a in jax.tree.leaves(start["lora"])]
  assert [a.shape for a in jax.tree.leaves(state.opt_state) if a.ndim] == 2 * adapters
  assert losses[-1]["loss"] < losses[0]["loss"] - 0.1


def test_micro_batches_take_the_memory_of_a_part():
  def used(num_micro_batches):
    train_step, _, first, _, _ = _trained("one device", num_micro_batches=num_micro_batches)
    state = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), first)
    return train_step.lower(state, _batch()).compile().memory_analysis().temp_size_in_bytes

  assert used(8) < 0.5 * used(1)


def test_nothing_is_kept_for_the_gradients_of_what_is_frozen():
  """The memory of a step beside its state: all gradients, or next to nothing (here a part is one layer's weights)."""
  config = get_config("tiny_gemma1", num_layers=12, ffw_dim=512, dtype="bfloat16")
  batch = jax.tree.map(lambda a: a[:1, :8], _rows().data)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  optimizer = optim.make_optimizer(OPTIM)
  params = jax.eval_shape(lambda key: gemma.init(config, key), jax.random.key(0))
  adapters = jax.eval_shape(lambda key: lora.init(config, LORA, key), jax.random.key(0))
  where = jax.tree.map(lambda _: sharding.replicated(mesh), {**params, **adapters})

  def share_of_parameters(trained, frozen):
    state = jax.eval_shape(lambda *given: step.init_state(given[0], optimizer, given[1]), trained, frozen)
    shardings = step.state_shardings(state, where, mesh)
    train_step = step.make_train_step(verifiers.sft_loss(config, 4, 0.5), optimizer, mesh, shardings)
    used = train_step.lower(state, batch).compile().memory_analysis().temp_size_in_bytes
    return used / sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(params))

  assert share_of_parameters(params, {}) > 1
  assert share_of_parameters(*lora.split({**params, **adapters})) < 0.3


def test_losses_are_the_recorded_ones():
  *_, losses = _trained("one device")
  assert [one["loss"] for one in losses] == pytest.approx([8.314301, 7.774117, 7.648515, 7.162824], rel=1e-3)
  assert [one["grad_norm"] for one in losses] == pytest.approx([2.650266, 2.915913, 2.358401, 2.049113], rel=1e-3)


def test_eval_leaves_the_parameters_and_counts_every_target():
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  where = sharding.param_shardings(gemma.param_specs(CONFIG), mesh, CONFIG.rules)
  rows = _rows()
  with jax.set_mesh(mesh):
    params = jax.device_put(_params(), where)
    eval_step = step.make_eval_step(verifiers.sft_loss(CONFIG, rows.max_targets, 0.5), mesh, where)
    sums = eval_step(params, sharding.host_to_global(rows.take(np.arange(8)), sharding.batch_sharding(mesh)))
  counted = sum(float(sums[name][1]) for name in ("loss_verify", "loss_solve"))
  assert counted == rows.data.weights[:8].sum()
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))


def test_a_state_starts_at_step_zero():
  optimizer = optim.make_optimizer(OPTIM)
  state = step.init_state({"w": jnp.ones(3)}, optimizer)
  assert isinstance(state, TrainState) and int(state.step) == 0 and state.step.dtype == jnp.int32
