"""Benchmarks by lmms-eval: its models with pruning (`models.py`), and what the HiPrune paper reports (`paper.py`).

Nothing here loads lmms-eval or a model library until a model is asked for.
"""
