#!/usr/bin/env bash
# Proves and measures the GPU path on one NVIDIA GPU within minutes. It downloads nothing, and draws its own images.
#
#   tools/gpu-proof.sh quick OUT     eight minutes: tests, the step, decoding, whole jobs
#   tools/gpu-proof.sh peers OUT     five minutes: other loaders on the same images
#
# OUT receives summary.json and proof.tar.gz. It needs pytest besides what train.py needs. Variables: PYTHON (python3); DEVICE
# (cuda; cpu rehearses with small figures). `python -m tools.bench.gpu_proof --help` lists more options.
set -euo pipefail
plan=${1:?usage: tools/gpu-proof.sh quick|peers OUT} out=$(realpath -m "${2:?usage: tools/gpu-proof.sh quick|peers OUT}")
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -m tools.bench.gpu_proof "$plan" "$out" --device "${DEVICE:-cuda}" "${@:3}"
