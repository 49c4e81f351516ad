"""The library in functions: train, score and evaluate from a script or a notebook.

    import genrm_jax

    verifiers = genrm_jax.train("last_letter:smoke", "runs/smoke")      # {"orm": TrainedVerifier, ...}
    scores = genrm_jax.score("last_letter:smoke", "runs/smoke")         # {"orm": [Score, ...], ...}
    results = genrm_jax.evaluate("last_letter:smoke", "runs/smoke")     # the contents of report/results.json

Each runs the stages that its result needs and skips finished ones, so calls may come in any order, and an interrupted
call resumes. To change settings, edit a config: `config = genrm_jax.get_config("last_letter:smoke"); config.seed = 1`.
"""

import importlib.util
import os
import pathlib
import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import ml_collections

from genrm_jax.data import jsonl
from genrm_jax.pipeline import checks, locate, settings, stages
from genrm_jax.pipeline.experiment import make_stages
from genrm_jax.pipeline.run import Run
from genrm_jax.pipeline.trained import TrainedVerifier
from genrm_jax.records import Score
from genrm_jax.runtime import distributed
from genrm_jax.runtime.errors import UserError
from genrm_jax.runtime.progress import say
from genrm_jax.training import saved

Config: TypeAlias = str | Any  # a name, or a ConfigDict


def get_config(name: str) -> ml_collections.ConfigDict:
  """The config of a run, to be changed before it is passed on.

  Args:
    name: "NAME:VARIANT" of the installed experiments.configs, or "FILE.py:VARIANT".

  Returns:
    What `get_config(VARIANT)` of the file returns.

  Raises:
    UserError: the file does not exist, fails, or defines no `get_config` that returns a ConfigDict.
  """
  path, _, variant = locate.config_path(name).rpartition(".py")
  file = pathlib.Path(f"{path}.py")
  spec = importlib.util.spec_from_file_location(f"genrm_jax_config_{file.stem}", file)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    if not callable(getattr(module, "get_config", None)):
      raise UserError(f"{file} has no function get_config(variant); see experiments/configs for examples")
    config = module.get_config(*([variant.removeprefix(":")] if variant else []))
  except UserError:
    raise
  except Exception as e:  # whatever the user's file raises
    raise UserError(f"{_line_of(e, file)}: {type(e).__name__}: {' '.join(str(e).split())}") from e
  if not isinstance(config, ml_collections.ConfigDict):
    raise UserError(f"{file}: get_config returns {type(config).__name__}, not a ConfigDict")
  return config


def _line_of(error: Exception, file: pathlib.Path) -> str:
  """FILE:LINE where a config file failed."""
  if isinstance(error, SyntaxError) and error.lineno:
    return f"{error.filename}:{error.lineno}"
  frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)]
  return f"{file}:{frames[-1].lineno}" if frames else str(file)


class TrainedVerifiers(Mapping[str, TrainedVerifier]):
  """The verifiers of a run by name. Each is opened on the devices when it is first used, and stays open."""

  def __init__(self, run: Run, names: Sequence[str]):
    self._run, self._names = run, tuple(names)
    self._open: dict[str, TrainedVerifier] = {}

  def __getitem__(self, name: str) -> TrainedVerifier:
    if name not in self._names:
      raise KeyError(name)
    if name not in self._open:
      self._open[name] = self._run.trained_verifier(name)
    return self._open[name]

  def __iter__(self) -> Iterator[str]:
    return iter(self._names)

  def __len__(self) -> int:
    return len(self._names)


