"""The Triton kernels of attention with column scores; `paths.py` beside this file explains and launches them."""

import triton
import triton.language as tl

# float32 products from three tf32 ones: errors of 3e-8 in the scores, where plain tf32 gives 1.3e-4.
PRECISION = tl.constexpr("tf32x3")

# ------------------------------------------------------------------------------------------------- pieces of kernels
# Row offsets are 32-bit within a tile and 64-bit up to its first row: B * H * N * D may pass 2^31.


@triton.jit
def _segment_start(lengths_ptr, index, total):
    return tl.minimum(tl.maximum(tl.load(lengths_ptr + index), 0), total)


@triton.jit
def _locate(program, heads, own, other, own_lengths_ptr, other_lengths_ptr, segments, BLOCK: tl.constexpr):
    """A program's batch, head, first row in its sequence; start and length of the sequence on its and the other side.

    Packed: sequence s owns blocks start // BLOCK + s and on. That leaves room for all of them without a prefix sum over
    lengths; blocks past the sequence's end have nothing to do.
    """
    if own_lengths_ptr is None:
        blocks = tl.cdiv(own, BLOCK)
        head = program // blocks
        return head // heads, head % heads, program % blocks * BLOCK, 0, own, 0, other
    else:
        blocks = own // BLOCK + segments
        block = program % blocks
        low = block * 0
        high = low + segments - 1
        while low < high:
            middle = (low + high + 1) // 2
            begins = _segment_start(own_lengths_ptr, middle, own) // BLOCK + middle <= block
            low = tl.where(begins, middle, low)
            high = tl.where(begins, high, middle - 1)
        start = _segment_start(own_lengths_ptr, low, own)
        length = tl.maximum(_segment_start(own_lengths_ptr, low + 1, own) - start, 0)
        row = tl.maximum(block - (start // BLOCK + low), 0) * BLOCK
        other_start = _segment_start(other_lengths_ptr, low, other)
        other_length = tl.maximum(_segment_start(other_lengths_ptr, low + 1, other) - other_start, 0)
        return low * 0, program // blocks, row, start, length, other_start, other_length


@triton.jit
def _of_head(ptr, strides, batch, head, ALIGN: tl.constexpr):
    # Two hints: one on the sum is lost where the batch is known to be 0.
    to_batch = tl.multiple_of(tl.cast(batch, tl.int64) * strides[0], ALIGN)
    return ptr + to_batch + tl.multiple_of(tl.cast(head, tl.int64) * strides[1], ALIGN)


@triton.jit
def _tile(
    ptr,
    first_row,
    stride,
    valid,
    BLOCK: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Pointers and mask, [BLOCK, WIDTH], of rows first_row and on, columns FIRST and on."""
    columns = FIRST + tl.arange(0, WIDTH)
    first = tl.multiple_of(tl.cast(first_row, tl.int64) * stride, ALIGN)
    ptrs = ptr + first + (tl.multiple_of(tl.arange(0, BLOCK) * stride, ALIGN)[:, None] + columns[None, :])
    if FIRST + WIDTH <= D:
        mask = valid[:, None]
    else:
        mask = valid[:, None] & (columns < D)[None, :]
    return ptrs, mask


@triton.jit
def _load(
    ptr,
    first_row,
    stride,
    valid,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Rows first_row and on as [BLOCK, D1] and [BLOCK, D2]; zero where not valid [BLOCK] or beyond D."""
    ptrs, mask = _tile(ptr, first_row, stride, valid, BLOCK, 0, D1, D, ALIGN)
    x1 = tl.load(ptrs, mask=mask, other=0.0)
    x2 = x1  # not used
    if D2 > 0:
        ptrs, mask = _tile(ptr, first_row, stride, valid, BLOCK, D1, D2, D, ALIGN)
        x2 = tl.load(ptrs, mask=mask, other=0.0)
    return x1, x2


@triton.jit
def _store(ptr, first_row, stride, valid, x1, x2, D: tl.constexpr, ALIGN: tl.constexpr):
    ptrs, mask = _tile(ptr, first_row, stride, valid, x1.shape[0], 0, x1.shape[1], D, ALIGN)
    tl.store(ptrs, x1.to(ptr.dtype.element_ty), mask=mask)
    if x1.shape[1] < D:
        ptrs, mask = _tile(ptr, first_row, stride, valid, x1.shape[0], x1.shape[1], x2.shape[1], D, ALIGN)
        tl.store(ptrs, x2.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _valid_rows(first, length, start, mask_ptr, mask_strides, batch, BLOCK: tl.constexpr):
    """Which of the rows first .. first + BLOCK - 1 of a sequence exist and are not masked: [BLOCK]."""
    rows = first + tl.arange(0, BLOCK)
    valid = rows < length
    if mask_ptr is not None:
        mask_ptr += tl.cast(batch, tl.int64) * mask_strides[0] + tl.cast(start + first, tl.int64) * mask_strides[1]
        valid = tl.load(mask_ptr + tl.arange(0, BLOCK) * mask_strides[1], mask=valid, other=0) != 0
    return valid


@triton.jit
def _product(a1, a2, b1, b2, D2: tl.constexpr):
    """A B^T, with the head dimension in two parts."""
    product = tl.dot(a1, tl.trans(b1), input_precision=PRECISION)
    if D2 > 0:
        product = tl.dot(a2, tl.trans(b2), product, input_precision=PRECISION)
    return product


@triton.jit
def _softmax_step(
    state,  # largest logit so far, sum of exp2(logit - largest), and the weighted values to go with them
    logits,
    logit_scale,
    v_ptr,
    first_row,
    stride,
    valid,
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """One tile of flash attention."""
    top, total, output1, output2 = state
    new_top = tl.maximum(top, tl.max(logits, 1))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)  # no visible key yet: -inf - -inf would be NaN
    # Subtracted before it is scaled: in one multiply-add the largest logit, scaled and rounded, would miss its own
    # product, by 512 where that is 1e10, and exp2 of it would be 0 or infinite.
    p = tl.exp2((logits - base[:, None]) * logit_scale)
    correction = tl.exp2((top - base) * logit_scale)
    if v_ptr is not None:
        v1, v2 = _load(v_ptr, first_row, stride, valid, BLOCK_N, D, D1, D2, ALIGN)
        weights = p.to(v1.dtype)
        output1 = tl.dot(weights, v1, output1 * correction[:, None], input_precision=PRECISION)
        if D2 > 0:
            output2 = tl.dot(weights, v2, output2 * correction[:, None], input_precision=PRECISION)
    return new_top, total * correction + tl.sum(p, 1), output1, output2


# ------------------------------------------------------------------------------------------------------------ kernels


@triton.jit
def attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,  # None: no output
    output_ptr,
    top_ptr,  # None, or [B, H, M]: the largest Q K^T of each row
    weight_ptr,  # 1 / the sum of the exponentials, kept apart: added to `top` it would lose bits where that is large
    partial_ptr,  # None, or [B, H, blocks of queries, N]: the second sweep
    key_mask_ptr,
    query_mask_ptr,
    lengths_q_ptr,
    lengths_k_ptr,
    q_strides,  # batch, head, row
    k_strides,
    v_strides,
    output_strides,
    key_mask_strides,  # batch, row
    query_mask_strides,
    heads,
    group,  # query heads per key head
    M,
    N,
    segments,
    logit_scale,  # |scale| log2(e)
    CAUSAL: tl.constexpr,
    NEGATE: tl.constexpr,  # scale < 0
    D: tl.constexpr,
    D1: tl.constexpr,  # D in two powers of two: 80 as 64 + 16, not padded to 128
    D2: tl.constexpr,
    ALIGN: tl.constexpr,  # power of two that divides every stride: Triton by itself sees multiples of 16 only, not 72
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One block of queries of one head: flash attention over the keys, then the column sums of its probabilities."""
    program = tl.program_id(0)
    located = _locate(program, heads, M, N, lengths_q_ptr, lengths_k_ptr, segments, BLOCK_M)
    batch, head, first_m, start_q, length_q, start_k, length_k = located
    if first_m >= length_q:
        return
    q_ptr = _of_head(q_ptr, q_strides, batch, head, ALIGN)
    k_ptr = _of_head(k_ptr, k_strides, batch, head // group, ALIGN)
    rows = first_m + tl.arange(0, BLOCK_M)
    exists = rows < length_q
    shift = length_k - length_q  # causal: row m sees key n <= m + shift
    end = length_k
    if CAUSAL:
        end = tl.minimum(length_k, first_m + BLOCK_M + shift)
    q1, q2 = _load(q_ptr, start_q + first_m, q_strides[2], exists, BLOCK_M, D, D1, D2, ALIGN)
    if NEGATE:
        q1, q2 = -q1, -q2
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)  # the largest Q K^T so far
    total = tl.zeros([BLOCK_M], tl.float32)  # of exp2((Q K^T - top) * logit_scale)
    output1, output2 = total, total  # not used
    if v_ptr is not None:
        v_ptr = _of_head(v_ptr, v_strides, batch, head // group, ALIGN)
        output1 = tl.zeros([BLOCK_M, D1], tl.float32)
        output2 = output1
        if D2 > 0:
            output2 = tl.zeros([BLOCK_M, D2], tl.float32)
    # Tiles that every row sees whole need no mask, a fifth fewer instructions; then the diagonal and the last tile.
    full = length_k // BLOCK_N * BLOCK_N
    if CAUSAL:
        full = tl.minimum(full, tl.maximum(first_m + shift + 1, 0) // BLOCK_N * BLOCK_N)
    if key_mask_ptr is not None:
        full = 0
    state = (top, total, output1, output2)
    for first_n in range(0, full, BLOCK_N):
        everything = tl.full([BLOCK_N], 1, tl.int1)
        k1, k2 = _load(k_ptr, start_k + first_n, k_strides[2], everything, BLOCK_N, D, D1, D2, ALIGN)
        logits = _product(q1, q2, k1, k2, D2)
        state = _softmax_step(
            state, logits, logit_scale, v_ptr, start_k + first_n, v_strides[2], everything, BLOCK_N, D, D1, D2, ALIGN
        )
    for first_n in range(full, end, BLOCK_N):
        columns = first_n + tl.arange(0, BLOCK_N)
        valid = _valid_rows(first_n, length_k, start_k, key_mask_ptr, key_mask_strides, batch, BLOCK_N)
        k1, k2 = _load(k_ptr, start_k + first_n, k_strides[2], valid, BLOCK_N, D, D1, D2, ALIGN)
        visible = valid[None, :]
        if CAUSAL:
            visible = visible & (columns[None, :] <= rows[:, None] + shift)
        logits = tl.where(visible, _product(q1, q2, k1, k2, D2), float("-inf"))
        state = _softmax_step(
            state, logits, logit_scale, v_ptr, start_k + first_n, v_strides[2], valid, BLOCK_N, D, D1, D2, ALIGN
        )
    top, total, output1, output2 = state

    blind = total == 0.0  # sees no key
    weight = 1.0 / tl.where(blind, 1.0, total)
    if v_ptr is not None:
        output_ptr = _of_head(output_ptr, output_strides, batch, head, ALIGN)
        output1 = tl.where(blind[:, None], 0.0, output1 * weight[:, None])
        output2 = tl.where(blind[:, None], 0.0, output2 * weight[:, None])
        _store(output_ptr, start_q + first_m, output_strides[2], exists, output1, output2, D, ALIGN)
    if top_ptr is not None:
        row = (tl.cast(batch, tl.int64) * heads + head) * M + start_q + rows
        tl.store(top_ptr + row, top, mask=exists)
        tl.store(weight_ptr + row, weight, mask=exists)

    if partial_ptr is not None:
        counted = exists
        if query_mask_ptr is not None:
            counted = _valid_rows(first_m, length_q, start_q, query_mask_ptr, query_mask_strides, batch, BLOCK_M)
        top, weight = tl.where(counted, top, float("inf")), tl.where(counted, weight, 0.0)
        partial_ptr += ((tl.cast(batch, tl.int64) * heads + head) * tl.cdiv(M, BLOCK_M) + first_m // BLOCK_M) * N
        for first_n in range(0, end, BLOCK_N):
            columns = first_n + tl.arange(0, BLOCK_N)
            valid = _valid_rows(first_n, length_k, start_k, key_mask_ptr, key_mask_strides, batch, BLOCK_N)
            k1, k2 = _load(k_ptr, start_k + first_n, k_strides[2], valid, BLOCK_N, D, D1, D2, ALIGN)
            p = tl.exp2((_product(k1, k2, q1, q2, D2) - top[None, :]) * logit_scale) * weight[None, :]
            if CAUSAL:
                p = tl.where(columns[:, None] <= rows[None, :] + shift, p, 0.0)
            if query_mask_ptr is not None:
                p = tl.where(counted[None, :], p, 0.0)  # NaN in a row that does not count stays out
            sums = tl.sum(p, 1)
            if key_mask_ptr is not None:
                sums = tl.where(valid, sums, 0.0)
            tl.store(partial_ptr + columns, sums, mask=columns < N)
        if CAUSAL:
            for first_n in range(tl.cdiv(tl.maximum(end, 0), BLOCK_N) * BLOCK_N, N, BLOCK_N):
                columns = first_n + tl.arange(0, BLOCK_N)
                tl.store(partial_ptr + columns, tl.zeros([BLOCK_N], tl.float32), mask=columns < N)


@triton.jit
def strip_kernel(
    q_ptr,
    k_ptr,
    v_ptr,  # None: no output
    output_ptr,
    partial_ptr,  # [B, H, blocks of queries, N]
    key_mask_ptr,
    query_mask_ptr,
    q_strides,  # batch, head, row
    k_strides,
    v_strides,
    output_strides,
    key_mask_strides,  # batch, row
    query_mask_strides,
    heads,
    group,
    M,
    N,
    logit_scale,
    CAUSAL: tl.constexpr,
    NEGATE: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,  # a power of two, at least D
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # at least N
):
    """`attention_kernel` where one tile holds all keys: its probabilities are the scores', no second sweep.

    The head dimension is one tile wide: of two products with these probabilities ptxas 12.8 computes the second wrongly
    (its later steps read V at the address of something else).
    """
    batch, head, first_m, _, _, _, _ = _locate(tl.program_id(0), heads, M, N, None, None, 0, BLOCK_M)
    rows, columns = first_m + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    exists = rows < M
    valid = _valid_rows(0, N, 0, key_mask_ptr, key_mask_strides, batch, BLOCK_N)
    visible = valid[None, :]
    if CAUSAL:
        visible = visible & (columns[None, :] <= rows[:, None] + (N - M))

    q, _ = _load(
        _of_head(q_ptr, q_strides, batch, head, ALIGN), first_m, q_strides[2], exists, BLOCK_M, D, D1, 0, ALIGN
    )
    if NEGATE:
        q = -q
    k, _ = _load(
        _of_head(k_ptr, k_strides, batch, head // group, ALIGN), 0, k_strides[2], valid, BLOCK_N, D, D1, 0, ALIGN
    )
    logits = tl.where(visible, _product(q, q, k, k, 0), float("-inf"))
    top = tl.max(logits, 1)
    p = tl.exp2((logits - tl.where(top == float("-inf"), 0.0, top)[:, None]) * logit_scale)
    total = tl.sum(p, 1)
    blind = total == 0.0
    inverse = 1.0 / tl.where(blind, 1.0, total)

    counted = exists
    if query_mask_ptr is not None:
        counted = _valid_rows(first_m, M, 0, query_mask_ptr, query_mask_strides, batch, BLOCK_M)
    probabilities = p * tl.where(counted, inverse, 0.0)[:, None]
    if query_mask_ptr is not None:
        probabilities = tl.where(counted[:, None], probabilities, 0.0)
    if key_mask_ptr is not None or CAUSAL:
        probabilities = tl.where(visible, probabilities, 0.0)
    partial_ptr += ((tl.cast(batch, tl.int64) * heads + head) * tl.cdiv(M, BLOCK_M) + first_m // BLOCK_M) * N
    tl.store(partial_ptr + columns, tl.sum(probabilities, 0), mask=columns < N)

    if v_ptr is not None:
        v_ptr = _of_head(v_ptr, v_strides, batch, head // group, ALIGN)
        v, _ = _load(v_ptr, 0, v_strides[2], valid, BLOCK_N, D, D1, 0, ALIGN)
        output = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        output = tl.where(blind[:, None], 0.0, output * inverse[:, None])
        output_ptr = _of_head(output_ptr, output_strides, batch, head, ALIGN)
        _store(output_ptr, first_m, output_strides[2], exists, output, output, D, ALIGN)


@triton.jit
def scores_kernel(
    q_ptr,
    k_ptr,
    top_ptr,  # [B, H, M], as `attention_kernel` leaves them
    weight_ptr,  # None: `top` is a natural log-sum-exp
    partial_ptr,  # [B, H, splits, N]
    key_mask_ptr,
    query_mask_ptr,
    lengths_q_ptr,
    lengths_k_ptr,
    q_strides,  # batch, head, row
    k_strides,
    top_strides,
    key_mask_strides,  # batch, row
    query_mask_strides,
    heads,
    group,
    M,
    N,
    segments,
    splits,
    split_rows,  # queries per split, a multiple of BLOCK_M
    logit_scale,
    top_scale,  # from a log-sum-exp to the scale of Q K^T
    CAUSAL: tl.constexpr,
    NEGATE: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Column sums of the probabilities for one block of keys, one head, one share of the queries."""
    program = tl.program_id(0)
    located = _locate(program, heads * splits, N, M, lengths_k_ptr, lengths_q_ptr, segments, BLOCK_N)
    batch, slot, first_n, start_k, length_k, start_q, length_q = located
    if first_n >= length_k:
        return
    head = slot // splits
    q_ptr = _of_head(q_ptr, q_strides, batch, head, ALIGN)
    k_ptr = _of_head(k_ptr, k_strides, batch, head // group, ALIGN)
    top_ptr = _of_head(top_ptr, top_strides, batch, head, 1) + start_q
    if weight_ptr is not None:
        weight_ptr = _of_head(weight_ptr, top_strides, batch, head, 1) + start_q
    columns = first_n + tl.arange(0, BLOCK_N)
    valid = _valid_rows(first_n, length_k, start_k, key_mask_ptr, key_mask_strides, batch, BLOCK_N)
    k1, k2 = _load(k_ptr, start_k + first_n, k_strides[2], valid, BLOCK_N, D, D1, D2, ALIGN)
    if NEGATE:
        k1, k2 = -k1, -k2

    begin = slot % splits * split_rows
    end = tl.minimum(begin + split_rows, length_q)
    shift = length_k - length_q
    if CAUSAL:  # queries before first_n - shift see none of these keys
        begin = tl.maximum(begin, tl.maximum(first_n - shift, 0) // BLOCK_M * BLOCK_M)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first_m in range(begin, end, BLOCK_M):
        rows = first_m + tl.arange(0, BLOCK_M)
        exists = rows < length_q
        counted = _valid_rows(first_m, length_q, start_q, query_mask_ptr, query_mask_strides, batch, BLOCK_M)
        q1, q2 = _load(q_ptr, start_q + first_m, q_strides[2], exists, BLOCK_M, D, D1, D2, ALIGN)
        top = tl.load(top_ptr + rows, mask=counted, other=float("inf"))
        logits = _product(q1, q2, k1, k2, D2)
        if (
            weight_ptr is None
        ):  # in one multiply-add, by the very factor that the logits have: two would differ in all rows
            top = top * top_scale * logit_scale
            p = tl.exp2(logits * logit_scale - top[:, None])
        else:
            weight = tl.load(weight_ptr + rows, mask=counted, other=0.0)
            p = tl.exp2((logits - top[:, None]) * logit_scale) * weight[:, None]
        if CAUSAL:
            p = tl.where(columns[None, :] <= rows[:, None] + shift, p, 0.0)
        if query_mask_ptr is not None:
            p = tl.where(counted[:, None], p, 0.0)  # NaN in a row that does not count stays out
        sums += p
    total = tl.sum(sums, 0)
    if key_mask_ptr is not None:
        total = tl.where(valid, total, 0.0)
    partial_ptr += (tl.cast(batch, tl.int64) * heads * splits + slot) * N + start_k
    tl.store(partial_ptr + columns, total, mask=columns < length_k)


@triton.jit
def reduce_kernel(partial_ptr, scores_ptr, slots, N, factor, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """scores[r, n] = factor * the sum over s of partial[r, s, n], in a fixed order."""
    blocks = tl.cdiv(N, BLOCK_N)
    row = tl.cast(tl.program_id(0) // blocks, tl.int64)
    columns = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for first in range(0, slots, ROWS):
        slot = first + tl.arange(0, ROWS)
        ptrs = partial_ptr + (row * slots + first) * N + tl.arange(0, ROWS)[:, None] * N + columns[None, :]
        sums += tl.load(ptrs, mask=(slot < slots)[:, None] & (columns < N)[None, :], other=0.0)
    tl.store(scores_ptr + row * N + columns, tl.sum(sums, 0) * factor, mask=columns < N)
