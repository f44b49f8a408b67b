"""Every operator in plain PyTorch: the specification, the test oracle, and the path for what no kernel covers.

Attention matrices are formed whole here, in float32 (float64 for float64 inputs); the fused kernels give the same
numbers without them. Equations are those of "HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in
Vision-Language Models" (Liu et al.). Arguments are documented at the public functions of the same names in
`hiprune_kernels.ops`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .budget import ROLE_NAMES, Image, SelectionPlan, plan_selection

DROPPED, ANCHOR, BUFFER, REGISTER = range(4)  # values of `roles`

# (row, column) steps from an anchor to its neighbours
_ROW = ((0, -1), (0, 1))
_CROSS = (*_ROW, (-1, 0), (1, 0))
NEIGHBORS = {"none": (), "row": _ROW, "cross": _CROSS, "square": (*_CROSS, (-1, -1), (-1, 1), (1, -1), (1, 1))}


# ---------------------------------------------------------------------------------------------------- attention scores


def visible_keys(query: Tensor, key: Tensor, causal: bool, key_mask: Tensor | None) -> Tensor:
    """Which key n query m may see: bool [B or 1, 1, M, N]. Causal attention is right-aligned: n <= m + N - M."""
    M, N = query.shape[2], key.shape[2]
    visible = torch.ones(1, 1, M, N, dtype=torch.bool, device=query.device)
    if causal:
        visible = visible.tril(N - M)
    return visible if key_mask is None else visible & key_mask[:, None, None, :]


def without_hidden(rows: Tensor, key_mask: Tensor | None) -> Tensor:
    """Keys or values [B, H, N, D], zero where `key_mask` hides them: 0 * NaN is NaN, in products and in gradients."""
    return rows if key_mask is None else rows.masked_fill(~key_mask[:, None, :, None], 0.0)


def attention_probabilities(
    query: Tensor, key: Tensor, *, scale: float | None = None, causal: bool = False, key_mask: Tensor | None = None
) -> Tensor:
    """A = softmax(scale Q K^T) (Eq. 1), [B, Hq, M, N]; the row of a query that sees no key is zero."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    key = without_hidden(key, key_mask).to(dtype)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)  # [B, Hq, N, D]
    logits = query.to(dtype) @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    visible = visible_keys(query, key, causal, key_mask)
    probabilities = logits.masked_fill(~visible, -math.inf).softmax(dim=-1)
    return probabilities.masked_fill(~visible.any(dim=-1, keepdim=True), 0.0)


def counted_queries(
    query: Tensor, key: Tensor, causal: bool, key_mask: Tensor | None, query_mask: Tensor | None
) -> Tensor:
    """How many counted queries may see each key, the divisor of the "mean" over queries: [B or 1, 1, N], at least 1."""
    visible = visible_keys(query, key, causal, key_mask)
    if query_mask is not None:
        visible = visible & query_mask[:, None, :, None]
    return visible.sum(dim=2).clamp(min=1)


def _reduce_queries(
    rows: Tensor,  # [B, H or 1, M, N]
    reduction: str,
    query: Tensor,
    key: Tensor,
    causal: bool,
    key_mask: Tensor | None,
    query_mask: Tensor | None,
) -> Tensor:  # [B, H or 1, N]
    if query_mask is not None:
        rows = rows.masked_fill(~query_mask[:, None, :, None], 0.0)
    if reduction == "max":
        return rows.amax(dim=2) if rows.shape[2] else rows.sum(dim=2)
    total = rows.sum(dim=2)
    return total if reduction == "sum" else total / counted_queries(query, key, causal, key_mask, query_mask)


def attention_scores_per_head(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    query_reduction: str = "sum",
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
) -> Tensor:
    """a[b, h, n] = reduce over queries m of A[b, h, m, n]."""
    probabilities = attention_probabilities(query, key, scale=scale, causal=causal, key_mask=key_mask)
    return _reduce_queries(probabilities, query_reduction, query, key, causal, key_mask, query_mask)


