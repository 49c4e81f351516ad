"""A config that remembers which settings were read, to compare with those that a stage names."""

import collections.abc
import dataclasses
import functools

import ml_collections

from genrm_jax.pipeline import stages as staging
from genrm_jax.pipeline.experiment import make_stages


class RecordedConfig(collections.abc.Mapping):
  """Stands for a ConfigDict; adds the dotted key of each value that is read to `seen`."""

  def __init__(self, config, seen, key=""):
    self._config, self._seen, self._key = config, seen, key

  def __getitem__(self, name):
    value, key = self._config[name], f"{self._key}.{name}" if self._key else name
    if isinstance(value, ml_collections.ConfigDict):
      return RecordedConfig(value, self._seen, key)
    self._seen.add(key)
    return value

  def __getattr__(self, name):
    try:
      return self[name]
    except KeyError as e:
      raise AttributeError(str(e)) from e

  def __iter__(self):
    return iter(self._config)

  def __len__(self):
    return len(self._config)

  def __contains__(self, name):
    return name in self._config

  def to_dict(self):
    return {name: value.to_dict() if isinstance(value, RecordedConfig) else value for name, value in self.items()}


def undeclared_reads(run, selected):
  """Runs stages; returns, by stage, the settings that it read but does not name in `Stage.settings`."""
  seen: set[str] = set()
  recorded = dataclasses.replace(run, config=RecordedConfig(run.config, seen))
  found = {}

  def work(stage):
    for name in [n for n, kind in vars(type(run)).items() if isinstance(kind, functools.cached_property)]:
      recorded.__dict__.pop(name, None)  # each stage reads by itself
    seen.clear()
    stage.run()
    found[stage.name] = {key for key in seen if not staging.covers(stage.settings, key)}

  stages = [dataclasses.replace(stage, run=functools.partial(work, stage)) for stage in make_stages(recorded)]
  staging.run_stages(run.workdir, run.config.to_dict(), stages, selected, lambda line: None)
  return found
