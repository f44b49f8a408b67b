"""The package as a user meets it: what importing it loads, its public names, and the examples in its docstrings."""

import doctest
import importlib
import subprocess
import sys

import pytest

import hiprune_kernels as hk
from hiprune_kernels.ops.library import CPU_KERNELS


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_import_is_light():
    heavy = "('transformers', 'PIL', 'matplotlib', 'rich', 'skimage')"
    code = f"import sys, torch, hiprune_kernels; print([m for m in {heavy} if m in sys.modules], torch.cuda.is_initialized())"
    assert run(code) == "[] False"


def test_operators_work_without_transformers():
    """Serving engines use operators, budget and selection in processes that have no transformers."""
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import torch, hiprune_kernels as hk\n"
        "print(hk.select_tokens(torch.rand(1, 36), torch.rand(1, 36), budget=9, grid=(6, 6))[0].shape)"
    )
    assert run(code) == "torch.Size([1, 9])"


def test_public_names():
    for name in hk.__all__:
        assert callable(getattr(hk, name)), name
        assert getattr(hk, name).__doc__, name
    assert set(hk.__all__) <= set(dir(hk))
    with pytest.raises(AttributeError, match="has no attribute 'apply_hiprun'"):
        hk.apply_hiprun  # noqa: B018


def test_a_library_that_does_not_load_is_an_error(tmp_path):
    """A backend that was built but fails to load must not fall back in silence."""
    if not CPU_KERNELS:
        pytest.skip("the C++ extension is not built")
    code = (
        "import sys, importlib.abc, importlib.machinery\n"
        "class Broken(importlib.abc.Loader):\n"
        "    def create_module(self, spec): raise ImportError('undefined symbol')\n"
        "    def exec_module(self, module): pass\n"
        "class Finder(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'hiprune_kernels._C': return importlib.machinery.ModuleSpec(name, Broken())\n"
        "sys.meta_path.insert(0, Finder())\n"
        "try: import hiprune_kernels\n"
        "except ImportError as error: print(error)"
    )
    assert run(code) == "undefined symbol"


METHODS = [
    f"methods.{name}" for name in ("base", "hiprune", "fastervlm", "divprune", "baselines", "ptp", "hired", "fastv")
]


@pytest.mark.parametrize(
    "name",
    [
        *(
            "budget",
            "ops.attention",
            "ops.diverse",
            "ops.selection",
            "ops.segments",
            "ops.merge",
            "ops.inputs",
            "ops.library",
        ),
        *("kernels.table", *METHODS),
    ],
)
def test_docstring_examples(name):
    if name.startswith("kernels."):
        pytest.importorskip("triton", reason="Triton is not installed")
    module = importlib.import_module(f"hiprune_kernels.{name}")
    names = {"torch": importlib.import_module("torch")}
    results = doctest.testmod(module, extraglobs=names, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert results.attempted > 0
    assert results.failed == 0
