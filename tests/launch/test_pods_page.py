"""Every command of docs/pods.md, in order, among stand-ins; and what they say of experiments, configs and gcloud."""

import importlib.util
import re
import shlex

import launchers
import pytest
import yaml
from absl import flags

from experiments.configs import gsm8k
from genrm_jax import export

PAGE = (launchers.ROOT / "docs" / "pods.md").read_text()
BLOCKS = re.findall(r"^```bash\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
OTHERS = ("git", "pip", "hf", "ssh-add", "docker", "kubectl", "sbatch", "scontrol", "scancel", "mkdir", "python3.12")
# Of the experiment, beside its config.
EXPERIMENT = {"workdir", "stages", "distributed", "coordinator", "num_processes", "process_id"}


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
  """The words and the input of every call that the page makes."""
  folder = tmp_path_factory.mktemp("page")
  bench = launchers.Bench(folder).stand_in("gcloud", *OTHERS)
  launch, pip = folder / "launch", folder / ".venv" / "bin" / "pip"
  launch.symlink_to(launchers.LAUNCH)
  pip.parent.mkdir(parents=True)
  pip.symlink_to(folder / "bin" / "pip")
  text = "\n".join(BLOCKS).replace("bash launch/worker.sh", "worker")
  bench.stand_in("worker")  # it would start here what belongs elsewhere
  done = bench.bash(text)
  assert done.returncode == 0, done.stderr
  return bench.calls()


@pytest.fixture(scope="module")
def commands(calls):
  """What the launchers were given to run on TPUs and GPUs."""
  found = []
  for words, given in calls:
    text = next((word.removeprefix("--command=") for word in words if word.startswith("--command=")), "")
    if words[0] == "kubectl" and given:
      (slice_,) = yaml.safe_load(given)["spec"]["replicatedJobs"]
      found.append(slice_["template"]["spec"]["template"]["spec"]["containers"][0]["command"])
    elif words[0] == "sbatch":
      (line,) = (line for line in given.splitlines() if line.startswith("srun "))
      found.append(shlex.split(line.partition(" || ")[0])[2:])
    elif words[0] == "worker" and words[1] == "start":
      found.append(words[3:])
    elif " start " in text or " exec " in text:
      found.append(shlex.split(text)[3 + (" start " in text) :])
  return [words[words.index("python") :] for words in found]


def options_of(words):
  return dict(word.removeprefix("--").split("=", 1) for word in words[3:])


def test_the_page_has_commands_of_every_launcher(calls, commands):
  programs = {words[0] for words, _ in calls}
  assert {"gcloud", "kubectl", "sbatch", "scancel", "docker", "hf", "git", "worker"} <= programs
  assert [words[2] for words in commands].count("experiments.gsm8k") == 5
  assert "genrm_jax.export" in {words[2] for words in commands}


def test_modules_and_their_options_exist(commands):
  for _, option, module, *_ in commands:
    assert option == "-m" and importlib.util.find_spec(module)
  (words,) = (words for words in commands if words[2] == "genrm_jax.export")
  assert export and set(options_of(words)) <= set(flags.FLAGS)


def test_configs_have_the_settings(commands):
  for words in commands:
    if words[2] != "experiments.gsm8k":
      continue
    options = options_of(words)
    path, _, variant = options.pop("config").partition(":")
    assert (launchers.ROOT / path).is_file()
    config = gsm8k.get_config(variant)
    given = {name.removeprefix("config."): options.pop(name) for name in list(options) if name.startswith("config.")}
    config.update_from_flattened_dict({key: type(_value(config, key))(value) for key, value in given.items()})
    assert set(options) <= EXPERIMENT
    assert {"data_dir", "model.checkpoint", "tokenizer.path"} <= set(given)
    assert options["workdir"].startswith(("gs://", "/shared/"))
    assert given["data_dir"].startswith(("/bucket/", "/shared/"))
    shards = 64 // config.mesh.tensor if config.mesh.tensor > 1 else 16
    assert all(v.loop.batch_size % shards == 0 for v in config.verifiers.values() if "loop" in v)


def test_settings_of_the_text_exist():
  config = gsm8k.get_config("gemma_2b")
  for key, value in re.findall(r"`--config\.([\w.]+)=(\w+)`", PAGE):
    assert isinstance(_value(config, key), type(int(value)))
  for variant in re.findall(r"`:(gemma\w+)`", PAGE):
    gsm8k.get_config(variant)
  for name in re.findall(r"launch/[\w.]+", PAGE):
    assert (launchers.ROOT / name).is_file()


def test_gcloud_itself_knows_every_flag(calls, tmp_path):
  given = [shlex.join(words) for words, _ in calls if words[0] == "gcloud"]
  assert not launchers.refused_by_gcloud(given, tmp_path)


def _value(config, key):
  for name in key.split("."):
    config = config[name]
  return config
