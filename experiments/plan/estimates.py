"""How long training and scoring take at least, from the config, the model and the chip's published rates."""

import dataclasses
import math
from collections.abc import Mapping

import ml_collections

from experiments.plan import costs, programs, sizes
from experiments.plan.costs import Training, Work
from experiments.plan.tpus import Slice
from genrm_jax.verifiers import Verifier

GSM8K_SOLUTIONS = 1_319 * 16  # the test problems, and the solutions to each

CAVEAT = (
  "Times are bounds by the chips' published rates, not measurements: nothing here has run on a TPU. Well tuned "
  "training reaches about half of the peak (MaxText tells of 55 to 60%), small batches less. Left out are compilation, "
  "the evaluations between steps, reading and saving checkpoints, and a host that waits."
)


@dataclasses.dataclass(frozen=True)
class Estimate:
  """The least time of something that is done many times.

  Attributes:
    what: for a reader.
    seconds: of one.
    limit: what limits it: compute, memory, links.
    flops: of one chip.
    tokens: that it reads or writes, on all chips that take part: those of a slice in training, of a host in scoring.
  """

  what: str
  seconds: float
  limit: str
  flops: float
  tokens: int


@dataclasses.dataclass(frozen=True)
class Total:
  """A whole piece of work, in hours."""

  what: str
  hours: float


def training_of(config: ml_collections.ConfigDict, verifier: Verifier) -> Training:
  """What of a verifier's training costs something."""
  settings = config.verifiers[verifier.name]
  return Training(
    rows=settings.loop.batch_size,
    row_length=settings.row_length,
    targets=sizes.max_targets(verifier, settings, sizes.lengths(config)),
    remat=settings.remat,
    num_micro_batches=settings.loop.num_micro_batches,
    trains_all=not settings.lora.rank,
  )


def training(
  config: ml_collections.ConfigDict, verifier: Verifier, where: Slice, mesh: Mapping[str, int]
) -> tuple[Estimate, Total]:
  """A training step, and all of them."""
  t = training_of(config, verifier)
  work = costs.train_work(sizes.model_config(config), t, mesh)
  step = _estimate("training step", work, where, t.rows * t.row_length)
  num_steps = config.verifiers[verifier.name].optim.num_steps
  return step, Total(f"{num_steps:,} training steps", num_steps * step.seconds / 3600)


def scoring(
  config: ml_collections.ConfigDict, verifier: Verifier, where: Slice, mesh: Mapping[str, int], num_solutions: int
) -> tuple[list[Estimate], Total]:
  """A host's batch of prompts (and a token in each row, where rationales are written), and all of so many solutions.

  Each vote is counted as if it were written alone; what votes have in common is written once.

  Args:
    config: of the run.
    verifier: which scores.
    where: the slice; the solutions are shared out over its hosts.
    mesh: of one host's engine.
    num_solutions: that are scored, by all hosts together.
  """
  of_a_host, host = math.ceil(num_solutions / where.num_hosts), where.of_one_host
  model, texts = sizes.model_config(config), sizes.lengths(config)
  rows, width = programs.rows_per_batch(config, mesh), programs.padded(config, texts.prompt)
  num_prompts = programs.prompts_per_read(rows, mesh) if verifier.writes_rationales else rows
  work = costs.read_work(model, num_prompts, width, mesh)
  read = _estimate(f"reading {num_prompts} prompts of {width} tokens", work, host, num_prompts * width)
  seconds = math.ceil(of_a_host / num_prompts) * read.seconds
  if not verifier.writes_rationales:
    return [read], Total(f"scoring {num_solutions:,} solutions", seconds / 3600)
  sampling = programs.sample_config(config, verifier)
  slots = programs.padded(config, texts.longest_prompt + sampling.max_new_tokens)
  work = costs.write_work(model, rows, slots, mesh)
  write = _estimate(f"writing a token in each of {rows} rows", work, host, rows)
  # Each time that some rows have ended, the cache is read and written anew, and others take their place.
  copy, _ = costs.least_seconds(Work(0, 2 * costs.cache_bytes_per_chip(model, rows, slots, mesh), 0), host)
  num_texts = of_a_host * config.votes.num_votes
  seconds += math.ceil(num_texts / rows) * texts.rationale * write.seconds
  seconds += math.ceil(num_texts / num_prompts) * copy
  return [read, write], Total(
    f"scoring {num_solutions:,} solutions x {config.votes.num_votes} votes of {texts.rationale} tokens", seconds / 3600
  )


def _estimate(what: str, work: Work, where: Slice, tokens: int) -> Estimate:
  seconds, limit = costs.least_seconds(work, where)
  return Estimate(what, seconds, limit, work.flops, tokens)
