"""A run: one workdir, its config, and the objects that its stages share."""

import dataclasses
import functools
import json
import os
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath

import genrm_jax
from genrm_jax.checkpoints import names, pretrained, tensor_map
from genrm_jax.checkpoints.tensor_map import CheckpointReader
from genrm_jax.data import jsonl
from genrm_jax.infer.sampling import SampleConfig
from genrm_jax.model import gemma, lora
from genrm_jax.model.config import SIZES, ModelConfig, get_config
from genrm_jax.pipeline import locate, trained
from genrm_jax.pipeline.fingerprints import fingerprint
from genrm_jax.pipeline.trained import TrainedVerifier
from genrm_jax.records import Candidate, Problem, Rationale, Score
from genrm_jax.runtime import sharding
from genrm_jax.tasks.base import Task, load_task
from genrm_jax.text.prompts import Prompter, make_format
from genrm_jax.text.tokenizer import CharTokenizer, SentencePieceTokenizer, Tokenizer, check_vocab
from genrm_jax.training import loop, optim, sizes
from genrm_jax.verifiers.base import VERIFIERS, LabelledData, Verifier, VoteConfig, make_verifier, verifier_class

# One random stream per purpose, so that changing one leaves the others unchanged.
_STREAMS = {"train": 1, "val": 2, "eval": 3, "in_distribution": 4, "generator": 5, "gaps": 6}


