"""The compiled training step of a loss, and the state that it starts from."""

import jax

from genrm_jax.model import gemma, lora
from genrm_jax.model.config import ModelConfig
from genrm_jax.runtime import sharding
from genrm_jax.training import optim, step


def prepare(config: ModelConfig, params, loss_fn, mesh, optimizer_config: optim.OptimConfig, adapters=None, micro=1):
  """(training step, state, shardings of the state, sharding of batches); of shapes, if `params` are shapes."""
  specs = gemma.param_specs(config) | (lora.param_specs(config, adapters) if adapters else {})
  optimizer, on = optim.make_optimizer(optimizer_config), sharding.batch_sharding(mesh)
  trained, frozen = lora.split(params)
  state = jax.eval_shape(lambda a, b: step.init_state(a, optimizer, b), trained, frozen)
  shardings = step.state_shardings(state, sharding.param_shardings(specs, mesh, config.rules), mesh)
  if not isinstance(jax.tree.leaves(params)[0], jax.ShapeDtypeStruct):
    with jax.set_mesh(mesh):
      state = jax.device_put(step.init_state(trained, optimizer, frozen), shardings)
  return step.make_train_step(loss_fn, optimizer, on, shardings, micro), state, shardings, on
