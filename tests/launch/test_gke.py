"""The manifest of gke.sh."""

import json
import math

import launchers
import pytest
import yaml

SETTINGS = {"GKE_TOPOLOGY": "v5e:4x4", "GKE_IMAGE": "us-docker.pkg.dev/project/images/genrm:1"}


@pytest.fixture
def bench(tmp_path):
  return launchers.Bench(tmp_path, SETTINGS)


def manifest_of(bench, *options, command=("true",), **settings):
  kubectl, text = launchers.heredoc(bench.dry_run("gke.sh", "run", "gemma-2b", *options, "--", *command, **settings))
  assert kubectl == ["kubectl", "apply", "--filename=-"]
  return yaml.safe_load(text)


def job_and_pod(manifest):
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
def test_hosts_and_chips_match_the_topology(topology, options, hosts, chips, accelerator, bench):
  manifest = manifest_of(bench, *options, GKE_TOPOLOGY=topology)
  assert manifest["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and manifest["kind"] == "JobSet"
  job, pod = job_and_pod(manifest)
  assert job["parallelism"] == job["completions"] == hosts and job["backoffLimit"] == 0
  assert pod["containers"][0]["resources"] == {kind: {"google.com/tpu": chips} for kind in ("requests", "limits")}
  shape = topology.partition(":")[2]
  assert hosts * chips == math.prod(int(n) for n in shape.split("x"))
  selector = {"cloud.google.com/gke-tpu-accelerator": accelerator, "cloud.google.com/gke-tpu-topology": shape}
  assert pod["nodeSelector"] == selector


def test_grace_restarts_and_spot(bench):
  manifest = manifest_of(bench, "--spot", "--grace=90", "--restarts=7")
  _, pod = job_and_pod(manifest)
  assert manifest["spec"]["failurePolicy"] == {"maxRestarts": 7}
  assert pod["terminationGracePeriodSeconds"] == 90 and pod["restartPolicy"] == "Never"
  assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
  spot = {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}
  assert pod["tolerations"] == [spot]
  _, pod = job_and_pod(manifest_of(bench))
  assert "tolerations" not in pod and "cloud.google.com/gke-spot" not in pod["nodeSelector"]


def test_bucket_is_mounted(bench):
  job, pod = job_and_pod(manifest_of(bench, "--bucket=gs://my-bucket"))
  assert job["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
  (volume,) = pod["volumes"]
  assert volume["csi"]["driver"] == "gcsfuse.csi.storage.gke.io"
  assert volume["csi"]["volumeAttributes"]["bucketName"] == "my-bucket"
  assert pod["containers"][0]["volumeMounts"] == [{"name": volume["name"], "mountPath": "/bucket"}]
  job, pod = job_and_pod(manifest_of(bench))
  assert job["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "false"}
  assert "volumes" not in pod and "volumeMounts" not in pod["containers"][0]


def test_command_arrives_unchanged(bench):
  printed = bench.dry_run("gke.sh", "run", "r", "--", *launchers.ODD_WORDS)
  (line,) = (line for line in printed.splitlines() if line.strip().startswith("command: "))
  _, pod = job_and_pod(yaml.safe_load(launchers.heredoc(printed)[1]))
  words = pod["containers"][0]["command"]
  assert words == json.loads(line.partition(": ")[2])  # valid as YAML and as JSON
  assert "$(" not in "".join(words).replace("$$", "")
  assert [word.replace("$$", "$") for word in words] == [
    *launchers.ODD_WORDS,
    "--distributed=auto",
  ]  # as Kubernetes does


def test_logs_of_one_host(bench):
  printed = bench.dry_run("gke.sh", "logs", "r", "--host=3")
  assert "jobset.sigs.k8s.io/jobset-name=r,batch.kubernetes.io/job-completion-index=3" in printed
