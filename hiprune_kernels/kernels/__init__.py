"""Triton kernels for GPUs and their launchers, imported at the first CUDA call only."""


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. Triton's own, made for kernels too, takes microseconds on the host."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()
