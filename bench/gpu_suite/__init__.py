"""One command that proves and measures the kernels on a GPU: see `__main__.py`."""
