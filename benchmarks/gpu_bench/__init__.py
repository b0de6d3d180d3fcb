"""Parts of the GPU benchmark, see ``benchmarks/gpu.py``."""