def attention_scores(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    query_reduction: str = "sum",
    head_reduction: str = "mean",
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
) -> Tensor:
    """Eq. 2: a[b, n] = sum over queries m of the mean over heads h of A[b, h, m, n]. Heads are reduced first."""
    probabilities = attention_probabilities(query, key, scale=scale, causal=causal, key_mask=key_mask)
    over_heads: dict[str, Callable[..., Tensor]] = {"mean": Tensor.mean, "sum": Tensor.sum, "max": Tensor.amax}
    rows = over_heads[head_reduction](probabilities, dim=1, keepdim=True)  # [B, 1, M, N]
    return _reduce_queries(rows, query_reduction, query, key, causal, key_mask, query_mask)[:, 0]


def attention_with_scores(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """O = A V together with Eq. 2's column scores of the same A."""
    probabilities = attention_probabilities(query, key, scale=scale, causal=causal, key_mask=key_mask)
    value = without_hidden(value, key_mask).to(probabilities.dtype)
    value = value.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    output = (probabilities @ value).to(query.dtype).transpose(1, 2).contiguous().transpose(1, 2)
    rows = probabilities.mean(dim=1, keepdim=True)
    return output, _reduce_queries(rows, "sum", query, key, causal, key_mask, query_mask)[:, 0]


# ------------------------------------------------------------------------------------------ packed ("varlen") sequences


def segments(cu_seqlens: Tensor, total: int, name: str) -> list[slice]:
    """The segments that `cu_seqlens` [S + 1] cuts `total` rows into. Raises ValueError unless it does so exactly."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != total or any(a > b for a, b in itertools.pairwise(bounds)):
        shown = str(bounds) if len(bounds) <= 12 else f"[{bounds[0]}, {bounds[1]}, ..., {bounds[-1]}]"
        raise ValueError(f"{name}: expected to start at 0, never decrease and end at {total}, got {shown}")
    return [slice(a, b) for a, b in itertools.pairwise(bounds)]


def _each_segment(
    query: Tensor,
    key: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    key_mask: Tensor | None,
    query_mask: Tensor | None,
) -> Iterator[tuple[slice, slice, Tensor, Tensor, dict[str, Any]]]:
    """Per segment: its query and key slices and the dense arguments [1, H, M, D], [1, H, N, D], key and query masks."""
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    parts_q = segments(cu_seqlens_q, query.shape[0], "cu_seqlens_q")
    for q, k in zip(parts_q, segments(cu_seqlens_k, key.shape[0], "cu_seqlens_k")):
        masks = {
            "key_mask": None if key_mask is None else key_mask[None, k],
            "query_mask": None if query_mask is None else query_mask[None, q],
        }
        yield q, k, query[None, q].transpose(1, 2), key[None, k].transpose(1, 2), masks


def attention_scores_per_head_varlen(
    query: Tensor,
    key: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    scale: float | None = None,
    causal: bool = False,
    query_reduction: str = "sum",
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
) -> Tensor:
    """`attention_scores_per_head` of every segment by itself, side by side: [Hq, Tk]."""
    scores = query.new_zeros(query.shape[1], key.shape[0], dtype=torch.promote_types(query.dtype, torch.float32))
    options: dict[str, Any] = {"scale": scale, "causal": causal, "query_reduction": query_reduction}
    for _, k, q_s, k_s, masks in _each_segment(query, key, cu_seqlens_q, cu_seqlens_k, key_mask, query_mask):
        scores[:, k] = attention_scores_per_head(q_s, k_s, **options, **masks)[0]
    return scores


def attention_scores_varlen(
    query: Tensor,
    key: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    scale: float | None = None,
    causal: bool = False,
    query_reduction: str = "sum",
    head_reduction: str = "mean",
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
) -> Tensor:
    """`attention_scores` of every segment by itself, side by side: [Tk]."""
    scores = query.new_zeros(key.shape[0], dtype=torch.promote_types(query.dtype, torch.float32))
    options: dict[str, Any] = {"scale": scale, "causal": causal, "query_reduction": query_reduction}
    options["head_reduction"] = head_reduction
    for _, k, q_s, k_s, masks in _each_segment(query, key, cu_seqlens_q, cu_seqlens_k, key_mask, query_mask):
        scores[k] = attention_scores(q_s, k_s, **options, **masks)[0]
    return scores


def attention_with_scores_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    scale: float | None = None,
    causal: bool = False,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`attention_with_scores` of every segment by itself: output [Tq, Hq, D], scores [Tk]."""
    output = torch.zeros_like(query, memory_format=torch.contiguous_format)
    scores = query.new_zeros(key.shape[0], dtype=torch.promote_types(query.dtype, torch.float32))
    for q, k, q_s, k_s, masks in _each_segment(query, key, cu_seqlens_q, cu_seqlens_k, key_mask, query_mask):
        v_s = value[None, k].transpose(1, 2)
        o_s, scores[k] = (x[0] for x in attention_with_scores(q_s, k_s, v_s, scale=scale, causal=causal, **masks))
        output[q] = o_s.transpose(0, 1)
    return output, scores


# ----------------------------------------------------------------------------------------------------------- selection


def _order(scores: Tensor, eligible: Tensor) -> Tensor:
    """All tokens, highest score first; equal scores by index; NaN behind that, and behind all who is not eligible."""
    order = scores.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf).argsort(descending=True, stable=True)
    behind = scores.isnan() + 2 * eligible.logical_not()
    return order[behind[order].argsort(stable=True)]


