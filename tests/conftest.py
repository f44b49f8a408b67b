"""Options, the GPU gate, and poisoned memory, shared by all tests."""

import functools
import logging
import sys
from types import FrameType

import numpy as np
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
    if hasattr(config, "workerinput"):  # one of several processes, which the processors are shared out to
        torch.set_num_threads(1)


def pytest_report_header():
    return f"hiprune_kernels: C++ kernels {'built' if CPU_KERNELS else 'absent'}, CUDA {torch.cuda.is_available()}"


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


_WRONG_BEAMS = tuple(
    f"num_beams: the beams of transformers {x} itself" for x in ("5.18.0", "5.19.0", "5.20.0", "5.20.1")
)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """A few releases of transformers have no beams that are right; there they are refused, and not tested."""
    try:
        return (yield)
    except ValueError as error:
        if str(error).startswith(_WRONG_BEAMS):
            pytest.skip(str(error))
        raise


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class _DeprecationGate(logging.Handler):
    """Raises where transformers logs that something is deprecated which hiprune_kernels used.

    It warns of names of its arguments through Python's warnings, which pyproject.toml turns into errors.
    """

    def emit(self, record: logging.LogRecord) -> None:
        if "deprecated" in record.getMessage() and _user(sys._getframe()) == "hiprune_kernels":
            raise DeprecationWarning(record.getMessage())


def _user(frame: FrameType | None) -> str:
    """The package of the code that made transformers log, of which this is the frame."""
    while frame is not None and (package := frame.f_globals.get("__name__", "").partition(".")[0]) in _PASSED_THROUGH:
        frame = frame.f_back
    return package if frame is not None else ""


_PASSED_THROUGH = ("conftest", "logging", "transformers", "torch")


@pytest.fixture(autouse=True)
def no_deprecations_of_ours():
    """What is deprecated is told once a process, by whoever used it first: let every test be the first."""
    getattr(getattr(logging.Logger, "warning_once", None), "cache_clear", lambda: None)()
    gate, logger = _DeprecationGate(), logging.getLogger("transformers")
    logger.addHandler(gate)
    yield
    logger.removeHandler(gate)


@pytest.fixture
def poisoned_memory():
    """Fresh tensors hold NaN (or the largest integer), so a result that is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """For the command line: the path of a picture."""
    from PIL import Image

    path = tmp_path_factory.mktemp("photo") / "photo.png"
    generator = np.random.default_rng(0)
    small = Image.fromarray(generator.integers(0, 256, (8, 12, 3), dtype=np.uint8))
    small.resize((150, 100), Image.Resampling.BICUBIC).save(path)
    return str(path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """For the command line: a CLIP vision checkpoint with its image processor, as `save_pretrained` writes them."""
    from models import tiny_clip

    from hiprune_kernels import processing

    path = tmp_path_factory.mktemp("checkpoint")
    encoder = tiny_clip()
    encoder.save_pretrained(path)
    processing.default_image_processor(encoder.config).save_pretrained(path)
    return str(path)


@pytest.fixture
def tiny_default(monkeypatch):
    """Without --model, an encoder of the tiny size instead of CLIP-L's; the code is the same."""
    from models import tiny_clip_config

    from hiprune_kernels import loading

    monkeypatch.setattr(loading, "load_encoder", functools.partial(loading.load_encoder, config=tiny_clip_config()))
