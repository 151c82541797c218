"""`python -m tools.bench.gpu_proof`: the GPU path proved and measured on a machine that can be had for minutes."""
