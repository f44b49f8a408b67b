"""HiPrune visual-token pruning at fused-attention speed.

Column-sum attention scores computed inside the vision encoder's attention, one fused selection, and load-time patching
of Hugging Face models. Importing this loads neither transformers nor PIL, and touches no GPU.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import budget as budget
from . import methods as methods
from .methods import (
    PTP,
    TRIM,
    CDPruner,
    ClipText,
    DivPrune,
    FasterVLM,
    FastV,
    HiPrune,
    HiPrunePlusPlus,
    HiRED,
    Method,
    Needs,
    Picks,
    Random,
    Seen,
    Selection,
    TokenLayout,
    UniformGrid,
    VisionZip,
    VisPruner,
)
from .ops import (
    attention_scores,
    attention_scores_per_head,
    attention_scores_per_head_varlen,
    attention_scores_varlen,
    attention_with_scores,
    attention_with_scores_varlen,
    check_inputs,
    merge_tokens,
    merge_tokens_varlen,
    prune_tokens,
    prune_tokens_varlen,
    select_diverse,
    select_diverse_varlen,
    select_tokens,
    select_tokens_varlen,
    select_top_segments,
    shares,
)

if TYPE_CHECKING:
    from .patch import (
        applied,
        apply_hiprune,
        apply_method,
        hiprune,
        is_patched,
        last_selection,
        record_scores,
        remove_hiprune,
        remove_method,
    )
    from .patch.selfcheck import check_model

__version__ = "0.1.0"

_FROM_PATCH = (
    "applied",
    "apply_hiprune",
    "apply_method",
    "hiprune",
    "is_patched",
    "last_selection",
    "record_scores",
    "remove_hiprune",
    "remove_method",
)

__all__ = [
    "PTP",
    "TRIM",
    "CDPruner",
    "ClipText",
    "DivPrune",
    "FastV",
    "FasterVLM",
    "HiPrune",
    "HiPrunePlusPlus",
    "HiRED",
    "Method",
    "Needs",
    "Picks",
    "Random",
    "Seen",
    "Selection",
    "TokenLayout",
    "UniformGrid",
    "VisPruner",
    "VisionZip",
    "applied",
    "apply_hiprune",
    "apply_method",
    "attention_scores",
    "attention_scores_per_head",
    "attention_scores_per_head_varlen",
    "attention_scores_varlen",
    "attention_with_scores",
    "attention_with_scores_varlen",
    "check_inputs",
    "check_model",
    "hiprune",
    "is_patched",
    "last_selection",
    "merge_tokens",
    "merge_tokens_varlen",
    "prune_tokens",
    "prune_tokens_varlen",
    "record_scores",
    "remove_hiprune",
    "remove_method",
    "select_diverse",
    "select_diverse_varlen",
    "select_tokens",
    "select_tokens_varlen",
    "select_top_segments",
    "shares",
]


def __getattr__(name: str) -> Any:
    # Patching imports transformers, which takes seconds: only those who use it wait for it.
    if name in _FROM_PATCH:
        return getattr(importlib.import_module(".patch", __name__), name)
    if name == "check_model":
        return importlib.import_module(".patch.selfcheck", __name__).check_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
