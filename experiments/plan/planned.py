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
from genrm_jax.infer.engine import Engine, Rollout
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
_ROOM = 2**20  # tokens: whatever a verifier does where the context has room is recorded


class Lengths(NamedTuple):
  """Tokens of a task's texts.

  Those of GSM8K were measured on 400 training problems of the release (10,137 solutions, 3,369 rationales) with a
  SentencePiece model of 32,000 pieces and one piece per digit, close to Gemma's (least, median, 99%, largest):

      question, solution, verdict question    201   317   524   857
      rationale with its verdict               41   240   511   738

  and targets are 57% to 61% of the fullest packed row. Otherwise the lengths are the bounds that the config sets.
  """

  shortest: int  # of the prompts, which hold question and solution
  median: int
  longest: int
  rationale: int  # median
  target_share: float  # the largest share of a packed row that is targets, where targets are texts
  note: str


class Call(NamedTuple):
  """A call of the engine: its method, how many tokens it reads beyond the verifier's prompt, and its static options."""

  method: str
  num_extra: int
  options: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class PlannedRun(Run):
  """A run on the devices of `where`. A checkpoint or tokenizer that is not at hand is replaced by the size table."""

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

  def chosen(self, names: Sequence[str]) -> list[str]:
    """The verifiers called `names`, all if empty. UserError if the config lacks one."""
    known = self.verifier_names if "verifiers" in self.config else []
    if not known or (unknown := [name for name in names if name not in known]):
      wanted = ", ".join(unknown) if known else ""
      raise UserError(f"the config has no verifier {wanted}; it has: {', '.join(known) or 'none'}")
    return list(names) or known

  @functools.cached_property
  def lengths(self) -> Lengths:
    new_tokens, max_tokens = self.config.votes.sample.max_new_tokens, self.config.engine.max_tokens
    if self.config.task.name == "gsm8k" and self.config.model.size.startswith("gemma"):
      # The share was measured on a tenth of the problems; among all of them some row has a little more.
      return Lengths(201, 317, 857, min(240, new_tokens), 0.65, "as in GSM8K's release, measured on a sample")
    longest = max(1, max_tokens - new_tokens)
    return Lengths(min(32, longest), longest, longest, new_tokens, 1.0, "the most that the config allows")

  def counts(self, name: str) -> TargetCounts:
    """An estimate of the most targets and pairs in a packed row, from the verifier's own examples."""
    length, examples = self.config.verifiers[name].row_length, list(self.verifier(name).examples(_PROBE))
    num_examples = max(1, length // self.lengths.shortest)
    has_one_target = all(np.count_nonzero(e.weights) == 1 for e in examples)
    max_targets = num_examples if has_one_target else math.ceil(length * self.lengths.target_share)
    return TargetCounts(max_targets, num_examples if any(e.segments.max() > 1 for e in examples) else 0)

  def calls(self, name: str) -> list[Call]:
    """The calls of the engine that a score takes, as the verifier itself makes them."""
    c, verifier = self.config.engine, self.verifier(name)
    model = None, self.model, self.engine_mesh, self.prompter.end_id, c.rows_per_batch, _ROOM
    engine = _Recorder(*model, len(verifier.prompt(*_PAIR)))
    verifier.votes(engine, [_PAIR], self.vote_config(name), "plan")
    return engine.calls


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

  def __init__(self, vocab_size: int, prompts: Mapping[str, str]):
    self.vocab_size = vocab_size
    self._pieces = ["", "", "", "", prompts["yes"], prompts["no"], *TURN_MARKERS]
    self._split = re.compile("|".join([*map(re.escape, self._pieces[4:]), "."]), re.DOTALL).findall

  def encode(self, text: str) -> list[int]:
    self._pieces += sorted(set(pieces := self._split(text)) - set(self._pieces))
    return [self._pieces.index(piece) for piece in pieces]

  def decode(self, ids: Sequence[int]) -> str:
    return "".join(self._pieces[i] for i in ids)

  def spec(self) -> dict[str, Any]:
    return {"type": self.name}


@dataclasses.dataclass(frozen=True)
class _Recorder(Engine):
  """Records its calls, and answers as an untrained model might: no rationale ends on its own."""

  num_tokens: int  # of the verifier's prompt
  calls: list[Call] = dataclasses.field(default_factory=list)

  def _record(self, method: str, prompts: Sequence[Sequence[int]], **options: Any) -> None:
    self.calls.append(Call(method, max(0, max(map(len, prompts)) - self.num_tokens), options))

  def next_token_probs(self, prompts, token_ids, label):
    self._record("next_token_probs", prompts, token_ids=token_ids)
    return np.full((len(prompts), len(token_ids)), 0.5, np.float32)

  def next_token_logits(self, prompts, token_ids, label):
    self._record("next_token_logits", prompts, token_ids=token_ids)
    return np.zeros((len(prompts), len(token_ids)), np.float32)

  def log_likelihood(self, prompts, continuations, label):
    self._record("log_likelihood", prompts)  # `Lengths` count the solution already
    return np.zeros(len(prompts))

  def generate(self, prompts, keys, settings, tracked, label):
    self._record("generate", prompts, settings=settings, tracked=tracked, num_rollouts=keys.shape[1])
    rollout = Rollout([0] * settings.max_new_tokens, np.zeros((settings.max_new_tokens, len(tracked)), np.float32))
    return [[rollout] * keys.shape[1] for _ in prompts]
