"""Trains one model of a run: packs examples into rows, then fits parameters to them.

rows = write_rows(run, name, examples)          rows_<name>/: written once, read by every process
loss = verifier.loss(model, rows.counts, ...)
fit(run, name, loss, rows)                      checkpoints/<name>/ and metrics/<name>.jsonl
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from genrm_jax.data import jsonl, packing, row_file
from genrm_jax.data.packing import Example
from genrm_jax.data.row_file import RowFile
from genrm_jax.model import gemma, lora
from genrm_jax.pipeline import shipped, trained
from genrm_jax.pipeline.run import Run
from genrm_jax.runtime import distributed, sharding
from genrm_jax.runtime.progress import say
from genrm_jax.training import compact, loop, saved
from genrm_jax.training.losses import LossFn
from genrm_jax.verifiers.base import TargetCounts, Verifier


class TrainingRows(NamedTuple):
  """Packed rows for one model, in files from which each process reads its own share."""

  train: RowFile
  val: RowFile
  counts: TargetCounts
  digest: str  # of the training rows; identifies the data in the checkpoint manifest


def train_verifier(run: Run, name: str) -> None:
  """Trains one verifier, after the gate has checked its verdict tokens; or takes adapters of the package."""
  if take_shipped(run, name):
    return
  verifier = run.verifier(name)
  examples = {split: _verifier_examples(run, verifier, split) for split in ("train", "val")}
  examples["train"] = with_gaps(run, examples["train"])
  rows = write_rows(run, name, examples)
  loss = verifier.loss(run.model, rows.counts, run.remat(name))
  fit(run, name, loss, rows, verifier)


def take_shipped(run: Run, name: str) -> bool:
  """Copies the adapters `shipped` of the settings into checkpoints/<name>, instead of training; False if none are set.

  Raises:
    UserError: no such adapters, or they belong to another model or use other prompts.
  """
  if not (source := run.training(name).get("shipped", "")):
    return False
  (step,) = saved.find(shipped.resolve(source))
  manifest = saved.read_manifest(step)
  kind = run.config.verifiers[name].get("kind", name) if name in run.config.verifiers else None
  found = manifest | {"kind": manifest["verifier"] and manifest["verifier"]["kind"]}
  saved.check_manifest(found, run.identity() | {"kind": kind}, step)
  distributed.from_main(lambda: compact.copy(step, run.path("checkpoints", name, str(manifest["step"]))))
  say(f"{name}: adapters {source} of the package, trained for {manifest['step']} steps; nothing was trained here")
  return True


def _verifier_examples(run: Run, verifier: Verifier, split: str) -> Iterator[Example]:
  """Reads the records lazily: only process 0 consumes the examples."""
  yield from verifier.examples(run.labelled(split, verifier.settings.get("max_problems", 0)))


def with_gaps(run: Run, examples: Iterable[Example]) -> Iterator[Example]:
  """Adds random position gaps after the characters in `config.gaps`, if any; see packing.with_gaps."""
  gaps = run.config.get("gaps", {})
  limits = {run.tokenizer.encode(char)[0]: gap for chars, gap in gaps.items() for char in chars}
  rng = run.rng("gaps")
  for example in examples:
    yield packing.with_gaps(example, limits, rng)


def held_out(run: Run, name: str, examples: Iterable[Example]) -> dict[str, Iterable[Example]]:
  """Splits off the first `num_eval_examples` as "val"; consume "train" first, which fills "val"."""
  first: list[Example] = []

  def rest() -> Iterator[Example]:
    for i, example in enumerate(examples):
      if i < run.training(name).num_eval_examples:
        first.append(example)
      else:
        yield example

  return {"train": rest(), "val": first}


def write_rows(run: Run, name: str, examples: Mapping[str, Iterable[Example]]) -> TrainingRows:
  """Packs the examples of "train" and "val" into rows_<name>/ on process 0.

  Also writes metrics/<name>.examples.json: number of examples, quantiles of their lengths in tokens, number left out.
  """
  files = {split: run.path(f"rows_{name}", f"{split}.npy") for split in ("train", "val")}

  def write() -> list[Any]:
    counts, digests, about = [], {}, {}
    for split, file in files.items():
      rows, about[split] = pack_rows(f"{name}, {split}", list(examples[split]), run.training(name))
      row_file.write(file, rows.num_rows, rows.take)
      counts.append(TargetCounts(rows.max_targets, rows.max_pairs))
      digests[split] = rows.digest
      if split == "train":
        filled = rows.data.segments.astype(bool).mean()
        length = run.training(name).row_length
        say(f"{name}: {rows.num_examples} examples in {rows.num_rows} rows of {length} tokens, {filled:.0%} filled")
      del rows
    jsonl.write_json(run.path("metrics", f"{name}.examples.json"), about)
    return [max(c.max_targets for c in counts), max(c.max_pairs for c in counts), digests["train"]]

  max_targets, max_pairs, digest = distributed.from_main(write)
  counts = TargetCounts(max_targets, max_pairs)
  return TrainingRows(RowFile(files["train"]), RowFile(files["val"]), counts, digest)


def pack_rows(
  what: str, examples: list[Example], config: ml_collections.ConfigDict
) -> tuple[packing.Rows, dict[str, Any]]:
  """Packed rows and statistics of the examples. With `drop_long`, those longer than a row are dropped and counted."""
  lengths = [len(e.tokens) for e in examples]
  fitting = [e for e, n in zip(examples, lengths, strict=True) if n <= config.row_length or not config.drop_long]
  about = {
    "examples": len(examples),
    "left_out": len(examples) - len(fitting),
    "row_length": config.row_length,
    "tokens": {f"{q}%": int(np.percentile(lengths, q)) for q in (50, 90, 99, 100)} if lengths else {},
  }
  if config.drop_long:
    say(f"{what}: left out {about['left_out']} of {len(examples)} examples, longer than {config.row_length} tokens")
  return packing.pack(fitting, config.row_length), about


def fit(run: Run, name: str, loss: LossFn, rows: TrainingRows, verifier: Verifier | None = None) -> None:
  """Trains the model `name` on packed rows, then deletes the row files."""
  config, mesh, adapters = run.train_config(name), run.mesh, run.adapters(name)
  start = [run.init_params(name, mesh)]
  train_rows, val_rows = rows.train, rows.val
  if verifier is not None:
    train_rows, val_rows = (
      verifier.with_reference(r, rows.counts, start[0], run.model, mesh, config.micro_batch_size)
      for r in (train_rows, val_rows)
    )
  loop.fit(
    name,
    loss,
    start.pop(),  # leaves no reference here, so that the initial parameters can be freed
    trained.param_shardings(run.model, adapters, mesh),
    train_rows,
    val_rows,
    config,
    sharding.batch_sharding(mesh, run.model.rules),
    manifest={**run.manifest(name), "data": rows.digest},
    workdir=run.workdir,
    files=[run.path("tokenizer.model")] if run.config.tokenizer.type == "sentencepiece" else [],
    norm_mask=lora.split(gemma.norm_mask(run.model, adapters))[0],
  )
  distributed.from_main(run.path(f"rows_{name}").rmtree)
