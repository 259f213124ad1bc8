#!/usr/bin/env bash
# Runs the tests under settings that must not matter, one after the other, and says at the end which of them passed.
#
#   tests/settings.sh [PYTEST ARGUMENT...]    such as: tests/settings.sh -m 'not slow'
#
# After `make setup`. The setting of another user needs root, and is left out without.
set -uo pipefail
cd "$(dirname "$0")/.."
python=$PWD/.venv/bin/python
arguments=("$@")
outcomes=()

# say NAME COMMAND...: run one setting and keep how it ended.
say() {
  echo "=== $1"
  if "${@:2}"; then outcomes+=("passed: $1"); else outcomes+=("FAILED: $1"); fi
}

suite() {
  env "$@" "$python" -m pytest -q -n 2 --dist worksteal "${arguments[@]}"
}

# Beside a load that takes every core, for as long as the suite runs.
beside_a_load() {
  local load=() core outcome
  for core in $(seq "$(nproc)"); do
    timeout 4h sh -c 'while :; do :; done' &
    load+=($!)
  done
  suite
  outcome=$?
  kill "${load[@]}"
  wait "${load[@]}" 2>/dev/null
  return $outcome
}

# As a user who owns a copy of the repository and nothing else: no home, no name, no way to write to the environment.
as_nobody() {
  local place outcome
  place=$(mktemp -d)
  mkdir "$place/repository"
  tar -c --exclude=./.venv --exclude=./build --exclude='*_cache' --exclude=__pycache__ . | tar -x -C "$place/repository"
  ln -s "$(realpath .venv)" "$place/repository/.venv"
  chmod 755 "$place"
  chown -hR 65534:65534 "$place/repository"
  (
    cd "$place/repository" && setpriv --reuid 65534 --regid 65534 --clear-groups env -i HOME=/nonexistent PATH="$PATH" \
      PYTHONPATH="$place/repository" PYTHONDONTWRITEBYTECODE=1 .venv/bin/python -m pytest -q -n 2 --dist worksteal "${arguments[@]}"
  )
  outcome=$?
  rm -rf "$place"
  return $outcome
}

for capability in default avx2 avx512; do
  case $capability in
    avx2) grep -qw avx2 /proc/cpuinfo || continue ;;
    avx512) grep -qw avx512vl /proc/cpuinfo || continue ;; # PyTorch takes the word for it, and would die
  esac
  say "PyTorch's kernels for $capability, 1 thread" suite "ATEN_CPU_CAPABILITY=$capability" OMP_NUM_THREADS=1
done
say "2 threads" suite OMP_NUM_THREADS=2
say "beside a load on every core" beside_a_load
if [ "$(id -u)" = 0 ]; then
  say "another user, without a home" as_nobody
fi
printf '%s\n' "${outcomes[@]}"
[[ ${outcomes[*]} != *FAILED* ]]
