"""What `bench/aot.py` compiles: the shapes of encoders and language models, and the forms of each kernel they need."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hiprune_kernels.budget import ROLE_NAMES, SelectionPlan, plan_selection
from hiprune_kernels.kernels import diverse
from hiprune_kernels.kernels.attention import attention
from hiprune_kernels.kernels.paths import Blocks, Launch
from hiprune_kernels.kernels.selection import IMAGES, constants_of, select_kernel, warps_for


class Variant(NamedTuple):
    """One compiled form of a kernel."""

    name: str
    function: object  # triton.JITFunction
    signature: dict  # argument: "*bf16", "i32", "i32:16" (a multiple of 16), "fp32", or a tuple of such
    constexprs: dict  # argument: value
    num_warps: int
    num_stages: int


# ----------------------------------------------------------------------------------------------------------- attention

_SHAPES = {  # queries and keys, heads, key heads, D: what encoders and language models have
    "clip_b32": (50, 12, 12, 64),
    "deit": (198, 12, 12, 64),
    "clip_l": (577, 16, 16, 64),
    "siglip": (729, 16, 16, 72),
    "d128": (1024, 25, 25, 128),
    "d256": (1024, 8, 4, 256),
    "vjepa2": (2048, 16, 16, 64),
    "qwen": (4096, 16, 16, 80),
    "llm": (4096, 32, 8, 128),
}


def attention_variants() -> list[Variant]:
    """What the table can launch. The launcher itself makes the list, from tensors without data."""
    found: dict[str, tuple] = {}

    def record(case: str, **options) -> None:
        def launch(kernel, programs: int, arguments: dict, constants: dict, blocks: Blocks) -> None:
            signature = {}
            for name, x in arguments.items():
                if x is None or (type(x) is int and x == 1):  # Triton compiles these in
                    constants = {**constants, name: x}
                else:
                    signature[name] = tuple(map(_kind, x)) if isinstance(x, tuple) else _kind(x)
            rest = (kernel, signature, constants, blocks.warps, blocks.stages)
            if rest not in found.values():
                found[f"{kernel.__name__}/{case}"] = rest

        _example_call(launch=launch, **options)

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        short = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
        for shape in _SHAPES if dtype != torch.float16 else ("clip_b32", "clip_l", "qwen"):
            for output in (True, False):
                record(f"{shape}/{short}/{'output' if output else 'scores'}", shape=shape, dtype=dtype, output=output)
        record(f"qwen_packed/{short}/output", shape="qwen", dtype=dtype, packed=True)
    bf16 = {"dtype": torch.bfloat16, "masked": True}
    for shape in ("clip_b32", "clip_l", "vjepa2"):
        record(f"{shape}/bf16/masked", shape=shape, **bf16)
        record(f"{shape}/bf16/masked_causal", shape=shape, causal=True, **bf16)
    record("qwen_packed/bf16/masked_causal", shape="qwen", causal=True, packed=True, **bf16)
    record("clip_l/bf16/output_sweeps", shape="clip_l", dtype=torch.bfloat16, architecture=80)
    for shape in ("siglip", "vjepa2", "qwen"):
        record(f"{shape}/bf16/borrowed", shape=shape, dtype=torch.bfloat16, path="cudnn")
    return [Variant(name, *rest) for name, rest in found.items()]


def _kind(x: object) -> str:
    if isinstance(x, Tensor):
        names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.bool: "i1"}
        return "*" + names.get(x.dtype, "i32")
    if isinstance(x, float):
        return "fp32"
    return "i32:16" if x % 16 == 0 else "i32"


def _example_call(
    *,
    shape: str,
    dtype: torch.dtype,
    launch: Launch,
    output: bool = True,
    packed: bool = False,
    masked: bool = False,
    causal: bool = False,
    architecture: int = 90,
    path: str | None = None,
) -> None:
    N, heads, heads_k, D = _SHAPES[shape]
    query, key, value = (torch.empty(2, N, h, D, dtype=dtype, device="meta") for h in (heads, heads_k, heads_k))
    mask = torch.empty(2, N, dtype=torch.bool, device="meta") if masked else None
    cu_seqlens = torch.empty(9, dtype=torch.int32, device="meta") if packed else None
    if packed:
        query, key, value = query[0], key[0], value[0]
        mask = None if mask is None else mask[0]
    else:
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    tensors = (query, key, value if output else None, cu_seqlens, None, mask, mask)
    attention(*tensors, None, causal, False, 1 / heads, architecture=architecture, path=path, launch=launch)


# ----------------------------------------------------------------------------------------------------------- selection


def selection_variants() -> list[Variant]:
    """The forms of the selection's kernel."""
    signature = dict.fromkeys(select_kernel.arg_names, "i32")
    signature |= {"object_ptr": "*fp32", "deep_ptr": "*fp32", "indices_ptr": "*i64", "roles_ptr": "*u8"}
    signature |= {"mask_ptr": "*u8", "features_ptr": "*i16", "kept_ptr": "*i16", "images": ("fp32",) * 5}
    signature |= dict.fromkeys(("channels", "stride_fi", "stride_ft"), "i32:16")

    def variant(
        name, tokens, rule="paper", neighborhood="cross", keep_roles=ROLE_NAMES, missing=("mask_ptr",), **types
    ) -> Variant:
        flat = plan_selection([], [], rule=rule, neighborhood=neighborhood, keep_roles=keep_roles)
        constants = constants_of("images" in types, tokens, 2, SelectionPlan.from_flat(flat))
        ones = ("object_slots", "deep_slots", "stride_ot", "stride_dt", "stride_mt", "stride_fc")
        constants = constants | dict.fromkeys(set(ones) - set(types), 1) | dict.fromkeys(missing)
        return Variant(f"select_kernel/{name}", select_kernel, signature | types, constants, warps_for(tokens), 3)

    select_only = ("mask_ptr", "features_ptr", "kept_ptr")
    several = {"images": ("fp32",) * (5 * IMAGES)}
    doubles = {"object_ptr": "*fp64", "deep_ptr": "*fp64"}
    return [
        variant("clip_b32", 49),
        variant("deit", 196),
        variant("clip_l", 576),
        variant("clip_l/masked", 576, missing=()),
        variant("clip_l/scores_bf16", 576, object_ptr="*bf16", deep_ptr="*bf16"),
        variant("clip_l/scores_fp64", 576, **doubles),
        variant("clip_l/features_fp32", 576, features_ptr="*i32", kept_ptr="*i32"),
        variant("clip_l/indices_only", 576, missing=select_only),
        variant("clip_l/partial_sums", 576, object_slots="i32", deep_slots="i32"),
        variant("clip_l/square", 576, neighborhood="square"),
        variant("clip_l/grid", 576, rule="grid"),
        variant("clip_l/official", 576, rule="official"),
        variant("clip_l/no_registers", 576, keep_roles=("anchor", "buffer")),
        variant("clip_l/registers_only", 576, keep_roles=("register",)),
        variant("1024", 1024),
        variant("vjepa2", 2048),
        variant("qwen_packed", 4096, **several),
        variant("qwen_packed/official", 4096, rule="official_qwen", **several),
        variant("8192_packed", 8192, **several),
        variant("16384_packed", 16384, **several),
        variant("16384_packed/scores_fp64", 16384, **several, **doubles),
    ]


