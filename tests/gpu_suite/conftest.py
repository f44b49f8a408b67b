"""bench.gpu_suite, which is not installed, and a context on a CPU at tiny sizes."""

import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

MODULES = "attention conductor context encoder floors gpu_tests llava models operators report sanitizer selection timing ways worker"


@pytest.fixture(scope="session")
def suite():
    """The modules of bench.gpu_suite, by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent.parent.parent)
        names = [*MODULES.split(), "__main__"]
        yield SimpleNamespace(**{name: importlib.import_module(f"bench.gpu_suite.{name}") for name in names})


@pytest.fixture
def context(suite):
    return suite.context.Context(torch.device("cpu"), suite.timing.HostClock(), quick=True)
