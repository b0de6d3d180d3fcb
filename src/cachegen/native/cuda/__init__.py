"""The CUDA kernels of ``csrc/cuda``: plans, compilation, devices, host emulation."""
