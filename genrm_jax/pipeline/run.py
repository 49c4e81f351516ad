"""A run: one workdir and its config, and what its stages share."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath

import genrm_jax
from genrm_jax import verifiers
from genrm_jax.checkpoints import pretrained as weights
from genrm_jax.checkpoints import tensor_map
from genrm_jax.data import jsonl, packing, row_file
from genrm_jax.data.row_file import RowFile
from genrm_jax.infer.engine import Engine
from genrm_jax.infer.sampling import SampleConfig
from genrm_jax.model import gemma, lora
from genrm_jax.model.config import ModelConfig, get_config
from genrm_jax.pipeline import trained
from genrm_jax.records import Candidate, Problem, Rationale
from genrm_jax.runtime import distributed, sharding
from genrm_jax.runtime.errors import UserError
from genrm_jax.runtime.progress import say
from genrm_jax.text.prompts import Prompter, get_format
from genrm_jax.text.tokenizer import CharTokenizer, SentencePieceTokenizer, Tokenizer, check_vocab
from genrm_jax.train import loop, losses, optim


@dataclasses.dataclass(frozen=True)
class Run:
  """One workdir and its config; opens what the stages share when it is first needed."""

  config: ml_collections.ConfigDict
  workdir: epath.Path

  @functools.cached_property
  def tokenizer(self) -> Tokenizer:
    """The built-in one, or the SentencePiece file of this workdir (stage tokenizer)."""
    if self.config.tokenizer.type == "char":
      return CharTokenizer()
    return SentencePieceTokenizer(self.path("tokenizer.model"))

  @functools.cached_property
  def prompter(self) -> Prompter:
    return Prompter(self.tokenizer, get_format(self.config.prompt_format))

  @functools.cached_property
  def pretrained(self) -> tensor_map.CheckpointReader | None:
    """The Gemma checkpoint that the config names, opened and not read; None for a model from scratch."""
    path = self.config.model.checkpoint
    return weights.open_checkpoint(path) if path else None

  @functools.cached_property
  def model(self) -> ModelConfig:
    """The checkpoint's model; or one of the config's size with the tokenizer's vocabulary."""
    c = self.config.model
    dtypes = {"dtype": c.dtype, "param_dtype": c.param_dtype}
    if self.pretrained:
      check_vocab(self.tokenizer, self.pretrained.config.vocab_size)
      return ModelConfig.from_dict(self.pretrained.config.to_dict() | dtypes)
    return get_config(c.size, vocab_size=self.tokenizer.vocab_size, **dtypes, **c.overrides.to_dict())

  @functools.cached_property
  def mesh(self) -> jax.sharding.Mesh:
    """The devices of all processes, for training."""
    return sharding.make_mesh(**self.config.mesh.to_dict())

  @functools.cached_property
  def engine_mesh(self) -> jax.sharding.Mesh:
    """The devices of this process, for sampling and scoring."""
    return sharding.make_mesh(**self.config.engine.mesh.to_dict(), devices=jax.local_devices())

  def path(self, *parts: str) -> epath.Path:
    return self.workdir.joinpath(*parts)

  @property
  def verifier_names(self) -> list[str]:
    """Those of the config, in the order of the paper's tables."""
    for name in self.config.verifiers:
      verifiers.get_verifier(name)
    return [name for name in verifiers.VERIFIERS if name in self.config.verifiers]

  @property
  def eval_splits(self) -> list[str]:
    """Those whose candidates are scored: "eval", and problems like the training ones where the task has them."""
    return [split for split in ("eval", "in_distribution") if split == "eval" or split in self.config.task]

  def scores_file(self, name: str, split: str) -> str:
    """Where a verifier's scores of a split are, in the workdir."""
    return f"scores/{name}.jsonl" if split == "eval" else f"scores/{split}/{name}.jsonl"

  def training(self, name: str) -> ml_collections.ConfigDict:
    """The config of the base, the generator or a verifier."""
    return self.config.verifiers[name] if name in self.config.verifiers else self.config[name]

  def train_config(self, name: str) -> loop.TrainConfig:
    """How the base, the generator or a verifier is trained."""
    c = self.training(name)
    optimizer = optim.OptimConfig(**c.optim.to_dict())
    return loop.TrainConfig(optimizer, seed=self.config.seed, save_frozen=c.lora.save_frozen, **c.loop.to_dict())

  def adapters(self, name: str) -> lora.LoraConfig | None:
    """Those of the base, the generator or a verifier; None where all parameters are trained (rank 0)."""
    c = self.training(name).lora
    return lora.LoraConfig(c.rank, c.alpha, tuple(c.targets)) if c.rank else None

  def sample_config(self, name: str) -> SampleConfig:
    """How candidates or votes are sampled."""
    return SampleConfig(**self.config[name].sample.to_dict())

  def check_settings(self) -> None:
    """UserError now for a setting that would only be refused when its stage begins."""
    trained = [name for name in self.verifier_names if verifiers.get_verifier(name).is_trained]
    for name in ("base", "generator", *trained):
      if name in self.config or name in self.config.verifiers:
        self.train_config(name)
        if self.adapters(name) and not self.training(name).lora.save_frozen and not self._base_of(name):
          raise UserError(
            f"{name}: lora.save_frozen is false, but it starts from random numbers, which are saved nowhere"
          )
    for name in ("grader", "candidates", "votes"):
      if name in self.config:
        self.sample_config(name)
    get_format(self.config.prompt_format)
    pretrained = self.pretrained
    if self.config.tokenizer.type == "sentencepiece" and self.config.tokenizer.path:
      tokenizer = SentencePieceTokenizer(self.config.tokenizer.path)
      Prompter(tokenizer, get_format(self.config.prompt_format))
      if pretrained:
        check_vocab(tokenizer, pretrained.config.vocab_size)

  # Records.

  def problems(self, split: str) -> list[Problem]:
    return jsonl.read_records(self.path("problems", f"{split}.jsonl"), Problem)

  def candidates(self, split: str) -> list[Candidate]:
    return jsonl.read_records(self.path("candidates", f"{split}.jsonl"), Candidate)

  def rationales(self, split: str) -> list[Rationale]:
    return jsonl.read_records(self.path("rationales", f"{split}.jsonl"), Rationale)

  def write_rationales(self, split: str, records: Sequence[Rationale]) -> None:
    jsonl.write_records(self.path("rationales", f"{split}.jsonl"), records)

  # Models.

  def _identity(self) -> dict[str, Any]:
    """What runs that build on each other share: parameters mean the same, a verdict is asked for in the same way."""
    return {
      "model": self.model.to_dict(),
      "prompts": dataclasses.asdict(self.prompter.format),
      "verdict_ids": {"yes": self.prompter.yes_id, "no": self.prompter.no_id, "cls": self.tokenizer.cls_id},
      "tokenizer": {"digest": self.tokenizer.digest},
    }

  def manifest(self, name: str, verifier: str | None) -> dict[str, Any]:
    """What a checkpoint of this run says of itself. A file is named without its folder: it lies in the checkpoint."""
    tokenizer = self.tokenizer.spec()
    if "path" in tokenizer:
      tokenizer["path"] = epath.Path(tokenizer["path"]).name
    adapters = self.adapters(name)
    scoring = None
    if verifier is not None:
      by_votes = verifiers.get_verifier(verifier).writes_rationales
      scoring = {
        "num_votes": self.config.votes.num_votes if by_votes else 1,
        "sample": self.config.votes.sample.to_dict(),
        "max_tokens": self.config.engine.max_tokens,
      }
    return {
      **self._identity(),
      "code_version": genrm_jax.__version__,
      "task": self.config.task.name,
      "run": name,
      "init_from": self.training(name).init_from or self.config.model.checkpoint or "random numbers",
      "lora": None if adapters is None else {**dataclasses.asdict(adapters), "targets": list(adapters.targets)},
      "verifier": verifier,
      "tokenizer": tokenizer,
      "scoring": scoring,
    }

  def _base_of(self, name: str) -> Any:
    """What a run starts from: the folder of another run, or the Gemma checkpoint; None for random numbers."""
    source = self.training(name).init_from
    return self.path("checkpoints", source) if source else self.config.model.checkpoint or None

  def init_params(self, name: str, mesh: jax.sharding.Mesh) -> Any:
    """What the run called `name` starts from: another run's best, the Gemma checkpoint, or random numbers."""
    source, adapters = self.training(name).init_from, self.adapters(name)
    if source:
      params, _ = self.load_params(source, mesh)
    elif self.pretrained:
      params = tensor_map.place(self.pretrained, mesh, self.model)
    else:
      shardings = trained.param_shardings(self.model, None, mesh)
      params = jax.jit(lambda key: gemma.init(self.model, key), out_shardings=shardings)(
        jax.random.key(self.config.seed)
      )
    if adapters is None:
      return params
    shardings = trained.param_shardings(self.model, adapters, mesh)
    added = {entry: shardings[entry] for entry in lora.param_specs(self.model, adapters)}
    make = jax.jit(lambda key: lora.init(self.model, adapters, key), out_shardings=added)
    return {**params, **make(jax.random.key(self.config.seed))}

  def load_params(self, name: str, mesh: jax.sharding.Mesh) -> tuple[Any, int]:
    """The best parameters of a finished run, on a mesh, and their step."""
    opened = trained.open_run(self.path("checkpoints", name), self._base_of(name), mesh, self._identity())
    return opened.params, opened.manifest["step"]

  def engine(self, params: Any) -> Engine:
    """Samples and scores with parameters that lie on `engine_mesh`."""
    c = self.config.engine
    return Engine(
      gemma.as_used(params, self.model),
      self.model,
      self.engine_mesh,
      self.prompter.end_id,
      c.rows_per_batch,
      c.max_tokens,
    )

  def train(
    self,
    name: str,
    make_examples: Callable[[], dict[str, list[packing.Example]]],
    make_loss: Callable[[int], losses.LossFn],
    config: ml_collections.ConfigDict,
    verifier: str | None = None,
    prepare: Callable[[RowFile, int, Any], RowFile] = lambda rows, max_targets, params: rows,
  ) -> None:
    """Packs examples and trains the run called `name`.

    Of many processes the first makes the examples, and leaves their rows in a file while the run is trained; each reads
    from it what its own devices hold.

    Args:
      name: of the run.
      make_examples: gives those to train on ("train") and held out ("val").
      make_loss: is given the most targets that a row has.
      config: how it is trained.
      verifier: what kind of verifier it is, if it is one.
      prepare: is given rows, the most targets of one and the parameters that training starts from, and gives the rows
        to use.
    """
    packed = distributed.from_main(lambda: self._write_rows(name, make_examples(), config))
    max_targets = max(max_targets for max_targets, _ in packed.values())
    manifest = {**self.manifest(name, verifier), "data": packed["train"][1]}
    start = [self.init_params(name, self.mesh)]
    rows, eval_rows = (prepare(RowFile(self._rows_file(name, s)), max_targets, start[0]) for s in ("train", "val"))
    loop.train(
      name,
      make_loss(max_targets),
      start.pop(),  # or what training started from would stay in memory
      trained.param_shardings(self.model, self.adapters(name), self.mesh),
      rows,
      eval_rows,
      self.train_config(name),
      self.mesh,
      manifest,
      self.workdir,
      [self.path("tokenizer.model")] if self.config.tokenizer.type == "sentencepiece" else [],
    )
    distributed.from_main(epath.Path(self._rows_file(name, "train").parent).rmtree)

  def _rows_file(self, name: str, split: str) -> epath.Path:
    return self.path(f"rows_{name}", f"{split}.npy")

  def _write_rows(
    self, name: str, examples: dict[str, list[packing.Example]], config: ml_collections.ConfigDict
  ) -> dict[str, tuple[int, str]]:
    """Leaves rows_<name>/ and metrics/<name>.examples.json; by split, the most targets of a row, and the digest.

    The examples are taken out of `examples`, so that they are not kept beside their rows.
    """
    out, told = {}, {}
    for split in ("train", "val"):
      rows, told[split] = pack(f"{name}, {split}", examples.pop(split), config)
      row_file.write(self._rows_file(name, split), rows.num_rows, rows.take)
      out[split] = rows.max_targets, rows.digest
      if split == "train":
        used = rows.data.segments.astype(bool).mean()
        told_of = f"{rows.num_examples} examples in {rows.num_rows} rows of {config.row_length}"
        say(f"{name}: {told_of}, {used:.0%} of them filled")
    jsonl.write_json(self.path("metrics", f"{name}.examples.json"), told)
    return out


def pack(
  what: str, examples: Sequence[packing.Example], config: ml_collections.ConfigDict
) -> tuple[packing.Rows, dict[str, Any]]:
  """Rows of the examples, and how many of how many tokens there are; with `drop_long` those that fit into a row."""
  lengths = [len(e.tokens) for e in examples]
  fitting = [e for e, n in zip(examples, lengths, strict=True) if n <= config.row_length or not config.drop_long]
  told = {
    "examples": len(examples),
    "left_out": len(examples) - len(fitting),
    "row_length": config.row_length,
    "tokens": {f"{q}%": int(np.percentile(lengths, q)) for q in (50, 90, 99, 100)} if lengths else {},
  }
  if config.drop_long:
    say(f"{what}: {told['left_out']} of {len(examples)} examples are left out, longer than {config.row_length} tokens")
  return packing.pack(fitting, config.row_length), told
