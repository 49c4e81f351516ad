"""The manifest and the commands of gke.sh."""

import json
import math

import launchers
import pytest
import yaml

SETTINGS = {"GKE_TOPOLOGY": "v5e:4x4", "GKE_IMAGE": "us-docker.pkg.dev/project/images/genrm:1"}
COMMAND = ("python", "-m", "experiments.gsm8k", "--config=c.py:gemma_2b", "--workdir=/bucket/runs/gemma-2b")


@pytest.fixture
def bench(tmp_path):
  return launchers.Bench(tmp_path, SETTINGS)


def manifest_of(bench, *words, command=COMMAND, **settings):
  printed = launchers.dry_run(bench, "gke.sh", "run", "gemma-2b", *words, "--", *command, **settings)
  kubectl, text = launchers.heredoc(printed)
  assert kubectl == ["kubectl", "apply", "--filename=-"]
  return yaml.safe_load(text)


def parts(manifest):
  """The job of the one slice, and the pod of each of its hosts."""
  (slice_,) = manifest["spec"]["replicatedJobs"]
  job = slice_["template"]["spec"]
  return job, job["template"]["spec"]


@pytest.mark.parametrize(
  "topology, options, hosts, chips, accelerator",
  [
    ("v5e:1x1", (), 1, 1, "tpu-v5-lite-podslice"),
    ("v5e:2x2", (), 1, 4, "tpu-v5-lite-podslice"),
    ("v5e:2x4", (), 2, 4, "tpu-v5-lite-podslice"),
    ("v5e:2x4", ("--chips=8",), 1, 8, "tpu-v5-lite-podslice"),
    ("v5e:8x8", (), 16, 4, "tpu-v5-lite-podslice"),
    ("v6e:4x8", (), 8, 4, "tpu-v6e-slice"),
    ("v5p:2x2x4", (), 4, 4, "tpu-v5p-slice"),
    ("v4:2x2x2", (), 2, 4, "tpu-v4-podslice"),
  ],
)
def test_hosts_times_chips_are_the_topology(topology, options, hosts, chips, accelerator, bench):
  manifest = manifest_of(bench, *options, GKE_TOPOLOGY=topology)
  assert manifest["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and manifest["kind"] == "JobSet"
  job, pod = parts(manifest)
  assert job["parallelism"] == job["completions"] == hosts and job["backoffLimit"] == 0
  (container,) = pod["containers"]
  for kind in ("requests", "limits"):
    assert container["resources"][kind] == {"google.com/tpu": chips}
  shape = topology.partition(":")[2]
  assert hosts * chips == math.prod(int(n) for n in shape.split("x"))
  selector = {"cloud.google.com/gke-tpu-accelerator": accelerator, "cloud.google.com/gke-tpu-topology": shape}
  assert pod["nodeSelector"] == selector


def test_time_to_save_and_starts_after_a_preemption(bench):
  manifest = manifest_of(bench, "--spot", "--grace=90", "--restarts=7")
  _, pod = parts(manifest)
  assert manifest["spec"]["failurePolicy"] == {"maxRestarts": 7}
  assert pod["terminationGracePeriodSeconds"] == 90 and pod["restartPolicy"] == "Never"
  assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
  assert pod["tolerations"] == [
    {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}
  ]
  _, pod = parts(manifest_of(bench))
  assert "tolerations" not in pod and "cloud.google.com/gke-spot" not in pod["nodeSelector"]


def test_the_bucket_is_a_folder(bench):
  job, pod = parts(manifest_of(bench, "--bucket=gs://my-bucket"))
  assert job["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
  (volume,) = pod["volumes"]
  assert volume["csi"]["driver"] == "gcsfuse.csi.storage.gke.io"
  assert volume["csi"]["volumeAttributes"]["bucketName"] == "my-bucket"
  assert pod["containers"][0]["volumeMounts"] == [{"name": volume["name"], "mountPath": "/bucket"}]
  job, pod = parts(manifest_of(bench))
  assert job["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "false"}
  assert "volumes" not in pod and "volumeMounts" not in pod["containers"][0]


def test_words_arrive_as_they_are(bench):
  words = ["it's", 'a "b"', "$HOME $(id) $$ \\n \\", "", "* ?", "a;b\n\tc", "ä: {b}"]
  _, pod = parts(manifest_of(bench, command=words))
  given = pod["containers"][0]["command"]
  assert [word.replace("$$", "$") for word in given] == [*words, "--distributed=auto"]  # Kubernetes does that
  assert "$(" not in "".join(given).replace("$$", "")
  _, pod = parts(manifest_of(bench, command=["python", "--distributed=off"]))
  assert pod["containers"][0]["command"] == ["python", "--distributed=off"]


STEPS = [
  ("run", "r", "--bucket=b", "--", *COMMAND),
  ("status", "r"),
  ("logs", "r"),
  ("logs", "r", "--follow", "--host=3"),
  ("delete", "r"),
]


@pytest.mark.parametrize("step", STEPS, ids=" ".join)
def test_what_is_printed_is_what_is_run(step, bench):
  called = launchers.check_printed_is_run(bench.stand_in("kubectl"), "gke.sh", *step)
  assert all(words[0] == "kubectl" for words in called)


def test_logs_are_those_of_one_host(bench):
  bench.stand_in("kubectl")
  bench.run("gke.sh", "logs", "r", "--host=3")
  ((words, _),) = bench.calls()
  selector = "jobset.sigs.k8s.io/jobset-name=r,batch.kubernetes.io/job-completion-index=3"
  assert words[:2] == ["kubectl", "logs"] and f"--selector={selector}" in words


@pytest.mark.parametrize("missing", ["GKE_TOPOLOGY", "GKE_IMAGE"])
def test_a_missing_setting_is_named(missing, bench):
  message = launchers.error_of(bench.stand_in("kubectl").run("gke.sh", "run", "r", "--", "true", **{missing: ""}))
  assert missing in message and "--" + missing.removeprefix("GKE_").lower() + "=" in message
  assert not bench.calls()


@pytest.mark.parametrize("topology", ["4x4", "v5e", "v5e:4", "v5e:4x", "v9:4x4", "v5e:0x4", "v5e:3x3", "v5e:4x4;id"])
def test_a_wrong_topology_is_named(topology, bench):
  message = launchers.error_of(bench.stand_in("kubectl").run("gke.sh", "run", "r", "--", "true", GKE_TOPOLOGY=topology))
  assert topology in message
  assert not bench.calls()


@pytest.mark.parametrize(
  "words, told",
  [
    (("run", "gemma_2b", "--", "true"), "gemma_2b"),
    (("run", "a" * 41, "--", "true"), "40"),
    (("run", "r", "--chips=0", "--", "true"), "--chips=0"),
    (("run", "r", "--chips=3", "--", "true"), "--chips=3"),
    (("run", "r"), "--"),
    (("run", "r", "--spott", "--", "true"), "--spott"),
    (("logs",), "logs RUN"),
  ],
)
def test_wrong_words_end_with_one_message(words, told, bench):
  assert told in launchers.error_of(bench.stand_in("kubectl").run("gke.sh", *words))
  assert not bench.calls()


def test_the_manifest_is_plain_json_for_its_strings(bench):
  """YAML reads more than JSON does in quotes; what is written is both."""
  printed = launchers.dry_run(bench, "gke.sh", "run", "r", "--", *COMMAND, 'a "b" \\')
  (line,) = (line for line in printed.splitlines() if line.strip().startswith("command: "))
  assert json.loads(line.partition(": ")[2]) == [*COMMAND, 'a "b" \\', "--distributed=auto"]
