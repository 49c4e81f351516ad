"""The run that is planned: the pipeline's own, on the devices of a slice, without the files that it would read."""

import contextlib
import dataclasses
import functools
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from etils import epath

from experiments.plan import compiling
from experiments.plan.dry_engine import Call, DryEngine
from experiments.plan.tpus import Slice
from genrm_jax.checkpoints.tensor_map import CheckpointReader
from genrm_jax.infer import engine
from genrm_jax.model import gemma, lora
from genrm_jax.model.config import get_config
from genrm_jax.pipeline import locate, settings, trained
from genrm_jax.pipeline.run import Run
from genrm_jax.records import Candidate, Problem, Rationale
from genrm_jax.runtime import sharding
from genrm_jax.text.tokenizer import TURN_MARKERS, CharTokenizer, SentencePieceTokenizer, Tokenizer
from genrm_jax.verifiers.base import LabelledData, TargetCounts

# What a verifier makes of a correct and an incorrect solution to one problem shows how it trains.
_PROBE = LabelledData(
  [Problem("p", "probe", "train", "1 + 1?", "2")],
  [Candidate("p", i, text, text, text == "2", "probe") for i, text in enumerate("23")],
  [Rationale("p", i, 0, "So it is.", text == "2", "probe", kept=True) for i, text in enumerate("23")],
)


class Lengths(NamedTuple):
  """Tokens of a task's texts. For GSM8K they were measured (docs/plans.md), else the config's bounds are taken."""

  shortest: int  # of the prompts, which hold question and solution
  median: int
  longest: int
  rationale: int  # median
  target_share: float  # the largest share of a packed row that is targets, where targets are texts


