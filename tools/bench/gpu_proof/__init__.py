"""`python -m tools.bench.gpu_proof` proves and measures the GPU path within minutes."""
