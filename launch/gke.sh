#!/usr/bin/env bash
# Runs on one TPU slice of a GKE cluster, as a JobSet, through kubectl. See docs/pods.md.
#
#   bash launch/gke.sh run RUN --topology=v5e:4x4 --image=IMAGE [--bucket=BUCKET] [--spot] [--chips=4] [--grace=300] \
#     [--restarts=10] -- python -m experiments.gsm8k --config=... --workdir=/bucket/runs/RUN
#   bash launch/gke.sh status RUN
#   bash launch/gke.sh logs RUN [--follow] [--host=0]
#   bash launch/gke.sh delete RUN                  SIGTERM; it saves and exits; the same run command resumes it
#
# --dry-run prints the manifest and the command and runs nothing. --topology: v4, v5e, v5p or v6e, and the chips in each
# dimension, as for the planner. --chips: chips per host, 4, or 8 on machine types that end in 8t. --image: built by
# launch/Dockerfile. --bucket: mounted at /bucket. --restarts: how often all hosts restart after a preemption or another
# failure. Each setting can also come from the environment (GKE_TOPOLOGY, GKE_IMAGE, GKE_BUCKET, ...).
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"

parse GKE "topology image bucket chips grace restarts host" "spot follow" "$@"
check GKE topology=topology image=image bucket=bucket chips=number grace=count restarts=count host=count

accelerator() { # The node label of a TPU generation.
  case "${GKE_TOPOLOGY%%:*}" in
  v4) echo tpu-v4-podslice ;;
  v5e) echo tpu-v5-lite-podslice ;;
  v5p) echo tpu-v5p-slice ;;
  v6e) echo tpu-v6e-slice ;;
  esac
}

json() { # WORDS: a list of strings, valid JSON and YAML. $ is doubled because Kubernetes turns $$ into $.
  local word all="" code char
  for word in "$@"; do
    word=${word//\\/\\\\}
    word=${word//\"/\\\"}
    for code in {1..31} 127; do
      printf -v char %b "\\x$(printf %x "$code")"
      printf -v code '\\u%04x' "$code"
      word=${word//$char/$code}
    done
    all="$all, \"${word//\$/\$\$}\""
  done
  echo "[${all#, }]"
}

only_if() { [ -z "$1" ] || cat; } # WORD: copies stdin unless WORD is empty

manifest() { # HOSTS CHIPS_PER_HOST
  cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: "${words[1]}"
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
              cloud.google.com/gke-tpu-topology: "${GKE_TOPOLOGY#*:}"
YAML
  only_if "${GKE_SPOT:-}" <<YAML
              cloud.google.com/gke-spot: "true"
            tolerations:
            - {key: cloud.google.com/gke-spot, operator: Equal, value: "true", effect: NoSchedule}
YAML
  cat <<YAML
            containers:
            - name: experiment
              image: "$GKE_IMAGE"
              command: $(json "${command[@]}")
              resources: {requests: {google.com/tpu: $2}, limits: {google.com/tpu: $2}}
YAML
  # The user of the Dockerfile. No metadata cache, since other hosts write too. Finished checkpoints are renamed.
  only_if "${GKE_BUCKET:-}" <<YAML
              volumeMounts:
              - {name: bucket, mountPath: /bucket}
            volumes:
            - name: bucket
              csi:
                driver: gcsfuse.csi.storage.gke.io
                volumeAttributes:
                  bucketName: "${GKE_BUCKET#gs://}"
                  mountOptions: "uid=1000,gid=1000,implicit-dirs,file-system:rename-dir-limit:100000,metadata-cache:ttl-secs:0,\
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
valid "" "$run" jobset
label=jobset.sigs.k8s.io/jobset-name=$run

case "${words[0]}" in
run)
  need GKE topology image
  need_experiment
  shape=${GKE_TOPOLOGY#*:}
  chips=$((${shape//x/ * }))
  per_host=${GKE_CHIPS:-$((chips < 4 ? chips : 4))}
  [ $((chips % per_host)) -eq 0 ] ||
    fail "--topology=$GKE_TOPOLOGY: $chips chips do not divide into hosts with --chips=$per_host each"
  with_input "$(manifest $((chips / per_host)) "$per_host")" kubectl apply --filename=-
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
