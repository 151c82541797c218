#!/usr/bin/env bash
# Proves the GPU path on one NVIDIA GPU and measures it: tests, floors, whole jobs, other loaders, a profile. The most important
# comes first; each step has a time limit and leaves its log, its figures and its chart in OUT as it goes, so that a machine
# that is lost takes little with it. Nothing is downloaded.
#
#   tools/gpu-proof.sh OUT SHARDS RESIZED [STEP ...]
#
# SHARDS: a folder with a few train-*.tar of full-sized JPEGs and their .idx. RESIZED: the same through `shards convert --resize
# 256`. Both are read REPEAT times an epoch, as symbolic links. STEPs are names below; without any, all run in order, an hour and a
# half if each took all its time. A step that does not end in time leaves its log alone. OUT.tar.gz has all of OUT but data and
# checkpoints, anew after each step. The exit status is 1 if any did not end well.
# Needed beside what train.py needs: pytest, and pyyaml for webdataset's row.
# Variables, with what they are by default: PYTHON (python3), THREADS (one a CPU), REPEAT (64), BATCH (256), IMAGES (20000 a turn
# of a loader), STEPS (40 a turn of a job), ROUNDS (3), DEVICE (cuda; with cpu, small figures and named steps it is a rehearsal).
set -uo pipefail
out=${1:?usage: tools/gpu-proof.sh OUT SHARDS RESIZED [STEP ...]} original=${2:?} resized=${3:?}
shift 3
python=${PYTHON:-python3} threads=${THREADS:-$(nproc)} repeat=${REPEAT:-64} batch=${BATCH:-256} device=${DEVICE:-cuda}
images=${IMAGES:-20000} steps=${STEPS:-40} rounds=${ROUNDS:-3}
mkdir -p "$out" && out=$(cd "$out" && pwd) && original=$(cd "$original" && pwd) && resized=$(cd "$resized" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit

repeated() { # FOLDER NAME: the same shards many times, numbered on
  local folder=$out/data/$2-$repeat number=0 tar name
  if [ ! -d "$folder" ]; then
    rm -rf "$folder.unfinished" && mkdir -p "$folder.unfinished"
    for _ in $(seq "$repeat"); do
      for tar in "$1"/train-*.tar; do
        printf -v name '%s/train-%06d' "$folder.unfinished" "$number"
        ln -s "$tar" "$name.tar"
        ln -s "${tar%.tar}.idx" "$name.idx"
        number=$((number + 1))
      done
    done
    mv "$folder.unfinished" "$folder"
  fi
  echo "$folder"
}

wanted=" $* " status=0 names=()
step() { # NAME SECONDS COMMAND...: runs it within so many seconds, unless other steps were asked for
  local name=$1 limit=$2 started=$SECONDS
  shift 2
  names+=("$name")
  [ "$wanted" = "  " ] || [[ $wanted == *" $name "* ]] || return 0
  echo "== $name: $*"
  timeout --signal=INT --kill-after=10 "$limit" "$@" 2>&1 | tee "$out/$name.log"
  local code=${PIPESTATUS[0]}
  [ "$code" = 0 ] || status=1
  printf '%-24s exit %3d  %4d s of %d\n' "$name" "$code" $((SECONDS - started)) "$limit" | tee -a "$out/steps.txt"
  tar -C "$out" -czf "$out.tar.gz.part" --exclude=./data --exclude='*.pt' . && mv "$out.tar.gz.part" "$out.tar.gz"
}
tests() { # NAME SECONDS FILES AND OPTIONS OF PYTEST...
  local name=$1 limit=$2
  shift 2
  step "$name" "$limit" "$python" -m pytest -q -rA --durations=10 "$@"
}
throughput() { # NAME SECONDS SUBCOMMAND OPTIONS...
  local name=$1 limit=$2
  shift 2
  [ -z "$draws" ] || set -- "$@" --plot "$out/$name.png"
  step "$name" "$limit" "$python" -m tools.throughput "$@" --json "$out/$name.json"
}

draws=$("$python" -c 'import matplotlib; print("yes")') || echo "no charts: matplotlib is not installed"
full=$(repeated "$original" original) small=$(repeated "$resized" resized)
full_data=(--data.train "$full" --data.threads "$threads") small_data=(--data.train "$small" --data.threads "$threads")
job=(--device "$device" --batch-size "$batch" --steps "$steps" --rounds "$rounds")
loader=(--device "$device" --batch-size "$batch" --images "$images" --rounds "$rounds")
{ nvidia-smi || true; "$python" -c 'import torch, nvidia.dali as d; print("torch", torch.__version__, "DALI", d.__version__)'; } \
  2>&1 | tee "$out/machine.txt"
echo "-- $(date)" >> "$out/steps.txt"

tests tests-train 300 tests/gpu/test_train_on_gpu.py -k 'not compiled'
tests tests-loaders 480 tests/gpu/test_handover_on_gpu.py tests/gpu/test_loaders_on_gpu.py
tests tests-samples 300 tests/gpu/test_bad_samples_on_gpu.py tests/gpu/test_augment_on_gpu.py
throughput train-resized 240 train "${small_data[@]}" "${job[@]}"
throughput train-original 240 train "${full_data[@]}" "${job[@]}"
throughput loader-original 240 loader "${full_data[@]}" "${loader[@]}"
throughput loader-resized 180 loader "${small_data[@]}" "${loader[@]}"
throughput model 240 model --device "$device" --batch-sizes 128 256 512 1024 --precisions bf16 fp16 tf32 --rounds "$rounds"
throughput model-compiled 300 model --device "$device" --batch-sizes 256 --precisions bf16 --compile reduce-overhead
for split in train valid; do
  throughput "compare-$split" 300 compare "$full" --device "$device" --threads "$threads" --batch-size "$batch" \
    --images $((images / 4)) --rounds "$rounds" --splits "$split"
done
throughput tune 180 tune "${full_data[@]:0:2}" --device "$device" --batch-size "$batch" --seconds 45 -o "$out/tuned.json"
for load in 0 0.25 0.5 0.65 0.8 1; do # how the hardware engines and the CUDA decoder share the work
  throughput "decode-load-$load" 60 loader "${full_data[@]}" "${loader[@]}" --stages decode --rounds 1 --data.hw-decoder-load "$load"
done
for count in 1 2 4 8 16; do
  throughput "decode-threads-$count" 60 loader "${full_data[@]:0:2}" "${loader[@]}" --stages decode --rounds 1 \
    --data.threads "$count"
done
throughput step 120 step --device "$device" --batch-size "$batch"
step profile 180 "$python" train.py "${small_data[@]}" --data.valid "$resized/train-*.tar" --device "$device" --batch-size "$batch" --epochs 1 \
  --run-dir "$out/profiled" --profile 20
tests tests-throughput 480 tests/gpu/test_throughput_on_gpu.py tests/gpu/test_tuned_on_gpu.py
tests tests-compiled 540 tests/gpu/test_train_on_gpu.py -k compiled
cat "$out/steps.txt"
for name in $wanted; do
  [[ " ${names[*]} " == *" $name "* ]] || { echo "no such step: $name; there are ${names[*]}" >&2; status=2; }
done
exit "$status"
