"""The public operators. Each one checks metadata and calls `torch.ops.hiprune.*`, which dispatches on the device."""

from .attention import (
    attention_scores,
    attention_scores_per_head,
    attention_scores_per_head_varlen,
    attention_scores_varlen,
    attention_with_scores,
    attention_with_scores_varlen,
    outruns_sdpa,
)
from .diverse import select_diverse, select_diverse_varlen
from .inputs import check_inputs
from .library import KernelStatus, kernel_status
from .merge import merge_tokens, merge_tokens_varlen
from .segments import select_top_segments, shares
from .selection import prune_tokens, prune_tokens_varlen, select_tokens, select_tokens_varlen

__all__ = [
    "KernelStatus",
    "attention_scores",
    "attention_scores_per_head",
    "attention_scores_per_head_varlen",
    "attention_scores_varlen",
    "attention_with_scores",
    "attention_with_scores_varlen",
    "check_inputs",
    "kernel_status",
    "merge_tokens",
    "merge_tokens_varlen",
    "outruns_sdpa",
    "prune_tokens",
    "prune_tokens_varlen",
    "select_diverse",
    "select_diverse_varlen",
    "select_tokens",
    "select_tokens_varlen",
    "select_top_segments",
    "shares",
]
