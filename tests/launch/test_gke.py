"""The manifest of gke.sh."""

import json
import math

import launchers
import pytest
import yaml


def manifest_of(bench, *options, **settings):
  """The JobSet, the specs of its job and pod, and the pod's container."""
  _, text = launchers.heredoc(bench.dry_run("gke.sh", "run", "gemma-2b", *options, "--", "true", **settings))
  jobset = yaml.safe_load(text)
  (slice_,) = jobset["spec"]["replicatedJobs"]
  pod = slice_["template"]["spec"]["template"]["spec"]
  return jobset, slice_["template"]["spec"], pod, pod["containers"][0]


@pytest.mark.parametrize(
  "topology, options, hosts, chips, accelerator",
  [
    ("v5e:1x1", (), 1, 1, "tpu-v5-lite-podslice"),
    ("v5e:2x4", (), 2, 4, "tpu-v5-lite-podslice"),
    ("v5e:2x4", ("--chips=8",), 1, 8, "tpu-v5-lite-podslice"),
    ("v6e:4x8", (), 8, 4, "tpu-v6e-slice"),
    ("v5p:2x2x4", (), 4, 4, "tpu-v5p-slice"),
    ("v4:2x2x2", (), 2, 4, "tpu-v4-podslice"),
  ],
)
def test_hosts_and_chips_match_the_topology(topology, options, hosts, chips, accelerator, bench):
  _, job, pod, container = manifest_of(bench, *options, GKE_TOPOLOGY=topology)
  shape = topology.partition(":")[2]
  assert job["parallelism"] == job["completions"] == hosts
  assert hosts * chips == math.prod(int(n) for n in shape.split("x"))
  assert container["resources"] == {kind: {"google.com/tpu": chips} for kind in ("requests", "limits")}
  selector = {"cloud.google.com/gke-tpu-accelerator": accelerator, "cloud.google.com/gke-tpu-topology": shape}
  assert pod["nodeSelector"] == selector


def test_options(bench):
  jobset, job, pod, container = manifest_of(bench, "--spot", "--grace=90", "--restarts=7", "--bucket=gs://my-bucket")
  assert jobset["spec"]["failurePolicy"] == {"maxRestarts": 7} and job["backoffLimit"] == 0
  assert pod["terminationGracePeriodSeconds"] == 90 and pod["restartPolicy"] == "Never"
  spot = {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}
  assert pod["tolerations"] == [spot] and pod["nodeSelector"][spot["key"]] == spot["value"]
  assert job["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
  (volume,) = pod["volumes"]
  assert volume["csi"]["volumeAttributes"]["bucketName"] == "my-bucket"
  assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": "/bucket"}]

  _, job, pod, container = manifest_of(bench)
  assert job["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "false"}
  assert not {"tolerations", "volumes"} & set(pod) and "volumeMounts" not in container
  assert spot["key"] not in pod["nodeSelector"]


def test_command_arrives_unchanged(bench):
  printed = bench.dry_run("gke.sh", "run", "r", "--", *launchers.ODD_WORDS)
  (line,) = (line for line in printed.splitlines() if line.strip().startswith("command: "))
  words = json.loads(line.partition(": ")[2])
  assert yaml.safe_load(line)["command"] == words  # valid as YAML and as JSON
  assert "$(" not in "".join(words).replace("$$", "")
  unescaped = [word.replace("$$", "$") for word in words]  # as Kubernetes does
  assert unescaped == [*launchers.ODD_WORDS, "--distributed=auto"]