def train(config: Config, workdir: Any, verifiers: Sequence[str] = (), *, rerun: bool = False) -> TrainedVerifiers:
  """Trains verifiers, after making what they need: problems, a generator, candidates, rationales.

  Args:
    config: "NAME:VARIANT", "FILE.py:VARIANT" or a ConfigDict.
    workdir: folder for all files of the run; local or gs://.
    verifiers: names in `config.verifiers`; all if empty. The judge, which is not trained, is included.
    rerun: whether stages whose settings or inputs have changed since they ran are done again, and not refused.

  Returns:
    The verifiers by name, each opened when it is first used.

  Raises:
    UserError: a setting, an input or the workdir cannot be used.
  """
  run = open_run(config, workdir)
  names = chosen_verifiers(run, verifiers)
  untrained = [name for name in names if not run.verifier_type(name).is_trained]
  # An untrained verifier needs what it starts from.
  files = [f"checkpoints/{run.training(name).init_from}" for name in untrained]
  files += ["tokenizer.model"] if untrained else []
  run_up_to(run, [f"train_{name}" for name in names], files, rerun=rerun)
  return TrainedVerifiers(run, names)


def score(
  config: Config, workdir: Any, verifiers: Sequence[str] = (), *, rerun: bool = False
) -> dict[str, list[Score]]:
  """Trains if necessary, then scores the candidates of the evaluation split.

  Args:
    config: as for `train`.
    workdir: as for `train`.
    verifiers: names in `config.verifiers`; all if empty.
    rerun: as for `train`.

  Returns:
    One score per candidate for each verifier, by its name, as in `scores/<verifier>.jsonl`.

  Raises:
    UserError: as for `train`.
  """
  run = open_run(config, workdir)
  names = chosen_verifiers(run, verifiers)
  run_up_to(run, [f"score_{name}" for name in names], rerun=rerun)
  return {name: run.scores(name, "eval") for name in names}


def evaluate(config: Config, workdir: Any, *, rerun: bool = False) -> dict[str, Any]:
  """Trains and scores if necessary, then compares all verifiers.

  Args:
    config: as for `train`.
    workdir: as for `train`.
    rerun: as for `train`.

  Returns:
    The contents of report/results.json: Best-of-N, verification accuracy and more, with intervals. Plots: report/.

  Raises:
    UserError: as for `train`.
  """
  run = open_run(config, workdir)
  run_up_to(run, ["report"], rerun=rerun)
  return jsonl.read_json(run.path("report", "results.json"))


def open_run(config: Config, workdir: Any) -> Run:
  """Checks all settings and returns the run; writes nothing. Raises UserError as `train`."""
  config = get_config(config) if isinstance(config, str) else ml_collections.ConfigDict(config)
  settings.expand_paths(config)
  settings.check(config.to_dict())
  use_cpu_devices(config.cpu_devices)
  run = Run(ml_collections.FrozenConfigDict(config), saved.absolute(workdir))
  checks.check_run(run)
  distributed.check_same("the config", jsonl.digest_of(run.config.to_dict()))
  return run


def run_up_to(run: Run, last: Collection[str], files: Collection[str] = (), rerun: bool = False) -> None:
  """Runs the stages named in `last` and those that write `files`, preceded by the stages whose files they need."""
  every = make_stages(run)
  needed, chosen = set(files), []
  for stage in reversed(every):
    if stage.name in last or needed & set(stage.writes):
      chosen.append(stage.name)
      needed |= set(stage.reads)
  if chosen:
    stages.run_stages(run.workdir, run.config.to_dict(), every, chosen, say, rerun)


def use_cpu_devices(number: int) -> None:
  """Splits the CPU into `number` devices unless XLA_FLAGS sets a number already. Call it before JAX starts.

  Two devices with half of the batch each keep two cores busy on a small model; a single device hardly does.
  """
  if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
    return
  try:
    jax.config.update("jax_num_cpu_devices", number)
  except RuntimeError:  # in a notebook JAX may have started
    if jax.default_backend() == "cpu" and jax.local_device_count() != number:
      say(f"JAX has started with {jax.local_device_count()} CPU devices; config.cpu_devices={number} has no effect")


def chosen_verifiers(run: Run, verifiers: Sequence[str]) -> list[str]:
  """The verifiers called `verifiers`, all of the config's if empty. UserError if it lacks one."""
  unknown = [name for name in verifiers if name not in run.verifier_names]
  if unknown:
    raise UserError(f"the config has no verifier {', '.join(unknown)}; it has: {', '.join(run.verifier_names)}")
  return list(verifiers) or list(run.verifier_names)
