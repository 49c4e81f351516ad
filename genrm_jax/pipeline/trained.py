"""Opening what was trained, with nothing but its path.

verifier = genrm_jax.load("runs/last_letter/checkpoints/genrm_cot")
verifier.score(question, solution)        # mean p(Yes) over the votes that the run was configured for
verifier.rationales(question, solution)   # what it wrote, vote by vote

params, manifest = genrm_jax.load_params("runs/last_letter/checkpoints/genrm_cot")     # NumPy, for analysis
"""

import dataclasses
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
from genrm_jax.text.prompts import Prompter, make_format
from genrm_jax.text.tokenizer import check_vocab, load_tokenizer
from genrm_jax.training import saved
from genrm_jax.verifiers import scoring
from genrm_jax.verifiers.base import Verifier, VoteConfig, make_verifier


@dataclasses.dataclass(frozen=True)
class TrainedVerifier:
  """A verifier with its model, ready to score.

  Attributes:
    verifier: what it asks and how it votes.
    engine: its model on devices.
    how: number of votes, seed and sampling, where a call does not say otherwise.
    step: of the checkpoint; 0 for a model that was not trained.
    manifest: all that the checkpoint says of itself.
  """

  verifier: Verifier
  engine: Engine
  how: VoteConfig
  step: int
  manifest: Mapping[str, Any]

  def score(
    self, question: str, solution: str, *, num_votes: int | None = None, seed: int | None = None
  ) -> float | None:
    """How good the solution is, in [0, 1]; None where no vote could be read, or the texts exceed the context.

    Of a DPO verifier it is the likelihood of the solution, which ranks solutions to one problem and says no more.
    """
    return self.score_many([(question, solution)], num_votes=num_votes, seed=seed)[0]

  def score_many(
    self, pairs: Sequence[tuple[str, str]], *, num_votes: int | None = None, seed: int | None = None
  ) -> list[float | None]:
    """The scores of (question, solution) pairs, each as `score` gives it, whatever else is scored.

    Raises:
      UserError: the tokenizer cannot express a text.
    """
    return [self.verifier.value(votes) for votes in self._votes(pairs, num_votes, seed)]

  def rationales(
    self, question: str, solution: str, *, num_votes: int | None = None, seed: int | None = None
  ) -> list[Vote]:
    """The votes behind `score`: text, state and p(Yes) of each. UserError if the verifier writes no rationales."""
    if not self.verifier.samples_rationales:
      raise UserError(f"{self.verifier.name} writes no rationale; use score")
    return self._votes([(question, solution)], num_votes, seed)[0]

  def score_candidates(self, problems: Sequence[Problem], candidates: Sequence[Candidate]) -> list[Score]:
    """A score with all its votes for each candidate, as a run writes them to scores/; `problems` hold the questions."""
    return scoring.score_candidates(self.verifier, self.engine, problems, candidates, self.how, self.step)

  def _votes(self, pairs: Sequence[tuple[str, str]], num_votes: int | None, seed: int | None) -> list[list[Vote]]:
    how = VoteConfig(
      self.how.num_votes if num_votes is None else num_votes,
      self.how.seed if seed is None else seed,
      self.how.sample,
    )
    return scoring.score_pairs(self.verifier, self.engine, pairs, how)


