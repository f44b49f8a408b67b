"""Builds the C++ CPU kernels (csrc/) as one library on PyTorch's stable ABI: it serves torch >= 2.10, Python >= 3.10.

Everything else about the package stands in pyproject.toml. Without torch in the build environment, or when the
compiler fails, the package installs as pure Python and `hiprune info` says so; HIPRUNE_REQUIRE_EXT=1 makes that an
error instead.
"""

import glob
import os
import sys

from setuptools import setup

REQUIRED = os.environ.get("HIPRUNE_REQUIRE_EXT") == "1"


def extension_arguments() -> dict:
    try:
        from torch.utils import cpp_extension
    except ImportError:
        if REQUIRED:
            raise
        print("hiprune_kernels: torch is not importable here, building without the C++ kernels", file=sys.stderr)
        return {}

    extension = cpp_extension.CppExtension(
        "hiprune_kernels._C",
        [
            "csrc/attention.cpp",
            "csrc/diverse.cpp",
            "csrc/merge.cpp",
            "csrc/segments.cpp",
            "csrc/selection.cpp",
            "csrc/module.cpp",
        ],
        depends=glob.glob("csrc/*.h") + glob.glob("csrc/*.inc"),
        extra_compile_args=[
            "-O3",
            "-g0",
            "-std=c++20",
            "-Wall",
            "-Wno-unknown-pragmas",
            "-DTORCH_TARGET_VERSION=0x020a000000000000",
            "-DPy_LIMITED_API=0x030a0000",
        ],
        py_limited_api=True,
    )

    class BuildOrReport(cpp_extension.BuildExtension):
        # setuptools' Extension(optional=True) does not cover the RuntimeError that torch's ninja path raises.
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                if REQUIRED:
                    raise
                print(f"hiprune_kernels: the C++ kernels were not built: {error}", file=sys.stderr)
                self.extensions = []

    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildOrReport},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**extension_arguments())
