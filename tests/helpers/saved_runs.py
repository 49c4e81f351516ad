"""Checkpoints as the experiments write them, of models that were not trained."""

import pathlib

import jax
import ml_collections
import numpy as np

from experiments.configs import gsm8k, last_letter
from genrm_jax.model import lora
from genrm_jax.pipeline.run import Run
from genrm_jax.text.tokenizer import train_sentencepiece
from genrm_jax.train import optim
from genrm_jax.train.checkpoint import Checkpoints
from genrm_jax.train.step import init_state

TEXTS = [f"Q: {i} apples and {i + 7} pears, how many? Is the answer correct (Yes/No)? Yes No\n" for i in range(200)]
DATA = "0123456789abcdef" * 4  # stands for the digest of rows


def run_of(workdir: pathlib.Path, task: str = "last_letter", **changes) -> Run:
  """A smoke run; `changes` by dotted key, with `__` for the dot."""
  module = {"last_letter": last_letter, "gsm8k": gsm8k}[task]
  config = module.get_config("smoke")
  config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
  workdir.mkdir(parents=True, exist_ok=True)
  run = Run(ml_collections.FrozenConfigDict(config), workdir)
  if task == "gsm8k" and not run.path("tokenizer.model").exists():
    train_sentencepiece(TEXTS, run.path("tokenizer.model"), 320)
  return run


def save(run: Run, name: str, step: int = 4, eval_loss: float = 1.0, scale: float = 1.0) -> pathlib.Path:
  """A step of the run called `name`, with its first parameters times `scale`; the folder of the run.

  Adapters are given numbers of their own: as they start, they change nothing.
  """
  params = jax.tree.map(lambda p: p * scale, run.init_params(name, run.mesh))
  if "lora" in params:
    rng = np.random.default_rng(0)
    params["lora"] = jax.tree.map(lambda p: p + 0.1 * rng.normal(size=p.shape).astype(p.dtype), params["lora"])
  trained, frozen = lora.split(params)
  optimizer = optim.make_optimizer(run.train_config(name).optim)
  state = init_state(trained, optimizer, frozen)
  state = state.replace(step=state.step + step)
  files = [run.path("tokenizer.model")] if run.config.tokenizer.type == "sentencepiece" else []
  verifier = name if name in run.config.verifiers else None
  with Checkpoints(run.path("checkpoints", name)) as checkpoints:
    manifest = {**run.manifest(name, verifier), "data": DATA}
    checkpoints.save(state, manifest, eval_loss, files, run.train_config(name).save_frozen)
  return run.path("checkpoints", name)
