# Sourced by the launchers: option parsing, and running or printing commands.
# shellcheck shell=bash

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) # of this repository
DRY_RUN=""
words=()   # arguments before --
command=() # arguments after --

usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "$root/launch/$(basename "$0")"; }

fail() {
  echo "error: $*" >&2
  exit 1
}

# parse PREFIX "OPTIONS" "SWITCHES" ARGUMENTS...: --zone=Z sets PREFIX_ZONE=Z and --spot sets PREFIX_SPOT=1, overriding
# the environment. Every launcher has --dry-run.
parse() {
  local prefix=$1 options=" $2 " switches=" $3 " key known="options are --${2// /, --}, --${3// /, --}"
  known="${known%, --}, --dry-run; the command to run comes after --"
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

# need PREFIX OPTION...: fails with one message that names all options without a value.
need() {
  local prefix=$1 missing="" name
  shift
  for name in "$@"; do
    name=$(variable "$prefix" "$name")
    [ -n "${!name:-}" ] || missing="$missing, --$(tr A-Z_ a-z- <<<"${name#*_}")=... (or set $name)"
  done
  [ -z "$missing" ] || fail "missing: ${missing#, }"
}

# need_words NUMBER USAGE: fails unless there are NUMBER arguments before --.
need_words() {
  [ ${#words[@]} -eq "$1" ] || fail "usage: $(basename "$0") $2"
}

# need_run: requires the name of the run, which also names files and jobs.
need_run() {
  need_words 2 "${words[0]} RUN"
  [[ ${words[1]} =~ ^[A-Za-z0-9][A-Za-z0-9_.-]*$ ]] ||
    fail "${words[1]} is not a valid run name; use letters, digits, . _ -"
}

# need_experiment: requires a command after --, and adds the flag by which many hosts find each other.
need_experiment() {
  [ ${#command[@]} -gt 0 ] ||
    fail "missing command; give it after --, such as -- python -m experiments.gsm8k --config=..."
  [[ " ${command[*]}" == *" --distributed"* ]] || command+=(--distributed=auto)
}

# quoted WORD...: one line for a shell; words with special characters in single quotes.
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

# with_input TEXT COMMAND...: runs or prints a command that reads TEXT.
with_input() {
  if [ -n "$DRY_RUN" ]; then
    printf "%s <<'EOF'\n%s\nEOF\n" "$(quoted "${@:2}")" "$1"
  else
    printf '%s\n' "$1" | "${@:2}"
  fi
}
