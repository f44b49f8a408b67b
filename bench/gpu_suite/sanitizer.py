"""Section "sanitizer": NVIDIA's compute-sanitizer over one small call of every kernel, path and kind of argument.

Run by itself, `python -m bench.gpu_suite.sanitizer [DEVICE]` makes just those calls and checks their results.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys

import torch

import hiprune_kernels as hk
from hiprune_kernels import reference

from .context import Case, Context, Row, UnavailableError

TOOLS = ("memcheck", "racecheck")  # reads and writes out of bounds; races in shared memory
SECONDS = 60.0  # a tool slows the kernels down a hundredfold
_SUMMARY = re.compile(r"^=+ ((?:ERROR|RACECHECK) SUMMARY: .*)$", re.MULTILINE)
_ERROR = re.compile(r"^=+ ((?:Invalid|Error|Program hit|Race|Potential).*)$", re.MULTILINE)


def _attention(device: torch.device, dtype: torch.dtype, queries: int, keys: int, D: int, **options) -> None:
    query = torch.randn(2, 4, queries, D, device=device, dtype=dtype)
    key, value = torch.randn(2, 2, 2, keys, D, device=device, dtype=dtype)  # grouped queries
    key_mask = torch.rand(2, keys, device=device) < 0.8 if options.pop("masked", False) else None
    _, scores = hk.attention_with_scores(query, key, value, key_mask=key_mask, **options)
    double = (x.double() for x in (query, key, value))
    _, expected = reference.attention_with_scores(*double, key_mask=key_mask, **options)
    torch.testing.assert_close(scores, expected.float(), rtol=0, atol=0.02 * float(expected.max()))


def _packed(device: torch.device, dtype: torch.dtype, D: int) -> None:
    lengths = torch.tensor([0, 5, 5, 70, 199], dtype=torch.int32, device=device)  # one of them empty
    query, key, value = torch.randn(3, 199, 2, D, device=device, dtype=dtype)
    _, scores = hk.attention_with_scores_varlen(query, key, value, cu_seqlens_q=lengths)
    torch.testing.assert_close(scores.sum(), torch.tensor(199.0, device=device), rtol=0.01, atol=0)


def _selection(device: torch.device, images: int, grid: tuple[int, int], budget: int, rule: str) -> None:
    object_scores, deep_scores = torch.rand(2, images, grid[0] * grid[1], device=device)
    features = torch.randn(*object_scores.shape, 40, device=device)
    arguments = (features, object_scores, deep_scores)
    options = {"budget": budget, "grid": grid, "rule": rule}
    _, indices, _ = hk.prune_tokens(*arguments, **options)
    _, expected, _ = reference.prune_tokens(*(x.cpu() for x in arguments), **options)
    torch.testing.assert_close(indices.cpu(), expected, rtol=0, atol=0)


def calls(device: torch.device) -> int:
    """Make every call once, with lengths that fill no block; how many there were. Raises where a result is wrong."""
    half = torch.float16
    steps = [
        functools.partial(_attention, device, half, 50, 50, 64),  # strip
        functools.partial(_attention, device, half, 197, 197, 72, masked=True),  # sweeps, head dimension in two parts
        functools.partial(_attention, device, torch.float32, 70, 133, 32, causal=True),
        functools.partial(_attention, device, half, 130, 1100, 80),  # passes
        functools.partial(_packed, device, half, 80),
        functools.partial(_selection, device, 2, (7, 9), 20, "paper"),
        functools.partial(_selection, device, 1, (33, 32), 300, "official"),  # more than 1024 tokens
    ]
    for step in steps:
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return len(steps)


def _rows(context: Context, tool: str) -> list[Row]:
    if context.device.type != "cuda":
        return [{"way": tool, "calls": calls(context.device), "found": "nothing: a dry run, without the tool"}]
    program = shutil.which("compute-sanitizer")
    if program is None:
        raise UnavailableError("compute-sanitizer is not installed")
    command = [program, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
    command += [sys.executable, "-m", "bench.gpu_suite.sanitizer", str(context.device)]
    # Without PyTorch's cache of memory every tensor is an allocation of its own, whose end the tool knows.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    printed = done.stdout + done.stderr
    if done.returncode != 0:
        found = _ERROR.findall(printed) or printed.strip().splitlines()[-1:] or ["it printed nothing"]
        raise RuntimeError(f"{tool} ended with status {done.returncode}: {'; '.join(dict.fromkeys(found[:3]))}")
    summary = _SUMMARY.findall(printed)
    return [{"way": tool, "calls": int(printed.rsplit("calls: ", 1)[1].split()[0]), "found": "; ".join(summary)}]


def cases(context: Context) -> list[Case]:
    """One case for each tool."""
    return [Case(tool, SECONDS, functools.partial(_rows, context, tool)) for tool in TOOLS]


if __name__ == "__main__":
    print(f"calls: {calls(torch.device(*(sys.argv[1:] or ['cuda'])))}")
