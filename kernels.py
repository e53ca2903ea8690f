"""The lookup: y[i] = sum over j of weights[i, j] * values[indices[i, j]].

This is all that a memory layer does with its memory (Memory Layers at Scale,
arXiv:2412.09764, section 3): every token reads k rows of a table of S rows and
adds them up, each with its own weight. In matrix form y = W V, where W (n x S)
holds k weights in each row and zeros elsewhere. Its two gradients are then

    dV = W^T dY    row s of V collects the dY of every token that read it:
                   a lookup with the roles of tokens and rows swapped
    dW = dY V^T    needed only where W is not zero:
                   dweights[i, j] = dY[i] . values[indices[i, j]]

This file has the definition, its versions in PyTorch (for a CPU) and Triton (for a
GPU), the lookup with its gradient, the selection of slots (memory.py explains it),
and `RowAdam`, the optimiser of the table. The lookup has two forms. `lookup` stands
alone and returns the gradient of the table as a sparse tensor. Memory layers use
`collecting_lookup`, which adds the gradient to a tensor that several layers share.
`python bench/kernels.py` checks all of this against float64 and times it.

Letters: n tokens, k slots that a token reads (heads times top-k), S slots in the
table, D width of a value, R distinct rows read, P = n * k pairs of token and slot.
"""

import os
import types
import warnings

import numpy as np
import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:  # macOS and Windows have no Triton; the PyTorch path works without
    HAS_TRITON = False

    def jit(function):
        return function

    triton = types.SimpleNamespace(jit=jit)
    tl = types.SimpleNamespace(constexpr=None)

# PyTorch warns once per process that compressed sparse rows are in beta.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")

# Check slots on a GPU, too. The CPU then waits for the GPU.
DEBUG = os.environ.get("NANOMEM_DEBUG", "0") != "0"


def definition(values, indices, weights):
    """The formula. values (S, D), indices (n, k), weights (n, k) -> (n, D)"""
    rows = widen(values[indices])  # (n, k, D)
    y = (weights.unsqueeze(-1) * rows).sum(1)  # (n, D)
    return y.to(values.dtype)


