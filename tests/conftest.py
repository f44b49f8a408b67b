"""Options, the GPU gate, and poisoned memory, shared by all tests."""

import pytest
import torch

from hiprune_kernels.ops.library import CPU_KERNELS, NO_CPU_KERNELS


def pytest_addoption(parser):
    parser.addoption(
        "--require-ext", action="store_true", help="fail, rather than skip, where the C++ kernels are absent"
    )


def pytest_configure(config):
    if config.getoption("--require-ext") and not CPU_KERNELS:
        raise pytest.UsageError(f"--require-ext: {NO_CPU_KERNELS}")


def pytest_report_header():
    return f"hiprune_kernels: C++ kernels {'built' if CPU_KERNELS else 'absent'}, CUDA {torch.cuda.is_available()}"


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory():
    """Fresh tensors hold NaN (or the largest integer), so a result that is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
