"""The CUDA kernels of ``csrc/cuda``: their plans, compilation, devices, and emulation on the host."""
