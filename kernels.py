"""The lookup: y[i] = sum over j of weights[i, j] * values[indices[i, j]].

This is all that a memory layer does with its memory (Memory Layers at Scale, arXiv:2412.09764, section 3): every
token reads `k` rows of a table of `S` rows and adds them up, each with its own weight. In matrix form y = W V, where
W (n x S) holds k weights a row and zeros elsewhere. Its two gradients are then

    dV = W^T dY        row s of V collects the dY of every token that read it: a lookup with the roles swapped
    dW = dY V^T        wanted only where W is not zero: dweights[i, j] = dY[i] . values[indices[i, j]]

Read in this order: `lookup_reference` (the definition), `torch_forward` and `torch_backward` (the same, fast on a CPU),
the Triton kernels (the same on a GPU), `lookup` (what the model calls), `RowAdam` (the optimiser of the rows that were read).
The kernels that choose the slots belong to memory.py. `python kernels.py` checks and times all of it (bench/lookup.py).

Letters: n bags (tokens), k slots read a bag (heads times top-k), S slots in the table, D width of a value,
R distinct rows touched, P = n * k pairs of bag and slot.
"""

import os
import subprocess
import sys
import types
import warnings
from pathlib import Path

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
    return grad_weights.to(weights.dtype).contiguous()  # as its fake says


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
    run = Lookup.apply
    if into is None and torch.is_grad_enabled():
        run = torch.compiler.disable(run)  # torch.compile cannot trace sparse gradients, nor their sum
    return run(values, indices, weights, into)


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


if __name__ == "__main__":  # check all of it against float64, then time it
    sys.exit(subprocess.call([sys.executable, Path(__file__).resolve().parent / "bench" / "lookup.py", *sys.argv[1:]]))
