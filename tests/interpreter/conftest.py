"""These tests run Triton kernels in its interpreter; tests/test_interpreter.py starts them.

Triton reads TRITON_INTERPRET when it decorates a kernel, so the whole process must have it.
"""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
