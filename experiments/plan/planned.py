"""The run that is planned: the pipeline's own, on the devices of a slice, without the files that it would read."""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from etils import epath

from experiments.plan import compiling
from experiments.plan.tpus import Slice
from genrm_jax.checkpoints.tensor_map import CheckpointReader
from genrm_jax.infer import engine
from genrm_jax.model.config import get_config
from genrm_jax.pipeline.run import Run
from genrm_jax.records import Candidate, Problem, Rationale
from genrm_jax.runtime import sharding
from genrm_jax.runtime.errors import UserError
from genrm_jax.text.tokenizer import TURN_MARKERS, CharTokenizer, SentencePieceTokenizer, Tokenizer
from genrm_jax.verifiers.base import LabelledData, TargetCounts

# What a verifier makes of one problem, with a correct and an incorrect solution, shows how it trains and scores.
_PAIR = ("1 + 1?", "2")
_PROBE = LabelledData(
  [Problem("p", "probe", "train", _PAIR[0], "2")],
  [Candidate("p", i, text, text, text == "2", "probe") for i, text in enumerate("23")],
  [Rationale("p", i, 0, "So it is.", text == "2", "probe", kept=True) for i, text in enumerate("23")],
)
_ROOM = 2**20  # tokens of context: what a verifier does only where there is room is recorded too


class Lengths(NamedTuple):
  """Tokens of a task's texts. For GSM8K they were measured (docs/plans.md), else the config's bounds are taken."""

  shortest: int  # of the prompts, which hold question and solution
  median: int
  longest: int
  rationale: int  # median
  target_share: float  # the largest share of a packed row that is targets, where targets are texts


class Call(NamedTuple):
  """A call of a jitted function of the engine: tokens read beyond the verifier's prompt, and static options."""

  function: Any  # slots.decode for the sampling of rationales
  num_extra: int
  options: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class PlannedRun(Run):
  """A run on the devices of `where`. The size table stands in for a missing checkpoint or tokenizer."""

  where: Slice

  @functools.cached_property
  def tokenizer(self) -> Tokenizer:
    c = self.config.tokenizer
    if c.type == "char":
      return CharTokenizer()
    if c.path and epath.Path(c.path).exists():
      return SentencePieceTokenizer(c.path)
    vocab_size = (self.pretrained.config if self.pretrained else get_config(self.config.model.size)).vocab_size
    return _StandIn(vocab_size if c.path else c.get("vocab_size", vocab_size), self.config.prompts)

  @functools.cached_property
  def pretrained(self) -> CheckpointReader | None:
    path = self.checkpoint_path
    return super().pretrained if path and epath.Path(path).exists() else None

  @functools.cached_property
  def mesh(self) -> jax.sharding.Mesh:
    return _mesh("mesh", self.config.mesh.to_dict(), self.where)

  @functools.cached_property
  def engine_mesh(self) -> jax.sharding.Mesh:
    """The devices of one host, which scores on its own."""
    return _mesh("engine.mesh", self.config.engine.mesh.to_dict(), self.where.of_one_host)

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

  def calls(self, name: str) -> list[Call]:
    """The calls of the engine that a score takes, as the verifier itself makes them."""
    verifier = self.verifier(name)
    recorder = _Recorder(
      None, self.model, self.engine_mesh, self.prompter.end_id, 1, _ROOM, len(verifier.prompt(*_PAIR))
    )
    verifier.votes(recorder, [_PAIR], self.vote_config(name), "plan")
    return recorder.calls


def planned(config: ml_collections.ConfigDict, where: Slice) -> PlannedRun:
  """The run of a config on a slice."""
  return PlannedRun(ml_collections.FrozenConfigDict(config), epath.Path("."), where)


def _mesh(option: str, axes: Mapping[str, int], where: Slice) -> jax.sharding.Mesh:
  chips = compiling.devices(where)
  try:
    return sharding.make_mesh(**axes, devices=chips)
  except UserError as e:
    raise UserError(f"{e} Set --config.{option}.* for the {len(chips)} chips of {where.name}") from e


class _StandIn:
  """A tokenizer of the right vocabulary size, one id per character: no shape depends on its ids."""

  name, digest = "stand-in", ""
  pad_id, bos_id, eos_id, cls_id = range(4)
  controls = re.compile("((?!))")

  def __init__(self, vocab_size: int, prompts: Mapping[str, str]):
    self.vocab_size = vocab_size
    self._pieces = ["", "", "", "", prompts["yes"], prompts["no"], *TURN_MARKERS]
    self._split = re.compile("|".join([*map(re.escape, self._pieces[4:]), "."]), re.DOTALL).findall

  def encode(self, text: str) -> list[int]:
    self._pieces += sorted(set(pieces := self._split(text)) - set(self._pieces))
    return [self._pieces.index(piece) for piece in pieces]

  encode_plain = encode

  def decode(self, ids: Sequence[int]) -> str:
    return "".join(self._pieces[i] for i in ids)

  def spec(self) -> dict[str, Any]:
    return {"type": self.name}


@dataclasses.dataclass(frozen=True)
class _Recorder(engine.Engine):
  """Records its calls, and answers as an untrained model might: no rationale ends on its own."""

  num_tokens: int  # of the verifier's prompt
  calls: list[Call] = dataclasses.field(default_factory=list)

  def _record(self, function: Any, prompts: Sequence[Sequence[int]], **options: Any) -> None:
    self.calls.append(Call(function, max(0, max(map(len, prompts)) - self.num_tokens), options))

  def _next_token(self, function, prompts, token_ids, label):
    self._record(function, prompts, token_ids=token_ids)
    return np.full((len(prompts), len(token_ids)), 0.5, np.float32)

  def log_likelihood(self, prompts, continuations, label):
    self._record(engine.log_probs_from, prompts)  # `Lengths` count the solution already
    return np.zeros(len(prompts))

  def generate(self, prompts, keys, settings, tracked, label):
    self._record(engine.slots.decode, prompts, settings=settings, tracked=tracked, num_rollouts=keys.shape[1])
    rollout = engine.Rollout(
      [0] * settings.max_new_tokens, np.zeros((settings.max_new_tokens, len(tracked)), np.float32)
    )
    return [[rollout] * keys.shape[1] for _ in prompts]
