"""Runs of the smoke configs, and checkpoints as they write them, of models that were not trained."""

import importlib
import pathlib

import jax
import ml_collections
import numpy as np
from etils import epath

from genrm_jax.model import lora
from genrm_jax.pipeline.run import Run
from genrm_jax.text.tokenizer import train_sentencepiece
from genrm_jax.training import optim
from genrm_jax.training.checkpoint import Checkpoints
from genrm_jax.training.step import init_state

TEXTS = [f"Q: {i} apples and {i + 7} pears, how many? Is the answer correct (Yes/No)? Yes No\n" for i in range(200)]
DATA = "0123456789abcdef" * 4  # stands for the digest of rows


def run_of(workdir: pathlib.Path, task: str = "last_letter", variant: str = "smoke", **changes) -> Run:
  """A run; `changes` by dotted key, with `__` for the dot."""
  config = importlib.import_module(f"experiments.configs.{task}").get_config(variant)
  config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
  return Run(ml_collections.FrozenConfigDict(config), epath.Path(workdir))


def with_tokenizer(run: Run) -> Run:
  """The run with a small SentencePiece file in its workdir, where it needs one."""
  if run.config.tokenizer.type == "sentencepiece" and not run.path("tokenizer.model").exists():
    run.workdir.mkdir(parents=True, exist_ok=True)
    train_sentencepiece(TEXTS, run.path("tokenizer.model"), 320)
  return run


def save(run: Run, name: str, step: int = 4, eval_loss: float = 1.0, scale: float = 1.0) -> epath.Path:
  """A step of the training called `name`, with its first parameters times `scale`; the folder of the training.

  Adapters are given numbers of their own: as they start, they change nothing.
  """
  with_tokenizer(run)
  params = jax.tree.map(lambda p: p * scale, run.init_params(name, run.mesh))
  if "lora" in params:
    rng = np.random.default_rng(0)
    params["lora"] = jax.tree.map(lambda p: p + 0.1 * rng.normal(size=p.shape).astype(p.dtype), params["lora"])
  trained, frozen = lora.split(params)
  optimizer = optim.make_optimizer(run.train_config(name).optim)
  state = init_state(trained, optimizer, frozen)
  state = state.replace(step=state.step + step)
  files = [run.path("tokenizer.model")] if run.config.tokenizer.type == "sentencepiece" else []
  with Checkpoints(run.path("checkpoints", name)) as checkpoints:
    manifest = {**run.manifest(name), "data": DATA, "best_by": run.train_config(name).best_by}
    checkpoints.save(state, manifest, eval_loss, files, run.train_config(name).save_frozen)
  return run.path("checkpoints", name)


def check_order(stages) -> None:
  """Asserts that every stage reads what earlier ones write, and that no file has two writers."""
  made: set[str] = set()
  for stage in stages:
    assert set(stage.reads) <= made, stage.name
    assert stage.writes and not made & set(stage.writes), stage.name
    made |= set(stage.writes)
