"""The lookup: y[i] = sum over j of weights[i, j] * values[indices[i, j]].

This is all that a memory layer does with its memory (Memory Layers at Scale, arXiv:2412.09764, section 3): every
token reads `k` rows of a table of `S` rows and adds them up, each with its own weight. In matrix form y = W V, where
W (n x S) holds k weights a row and zeros elsewhere. Its two gradients are then

    dV = W^T dY        row s of V collects the dY of every token that read it: a lookup with the roles swapped
    dW = dY V^T        wanted only where W is not zero: dweights[i, j] = dY[i] . values[indices[i, j]]

Read in this order: `lookup_reference` (the definition), `torch_forward` and `torch_backward` (the same, fast on a CPU),
the Triton kernels (the same on a GPU), `lookup` (what the model calls), `RowAdam` (the optimiser of the rows that were read).
The kernels that choose the slots belong to memory.py. `python kernels.py` checks and times all of it; nothing else is below it.

Letters: n bags (tokens), k slots read a bag (heads times top-k), S slots in the table, D width of a value,
R distinct rows touched, P = n * k pairs of bag and slot.
"""

import argparse
import os
import subprocess
import sys
import time
import types
import warnings

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # there is no Triton for macOS and Windows; the PyTorch path does not need it
    triton = tl = types.SimpleNamespace(jit=lambda *function, **_: function[0] if function else triton.jit, constexpr=None)

# PyTorch says once a process that compressed sparse rows are in beta; torch_backward uses them, for one product.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")


def lookup_reference(values, indices, weights):
    """The definition in one line. values (S, D), indices (n, k), weights (n, k) -> (n, D); sums in float32 or wider."""
    wide = torch.promote_types(values.dtype, torch.float32)
    return (values[indices].to(wide) * weights.to(wide).unsqueeze(-1)).sum(1).to(values.dtype)  # (n, k, D) -> (n, D)


def group_by_row(indices):
    """Sort the P pairs by the row they read. indices (n, k), below 2^31 -> order (P,), rows (R,), starts (R + 1,), all int64.

    Pairs `order[starts[r] : starts[r + 1]]` (numbered along indices.flatten()) are those that read `rows[r]`. The sort is
    stable, so each row's pairs stay in the order of the bags: sums over them come out the same, bit for bit, every time.
    """
    if indices.device.type == "cpu":  # numpy sorts plain numbers far faster: those of slot and pair, side by side in one
        packed = (indices.flatten().long() << 32) + torch.arange(indices.numel())
        packed.numpy().sort()
        slots, order = packed >> 32, packed & (2**32 - 1)
    else:
        slots, order = indices.flatten().int().sort(stable=True)  # a radix sort passes over 4 bytes in half the time of 8
    rows, counts = torch.unique_consecutive(slots, return_counts=True)
    return order, rows.long(), F.pad(counts.cumsum(0), (1, 0))


# --- PyTorch ----------------------------------------------------------------------------------------------------------


def torch_forward(values, indices, weights):
    """As lookup_reference, without the (n, k, D) tensor where PyTorch can do without it."""
    if values.device.type == "cpu" and values.dtype in (torch.float32, torch.float64) and indices.numel() > 0:
        return F.embedding_bag(indices, values, per_sample_weights=weights.to(values.dtype), mode="sum")
    return lookup_reference(values, indices, weights)


def torch_backward(values, indices, weights, grad, gradient=None):
    """grad (n, D) -> rows (R,), gradient of those rows of values (R, D), gradient of weights (n, k).
    gradient: a table (S, D) to whose rows it adds instead; then what it returns second is that table."""
    (n, k), (order, rows, starts) = indices.shape, group_by_row(indices)
    wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
    # dV = W^T dY: bag r collects the gradients of the tokens that read row r. The same operator, roles swapped; and, unlike
    # index_add_ on a GPU, it adds in a fixed order.
    pair_weights = weights.flatten()[order].to(wide.dtype)  # (P,), grouped by row
    grad_rows = F.embedding_bag(order // k, wide, starts[:-1], per_sample_weights=pair_weights, mode="sum").to(values.dtype)
    if wide.device.type == "cpu" and wide.dtype == values.dtype and k <= len(values):
        # dW = dY V^T where W is not zero: W has k entries in each row, so its row offsets are multiples of k.
        # (sampled_addmm refuses more entries than its matrix has.)
        crow = torch.arange(0, n * k + 1, k)
        pattern = torch.sparse_csr_tensor(
            crow, indices.flatten().long(), wide.new_zeros(n * k), (n, len(values)), check_invariants=False
        )
        grad_weights = torch.sparse.sampled_addmm(pattern, wide, values.t(), beta=0.0).values().view(n, k)
    else:
        grad_weights = torch.einsum("nkd,nd->nk", values[indices].to(wide.dtype), wide)
    if gradient is not None:
        grad_rows = gradient.index_add_(0, rows, grad_rows)  # each row once
    return rows, grad_rows, grad_weights


def random16(rows, D, seed):
    """Sixteen random bits for each element of the rows: (R,) -> (R, D) int32, a hash of its place in the table and the seed.

    The multipliers and shifts are those of "lowbias32" (C. Wellons, Prospecting for Hash Functions, 2018)."""
    x = (rows.unsqueeze(1) * D + torch.arange(D, device=rows.device)).int() ^ seed  # int32 wraps around
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32), (16, 1)):
        x = (x ^ ((x >> shift) & (2 ** (32 - shift) - 1))) * factor  # >> keeps the sign: cut it off
    return x & 0xFFFF


