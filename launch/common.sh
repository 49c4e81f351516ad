# Shared by the launchers, which source it: their options, and a way to run a command or only print it.
# shellcheck shell=bash

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) # of this repository
DRY_RUN=""
words=()   # what stands before --
command=() # what stands after it

usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "$root/launch/$(basename "$0")"; }

fail() {
  echo "error: $*" >&2
  exit 1
}

# parse PREFIX "OPTIONS" "SWITCHES" ARGUMENTS...: --zone=Z sets PREFIX_ZONE to Z and --spot sets PREFIX_SPOT to 1, in
# place of what the environment says. --dry-run belongs to every launcher.
parse() {
  local prefix=$1 options=" $2 " switches=" $3 " key known="known are --${2// /, --}, --${3// /, --}"
  known="${known%, --}, --dry-run; what is to run comes after --"
  shift 3
  while [ $# -gt 0 ]; do
    key=${1#--}
    key=${key%%=*}
    case "$1" in
    --)
      command=("${@:2}")
      return
      ;;
    --dry-run) DRY_RUN=1 ;;
    -h | --help)
      usage
      exit
      ;;
    --*=*)
      [[ $options == *" $key "* ]] || fail "unknown option --$key; $known"
      printf -v "$(variable "$prefix" "$key")" %s "${1#*=}"
      ;;
    -*)
      [[ $options != *" $key "* ]] || fail "--$key needs a value: --$key=..."
      [[ $switches == *" $key "* ]] || fail "unknown option $1; $known"
      printf -v "$(variable "$prefix" "$key")" 1
      ;;
    *) words+=("$1") ;;
    esac
    shift
  done
}

variable() { tr a-z- A-Z_ <<<"$1_$2"; }

# need PREFIX OPTION...: one message names all options that have no value.
need() {
  local prefix=$1 missing="" name
  shift
  for name in "$@"; do
    name=$(variable "$prefix" "$name")
    [ -n "${!name:-}" ] || missing="$missing, --$(tr A-Z_ a-z- <<<"${name#*_}")=... (or $name in the environment)"
  done
  [ -z "$missing" ] || fail "missing: ${missing#, }"
}

# need_words NUMBER WHAT: no more and no fewer words before --.
need_words() {
  [ ${#words[@]} -eq "$1" ] || fail "usage: $(basename "$0") $2"
}

# need_run: the name of the run, which is a file's and a job's name as well.
need_run() {
  need_words 2 "${words[0]} RUN"
  [[ ${words[1]} =~ ^[A-Za-z0-9][A-Za-z0-9_.-]*$ ]] || fail "${words[1]} cannot name a run; use letters, digits, . _ -"
}

# need_experiment: an experiment after --. On many hosts it has to be told to find the others.
need_experiment() {
  [ ${#command[@]} -gt 0 ] || fail "give the command after --, such as -- python -m experiments.gsm8k --config=..."
  [[ " ${command[*]}" == *" --distributed"* ]] || command+=(--distributed=auto)
}

# quoted WORD...: as a shell reads it; single quotes around what is not plain.
quoted() {
  local word all="" quote=\' escaped="'\\''"
  for word in "$@"; do
    case "$word" in
    "" | *[!A-Za-z0-9_./:=@%+,-]*) word="'${word//$quote/$escaped}'" ;;
    esac
    all="$all $word"
  done
  printf %s "${all# }"
}

run_or_print() {
  if [ -n "$DRY_RUN" ]; then
    quoted "$@"
    echo
  else
    "$@"
  fi
}

# with_input TEXT COMMAND...: the same for a command that reads the text.
with_input() {
  if [ -n "$DRY_RUN" ]; then
    printf "%s <<'EOF'\n%s\nEOF\n" "$(quoted "${@:2}")" "$1"
  else
    printf '%s\n' "$1" | "${@:2}"
  fi
}
