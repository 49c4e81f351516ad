"""Every command of docs/pods.md runs, in order, against stubs; modules, configs and flags that they name exist."""

import functools
import importlib.util
import json
import operator
import os
import re
import shlex
import shutil

import launchers
import pytest
import yaml
from absl import flags

from experiments.configs import gsm8k
from genrm_jax import export  # noqa: F401
from genrm_jax.pipeline import cli  # noqa: F401

PAGE = (launchers.ROOT / "docs" / "pods.md").read_text()
BLOCKS = re.findall(r"^```bash\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
STUBS = "gcloud worker git pip hf ssh-add docker kubectl sbatch scontrol scancel mkdir rm python3.12"


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
  """Words and stdin of every call."""
  folder = tmp_path_factory.mktemp("page")
  bench = launchers.Bench(folder, *STUBS.split())
  (folder / "launch").symlink_to(launchers.LAUNCH)
  (folder / ".venv").mkdir()
  (folder / ".venv" / "bin").symlink_to(folder / "bin")
  done = bench.run("-euc", "\n".join(BLOCKS).replace("bash launch/worker.sh", "worker"))
  assert done.returncode == 0, done.stderr
  return bench.calls()


def commands_of(calls):
  """What the launchers run on TPUs and GPUs: module and flags."""
  for words, text in calls:
    remote = next((word.removeprefix("--command=") for word in words if word.startswith("--command=")), "")
    if words[0] == "kubectl" and text:
      words = yaml.safe_load(re.search("command: (.*)", text)[1])
    elif words[0] == "sbatch":
      words = shlex.split(text[text.index("\nsrun ") :].partition(" || ")[0])
    elif " start " in remote or " exec " in remote:
      words = shlex.split(remote)
    if "python" in words:
      _, _, module, *options = words[words.index("python") :]
      yield module, dict(option.removeprefix("--").split("=", 1) for option in options)


def test_commands_name_what_exists(calls):
  assert set(STUBS.split()) <= {words[0] for words, _ in calls} | {"rm"}
  commands = list(commands_of(calls))
  (exporting,) = (options for module, options in commands if module == "genrm_jax.export")
  runs = [options for module, options in commands if module == "experiments.gsm8k"]
  assert len(runs) == 5 and set(exporting) <= set(flags.FLAGS)
  assert all(importlib.util.find_spec(module) for module, _ in commands)
  for options in runs:
    path, _, variant = options.pop("config").partition(":")
    assert (launchers.ROOT / path).is_file()
    config = gsm8k.get_config(variant)
    given = {name.removeprefix("config."): options.pop(name) for name in list(options) if name.startswith("config.")}
    types = {key: type(functools.reduce(operator.getitem, key.split("."), config)) for key in given}
    config.update_from_flattened_dict({key: types[key](value) for key, value in given.items()})
    assert set(options) <= set(flags.FLAGS)
    assert {"data_dir", "model.checkpoint", "tokenizer.path"} <= set(given)
    shards = 64 // config.mesh.tensor if config.mesh.tensor > 1 else 16
    assert all(v.loop.batch_size % shards == 0 for v in config.verifiers.values() if "loop" in v)


def test_gcloud_accepts_every_flag(calls, tmp_path):
  """gcloud's own parser reads the commands; nothing runs."""
  gcloud = shutil.which("gcloud") or pytest.skip("gcloud is not installed")
  commands = [shlex.join(words) for words, _ in calls if words[0] == "gcloud"]
  commands.append(commands[0].replace("--project=", "--projekt="))  # the one that must be refused
  (tmp_path / "c.json").write_text(json.dumps([{"command_string": command} for command in commands]))
  environ = {**os.environ, "CLOUDSDK_CONFIG": str(tmp_path / "gcloud"), "CLOUDSDK_CORE_CHECK_GCE_METADATA": "false"}
  done = launchers.run([gcloud, "meta", "lint-gcloud-commands", "--commands-file=c.json"], tmp_path, env=environ)
  assert [entry["command_string"] for entry in json.loads(done.stdout) if not entry["success"]] == commands[-1:]
