#!/usr/bin/env bash
# One slice of TPUs on GKE, as a JobSet, by the kubectl of the cluster. docs/pods.md
#
#   bash launch/gke.sh run RUN --topology=v5e:4x4 --image=IMAGE [--bucket=BUCKET] [--spot] [--chips=4] [--grace=300] \
#     [--restarts=10] -- python -m experiments.gsm8k --config=... --workdir=/bucket/runs/RUN
#   bash launch/gke.sh status RUN
#   bash launch/gke.sh logs RUN [--follow] [--host=0]
#   bash launch/gke.sh delete RUN                  SIGTERM; it saves and ends, and the same run command goes on
#
# --dry-run, anywhere, prints the manifest and the command instead of running it. The topology is written as for the
# planner: v4, v5e, v5p or v6e, and the chips in each direction. --chips is how many a host has: 4, or 8 on machines
# whose type ends with 8t. --image holds this repository (launch/Dockerfile). --bucket becomes the folder /bucket. After
# a preemption, or whatever else ends a host, all start again, --restarts times. Each setting can stand in the
# environment (GKE_TOPOLOGY, GKE_IMAGE, GKE_BUCKET, ...).
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"

parse GKE "topology image bucket chips grace restarts host" "spot follow" "$@"

accelerator() { # The label of the nodes of a generation.
  case "${GKE_TOPOLOGY%%:*}" in
  v4) echo tpu-v4-podslice ;;
  v5e) echo tpu-v5-lite-podslice ;;
  v5p) echo tpu-v5p-slice ;;
  v6e) echo tpu-v6e-slice ;;
  esac
}

json() { # WORDS: a list of strings, which YAML reads as well. Of two $ in a command Kubernetes makes one.
  local word all=""
  for word in "$@"; do
    word=${word//\\/\\\\}
    word=${word//\"/\\\"}
    word=${word//$'\n'/\\n}
    word=${word//$'\t'/\\t}
    all="$all, \"${word//\$/\$\$}\""
  done
  echo "[${all#, }]"
}

only_if() { [ -z "$1" ] || cat; } # WORD: passes its input on if there is one

manifest() { # HOSTS, CHIPS OF EACH
  cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: ${words[1]}
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: ${GKE_RESTARTS:-10}
  replicatedJobs:
  - name: slice
    replicas: 1
    template:
      spec:
        parallelism: $1
        completions: $1
        backoffLimit: 0
        template:
          metadata:
            annotations: {gke-gcsfuse/volumes: "$([ -z "${GKE_BUCKET:-}" ] && echo false || echo true)"}
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: ${GKE_GRACE:-300}
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: $(accelerator)
              cloud.google.com/gke-tpu-topology: ${GKE_TOPOLOGY#*:}
YAML
  only_if "${GKE_SPOT:-}" <<YAML
              cloud.google.com/gke-spot: "true"
            tolerations:
            - {key: cloud.google.com/gke-spot, operator: Equal, value: "true", effect: NoSchedule}
YAML
  cat <<YAML
            containers:
            - name: experiment
              image: $GKE_IMAGE
              command: $(json "${command[@]}")
              resources: {requests: {google.com/tpu: $2}, limits: {google.com/tpu: $2}}
YAML
  # Nothing is remembered of files, for other hosts write them too. Checkpoints are renamed when they are whole.
  only_if "${GKE_BUCKET:-}" <<YAML
              volumeMounts:
              - {name: bucket, mountPath: /bucket}
            volumes:
            - name: bucket
              csi:
                driver: gcsfuse.csi.storage.gke.io
                volumeAttributes:
                  bucketName: ${GKE_BUCKET#gs://}
                  mountOptions: "implicit-dirs,file-system:rename-dir-limit:100000,metadata-cache:ttl-secs:0,\
metadata-cache:negative-ttl-secs:0"
YAML
}

case "${words[0]:-}" in
run | status | logs | delete) need_run ;;
*)
  usage
  exit 1
  ;;
esac
run=${words[1]}
[[ $run =~ ^[a-z][a-z0-9-]{0,39}$ ]] || fail "$run cannot name a JobSet; use at most 40 small letters, digits and -"
label=jobset.sigs.k8s.io/jobset-name=$run

case "${words[0]}" in
run)
  need GKE topology image
  need_experiment
  [[ $GKE_TOPOLOGY =~ ^(v4|v5e|v5p|v6e):[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] ||
    fail "--topology=$GKE_TOPOLOGY is not of the form v5e:4x4; known are v4, v5e, v5p and v6e"
  shape=${GKE_TOPOLOGY#*:}
  chips=$((${shape//x/ * }))
  of_host=${GKE_CHIPS:-$((chips < 4 ? chips : 4))}
  [[ $of_host =~ ^[1-9][0-9]*$ ]] && [ $((chips % of_host)) -eq 0 ] ||
    fail "the $chips chips of --topology=$GKE_TOPOLOGY do not divide into hosts of --chips=$of_host"
  with_input "$(manifest $((chips / of_host)) "$of_host")" kubectl apply --filename=-
  ;;
status)
  run_or_print kubectl get jobset "$run"
  run_or_print kubectl get pods --selector="$label"
  ;;
logs)
  flags=(--container=experiment --tail=50)
  [ -z "${GKE_FOLLOW:-}" ] || flags+=(--follow)
  run_or_print kubectl logs --selector="$label,batch.kubernetes.io/job-completion-index=${GKE_HOST:-0}" "${flags[@]}"
  ;;
delete) run_or_print kubectl delete jobset "$run" ;;
esac
