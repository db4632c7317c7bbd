#!/bin/sh
# What a worker does for the launcher: install, check, start, state, stop, log, follow. POSIX sh, for Ubuntu's dash.
#
# It lies at ~/flaxmodels/NAME/worker.sh, and each line it prints begins with "worker I: ". Exit codes: 0 all is well,
# 1 a line says "problem: ...".
# Every process of an attempt has FLAXMODELS_ATTEMPT=FOLDER/N/ in its environment, and the shell that keeps its exit
# code FLAXMODELS_KEEPER=FOLDER/N/: that finds them all, and never a process that got the number of one after a reboot.
# shellcheck disable=SC2329 # `named` and `until_not` are given the names of functions
set -u

root=$(cd "$(dirname "$0")" && pwd -P) || exit 1
name=$(basename "$root")
me='?'
DEVICES=${FLAXMODELS_DEVICES:-/dev}          # where the chips of a TPU VM are
COPY_SECONDS=${FLAXMODELS_COPY_SECONDS:-30}  # between copies of a log to the bucket
COPY_LIMIT=60                                # seconds for one of them
MIB_INSTALL=4096                             # of disk that an installation needs
MIB_START=256

say() { printf 'worker %s: %s\n' "$me" "$*"; }

problem() {
  say "problem: $*"
  exit 1
}

# Which worker this is, of all slices. A TPU of one host may have no number.
number() {
  own=${TPU_WORKER_ID:-}
  if [ -z "$own" ]; then
    own=$(curl -s -m 10 --retry 3 --noproxy '*' -H 'Metadata-Flavor: Google' -w ' %{http_code}' \
      "http://${GCE_METADATA_HOST:-metadata.google.internal}/computeMetadata/v1/instance/attributes/agent-worker-number")
    case $own in
      *' 200') own=${own% 200} ;;
      *' 404') own=0 ;;
      *) problem "the metadata server of this machine does not say which worker it is" ;;
    esac
  fi
  me=$((${FIRST:-0} + own))
}

# The first line of a file; nothing where there is none.
line() { if [ -f "$1" ]; then head -n 1 "$1"; fi; }

# MiB that the disk has left.
free() { echo $(($(df -Pk "$root" | awk 'END { print $4 }') / 1024)); }

room() { [ "$(free)" -ge "$1" ] || problem "the disk has $(free) MiB left, and $1 are needed: make room in $HOME"; }

# Write a file at once, or not at all.
put() {
  { printf '%s\n' "$2" >"$1.part" && mv "$1.part" "$1"; } || problem "can't write $1: $(free) MiB of disk are left"
}

# One command at a time changes things; who has died holds no lock.
locked() {
  exec 9>"$root/lock"
  flock -w 900 9 || problem "another command of the launcher has been at work here for 15 minutes"
}

# The processes of attempt $1; of all attempts where it is "".
alive() { grep -lzF -e "FLAXMODELS_ATTEMPT=$root/${1:+$1/}" /proc/[0-9]*/environ 2>/dev/null | cut -d / -f 3; }

# Whether process $1 has $2 in its environment.
carries() { [ -n "$1" ] && grep -qzxF -e "$2" "/proc/$1/environ" 2>/dev/null; }

kept() { carries "$(line "$root/attempt-$1.keeper")" "FLAXMODELS_KEEPER=$root/$1/"; }

# Sets what, attempt, code and sha.
look() {
  sha=$(line "$root/installed")
  attempt=$(line "$root/attempt")
  attempt=${attempt:-0}
  code=$(line "$root/attempt-$attempt.code")
  if [ -z "$sha" ]; then
    what=absent
  elif [ "$attempt" -eq 0 ]; then
    what=installed
  elif [ -n "$code" ]; then
    what=ended
  elif kept "$attempt" || [ -n "$(alive "$attempt")" ]; then
    what=running
  else # its code may have come since
    code=$(line "$root/attempt-$attempt.code")
    what=$([ -n "$code" ] && echo ended || echo dead)
  fi
  code=${code%% *}
}

state() {
  look
  say "state $what attempt=$attempt code=${code:--} sha=${sha:--}"
}

# Run a command; its output with this worker's name, its exit code.
named() {
  exec 4>&1
  result=$({ { "$@" 2>&1 3>&- 4>&-; echo "$?" >&3; } | sed -u "s/^/worker $me: /" >&4; } 3>&1)
  return "$result"
}

# Wait till a command fails, at most $1 seconds; false where it does not.
until_not() {
  end=$(($(date +%s) + $1))
  shift
  while "$@"; do
    [ "$(date +%s)" -lt "$end" ] || return 1
    sleep 0.2
  done
}

any_alive() { [ -n "$(alive "$1")" ]; }

# Nothing of attempt $1, or of any where it is "", runs after this: a leftover holds the TPU.
sweep() {
  for pid in $(alive "$1"); do kill -KILL "$pid" 2>/dev/null; done
  until_not 20 any_alive "$1" || problem "these processes of an attempt do not end: $(alive "$1" | tr '\n' ' ')"
}

