"""The reference operators against loops written straight from the equations."""

import itertools
import math

import pytest
import torch

from hiprune_kernels import reference
from hiprune_kernels.budget import anchor_count

B, HQ, HK, D = 2, 4, 2, 3


def attention_by_loops(query, key, value, scale, causal, key_mask, query_mask):
    """Output [B, Hq, M, D] and, per head, the list of (query, key, probability) that count."""
    output = torch.zeros(query.shape, dtype=torch.float64)
    M, N = query.shape[2], key.shape[2]
    matrix = torch.zeros(B, HQ, M, N, dtype=torch.float64)
    counted = torch.zeros(B, M, N, dtype=torch.bool)
    for b, h, m in itertools.product(range(B), range(HQ), range(M)):
        seen = [n for n in range(N) if (not causal or n <= m + N - M) and (key_mask is None or key_mask[b, n])]
        logits = {n: float(query[b, h, m] @ key[b, h // (HQ // HK), n]) * scale for n in seen}
        total = sum(math.exp(x) for x in logits.values())
        for n in seen:
            p = math.exp(logits[n]) / total
            output[b, h, m] += p * value[b, h // (HQ // HK), n]
            if query_mask is None or query_mask[b, m]:
                matrix[b, h, m, n], counted[b, m, n] = p, True
    return output, matrix, counted


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("M", "N", "causal"), [(5, 7, False), (5, 7, True), (7, 5, True), (6, 6, True)])
def test_attention_against_loops(M, N, causal, masked):
    query = torch.randn(B, HQ, M, D, dtype=torch.float64)
    key, value = torch.randn(2, B, HK, N, D, dtype=torch.float64)
    key_mask = torch.rand(B, N) > 0.4 if masked else None
    query_mask = torch.rand(B, M) > 0.4 if masked else None
    masks = {"key_mask": key_mask, "query_mask": query_mask}
    output, matrix, counted = attention_by_loops(query, key, value, 0.7, causal, **masks)
    options = {"scale": 0.7, "causal": causal, **masks}

    result, scores = reference.attention_with_scores(query, key, value, **options)
    torch.testing.assert_close(result, output, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(scores, matrix.mean(dim=1).sum(dim=1), rtol=1e-12, atol=1e-12)
    assert scores.std() > 0.01

    over_heads = {"mean": matrix.mean(dim=1), "sum": matrix.sum(dim=1), "max": matrix.amax(dim=1)}
    for (head_reduction, rows), query_reduction in itertools.product(over_heads.items(), ("sum", "mean", "max")):
        counts = counted.sum(dim=1).clamp(min=1)
        expected = {"sum": rows.sum(dim=1), "mean": rows.sum(dim=1) / counts, "max": rows.amax(dim=1)}[query_reduction]
        reductions = {"query_reduction": query_reduction, "head_reduction": head_reduction}
        torch.testing.assert_close(reference.attention_scores(query, key, **reductions, **options), expected)
    per_head = reference.attention_scores_per_head(query, key, query_reduction="max", **options)
    torch.testing.assert_close(per_head, matrix.amax(dim=2))


def test_output_memory_order():
    query, key, value = torch.randn(3, 2, 4, 5, 8)
    output, _ = reference.attention_with_scores(query, key, value)
    assert output.shape == (2, 4, 5, 8)
    assert output.transpose(1, 2).is_contiguous()


def test_varlen_is_each_segment_by_itself():
    cu_q = torch.tensor([0, 3, 3, 8], dtype=torch.int32)
    cu_k = torch.tensor([0, 4, 6, 6], dtype=torch.int32)  # one segment without queries, one without keys
    query, (key, value) = torch.randn(8, HQ, D), torch.randn(2, 6, HK, D)
    options = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "causal": True}
    output, scores = reference.attention_with_scores_varlen(query, key, value, **options)
    dense = [x[None].transpose(1, 2) for x in (query[:3], key[:4], value[:4])]
    expected_output, expected_scores = reference.attention_with_scores(*dense, causal=True)
    torch.testing.assert_close(output[:3], expected_output[0].transpose(0, 1), rtol=0, atol=0)
    torch.testing.assert_close(scores[:4], expected_scores[0], rtol=0, atol=0)
    assert (output[3:] == 0).all()
    assert (scores[4:] == 0).all()
    assert (scores[:4] > 0).all()
    torch.testing.assert_close(reference.attention_scores_varlen(query, key, **options), scores)
    per_head = reference.attention_scores_per_head_varlen(query, key, **options)
    torch.testing.assert_close(per_head.mean(dim=0), scores)


# ---------------------------------------------------------------------------------------------------------- selection


def best(scores, eligible, k):
    """Indices of the k best by sorting (score descending, NaN last, index ascending)."""
    order = sorted(eligible, key=lambda i: (math.isnan(scores[i]), -scores[i] if scores[i] == scores[i] else 0, i))
    return order[: max(k, 0)]


def select_by_sets(objects, deeps, eligible, grid, budget, alpha, rule, neighborhood, keep_roles):
    """Roles by sets and sorting, one token at a time."""
    t, h, w = (1, *grid) if len(grid) == 2 else grid
    tokens = [i for i in range(t * h * w) if eligible[i]]
    count = anchor_count(budget, alpha=alpha, rule=rule, neighborhood=neighborhood, keep_roles=keep_roles)
    anchors = best(objects, tokens, count)
    steps = {"none": 0, "row": 2, "cross": 4, "square": 8}[neighborhood]
    buffers = set()
    for i in anchors if "buffer" in keep_roles else []:
        frame, y, x = i // (h * w), i % (h * w) // w, i % w
        first, last = frame * h * w, (frame + 1) * h * w - 1
        for dy, dx in [(0, -1), (0, 1), (-1, 0), (1, 0), (-1, -1), (-1, 1), (1, -1), (1, 1)][:steps]:
            j = i + dy * w + dx
            if rule.startswith("official"):
                buffers.add(min(max(j, first), last))
            elif rule == "paper" and first <= j <= last:
                buffers.add(j)
            elif rule == "grid" and 0 <= y + dy < h and 0 <= x + dx < w:
                buffers.add(j)
    buffers = sorted(buffers & set(tokens) - set(anchors))[: budget - len(anchors)]
    kept = set(anchors) | set(buffers)
    roles = [1 if i in anchors else 2 if i in buffers else 0 for i in range(t * h * w)]
    rest = budget - len(kept)
    if "register" not in keep_roles:
        for i in best(objects, [i for i in tokens if i not in kept], rest):
            roles[i] = 1
    elif rule.startswith("official"):
        lowered = [float(torch.tensor(d) - 1.0) if i in kept else d for i, d in enumerate(deeps)]
        for i in best(lowered, tokens, rest):
            roles[i] = roles[i] or 3
    else:
        for i in best(deeps, [i for i in tokens if i not in kept], rest):
            roles[i] = 3
    return roles


def draw_scores(kind, *size):
    if kind == "ties":
        return torch.randint(0, 4, size).float()
    scores = torch.rand(*size)
    if kind == "special":
        pick = torch.rand(*size)
        for i, value in enumerate((float("nan"), float("inf"), -float("inf"), 0.0, -0.0)):
            scores[(pick > 0.12 * i) & (pick < 0.12 * (i + 1))] = value
    return scores


@pytest.mark.parametrize("keep_roles", [("anchor", "buffer", "register"), ("anchor", "register"), ("register",),
                                        ("anchor", "buffer"), ("anchor",)])  # fmt: skip
@pytest.mark.parametrize("neighborhood", ["cross", "square", "row", "none"])
@pytest.mark.parametrize("rule", ["paper", "official", "official_qwen", "grid"])
def test_selection_against_sets(rule, neighborhood, keep_roles):
    generator = torch.Generator().manual_seed(1)
    options = {"rule": rule, "neighborhood": neighborhood, "keep_roles": keep_roles}
    for grid, kind, alpha in itertools.product(
        [(6, 6), (1, 7), (7, 1), (2, 3, 4), (1, 1), (3, 5)], ("distinct", "ties", "special"), (0.0, 0.1, 0.6, 1.0)
    ):
        count = math.prod(grid)
        for budget in {1, count, int(torch.randint(1, count + 1, (1,), generator=generator))}:
            objects, deeps = draw_scores(kind, 1, count), draw_scores(kind, 1, count)
            mask = torch.rand(1, count) > 0.2
            mask[0, 0] = True
            for candidate_mask in (None, mask):
                eligible = torch.ones(count, dtype=torch.bool) if candidate_mask is None else mask[0]
                arguments = {
                    "budget": budget,
                    "grid": grid,
                    "alpha": alpha,
                    "candidate_mask": candidate_mask,
                    **options,
                }
                indices, roles = reference.select_tokens(objects, deeps, **arguments)
                expected = select_by_sets(
                    objects[0].tolist(), deeps[0].tolist(), eligible, grid, budget, alpha, **options
                )
                assert roles[0].tolist() == expected, arguments
                kept = [i for i, role in enumerate(expected) if role]
                assert indices[0].tolist() == kept + [-1] * (budget - len(kept))
                if rule in ("paper", "grid") and candidate_mask is None:
                    assert len(kept) == budget


def test_official_neighbours_clamp_to_the_corner():
    """An anchor on the top edge pulls in token 0 in the released code, and nothing in the paper's Eq. 5."""
    objects = torch.zeros(1, 36)
    objects[0, 3] = 1.0
    deeps = torch.linspace(0, 0.9, 36)[None]
    options = {"budget": 10, "alpha": 0.5, "grid": (6, 6)}
    official, paper = (reference.select_tokens(objects, deeps, rule=r, **options)[1][0] for r in ("official", "paper"))
    assert official[[0, 2, 3, 4, 9]].tolist() == [2, 2, 1, 2, 2]
    assert paper[[0, 2, 3, 4, 9]].tolist() == [0, 2, 1, 2, 2]


def test_paper_neighbours_wrap_over_row_ends_and_grid_ones_do_not():
    objects = torch.zeros(1, 36)
    objects[0, 12] = 1.0  # first of the third row
    options = {"budget": 5, "alpha": 1.0, "grid": (6, 6)}
    paper, grid = (reference.select_tokens(objects, objects, rule=r, **options)[1][0] for r in ("paper", "grid"))
    assert paper.nonzero()[:, 0].tolist() == [6, 11, 12, 13, 18]
    assert grid[[6, 11, 12, 13, 18]].tolist() == [2, 0, 1, 2, 2]


def test_official_overflow_drops_the_highest_buffers():
    """Three anchors in the middle, a budget of 13: 15 tokens in the clusters, and round(13 / 5) = 3."""
    objects = torch.zeros(1, 100)
    objects[0, [22, 26, 72]] = 1.0
    indices, roles = reference.select_tokens(objects, objects, budget=13, alpha=1.0, grid=(10, 10), rule="official")
    assert indices[0].tolist() == [12, 16, 21, 22, 23, 25, 26, 27, 32, 36, 62, 71, 72]
    assert roles[0, 73] == 0
    assert roles[0, 82] == 0


def test_official_qwen_picks_kept_tokens_again():
    """On column sums a kept token can still lead the race for registers, so fewer than the budget survive."""
    objects, deeps = torch.zeros(1, 25), torch.zeros(1, 25)
    objects[0, 12] = deeps[0, 12] = 9.0
    options = {"budget": 10, "alpha": 0.5, "grid": (5, 5)}
    indices, roles = reference.select_tokens(objects, deeps, rule="official_qwen", **options)
    assert indices[0].tolist() == [0, 1, 2, 3, 7, 11, 12, 13, 17, -1]
    assert roles[0].tolist().count(0) == 16
    assert (reference.select_tokens(objects, deeps, rule="paper", **options)[0] >= 0).all()


def test_prune_gathers_the_rows():
    features, scores = torch.randn(2, 40, 3), torch.rand(2, 40)
    options = {"budget": 9, "grid": (6, 6), "num_prefix_tokens": 4}
    kept, indices, roles = reference.prune_tokens(features, scores, scores, **options)
    for b in range(2):
        assert torch.equal(kept[b], features[b, 4:][indices[b]])
        assert indices[b].tolist() == roles[b].nonzero()[:, 0].tolist()
    padded, indices, _ = reference.prune_tokens(
        features, scores, scores, candidate_mask=torch.arange(36).expand(2, -1) < 5, **options
    )
    assert indices.tolist() == [[0, 1, 2, 3, 4, -1, -1, -1, -1]] * 2
    assert (padded[:, 5:] == 0).all()
    assert torch.equal(padded[:, :5], features[:, 4:9])


def test_varlen_selection_is_each_image_by_itself():
    grids, budgets = [(3, 4), (2, 2, 3), (1, 5)], [5, 4, 2]
    objects, deeps, features = torch.rand(29), torch.rand(29), torch.randn(29, 3)
    kept, indices, roles = reference.prune_tokens_varlen(features, objects, deeps, grids=grids, budgets=budgets)
    starts, rows = (0, 12, 24, 29), (0, 5, 9, 11)
    for i, (grid, budget) in enumerate(zip(grids, budgets)):
        part = slice(starts[i], starts[i + 1])
        alone, alone_roles = reference.select_tokens(objects[None, part], deeps[None, part], grid=grid, budget=budget)
        assert torch.equal(indices[rows[i] : rows[i + 1]], alone[0] + starts[i])
        assert torch.equal(roles[part], alone_roles[0])
    assert torch.equal(kept, features[indices])
