"""These tests need lmms-eval and Ray, which are large: .ci/evaluation installs both and runs them.

Elsewhere, as in `make test`, they are not collected; tests/test_cli_eval.py has what can be tested without the two.
"""

import importlib.util

collect_ignore_glob = [] if all(map(importlib.util.find_spec, ("lmms_eval", "ray"))) else ["test_*.py"]
