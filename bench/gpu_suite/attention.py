"""Section "attention": output and scores, and scores alone, at the shapes of the paper's encoders and their peers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import hiprune_kernels as hk
from hiprune_kernels import reference

from . import ways
from .context import Case, Context, Row, extra_memory, seconds_row
from .floors import floors
from .timing import Call, rotation

SCORE_TOLERANCE = 1e-4  # of ours, over the largest score: flat scores differ more from each other
WRONG = 0.05  # an alternative with a larger error computes something else


class Shape(NamedTuple):
    B: int
    H: int
    N: int
    D: int
    window: int = 0  # packed sequences of this many tokens; 0: none


SHAPES = {  # most important first
    "CLIP-L B=1": Shape(1, 16, 577, 64),
    "CLIP-L B=8": Shape(8, 16, 577, 64),
    "CLIP-L B=64": Shape(64, 16, 577, 64),
    "Qwen 4096": Shape(1, 16, 4096, 80),
    "SigLIP B=32": Shape(32, 16, 729, 72),
    "V-JEPA2 B=8": Shape(8, 16, 2048, 64),
    "CLIP-L B=5": Shape(5, 16, 577, 64),
    "Qwen windows 4096": Shape(1, 16, 4096, 80, 64),
    "DeiT B=64": Shape(64, 12, 198, 64),
    "CLIP-B/32 B=64": Shape(64, 12, 50, 64),
    "Qwen 1024": Shape(1, 16, 1024, 80),
    "Qwen 16384": Shape(1, 16, 16384, 80),
    "Qwen windows 16384": Shape(1, 16, 16384, 80, 64),
}
FLEX = ("CLIP-L B=8", "Qwen 4096")  # compiling takes seconds per shape


def quick(shape: Shape) -> Shape:
    """The same case at a size for the dry run on a CPU."""
    tokens = 32 if shape.window else min(shape.N, 35)
    return shape._replace(B=min(shape.B, 3), H=2, N=tokens, window=min(shape.window, 8))


def inputs(context: Context, shape: Shape, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value [B, H, N, D], laid out as projections leave them: [B, N, H, D].

    The logits' standard deviation is 2, so that scores differ as much as those of trained encoders.
    """
    B, H, N, D, _ = shape
    query, key, value = (
        torch.randn(B, N, H, D, device=context.device, dtype=context.dtype, generator=generator).transpose(1, 2)
        for _ in range(3)
    )
    return query * 2, key, value


def exact(query: Tensor, key: Tensor, value: Tensor, rows: int = 1024) -> tuple[Tensor, Tensor]:
    """Output and scores in float64, in blocks of query rows."""
    query, key, value = (x.double() for x in (query, key, value))
    outputs, scores = [], 0.0
    for m in range(0, query.shape[2], rows):
        output, part = reference.attention_with_scores(query[:, :, m : m + rows], key, value)
        outputs.append(output)
        scores = scores + part
    return torch.cat(outputs, dim=2), scores


def relative_error(found: Tensor | None, expected: Tensor) -> float | None:
    """Largest difference over the largest value; infinite where there is a NaN. None for nothing."""
    if found is None:
        return None
    error = float((found.double() - expected).abs().max() / expected.abs().max())
    return error if error == error else float("inf")


# ------------------------------------------------------------------------------------------------------------- a table


class Table:
    """Ways to one result on one shape: checked one by one, then timed side by side, then written as rows."""

    def __init__(
        self,
        context: Context,
        sets: list[tuple[Tensor, Tensor, Tensor]],
        expected: tuple[Tensor, Tensor],
        checked: Callable[[Tensor], Tensor] = lambda result: result[:: max(1, len(result) - 1)],
    ) -> None:
        """`checked` picks from a result what `expected` gives: by default the first and the last of the batch."""
        self._context, self._sets, self._checked = context, sets, checked
        self._expected = expected
        self._calls: dict[str, list[Call]] = {}
        self._rows: dict[str, Row] = {}
        self._output_limit = WRONG

    def add(self, name: str, make: Callable[[], ways.Way]) -> None:
        """Check a way; it will be timed if it is right. A failure becomes a row that says why."""
        row = self._rows[name] = {"way": name}
        try:
            way = make()
            output, scores = way(*self._sets[0])
            errors = [
                None if found is None else relative_error(self._checked(found), expected)
                for found, expected in zip((output, scores), self._expected)
            ]
            del output, scores
            row |= {"output error": errors[0], "score error": errors[1]}
            self._judge(name, row, *errors)
            if "failure" in row:
                return
            row |= extra_memory(lambda: way(*self._sets[0]), self._context)
            self._calls[name] = [lambda tensors=tensors: way(*tensors) for tensors in self._sets]
        except Exception as error:  # packages and compilers have exceptions of their own
            row["failure"] = self._context.failure(name, error)

    def _judge(self, name: str, row: Row, output_error: float | None, score_error: float | None) -> None:
        ours = name == "ours"
        limits = (self._output_limit if ours else WRONG, SCORE_TOLERANCE if ours else WRONG)
        for kind, error, limit in zip(("output", "scores"), (output_error, score_error), limits):
            if error is not None and not error <= limit:
                row["failure"] = f"wrong {kind}: error {error:.1e}, at most {limit:.1e} expected"
        if name == "sdpa" and output_error is not None:
            self._output_limit = 2 * output_error + 1e-6

    def rows(self, floor: float | None) -> list[Row]:
        context = self._context
        measured = context.compare(self._calls, self._rows, prepare=context.prepare)
        ours = measured.get("ours")
        for name, times in measured.items():
            self._rows[name] |= seconds_row(times, ours)
        if ours is not None and floor is not None:
            self._rows["ours"] |= {"floor us": floor * 1e6, "of floor": floor / ours.best}
        return list(self._rows.values())