# Copy a file to where all workers' files go.
store() {
  case $2 in
    gs://*) timeout "$COPY_LIMIT" gcloud storage cp --quiet --no-user-output-enabled "$1" "$2" ;;
    *) mkdir -p "$(dirname "$2")" && cp "$1" "$2.part-$me" && mv "$2.part-$me" "$2" ;;
  esac
}

run_uv() {
  found=$(command -v uv || command -v "$HOME/.local/bin/uv") || {
    python3 -m pip install --quiet --user uv || return 1
    found=$HOME/.local/bin/uv
  }
  "$found" "$@"
}

# The code of a parcel: its commit, with the changes on top, in $1.
unpack() {
  git -c init.defaultBranch=main init --quiet "$1/code" &&
    git -C "$1/code" fetch --quiet "$1/bundle" HEAD &&
    git -C "$1/code" checkout --quiet --detach FETCH_HEAD &&
    if [ -s "$1/patch" ]; then git -C "$1/code" apply --index --whitespace=nowarn "$1/patch"; fi
}

install() {
  new=$1 digest=$2 workdir=$3 place=$root/$1 parcel=$HOME/flaxmodels-$name-$1.tar
  shift 3
  locked
  look
  if [ "$sha" = "$new" ] && [ "$(line "$place/words")" = "$*" ] && "$place/venv/bin/python" -c '' 2>/dev/null; then
    say "parcel $new is installed"
    return
  fi
  [ "$what" != running ] || problem "attempt $attempt runs with parcel $sha: stop it before another is installed"
  room "$MIB_INSTALL"
  printf '%s  %s\n' "$digest" "$parcel" | sha256sum --check --status 2>/dev/null ||
    problem "parcel $new is not here as it was sent: ship it again"
  command -v git >/dev/null || problem "git is not installed on this machine: sudo apt-get install git"
  [ "$sha" != "$new" ] || rm "$root/installed" # from here on it is not
  { rm -rf "$place" && mkdir "$place" && tar -xf "$parcel" -C "$place"; } || problem "can't unpack $parcel"
  named unpack "$place" || problem "can't unpack the code of parcel $new"
  if [ "$me" -eq 0 ]; then
    for file in shipped.json patch; do
      { cd "$place/code" && named store "$place/$file" "$workdir/shipped/$new/$file"; } ||
        problem "can't write to $workdir (above is why); to a bucket the TPU's service account needs roles/storage.objectUser"
    done
  fi
  say "installing parcel $new"
  named run_uv venv --quiet --python 3.12 "$place/venv" || problem "no Python 3.12 (above is what uv says)"
  { cd "$place/code" &&
    named run_uv pip install --quiet --python "$place/venv/bin/python" --constraint "$place/constraints.txt" "$@"; } ||
    problem "can't install $* (above is what uv says)"
  put "$place/words" "$*"
  put "$root/installed" "$new"
  for old in "$root"/????????????/ "$HOME/flaxmodels-$name"-*.tar; do
    case $old in "$place/" | "$parcel") ;; *) rm -rf "$old" ;; esac
  done
  say "installed parcel $new"
}

# The rest of the command runs in the code, with its Python first.
enter() {
  look
  [ -n "$sha" ] || problem "nothing is installed here"
  cd "$root/$sha/code" || problem "parcel $sha is gone: install it again"
  VIRTUAL_ENV=$root/$sha/venv PATH=$root/$sha/venv/bin:$PATH
  export VIRTUAL_ENV PATH
}

check() {
  locked
  enter
  if [ "$what" = running ]; then
    say "attempt $attempt runs: nothing to check"
    return
  fi
  sweep ""
  exec 9>&- # who comes next ends this one, whose ssh session may be gone, and does not wait for it
  named env "FLAXMODELS_ATTEMPT=$root/check/" timeout -k 10 600 flaxmodels doctor "--hosts=$1" "--chips=$2" ||
    problem "flaxmodels doctor says what is wrong, on this worker or on worker 0"
}

# A TPU serves one process at a time, and what holds it is not always ours.
free_tpu() {
  set -- "$DEVICES"/accel[0-9]* "$DEVICES"/vfio/[0-9]*
  [ -e "$1" ] || [ -e "$2" ] || return 0
  holder=$(find /proc/[0-9]*/fd \( -lname "$DEVICES/accel[0-9]*" -o -lname "$DEVICES/vfio/[0-9]*" \) 2>/dev/null |
    cut -d / -f 3 | head -n 1)
  [ -z "$holder" ] ||
    problem "process $holder holds the TPU ($(tr '\0' ' ' <"/proc/$holder/cmdline")): end it with \`kill $holder\`"
  if [ -e /tmp/libtpu_lockfile ] && [ ! -w /tmp/libtpu_lockfile ]; then
    sudo -n rm -f /tmp/libtpu_lockfile || problem "another user's /tmp/libtpu_lockfile is in the way: remove it"
  fi
  # Without this systemd removes the shared memory of our data workers when the last ssh session ends.
  loginctl enable-linger 2>/dev/null || sudo -n loginctl enable-linger "$(id -un)" 2>/dev/null ||
    say "loginctl enable-linger failed"
}

