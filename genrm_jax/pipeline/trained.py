"""Opening what a run has trained, with nothing but its path.

verifier = genrm_jax.load("runs/last_letter/checkpoints/genrm_cot")
verifier.score(question, solution)        # mean p(Yes) over the votes that the run was configured for
verifier.rationales(question, solution)   # what it wrote, vote by vote

params, manifest = genrm_jax.load_params("runs/last_letter/checkpoints/genrm_cot")     # NumPy, for analysis
"""

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from genrm_jax.checkpoints import pretrained
from genrm_jax.infer.engine import Engine
from genrm_jax.infer.sampling import SampleConfig
from genrm_jax.model import gemma, lora
from genrm_jax.model.config import ModelConfig
from genrm_jax.records import Candidate, Problem, Score, Vote
from genrm_jax.runtime import sharding
from genrm_jax.runtime.errors import UserError
from genrm_jax.text.prompts import Prompter, PromptFormat
from genrm_jax.text.tokenizer import check_vocab, load_tokenizer
from genrm_jax.train import saved
from genrm_jax.verifiers import Verifier, get_verifier, score_candidates


@dataclasses.dataclass(frozen=True)
class TrainedVerifier:
  """A verifier as a run has trained it.

  Attributes:
    verifier: which of the paper's.
    engine: its model on devices.
    prompter: its tokenizer and templates.
    num_votes: K, the votes of a score where a call does not say otherwise; 1 for a verifier without rationales.
    settings: of the sampling of rationales.
    step: of the checkpoint.
    manifest: all that the checkpoint says of itself.
  """

  verifier: Verifier
  engine: Engine
  prompter: Prompter
  num_votes: int
  settings: SampleConfig
  step: int
  manifest: Mapping[str, Any]

  def score(self, question: str, solution: str, *, num_votes: int | None = None, seed: int = 0) -> float | None:
    """How good the solution is, in [0, 1]; None where no vote could be read.

    Of a DPO verifier it is the likelihood of the solution, which ranks solutions to one problem and says no more.
    """
    return self.score_many([(question, solution)], num_votes=num_votes, seed=seed)[0]

  def score_many(
    self, pairs: Sequence[tuple[str, str]], *, num_votes: int | None = None, seed: int = 0
  ) -> list[float | None]:
    """The scores of (question, solution) pairs.

    Rationales are sampled with keys made of the texts and the seed: a score does not depend on what else is scored.

    Args:
      pairs: what to score, any number.
      num_votes: K rationales a pair; the run's own number if None.
      seed: of the sampled rationales.

    Raises:
      UserError: a text is longer than the context, or the tokenizer cannot express it.
    """
    return [score.value for score in self._scores(pairs, num_votes, seed)]

  def rationales(self, question: str, solution: str, *, num_votes: int | None = None, seed: int = 0) -> list[Vote]:
    """The votes behind `score`: text, state and p(Yes) of each.

    Raises:
      UserError: the verifier writes none; or as `score_many`.
    """
    if not self.verifier.writes_rationales:
      raise UserError(f"{self.verifier.name} writes no rationale; use score")
    return list(self._scores([(question, solution)], num_votes, seed)[0].votes)

  def _scores(self, pairs: Sequence[tuple[str, str]], num_votes: int | None, seed: int) -> list[Score]:
    num_votes = self.num_votes if num_votes is None else num_votes
    if num_votes < 1:
      raise UserError(f"num_votes must be 1 or more, not {num_votes}")
    problems = [Problem(id=q, task="", split="", question=q, answer="") for q in {q: None for q, _ in pairs}]
    candidates = [Candidate(q, zlib.crc32(y.encode()), y, None, False, "") for q, y in pairs]
    return score_candidates(
      self.verifier,
      self.engine,
      self.prompter,
      problems,
      candidates,
      step=self.step,
      seed=seed,
      num_votes=num_votes,
      settings=self.settings,
    )


class Opened(NamedTuple):
  """A whole step of a run: what it says of itself, its tokenizer and templates, its model, its parameters."""

  step: epath.Path
  manifest: dict[str, Any]
  prompter: Prompter
  config: ModelConfig
  params: gemma.Params


