"""What a config asks of the devices: the model, and the shapes of training and scoring.

Some shapes come from the texts, which the planner does not read. For GSM8K they were measured on 400 training problems
of the release (10,137 solutions of which 5,806 are trained on, 3,369 rationales), counted as Gemma's tokenizer would
nearly do: by a SentencePiece model of 32,000 pieces, and each digit as a piece of its own. Tokens (least, median, 99%,
largest):

    problem, solution, verdict question    201   317   524   857      (GenRM-CoT's prompt: 206, 311, 546, 855)
    rationale with its verdict              41   240   511   738
    targets of the fullest packed row      GenRM and solutions 59% of it, GenRM-CoT 57%, with solutions 59%, DPO 61%

For other tasks they are bounds that the config gives.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import ml_collections

from genrm_jax import verifiers
from genrm_jax.checkpoints import pretrained
from genrm_jax.model import lora
from genrm_jax.model.config import ModelConfig, get_config
from genrm_jax.runtime.errors import UserError
from genrm_jax.text.tokenizer import CharTokenizer
from genrm_jax.verifiers import Verifier


@dataclasses.dataclass(frozen=True)
class Lengths:
  """Tokens of the texts.

  Attributes:
    shortest_example: a problem with a solution, as a verifier that writes nothing is trained on it.
    prompt: a problem with a solution, in the middle.
    longest_prompt: the longest of these.
    rationale: in the middle.
    target_share: the largest share of a packed row that is targets, where these are texts.
    note: where the numbers are from.
  """

  shortest_example: int
  prompt: int
  longest_prompt: int
  rationale: int
  target_share: float
  note: str


def lengths(config: ml_collections.ConfigDict) -> Lengths:
  """Those of the config's task."""
  new_tokens = config.votes.sample.max_new_tokens
  if config.task.name == "gsm8k" and config.model.size.startswith("gemma"):
    # The measured share is of a tenth of the problems; among all of them some row will have a little more.
    return Lengths(200, 320, 864, min(240, new_tokens), 0.65, "texts as long as GSM8K's release, measured on a sample")
  prompt = max(1, config.engine.max_tokens - new_tokens)
  return Lengths(32, prompt, prompt, new_tokens, 1.0, "all texts as long as the config allows")


def model_config(config: ml_collections.ConfigDict) -> ModelConfig:
  """The model that the config's run would have; of a tokenizer that is not there the vocabulary is that of the size."""
  c, t = config.model, config.tokenizer
  dtypes = {"dtype": c.dtype, "param_dtype": c.param_dtype}
  if c.checkpoint:
    return ModelConfig.from_dict(pretrained.open_checkpoint(c.checkpoint).config.to_dict() | dtypes)
  overrides = c.overrides.to_dict()
  if t.type == "char":
    overrides |= {"vocab_size": CharTokenizer().vocab_size}
  elif not t.path and "vocab_size" in t:
    overrides |= {"vocab_size": t.vocab_size}
  return get_config(c.size, **dtypes, **overrides)


def adapters(settings: ml_collections.ConfigDict) -> lora.LoraConfig | None:
  """The low-rank adapters of a verifier; None where all parameters are trained."""
  c = settings.lora
  return lora.LoraConfig(c.rank, c.alpha, tuple(c.targets)) if c.rank else None


def max_targets(verifier: Verifier, settings: ml_collections.ConfigDict, texts: Lengths) -> int:
  """An estimate of the most targets that a row of this verifier's training has."""
  if verifier.learns in ("labels", "verdicts") and not settings.solve_weight:
    return max(1, settings.row_length // texts.shortest_example)  # one of each example
  return math.ceil(settings.row_length * texts.target_share)


def chosen_verifiers(config: ml_collections.ConfigDict, names: list[str]) -> list[Verifier]:
  """The verifiers called `names`, all of the config's if empty.

  Raises:
    UserError: the config has none, or not that one.
  """
  there = [name for name in verifiers.VERIFIERS if name in config.get("verifiers", {})]
  unknown = [name for name in names if name not in there]
  if unknown or not there:
    what = f"no verifier {', '.join(unknown)}" if unknown else "no verifiers"
    raise UserError(f"the config has {what}; there are: {', '.join(there) or 'none'}")
  return [verifiers.get_verifier(name) for name in names or there]


def with_settings(config: ml_collections.ConfigDict, changes: Mapping[str, Any]) -> ml_collections.ConfigDict:
  """The config with other values: {"verifiers.orm.remat": "layer"}."""
  changed = ml_collections.ConfigDict(config.to_dict()).lock()
  changed.update_from_flattened_dict(dict(changes))
  return changed


def check_batch(config: ml_collections.ConfigDict, name: str, mesh: Mapping[str, int]) -> None:
  """UserError where a verifier's batch does not divide over the mesh and the micro-batches."""
  loop = config.verifiers[name].loop
  shards = mesh["data"] * mesh["fsdp"]
  if loop.batch_size % (shards * loop.num_micro_batches):
    most = math.gcd(loop.batch_size // loop.num_micro_batches, shards)
    raise UserError(
      f"{name}: batch_size {loop.batch_size} does not divide by {shards} batch shards (data={mesh['data']} x "
      f"fsdp={mesh['fsdp']}) x {loop.num_micro_batches} micro-batches; use "
      f"--config.mesh.data=1 --config.mesh.fsdp={most} --config.mesh.tensor=-1, or another batch_size"
    )