# ---------------------------------------------------------------------------------------------------- diverse selection


def diverse_variants() -> list[Variant]:
    """The forms of the two kernels of diverse selection."""
    kernels = diverse.cosines_kernel, diverse.choose_kernel
    one, several = ("fp32",) * 2, ("fp32",) * (2 * IMAGES)
    pointers = {"mask_ptr": "*u8", "quality_ptr": "*fp32", "indices_ptr": "*i64", "order_ptr": "*i64"}
    pointers |= dict.fromkeys(("cosines_ptr", "nearest_ptr", "covered_ptr"), "*fp32")
    pointers |= {"features_ptr": "*bf16", "channels": "i32:16"}

    def variant(which, name, tokens, missing, images=one, dtype=torch.bfloat16, **types) -> Variant:
        kernel = kernels[which]
        signature = dict.fromkeys(kernel.arg_names, "i32") | {"images": images}
        signature |= {name: kind for name, kind in (pointers | types).items() if name in signature}
        fixed = dict.fromkeys(missing) | {"stride_fc": 1, "stride_mt": 1, "stride_qt": 1, "tile_tokens": diverse.TILE}
        constants = diverse.constants_of(images is several, tokens, dtype)[which]
        constants |= {name: value for name, value in fixed.items() if name in signature}
        warps = warps_for(tokens) if which else 4
        return Variant(f"{kernel.__name__}/{name}", kernel, signature, constants, warps, 3)

    farthest, determinant = ("mask_ptr", "quality_ptr", "covered_ptr"), ("mask_ptr", "nearest_ptr")
    float32 = {"dtype": torch.float32, "features_ptr": "*fp32"}
    return [
        variant(0, "clip_l/bf16/farthest", 576, farthest),
        variant(0, "clip_l/bf16/determinant", 576, determinant),
        variant(0, "qwen_packed/bf16/masked", 4096, (), several),
        variant(0, "clip_l/fp32", 576, farthest, **float32),
        variant(1, "clip_l/farthest", 576, farthest),
        variant(1, "clip_l/determinant", 576, determinant),
        variant(1, "qwen_packed/farthest", 4096, farthest, several),
        variant(1, "qwen_packed/determinant", 4096, determinant, several),
        variant(1, "8192_packed/determinant", 8192, determinant, several),
    ]
