#!/usr/bin/env bash
# What happens on one worker; launch/tpu_vm.sh calls it on all of them. It serves on any Linux machine.
#
#   bash launch/worker.sh install [EXTRA]       the environment .venv, with Python 3.12 and an extra of setup.py (tpu)
#   bash launch/worker.sh mount BUCKET          a Cloud Storage bucket as the folder /bucket, by gcsfuse
#   bash launch/worker.sh start RUN COMMAND...  in the background, past the logout; its words go to runs/logs/RUN.log
#   bash launch/worker.sh status [RUN]          of one run or of all: running, or how it ended
#   bash launch/worker.sh log RUN [TAIL'S OPTIONS]
#   bash launch/worker.sh stop RUN [SECONDS]    SIGTERM, then waits (at most 600) until it has saved and ended
#   bash launch/worker.sh exec COMMAND...       in the environment, here and now
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"
cd "$root"
export PATH="$PWD/.venv/bin:$PATH"
logs=runs/logs

# The process of a run is known by the file that it will write its exit code to: its number may be another's by now.
is_running() { # RUN
  local pid
  pid=$(cat "$logs/$1.pid" 2>/dev/null) && ps -ww -o args= -p "$pid" | grep -qF "$logs/$1.exit "
}

tell() { # RUN
  local how
  if is_running "$1"; then
    how="running since $(ps -o lstart= -p "$(cat "$logs/$1.pid")")"
  elif [ -e "$logs/$1.exit" ]; then
    how="ended with $(cat "$logs/$1.exit")"
    [ "$how" != "ended with 143" ] || how="$how: it was stopped; start it again and it goes on"
  elif [ -e "$logs/$1.pid" ]; then
    how="gone without a word: the machine was stopped, or the run was killed; start it again and it goes on"
  else
    how="no run of this name here"
  fi
  echo "$(hostname) $1: $how"
}

action=${1:-} run=${2:-}
case "$action" in
start | log | stop) [ -n "$run" ] || fail "give the name of a run: worker.sh $action RUN" ;;
esac

case "$action" in
install)
  # The images of TPU VMs have an older Python than 3.11; uv brings its own.
  python3 -m pip install --quiet --user --upgrade uv
  python3 -m uv venv --quiet --allow-existing --python 3.12 .venv
  python3 -m uv pip install --quiet --python .venv/bin/python --editable ".[${2:-tpu}]"
  ;;
mount)
  [ $# -eq 2 ] || fail "give the name of a bucket, without gs://"
  if ! command -v gcsfuse >/dev/null; then
    key=/usr/share/keyrings/cloud.google.asc from=https://packages.cloud.google.com/apt
    curl -fsSL "$from/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
    echo "deb [signed-by=$key] $from gcsfuse-$(lsb_release -cs) main" | sudo tee /etc/apt/sources.list.d/gcsfuse.list
    sudo apt-get -qq -o DPkg::Lock::Timeout=300 update
    sudo apt-get -qq -o DPkg::Lock::Timeout=300 install -y gcsfuse
  fi
  if ! mountpoint -q /bucket; then
    sudo install -d -o "$(id -u)" /bucket
    # Nothing is remembered of files, for other workers write them too. Checkpoints are renamed when they are whole.
    gcsfuse --implicit-dirs --rename-dir-limit=100000 --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 \
      "$2" /bucket
  fi
  ;;
start)
  [ $# -ge 3 ] || fail "give a command: worker.sh start RUN COMMAND..."
  ! is_running "$run" || fail "$(tell "$run"); stop it first"
  mkdir -p "$logs"
  rm -f "$logs/$run.exit"
  echo "$(date -u +%FT%TZ) $(hostname): $(quoted "${@:3}")" >>"$logs/$run.log"
  # A session of its own, so that the logout does not end it. SIGTERM goes to all of it; the shell outlives the command.
  # shellcheck disable=SC2016
  setsid bash -c 'trap : TERM; "$@"; echo $? >"$0"' "$logs/$run.exit" "${@:3}" </dev/null >>"$logs/$run.log" 2>&1 &
  echo $! >"$logs/$run.pid"
  echo "$(hostname) $run: started, $logs/$run.log"
  ;;
status)
  for pid in "$logs"/${run:-*}.pid; do
    [ "$pid" = "$logs/*.pid" ] || tell "$(basename "$pid" .pid)"
  done
  ;;
log)
  echo "== $(hostname)"
  tail "${@:3}" "$logs/$run.log"
  ;;
stop)
  ! is_running "$run" || kill -TERM -- "-$(cat "$logs/$run.pid")"
  for ((i = 0; i < ${3:-600}; i++)); do
    is_running "$run" || break
    sleep 1
  done
  tell "$run"
  ! is_running "$run" || fail "it has not ended; kill -KILL -- -$(cat "$logs/$run.pid") there loses the unsaved"
  ;;
exec) exec "${@:2}" ;;
*)
  usage
  exit 1
  ;;
esac