start() {
  n=$1 workdir=$2
  shift 2
  locked
  enter
  if [ "$n" -le "$attempt" ]; then
    say "attempt $n is not started: attempt $attempt was before (it is $what)"
    return
  fi
  [ "$what" != running ] || say "attempt $attempt still ran: killed"
  sweep ""
  free_tpu
  room "$MIB_START"
  put "$root/attempt" "$n"
  # The exit code finds its place on a disk that is full by then.
  printf '%-40s\n' '' >"$root/attempt-$n.code.part" || problem "can't write to $root"
  FLAXMODELS_KEEPER="$root/$n/" setsid nohup sh "$root/worker.sh" keep "$me" "$n" "$workdir" "$@" \
    </dev/null >>"$root/attempt-$n.log" 2>&1 9>&- &
  begun() { [ ! -s "$root/attempt-$n.pid" ] && [ ! -s "$root/attempt-$n.code" ]; }
  until_not 30 begun || problem "attempt $n did not start in 30 s: $(tail -n 1 "$root/attempt-$n.log")"
}

# Internal: run the training to its end, and keep its output and its exit code.
keep() {
  me=$1 n=$2 workdir=$3 log=$root/attempt-$2.log
  shift 3
  unset FLAXMODELS_KEEPER FIRST
  trap '' HUP INT TERM # a shutdown signals the training, too, which saves: its exit code is still to come
  put "$root/attempt-$n.keeper" "$$"
  setsid sh "$root/worker.sh" copy "$me" "$log" "$workdir/logs/attempt-$n/worker-$me.log" &
  copier=$!
  echo "launcher: attempt $n begins, $(date -u +%FT%T.%3NZ): $*"
  env --default-signal=INT,QUIT,TERM "FLAXMODELS_ATTEMPT=$root/$n/" sh "$root/worker.sh" become "$n" "$@"
  ended=$?
  (sweep "$n")
  # It first, so that it begins no copy, and then its whole session, since `timeout` leaves its group: a copy that began
  # before must not end after the last one.
  kill -KILL "$copier" 2>/dev/null
  wait "$copier" 2>/dev/null
  pkill -KILL -s "$copier" 2>/dev/null || kill -KILL -- "-$copier" 2>/dev/null
  echo "launcher: attempt $n ended with exit code $ended, $(date -u +%FT%T.%3NZ)"
  store "$log" "$workdir/logs/attempt-$n/worker-$me.log"
  printf '%-40s\n' "$ended" 1<>"$root/attempt-$n.code.part" && mv "$root/attempt-$n.code.part" "$root/attempt-$n.code"
}

# Internal: become the training, after its process's number is written down.
become() {
  put "$root/attempt-$1.pid" "$$"
  shift
  exec "$@"
}

# Internal: copy a log that grows, till the session of this process is killed or its parent is gone.
copy() {
  me=$1 log=$2 keeper=$PPID size=0
  while sleep "$COPY_SECONDS" && [ -d "/proc/$keeper" ]; do
    now=$(wc -c <"$log")
    if [ "$now" != "$size" ] && store "$log" "$3"; then size=$now; fi
  done
}

busy() { look && [ "$what" = running ]; }

stop() {
  locked
  look
  if [ "$what" = running ]; then
    pid=$(line "$root/attempt-$attempt.pid")
    # Once: a second signal would end the training without a save. And to the first process alone: it passes it on.
    if [ ! -e "$root/attempt-$attempt.stop" ] && carries "$pid" "FLAXMODELS_ATTEMPT=$root/$attempt/"; then
      : >"$root/attempt-$attempt.stop"
      kill -TERM "$pid"
    fi
    until_not "$1" busy || say "attempt $attempt did not end in $1 s: killed"
  fi
  sweep ""
  until_not $((COPY_LIMIT + 15)) busy || kill -KILL "$(line "$root/attempt-$attempt.keeper")"
}

log() {
  look
  file=$root/attempt-$attempt.log
  if [ -f "$file" ]; then tail -n "$([ "$1" -eq 0 ] && echo +1 || echo "$1")" "$file" | sed "s/^/worker $me: /"; fi
}

follow() {
  look
  [ "$attempt" -gt 0 ] || problem "nothing was started here"
  tail -n "$1" -f --pid="$(line "$root/attempt-$attempt.keeper")" "$root/attempt-$attempt.log" |
    sed -u "s/^/worker $me: /"
}

main() {
  verb=$1
  shift
  case $verb in
    install) number && install "$@" && state ;;
    check) number && check "$@" && state ;;
    start) number && start "$@" && state ;;
    stop) number && stop "$@" && state ;;
    follow) number && follow "$@" && state ;;
    state) number && state ;;
    log) number && log "$@" && state ;;
    keep) keep "$@" ;;
    copy) copy "$@" ;;
    become) become "$@" ;;
    *) echo "worker.sh: no verb $verb: expected install, check, start, stop, follow, state or log" >&2 && exit 2 ;;
  esac
}

main "$@"
exit