def load(
  path: Any, *, base: Any = None, mesh: Mesh | None = None, dtype: str | None = None, rows_per_batch: int = 32
) -> TrainedVerifier:
  """Opens a trained verifier.

  Args:
    path: of a run (WORKDIR/checkpoints/RUN; its best step is taken) or of one step; local or gs://.
    base: for adapters that were saved alone: what they were trained on, a run of ours or a Gemma checkpoint.
    mesh: where to put it; all devices, each with all parameters, if None.
    dtype: of parameters and activations, "float32" or "bfloat16"; the run's own if None.
    rows_per_batch: rows that go through the model at a time, votes included.

  Raises:
    UserError: no such checkpoint, an unfinished or a foreign one, one that is no verifier's; nothing whole in it; or
      too little memory for its parameters.
  """
  mesh = sharding.make_mesh(data=-1) if mesh is None else mesh
  opened = open_run(path, base, mesh)
  manifest, config, params = opened.manifest, opened.config, opened.params
  if manifest["verifier"] is None:
    raise UserError(
      f"{opened.step} is the {manifest['run']} of a run and no verifier; open its parameters with genrm_jax.load_params"
    )
  if dtype is not None:
    config = dataclasses.replace(config, dtype=dtype, param_dtype=dtype)
    params = jax.jit(lambda tree: jax.tree.map(lambda p: p.astype(dtype), tree), donate_argnums=0)(params)
  scoring = manifest["scoring"]
  return TrainedVerifier(
    get_verifier(manifest["verifier"]),
    Engine(params, config, mesh, opened.prompter.end_id, rows_per_batch, scoring["max_tokens"]),
    opened.prompter,
    scoring["num_votes"],
    SampleConfig(**scoring["sample"]),
    manifest["step"],
    manifest,
  )


def load_params(path: Any, *, base: Any = None) -> tuple[gemma.Params, dict[str, Any]]:
  """Parameters of any run as NumPy arrays, adapters merged, and the manifest; without the optimiser and the mesh.

  Raises:
    UserError: as `load`.
  """
  opened = open_run(path, base, None)
  return opened.params, opened.manifest


def open_run(path: Any, base: Any, mesh: Mesh | None, expected: Mapping[str, Any] | None = None) -> Opened:
  """The best whole step of a run, on a mesh, or as NumPy arrays if that is None. Adapters are merged.

  Args:
    path: as for `load`.
    base: as for `load`.
    mesh: the devices.
    expected: what the manifest must say.
  """

  def read(step: epath.Path) -> Opened:
    manifest = saved.read_manifest(step)
    prompter = _prompter(step, manifest)
    ids = {"yes": prompter.yes_id, "no": prompter.no_id, "cls": prompter.tokenizer.cls_id}
    saved.check_manifest(manifest, {"verdict_ids": ids, **(expected or {})}, step)
    config = ModelConfig.from_dict(manifest["model"])
    check_vocab(prompter.tokenizer, config.vocab_size)
    adapters = _adapters(manifest)
    shardings = (
      None if mesh is None else flax.traverse_util.flatten_dict(param_shardings(config, adapters, mesh), sep="/")
    )
    params = saved.read_params(step, manifest, shardings)
    if manifest["left_out"]:
      assert adapters is not None
      params |= _base(step, manifest, adapters, base, config, mesh)
    if adapters is not None:
      merged = lora.merge(params)
      params = jax.device_get(merged) if mesh is None else merged
    return Opened(step, manifest, prompter, config, params)

  return saved.first_whole(saved.find(path), read)[0]


def param_shardings(config: ModelConfig, adapters: lora.LoraConfig | None, mesh: Mesh) -> Any:
  """Where every parameter of a model lies, and of its adapters, if it has any."""
  specs = gemma.param_specs(config) | (lora.param_specs(config, adapters) if adapters else {})
  return sharding.param_shardings(specs, mesh, config.rules)


def _prompter(step: epath.Path, manifest: Mapping[str, Any]) -> Prompter:
  try:
    tokenizer = load_tokenizer(manifest["tokenizer"], step / "files")
  except UserError as e:
    raise saved.Damaged(f"checkpoint {step} is damaged: {e}") from e
  return Prompter(tokenizer, PromptFormat(**manifest["prompts"]))


def _adapters(manifest: Mapping[str, Any]) -> lora.LoraConfig | None:
  fields = manifest["lora"]
  return None if fields is None else lora.LoraConfig(**{**fields, "targets": tuple(fields["targets"])})


def _base(
  step: epath.Path,
  manifest: Mapping[str, Any],
  adapters: lora.LoraConfig,
  base: Any,
  config: ModelConfig,
  mesh: Mesh | None,
) -> gemma.Params:
  """The frozen parameters that were not saved with a step's adapters, from where the user says that they are."""
  if base is None:
    raise UserError(
      f"{step} holds adapters alone (lora.save_frozen was false); give base=, the {manifest['init_from']} that they "
      "were trained on"
    )
  if pretrained.is_checkpoint(base):
    on = mesh or sharding.make_mesh(devices=jax.devices()[:1])
    params, found = pretrained.load(base, on, dtype=config.dtype, param_dtype=config.param_dtype, config=config)
    saved.check_manifest({"model": found.to_dict()}, {"model": config.to_dict()}, base)
  else:
    where = None if mesh is None else flax.traverse_util.flatten_dict(param_shardings(config, None, mesh), sep="/")
    params = saved.first_whole(saved.find(base), lambda s: saved.read_params(s, saved.read_manifest(s), where))[0]
  frozen = {**params, "lora_scale": jnp.float32(adapters.alpha / adapters.rank)}
  saved.check_left_out(step, manifest["left_out"], frozen)
  return frozen