def _best_first(scores: Tensor, eligible: Tensor) -> Tensor:
    """Indices of the eligible tokens, highest score first; equal scores by index; NaN behind everything."""
    order = _order(scores, eligible)
    return order[eligible[order]]


def _neighbors(anchors: Tensor, image: Image, rule: str, neighborhood: str) -> Tensor:
    """Indices of the anchors' neighbours within their frame, in any order, with repetitions (Eq. 5)."""
    h, w = image.height, image.width
    row, column = anchors % (h * w) // w, anchors % w
    first = anchors - anchors % (h * w)  # of the anchor's frame
    found = [anchors[:0]]
    for dy, dx in NEIGHBORS[neighborhood]:
        index = anchors + dy * w + dx
        if rule == "grid":
            inside = (row + dy >= 0) & (row + dy < h) & (column + dx >= 0) & (column + dx < w)
        elif rule == "paper":
            inside = (index >= first) & (index < first + h * w)
        else:  # the released code clamps, so an anchor on the edge pulls in a corner
            index = index.clamp(first, first + h * w - 1)
            inside = torch.ones_like(index, dtype=torch.bool)
        found.append(index[inside])
    return torch.cat(found)


def _roles_of_image(
    object_scores: Tensor,  # [N]
    deep_scores: Tensor,  # [N]
    eligible: Tensor,  # [N] bool
    image: Image,
    plan: SelectionPlan,
) -> Tensor:
    """Algorithm 1 for one image: uint8 [N]."""
    roles = torch.zeros_like(object_scores, dtype=torch.uint8)
    anchors = _best_first(object_scores, eligible)[: image.anchors]  # Eq. 4
    roles[anchors] = ANCHOR
    if plan.buffers:
        buffers = _neighbors(anchors, image, plan.rule, plan.neighborhood).unique(sorted=True)
        buffers = buffers[eligible[buffers] & (roles[buffers] == DROPPED)]
        roles[buffers[: image.budget - len(anchors)]] = BUFFER  # too many (official rules): the highest indices go
    taken = roles != DROPPED
    rest = image.budget - int(taken.sum())
    if not plan.registers:
        roles[_best_first(object_scores, eligible & ~taken)[:rest]] = ANCHOR
    elif plan.rule in ("official", "official_qwen"):  # taken tokens lose 1 but stay in the race
        registers = _best_first(deep_scores - taken.to(deep_scores.dtype), eligible)[:rest]
        roles[registers[~taken[registers]]] = REGISTER
    else:
        roles[_best_first(deep_scores, eligible & ~taken)[:rest]] = REGISTER  # Eq. 6 and 7
    return roles


def _padded_indices(roles: Tensor, budget: int) -> Tensor:
    """Ascending indices of the kept tokens, int64 [budget], -1 behind them where fewer survive."""
    kept = roles.nonzero()[:, 0]
    return torch.nn.functional.pad(kept, (0, budget - len(kept)), value=-1)


