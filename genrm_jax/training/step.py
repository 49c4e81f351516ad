"""One update as a jitted pure function over a mesh; it donates its state."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from genrm_jax.model import lora
from genrm_jax.pytrees import TokenBatch, TrainState
from genrm_jax.runtime import sharding
from genrm_jax.training.losses import Counts, LossFn, Sums


def init_state(params: Any, optimizer: optax.GradientTransformation, frozen: Any = None) -> TrainState:
  """The state before the first update.

  Args:
    params: trained. The optimizer's moments are float32 whatever their dtype.
    frozen: parameters that the loss reads and the optimizer does not see.
  """
  opt_state = optimizer.init(optax.tree.cast(params, jnp.float32))
  return TrainState(jnp.zeros((), jnp.int32), params, opt_state, {} if frozen is None else frozen)


def state_shardings(state: TrainState, param_shardings: Any, mesh: Mesh) -> TrainState:
  """Shardings of a state: the moments are sharded like their parameters, everything else is replicated.

  Args:
    state: arrays or their shapes.
    param_shardings: of all parameters, trained and frozen.
  """
  replicated = sharding.replicated(mesh)
  params = {name: param_shardings[name] for name in state.params}
  params_structure = jax.tree.structure(params)

  def is_params(node):
    return jax.tree.structure(node) == params_structure

  opt = jax.tree.map(lambda n: params if is_params(n) else replicated, state.opt_state, is_leaf=is_params)
  return TrainState(replicated, params, opt, {name: param_shardings[name] for name in state.frozen})


def abstract_state(
  params: Any, optimizer: optax.GradientTransformation, param_shardings: Any, mesh: Mesh
) -> TrainState:
  """The state before the first update as shapes with shardings; of `params` with adapters only these are trained."""
  state = jax.eval_shape(lambda trained, frozen: init_state(trained, optimizer, frozen), *lora.split(params))
  shardings = state_shardings(state, param_shardings, mesh)
  return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, shardings)


def make_train_step(
  loss_fn: LossFn,
  optimizer: optax.GradientTransformation,
  batch: NamedSharding,
  shardings: TrainState,
  num_micro_batches: int = 1,
) -> jax.stages.Wrapped:
  """A jitted `(state, batch) -> (state, sums)` that donates `state` and fetches nothing to the host.

  `loss_fn` receives all parameters; only the trained ones have gradients. With micro-batches the rows of a batch go
  through the model in that many parts, one after another, to save memory. The update is that of the whole batch even if
  the parts have different numbers of targets.
  """

  def gradients(state: TrainState, rows: TokenBatch, counts: Counts | None = None) -> tuple[Any, Sums]:
    def loss_of(params):
      return loss_fn(state.replace(params=params).all_params, rows, counts)

    (_, sums), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    # Without the constraint every fsdp shard holds the whole gradients.
    return jax.lax.with_sharding_constraint(grads, shardings.params), sums

  def accumulated(state: TrainState, rows: TokenBatch) -> tuple[Any, Sums]:
    # Only the counts of this forward pass are used, so XLA removes the rest of it.
    counts = {name: count for name, (_, count) in loss_fn(state.all_params, rows)[1].items()}

    def body(total, part):
      part = jax.lax.with_sharding_constraint(part, batch)
      total = jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, gradients(state, part, counts))
      return total, None

    # Strided, so that each part has rows of every batch shard and no row moves between devices.
    parts = jax.tree.map(lambda a: a.reshape(-1, num_micro_batches, *a.shape[1:]).swapaxes(0, 1), rows)
    grads = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), state.params)
    zeros = {name: (jnp.zeros(()), jnp.zeros(())) for name in counts}
    (grads, sums), _ = jax.lax.scan(body, (grads, zeros), parts)
    return grads, {**sums, "loss": (sums["loss"][0], jnp.ones(()))}

  def train_step(state: TrainState, rows: TokenBatch) -> tuple[TrainState, Sums]:
    grads, sums = gradients(state, rows) if num_micro_batches == 1 else accumulated(state, rows)
    grads = optax.tree.cast(grads, jnp.float32)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    sums = {**sums, "grad_norm": (optax.tree.norm(grads), jnp.ones(()))}
    return TrainState(state.step + 1, params, opt_state, state.frozen), sums

  return jax.jit(
    train_step,
    donate_argnums=0,
    in_shardings=(shardings, batch),
    out_shardings=(shardings, NamedSharding(batch.mesh, PartitionSpec())),
  )


def make_eval_step(loss_fn: LossFn, batch: NamedSharding, param_shardings: Any) -> jax.stages.Wrapped:
  """A jitted `(params, batch) -> sums` over all parameters."""

  def eval_step(params: Any, rows: TokenBatch) -> Sums:
    return loss_fn(params, rows)[1]

  replicated = NamedSharding(batch.mesh, PartitionSpec())
  return jax.jit(eval_step, in_shardings=(param_shardings, batch), out_shardings=replicated)
