#!/usr/bin/env bash
# CIFAR-10 from an archive on one CUDA GPU, without a network: train, evaluate, write the result.
#
#   benchmarks/cifar10_gpu.sh ARCHIVE [--wheels FOLDER] [--work FOLDER] [--minutes M] [--dry] [-- OPTIONS]
#
# ARCHIVE unpacks to train/CLASS/* and test/CLASS/*. OPTIONS are those of the trainer, after
# --recipe cifar10_resnet18; only the first call takes them. A call ends by itself after about M
# (8.5) minutes; while there is more to do it says so and exits with status 3: call it again with
# the same arguments, and it goes on from where it was. The run is in --work (runs/cifar10_gpu), the
# result in benchmarks/results/cifar10_gpu.{json,md,png}; a run with other settings than the
# recipe's stays in --work, except for those of its length (-- --recipe cifar10_resnet18_1000),
# --seed and --compile.
#
# --wheels: packages that are missing (kornia, kornia_rs) are taken from the wheels in FOLDER.
# --dry: the same from end to end at a size for a CPU, to see that it works; no result is written.
# PYTHON: the interpreter to use (python3).
set -euo pipefail

usage() {
  sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

repository=$(cd "$(dirname "$(realpath "$0")")/.." && pwd)
archive='' wheels='' work=$repository/runs/cifar10_gpu minutes=8.5 dry=''
options=()
while (($#)); do
  case $1 in
    --wheels) wheels=$(realpath "$2"); shift 2 ;;
    --work) work=$2; shift 2 ;;
    --minutes) minutes=$2; shift 2 ;;
    --dry) dry=1; shift ;;
    --) shift; options=("$@"); break ;;
    -*) usage ;;
    *) [[ -z $archive ]] || usage; archive=$(realpath "$1"); shift ;;
  esac
done
[[ -f $archive ]] || { echo "error: no archive at '${archive:-ARCHIVE}'" >&2; usage; }
mkdir -p "$work"
work=$(realpath "$work")
python=${PYTHON:-python3}
export PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

if [[ -n $wheels ]]; then
  if [[ ! -d $work/site ]]; then
    "$python" -m pip install --quiet --no-index --no-deps --target "$work/site.part" "$wheels"/*.whl
    mv "$work/site.part" "$work/site"
  fi
  export PYTHONPATH=$PYTHONPATH:$work/site
fi

if [[ ! -d $work/images ]]; then
  echo "unpacking $archive"
  rm -rf "$work/images.part"
  mkdir "$work/images.part"
  tar --extract --file "$archive" --directory "$work/images.part" --no-same-owner 2>/dev/null ||
    "$python" -m tarfile --extract "$archive" "$work/images.part"  # where there is no xz
  mv "$work/images.part" "$work/images"
fi

run=$work/run
if [[ -f $run/results.json ]]; then
  echo "the run is complete"
else
  # what is left of the time, less what the final evaluation takes
  session=(--minutes "$("$python" -c "print(max(0.001, $minutes - 0.75 - $SECONDS / 60))")")
  session+=(--device "$([[ -n $dry ]] && echo cpu || echo cuda)")
  if [[ -f $run/checkpoint.pt ]]; then
    arguments=(--resume "$run" "${session[@]}")
  else
    arguments=(--recipe cifar10_resnet18 --data imagefolder --root "$work/images" --out "$run")
    arguments+=("${session[@]}")
    if [[ -n $dry ]]; then
      arguments+=(--encoder convnet --train-images 2048 --epochs 2 --batch-size 128 --no-amp)
      arguments+=(--eval-every 1)
    fi
    arguments+=("${options[@]}")
  fi
  "$python" -m benchmarks.trainer "${arguments[@]}"
fi

if [[ ! -f $run/results.json ]]; then
  echo "there is more to do: call this again with the same arguments"
  exit 3
fi
cd "$repository"
"$python" -m benchmarks.cifar10 "$run" --archive "$archive" ${dry:+--dry}
