# Sourced by the launchers: option parsing, checks of values, and running or printing commands.
# shellcheck shell=bash

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) # of this repository
DRY_RUN=""
words=()   # arguments before --
command=() # arguments after --

usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "$root/launch/$(basename "$0")"; }

fail() {
  local message="error: $*"
  printf '%s\n' "${message//[[:cntrl:]]/?}" >&2
  exit 1
}

[[ $root != *[[:cntrl:]]* ]] || fail "$root: this folder's name has a line break or another control character"

# parse PREFIX "OPTIONS" "SWITCHES" ARGUMENTS...: --zone=Z sets PREFIX_ZONE=Z and --spot sets PREFIX_SPOT=1, overriding
# the environment. Every launcher has --dry-run.
parse() {
  local prefix=$1 options=" $2 " switches=" $3 " key known="options are --${2// /, --}, --${3// /, --}"
  known="${known%, --}, --dry-run; the command to run comes after --"
  shift 3
  while [ $# -gt 0 ]; do
    key=${1#--}
    key=${key%%=*}
    [[ $key != *[!a-z-]* ]] || key="?" # no option
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
      [[ $options == *" $key "* ]] || fail "unknown option ${1%%=*}; $known"
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

# valid WHAT VALUE KIND: fails unless the whole value has the form of its kind. Values end up in YAML, in scripts and in
# commands of other machines, so that each kind allows only the characters it needs.
valid() {
  local LC_ALL=C form pattern # in other locales a-z may match more
  case "$3" in
  number) form="a whole number above 0" pattern='[1-9][0-9]{0,8}' ;;
  count) form="a whole number" pattern='0|[1-9][0-9]{0,8}' ;;
  time) form="of SLURM's form days-hours:minutes:seconds" pattern='([0-9]+-)?[0-9]+(:[0-9]+){0,2}|UNLIMITED|INFINITE' ;;
  run) form="a valid run name; use letters, digits, . _ -" pattern='[A-Za-z0-9][A-Za-z0-9_.-]{0,99}' ;;
  jobset) form="a JobSet name; use at most 40 lowercase letters, digits and -"
    pattern='[a-z]([a-z0-9-]{0,38}[a-z0-9])?' ;;
  name) form="a name of lowercase letters, digits and -" pattern='[a-z]([a-z0-9-]{0,61}[a-z0-9])?' ;;
  project) form="a project ID" pattern='([a-z0-9.-]+:)?[a-z]([a-z0-9-]{0,61}[a-z0-9])?' ;;
  version) form="of letters, digits, . and -" pattern='[A-Za-z0-9][A-Za-z0-9.-]*' ;;
  workers) form="all, or numbers of workers" pattern='all|[0-9]+([,-][0-9]+)*' ;;
  topology) form="of the form v5e:4x4; generations are v4, v5e, v5p and v6e"
    pattern='(v4|v5e|v5p|v6e):[1-9][0-9]{0,3}(x[1-9][0-9]{0,3}){1,2}' ;;
  image) form="the name of an image, HOST/PATH:TAG or HOST/PATH@sha256:DIGEST"
    pattern='[A-Za-z0-9][A-Za-z0-9._-]*(:[0-9]+)?(/[a-z0-9._-]+)*(:[A-Za-z0-9_][A-Za-z0-9_.-]*)?(@sha256:[0-9a-f]{64})?' ;;
  bucket) form="the name of a bucket" pattern='(gs://)?[a-z0-9]([a-z0-9._-]*[a-z0-9])?' ;;
  extras) form="extras of setup.py" pattern='[a-z0-9]+(,[a-z0-9]+)*' ;;
  tail) form="an option of tail" pattern='[+-]?[0-9]+|-[A-Za-z][0-9]*|--[a-z-]+(=[+-]?[0-9]+)?' ;;
  esac
  [[ $2 =~ ^($pattern)$ ]] || fail "$1$2 is not $form"
}

# check PREFIX OPTION=KIND...: checks the options that have a value.
check() {
  local prefix=$1 pair name
  shift
  for pair in "$@"; do
    name=$(variable "$prefix" "${pair%%=*}")
    [ -z "${!name:-}" ] || valid "--${pair%%=*}=" "${!name}" "${pair#*=}"
  done
}

# need_words NUMBER USAGE: fails unless there are NUMBER arguments before --.
need_words() {
  [ ${#words[@]} -eq "$1" ] || fail "usage: $(basename "$0") $2"
}

# need_run: requires the name of the run, which also names files and jobs.
need_run() {
  need_words 2 "${words[0]} RUN"
  valid "" "${words[1]}" run
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
  local end=EOF
  while [[ $'\n'$1$'\n' == *$'\n'$end$'\n'* ]]; do end=${end}_; done
  if [ -n "$DRY_RUN" ]; then
    printf "%s <<'%s'\n%s\n%s\n" "$(quoted "${@:2}")" "$end" "$1" "$end"
  else
    printf '%s\n' "$1" | "${@:2}"
  fi
}
