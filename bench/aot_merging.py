"""The forms of the kernels of segments, shares and merging that `bench/aot.py` compiles."""

from __future__ import annotations

from bench.aot_cases import Variant
from hiprune_kernels.kernels import merge, next_power_of_2, segments
from hiprune_kernels.kernels.selection import warps_for


def merging_variants() -> list[Variant]:
    """Those of kernels/segments.py and kernels/merge.py."""
    return [*_segments(), *_shares(), *_merging()]


def _segments() -> list[Variant]:
    kernel = segments.segment_kernel
    signature = dict.fromkeys(kernel.arg_names, "i32")
    signature |= {"scores_ptr": "*fp32", "budgets_ptr": "*i64", "mask_ptr": "*u8", "indices_ptr": "*i64"}
    signature |= {"roles_ptr": "*u8", "runs": ("fp32",) * 3}
    several = {"runs": ("fp32",) * (3 * segments.RUNS)}

    def variant(name, tokens, missing=("mask_ptr",), **types):
        constants = segments.segment_constants(tokens) | {"stride_s": 1, "stride_b": 1, "stride_m": 1}
        constants |= dict.fromkeys(missing)
        return Variant(f"segment_kernel/{name}", kernel, signature | types, constants, warps_for(tokens), 3)

    return [
        variant("clip_l", 576),
        variant("clip_l/masked", 576, missing=()),
        variant("clip_l/scores_fp64", 576, scores_ptr="*fp64"),
        variant("clip_l/budgets_int32", 576, budgets_ptr="*i32"),
        variant("clip_l_packed", 576, **several),
        variant("clip_l_packed/masked", 576, missing=(), **several),
        variant("siglip", 729, **several),
        variant("4096_packed", 4096, **several),
        variant("16384_packed/masked", 16384, missing=(), **several),
    ]


def _shares() -> list[Variant]:
    kernel = segments.shares_kernel
    signature = dict.fromkeys(kernel.arg_names, "i32")
    signature |= {"weights_ptr": "*fp32", "caps_ptr": "*i64", "shares_ptr": "*i64", "images": ("fp32",) * 2}
    several = {"images": ("fp32",) * (2 * segments.RUNS)}

    def variant(name, tiles, **types):
        constants = {"BLOCK": next_power_of_2(tiles), "stride_w": 1, "stride_c": 1}
        return Variant(f"shares_kernel/{name}", kernel, signature | types, constants, 1, 3)

    return [
        variant("5_tiles", 5),
        variant("5_tiles/packed", 5, **several),
        variant("5_tiles/weights_fp64", 5, weights_ptr="*fp64"),
        variant("64_frames", 64),
    ]


def _merging() -> list[Variant]:
    several = {"images": ("fp32",) * (2 * merge.IMAGES)}

    def assign(name, kind, packed=False, **types):
        kernel = merge.assign_kernel
        signature = dict.fromkeys(kernel.arg_names, "i32")
        signature |= {"keys_ptr": f"*{kind}", "targets_ptr": "*i64", "sources_ptr": "*u8", "assigned_ptr": "*i64"}
        signature |= {"images": ("fp32",) * 2} | dict.fromkeys(("depth", "stride_kt"), "i32:16") | types
        constants = {"PACKED": packed, **merge.ASSIGN, "stride_kd": 1, "stride_tt": 1, "stride_st": 1}
        return Variant(f"assign_kernel/{name}", kernel, signature, constants, merge.WARPS, 2)

    def merging(name, kind, packed=False, rows_only=True, **types):
        kernel = merge.merge_kernel
        signature = dict.fromkeys(kernel.arg_names, "i32")
        signature |= {"features_ptr": f"*{kind}", "targets_ptr": "*i64", "assigned_ptr": "*i64"}
        signature |= {"merged_ptr": f"*{kind}", "images": ("fp32",) * 2}
        signature |= dict.fromkeys(("channels", "stride_ft"), "i32:16") | types
        constants = {"PACKED": packed, "ROWS_ONLY": rows_only, **merge.MERGE, "stride_tt": 1, "stride_fc": 1}
        return Variant(f"merge_kernel/{name}", kernel, signature, constants, merge.WARPS, 2)

    return [
        assign("bf16", "bf16"),
        assign("fp16", "fp16"),
        assign("fp32", "fp32"),
        assign("packed_bf16", "bf16", packed=True, **several),
        merging("bf16", "bf16"),
        merging("fp16", "fp16"),
        merging("fp32", "fp32"),
        merging("whole_bf16", "bf16", rows_only=False),
        merging("packed_bf16", "bf16", packed=True, **several),
    ]
