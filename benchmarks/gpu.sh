#!/usr/bin/env bash
# Check and measure everything on the CUDA GPU of this machine, without a network.
#
#   benchmarks/gpu.sh [--wheels DIR] [--out DIR] [--limit S] [--force] [--dry] [stage ...]
#
#   stage     correctness, loss, augment, tables; all of them in this order by default. A stage that
#             is done is skipped, one that was interrupted goes on where it stopped.
#   --wheels  folder of wheels that are installed for this run only: kornia, the peers
#   --out     folder of the results (benchmarks/results)
#   --limit   seconds that a stage may take (500); what it has measured by then is kept
#   --force   measure again what is measured
#   --dry     run everything at tiny sizes on the CPU: shows that it runs, has no figures. Needs --out
#
# The python3 of the environment, or $PYTHON, must have torch. Exits with 0 if all stages are
# complete, with 3 if one ran out of time, and with 1 if one failed; the stages after it still run.
set -euo pipefail
repository=$(cd "$(dirname "$(realpath "$0")")/.." && pwd)
python=${PYTHON:-python3}
usage() { sed -n '2,/^set -euo/{/^#/{s/^# \{0,1\}//;p}}' "$0"; }

wheels="" out="" limit=500 force=() dry=() stages=()
while (($#)); do
  case $1 in
    --wheels) wheels=$(cd "$2" && pwd); shift ;;
    --out) mkdir -p "$2"; out=$(cd "$2" && pwd); shift ;;
    --limit) limit=$2; shift ;;
    --force) force=(--force) ;;
    --dry) dry=(--dry) ;;
    -h | --help) usage; exit 0 ;;
    correctness | loss | augment | tables) stages+=("$1") ;;
    *) echo "unknown argument: $1" >&2; usage >&2; exit 2 ;;
  esac
  shift
done
if [[ ${dry[*]-} && -z $out ]]; then
  echo "--dry needs --out: it writes no figures into benchmarks/results" >&2
  exit 2
fi
out=${out:-$repository/benchmarks/results}
((${#stages[@]})) || stages=(correctness loss augment tables)

cd "$repository"
export PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
if [[ $wheels ]]; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  # No dependencies: the machine's own torch and its companions are the ones to measure.
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl
  export PYTHONPATH=$PYTHONPATH:$site
fi

worst=0
for stage in "${stages[@]}"; do
  end=$((SECONDS + limit))
  once=(${force[@]+"${force[@]}"})
  for _ in 1 2 3 4 5 6; do
    echo "stage $stage: up to $((end - SECONDS)) s"
    # The stage ends in time by itself; the signal is for one that hangs.
    status=0
    # In the foreground, where Ctrl-C reaches it.
    timeout --foreground --signal=INT --kill-after=10 $((end - SECONDS + 25)) \
      "$python" -m benchmarks.gpu_run "$stage" --out "$out" --limit $((end - SECONDS)) \
      ${once[@]+"${once[@]}"} ${dry[@]+"${dry[@]}"} || status=$?
    once=()
    # The device broke (75) or the process crashed (134, 139) under an arm, which the next leaves out.
    (((status == 75 || status == 134 || status == 139) && SECONDS < end)) || break
  done
  case $status in
    0) ;;
    3 | 75 | 124 | 137) echo "stage $stage is not complete: run it again to go on" >&2
      ((worst == 1)) || worst=3 ;;
    *) echo "stage $stage failed" >&2; worst=1 ;;
  esac
done
exit $worst