def select_planned(
    object_scores: Tensor, deep_scores: Tensor, candidate_mask: Tensor | None, plan: SelectionPlan
) -> tuple[Tensor, Tensor]:
    """Anchors by object score, buffers around them, registers by deep score (Eq. 4 to 7); a batch, or packed images."""
    dtype = torch.promote_types(object_scores.dtype, torch.float32)
    objects, deeps = (x[..., plan.num_prefix_tokens :].to(dtype) for x in (object_scores, deep_scores))
    eligible = torch.ones_like(objects, dtype=torch.bool) if candidate_mask is None else candidate_mask
    batch, roles = objects.dim() == 2, torch.zeros_like(objects, dtype=torch.uint8)
    indices, start = [roles.new_empty(0, dtype=torch.int64)], 0
    for b, image in enumerate(plan.images * len(objects) if batch else plan.images):
        end = start + image.frames * image.height * image.width
        where = b if batch else slice(start, end)
        roles[where] = _roles_of_image(objects[where], deeps[where], eligible[where], image, plan)
        kept = _padded_indices(roles[where], image.budget)
        indices.append(kept if batch else torch.where(kept < 0, kept, kept + start))
        start = 0 if batch else end
    packed = torch.cat(indices)
    return packed.view(len(objects), plan.images[0].budget) if batch else packed, roles


def prune_planned(
    features: Tensor, object_scores: Tensor, deep_scores: Tensor, candidate_mask: Tensor | None, plan: SelectionPlan
) -> tuple[Tensor, Tensor, Tensor]:
    """`select_planned`, and the kept rows of the features (Eq. 8)."""
    indices, roles = select_planned(object_scores, deep_scores, candidate_mask, plan)
    return gather_rows(features[..., plan.num_prefix_tokens :, :], indices), indices, roles


def gather_rows(features: Tensor, indices: Tensor) -> Tensor:
    """Rows [..., K, C] of features [..., N, C] at indices [..., K]; zeros where the index is -1 (Eq. 8)."""
    rows = features.gather(-2, indices.clamp(min=0)[..., None].expand(*indices.shape, features.shape[-1]))
    return rows.masked_fill(indices[..., None] < 0, 0.0)


def _plan(grids: Sequence[Sequence[int]], *options: Any) -> SelectionPlan:
    return SelectionPlan.from_flat(plan_selection(grids, *options))


def select_tokens(
    object_scores: Tensor,
    deep_scores: Tensor,
    *,
    budget: int,
    alpha: float = 0.1,
    grid: Sequence[int],
    rule: str = "paper",
    neighborhood: str = "cross",
    num_prefix_tokens: int = 0,
    candidate_mask: Tensor | None = None,
    keep_roles: Sequence[str] = ROLE_NAMES,
) -> tuple[Tensor, Tensor]:
    """`select_planned` for a batch of images of one size."""
    plan = _plan([grid], [budget], alpha, rule, neighborhood, keep_roles, num_prefix_tokens)
    return select_planned(object_scores, deep_scores, candidate_mask, plan)


def select_tokens_varlen(
    object_scores: Tensor,
    deep_scores: Tensor,
    *,
    grids: Sequence[Sequence[int]],
    budgets: Sequence[int],
    alpha: float = 0.1,
    rule: str = "paper",
    neighborhood: str = "cross",
    candidate_mask: Tensor | None = None,
    keep_roles: Sequence[str] = ROLE_NAMES,
) -> tuple[Tensor, Tensor]:
    """`select_planned` for packed images, each by itself; indices are positions in the packed sequence."""
    plan = _plan(grids, budgets, alpha, rule, neighborhood, keep_roles)
    return select_planned(object_scores, deep_scores, candidate_mask, plan)


def prune_tokens(
    features: Tensor,
    object_scores: Tensor,
    deep_scores: Tensor,
    *,
    budget: int,
    alpha: float = 0.1,
    grid: Sequence[int],
    rule: str = "paper",
    neighborhood: str = "cross",
    num_prefix_tokens: int = 0,
    candidate_mask: Tensor | None = None,
    keep_roles: Sequence[str] = ROLE_NAMES,
) -> tuple[Tensor, Tensor, Tensor]:
    """`prune_planned` for a batch of images of one size."""
    plan = _plan([grid], [budget], alpha, rule, neighborhood, keep_roles, num_prefix_tokens)
    return prune_planned(features, object_scores, deep_scores, candidate_mask, plan)