@dataclasses.dataclass(frozen=True)
class PlannedRun(Run):
  """A run on the devices of `where`. The size table stands in for a missing checkpoint or tokenizer."""

  where: Slice

  @functools.cached_property
  def tokenizer(self) -> Tokenizer:
    c, model = self.config.tokenizer, self.pretrained.config if self.pretrained else get_config(self.config.model.size)
    if c.type == "char":
      return _StandIn(CharTokenizer().vocab_size, self.config.prompts)
    if c.path and epath.Path(c.path).exists():
      return _StandIn(SentencePieceTokenizer(c.path).vocab_size, self.config.prompts)
    return _StandIn(model.vocab_size if c.path else c.get("vocab_size", model.vocab_size), self.config.prompts)

  @functools.cached_property
  def checkpoint_path(self) -> str:
    """The path, or the name of a checkpoint that a plan does not download."""
    return locate.asset_path(self.config.model.checkpoint)

  @functools.cached_property
  def pretrained(self) -> CheckpointReader | None:
    path = self.checkpoint_path
    return super().pretrained if path and epath.Path(path).exists() else None

  @functools.cached_property
  def mesh(self) -> jax.sharding.Mesh:
    return sharding.make_mesh(**self.config.mesh.to_dict(), devices=compiling.devices(self.where))

  @functools.cached_property
  def engine_mesh(self) -> jax.sharding.Mesh:
    """The devices of one host, which scores on its own."""
    return sharding.make_mesh(**self.config.engine.mesh.to_dict(), devices=compiling.devices(self.where.of_one_host))

  def changed(self, changes: Mapping[str, Any]) -> "PlannedRun":
    """The same run with other settings: {"verifiers.orm.remat": "layer"}."""
    config = ml_collections.ConfigDict(self.config.to_dict()).lock()
    config.update_from_flattened_dict(dict(changes))
    return planned(config, self.where)

  @functools.cached_property
  def lengths(self) -> Lengths:
    new_tokens, max_tokens = self.config.votes.sample.max_new_tokens, self.config.engine.max_tokens
    if self.config.task.name == "gsm8k" and self.config.model.size.startswith("gemma"):
      return Lengths(201, 317, 857, min(240, new_tokens), 0.65)
    longest = max(1, max_tokens - new_tokens)
    return Lengths(min(32, longest), longest, longest, new_tokens, 1.0)

  def counts(self, name: str) -> TargetCounts:
    """An estimate of the most targets and pairs in a packed row, from the verifier's own examples."""
    length, examples = self.config.verifiers[name].row_length, list(self.verifier(name).examples(_PROBE))
    num_examples = max(1, length // self.lengths.shortest)
    has_one_target = all(np.count_nonzero(e.weights) == 1 for e in examples)
    max_targets = num_examples if has_one_target else math.ceil(length * self.lengths.target_share)
    return TargetCounts(max_targets, num_examples if any(e.segments.max() > 1 for e in examples) else 0)

  def param_shapes(self, adapters: lora.LoraConfig | None, mesh: jax.sharding.Mesh) -> Any:
    """The parameters, and adapters if any, as shapes with shardings."""

    def init(key: jax.Array) -> gemma.Params:
      return {**gemma.init(self.model, key), **(lora.init(self.model, adapters, key) if adapters else {})}

    return _placed(jax.eval_shape(init, jax.random.key(0)), trained.param_shardings(self.model, adapters, mesh))

  @functools.cached_property
  def engine_params(self) -> Any:
    """The parameters as the engine holds them, as shapes with shardings."""
    stored = self.param_shapes(None, self.engine_mesh)
    used = jax.eval_shape(lambda params: gemma.as_used(params, self.model), stored)
    return _placed(used, jax.tree.map(lambda a: a.sharding, stored))

  def calls(self, name: str, num_tokens: int) -> list[Call]:
    """What the engine calls to score a solution, with a prompt of `num_tokens` if the context has room for it."""
    verifier, how, c = self.verifier(name), self.vote_config(name), self.config.engine
    end_id, sampled = self.prompter.end_id, how.sample.max_new_tokens
    dry = DryEngine(self.engine_params, self.model, self.engine_mesh, end_id, c.rows_per_batch, c.max_tokens)
    least = verifier.tokens_needed("?", "", 0)
    room = c.max_tokens - verifier.tokens_needed("?", "", sampled) + least
    with contextlib.redirect_stderr(io.StringIO()):  # no progress bars
      verifier.votes(dry, [("?", " x" * (min(num_tokens, room) - least))], how, "")
    return dry.calls

  def all_calls(self, name: str) -> list[Call]:
    """What the engine calls to score prompts of every width, the longest last."""
    first, last = self.lengths.shortest, self.lengths.longest
    between = [width for width in engine.buckets(self.config.engine.max_tokens) if first < width < last]
    return [call for num_tokens in (first, *between, last) for call in self.calls(name, num_tokens)]


def planned(config: ml_collections.ConfigDict, where: Slice) -> PlannedRun:
  """The run of a config on a slice. Raises UserError for a setting that no run accepts."""
  frozen = ml_collections.FrozenConfigDict(config)
  settings.check(frozen.to_dict())
  return PlannedRun(frozen, epath.Path("."), where)


def _placed(shapes: Any, shardings: Any) -> Any:
  return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings)


class _StandIn:
  """A tokenizer of the right vocabulary size, one id per word or sign: no shape depends on its ids."""

  name, digest = "stand-in", ""
  pad_id, bos_id, eos_id, cls_id = range(4)
  controls = re.compile("((?!))")

  def __init__(self, vocab_size: int, prompts: Mapping[str, str]):
    self.vocab_size = vocab_size
    self._pieces = ["", "", "", "", prompts["yes"], prompts["no"], *TURN_MARKERS]
    self._split = re.compile("|".join([*map(re.escape, self._pieces[4:]), r" ?\w+|."]), re.DOTALL).findall

  def encode(self, text: str) -> list[int]:
    self._pieces += sorted(set(pieces := self._split(text)) - set(self._pieces))
    return [self._pieces.index(piece) for piece in pieces]

  encode_plain = encode

  def decode(self, ids: Sequence[int]) -> str:
    return "".join(self._pieces[i] for i in ids)

  def spec(self) -> dict[str, Any]:
    return {"type": self.name}
