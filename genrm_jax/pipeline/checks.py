"""Checks of a run's settings against each other and against the files that they name, before the first stage."""

import collections
from collections.abc import Sequence

from genrm_jax.checkpoints.tensor_map import CheckpointReader
from genrm_jax.data import rationales
from genrm_jax.model.config import get_config
from genrm_jax.pipeline.run import Run
from genrm_jax.runtime import sharding
from genrm_jax.runtime.errors import UserError
from genrm_jax.text.prompts import Prompter, make_format
from genrm_jax.text.tokenizer import CharTokenizer, Tokenizer, check_vocab
from genrm_jax.training import loop
from genrm_jax.verifiers.base import make_verifier


def check_run(run: Run) -> None:
  """Checks that settings agree with each other and with the files that they name, before the first stage.

  `settings.check` has checked each by itself.

  Raises:
    UserError: a setting contradicts another, or the data.
  """
  c = run.config
  if "report" in c:
    _check_report(run)
  if "verifiers" not in c:  # experiments that train nothing
    return
  found = run.pretrained  # a folder that is no checkpoint is refused here
  if not found:  # of the vocabulary, only its size is known later
    settings = {"dtype": c.model.dtype, "param_dtype": c.model.param_dtype, **c.model.overrides.to_dict()}
    get_config(c.model.size, **settings)
  sharding.check_rules("config.model.sharding", c.model.sharding.to_dict())
  make_format(c.prompts.to_dict())
  if run.verifier_names:
    _ = run.task
  if "grader" in c:
    rationales.Filter(c.grader.reading, c.grader.drop_leaks)
  for name in run.verifier_names:
    run.verifier_type(name)
  models = [n for n in ("base", "generator", "candidates", "grader") if n in c] + run.verifier_names
  for name in models:
    _check_training(run, name, models)
    if name in run.verifier_names:
      _check_scores_needed(run, name, models)
  _check_tokenizer(run, found)
  for name in ("grader", "candidates", "votes"):
    if name in c:
      limit = run.sample_config(name).max_new_tokens
      if limit >= c.engine.max_tokens:
        raise UserError(
          f"config.{name}.sample.max_new_tokens {limit} leaves no room for a prompt in config.engine.max_tokens "
          f"{c.engine.max_tokens}; lower the one or raise the other"
        )


def _check_training(run: Run, name: str, models: Sequence[str]) -> None:
  c = run.training(name)
  source = c.get("init_from", "")
  if source and source not in models:
    raise UserError(f"{name}.init_from is {source!r}, but the config trains no such model; choose from {models}")
  if c.get("lora") and c.lora.rank:
    run.adapters(name)  # refuses unknown targets
  if "optim" not in c:
    return
  run.train_config(name, sized=False)
  if run.config.model.param_dtype != "float32" and not run.adapters(name):
    raise UserError(
      f"{name}: trained parameters must be float32, but model.param_dtype is {run.config.model.param_dtype}; "
      "use model.dtype=bfloat16 with float32 parameters, or train adapters (lora.rank)"
    )
  frozen_is_saved = c.lora.save_frozen or source or run.config.model.checkpoint
  if run.adapters(name) and not frozen_is_saved:
    raise UserError(
      f"{name}: lora.save_frozen is false, but its frozen parameters are random and not saved elsewhere; set true"
    )


def _check_scores_needed(run: Run, name: str, models: Sequence[str]) -> None:
  """Checks that the verifiers whose scores `name` builds on come before it and start from the same model."""
  own = run.config.verifiers[name]
  for other in run.verifier_type(name).scores_needed(own):
    if other not in run.verifier_names or models.index(other) >= models.index(name):
      raise UserError(f"{name} builds on the scores of {other!r}; config.verifiers must have that before {name}")
    start = run.config.verifiers[other].get("init_from", "")
    if start != own.init_from:
      raise UserError(
        f"{name}.init_from is {own.init_from!r}, but its reference, the start of {other}, is {start!r}; set that"
      )


def check_training_devices(run: Run, name: str) -> None:
  """Checks that the available devices form `config.mesh`, and that they divide a batch evenly."""
  loop.check_batch_size(
    name, run.train_config(name, sized=False), sharding.batch_sharding(run.mesh, dict(run.config.model.sharding))
  )


def _check_tokenizer(run: Run, found: CheckpointReader | None) -> None:
  """Checks a given tokenizer; one that the run trains cannot be checked before."""
  c = run.config.tokenizer
  if c.type == "char":
    tokenizer: Tokenizer = CharTokenizer()
  elif given := run.given_tokenizer():
    tokenizer = given
  else:
    return
  prompter = Prompter(tokenizer, make_format(run.config.prompts.to_dict()))
  if found:
    check_vocab(tokenizer, found.config.vocab_size)
  for name in run.verifier_names:
    make_verifier(name, prompter, run.config.verifiers[name].to_dict())


def _check_report(run: Run) -> None:
  """Checks that there are as many candidates and votes as the report compares, as far as is known by now."""
  c = run.config
  if "votes" in c and max(c.report.ks) > c.votes.num_votes:
    raise UserError(
      f"config.report.ks goes up to {max(c.report.ks)}, but config.votes.num_votes is {c.votes.num_votes}; lower the "
      "one or raise the other"
    )
  if "candidates" in c and not c.get("bank") and max(c.report.ns) > c.candidates.num_eval + c.candidates.add_reference:
    raise UserError(
      f"config.report.ns goes up to {max(c.report.ns)}, but config.candidates.num_eval is {c.candidates.num_eval}; "
      "lower the one or raise the other"
    )
  if run.path("candidates", "eval.jsonl").exists():
    check_pools(run)


def check_pools(run: Run) -> None:
  """Checks the sizes of the pools that are evaluated against `config.report.ns`."""
  ns = run.config.report.ns
  for split in run.eval_splits if "verifiers" in run.config else ("eval",):
    if not run.path("candidates", f"{split}.jsonl").exists():
      continue
    sizes = collections.Counter(c.problem_id for c in run.candidates(split))
    if not sizes or max(ns) > max(sizes.values()):
      raise UserError(
        f"config.report.ns goes up to {max(ns)}, but no problem of split {split!r} has more than "
        f"{max(sizes.values(), default=0)} candidates; give more, or lower config.report.ns"
      )
