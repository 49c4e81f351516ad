"""A training run that takes a second: the logits of the next token are a row of a table."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from genrm_jax.data.packing import Rows, pack, sft_example
from genrm_jax.pytrees import KIND_SOLVE, KIND_VERIFY
from genrm_jax.runtime import sharding
from genrm_jax.training import loop, losses, optim

VOCAB = 16
NUM_STEPS, LOG_EVERY, EVAL_EVERY, SAVE_EVERY = 24, 2, 4, 8
MANIFEST = {"model": {"vocab": VOCAB}, "data": "abc"}


def rows(seed: int, num_examples: int = 22) -> Rows:
  rng = np.random.default_rng(seed)
  examples = []
  for i in range(num_examples):
    ids = (int(rng.integers(VOCAB)) + np.arange(int(rng.integers(3, 7)))) % VOCAB
    examples.append(sft_example(f"{i}", ids[:1], ids[1:], KIND_SOLVE if i % 3 == 0 else KIND_VERIFY))
  return pack(examples, 8)


def loss_fn(params, batch, counts=None):
  nll_BT = losses.cross_entropy(params["w"][batch.tokens], batch.targets)
  return losses.unified(losses.mean_by_kind(nll_BT, batch.weights, batch.kind), 0.5, counts)


def mesh() -> jax.sharding.Mesh:
  return sharding.make_mesh(devices=jax.devices()[:1])


def train(
  workdir: pathlib.Path,
  train_rows=None,
  eval_rows=None,
  *,
  on: jax.sharding.Mesh | None = None,
  learning_rate: float = 0.1,
  manifest=MANIFEST,
  dtype=jnp.float32,
  **settings,
):
  """Trains the run called "tiny"; returns the parameters that it started from."""
  on = on or mesh()
  cadences = {"log_every_steps": LOG_EVERY, "eval_every_steps": EVAL_EVERY, "save_every_steps": SAVE_EVERY}
  settings = {"batch_size": 4, "seed": 3, "best_by": "loss_verify", **cadences, **settings}
  config = loop.TrainConfig(optim=optim.OptimConfig(learning_rate, NUM_STEPS, warmup_steps=3), **settings)
  shardings = {"w": sharding.replicated(on)}
  init = jax.device_put({"w": jnp.cos(jnp.arange(VOCAB * VOCAB, dtype=dtype)).reshape(VOCAB, VOCAB)}, shardings)
  train_rows, eval_rows = train_rows or rows(0), eval_rows or rows(1, 9)
  batch = sharding.batch_sharding(on)
  loop.fit("tiny", loss_fn, init, shardings, train_rows, eval_rows, config, batch, manifest=manifest, workdir=workdir)
  return init


class CallAt:
  """Rows that call `act()` when training asks for the batch of a step."""

  def __init__(self, at_step: int, act):
    self.rows, self.at_step, self.act = rows(0), at_step, act
    self.num_rows, self.take = self.rows.num_rows, self.rows.take

  def order(self, seed: int, step: int, batch_size: int):
    if step == self.at_step:
      self.act()
    return self.rows.order(seed, step, batch_size)
