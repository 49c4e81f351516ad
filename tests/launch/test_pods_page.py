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
STUBS = ("git", "pip", "hf", "ssh-add", "docker", "kubectl", "sbatch", "scontrol", "scancel", "mkdir", "python3.12")


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
  """Words and stdin of every call."""
  folder = tmp_path_factory.mktemp("page")
  bench = launchers.Bench(folder).stub("gcloud", "worker", *STUBS)
  (folder / "launch").symlink_to(launchers.LAUNCH)
  (folder / ".venv" / "bin").mkdir(parents=True)
  (folder / ".venv" / "bin" / "pip").symlink_to(folder / "bin" / "pip")
  done = bench.bash("\n".join(BLOCKS).replace("bash launch/worker.sh", "worker"))
  assert done.returncode == 0, done.stderr
  return bench.calls()


@pytest.fixture(scope="module")
def commands(calls):
  """What the launchers run on TPUs and GPUs: module and flags."""
  found = []
  for words, text in calls:
    remote = next((word.removeprefix("--command=") for word in words if word.startswith("--command=")), "")
    if words[0] == "kubectl" and text:
      (slice_,) = yaml.safe_load(text)["spec"]["replicatedJobs"]
      found.append(slice_["template"]["spec"]["template"]["spec"]["containers"][0]["command"])
    elif words[0] == "sbatch":
      found += [shlex.split(line.partition(" || ")[0]) for line in text.splitlines() if line.startswith("srun ")]
    elif words[:2] == ["worker", "start"]:
      found.append(words)
    elif " start " in remote or " exec " in remote:
      found.append(shlex.split(remote))
  tails = [words[words.index("python") :] for words in found]
  assert all(importlib.util.find_spec(module) for _, _, module, *_ in tails)
  return [(words[2], dict(word.removeprefix("--").split("=", 1) for word in words[3:])) for words in tails]


def test_commands_name_what_exists(calls, commands):
  assert {"gcloud", "kubectl", "sbatch", "scancel", "docker", "hf", "git", "worker"} <= {words[0] for words, _ in calls}
  (exporting,) = (options for module, options in commands if module == "genrm_jax.export")
  assert set(exporting) <= set(flags.FLAGS)
  runs = [dict(options) for module, options in commands if module == "experiments.gsm8k"]
  assert len(runs) == 5
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
  path = tmp_path / "commands.json"
  path.write_text(json.dumps([{"command_string": command} for command in commands]))
  environ = {**os.environ, "CLOUDSDK_CONFIG": str(tmp_path / "gcloud"), "CLOUDSDK_CORE_CHECK_GCE_METADATA": "false"}
  words = [gcloud, "meta", "lint-gcloud-commands", f"--commands-file={path}"]
  done = launchers.run(words, tmp_path, env=environ)
  assert done.returncode == 0, done.stderr
  assert [entry["command_string"] for entry in json.loads(done.stdout) if not entry["success"]] == commands[-1:]
