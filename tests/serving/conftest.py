"""These tests need vLLM, in an environment of its own (`.ci/serving`); without it nothing here is collected.

The folder is not called "vllm": this would be an importable name wherever tests/ is on the path.
"""

import importlib.util
import os

import pytest

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_TARGET_DEVICE": "cpu",
    "OMP_WAIT_POLICY": "passive",
    "OMP_NUM_THREADS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    os.environ |= ENVIRONMENT


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """vLLM remembers what it learnt of a class by that class's file alone."""
    os.environ["VLLM_CACHE_ROOT"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Folders of checkpoints, by the types of their models."""
    import small_models

    made = {}

    def of(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = small_models.MAKERS[name](folder)
        return made[name]

    return of
