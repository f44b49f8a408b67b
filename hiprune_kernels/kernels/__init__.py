"""Triton kernels for GPUs and their launchers, imported at the first CUDA call only."""