class LoadedStep(NamedTuple):
  """A whole step of a training: what it says of itself, its tokenizer and templates, its model, its parameters."""

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
    path: of a training (WORKDIR/checkpoints/NAME; its best step is taken) or of one step; local or gs://.
    base: for adapters that were saved alone: what they were trained on, a training of ours or a Gemma checkpoint.
    mesh: where to put it; all devices, each with all parameters, if None.
    dtype: of parameters and activations, "float32" or "bfloat16"; the training's own if None.
    rows_per_batch: rows that go through the model at a time, votes included.

  Raises:
    UserError: no such checkpoint; an unfinished, damaged or foreign one, or one that is no verifier's; its own module
      does not import; or too little memory for its parameters.
  """
  mesh = sharding.make_mesh(data=-1) if mesh is None else mesh
  loaded = open_step(path, base, mesh)
  manifest, config, params = loaded.manifest, loaded.config, loaded.params
  if manifest["verifier"] is None:
    raise UserError(
      f"{loaded.step} is the {manifest['run']} of a run and no verifier; open its parameters with genrm_jax.load_params"
    )
  if dtype is not None:
    config = dataclasses.replace(config, dtype=dtype, param_dtype=dtype)
    params = jax.jit(lambda tree: jax.tree.map(lambda p: p.astype(dtype), tree), donate_argnums=0)(params)
  how = manifest["scoring"]
  return TrainedVerifier(
    verifier_of(manifest, loaded.prompter),
    make_engine(params, config, mesh, loaded.prompter.end_id, rows_per_batch, how["max_tokens"]),
    VoteConfig(how["num_votes"], how["seed"], SampleConfig(**how["sample"])),
    manifest["step"],
    manifest,
  )


def load_params(path: Any, *, base: Any = None) -> tuple[gemma.Params, dict[str, Any]]:
  """Parameters of any training as NumPy arrays, adapters merged, and the manifest; no optimiser, no mesh.

  Raises:
    UserError: as `load`.
  """
  loaded = open_step(path, base, None)
  return loaded.params, loaded.manifest


def verifier_of(manifest: Mapping[str, Any], prompter: Prompter) -> Verifier:
  """The verifier that a checkpoint's manifest describes."""
  about = manifest["verifier"]
  return make_verifier(about["name"], prompter, {**about["settings"], "kind": about["kind"]})


def make_engine(
  params: gemma.Params, config: ModelConfig, mesh: Mesh, end_id: int, rows_per_batch: int, max_tokens: int
) -> Engine:
  """An engine whose parameters are cast once to the dtypes that they are used in. Donates `params`."""
  return Engine(gemma.as_used(params, config), config, mesh, end_id, rows_per_batch, max_tokens)


def open_step(
  path: Any,
  base: Any,
  mesh: Mesh | None,
  expected: Mapping[str, Any] | None = None,
  rules: sharding.Rules | None = None,
) -> LoadedStep:
  """The best whole step of a training, on a mesh, or as NumPy arrays if that is None. Adapters are merged.

  Args:
    path: as for `load`.
    base: as for `load`.
    mesh: the devices.
    expected: entries that the manifest must have.
    rules: sharding rules; those of the model's family if None.
  """

  def read(step: epath.Path) -> LoadedStep:
    manifest = saved.read_manifest(step)
    prompter = _prompter(step, manifest)
    ids = {"yes": prompter.yes_id, "no": prompter.no_id, "cls": prompter.tokenizer.cls_id}
    saved.check_manifest(manifest, {"verdict_ids": ids, **(expected or {})}, step)
    config = ModelConfig.from_dict(manifest["model"] | {"sharding": dict(rules or {})})
    check_vocab(prompter.tokenizer, config.vocab_size)
    adapters = _adapters(manifest)
    shardings = None if mesh is None else _flat(param_shardings(config, adapters, mesh))
    params = saved.read_params(step, manifest, shardings)
    if adapters is not None:
      if manifest["left_out"]:
        params |= _base(step, manifest, adapters, base, config, mesh)
      merged = lora.merge(params)
      params = jax.device_get(merged) if mesh is None else merged
    return LoadedStep(step, manifest, prompter, config, params)

  return saved.first_whole(saved.find(path), read)[0]


def param_shardings(config: ModelConfig, adapters: lora.LoraConfig | None, mesh: Mesh) -> Any:
  """The sharding of every parameter of a model, and of its adapters if it has any."""
  specs = gemma.param_specs(config) | (lora.param_specs(config, adapters) if adapters else {})
  return sharding.param_shardings(specs, mesh, config.rules)


def _flat(tree: Any) -> dict[str, Any]:
  return flax.traverse_util.flatten_dict(tree, sep="/")


def _prompter(step: epath.Path, manifest: Mapping[str, Any]) -> Prompter:
  try:
    tokenizer = load_tokenizer(manifest["tokenizer"], step / "files")
  except UserError as e:
    raise saved.Damaged(f"checkpoint {step} is damaged: {e}") from e
  return Prompter(tokenizer, make_format(manifest["prompts"]))


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
    shardings = None if mesh is None else _flat(param_shardings(config, None, mesh))
    params = saved.first_whole(saved.find(base), lambda s: saved.read_params(s, saved.read_manifest(s), shardings))[0]
  frozen = {**params, "lora_scale": jnp.float32(adapters.alpha / adapters.rank)}
  saved.check_left_out(step, manifest["left_out"], frozen)
  return frozen
