"""Runs tests/interpreter with TRITON_INTERPRET=1, in a process of its own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("operators", ["attention", "diverse", "selection", "segments", "merge"])
def test_kernels_in_the_interpreter(operators):
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", f"tests/interpreter/test_{operators}.py"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=here.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-8000:] + done.stderr[-2000:]