def prune_tokens_varlen(
    features: Tensor,
    object_scores: Tensor,
    deep_scores: Tensor,
    *,
    grids: Sequence[Sequence[int]],
    budgets: Sequence[int],
    alpha: float = 0.1,
    rule: str = "paper",
    neighborhood: str = "cross",
    candidate_mask: Tensor | None = None,
    keep_roles: Sequence[str] = ROLE_NAMES,
) -> tuple[Tensor, Tensor, Tensor]:
    """`prune_planned` for packed images."""
    plan = _plan(grids, budgets, alpha, rule, neighborhood, keep_roles)
    return prune_planned(features, object_scores, deep_scores, candidate_mask, plan)


# ------------------------------------------------------------------------------------------ budgets on the device


def shares(weights: Tensor, caps: Tensor, totals: Sequence[int], tiles: Sequence[int]) -> Tensor:
    """`budget.shares` of every image, operation by operation: quotas left w / sum(w), then the largest fractions.

    The budgets of an image's tiles in HiRED (Arif et al., AAAI 2025) and PTP (Liang et al., arXiv 2509.15704).
    """
    weights = weights.detach().double()
    weights = weights.where((weights > 0) & (weights < 1e280), 0.0)
    shared = [caps.new_empty(0, dtype=torch.int64)]
    for w, cap, total in zip(weights.split(list(tiles)), caps.long().clamp(min=0).split(list(tiles)), totals):
        cap, part = cap.clamp(max=total), torch.ones_like(w, dtype=torch.bool)  # those that are not full
        left = cap.sum().clamp(max=total)
        for _ in cap:  # each round fills one at least, or changes nothing any more
            counted = w.where(part, 0.0)
            counted = counted.where(counted.any(), part.double())
            quotas = left * counted / counted.cumsum(0)[-1]
            full = part & (quotas >= cap)
            left, part = left - cap.where(full, 0).sum(), part & ~full
        whole = quotas.where(part, 0.0).floor()
        order = (quotas - whole).where(part, -1.0).argsort(descending=True, stable=True)
        more = part & (order.argsort() < left - whole.sum())
        shared.append((whole.long() + more).where(part, cap))
    return torch.cat(shared)