def _with_kind(kind: str, rows: list[Row]) -> Iterator[Row]:
    return ({"computes": kind, **row} for row in rows)


def _dense(context: Context, name: str, shape: Shape) -> list[Row]:
    sets = _sets(context, shape)
    truth = exact(*(x[:: max(1, len(x) - 1)] for x in sets[0]))
    table = Table(context, sets, truth)
    table.add("sdpa", lambda: ways.sdpa)  # before ours: its error limits ours
    table.add("ours", lambda: lambda query, key, value: hk.attention_with_scores(query, key, value))
    table.add("eager", lambda: ways.eager)
    table.add("sdpa flash", lambda: ways.sdpa_flash)
    table.add("sdpa cudnn", lambda: ways.sdpa_cudnn)
    table.add("sdpa efficient", lambda: ways.sdpa_efficient)
    if shape.N <= 4096:
        table.add("sdpa math", lambda: ways.sdpa_math)
    table.add("flash-attn", ways.flash_attn)
    table.add("FlagAttention", lambda: ways.flag_attention(shape.D))
    if name in FLEX:
        table.add("flex, two calls", lambda: ways.flex(context.device))
    floor = floors(*shape[:4], context.rates)
    rows = list(_with_kind("output + scores", table.rows(floor.output_and_scores)))
    table = Table(context, sets, truth)
    table.add("ours", lambda: lambda query, key, value: (None, hk.attention_scores(query, key)))
    table.add("eager", lambda: ways.eager_scores)
    table.add("flash-colreduce", ways.flash_colreduce)
    table.add("sdpa", lambda: ways.sdpa)
    return rows + list(_with_kind("scores only", table.rows(floor.scores)))


def _sets(context: Context, shape: Shape) -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator(context.device).manual_seed(0)
    count = rotation(3 * 2 * shape.B * shape.H * shape.N * shape.D, context.device)
    return [inputs(context, shape, generator) for _ in range(count)]


def _windows(context: Context, name: str, shape: Shape) -> list[Row]:
    """Packed windows: ours on [T, H, D]; the others on a batch of windows, which equal lengths allow, or one by one."""
    device, (_, H, T, D, window) = context.device, shape
    count = T // window
    sets = [tuple(x[0].transpose(0, 1) for x in tensors) for tensors in _sets(context, shape)]  # [T, H, D] each
    starts = torch.arange(0, T + 1, window, dtype=torch.int32, device=device)

    def batched(x: Tensor) -> Tensor:  # [T, H, D] -> [windows, H, window, D]
        return x.unflatten(0, (count, window)).transpose(1, 2)

    def packed(x: Tensor | None) -> Tensor | None:  # and back; [windows, window] -> [T]
        return None if x is None else (x.transpose(1, 2) if x.dim() == 4 else x).flatten(0, 1)

    def in_batch(way: ways.Way) -> ways.Way:
        return lambda *tensors: tuple(packed(x) for x in way(*map(batched, tensors)))

    def one_by_one(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, None]:
        """As transformers without a flash-attention package: a call for each window."""
        parts = zip(*(x.transpose(0, 1)[None].split(window, dim=2) for x in (query, key, value)))
        return packed(torch.cat([ways.sdpa(*part)[0] for part in parts])), None

    def torch_varlen(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, None]:
        from torch.nn.attention.varlen import varlen_attn

        return varlen_attn(query, key, value, starts, starts, window, window), None

    def ours(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return hk.attention_with_scores_varlen(query, key, value, cu_seqlens_q=starts, max_seqlen_q=window)

    def ours_scores(query: Tensor, key: Tensor, value: Tensor) -> tuple[None, Tensor]:
        return None, hk.attention_scores_varlen(query, key, cu_seqlens_q=starts, max_seqlen_q=window)

    truth = tuple(packed(x) for x in exact(*map(batched, sets[0])))
    table = Table(context, sets, truth, checked=lambda result: result)
    table.add("sdpa", lambda: in_batch(ways.sdpa))
    table.add("ours", lambda: ours)
    table.add("eager", lambda: in_batch(ways.eager))
    table.add("sdpa flash", lambda: in_batch(ways.sdpa_flash))
    table.add("torch varlen", lambda: torch_varlen)
    table.add("sdpa, window by window", lambda: one_by_one)
    floor = floors(1, H, window, D, context.rates, windows=count)
    rows = list(_with_kind("output + scores", table.rows(floor.output_and_scores)))
    table = Table(context, sets, truth, checked=lambda result: result)
    table.add("ours", lambda: ours_scores)
    table.add("eager", lambda: in_batch(ways.eager_scores))
    table.add("sdpa", lambda: in_batch(ways.sdpa))
    return rows + list(_with_kind("scores only", table.rows(floor.scores)))


def cases(context: Context) -> list[Case]:
    found = []
    for name, shape in SHAPES.items():
        measure, size = (_windows if shape.window else _dense), (quick(shape) if context.quick else shape)
        seconds = 4.0 + 8.0 * (name in FLEX) + 6.0 * (shape.N > 10_000)
        found.append(Case(name, seconds, lambda m=measure, n=name, s=size: m(context, n, s)))
    return found
