#!/usr/bin/env bash
# Check and measure everything on the CUDA GPU of this machine, without a network.
#
#   benchmarks/gpu.sh [--wheels DIR] [--out DIR] [--limit S] [--force] [--dry] [stage ...]
#
#   stage     correctness, losses, views; all of them in this order by default. A stage that is
#             done is skipped, one that was interrupted goes on where it stopped.
#   --wheels  folder of wheels that are installed for this run only: kornia, the peers (.gpu/wheels)
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

wheels=$repository/.gpu/wheels out=$repository/benchmarks/results limit=500 dry="" options=() stages=()
while (($#)); do
  case $1 in
    --wheels) wheels=$(cd "$2" && pwd); shift ;;
    --out) mkdir -p "$2"; out=$(cd "$2" && pwd); shift ;;
    --limit) limit=$2; shift ;;
    --force) options+=(--force) ;;
    --dry) dry=1; options+=(--dry) ;;
    -h | --help) usage; exit 0 ;;
    correctness | losses | views) stages+=("$1") ;;
    *) echo "unknown argument: $1" >&2; usage >&2; exit 2 ;;
  esac
  shift
done
if [[ $dry && $out == "$repository/benchmarks/results" ]]; then
  echo "--dry needs --out: it has no figures, and does not write into benchmarks/results" >&2
  exit 2
fi
((${#stages[@]})) || stages=(correctness losses views)

cd "$repository"
export PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
if compgen -G "$wheels/*.whl" > /dev/null; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  # No dependencies: the machine's own torch and its companions are the ones to measure.
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl
  export PYTHONPATH=$PYTHONPATH:$site
fi

worst=0
for stage in "${stages[@]}"; do
  status=0
  "$python" -m benchmarks "$stage" --device cuda --out "$out" --limit "$limit" \
    ${options[@]+"${options[@]}"} || status=$?
  ((status == 3 && worst == 1)) || ((status == 0)) || worst=$status
done
exit $worst
