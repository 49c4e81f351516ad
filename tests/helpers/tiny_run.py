"""A run of the training loop that takes no time: the logits of the next token are a row of a table."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from genrm_jax.data.packing import Rows, pack, sft_example
from genrm_jax.pytrees import KIND_SOLVE, KIND_VERIFY
from genrm_jax.runtime import sharding
from genrm_jax.train import loop, losses, optim

VOCAB = 16
NUM_STEPS, SAVE_EVERY, LOG_EVERY = 12, 4, 2
MANIFEST = {"model": {"vocab": VOCAB}, "data": "abc"}


def rows(seed: int, num_examples: int = 22) -> Rows:
  """Sequences that count up, in rows of 8."""
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


def train(workdir: pathlib.Path, train_rows=None, *, learning_rate: float = 0.1, manifest=MANIFEST, **changes):
  """Trains the run called "tiny" with the given rows; what it starts from is returned."""
  settings = {"batch_size": 4, "seed": 3, "log_every_steps": LOG_EVERY, "save_every_steps": SAVE_EVERY, **changes}
  on = mesh()
  where = {"w": sharding.replicated(on)}
  init = jax.device_put({"w": jnp.cos(jnp.arange(VOCAB * VOCAB, dtype=jnp.float32)).reshape(VOCAB, VOCAB)}, where)
  config = loop.TrainConfig(optim=optim.OptimConfig(learning_rate, NUM_STEPS, warmup_steps=3), **settings)
  loop.train("tiny", loss_fn, init, where, train_rows or rows(0), rows(1, 9), config, on, manifest, workdir)
  return init


class Killing:
  """Rows that end the run, by `kill()`, when it is asked for those of a step."""

  def __init__(self, at_step: int, kill):
    self.rows, self.at_step, self.kill = rows(0), at_step, kill
    self.num_rows, self.take = self.rows.num_rows, self.rows.take

  def order(self, seed: int, step: int, batch_size: int):
    if step == self.at_step:
      self.kill()
    return self.rows.order(seed, step, batch_size)
