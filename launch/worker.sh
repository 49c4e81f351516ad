#!/usr/bin/env bash
# Background runs on one machine: launch/tpu_vm.sh calls it on all workers, but any Linux machine will do.
#
#   bash launch/worker.sh install [EXTRA]       creates .venv with Python 3.12 and an extra of setup.py (default tpu)
#   bash launch/worker.sh mount BUCKET          mounts a Cloud Storage bucket at /bucket, through gcsfuse
#   bash launch/worker.sh start RUN COMMAND...  runs in the background, beyond logout; log in runs/logs/RUN.log
#   bash launch/worker.sh status [RUN]          one run or all: running, or the exit code
#   bash launch/worker.sh log RUN [TAIL OPTIONS]
#   bash launch/worker.sh stop RUN [SECONDS]    SIGTERM, then waits (default 600) until it has saved and exited
#   bash launch/worker.sh exec COMMAND...       runs in the environment, in the foreground
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"
cd "$root"
export PATH="$PWD/.venv/bin:$PATH"
logs=runs/logs

# The PID may have been reused, so the process is recognized by the exit file in its arguments.
is_running() { # RUN
  local pid
  pid=$(cat "$logs/$1.pid" 2>/dev/null) && ps -ww -o args= -p "$pid" | grep -qF "$logs/$1.exit "
}

describe() { # RUN
  local state
  if is_running "$1"; then
    state="running since $(ps -o lstart= -p "$(cat "$logs/$1.pid")")"
  elif [ -e "$logs/$1.exit" ]; then
    state="ended with $(cat "$logs/$1.exit")"
    [ "$state" != "ended with 143" ] || state="$state: stopped; start it again to resume"
  elif [ -e "$logs/$1.pid" ]; then
    state="lost: the run was killed or the machine restarted; start it again to resume"
  else
    state="no such run"
  fi
  echo "$(hostname) $1: $state"
}

action=${1:-} run=${2:-}
case "$action" in
start | log | stop) [ -n "$run" ] || fail "missing name of the run; usage: worker.sh $action RUN" ;;
esac
case "$action" in
start | log | stop | status) [ -z "$run" ] || valid "" "$run" run ;;
esac

# The experiment and its workdir: the other arguments may hold secrets, which do not belong in a log.
summary() { # COMMAND...
  local what workdir="" previous="" word
  what=$(basename -- "$1")
  for word in "${@:2}"; do
    [[ $previous != -m || ! $word =~ ^[A-Za-z0-9_.]+$ ]] || what=$word
    [ "$previous" != --workdir ] || workdir=$word
    [[ $word != --workdir=* ]] || workdir=${word#*=}
    previous=$word
  done
  echo "$(quoted "$what")${workdir:+ in $(quoted "$workdir")}"
}

case "$action" in
install)
  valid "" "${2:-tpu}" extras
  # TPU VM images have a Python older than 3.11; uv installs its own.
  python3 -m pip install --quiet --user --upgrade uv
  python3 -m uv venv --quiet --allow-existing --python 3.12 .venv
  python3 -m uv pip install --quiet --python .venv/bin/python --editable ".[${2:-tpu}]"
  ;;
mount)
  [ $# -eq 2 ] || fail "missing bucket; usage: worker.sh mount BUCKET, without gs://"
  valid "" "$2" bucket
  if ! command -v gcsfuse >/dev/null; then
    key=/usr/share/keyrings/cloud.google.asc from=https://packages.cloud.google.com/apt
    curl -fsSL "$from/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
    echo "deb [signed-by=$key] $from gcsfuse-$(lsb_release -cs) main" | sudo tee /etc/apt/sources.list.d/gcsfuse.list
    sudo apt-get -qq -o DPkg::Lock::Timeout=300 update
    sudo apt-get -qq -o DPkg::Lock::Timeout=300 install -y gcsfuse
  fi
  if ! mountpoint -q /bucket; then
    sudo install -d -o "$(id -u)" /bucket
    # No metadata cache, since other workers write too. Finished checkpoints are renamed.
    gcsfuse --implicit-dirs --rename-dir-limit=100000 --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 \
      "$2" /bucket
  fi
  ;;
start)
  [ $# -ge 3 ] || fail "missing command; usage: worker.sh start RUN COMMAND..."
  ! is_running "$run" || fail "$(describe "$run"); stop it first"
  mkdir -p "$logs"
  rm -f "$logs/$run.exit" "$logs/$run.pid"
  echo "$(date -u +%FT%TZ) $(hostname): starts $(summary "${@:3}")" >>"$logs/$run.log"
  # In its own session, so that logout does not end it and stop can signal the whole group. The shell survives SIGTERM
  # to record the exit code of the command.
  # shellcheck disable=SC2016
  setsid bash -c 'trap : TERM; echo $$ >"${0%.exit}.pid"; "$@"; echo $? >"$0"' "$logs/$run.exit" "${@:3}" \
    </dev/null >>"$logs/$run.log" 2>&1 &
  while [ ! -s "$logs/$run.pid" ] && kill -0 $! 2>/dev/null; do sleep 0.05; done
  echo "$(hostname) $run: started, $logs/$run.log"
  ;;
status)
  for pid in "$logs"/${run:-*}.pid; do
    [ "$pid" = "$logs/*.pid" ] || describe "$(basename "$pid" .pid)"
  done
  ;;
log)
  for option in "${@:3}"; do valid "" "$option" tail; done
  echo "== $(hostname)"
  tail "${@:3}" "$logs/$run.log"
  ;;
stop)
  valid "" "${3:-600}" count
  ! is_running "$run" || kill -TERM -- "-$(cat "$logs/$run.pid")" || true # it may have ended meanwhile
  for ((i = 0; i < ${3:-600}; i++)); do
    is_running "$run" || break
    sleep 1
  done
  describe "$run"
  ! is_running "$run" || fail "still running; kill -KILL -- -$(cat "$logs/$run.pid") there ends it without saving"
  ;;
exec) exec "${@:2}" ;;
*)
  usage
  exit 1
  ;;
esac