def widen(x):
    """Cast bfloat16 to float32, for sums, norms and softmax. Wider numbers keep their dtype."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# --- PyTorch ------------------------------------------------------------------------


def torch_forward(values, indices, weights):
    """Same as definition(). On a CPU it needs no (n, k, D) tensor."""
    if values.device.type == "cpu" and values.dtype in (torch.float32, torch.float64):
        weights = weights.to(values.dtype)
        return F.embedding_bag(indices, values, per_sample_weights=weights, mode="sum")
    return definition(values, indices, weights)


def torch_backward(values, indices, weights, grad):
    """grad = dY (n, D) -> rows that were read (R,), their gradient (R, D), and the gradient
    of the weights (n, k)."""
    order, rows, starts = group_by_row(indices)
    dy = widen(grad)
    tokens = order // indices.size(1)  # (P,)
    w = weights.flatten().index_select(0, order).to(dy.dtype)
    # dV = W^T dY: row r sums the dY of the tokens that read it, in a fixed order
    grad_rows = F.embedding_bag(tokens, dy, starts[:-1], per_sample_weights=w, mode="sum")
    return rows, grad_rows.to(values.dtype), torch_products(values, indices, grad)


def torch_products(values, indices, x):
    """dW = dY V^T where W is not zero: values[indices[i, j]] . x[i]. x (n, D) -> (n, k)"""
    n, k = indices.shape
    x = widen(x.to(torch.promote_types(values.dtype, x.dtype)))
    if x.device.type == "cpu" and x.dtype == values.dtype and k <= len(values):
        # Compute the product only at the entries of sparse W: a tenth of the time.
        ends = torch.arange(n + 1) * k
        slots = indices.flatten().long()
        zeros = x.new_zeros(n * k)
        shape = (n, len(values))
        pattern = torch.sparse_csr_tensor(ends, slots, zeros, shape, check_invariants=False)
        products = torch.sparse.sampled_addmm(pattern, x, values.t(), beta=0.0)
        return products.values().view(n, k)
    return (values[indices].to(x.dtype) * x.unsqueeze(1)).sum(-1)


def group_by_row(indices):
    """Sort the P pairs by the row they read. indices (n, k) -> order (P,), rows (R,),
    starts (R + 1,), int64. Pairs order[starts[r] : starts[r + 1]] read rows[r], in the
    order of the tokens, so that sums are the same every time."""
    slots, order = indices.flatten().int().sort(stable=True)  # int32 sorts faster
    rows, counts = torch.unique_consecutive(slots, return_counts=True)
    starts = F.pad(counts.cumsum(0), (1, 0))
    return order, rows.long(), starts


# --- Triton -------------------------------------------------------------------------
# Bytes that must move at width D with e bytes per number (not counting the 12 bytes of
# slot number and weight per pair, which are few):
#   forward    P * D * e       rows read; no cache holds a large table
#              n * D * e       y written
#   backward   R * D * e       rows read once, each by its one owner
#              n * D * e       dY read, if the L2 cache holds it
#              2 * R * D * e   their gradients, read and written
# D and k are compile-time constants, so the compiler knows how rows are aligned and
# loads 16 bytes at once.

PIECE = 128  # a program handles at most this many pairs of a row


@triton.jit
def forward_kernel(
    values,
    indices,
    weights,
    out,
    k: tl.constexpr,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program computes BLOCK_D columns of one token, with BLOCK_K rows in flight at a time."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)  # (BLOCK_D,)
    total = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    for start in range(0, k, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)  # (BLOCK_K,)
        slot = tl.load(indices + token * k + j, mask=j < k, other=0)
        weight = tl.load(weights + token * k + j, mask=j < k, other=0.0).to(tl.float32)
        # int64 before the multiplication: slot * D passes 2**31 at 2M slots of width 1024
        place = slot.to(tl.int64)[:, None] * D + column[None, :]  # (BLOCK_K, BLOCK_D)
        used = (j < k) & (weight != 0)  # rows with weight 0 are not read
        mask = used[:, None] & (column < D)[None, :]
        row = tl.load(values + place, mask=mask, other=0.0)
        total += weight[:, None] * row.to(tl.float32)
    y = tl.sum(total, 0).to(out.dtype.element_ty)  # (BLOCK_D,)
    tl.store(out + token * D + column, y, mask=column < D)


@triton.jit
def backward_kernel(
    values,
    rows,
    begins,
    ends,
    order,
    weights,
    grad,
    grad_weights,
    out,
    targets,
    k: tl.constexpr,
    D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program owns one row r. It loads the row once and walks over the pairs that read
    it, order[begins[r] : ends[r]], BLOCK_P at a time:
    out[targets[r]] += sum over them of weight * dY; grad_weights[pair] = row . dY."""
    r = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)  # (BLOCK_D,), the whole row
    row = tl.load(rows + r)
    value = tl.load(values + row * D + column, mask=column < D, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    start = tl.load(begins + r)
    end = tl.load(ends + r)
    while start < end:
        p = start + tl.arange(0, BLOCK_P)  # (BLOCK_P,)
        pair = tl.load(order + p, mask=p < end, other=0).to(tl.int32)
        weight = tl.load(weights + pair, mask=p < end, other=0.0).to(tl.float32)
        token = (pair // k).to(tl.int64)
        place = token[:, None] * D + column[None, :]  # (BLOCK_P, BLOCK_D), in dY
        mask = (p < end)[:, None] & (column < D)[None, :]
        dy = tl.load(grad + place, mask=mask, other=0.0).to(tl.float32)
        total += weight[:, None] * dy
        tl.store(grad_weights + pair, tl.sum(value[None, :] * dy, 1), mask=p < end)
        start += BLOCK_P
    target = out + tl.load(targets + r) * D + column
    before = tl.load(target, mask=column < D, other=0.0).to(tl.float32)
    after = before + tl.sum(total, 0)  # (BLOCK_D,)
    tl.store(target, after.to(out.dtype.element_ty), mask=column < D)


@triton.jit
def sum_kernel(
    partial,
    firsts,
    out,
    targets,
    D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[targets[r]] += sum of partial[firsts[r] : firsts[r + 1]], BLOCK_D columns of it."""
    r = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)  # (BLOCK_D,)
    total = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    start = tl.load(firsts + r)
    end = tl.load(firsts + r + 1)
    while start < end:
        piece = start + tl.arange(0, BLOCK_P)  # (BLOCK_P,)
        place = piece[:, None] * D + column[None, :]  # (BLOCK_P, BLOCK_D)
        mask = (piece < end)[:, None] & (column < D)[None, :]
        total += tl.load(partial + place, mask=mask, other=0.0)
        start += BLOCK_P
    target = out + tl.load(targets + r) * D + column
    before = tl.load(target, mask=column < D, other=0.0).to(tl.float32)
    after = before + tl.sum(total, 0)
    tl.store(target, after.to(out.dtype.element_ty), mask=column < D)


def forward_tile(D):
    """(BLOCK_K, BLOCK_D, warps) of the forward kernel at width D."""
    block_d = min(triton.next_power_of_2(D), 1024)
    block_k = max(4, 1024 // block_d)
    return block_k, block_d, 4


def backward_tile(D):
    """(BLOCK_P, BLOCK_D, warps) of the backward kernel: a whole row, and up to 4 rows of dY."""
    block_d = triton.next_power_of_2(D)
    block_p = max(1, min(4, 4096 // block_d))
    warps = min(32, max(1, block_p * block_d // 1024))
    return block_p, block_d, warps


def sum_tile(D):
    """(BLOCK_P, BLOCK_D, warps) of the sum kernel: many programs share one long row."""
    return 16, min(triton.next_power_of_2(D), 64), 2


def triton_forward(values, indices, weights):
    """Same as torch_forward, for contiguous tensors."""
    n, k = indices.shape
    D = values.size(1)
    out = values.new_empty(n, D)
    block_k, block_d, warps = forward_tile(D)
    grid = (n, triton.cdiv(D, block_d))
    forward_kernel[grid](
        values, indices, weights, out, k=k, D=D, BLOCK_K=block_k, BLOCK_D=block_d, num_warps=warps
    )
    return out


def triton_backward(values, indices, weights, grad):
    """Same as torch_backward, for contiguous tensors."""
    order, rows, starts = group_by_row(indices)
    grad_rows = values.new_zeros(len(rows), values.size(1))
    targets = torch.arange(len(rows), device=rows.device)
    pairs = Pairs(order, weights, grad)
    add_row_gradients(values, rows, starts, pairs, grad_rows, targets)
    return rows, grad_rows, pairs.grad_weights


def triton_backward_into(values, indices, weights, grad, gradient):
    """Same as torch_backward, but adds the gradients of rows to the table `gradient` (S, D).
    -> rows (R,), gradient of the weights (n, k)"""
    order, rows, starts = group_by_row(indices)
    pairs = Pairs(order, weights, grad)
    add_row_gradients(values, rows, starts, pairs, gradient, rows)
    return rows, pairs.grad_weights


def triton_products(values, indices, x):
    """Same as torch_products, by the backward kernel. Its gradients of rows are not used."""
    zeros = torch.zeros_like(indices, dtype=torch.float32)
    _, _, products = triton_backward(values, indices, zeros, x)
    return products


class Pairs:
    """The pairs for the backward kernels, which read their order by row, weights (n, k) and
    dY (n, D), and fill in the gradient of the weights (n, k)."""

    def __init__(self, order, weights, grad):
        self.order = order
        self.weights = weights
        self.grad = grad
        self.grad_weights = torch.empty_like(weights, dtype=torch.float32)


def add_row_gradients(values, rows, starts, pairs, out, targets):
    """out[targets[r]] += gradient of rows[r] from pairs order[starts[r] : starts[r + 1]].

    A row that many tokens read is long. One program would still walk over its pairs when all
    others are done. So long rows are cut into pieces, each with its own program and sum."""
    begins = starts[:-1]
    ends = starts[1:]
    is_long = ends - begins > PIECE  # (R,)
    short_ends = torch.where(is_long, begins, ends)  # an empty range for long rows
    launch_backward(values, rows, begins, short_ends, pairs, out, targets)
    long = is_long.nonzero().flatten()
    if len(long) > 0:
        partial, firsts = sum_pieces(values, rows[long], begins[long], ends[long], pairs)
        add_sums_of_pieces(partial, firsts, out, targets[long])


def launch_backward(values, rows, begins, ends, pairs, out, targets):
    D = values.size(1)
    block_p, block_d, warps = backward_tile(D)
    backward_kernel[(len(rows),)](
        values,
        rows,
        begins,
        ends,
        pairs.order,
        pairs.weights,
        pairs.grad,
        pairs.grad_weights,
        out,
        targets,
        k=pairs.weights.size(1),
        D=D,
        BLOCK_P=block_p,
        BLOCK_D=block_d,
        num_warps=warps,
    )


def sum_pieces(values, rows, begins, ends, pairs):
    """Cut rows into pieces of PIECE pairs, and sum the gradient of each piece.
    -> partial (pieces, D) float32, firsts: rows[r] has partial[firsts[r] : firsts[r + 1]]"""
    counts = (ends - begins + PIECE - 1) // PIECE  # pieces of each row
    firsts = F.pad(counts.cumsum(0), (1, 0))
    owner = torch.repeat_interleave(counts)  # (pieces,), the row of each piece
    piece = torch.arange(len(owner), device=rows.device)
    begin = begins[owner] + (piece - firsts[owner]) * PIECE
    end = torch.minimum(begin + PIECE, ends[owner])
    partial = torch.zeros(len(owner), values.size(1), device=values.device)
    launch_backward(values, rows[owner], begin, end, pairs, partial, piece)
    return partial, firsts


def add_sums_of_pieces(partial, firsts, out, targets):
    """out[targets[r]] += sum of partial[firsts[r] : firsts[r + 1]]"""
    D = partial.size(1)
    block_p, block_d, warps = sum_tile(D)
    grid = (len(targets), triton.cdiv(D, block_d))
    sum_kernel[grid](
        partial, firsts, out, targets, D=D, BLOCK_P=block_p, BLOCK_D=block_d, num_warps=warps
    )


# --- lookup, and its gradient -------------------------------------------------------
# Custom operators are opaque to torch.compile. Each has a fake that gives shape and dtype.


def uses_triton(tensor):
    """True on a GPU if Triton is installed."""
    return tensor.is_cuda and HAS_TRITON


@torch.library.custom_op("nanomem::lookup_forward", mutates_args=())
def lookup_forward(
    values: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """The lookup: (S, D), (n, k), (n, k) -> (n, D)"""
    if indices.numel() == 0:
        return values.new_zeros(len(indices), values.size(1))
    check_slots(values, indices)
    if not uses_triton(values):
        return torch_forward(values.contiguous(), indices, weights)
    with torch.cuda.device_of(values):  # Triton launches on the current device
        return triton_forward(values.contiguous(), indices, weights)


@lookup_forward.register_fake
def _(values, indices, weights):
    return values.new_empty(len(indices), values.size(1))


@torch.library.custom_op("nanomem::products", mutates_args=())
def products(values: torch.Tensor, indices: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """values[indices[i, j]] . x[i], which is the gradient of the weights if x is dY.
    (S, D), (n, k), (n, D) -> (n, k), float32 or wider"""
    if indices.numel() == 0:
        return widen(values.new_zeros(indices.shape))
    check_slots(values, indices)
    if not uses_triton(values):
        return torch_products(values.contiguous(), indices, x)
    with torch.cuda.device_of(values):
        return triton_products(values.contiguous(), indices, x)


@products.register_fake
def _(values, indices, x):
    return widen(values.new_empty(indices.shape))


def lookup_backward(values, indices, weights, grad):
    """grad (n, D) -> rows (R,), their gradient (R, D), gradient of the weights (n, k)"""
    if indices.numel() == 0:
        rows = torch.zeros(0, dtype=torch.int64, device=values.device)
        return rows, values.new_zeros(0, values.size(1)), torch.zeros_like(weights)
    if not uses_triton(values):
        return torch_backward(values.contiguous(), indices, weights, grad)
    with torch.cuda.device_of(values):
        return triton_backward(values.contiguous(), indices, weights, grad)


@torch.library.custom_op("nanomem::lookup_backward_into", mutates_args=("gradient", "touched"))
def lookup_backward_into(
    values: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    grad: torch.Tensor,
    gradient: torch.Tensor,
    touched: torch.Tensor,
) -> torch.Tensor:
    """Same as lookup_backward, but adds the gradients of rows to `gradient` (S, D) and sets
    these rows to 1 in `touched` (S,). -> gradient of the weights (n, k)"""
    if uses_triton(values) and indices.numel() > 0:
        with torch.cuda.device_of(values):
            rows, grad_weights = triton_backward_into(
                values.contiguous(), indices, weights, grad, gradient
            )
    else:
        rows, grad_rows, grad_weights = lookup_backward(values, indices, weights, grad)
        gradient.index_add_(0, rows, grad_rows)  # each row once, so the order is fixed
    touched.index_fill_(0, rows, 1)
    return grad_weights.to(weights.dtype).contiguous()  # like its fake


@lookup_backward_into.register_fake
def _(values, indices, weights, grad, gradient, touched):
    return weights.new_empty(weights.shape)


class Lookup(torch.autograd.Function):
    """lookup: the gradient of values is a sparse tensor of the rows that were read."""

    @staticmethod
    def forward(ctx, values, indices, weights):
        ctx.save_for_backward(values, indices, weights)
        return lookup_forward(values, indices, weights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        values, indices, weights = ctx.saved_tensors
        grad = grad.contiguous()
        rows, grad_rows, grad_weights = lookup_backward(values, indices, weights, grad)
        grad_values = sparse_rows(rows, grad_rows, values.shape)
        return grad_values, None, grad_weights.to(weights.dtype)


class CollectingLookup(torch.autograd.Function):
    """collecting_lookup: adds the gradient of values to `gradient` and gives autograd none."""

    @staticmethod
    def forward(ctx, values, indices, weights, gradient, touched):
        ctx.save_for_backward(values, indices, weights)
        ctx.gradient = gradient
        ctx.touched = touched
        return lookup_forward(values, indices, weights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        values, indices, weights = ctx.saved_tensors
        grad = grad.contiguous()
        if collects(ctx, values):
            check_collector(ctx.gradient)
            grad_weights = lookup_backward_into(
                values, indices, weights, grad, ctx.gradient, ctx.touched
            )
        else:  # frozen values
            grad_weights = products(values, indices, grad).to(weights.dtype)
        return None, None, grad_weights, None, None


def collects(ctx, values):
    """Whether a backward pass collects the gradient of values, the first input of forward. They
    may have been frozen since then. (torch.compile does not notice this.)"""
    return ctx.needs_input_grad[0] and values.requires_grad


def check_collector(gradient):
    """Without `gradient` the values would silently learn nothing."""
    if gradient is None:
        raise RuntimeError(
            "these values have no optimizer: make RowAdam(pool) before the forward pass "
            "(others, like AdamW, do not see their gradient), or freeze the values with "
            "pool.requires_grad_(False)"
        )


def sparse_rows(rows, grads, shape):
    """Make a coalesced sparse tensor: grads (R, D) at sorted, distinct rows (R,)."""
    return torch.sparse_coo_tensor(
        rows[None], grads, shape, is_coalesced=True, check_invariants=False
    )


def lookup(values, indices, weights):
    """Weighted sum of table rows: out[i] = sum over j of weights[i, j] * values[indices[i, j]].
    It is for a table of your own. Memory layers use collecting_lookup.

    values   (S, D) float32, bfloat16 or float16 (on a CPU also float64); S below 2^31
    indices  (n, k) int32 or int64, in [0, S). Checked on a CPU, and on a GPU only
             with NANOMEM_DEBUG=1
    weights  (n, k) floating point, preferably float32; n * k below 2^31
    returns  (n, D) of values' dtype, summed in float32 or wider

    Differentiable in values and weights. The gradient of values is a coalesced sparse tensor
    of the rows that were read, for torch.optim.SparseAdam. Its size does not depend on S. The
    same inputs give the same bits. Raises ValueError for inputs that do not fit."""
    check_lookup(values, indices, weights)
    if torch.is_grad_enabled():  # torch.compile cannot trace a sparse gradient
        apply = torch.compiler.disable(Lookup.apply)
    else:
        apply = Lookup.apply
    return apply(values, indices.contiguous(), weights.contiguous())


def collecting_lookup(values, indices, weights, gradient, touched):
    """Same as lookup, for a table that several layers and micro-steps read (memory.ValuePool).

    gradient  (S, D) of values' dtype. Backward passes add the gradient of values to its rows.
              Autograd gets none, so torch.compile has no graph break
    touched   (S,) uint8. Backward passes set the rows that were read to 1

    Both are contiguous. Both may be None: a backward pass for the values then raises
    RuntimeError."""
    check_lookup(values, indices, weights)
    check_accumulator(values, gradient, touched)
    return CollectingLookup.apply(
        values, indices.contiguous(), weights.contiguous(), gradient, touched
    )


def check_lookup(values, indices, weights):
    check_inputs(values, indices, weights)
    if weights.shape != indices.shape:
        raise ValueError(f"weights {describe(weights)}: must have the shape of indices")


def check_inputs(values, indices, other):
    """Raises ValueError for inputs that do not fit. other: weights, or x of products."""
    if values.ndim != 2 or not values.is_floating_point():
        raise ValueError(f"values {describe(values)}: must be (S, D), floating point")
    if values.is_cuda and values.dtype == torch.float64:
        raise ValueError(f"values {describe(values)}: float64 is for the CPU")
    if len(values) >= 2**31:
        raise ValueError(f"values {describe(values)}: must have fewer than 2^31 rows")
    if indices.ndim != 2 or indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"indices {describe(indices)}: must be (n, k), int32 or int64")
    if indices.numel() >= 2**31:
        raise ValueError(f"indices {describe(indices)}: n * k must be below 2^31")
    if not other.is_floating_point():
        raise ValueError(f"weights {describe(other)}: must be floating point")
    if not values.device == indices.device == other.device:
        devices = f"{values.device}, {indices.device}, {other.device}"
        raise ValueError(f"values, indices and weights must be on one device, not {devices}")


def check_accumulator(values, gradient, touched):
    """Raises ValueError for tensors that backward passes cannot add to."""
    if gradient is None and touched is None:
        return
    check_like("gradient", gradient, values.shape, values.dtype, values.device)
    check_like("touched", touched, values.shape[:1], torch.uint8, values.device)


def check_like(name, tensor, shape, dtype, device):
    if not torch.is_tensor(tensor):
        raise ValueError(f"{name} must be a tensor, not {tensor!r}")
    fits = tensor.shape == shape and tensor.dtype == dtype and tensor.device == device
    if not fits or not tensor.is_contiguous():
        must = f"must be {tuple(shape)} {dtype} on {device}, contiguous"
        raise ValueError(f"{name} {describe(tensor)}: {must}")


def describe(tensor):
    return f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"


def check_slots(values, indices):
    """Raises ValueError for slots that the table does not have."""
    if values.is_cuda and not DEBUG:
        return
    low, high = (bound.item() for bound in indices.aminmax())
    if low < 0 or high >= len(values):
        last = len(values) - 1
        raise ValueError(f"lookup of slots {low} to {high}: the table has slots 0 to {last}")


# --- selecting slots ----------------------------------------------------------------
# memory.py explains the method. On a GPU one program selects the slots of one head of one
# token: two top-k, the candidates, their top-k. Elsewhere memory.product_topk selects them
# with the function below.


FITS_CACHE = 2**17  # scores that numpy sorts at a time on a CPU: 1 MB in float64


def topk_indices(scores, K):
    """Columns of the K largest scores in each row, largest first: (..., N) -> (..., K) int64.

    On a CPU numpy's vectorised partition and sort take a fraction of the time of torch.topk."""
    if scores.device.type != "cpu" or scores.dtype != torch.float32 or K > 64:
        return scores.topk(K, dim=-1).indices
    if scores.numel() <= FITS_CACHE:
        return topk_by_sorting(scores, K)
    N = scores.size(-1)
    parts = scores.reshape(-1, N).split(max(1, FITS_CACHE // N))
    best = torch.cat([topk_by_sorting(part, K) for part in parts])
    return best.view(*scores.shape[:-1], K)


def topk_by_sorting(scores, K):
    """Same as topk_indices, for finite scores (..., N) in float32.
    numpy sorts numbers, not pairs of number and place. So put the place into the number. A
    float32 widened to float64 ends in 29 zero bits, too small to change the order."""
    packed = scores.double()
    packed.view(torch.int64).bitwise_or_(torch.arange(scores.size(-1)))
    packed = packed.numpy()
    if scores.size(-1) > 64:  # to choose in a shorter row takes as long as to sort it
        packed.partition(-K, axis=-1)
        packed = packed[..., -K:]
    packed.sort(axis=-1)
    best = packed.view(np.int64)[..., : -K - 1 : -1]  # the last K, backwards
    return torch.from_numpy(best & (2**29 - 1))


@triton.jit
def pack(score, column):
    """Pack score and column into one int64, score bits first. Sorting it sorts both, exactly."""
    bits = score.to(tl.float32).to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the same order as the floats
    return (bits.to(tl.int64) << 32) | column


@triton.jit
def unpack(packed):
    """-> score float32, column int32"""
    bits = (packed >> 32).to(tl.int32)
    score = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return score, packed.to(tl.int32)


@triton.jit
def best_of_row(
    row, N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr
):
    """Find the BLOCK_K largest of N finite scores, largest first -> scores, columns (BLOCK_K,).
    They lie in the BLOCK_K groups of neighbours with the largest maxima. So find these
    groups, then sort their members."""
    member = tl.arange(0, GROUP)[None, :]
    column = tl.arange(0, BLOCK_N // GROUP)[:, None] * GROUP + member  # (BLOCK_N / GROUP, GROUP)
    packed = pack(tl.load(row + column, mask=column < N, other=float("-inf")), column)
    _, best = unpack(tl.topk(tl.max(packed, 1), BLOCK_K))  # columns of the maxima
    column = (best // GROUP * GROUP)[:, None] + member  # (BLOCK_K, GROUP)
    packed = pack(tl.load(row + column, mask=column < N, other=float("-inf")), column)
    return unpack(tl.topk(tl.reshape(packed, [BLOCK_K * GROUP]), BLOCK_K))


@triton.jit
def select_kernel(
    scores,
    candidates,
    pairs,
    n,
    H: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GROUP: tl.constexpr,
):
    """scores (2, H, n, N), candidates (2, COUNT) -> pairs = i and j (2, H, n, K)"""
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1)
    score1, column1 = best_of_row(scores + (h * n + t) * N, N, BLOCK_N, BLOCK_K, GROUP)
    score2, column2 = best_of_row(scores + ((H + h) * n + t) * N, N, BLOCK_N, BLOCK_K, GROUP)
    c = tl.arange(0, BLOCK_C)
    rank1 = tl.load(candidates + c, mask=c < COUNT, other=0).to(tl.int32)
    rank2 = tl.load(candidates + COUNT + c, mask=c < COUNT, other=0).to(tl.int32)
    total = tl.gather(score1, rank1, 0) + tl.gather(score2, rank2, 0)  # (BLOCK_C,)
    total = tl.where(c < COUNT, total, float("-inf"))
    _, winner = unpack(tl.topk(pack(total, c), BLOCK_K))  # (BLOCK_K,)
    rank = tl.arange(0, BLOCK_K)
    rank1 = tl.load(candidates + winner, mask=rank < K, other=0).to(tl.int32)
    rank2 = tl.load(candidates + COUNT + winner, mask=rank < K, other=0).to(tl.int32)
    i = tl.gather(column1, rank1, 0)
    j = tl.gather(column2, rank2, 0)
    tl.store(pairs + (h * n + t) * K + rank, i, mask=rank < K)
    tl.store(pairs + ((H + h) * n + t) * K + rank, j, mask=rank < K)


def select_tile(N, K):
    """(BLOCK_N, BLOCK_K, GROUP, warps): groups of about the square root of N / K columns, and
    32 numbers per thread."""
    block_n = max(2, triton.next_power_of_2(N))
    block_k = max(2, triton.next_power_of_2(K))
    group = 2 ** ((block_n // block_k).bit_length() // 2)
    warps = min(16, max(1, block_n // 1024))
    return block_n, block_k, group, warps


def triton_select(scores, candidates, K):
    """Same as memory.product_topk. scores (2, H, n, N), float32 or narrower; candidates:
    memory.candidate_ranks(K) -> i and j (2, H, n, K) int64"""
    _, H, n, N = scores.shape
    count = candidates.size(1)
    pairs = torch.empty(2, H, n, K, dtype=torch.int64, device=scores.device)
    block_n, block_k, group, warps = select_tile(N, K)
    block_c = max(block_k, triton.next_power_of_2(count))
    with torch.cuda.device_of(scores):
        select_kernel[(n, H)](
            scores.contiguous(),
            candidates,
            pairs,
            n,
            H=H,
            N=N,
            K=K,
            COUNT=count,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            BLOCK_C=block_c,
            GROUP=group,
            num_warps=warps,
        )
    return pairs


# --- RowAdam: the optimiser ---------------------------------------------------------
# Bytes per step: R * D * e of gradient, 2 * R * D * e of values, 16 * R * D of moments,
# 4 * R * D of random bits.


class RowAdam(torch.optim.Optimizer):
    """Adam for the values of a pool. A step updates only the rows that were read, and its
    cost depends only on them.

    For a row with gradient g at step t (arXiv:1412.6980, algorithm 1):

        m = beta1 m + (1 - beta1) g
        v = beta2 v + (1 - beta2) g^2
        value = value - lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)

    Rows without a gradient keep their value and moments ("lazy" Adam, as in
    torch.optim.SparseAdam; bench/README.md compares others). The state is m and v in float32. A
    step for frozen values does nothing, and does not count.

    pool  memory.ValuePool, float32 or bfloat16. It collects gradients from now on. step() takes
          them with pool.take_gradient()
    eps   only guards against 0 / 0. It is small because a row's gradient can be about 1e-9,
          if the loss is the mean over 491,520 tokens (the gpt2 presets)
    seed  bfloat16 would drop small updates, so values are rounded stochastically (unbiased),
          by seed and step
    """

    def __init__(self, pool, lr=1e-3, betas=(0.9, 0.98), eps=1e-15, seed=0):
        if not isinstance(pool, torch.nn.Module):
            raise ValueError(f"RowAdam(pool) wants a memory.ValuePool, not a {type(pool).__name__}")
        if pool.values.dtype not in (torch.float32, torch.bfloat16):
            dtype = pool.values.dtype
            raise ValueError(f"RowAdam wants values in float32 or bfloat16, not {dtype}")
        super().__init__([pool.values], dict(lr=lr, betas=betas, eps=eps, seed=seed))
        self.pool = pool
        self.check_contiguous()
        pool.collect_gradients()

    def zero_grad(self, set_to_none=True):
        """Drop the gradient in the pool."""
        self.pool.drop_gradient()

    def check_contiguous(self):
        """Raises ValueError for values in another order, which the Triton kernel cannot write."""
        if uses_triton(self.pool.values) and not self.pool.values.is_contiguous():
            raise ValueError("RowAdam wants values that are contiguous")

    @torch.no_grad()
    def step(self):
        values = self.pool.values
        self.check_contiguous()
        gradient = self.pool.take_gradient()
        if not values.requires_grad:
            return
        rows = gradient.indices()[0]  # (R,)
        grads = gradient.values()  # (R, D)
        with torch.cuda.device_of(values):
            self.update(values, rows, grads, self.state[values], self.param_groups[0])

    def update(self, values, rows, grads, state, options):
        """Update the rows. state: of this table; options: lr, betas, eps, seed."""
        if len(state) == 0:
            state["step"] = 0
            state["means"] = torch.zeros_like(values, dtype=torch.float32)
            state["squares"] = torch.zeros_like(values, dtype=torch.float32)
        state["step"] += 1
        t = state["step"]
        beta1, beta2 = options["betas"]
        # Fold both bias corrections into lr and eps, so that the pass over the rows needs
        # none.
        correction = (1 - beta2**t) ** 0.5
        rate = options["lr"] * correction / (1 - beta1**t)
        eps = options["eps"] * correction
        random = torch.Generator(values.device)
        random.manual_seed((options["seed"] + 0x9E3779B9 * t) % 2**31)
        if uses_triton(values):
            update_rows = triton_adam
            part = 2**17
        else:
            update_rows = torch_adam
            part = 2**12  # small enough for a CPU's cache
        for start in range(0, len(rows), part):
            some_rows = rows[start : start + part]
            some_grads = grads[start : start + part].contiguous()
            update_rows(
                values,
                state["means"],
                state["squares"],
                some_rows,
                some_grads,
                random_bits(values, some_grads, random),
                rate,
                beta1,
                beta2,
                eps,
            )

    def load_state_dict(self, state_dict):
        """PyTorch's own casts the moments to the values' dtype. Keep them as saved. Raises
        ValueError for moments of another table."""
        super().load_state_dict(state_dict)
        values = self.pool.values
        for saved in state_dict["state"].values():
            state = {"step": saved["step"]}
            for name in ("means", "squares"):
                if saved[name].shape != values.shape:
                    shapes = f"{tuple(saved[name].shape)}, but values {tuple(values.shape)}"
                    raise ValueError(f"the saved {name} have the shape {shapes}")
                moments = saved[name].to(values.device, copy=True)  # not a view of a mapped file
                state[name] = moments.contiguous()
            self.state[values] = state


def random_bits(values, grads, generator):
    """Draw 16 random bits for each number to round. float32 values need none."""
    if values.dtype == torch.float32:
        return grads  # a placeholder, which is not read
    bits = torch.empty(grads.shape, dtype=torch.int16, device=grads.device)
    return bits.random_(-(2**15), 2**15, generator=generator)


def torch_adam(values, means, squares, rows, grads, bits, rate, beta1, beta2, eps):
    """RowAdam's step, in place. rows (R,) are distinct; grads, bits (R, D). rate and eps
    include the bias corrections."""
    g = grads.float()
    mean = means.index_select(0, rows).lerp_(g, 1 - beta1)
    square = squares.index_select(0, rows).mul_(beta2).addcmul_(g, g, value=1 - beta2)
    set_rows(means, rows, mean)
    set_rows(squares, rows, square)
    value = values.index_select(0, rows).float()
    value.addcdiv_(mean, square.sqrt_().add_(eps), value=-rate)
    if values.dtype == torch.bfloat16:
        value = round_stochastically(value, bits)
    set_rows(values, rows, value)


def set_rows(table, rows, new):
    """table[rows] = new. On a CPU, numpy takes a third of index_copy_'s time."""
    if table.device.type == "cpu" and table.dtype == torch.float32:
        table.detach().numpy()[rows.numpy()] = new.numpy()
    else:
        table.index_copy_(0, rows, new)


def round_stochastically(value, bits):
    """Round float32 to bfloat16. The probability of rounding up is the distance from the
    number below, divided by the gap: add random bits to the bits that are cut off."""
    rounded = (value.view(torch.int32) + (bits.int() & 0xFFFF)) >> 16
    rounded = rounded.to(torch.int16).view(torch.bfloat16)
    return torch.where(value.isfinite(), rounded, value.bfloat16())


@triton.jit
def adam_kernel(
    values,
    means,
    squares,
    rows,
    grads,
    bits,
    rate,
    beta1,
    beta2,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program owns one row, and updates its moments and its value."""
    r = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    inside = column < D
    place = tl.load(rows + r) * D + column  # in the table
    g = tl.load(grads + r * D + column, mask=inside, other=0.0).to(tl.float32)
    mean = tl.load(means + place, mask=inside, other=0.0)
    mean = beta1 * mean + (1 - beta1) * g
    square = tl.load(squares + place, mask=inside, other=0.0)
    square = beta2 * square + (1 - beta2) * g * g
    value = tl.load(values + place, mask=inside, other=0.0).to(tl.float32)
    value -= rate * mean / (tl.sqrt(square) + eps)
    tl.store(means + place, mean, mask=inside)
    tl.store(squares + place, square, mask=inside)
    if values.dtype.element_ty == tl.bfloat16:  # as round_stochastically
        random = tl.load(bits + r * D + column, mask=inside, other=0).to(tl.int32) & 0xFFFF
        rounded = (value.to(tl.int32, bitcast=True) + random) >> 16
        rounded = rounded.to(tl.int16).to(tl.bfloat16, bitcast=True)
        is_finite = tl.abs(value) < float("inf")  # also False for NaN
        value = tl.where(is_finite, rounded, value.to(tl.bfloat16))
    tl.store(values + place, value, mask=inside)


def adam_warps(D):
    """8 columns a thread."""
    return min(32, max(1, triton.next_power_of_2(D) // 256))


def triton_adam(values, means, squares, rows, grads, bits, rate, beta1, beta2, eps):
    """Same as torch_adam, for contiguous tensors."""
    D = values.size(1)
    adam_kernel[(len(rows),)](
        values,
        means,
        squares,
        rows,
        grads,
        bits,
        rate,
        beta1,
        beta2,
        eps,
        D=D,
        BLOCK_D=triton.next_power_of_2(D),
        num_warps=adam_warps(D),
    )
