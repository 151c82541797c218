#!/usr/bin/env bash
# Proves the GPU path on one NVIDIA GPU and measures it, within minutes; nothing is downloaded, images are drawn on the spot.
#
#   tools/gpu-proof.sh quick OUT     eight minutes: tests, the step, decoding, whole jobs
#   tools/gpu-proof.sh peers OUT     five minutes: other loaders on the same images
#
# OUT gets summary.json and proof.tar.gz. Needed beside what train.py needs: pytest. Variables: PYTHON (python3); DEVICE (cuda;
# with cpu it is a rehearsal with small figures). `python -m tools.bench.gpu_proof --help` has more options.
set -euo pipefail
plan=${1:?usage: tools/gpu-proof.sh quick|peers OUT} out=$(realpath -m "${2:?usage: tools/gpu-proof.sh quick|peers OUT}")
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -m tools.bench.gpu_proof "$plan" "$out" --device "${DEVICE:-cuda}" "${@:3}"
