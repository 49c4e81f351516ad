"""One update as a jitted pure function over a mesh, compiled once, its state donated."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from genrm_jax.pytrees import TokenBatch, TrainState
from genrm_jax.runtime import sharding
from genrm_jax.train.losses import Counts, LossFn, Sums

Step = Callable[[TrainState, TokenBatch], tuple[TrainState, Sums]]


def init_state(params: Any, optimizer: optax.GradientTransformation, frozen: Any = None) -> TrainState:
  """The state before the first update of `params`; the loss sees `frozen` beside them, the optimiser does not.

  The optimiser's moments are float32, whatever the parameters are.
  """
  opt_state = optimizer.init(optax.tree.cast(params, jnp.float32))
  return TrainState(jnp.zeros((), jnp.int32), params, opt_state, {} if frozen is None else frozen)


def state_shardings(state: TrainState, param_shardings: Any, mesh: Mesh) -> TrainState:
  """Shardings of a state: the optimiser's moments lie as the parameters that they belong to, all else is replicated.

  Args:
    state: arrays or their shapes.
    param_shardings: of all parameters, trained and frozen.
    mesh: that they lie on.
  """
  replicated = NamedSharding(mesh, PartitionSpec())
  params = {name: param_shardings[name] for name in state.params}
  params_structure = jax.tree.structure(params)

  def is_params(node):
    return jax.tree.structure(node) == params_structure

  opt = jax.tree.map(lambda n: params if is_params(n) else replicated, state.opt_state, is_leaf=is_params)
  return TrainState(replicated, params, opt, {name: param_shardings[name] for name in state.frozen})


def make_train_step(
  loss_fn: LossFn,
  optimizer: optax.GradientTransformation,
  mesh: Mesh,
  shardings: TrainState,
  num_micro_batches: int = 1,
) -> Step:
  """A jitted `(state, batch) -> (state, sums)`; the state is donated, nothing is fetched to the host.

  `loss_fn` is given all parameters; gradients exist for the trained ones only. With micro-batches the rows of a batch
  go through the model in so many parts, one after another, for less memory; the update is that of the whole batch, also
  where the parts have different numbers of targets.
  """

  def gradients(state: TrainState, batch: TokenBatch, counts: Counts | None = None):
    def loss_of(params):
      return loss_fn(state.replace(params=params).all_params, batch, counts)

    (_, sums), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    # Constrained, or they come out whole on every fsdp shard.
    return jax.lax.with_sharding_constraint(grads, shardings.params), sums

  def accumulated(state: TrainState, batch: TokenBatch):
    # Of the forward pass that counts come from, nothing else is read, so none of it is compiled.
    counts = {name: count for name, (_, count) in loss_fn(state.all_params, batch)[1].items()}

    def body(total, part):
      part = jax.lax.with_sharding_constraint(part, sharding.batch_sharding(mesh))
      total = jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, gradients(state, part, counts))
      return total, None

    # Each part has some rows of every shard of the batch, which stay where they are.
    parts = jax.tree.map(lambda a: a.reshape(-1, num_micro_batches, *a.shape[1:]).swapaxes(0, 1), batch)
    grads = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), state.params)
    none = {name: (jnp.zeros(()), jnp.zeros(())) for name in counts}
    (grads, sums), _ = jax.lax.scan(body, (grads, none), parts)
    return grads, {**sums, "loss": (sums["loss"][0], jnp.ones(()))}

  def train_step(state: TrainState, batch: TokenBatch) -> tuple[TrainState, Sums]:
    grads, sums = gradients(state, batch) if num_micro_batches == 1 else accumulated(state, batch)
    grads = optax.tree.cast(grads, jnp.float32)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    grad_norm = optax.tree.norm(grads)
    sums = {**sums, "grad_norm": (grad_norm, jnp.ones(()))}
    return TrainState(state.step + 1, params, opt_state, state.frozen), sums

  return jax.jit(
    train_step,
    donate_argnums=0,
    in_shardings=(shardings, sharding.batch_sharding(mesh)),
    out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())),
  )


def make_eval_step(loss_fn: LossFn, mesh: Mesh, param_shardings: Any) -> Callable[[Any, TokenBatch], Sums]:
  """A jitted `(params, batch) -> sums`, of all parameters."""
  return jax.jit(
    lambda params, batch: loss_fn(params, batch)[1],
    in_shardings=(param_shardings, sharding.batch_sharding(mesh)),
    out_shardings=NamedSharding(mesh, PartitionSpec()),
  )