def round_at_random(x, noise):
    """float32 -> bfloat16: up with a probability equal to the distance from the number below, so that the mean stays x."""
    rounded = ((x.view(torch.int32) + noise) >> 16).to(torch.int16).view(torch.bfloat16)
    return torch.where(x.isfinite(), rounded, x.bfloat16())


def torch_adam(values, means, squares, rows, grads, rate, beta1, beta2, eps, seed):
    """A step of RowAdam, in place; rate and eps hold the corrections of the bias. grads (R, D): of rows (R,), each once."""
    for row, g in zip(rows.split(2048), grads.split(2048), strict=True):  # in parts that stay in the cache
        g = g.float()
        mean = means.index_select(0, row).lerp_(g, 1 - beta1)
        square = squares.index_select(0, row).mul_(beta2).addcmul_(g, g, value=1 - beta2)
        means.index_copy_(0, row, mean)
        squares.index_copy_(0, row, square)
        value = values.index_select(0, row).float().addcdiv_(mean, square.sqrt_().add_(eps), value=-rate)
        if values.dtype == torch.bfloat16:
            value = round_at_random(value, random16(row, values.size(1), seed))
        values.index_copy_(0, row, value)


# --- Triton -----------------------------------------------------------------------------------------------------------
# Bytes that must move at width D with e bytes a value (slot numbers and weights, 12 bytes a pair, are small beside a row):
#   forward    P * D * e   rows read (no cache holds a large table)   +  n * D * e  written
#   backward   R * D * e   rows read once, each by its one owner      +  2 * R * D * e  their gradients, read and written
#              n * D * e   dY, read from memory once if L2 holds it
#   adam       R * D * e   the gradient  +  2 * R * D * e  values and  +  16 * R * D  moments (float32), read and written
# D and k are compile-time constants: the compiler then knows how rows are aligned, loads 16 bytes at once where it may, and
# divides by k with a multiplication.

PIECE = 128  # pairs of one row that one program walks at most: a very hot row is cut into pieces, or all would wait for it


@triton.jit
def forward_kernel(
    values, indices, weights, out, k: tl.constexpr, D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr
):
    """One program computes BLOCK_D columns of one bag, BLOCK_K rows in flight at a time."""
    bag = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)  # (BLOCK_D,)
    total = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    for start in range(0, k, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)  # (BLOCK_K,)
        # int64 before the multiplication: slot * D passes 2**31 at 2M slots of width 1024
        slot = tl.load(indices + bag * k + j, mask=j < k, other=0).to(tl.int64)
        weight = tl.load(weights + bag * k + j, mask=j < k, other=0.0).to(tl.float32)
        mask = (j < k)[:, None] & (column < D)[None, :]
        row = tl.load(values + slot[:, None] * D + column[None, :], mask=mask, other=0.0)  # (BLOCK_K, BLOCK_D)
        total += weight[:, None] * row.to(tl.float32)
    tl.store(out + bag * D + column, tl.sum(total, 0).to(out.dtype.element_ty), mask=column < D)


