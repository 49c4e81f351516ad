#!/usr/bin/env bash
# Manages a TPU VM, or all workers of a pod slice, through gcloud, from create to delete. See docs/pods.md.
#
#   export TPU_NAME=verifier TPU_ZONE=us-west4-a TPU_PROJECT=my-project TPU_TYPE=v5litepod-8
#   bash launch/tpu_vm.sh create [--spot] [--queued] [-- GCLOUD FLAGS]
#   bash launch/tpu_vm.sh status [--queued]            state of the machine
#   bash launch/tpu_vm.sh install                      installs HEAD and its dependencies on all workers
#   bash launch/tpu_vm.sh mount BUCKET                 mounts gs://BUCKET at /bucket on all workers
#   bash launch/tpu_vm.sh run RUN -- python -m experiments.gsm8k --config=... --workdir=/bucket/runs/RUN
#   bash launch/tpu_vm.sh runs                         per worker: running, or the exit code
#   bash launch/tpu_vm.sh logs RUN [--follow] [--lines=50] [--worker=0]
#   bash launch/tpu_vm.sh stop RUN                     SIGTERM; it saves and exits; the same run command resumes it
#   bash launch/tpu_vm.sh ssh [--worker=all] -- COMMAND
#   bash launch/tpu_vm.sh delete [--queued]
#
# --dry-run prints the commands and runs nothing. TPU_NAME, TPU_ZONE, TPU_PROJECT, TPU_TYPE (accelerator type) and
# TPU_RUNTIME (runtime version; derived from the type for v2 to v6e) can also be given as --name=, --zone= and so on.
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"

parse TPU "name zone project type runtime worker lines" "spot queued follow" "$@"
check TPU name=name zone=name project=project type=version runtime=version worker=workers lines=number

gcloud_tpu() { # GROUP VERB ARGUMENTS...
  run_or_print gcloud compute tpus "$1" "$2" "${@:3}" --zone="$TPU_ZONE" --project="$TPU_PROJECT"
}

on_workers() { # WORKERS ARGUMENTS...: runs launch/worker.sh there
  gcloud_tpu tpu-vm ssh "$TPU_NAME" --worker="$1" --command="bash genrm-jax/launch/worker.sh $(quoted "${@:2}")"
}

runtime() { # The runtime version for an accelerator type: cloud.google.com/tpu/docs/runtimes
  case "$TPU_TYPE" in
  v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
  v5litepod-*) echo v2-alpha-tpuv5-lite ;;
  v5p-*) echo v2-alpha-tpuv5 ;;
  v6e-*) echo v2-alpha-tpuv6e ;;
  esac
}

action=${words[0]:-}
case "$action" in
run | logs | stop) need_run ;;
mount)
  need_words 2 "mount BUCKET"
  valid "" "${words[1]}" bucket
  ;;
create | status | install | runs | ssh | delete) need_words 1 "$action" ;;
*)
  usage
  exit 1
  ;;
esac
need TPU name zone project

group=tpu-vm
[ -z "${TPU_QUEUED:-}" ] || group=queued-resources

case "$action" in
create)
  need TPU type
  TPU_RUNTIME=${TPU_RUNTIME:-$(runtime)}
  need TPU runtime
  flags=(--accelerator-type="$TPU_TYPE")
  if [ $group = tpu-vm ]; then flags+=(--version="$TPU_RUNTIME"); else
    flags+=(--runtime-version="$TPU_RUNTIME" --node-id="$TPU_NAME")
  fi
  [ -z "${TPU_SPOT:-}" ] || flags+=(--spot)
  gcloud_tpu $group create "$TPU_NAME" "${flags[@]}" ${command[@]+"${command[@]}"}
  ;;
status)
  if [ $group = tpu-vm ]; then format="value(state,health)"; else format="value(state.state)"; fi
  gcloud_tpu $group describe "$TPU_NAME" --format="$format"
  ;;
install)
  [ -z "$(git -C "$root" status --porcelain 2>/dev/null)" ] || echo "note: uncommitted changes are not installed" >&2
  folder=$(mktemp -ud "${TMPDIR:-/tmp}/genrm-jax.XXXXXXXXXX")
  run_or_print mkdir -m 700 "$folder" # fails if another user's file has this name
  trap 'run_or_print rm -rf "$folder"' EXIT
  archive=$folder/genrm-jax.tar.gz
  run_or_print git -C "$root" archive --format=tar.gz --output="$archive" HEAD
  gcloud_tpu tpu-vm scp "$archive" "$TPU_NAME:genrm-jax.tar.gz" --worker=all
  unpack="mkdir -p genrm-jax && tar -xzf genrm-jax.tar.gz -C genrm-jax"
  gcloud_tpu tpu-vm ssh "$TPU_NAME" --worker=all --command="$unpack && bash genrm-jax/launch/worker.sh install"
  ;;
mount) on_workers all mount "${words[1]#gs://}" ;;
run)
  need_experiment
  on_workers all start "${words[1]}" "${command[@]}"
  ;;
runs) on_workers all status ;;
logs)
  follow=()
  [ -z "${TPU_FOLLOW:-}" ] || follow=(-F)
  on_workers "${TPU_WORKER:-0}" log "${words[1]}" -n "${TPU_LINES:-50}" ${follow[@]+"${follow[@]}"}
  ;;
stop) on_workers all stop "${words[1]}" ;;
ssh)
  [ ${#command[@]} -gt 0 ] || fail "missing command; give it after --, such as -- df -h"
  on_workers "${TPU_WORKER:-all}" exec "${command[@]}"
  ;;
delete)
  force=()
  [ $group = tpu-vm ] || force=(--force) # deletes the machine too
  gcloud_tpu $group delete "$TPU_NAME" --quiet ${force[@]+"${force[@]}"}
  ;;
esac