def select_top_segments(
    scores: Tensor,
    budgets: Tensor,
    candidate_mask: Tensor | None,
    sizes: Sequence[int],
    tiles: Sequence[int],
    totals: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """The k best of every segment, k = min(its budget, its candidates, what is left of its image's total).

    The top-k of HiRED (Arif et al., AAAI 2025) and PTP (Liang et al., arXiv 2509.15704). Nothing here asks the device.
    """
    eligible = torch.ones_like(scores, dtype=torch.bool) if candidate_mask is None else candidate_mask
    roles, indices = torch.zeros_like(scores, dtype=torch.uint8), [budgets.new_empty(0, dtype=torch.int64)]
    parts, end = iter(zip(sizes, budgets.long())), 0
    for count, total in zip(tiles, totals):
        first, left = end, budgets.new_tensor(total, dtype=torch.int64)
        for size, budget in itertools.islice(parts, count):
            part, end = slice(end, end + size), end + size
            most = torch.minimum(eligible[part].sum(), left)
            kept = torch.minimum(budget.clamp(min=0), most)
            ranks = _order(scores[part], eligible[part]).argsort()
            roles[part], left = ranks < kept, left - kept
        found = torch.where(roles[first:end] > 0, torch.arange(first, end, device=scores.device), end)
        found = found.sort().values[:total]
        indices.append(torch.where(found < end, found, -1))
    return torch.cat(indices), roles


# --------------------------------------------------------------------------------------------------------- merging


def _rows_or_zeros(features: Tensor, indices: Tensor) -> Tensor:
    """`gather_rows`, of no rows too."""
    return gather_rows(F.pad(features, (0, 0, 0, 1)), indices)


def assigned_targets(keys: Tensor, targets: Tensor, sources: Tensor) -> Tensor:
    """argmax over targets t of k_s k_t / |k_t| for every source s, the first of equals: positions in `targets`, or -1.

    That is the target with the largest cosine. Targets outside the image are none, and a target is no source. A key of
    zeros has cosine 0 with all; what is not finite comes last.
    """
    inside = (targets >= 0) & (targets < keys.shape[1])  # [B, c]
    if not targets.shape[1]:
        return torch.full_like(sources, -1, dtype=torch.int64)
    keys = keys.detach().to(torch.promote_types(keys.dtype, torch.float32))
    theirs = _rows_or_zeros(keys, targets.where(inside, -1))  # [B, c, D]
    products = keys @ theirs.mT / theirs.norm(dim=-1).clamp(min=1e-12)[:, None]
    products = products.where(products.isfinite(), torch.finfo(keys.dtype).min)
    best = products.masked_fill(~inside[:, None], -math.inf).argmax(dim=-1)
    taken = F.pad(sources.logical_not(), (0, 1)).scatter(1, targets.where(inside, keys.shape[1]), True)[:, :-1]
    return best.where(~taken & inside.any(dim=1, keepdim=True), -1)


def merge_tokens(
    features: Tensor,
    keys: Tensor,
    targets: Tensor,
    sources: Tensor,
    sizes: Sequence[int] = (),
    counts: Sequence[int] = (),
    rows_only: bool = False,
) -> tuple[Tensor, Tensor]:
    """x_t + mean of x_s over the sources s of target t, as VisionZip merges (Yang et al., CVPR 2025, Section 3.3)."""
    if features.dim() == 2:  # packed
        return _merge_packed(features, keys, targets, sources, sizes, counts, rows_only)
    (B, N, C), c = features.shape, targets.shape[1]
    x = features.to(torch.promote_types(features.dtype, torch.float32))
    assigned = assigned_targets(keys, targets, sources)
    to = assigned.where(assigned >= 0, c)  # row c takes what is nobody's
    sums = x.new_zeros(B, c + 1, C).scatter_add(1, to[..., None].expand(B, N, C), x)
    means = (sums / F.one_hot(to, c + 1).sum(dim=1).clamp(min=1)[..., None])[:, :c]
    at = targets.where((targets >= 0) & (targets < N), N)  # row N is no token's
    if rows_only:
        return (_rows_or_zeros(x, at.where(at < N, -1)) + means).to(features.dtype), assigned
    added = x.new_zeros(B, N + 1, C).scatter_add(1, at[..., None].expand(B, c, C), means)
    return (x + added[:, :N]).to(features.dtype), assigned


def _merge_packed(
    features: Tensor,
    keys: Tensor,
    targets: Tensor,
    sources: Tensor,
    sizes: Sequence[int],
    counts: Sequence[int],
    rows_only: bool,
) -> tuple[Tensor, Tensor]:
    """`merge_tokens` of every image by itself; positions count all targets."""
    merged, assigned, first, begin = [features[:0]], [targets[:0]], 0, 0
    parts = (x.split(list(sizes)) for x in (features, keys, sources))
    for x, key, source, target in zip(*parts, targets.split(list(counts))):
        rows, to = merge_tokens(x[None], key[None], target[None] - first, source[None], rows_only=rows_only)
        merged.append(rows[0])
        assigned.append(to[0].where(to[0] < 0, to[0] + begin))
        first, begin = first + len(x), begin + len(target)
    return torch.cat(merged), torch.cat(assigned)


# --------------------------------------------------------------------------------------------------- diverse selection


def cosine_matrix(features: Tensor) -> Tensor:
    """L[i, j] = the cosine of the angle between rows i and j of features [N, C]; 0 for a row of zeros."""
    units = torch.nn.functional.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)
    products = units @ units.T
    return torch.maximum(products, products.T)  # a product of few rows may round otherwise than its mirror image


def _best(worth: Tensor, left: Tensor) -> Tensor:
    """The index of the highest worth among those left, the lowest among equals; NaN is behind everything."""
    worth = worth.where(left & ~worth.isnan(), -math.inf)
    return (left & (worth == worth.amax())).to(torch.uint8).argmax()