@triton.jit
def backward_kernel(
    values, weights, grad, order, rows, begins, ends, out, targets, grad_weights,
    k: tl.constexpr, D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program owns one touched row (or a piece of its pairs): it reads the row once and walks over the pairs that read it,
    BLOCK_P of them in flight at a time. out[targets[g]] += sum over the pairs of weight * dY; grad_weights[pair] = row . dY."""
    g = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)  # (BLOCK_D,), the whole row
    row = tl.load(rows + g)
    value = tl.load(values + row * D + column, mask=column < D, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    end = tl.load(ends + g)
    for start in range(tl.load(begins + g), end, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)  # (BLOCK_P,)
        pair = tl.load(order + p, mask=p < end, other=0).to(tl.int32)  # = bag * k + j
        weight = tl.load(weights + pair, mask=p < end, other=0.0).to(tl.float32)
        mask = (p < end)[:, None] & (column < D)[None, :]
        bag = (pair // k).to(tl.int64)
        dy = tl.load(grad + bag[:, None] * D + column[None, :], mask=mask, other=0.0).to(tl.float32)  # (BLOCK_P, BLOCK_D)
        total += weight[:, None] * dy
        tl.store(grad_weights + pair, tl.sum(value[None, :] * dy, 1), mask=p < end)
    target = out + tl.load(targets + g) * D + column
    before = tl.load(target, mask=column < D, other=0.0).to(tl.float32)
    tl.store(target, (before + tl.sum(total, 0)).to(out.dtype.element_ty), mask=column < D)


@triton.jit
def combine_kernel(partial, firsts, out, targets, D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    """One program adds up BLOCK_D columns of the pieces of one hot row: out[targets[h]] += sum of partial[firsts[h]: ...]."""
    h = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)  # (BLOCK_D,)
    total = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    end = tl.load(firsts + h + 1)
    for start in range(tl.load(firsts + h), end, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)  # (BLOCK_P,)
        mask = (p < end)[:, None] & (column < D)[None, :]
        total += tl.load(partial + p[:, None] * D + column[None, :], mask=mask, other=0.0)
    target = out + tl.load(targets + h) * D + column
    before = tl.load(target, mask=column < D, other=0.0).to(tl.float32)
    tl.store(target, (before + tl.sum(total, 0)).to(out.dtype.element_ty), mask=column < D)


@triton.jit
def random16_kernel(place, seed):
    """As random16: (BLOCK_D,) places in the table -> (BLOCK_D,) int32."""
    x = place.to(tl.uint32) ^ seed
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return ((x ^ (x >> 16)) & 0xFFFF).to(tl.int32)


@triton.jit(do_not_specialize=["seed"])
def adam_kernel(
    values, means, squares, rows, grads, rate, beta1, beta2, eps, seed,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program owns one touched row, and moves its moments and its value."""
    r = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    inside = column < D
    place = tl.load(rows + r) * D + column  # in the table
    g = tl.load(grads + r * D + column, mask=inside, other=0.0).to(tl.float32)
    mean = beta1 * tl.load(means + place, mask=inside, other=0.0) + (1 - beta1) * g
    square = beta2 * tl.load(squares + place, mask=inside, other=0.0) + (1 - beta2) * g * g
    value = tl.load(values + place, mask=inside, other=0.0).to(tl.float32)
    value -= rate * mean / (tl.sqrt(square) + eps)
    tl.store(means + place, mean, mask=inside)
    tl.store(squares + place, square, mask=inside)
    if values.dtype.element_ty == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True) + random16_kernel(place, seed)
        rounded = (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
        finite = tl.abs(value) < float("inf")  # False of NaN, too
        tl.store(values + place, tl.where(finite, rounded, value.to(tl.bfloat16)), mask=inside)
    else:
        tl.store(values + place, value, mask=inside)


def forward_tile(D):
    """(BLOCK_K, BLOCK_D, warps) of the forward kernel at width D."""
    block_d = min(triton.next_power_of_2(D), 1024)
    return max(4, 1024 // block_d), block_d, 4


def backward_tile(D):
    """(BLOCK_P, BLOCK_D, warps) of the backward kernel at width D: a whole row, and 4 of dY unless they are very wide."""
    block_d = triton.next_power_of_2(D)
    block_p = max(1, min(4, 4096 // block_d))
    return block_p, block_d, min(32, max(1, block_p * block_d // 1024))


def adam_warps(D):
    return min(32, max(1, triton.next_power_of_2(D) // 256))  # 8 columns a thread


def triton_forward(values, indices, weights):
    """As lookup_reference. All tensors contiguous."""
    (n, k), D = indices.shape, values.size(1)
    out, (block_k, block_d, warps) = values.new_empty(n, D), forward_tile(D)
    forward_kernel[(n, triton.cdiv(D, block_d))](values, indices, weights, out, k, D, block_k, block_d, num_warps=warps)
    return out


def triton_backward(values, indices, weights, grad, gradient=None):
    """As torch_backward. All tensors contiguous."""
    k, D = indices.size(1), values.size(1)
    order, rows, starts = group_by_row(indices)
    out, targets = gradient, rows
    if gradient is None:
        out, targets = values.new_zeros(len(rows), D), torch.arange(len(rows), device=rows.device)
    grad_weights, (block_p, block_d, warps) = torch.empty_like(weights, dtype=torch.float32), backward_tile(D)

    def run(rows, begins, ends, out, targets):
        tensors = (values, weights, grad, order, rows, begins, ends, out, targets, grad_weights)
        backward_kernel[(len(rows),)](*tensors, k, D, block_p, block_d, num_warps=warps)

    begins, ends = starts[:-1], starts[1:]
    pieces = (ends - begins + PIECE - 1) // PIECE  # (R,)
    run(rows, begins, torch.where(pieces > 1, begins, ends), out, targets)  # of a hot row, no pairs yet
    hot = (pieces > 1).nonzero().flatten()  # numbers of rows
    if len(hot) > 0:
        firsts = F.pad(pieces[hot].cumsum(0), (1, 0))  # piece firsts[h] is the first of row hot[h]
        owner = torch.repeat_interleave(pieces[hot])  # (G,) which of the hot rows a piece is of
        row = hot[owner]
        each = torch.arange(len(row), device=row.device)
        begin = begins[row] + (each - firsts[owner]) * PIECE
        partial = torch.zeros(len(row), D, device=values.device)  # float32, of at most P / PIECE * 2 pieces
        run(rows[row], begin, torch.minimum(begin + PIECE, ends[row]), partial, each)
        block_d = min(256, triton.next_power_of_2(D))
        combine_kernel[(len(hot), triton.cdiv(D, block_d))](partial, firsts, out, targets[hot], D, 16, block_d, num_warps=4)
    return rows, out, grad_weights


def triton_adam(values, means, squares, rows, grads, rate, beta1, beta2, eps, seed):
    """As torch_adam. All tensors contiguous."""
    D, block_d = values.size(1), triton.next_power_of_2(values.size(1))
    tensors = (values, means, squares, rows, grads)
    adam_kernel[(len(rows),)](*tensors, rate, beta1, beta2, eps, seed, D, block_d, num_warps=adam_warps(D))


# --- Triton: choosing the slots (memory.py says how and why) ----------------------------------------------------------
# One program does for one head of one token what memory.product_topk does: two top-k, the candidates, their top-k. A score and its
# column travel in one integer, the score's bits above the column's: then sorting one sorts both, and is exact.


@triton.jit
def pack(score, column):
    """An integer that orders as the scores do (equal scores: by column): of bfloat16 in 32 bits, of float32 in 64."""
    if score.dtype == tl.bfloat16:
        bits = score.to(tl.int16, bitcast=True).to(tl.int32)
        packed = ((bits ^ ((bits >> 15) & 0x7FFF)) << 16) | column  # negative floats count down: now they count up
    else:
        bits = score.to(tl.float32).to(tl.int32, bitcast=True)
        packed = ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) << 32) | column
    return packed


@triton.jit
def unpack(packed):
    """-> score float32, column int32"""
    if packed.dtype == tl.int32:
        bits = packed >> 16
        bits, column = (bits ^ ((bits >> 15) & 0x7FFF)) << 16, packed & 0xFFFF
    else:
        bits = (packed >> 32).to(tl.int32)
        bits, column = bits ^ ((bits >> 31) & 0x7FFFFFFF), packed.to(tl.int32)
    return bits.to(tl.float32, bitcast=True), column


@triton.jit
def best_of_row(row, N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr):
    """The BLOCK_K largest of N finite scores, largest first -> scores, columns (BLOCK_K,) each.

    The K largest lie in those K groups of neighbours that have the largest maxima: sort the maxima, then what is in the groups."""
    member = tl.arange(0, GROUP)[None, :]
    column = tl.arange(0, BLOCK_N // GROUP)[:, None] * GROUP + member  # (BLOCK_N / GROUP, GROUP)
    packed = pack(tl.load(row + column, mask=column < N, other=float("-inf")), column)
    _, best = unpack(tl.topk(tl.max(packed, 1), BLOCK_K))  # columns of maxima
    column = (best // GROUP * GROUP)[:, None] + member  # (BLOCK_K, GROUP)
    packed = pack(tl.load(row + column, mask=column < N, other=float("-inf")), column)
    return unpack(tl.topk(tl.reshape(packed, [BLOCK_K * GROUP]), BLOCK_K))


@triton.jit
def select_kernel(
    scores, pairs, slots, n, N: tl.constexpr, H: tl.constexpr, K: tl.constexpr, P: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    t, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    score1, column1 = best_of_row(scores + (h * n + t) * N, N, BLOCK_N, BLOCK_K, GROUP)
    score2, column2 = best_of_row(scores + ((H + h) * n + t) * N, N, BLOCK_N, BLOCK_K, GROUP)
    c = tl.arange(0, BLOCK_P)  # candidates
    a, b = tl.load(pairs + c, mask=c < P, other=0).to(tl.int32), tl.load(pairs + P + c, mask=c < P, other=0).to(tl.int32)
    total = tl.where(c < P, tl.gather(score1, a, 0) + tl.gather(score2, b, 0), float("-inf"))  # (BLOCK_P,)
    _, c = unpack(tl.topk(pack(total, c), BLOCK_K))  # (BLOCK_K,)
    rank = tl.arange(0, BLOCK_K)
    a, b = tl.load(pairs + c, mask=rank < K, other=0).to(tl.int32), tl.load(pairs + P + c, mask=rank < K, other=0).to(tl.int32)
    slot = tl.gather(column1, a, 0).to(tl.int64) * N + tl.gather(column2, b, 0)
    tl.store(slots + (h * n + t) * K + rank, slot, mask=rank < K)


def select_tile(N, K):
    """(BLOCK_N, BLOCK_K, GROUP, warps) of the select kernel: groups of about the square root of N / K, 32 numbers a thread."""
    block_n, block_k = max(2, triton.next_power_of_2(N)), max(2, triton.next_power_of_2(K))
    return block_n, block_k, 2 ** ((block_n // block_k).bit_length() // 2), min(16, max(1, block_n // 1024))


def triton_select(scores, pairs, K):
    """As memory.select: scores (2H, n, N), float32 or narrower -> slots (H, n, K) int64."""
    (H, n, N), P = (scores.size(0) // 2, *scores.shape[1:]), pairs.size(1)
    slots = torch.empty(H, n, K, dtype=torch.int64, device=scores.device)
    block_n, block_k, group, warps = select_tile(N, K)
    block_p = max(block_k, triton.next_power_of_2(P))
    tensors = (scores.contiguous(), pairs.contiguous(), slots)
    with torch.cuda.device_of(scores):  # Triton launches on the current device
        select_kernel[(n, H)](*tensors, n, N, H, K, P, block_n, block_k, block_p, group, num_warps=warps)
    return slots


# --- what the model calls ---------------------------------------------------------------------------------------------
DEBUG = os.environ.get("NANOMEM_DEBUG", "0") != "0"  # check slot numbers on a GPU, too, for which the CPU has to wait for it


def uses_triton(values):
    return values.is_cuda and hasattr(triton, "cdiv")  # a GPU, and a system that Triton exists for


@torch.library.custom_op("nanomem::lookup_forward", mutates_args=())  # torch.compile calls it as it is
def lookup_forward(values: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    if indices.numel() == 0:
        return values.new_zeros(len(indices), values.size(1))
    if DEBUG or not values.is_cuda:
        low, high = (bound.item() for bound in indices.aminmax())
        if low < 0 or high >= len(values):
            raise ValueError(f"lookup of slots {low} to {high}: the table has slots 0 to {len(values) - 1}")
    run = triton_forward if uses_triton(values) else torch_forward
    with torch.cuda.device_of(values):  # Triton launches on the current device
        return run(values.contiguous(), indices.contiguous(), weights.contiguous())


def lookup_backward(values, indices, weights, grad, gradient=None):
    """As torch_backward."""
    if indices.numel() == 0:
        empty = values.new_zeros(0, values.size(1)) if gradient is None else gradient
        return indices.new_zeros(0, dtype=torch.int64), empty, weights.new_zeros(indices.shape)
    run = triton_backward if uses_triton(values) else torch_backward
    with torch.cuda.device_of(values):
        return run(values.contiguous(), indices.contiguous(), weights.contiguous(), grad.contiguous(), gradient)


@torch.library.custom_op("nanomem::lookup_backward_into", mutates_args=("gradient", "touched"))
def lookup_backward_into(
    values: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, grad: torch.Tensor,
    gradient: torch.Tensor, touched: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    rows, _, grad_weights = lookup_backward(values, indices, weights, grad, gradient)
    touched.index_fill_(0, rows, 1)
    return grad_weights.to(weights.dtype)


@lookup_forward.register_fake
def _(values, indices, weights):
    return values.new_empty(len(indices), values.size(1))


@lookup_backward_into.register_fake
def _(values, indices, weights, grad, gradient, touched):
    return torch.empty_like(weights)


class Lookup(torch.autograd.Function):
    """Ties forward and backward together. The gradient of the rows that were read: a sparse tensor, or added to `into`."""

    @staticmethod
    def forward(ctx, values, indices, weights, into):
        ctx.save_for_backward(values, indices, weights)
        ctx.into = into
        return lookup_forward(values, indices, weights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        if ctx.into is not None:
            return None, None, lookup_backward_into(*ctx.saved_tensors, grad, *ctx.into), None
        values, indices, weights = ctx.saved_tensors
        rows, grad_rows, grad_weights = lookup_backward(values, indices, weights, grad)
        grad_values = torch.sparse_coo_tensor(
            rows.unsqueeze(0), grad_rows, values.shape, is_coalesced=True, check_invariants=False
        )
        return grad_values, None, grad_weights.to(weights.dtype), None


def lookup(values, indices, weights, into=None):
    """Weighted sum of table rows: out[i] = sum over j of weights[i, j] * values[indices[i, j]].

    values   (S, D) float32, bfloat16 or float16 (on a CPU also float64)
    indices  (n, k) int32 or int64, each in [0, S): on a GPU that is checked only with NANOMEM_DEBUG=1 in the environment
    weights  (n, k) floating point, best float32
    into     None, or where the gradient of values goes: tensors (S, D) of values' dtype and (S,) of uint8
    returns  (n, D) of values' dtype, summed in float32 or wider

    Differentiable in values and weights. The gradient of values is a coalesced torch.sparse_coo tensor over the rows that
    `indices` touches, so its size does not depend on S. (Autograd forgets that it is coalesced when it puts it into .grad.)
    Many lookups in one table had better share an `into`: the backward pass of each adds to the rows of its first tensor and sets
    them to 1 in its second, and autograd sees no gradient of values. torch.compile then takes lookup() without a break.
    The same inputs give the same bits every time. Raises ValueError for shapes, dtypes, devices or sizes that do not fit.
    """
    if values.ndim != 2 or indices.ndim != 2 or indices.shape != weights.shape:
        shapes = f"{tuple(values.shape)}, {tuple(indices.shape)}, {tuple(weights.shape)}"
        raise ValueError(f"lookup wants values (S, D), indices (n, k) and weights (n, k), not {shapes}")
    if indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"lookup wants int32 or int64 indices, not {indices.dtype}")
    if not (values.is_floating_point() and weights.is_floating_point()):
        raise ValueError(f"lookup wants floating-point values and weights, not {values.dtype} and {weights.dtype}")
    if values.is_cuda and values.dtype == torch.float64:
        raise ValueError("lookup sums in float32 on a GPU: float64 values are for the CPU")
    if not values.device == indices.device == weights.device:
        devices = f"{values.device}, {indices.device}, {weights.device}"
        raise ValueError(f"lookup wants values, indices and weights on one device, not on {devices}")
    if max(len(values), indices.numel()) >= 2**31:
        raise ValueError(f"lookup counts in 32 bits: {len(values):,} slots, or {indices.numel():,} pairs, are too many")
    return (sparse_lookup if into is None else Lookup.apply)(values, indices, weights, into)


@torch.compiler.disable  # it cannot trace sparse gradients, nor their sum
def sparse_lookup(values, indices, weights, into):
    return Lookup.apply(values, indices, weights, into)


class RowAdam(torch.optim.Optimizer):
    """Adam for a table of which each step reads a few rows. Only those are touched, so a step costs what they cost.

    For a row that has a gradient g at step t (arXiv:1412.6980, algorithm 1):

        m = beta1 m + (1 - beta1) g
        v = beta2 v + (1 - beta2) g^2
        value = value - lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)

    The moments of the others stand still ("lazy" Adam, as in torch.optim.SparseAdam; other choices are compared in the README).
    params: tables (S, D), float32 or bfloat16, with sparse gradients. State: m and v in float32.
    eps is there against 0 / 0 and no more: where a loss is the mean over 491,520 tokens a row's gradient is 1e-9.
    Into bfloat16 tables updates are rounded at random (seeded), or most of them would be lost: a number of 8 bits moves by 0.4%
    or not at all. The same inputs give the same bits."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.98), eps=1e-15, seed=0):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, seed=seed))
        for p in (p for group in self.param_groups for p in group["params"]):
            if p.ndim != 2 or p.dtype not in (torch.float32, torch.bfloat16):
                raise ValueError(f"RowAdam is for tables (S, D) of float32 or bfloat16, not {tuple(p.shape)} of {p.dtype}")

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not p.grad.is_sparse:
                    raise ValueError("RowAdam wants sparse gradients: those of lookup(), or of an embedding with sparse=True")
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    state["means"], state["squares"] = (torch.zeros_like(p, dtype=torch.float32) for _ in range(2))
                state["step"] = t = state["step"] + 1
                seed = (group["seed"] + 0x9E3779B9 * t) % 2**31  # other noise at each step
                grad = p.grad.coalesce()  # a sum over equal rows, where there are any
                tensors = (p, state["means"], state["squares"], grad.indices()[0], grad.values().contiguous())
                (beta1, beta2), correction = group["betas"], (1 - group["betas"][1] ** t) ** 0.5
                rate, eps = group["lr"] * correction / (1 - beta1**t), group["eps"] * correction
                with torch.cuda.device_of(p):
                    if len(tensors[-1]) > 0:
                        (triton_adam if uses_triton(p) else torch_adam)(*tensors, rate, beta1, beta2, eps, seed)

    def load_state_dict(self, state_dict):
        if any(set(state) != {"step", "means", "squares"} for state in state_dict["state"].values()):
            raise ValueError("this is the state of another optimiser than RowAdam")
        super().load_state_dict(state_dict)  # which casts what it loads to the dtype of the values: take it as it was
        params = [p for group in self.param_groups for p in group["params"]]
        for i, state in state_dict["state"].items():
            self.state[params[i]] = {k: v.to(params[i].device) if torch.is_tensor(v) else v for k, v in state.items()}


# --- python kernels.py ------------------------------------------------------------------------------------------------


def random_problem(n, k, S, D, dtype, device, slots="uniform", seed=0):
    """values, indices, weights, and a gradient (n, D) that arrives from above.

    slots: which are read. "uniform"; "zipf": the r-th most read slot has a share of 1 / r; "equal": all pairs read one."""
    generator = torch.Generator(device).manual_seed(seed)
    values = torch.randn(S, D, generator=generator, device=device).to(dtype)
    u = torch.rand(n, k, generator=generator, device=device, dtype=torch.float64)
    rank = {"uniform": u * S, "zipf": S**u - 1, "equal": 0 * u}[slots].long()
    indices = rank * 0x9E3779B1 % S  # an odd factor: where S is a power of two, the much read slots are strewn over the table
    weights = torch.randn(n, k, generator=generator, device=device).softmax(-1)
    return values, indices, weights, torch.randn(n, D, generator=generator, device=device).to(dtype)


def brute_force(values, indices, weights, grad):
    """The matrix form of the first page, in float64 and with all of W: y, dV, dweights. For small problems."""
    values, indices, weights, grad = (t.cpu() for t in (values, indices, weights, grad))
    values, weights, grad = values.double(), weights.double(), grad.double()
    W = weights.new_zeros(len(indices), len(values))  # (n, S)
    W.scatter_add_(1, indices.long(), weights)
    return W @ values, W.T @ grad, (grad @ values.T).gather(1, indices.long())


def brute_force_adam(values, rows, grads, rate, beta1, beta2, eps):
    """A step of RowAdam with zero moments before it, in float64, over the whole table."""
    grad = torch.zeros_like(values, dtype=torch.float64).index_add_(0, rows, grads.double())
    return values.double() - rate * (1 - beta1) * grad / (((1 - beta2) * grad.square()).sqrt() + eps)


def check(forward, backward, adam, device, widths=(1, 24, 64, 80, 96, 200, 768, 1024)):
    """Print the errors of forward, backward and adam against float64 at awkward shapes. Returns whether all are small, and
    whether a second run gives the same bits."""
    passed = True
    columns = ("y", "dvalues", "dweights", "adam")
    print(f"{'width':>6} {'dtype':9}" + "".join(f"{name:>10}" for name in columns) + "   relative error against float64")
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        for D in widths:
            values, indices, weights, grad = random_problem(37, 13, 101, D, dtype, device)
            indices[0], indices[1, :5] = 7, 50  # slots that come more than once in a bag
            indices[20:] = 3  # 221 pairs of one row: more than a piece
            first, second = (backward(values, indices, weights, grad) for _ in range(2))
            rows, grad_rows, grad_weights = first
            dvalues = torch.zeros_like(values).index_copy(0, rows, grad_rows)
            moved, rates = values.float().clone(), (0.1, 0.9, 0.98, 1e-15)
            adam(moved, torch.zeros_like(moved), torch.zeros_like(moved), rows, grad_rows, *rates, 0)
            got = [forward(values, indices, weights), dvalues, grad_weights, moved - values.float()]
            want = [*brute_force(values, indices, weights, grad), None]
            want[3] = brute_force_adam(values, rows, grad_rows, *rates).cpu() - values.cpu().double()
            errors = [((a.cpu().double() - b).norm() / b.norm()).item() for a, b in zip(got, want, strict=True)]
            same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
            passed &= max(errors) < tolerance and same
            verdict = "ok" if max(errors) < tolerance else f"FAILED: more than {tolerance:g}"
            verdict += "" if same else ", FAILED: a second run differs"
            print(f"{D:6} {str(dtype)[6:]:9}" + "".join(f"{error:10.1e}" for error in errors) + f"   {verdict}")
    return passed


def check_select(device):
    """The same for triton_select: the sums that its slots have, against a top-k over all N * N sums in float64."""
    passed = True
    for n, H, N, K in ((5, 2, 24, 5), (3, 4, 128, 16), (2, 1, 500, 32)):
        for dtype in (torch.float32, torch.bfloat16):
            scores = torch.randn(2 * H, n, N, generator=torch.Generator(device).manual_seed(0), device=device).to(dtype)
            pairs = torch.tensor([(a, b) for a in range(K) for b in range(K // (a + 1))], device=device).T
            slots = triton_select(scores, pairs, K)
            s1, s2 = scores.double().chunk(2)
            got = s1.gather(-1, slots // N) + s2.gather(-1, slots % N)  # (H, n, K)
            want = (s1.unsqueeze(-1) + s2.unsqueeze(-2)).flatten(-2).topk(K).values
            repeated = sum(len(set(row)) < K for row in slots.flatten(0, 1).tolist())
            error = ((got - want).norm() / want.norm()).item()
            passed &= error < 1e-6 and not repeated
            verdict = "ok" if error < 1e-6 and not repeated else f"FAILED: more than 1e-06, or {repeated} rows with a slot twice"
            print(f"select {K:2} of {N:4} {str(dtype)[6:]:9}{error:9.1e}   {verdict}")
    return passed


def timed(run, device):
    """Seconds that run() takes, with what it leaves to the GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def seconds(run, device, repeats=9):
    """Median time of run(), after a warm-up."""
    return sorted([timed(run, device) for _ in range(repeats + 2)][2:])[repeats // 2]


def embedding_bag(values, indices, weights, sparse=False):
    """PyTorch's own operator for this. Its gradient has the table's size, or is sparse and not yet summed over the pairs."""
    return F.embedding_bag(indices, values, per_sample_weights=weights.to(values.dtype), mode="sum", sparse=sparse)


def embedding_bag_sparse(values, indices, weights):
    return embedding_bag(values, indices, weights, sparse=True)


def measure(n, k, S, D, dtype, device, slots, copy):
    """One row of the benchmark's table. copy: bytes a second that a plain copy moves."""
    values, indices, weights, grad = random_problem(n, k, S, D, dtype, device, slots)
    values.requires_grad_()
    weights.requires_grad_()
    optimizer, into = RowAdam([values]), (torch.zeros_like(values), torch.zeros(S, dtype=torch.uint8, device=device))

    def train(run):  # forward and backward
        values.grad = weights.grad = None
        run(values, indices, weights).backward(grad)

    def times(run):  # of forward alone, of both
        with torch.no_grad():
            alone = seconds(lambda: run(values, indices, weights), device)
        return alone, seconds(lambda: train(run), device)

    train(lookup)
    R, e = values.grad._nnz(), values.element_size()
    with torch.no_grad():  # bytes as counted above the kernels, and the time in which they move
        parts = [
            ((n * k * D + n * D) * e, seconds(lambda: lookup_forward(values, indices, weights), device)),
            ((3 * R * D + n * D) * e, seconds(lambda: lookup_backward_into(values, indices, weights, grad, *into), device)),
            ((3 * e + 16) * R * D, seconds(optimizer.step, device)),
        ]
        sort = seconds(lambda: group_by_row(indices), device)
    del optimizer  # and its moments
    line = f"{slots:8}{S:10,}{D:5}{R / S:5.0%} |"
    line += "".join(f"{moved / t / 1e9:9,.1f}{moved / t / copy:5.0%}" for moved, t in parts) + f"{sort / parts[1][1]:6.0%} |"

    def own(values, indices, weights):  # as the model does
        return lookup(values, indices, weights, into)

    ours = times(own)
    for run in (lookup_reference, embedding_bag, embedding_bag_sparse):
        try:
            cell = " / ".join(f"{theirs / mine:.1f}" for theirs, mine in zip(times(run), ours, strict=True))
        except torch.OutOfMemoryError:
            cell = "does not fit"
        line += f"{cell:>15}"
    if device.type == "cuda":
        values.grad = weights.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        train(own)
        line += f"{(torch.cuda.max_memory_allocated() - before) / (R * D * e):8.2f}"
    print(line, flush=True)


def copy_speed(elements, dtype, device):
    """Bytes a second that a plain copy reads and writes: what no lookup can beat, unless a cache helps it."""
    source = torch.empty(elements, dtype=dtype, device=device).normal_()
    target = torch.empty_like(source)
    return 2 * elements * source.element_size() / seconds(lambda: target.copy_(source), device)


def benchmark(device):
    """Set the bytes that each part must move against what a plain copy moves in the same time, and the times of PyTorch's ways
    to do the same against those of lookup()."""
    if device.type == "cuda":
        n, k, S, D, dtype, elements = 16384, 128, 2**20, 1024, torch.bfloat16, 2**29
        others = [("zipf", s, D) for s in (2**16, 2**18, 2**22)] + [("zipf", S, d) for d in (256, 512, 2048)]
    else:
        n, k, S, D, dtype, elements = 1024, 64, 2**16, 64, torch.float32, 2**25
        others = [("zipf", s, D) for s in (2**14, 2**18, 2**20)] + [("zipf", S, 256)]
    copy = copy_speed(elements, dtype, device)
    print(f"\n{n:,} tokens read {k} slots each, {str(dtype)[6:]}; a copy moves {copy / 1e9:,.0f} GB/s.")
    print(f"\n{'':28} |{'GB/s and share of that copy':^48} | times as long as lookup: forward alone / with backward")
    print(f"{'slots':8}{'S':>10}{'D':>5}  R/S |{'forward':>14}{'backward':>14}{'RowAdam':>14}  sort |", end="")
    print(f"{'definition':>15}{'embedding_bag':>15}{'its sparse':>15}" + (f"{'memory':>8}" if device.type == "cuda" else ""))
    for slots, S, D in [(slots, S, D) for slots in ("uniform", "zipf", "equal")] + others:
        try:
            measure(n, k, S, D, dtype, device, slots, copy)
        except torch.OutOfMemoryError:
            print(f"{slots:8}{S:10,}{D:5}      | does not fit on this device", flush=True)
    print("\nR/S: share of the slots that are read. sort: its share of backward. its sparse: embedding_bag(sparse=True).")
    if device.type == "cuda":
        print("memory: peak of what lookup allocates forward and backward, in sizes of the rows that are read.")


def main():
    parser = argparse.ArgumentParser(
        description="Check the lookup against float64, then time it. Without a GPU the Triton kernels are checked in Triton's "
        "interpreter, and the PyTorch path is timed."
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    try:
        device = torch.device(parser.parse_args().device)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        sys.exit(f"kernels.py: this --device cannot be used here ({str(error).splitlines()[0]}); try --device=cpu")
    cuda, interpreted = device.type == "cuda", os.environ.get("TRITON_INTERPRET") == "1"
    if cuda or not interpreted:
        print(f"PyTorch {torch.__version__} on {torch.cuda.get_device_name(device) if cuda else device}")
        passed = check(torch_forward, torch_backward, torch_adam, device)
    else:
        passed = True
    if not hasattr(triton, "cdiv"):
        print("\nTriton: not installed, and not there for every system; its kernels are not checked")
    elif cuda or interpreted:
        print(f"\nTriton {triton.__version__}" + ("" if cuda else ", interpreted on the CPU"), flush=True)
        widths = {} if cuda else {"widths": (1, 24, 96)}  # the interpreter takes its time; the tests have the other widths
        passed &= check(triton_forward, triton_backward, triton_adam, device, **widths)
        passed &= check_select(device)
    else:  # the interpreter has to be asked for before Triton is imported: in another process
        sys.stdout.flush()
        passed &= subprocess.run([sys.executable, __file__], env=os.environ | {"TRITON_INTERPRET": "1"}).returncode == 0
    if not interpreted:
        benchmark(device)
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
