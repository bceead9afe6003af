#!/usr/bin/env bash
# A Cloud TPU from its creation to its deletion; each command is printed before it runs.
#
#   launch/tpu_vm.sh create NAME           makes the machine, or the slice of several
#   launch/tpu_vm.sh install NAME          copies this checkout to every worker and installs it there
#   launch/tpu_vm.sh run NAME train ...    runs a command of the package on every worker, all together
#   launch/tpu_vm.sh fetch NAME FOLDER     copies a workdir from every worker into the same folder here
#   launch/tpu_vm.sh delete NAME           gcloud asks before it deletes
#
# With --dry_run in front nothing but printing happens. Settings, from the environment:
#
#   ZONE      such as us-west4-a; by default that of the gcloud configuration
#   TYPE      of accelerator; v5litepod-8
#   VERSION   of the TPU software; v2-alpha-tpuv5-lite
#   WORKERS   machines of the slice, for v5e of more than 8 chips one for every four of them; 1
#   SPOT      1 for a preemptible machine

set -eu

dry_run=0
if [[ ${1:-} == --dry_run ]]; then
  dry_run=1
  shift
fi
if [[ $# -lt 2 ]]; then
  echo "error: launch/tpu_vm.sh [--dry_run] create|install|run|fetch|delete NAME ..." >&2
  exit 2
fi
action=$1 name=$2
shift 2

type=${TYPE:-v5litepod-8} version=${VERSION:-v2-alpha-tpuv5-lite} workers=${WORKERS:-1}
zone=()
[[ -n ${ZONE:-} ]] && zone=("--zone=$ZONE")

show_and_do() {
  printf '+'
  printf ' %q' "$@"
  printf '\n'
  [[ $dry_run -eq 1 ]] || "$@"
}

tpu() {
  show_and_do gcloud compute tpus tpu-vm "$@" ${zone[@]+"${zone[@]}"}
}

on_every_worker() {
  tpu ssh "$name" --worker=all --command="$1"
}

case $action in
  create)
    spot=()
    [[ ${SPOT:-0} == 1 ]] && spot=(--spot)
    tpu create "$name" --accelerator-type="$type" --version="$version" ${spot[@]+"${spot[@]}"}
    ;;
  install)
    # The machine's own Python may be older than what the package needs.
    archive=$(mktemp -d)/jax_repaint.tar.gz
    trap 'rm -rf "${archive%/*}"' EXIT
    root=$(cd "$(dirname "$0")/.." && pwd)
    show_and_do tar -czf "$archive" -C "$root" pyproject.toml README.md LICENSE jax_repaint configs
    tpu scp "$archive" "$name:jax_repaint.tar.gz" --worker=all
    on_every_worker "mkdir -p jax_repaint && tar -xzf jax_repaint.tar.gz -C jax_repaint \
&& python3 -m pip install --user --quiet uv && python3 -m uv venv --clear --python=3.12 env \
&& python3 -m uv pip install --python=env/bin/python './jax_repaint[tpu]'"
    ;;
  run)
    if [[ $# -eq 0 || $1 == -* ]]; then
      echo "error: say which command to run: launch/tpu_vm.sh run NAME train --config=... --workdir=..." >&2
      exit 2
    fi
    command=$1
    shift
    [[ $workers -gt 1 ]] && set -- "$@" --distributed
    # Where another process holds the TPU, JAX would compute on the processor without a word.
    set -- env JAX_PLATFORMS=tpu,cpu ../env/bin/python -m "jax_repaint.$command" "$@"
    on_every_worker "cd jax_repaint && $(printf '%q ' "$@")"
    ;;
  fetch)
    if [[ $# -ne 1 ]]; then
      echo "error: say which folder to fetch: launch/tpu_vm.sh fetch NAME runs/attn" >&2
      exit 2
    fi
    show_and_do mkdir -p "$1"
    # Process 0 has the whole of a training; of a sweep each worker has its own parts.
    for ((worker = 0; worker < workers; worker++)); do
      tpu scp --recurse "$name:jax_repaint/$1/*" "$1" --worker="$worker" && continue
      [[ $worker -gt 0 ]] || exit 1
      echo "note: nothing came from worker $worker: of a training that is right, of a sweep fetch again" >&2
    done
    ;;
  delete)
    tpu delete "$name"
    ;;
  *)
    echo "error: $action is not one of create, install, run, fetch, delete" >&2
    exit 2
    ;;
esac
