"""Other ways to the same numbers: eager PyTorch, each backend of SDPA, flex_attention, public packages if installed.

Every function takes query, key and value [B, H, N, D] and returns (output, scores), None for what it does not compute.
Scores are summed over queries and averaged over heads, [B, N].
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from .context import UnavailableError

Way = Callable[[Tensor, Tensor, Tensor], tuple[Tensor | None, Tensor | None]]


def eager(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """As the released HiPrune code and transformers' eager attention: all matrices, softmax in float32, rounded."""
    logits = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    probabilities = logits.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return probabilities @ value, probabilities.mean(dim=1).sum(dim=1)


def eager_scores(query: Tensor, key: Tensor, value: Tensor) -> tuple[None, Tensor]:
    logits = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    return None, logits.softmax(dim=-1, dtype=torch.float32).to(query.dtype).mean(dim=1).sum(dim=1)


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, None]:
    """PyTorch's own choice of backend."""
    return F.scaled_dot_product_attention(query, key, value), None


# The backends by their own operators: choosing one by a context manager costs more host time than a short kernel.


def sdpa_flash(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, None]:
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0], None


def sdpa_efficient(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, None]:
    return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, None, False)[0], None


def sdpa_cudnn(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, None]:
    return torch.ops.aten._scaled_dot_product_cudnn_attention(query, key, value, None, False)[0], None


def sdpa_math(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, None]:
    return torch.ops.aten._scaled_dot_product_attention_math(query, key, value)[0], None


def _flex_twice(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    output, first = flex_attention(query, key, value, return_aux=AuxRequest(lse=True))

    def log_probability(logit, batch, head, key_index, query_index):
        return logit - first.lse[batch, head, query_index]

    # Keys ask, queries answer: the log-sum-exp over queries of a key's log probabilities is the log of its column sum.
    _, second = flex_attention(key, query, query, score_mod=log_probability, return_aux=AuxRequest(lse=True))
    return output, second.lse.exp().mean(dim=1)


def flex(device: torch.device) -> Way:
    """Two calls of flex_attention, the second with the first one's log-sum-exp; compiled where there is a GPU."""
    if device.type != "cuda":
        return _flex_twice
    torch._dynamo.reset()  # a fresh compilation per shape, not one for all of them
    return torch.compile(_flex_twice, dynamic=False)


# ------------------------------------------------------------------------------------------------------ other packages


def _imported(name: str) -> ModuleType:
    """Raises UnavailableError where the package is not there, or is but does not load."""
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise UnavailableError(f"{name} cannot be imported: {type(error).__name__}") from error


def flash_attn() -> Way:
    """FlashAttention 3's package, else 2's: the output alone."""
    try:
        function = _imported("flash_attn_interface").flash_attn_func
    except UnavailableError:
        function = _imported("flash_attn").flash_attn_func

    def run(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, None]:
        output = function(*(x.transpose(1, 2) for x in (query, key, value)))
        return (output[0] if isinstance(output, tuple) else output).transpose(1, 2), None

    return run


def flash_colreduce() -> Way:
    function = _imported("flash_colreduce").flash_colreduce
    return lambda query, key, value: (None, function(query, key, reduction="sum").float().mean(dim=1))


def flag_attention(head_dim: int) -> Way:
    """FlagAttention's attention with "total attention", the column sums of each head."""
    function = _imported("flag_attn").flash_attention
    _check_flag_attention(head_dim)

    def run(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        output, total = function(query, key, value, return_total_attention=True)
        return output, total.mean(dim=1)

    return run


def flag_total_attention(head_dim: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """FlagAttention's scores pass alone: query, key, natural log-sum-exp [B, H, M] -> [B, H, N]."""
    function = _imported("flag_attn.total").total_attention
    _check_flag_attention(head_dim)
    return function


def _check_flag_attention(head_dim: int) -> None:
    if head_dim not in (16, 32, 64, 128):
        raise UnavailableError(f"FlagAttention has no kernel for head dimension {head_dim}")