def farthest_points(cosines: Tensor, eligible: Tensor, count: int) -> Tensor:
    """Max-min diversity by farthest-point sampling on D = 1 - L, in order of choice: i_1 = argmax_i min_{j != i} D_ij,
    then i_t = argmax_i min_{s < t} D[i, i_s] ("DivPrune: Diversity-based Visual Token Pruning for Large Multimodal
    Models", Alvar et al., CVPR 2025, Algorithm 1)."""
    distances, left, chosen = 1 - cosines.masked_fill(~eligible, -math.inf), eligible.clone(), []
    least = distances.clone().fill_diagonal_(math.inf).amin(dim=1)
    for step in range(min(count, int(eligible.sum()))):
        chosen.append(_best(least, left))
        left[chosen[-1]] = False
        row = distances[chosen[-1]]
        least = torch.minimum(least, row) if step else row
    return torch.stack(chosen) if chosen else eligible.nonzero()[:, 0]


def determinant_map(cosines: Tensor, quality: Tensor, eligible: Tensor, count: int) -> Tensor:
    """Greedy MAP of the DPP with K = diag(q) L diag(q), in order of choice: j = argmax d, where d = diag K at first;
    c_t = (K_j - sum_{s < t} c_s[j] c_s) / sqrt(d_j); d -= c_t^2. From d_j <= 1e-12 max diag K on, by the highest q
    ("Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs", Zhang et al.,
    NeurIPS 2025; "Fast Greedy MAP Inference for Determinantal Point Process", Chen et al., NeurIPS 2018)."""
    kernel = quality[:, None] * cosines * quality
    gain, left, chosen = kernel.diagonal().where(eligible, 0.0), eligible.clone(), []
    least, covered = 1e-12 * gain.amax(), kernel.new_zeros(count, len(kernel))
    for step in range(min(count, int(eligible.sum()))):
        chosen.append(_best(gain, left))
        if gain[chosen[-1]] > least:
            j = chosen[-1]
            covered[step] = (kernel[j] - covered[:step, j] @ covered[:step]) / gain[j].sqrt()
            gain = gain - covered[step] ** 2
        else:
            chosen[-1] = _best(quality, left)
        left[chosen[-1]] = False
    return torch.stack(chosen) if chosen else eligible.nonzero()[:, 0]


def _diverse_image(features: Tensor, quality: Tensor | None, eligible: Tensor | None, count: int) -> Tensor:
    """One image: [2, count], indices ascending and in order of choice; -1 fills the end where there are too few."""
    cosines = cosine_matrix(features)
    eligible = torch.ones_like(cosines[0], dtype=torch.bool) if eligible is None else eligible
    if quality is None:
        order = farthest_points(cosines, eligible, count)
    else:
        order = determinant_map(cosines, quality.to(cosines.dtype), eligible, count)
    both = torch.stack([order.sort().values, order])
    return torch.nn.functional.pad(both, (0, count - len(order)), value=-1)


def select_diverse(
    features: Tensor, *, count: int, quality: Tensor | None = None, candidate_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`farthest_points` or, with a quality, `determinant_map`, of each image of a batch."""
    parts = [features.new_empty(2, 0, count, dtype=torch.int64)]
    for b in range(len(features)):
        q, mask = (None if x is None else x[b] for x in (quality, candidate_mask))
        parts.append(_diverse_image(features[b], q, mask, count)[:, None])
    indices, order = torch.cat(parts, dim=1)
    return indices.clone(), order.clone()  # an operator's results must not share memory


def select_diverse_varlen(
    features: Tensor,
    *,
    sizes: Sequence[int],
    counts: Sequence[int],
    quality: Tensor | None = None,
    candidate_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`select_diverse` of packed images, each by itself; indices are positions in the packed sequence."""
    parts, start = [features.new_empty(2, 0, dtype=torch.int64)], 0
    for size, count in zip(sizes, counts):
        image = slice(start, start + size)
        q, mask = (None if x is None else x[image] for x in (quality, candidate_mask))
        part = _diverse_image(features[image], q, mask, count)
        parts.append(torch.where(part < 0, part, part + start))
        start += size
    indices, order = torch.cat(parts, dim=1)
    return indices.clone(), order.clone()