@dataclasses.dataclass(frozen=True)
class Run:
  """One workdir and its config; shared objects are built on first use."""

  config: ml_collections.FrozenConfigDict
  workdir: epath.Path

  def path(self, *parts: str) -> epath.Path:
    return self.workdir.joinpath(*parts)

  def rng(self, purpose: str) -> np.random.Generator:
    """The host random stream of a split or another purpose in `_STREAMS`."""
    return np.random.default_rng([self.config.seed, _STREAMS[purpose]])

  # The task and its records.

  @functools.cached_property
  def task(self) -> Task:
    options = {key: value for key, value in self.config.task.to_dict().items() if key != "name"}
    if "data_dir" in self.config:
      options["data_dir"] = self.config.data_dir
    return load_task(self.config.task.name, options)

  @property
  def task_name(self) -> str:
    """The task's name in records and reports."""
    return self.task.name if ":" in self.config.task.name else self.config.task.name

  @property
  def eval_splits(self) -> list[str]:
    """The splits whose candidates are scored: "eval" and, if the task has it, "in_distribution"."""
    return [split for split in ("eval", "in_distribution") if split == "eval" or split in self.task.splits]

  @property
  def splits(self) -> list[str]:
    """The splits with candidates: train, val and the evaluated ones."""
    return ["train", "val", *self.eval_splits]

  def problems(self, split: str) -> list[Problem]:
    return jsonl.read_records(self.path("problems", f"{split}.jsonl"), Problem)

  def candidates(self, split: str) -> list[Candidate]:
    return jsonl.read_records(self.path("candidates", f"{split}.jsonl"), Candidate)

  def scores(self, name: str, split: str) -> list[Score]:
    return jsonl.read_scores(self.path(self.scores_file(name, split)), name)

  def rationales(self, split: str) -> Iterator[Rationale]:
    """Iterates over the rationales of a split, which may not fit into memory."""
    return jsonl.iter_records(self.path("rationales", f"{split}.jsonl"), Rationale)

  def labelled(self, split: str, max_problems: int = 0) -> LabelledData:
    """Labelled solutions and rationales of a split; of "train", only the first `max_problems` problems (0: all)."""
    problems, pool = self.problems(split), self.candidates(split)
    if max_problems and split == "train":
      kept = {p.id for p in problems[:max_problems]}
      pool = [c for c in pool if c.problem_id in kept]
    return LabelledData(problems, pool, self.rationales(split), self.config.seed)

  def scores_file(self, name: str, split: str) -> str:
    """Path of a verifier's scores on a split, relative to the workdir."""
    return f"scores/{name}.jsonl" if split == "eval" else f"scores/{split}/{name}.jsonl"

  # Text.

  @functools.cached_property
  def tokenizer(self) -> Tokenizer:
    """The character tokenizer, or the SentencePiece model in the workdir (written by stage `tokenizer`)."""
    if self.config.tokenizer.type == "char":
      return CharTokenizer()
    return SentencePieceTokenizer(self.path("tokenizer.model"))

  @property
  def tokenizer_source(self) -> dict[str, str]:
    """The setting and the path that a SentencePiece model is taken from; empty if the run trains one, or needs none."""
    c = self.config.tokenizer
    if c.type == "char":
      return {}
    if c.path:
      return {"tokenizer.path": c.path}
    return {"model.checkpoint": self.checkpoint_path} if self.pretrained and self.pretrained.tokenizer else {}

  def given_tokenizer(self) -> SentencePieceTokenizer | None:
    """Opens the SentencePiece model at `tokenizer_source`."""
    if "tokenizer.path" in self.tokenizer_source:
      return SentencePieceTokenizer(self.config.tokenizer.path)
    return self.pretrained.tokenizer() if self.tokenizer_source else None  # type: ignore[union-attr, misc]

  @functools.cached_property
  def prompter(self) -> Prompter:
    return Prompter(self.tokenizer, make_format(self.config.prompts.to_dict()))

  # Verifiers.

  @functools.cached_property
  def verifier_names(self) -> list[str]:
    """Names in the config: first the built-in verifiers in the order of VERIFIERS, then custom ones."""
    names = list(self.config.get("verifiers", {}))
    return [*(n for n in VERIFIERS if n in names), *(n for n in names if n not in VERIFIERS)]

  def verifier_type(self, name: str) -> type[Verifier]:
    return verifier_class(self.config.verifiers[name].get("kind", name))

  def verifier(self, name: str) -> Verifier:
    return make_verifier(name, self.prompter, self.config.verifiers[name].to_dict())

  # Models.

  @functools.cached_property
  def checkpoint_path(self) -> str:
    """Path of the Gemma checkpoint in the config, which may be downloaded; "" for a model from scratch."""
    path = self.config.model.checkpoint
    return os.fspath(names.resolve(locate.asset_path(path))) if path else ""

  @functools.cached_property
  def pretrained(self) -> CheckpointReader | None:
    """A reader of the checkpoint at `checkpoint_path`; reads its index but no tensors."""
    return pretrained.open_checkpoint(self.checkpoint_path) if self.checkpoint_path else None

  @functools.cached_property
  def model(self) -> ModelConfig:
    """The model of the checkpoint, or one of the configured size with the tokenizer's vocabulary."""
    c = self.config.model
    ours = {"dtype": c.dtype, "param_dtype": c.param_dtype, "sharding": c.sharding.to_dict()}
    if self.pretrained:
      check_vocab(self.tokenizer, self.pretrained.config.vocab_size)
      found = self.pretrained.config
      # The name of a size that is not in the table is that of the folder, which may move.
      return ModelConfig.from_dict(found.to_dict() | ours | {"name": found.name if found.name in SIZES else "gemma"})
    return get_config(c.size, vocab_size=self.tokenizer.vocab_size, **ours, **c.overrides.to_dict())

  @functools.cached_property
  def mesh(self) -> jax.sharding.Mesh:
    """All devices of all processes, for training."""
    return sharding.make_mesh(**self.config.mesh.to_dict())

  @functools.cached_property
  def engine_mesh(self) -> jax.sharding.Mesh:
    """The local devices, for sampling and scoring."""
    return sharding.make_mesh(**self.config.engine.mesh.to_dict(), devices=jax.local_devices())

  def training(self, name: str) -> ml_collections.FrozenConfigDict:
    """The settings of a model: base, generator, candidates, grader or a verifier."""
    return self.config.verifiers[name] if name in self.config.verifiers else self.config[name]

  def train_config(self, name: str, *, sized: bool = True) -> loop.TrainConfig:
    """How `name` is trained; unless `sized`, micro-batches that are left to the model's size count as one."""
    c = self.training(name)
    settings = c.loop.to_dict()
    if not settings["num_micro_batches"]:
      settings["num_micro_batches"] = 1
      if sized:
        shards = sharding.num_shards(sharding.batch_sharding(self.mesh, self.model.rules))
        size = c.loop.batch_size, c.row_length, shards
        settings["num_micro_batches"] = sizes.num_micro_batches(self.model, *size)
    optimizer = optim.OptimConfig(**c.optim.to_dict())
    return loop.TrainConfig(optimizer, seed=self.config.seed, save_frozen=c.lora.save_frozen, **settings)

  def remat(self, name: str) -> gemma.Remat:
    """What the backward pass of `name` recomputes."""
    c = self.training(name)
    if (choice := c.get("remat", "none")) != "auto":
      return choice
    return sizes.remat(self.model, self.train_config(name).micro_batch_size, c.row_length)

  def adapters(self, name: str) -> lora.LoraConfig | None:
    """Low-rank adapters; None if all parameters are trained (rank 0)."""
    c = self.training(name).lora
    return lora.LoraConfig(c.rank, c.alpha, tuple(c.targets)) if c.rank else None

  def sample_config(self, name: str) -> SampleConfig:
    """Sampling settings of "candidates", "votes" or the "grader"."""
    return SampleConfig(**self.config[name].sample.to_dict())

  def init_params(self, name: str, mesh: jax.sharding.Mesh) -> gemma.Params:
    """Initial parameters of `name`: the best step of `init_from`, the Gemma checkpoint, or random; plus adapters."""
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

  def load_params(self, name: str, mesh: jax.sharding.Mesh) -> tuple[gemma.Params, int]:
    """Parameters of the best step of `name` on a mesh, adapters merged, and that step."""
    path, rules = self.path("checkpoints", name), self.model.rules
    step = trained.open_step(path, self._base_of(name), mesh, self.identity(), rules)
    return step.params, step.manifest["step"]

  def engine(self, params: gemma.Params) -> trained.Engine:
    """An engine on the local devices. Donates `params`, which must be on `engine_mesh`."""
    c = self.config.engine
    return trained.make_engine(
      params, self.model, self.engine_mesh, self.prompter.end_id, c.rows_per_batch, c.max_tokens
    )

  def trained_verifier(self, name: str) -> TrainedVerifier:
    """The verifier with the parameters of its best step; untrained ones have those of `init_from`."""
    verifier, mesh = self.verifier(name), self.engine_mesh
    source = name if verifier.is_trained else self.training(name).init_from
    params, step = self.load_params(source, mesh) if source else (self.init_params(name, mesh), 0)
    return TrainedVerifier(verifier, self.engine(params), self.vote_config(name), step, self.manifest(name))

  # Manifests of checkpoints.

  def identity(self) -> dict[str, Any]:
    """Manifest entries that must agree if one model is initialized from another: model, prompts, ids, tokenizer."""
    return {
      "model": self.model.to_dict(),
      "prompts": dataclasses.asdict(self.prompter.format),
      "verdict_ids": {"yes": self.prompter.yes_id, "no": self.prompter.no_id, "cls": self.tokenizer.cls_id},
      "tokenizer": {"digest": self.tokenizer.digest},
    }

  def vote_config(self, name: str) -> VoteConfig:
    """The votes of a verifier: number, seed and sampling settings."""
    votes = self.config.votes
    return self.verifier(name).vote_config(VoteConfig(votes.num_votes, self.config.seed, self.sample_config("votes")))

  def manifest(self, name: str) -> dict[str, Any]:
    """The manifest of checkpoints of `name`. It identifies content, not locations, since files may move."""
    tokenizer = self.tokenizer.spec()
    if "path" in tokenizer:
      tokenizer["path"] = epath.Path(tokenizer["path"]).name
    adapters = self.adapters(name)
    is_verifier = name in self.config.verifiers
    settings = self.config.verifiers[name].to_dict() if is_verifier else {}
    scoring = None
    if is_verifier:
      scoring = {**dataclasses.asdict(self.vote_config(name)), "max_tokens": self.config.engine.max_tokens}
    fields = {
      **self.identity(),
      "code_version": genrm_jax.__version__,
      "task": self.task_name,
      "run": name,
      "init_from": self.training(name).init_from or self._checkpoint_name(),
      "lora": adapters and dataclasses.asdict(adapters),
      "verifier": {"name": name, "kind": settings.get("kind", name), "settings": settings} if is_verifier else None,
      "tokenizer": tokenizer,
      "scoring": scoring,
    }
    return json.loads(json.dumps(fields))

  def _checkpoint_name(self) -> str:
    if not self.pretrained:
      return "random numbers"
    return f"{self.model.name}, files {fingerprint(epath.Path(self.checkpoint_path), whole=True)[:12]}"

  def _base_of(self, name: str) -> Any:
    """The path that `name` is initialized from; None if at random."""
    source = self.training(name).init_from
    return self.path("checkpoints", source) if source else self.checkpoint_path or None
