"""The lookup: y[i] = sum over j of weights[i, j] * values[indices[i, j]].

This is all that a memory layer does with its memory (Memory Layers at Scale, arXiv:2412.09764, section 3):
every token reads k rows of a table of S rows and adds them up, each with its own weight. In matrix form y = W
V, where W (n x S) holds k weights a row and zeros elsewhere. Its two gradients are then

    dV = W^T dY      row s of V collects the dY of every token that read it: a lookup with the roles swapped
    dW = dY V^T      wanted only where W is not zero: dweights[i, j] = dY[i] . values[indices[i, j]]

Below: all of it in PyTorch (for a CPU) and Triton (for a GPU), `lookup` and `dot` (dW alone), `RowAdam` (the
optimiser), and the kernel that selects slots (memory.py). `python kernels.py` checks and times them.

Letters: n tokens, k slots that a token reads (heads times top-k), S slots in the table, D width of a value,
R distinct rows read, P = n * k pairs of token and slot. Inside, indices and weights are (P,), and token i has
pairs offsets[i] to offsets[i + 1] - 1: UltraMem's read different numbers of slots. """

import os
import types
import warnings

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # there is no Triton for macOS and Windows; the PyTorch path does not need it
    triton = types.SimpleNamespace(jit=lambda *function, **_: function[0] if function else triton.jit)
    tl = types.SimpleNamespace(constexpr=None)

# PyTorch says once a process that compressed sparse rows are in beta; torch_backward uses them.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")


def widen(x):
    """bfloat16 to float32, for sums, norms and softmax; wider numbers stay as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def group_by_row(indices):
    """Sort the P pairs by the row they read. indices (P,) -> order (P,), rows (R,), starts (R + 1,), int64.
    Pairs order[starts[r] : starts[r + 1]] read rows[r], in the order of the tokens: sums are repeatable."""
    if indices.device.type == "cpu":  # numpy sorts numbers far faster: slot and pair, side by side
        packed = (indices.long() << 32) + torch.arange(len(indices))
        packed.numpy().sort()
        slots, order = packed >> 32, packed & (2**32 - 1)
    else:
        slots, order = indices.int().sort(stable=True)  # int32: half the passes of a radix sort
    rows, counts = torch.unique_consecutive(slots, return_counts=True)
    return order, rows.long(), F.pad(counts.cumsum(0), (1, 0))


def token_of_pair(offsets, P):
    """offsets (n + 1,) -> (P,) int64"""
    return torch.repeat_interleave(offsets.diff(), output_size=P)


# --- PyTorch --------------------------------------------------------------------------------------------


def torch_forward(values, indices, offsets, weights):
    """-> (n, D). Without a (P, D) tensor where PyTorch can do without it."""
    if values.device.type == "cpu" and values.dtype in (torch.float32, torch.float64):
        options = {"per_sample_weights": weights.to(values.dtype), "include_last_offset": True}
        return F.embedding_bag(indices, values, offsets.to(indices.dtype), mode="sum", **options)
    pairs = widen(values[indices]) * weights.unsqueeze(-1)
    each = torch.arange(len(pairs), device=pairs.device)  # in a fixed order; index_add_ has none on a GPU
    return F.embedding_bag(each, pairs, offsets, mode="sum", include_last_offset=True).to(values.dtype)


def torch_backward(values, indices, offsets, weights, grad, table_grad=None):
    """grad (n, D), that is dY -> rows (R,), their gradient (R, D), gradient of the weights (P,). table_grad
    (S, D): if it is there, the rows' gradients are added to it."""
    order, rows, starts = group_by_row(indices)
    wide = widen(grad)
    # dV = W^T dY: row r sums the dY of the tokens that read it; unlike index_add_, in a fixed order.
    tokens, w = token_of_pair(offsets, len(order))[order], weights[order].to(wide.dtype)
    grad_rows = F.embedding_bag(tokens, wide, starts[:-1], per_sample_weights=w, mode="sum").to(values.dtype)
    if table_grad is not None:
        table_grad.index_add_(0, rows, grad_rows)  # each row once
    return rows, grad_rows, torch_dot(values, indices, offsets, grad)


def torch_dot(values, indices, offsets, x):
    """dW = dY V^T where W is not zero: values[indices[p]] . x[the token of pair p], (P,). x (n, D)"""
    wide = widen(x.to(torch.promote_types(values.dtype, x.dtype)))
    # Pairs are the entries of a sparse W. Several may be of one slot: sampled_addmm takes each on its own.
    if wide.device.type == "cpu" and wide.dtype == values.dtype and offsets.diff().max() <= len(values):
        zeros, size = wide.new_zeros(len(indices)), (len(x), len(values))
        pattern = torch.sparse_csr_tensor(offsets, indices.long(), zeros, size, check_invariants=False)
        return torch.sparse.sampled_addmm(pattern, wide, values.t(), beta=0.0).values()  # a tenth of the time
    return (values[indices].to(wide.dtype) * wide[token_of_pair(offsets, len(indices))]).sum(-1)


# --- Triton ---------------------------------------------------------------------------------------------
# Bytes that must move at width D with e bytes a number (12 bytes a pair of slot number and weight are few):
#   forward    P * D * e   rows read (no cache holds a large table)   +  n * D * e  written
#   backward   R * D * e   rows read once, each by its one owner      +  n * D * e  dY, if L2 holds it
#              2 * R * D * e   their gradients, read and written
# D is a compile-time constant: the compiler then knows how rows are aligned, and loads 16 bytes at once.

PIECE = 128  # pairs of one row that one program walks at most


@triton.jit
def forward_kernel(
    values, indices, offsets, weights, out, D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr
):
    """One program computes BLOCK_D columns of one token, BLOCK_K rows in flight at a time."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)  # (BLOCK_D,)
    total = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    start, end = tl.load(offsets + token).to(tl.int32), tl.load(offsets + token + 1).to(tl.int32)
    while start < end:  # the interpreter of Triton 3.6 has no range of tensors with numpy 2.4
        p = start + tl.arange(0, BLOCK_K)  # (BLOCK_K,)
        # int64 before the multiplication: slot * D passes 2**31 at 2M slots of width 1024
        slot = tl.load(indices + p, mask=p < end, other=0).to(tl.int64)
        weight = tl.load(weights + p, mask=p < end, other=0.0).to(tl.float32)
        mask = (p < end)[:, None] & (column < D)[None, :]
        row = tl.load(values + slot[:, None] * D + column[None, :], mask=mask, other=0.0)
        total += weight[:, None] * row.to(tl.float32)  # (BLOCK_K, BLOCK_D)
        start += BLOCK_K
    tl.store(out + token * D + column, tl.sum(total, 0).to(out.dtype.element_ty), mask=column < D)


@triton.jit
def backward_kernel(
    values, rows, begins, ends, out, targets, weights, grad, order, tokens, grad_weights,
    D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program owns one row: it reads it once and walks over the pairs that read it, BLOCK_P at a time.
    out[targets[g]] += sum over the pairs of weight * dY; grad_weights[pair] = row . dY."""
    g = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)  # (BLOCK_D,), the whole row
    row = tl.load(rows + g)
    value = tl.load(values + row * D + column, mask=column < D, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    start, end = tl.load(begins + g), tl.load(ends + g)
    while start < end:
        p = start + tl.arange(0, BLOCK_P)  # (BLOCK_P,)
        pair = tl.load(order + p, mask=p < end, other=0).to(tl.int32)
        token = tl.load(tokens + p, mask=p < end, other=0).to(tl.int64)
        weight = tl.load(weights + pair, mask=p < end, other=0.0).to(tl.float32)
        mask = (p < end)[:, None] & (column < D)[None, :]
        dy = tl.load(grad + token[:, None] * D + column[None, :], mask=mask, other=0.0).to(tl.float32)
        total += weight[:, None] * dy  # (BLOCK_P, BLOCK_D)
        tl.store(grad_weights + pair, tl.sum(value[None, :] * dy, 1), mask=p < end)
        start += BLOCK_P
    target = out + tl.load(targets + g) * D + column
    before = tl.load(target, mask=column < D, other=0.0).to(tl.float32)
    tl.store(target, (before + tl.sum(total, 0)).to(out.dtype.element_ty), mask=column < D)


def forward_tile(D):
    """(BLOCK_K, BLOCK_D, warps) of the forward kernel at width D."""
    block_d = min(triton.next_power_of_2(D), 1024)
    return max(4, 1024 // block_d), block_d, 4


def backward_tile(D):
    """(BLOCK_P, BLOCK_D, warps) of the backward kernel: a whole row, and 4 of dY if they are not too wide."""
    block_d = triton.next_power_of_2(D)
    block_p = max(1, min(4, 4096 // block_d))
    return block_p, block_d, min(32, max(1, block_p * block_d // 1024))


def triton_forward(values, indices, offsets, weights):
    """As torch_forward. All tensors contiguous."""
    n, D = len(offsets) - 1, values.size(1)
    out, (block_k, block_d, warps) = values.new_empty(n, D), forward_tile(D)
    grid = n, triton.cdiv(D, block_d)
    forward_kernel[grid](values, indices, offsets, weights, out, D, block_k, block_d, num_warps=warps)
    return out


def triton_backward(values, indices, offsets, weights, grad, table_grad=None):
    """As torch_backward. All tensors contiguous."""
    order, rows, starts = group_by_row(indices)
    out, targets = table_grad, rows
    if table_grad is None:
        out, targets = values.new_zeros(len(rows), grad.size(1)), torch.arange(len(rows), device=rows.device)
    grad_weights = torch.empty_like(weights, dtype=torch.float32)
    pairs = weights, grad, order, token_of_pair(offsets, len(order))[order], grad_weights
    run_backward(values, rows, starts[:-1], starts[1:], out, targets, *pairs)
    return rows, out, grad_weights


def triton_dot(values, indices, offsets, x):
    """As torch_dot, by the backward kernel: what it writes beside (R, D) is not used."""
    return triton_backward(values, indices, offsets, torch.zeros_like(indices, dtype=torch.float32), x)[2]


def run_backward(values, rows, begins, ends, out, targets, *pairs):
    """out[targets[r]] += gradient of rows[r], of pairs order[begins[r] : ends[r]]; fills in grad_weights.
    Rows read by many tokens are split, so that no program dominates the run time: pieces of PIECE pairs are
    summed on their own, and then the partial sums by the same kernel, as if they were dY of weight 1."""
    D, hot = values.size(1), ends - begins > PIECE  # (R,)
    block_p, block_d, warps = backward_tile(D)
    tensors = values, rows, begins, torch.where(hot, begins, ends), out, targets, *pairs  # no hot rows yet
    backward_kernel[(len(rows),)](*tensors, D, block_p, block_d, num_warps=warps)
    hot = hot.nonzero().flatten()
    if len(hot) > 0:  # then their pieces, and the sums of these
        pieces = (ends - begins)[hot].add(PIECE - 1) // PIECE  # of each hot row
        firsts = F.pad(pieces.cumsum(0), (1, 0))  # pieces firsts[h] to firsts[h + 1] are those of row hot[h]
        owner = hot.repeat_interleave(pieces)
        piece = torch.arange(len(owner), device=rows.device)
        begin = begins[owner] + (piece - firsts[:-1].repeat_interleave(pieces)) * PIECE
        partial = torch.zeros(len(owner), D, device=values.device)  # float32
        run_backward(values, rows[owner], begin, (begin + PIECE).minimum(ends[owner]), partial, piece, *pairs)
        ones, unused = torch.ones_like(partial[:, 0]), torch.empty_like(partial[:, 0])
        hot_rows = rows[hot], firsts[:-1], firsts[1:], out, targets[hot]
        run_backward(values, *hot_rows, ones, partial, piece, piece, unused)


# --- lookup: what the model calls -----------------------------------------------------------------------

DEBUG = os.environ.get("NANOMEM_DEBUG", "0") != "0"  # check slots on a GPU, too: the CPU waits for it


def uses_triton(tensor):
    return tensor.is_cuda and hasattr(triton, "cdiv")  # a GPU, and a system that Triton exists for


@torch.library.custom_op("nanomem::lookup_forward", mutates_args=())  # opaque to torch.compile
def lookup_forward(
    values: torch.Tensor, indices: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor | None,
    x: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """lookup with weights, or dot with x"""
    if indices.numel() == 0:
        return empty_result(values, indices, offsets, weights, x).zero_()
    if DEBUG or not values.is_cuda:
        low, high = (bound.item() for bound in indices.aminmax())
        if low < 0 or high >= len(values):
            raise ValueError(f"lookup of slots {low} to {high}: the table has slots 0 to {len(values) - 1}")
    forward, product = (triton_forward, triton_dot) if uses_triton(values) else (torch_forward, torch_dot)
    tensors = values.contiguous(), indices.flatten(), offsets
    with torch.cuda.device_of(values):  # Triton launches on the current device
        if weights is None:  # a clone, because torch.compile fails on a view
            return product(*tensors, x).view(indices.shape).clone()
        return forward(*tensors, weights.flatten())


@lookup_forward.register_fake
def empty_result(values, indices, offsets, weights, x):
    if weights is None:
        return values.new_empty(indices.shape, dtype=torch.promote_types(values.dtype, torch.float32))
    return values.new_empty(len(offsets) - 1, values.size(1))


def lookup_backward(values, indices, offsets, weights, grad, table_grad=None):
    """As torch_backward."""
    if indices.numel() == 0:
        return indices.new_zeros(0).long(), values.new_zeros(0, values.size(1)), torch.zeros_like(weights)
    run = triton_backward if uses_triton(values) else torch_backward
    tensors = values.contiguous(), indices.flatten(), offsets, weights.flatten(), grad
    with torch.cuda.device_of(values):
        rows, grad_rows, grad_weights = run(*tensors, table_grad)
    return rows, grad_rows, grad_weights.view(weights.shape)


@torch.library.custom_op("nanomem::lookup_backward_into", mutates_args=("table_grad", "touched"))
def lookup_backward_into(
    values: torch.Tensor, indices: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor,
    grad: torch.Tensor, table_grad: torch.Tensor, touched: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    rows, _, grad_weights = lookup_backward(values, indices, offsets, weights, grad, table_grad)
    touched.index_fill_(0, rows, 1)
    return grad_weights.to(weights.dtype).contiguous()  # the dtype and strides of its fake


@lookup_backward_into.register_fake
def _(values, indices, offsets, weights, grad, table_grad, touched):
    return weights.new_empty(weights.shape)


class Lookup(torch.autograd.Function):
    """Lookup without x, dot without weights: derivatives, by x and w, of the sum over pairs of w_p
    values[i_p] . x_p. Backward, the gradient replaces what is None; the table's is sparse or accumulated."""

    @staticmethod
    def forward(ctx, values, indices, offsets, weights, x, accumulator):
        ctx.save_for_backward(values, indices, offsets, weights, x)
        ctx.accumulator = accumulator
        return lookup_forward(values, indices, offsets, weights, x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        grad, (*table, weights, x) = grad.contiguous(), ctx.saved_tensors  # table: values, indices, offsets
        tensors, grad_values = (*table, grad if weights is None else weights, grad if x is None else x), None
        if ctx.accumulator is not None:
            grad_weights = lookup_backward_into(*tensors, *ctx.accumulator)
        else:
            rows, grad_rows, grad_weights = lookup_backward(*tensors)
            grad_values = sparse_rows(rows, grad_rows, table[0])
        if x is None:
            return grad_values, None, None, grad_weights.to(weights.dtype), None, None
        return grad_values, None, None, None, lookup_forward(*table, grad, None).to(x.dtype), None


def sparse_rows(rows, grads, values):
    """A coalesced sparse tensor of the shape of values: grads (R, D) at rows (R,), sorted, each once."""
    return torch.sparse_coo_tensor(rows[None], grads, values.shape, is_coalesced=True, check_invariants=False)


def lookup(values, indices, weights, accumulator=None, offsets=None):
    """Weighted sum of table rows: out[i] = sum over j of weights[i, j] * values[indices[i, j]].

    values       (S, D) float32, bfloat16 or float16 (on a CPU also float64); S below 2^31
    indices      (n, k) int32 or int64, in [0, S): checked on a CPU, on a GPU only with NANOMEM_DEBUG=1
    weights      (n, k) floating point, best float32; n * k below 2^31
    accumulator  None, or where the gradient of values goes: (S, D) of values' dtype, and (S,) of uint8
    offsets      None, or (n + 1,) int64; indices and weights are (P,) then, those of token i from offsets[i]
    returns      (n, D) of values' dtype, summed in float32 or wider

    Differentiable in values and weights. The gradient of values is a coalesced torch.sparse_coo tensor of the
    rows read: its size is independent of S. Lookups in one table should share an accumulator: backward passes
    add to rows of its first tensor and set them to 1 in its second, autograd sees no gradient of values,
    torch.compile no graph break. The same inputs give the same bits. Raises ValueError if they do not fit."""
    if offsets is None:  # (P,) do not fit then
        offsets, indices = even_offsets(indices), indices if indices.ndim == 2 else indices[None]
    return apply(values, indices, offsets, weights, None, accumulator)


def dot(values, indices, x, accumulator=None):
    """z[i, j] = values[indices[i, j]] . x[i], which in lookup's backward pass is the gradient of the weights.
    x (n, D) floating point -> (n, k), float32 or wider. Differentiable in values and x; else as lookup."""
    return apply(values, indices, even_offsets(indices), None, x, accumulator)


def even_offsets(indices):
    """indices (n, k) -> 0, k, 2k, ..., nk: (n + 1,)"""
    return torch.arange(len(indices) + 1, device=indices.device) * indices.size(-1)


def apply(values, indices, offsets, weights, x, accumulator):
    given = x if weights is None else weights
    shape = (len(indices), values.size(-1)) if weights is None else indices.shape
    shapes = values.ndim == 2 and 1 <= indices.ndim <= 2 and given.shape == shape
    small, wide = max(len(values), indices.numel()) < 2**31, values.is_cuda and values.dtype == torch.float64
    dtypes = values.is_floating_point() and given.is_floating_point()
    dtypes = dtypes and not wide and indices.dtype in (torch.int32, torch.int64)
    if not (shapes and small and dtypes and values.device == indices.device == given.device):
        got = ", ".join(f"{tuple(t.shape)} {t.dtype} on {t.device}" for t in (values, indices, given))
        want = "values (S, D), weights (n, k) or x (n, D) in floating point (float64 on a CPU only), indices"
        want += " (n, k) of int32 or int64, on one device, S, n k below 2^31"
        raise ValueError(f"lookup wants {want}; not {got}")
    sparse = accumulator is None and torch.is_grad_enabled()  # torch.compile cannot trace such a gradient
    run = torch.compiler.disable(Lookup.apply) if sparse else Lookup.apply
    weights, x = (t if t is None else t.contiguous() for t in (weights, x))
    return run(values, indices.contiguous(), offsets, weights, x, accumulator)


# --- RowAdam: the optimiser -----------------------------------------------------------------------------
# Bytes a step: R * D * e gradient, 2 * R * D * e values, 16 * R * D moments, 4 * R * D random bits.


def torch_adam(values, means, squares, rows, grads, bits, rate, beta1, beta2, eps):
    """RowAdam's step, in place; rate, eps bias-corrected. rows (R,), each once; grads, random bits (R, D)."""
    g = grads.float()
    mean = means.index_select(0, rows).lerp_(g, 1 - beta1)
    square = squares.index_select(0, rows).mul_(beta2).addcmul_(g, g, value=1 - beta2)
    means.index_copy_(0, rows, mean)
    squares.index_copy_(0, rows, square)
    value = values.index_select(0, rows).float().addcdiv_(mean, square.sqrt_().add_(eps), value=-rate)
    if values.dtype == torch.bfloat16:
        # Up with a probability equal to the distance from the number below: add the bits, then cut them off.
        rounded = (value.view(torch.int32) + (bits.int() & 0xFFFF)) >> 16
        value = torch.where(value.isfinite(), rounded.to(torch.int16).view(torch.bfloat16), value.bfloat16())
    values.index_copy_(0, rows, value)


@triton.jit
def adam_kernel(
    values, means, squares, rows, grads, bits, rate, beta1, beta2, eps, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """One program owns one row, and moves its moments and its value."""
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
        random = tl.load(bits + r * D + column, mask=inside, other=0).to(tl.int32) & 0xFFFF
        rounded = (value.to(tl.int32, bitcast=True) + random) >> 16
        rounded = rounded.to(tl.int16).to(tl.bfloat16, bitcast=True)
        value = tl.where(tl.abs(value) < float("inf"), rounded, value.to(tl.bfloat16))  # False of NaN, too
    tl.store(values + place, value, mask=inside)


def adam_warps(D):
    return min(32, max(1, triton.next_power_of_2(D) // 256))  # 8 columns a thread


def triton_adam(values, means, squares, rows, grads, bits, *scalars):
    """As torch_adam. All tensors contiguous."""
    D, tensors = values.size(1), (values, means, squares, rows, grads, bits)
    adam_kernel[(len(rows),)](*tensors, *scalars, D, triton.next_power_of_2(D), num_warps=adam_warps(D))


class RowAdam(torch.optim.Optimizer):
    """Adam for a table of which each step reads a few rows. A step costs what those rows cost.

    For a row that has a gradient g at step t (arXiv:1412.6980, algorithm 1):

        m = beta1 m + (1 - beta1) g
        v = beta2 v + (1 - beta2) g^2
        value = value - lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)

    Rows without a gradient keep value and moments ("lazy" Adam, as torch.optim.SparseAdam; bench/README.md
    compares others). params: tables (S, D), float32 or bfloat16, with sparse gradients. State: m and v in
    float32. eps only guards against 0 / 0: where a loss is the mean over 491,520 tokens, a row's gradient is
    about 1e-9. As bfloat16 drops small updates, it is rounded stochastically (unbiased), by seed and step."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.98), eps=1e-15, seed=0):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, seed=seed))
        self.tables = [p for group in self.param_groups for p in group["params"]]
        for p in self.tables:
            if p.ndim != 2 or p.dtype not in (torch.float32, torch.bfloat16):
                raise ValueError(f"RowAdam wants (S, D), float32 or bfloat16, not {tuple(p.shape)} {p.dtype}")

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    if not p.grad.is_sparse:
                        raise ValueError("RowAdam wants sparse gradients, as lookup() gives them")
                    with torch.cuda.device_of(p):
                        self.update(p, p.grad.coalesce(), self.state[p], **group)

    def update(self, p, grad, state, lr, betas, eps, seed, **_):
        state["step"] = t = state.get("step", 0) + 1
        if t == 1:
            state["means"], state["squares"] = (torch.zeros_like(p, dtype=torch.float32) for _ in range(2))
        correction = (1 - betas[1] ** t) ** 0.5
        scalars = lr * correction / (1 - betas[0] ** t), *betas, eps * correction
        random = torch.Generator(p.device).manual_seed((seed + 0x9E3779B9 * t) % 2**31)
        run, part = (triton_adam, 2**17) if uses_triton(p) else (torch_adam, 2**11)  # stays in a CPU's cache
        for rows, grads in zip(grad.indices()[0].split(part), grad.values().split(part), strict=True):
            bits = rows  # float32 tables need none: any pointer will do
            if p.dtype == torch.bfloat16:
                bits = p.new_empty(grads.shape, dtype=torch.int16).random_(-(2**15), 2**15, generator=random)
            if len(rows) > 0:
                run(p, state["means"], state["squares"], rows, grads.contiguous(), bits, *scalars)

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)  # casts to the values' dtype: take the state as it was
        for i, state in state_dict["state"].items():
            p = self.tables[i]
            own = {"device": p.device, "copy": True, "memory_format": torch.contiguous_format}  # not mapped
            self.state[p] = {k: v.to(**own) if torch.is_tensor(v) else v for k, v in state.items()}


# --- selecting slots (memory.py says how and why) -------------------------------------------------------
# One program does for one head of one token what memory.product_topk does: two top-k, the candidates, their
# top-k. A score and its column travel in one integer, score's bits first: sorting one sorts both, exactly.


@triton.jit
def pack(score, column):
    """An int64 that orders as the scores do, then by column."""
    bits = score.to(tl.float32).to(tl.int32, bitcast=True)
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) << 32) | column  # negative floats, too


@triton.jit
def unpack(packed):
    """-> score float32, column int32"""
    bits = (packed >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True), packed.to(tl.int32)


@triton.jit
def best_of_row(row, N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr):
    """The BLOCK_K largest of N finite scores, largest first -> scores, columns (BLOCK_K,) each.
    The K largest lie in the K groups of neighbours with the largest maxima: sort these, then the groups."""
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
    a = tl.load(pairs + c, mask=c < P, other=0).to(tl.int32)
    b = tl.load(pairs + P + c, mask=c < P, other=0).to(tl.int32)
    total = tl.where(c < P, tl.gather(score1, a, 0) + tl.gather(score2, b, 0), float("-inf"))  # (BLOCK_P,)
    _, c = unpack(tl.topk(pack(total, c), BLOCK_K))  # (BLOCK_K,)
    rank = tl.arange(0, BLOCK_K)
    a = tl.load(pairs + c, mask=rank < K, other=0).to(tl.int32)
    b = tl.load(pairs + P + c, mask=rank < K, other=0).to(tl.int32)
    slot = tl.gather(column1, a, 0).to(tl.int64) * N + tl.gather(column2, b, 0)
    tl.store(slots + (h * n + t) * K + rank, slot, mask=rank < K)


def select_tile(N, K):
    """(BLOCK_N, BLOCK_K, GROUP, warps): groups of about the square root of N / K, 32 numbers a thread."""
    block_n, block_k = max(2, triton.next_power_of_2(N)), max(2, triton.next_power_of_2(K))
    group = 2 ** ((block_n // block_k).bit_length() // 2)
    return block_n, block_k, group, min(16, max(1, block_n // 1024))


def triton_select(scores, pairs, K):
    """As memory.select: scores (2, H, n, N), float32 or narrower -> slots (H, n, K) int64."""
    (_, H, n, N), P = scores.shape, pairs.size(1)
    slots = torch.empty(H, n, K, dtype=torch.int64, device=scores.device)
    block_n, block_k, group, warps = select_tile(N, K)
    blocks = block_n, block_k, max(block_k, triton.next_power_of_2(P)), group
    with torch.cuda.device_of(scores):
        select_kernel[(n, H)](scores.contiguous(), pairs, slots, n, N, H, K, P, *blocks, num_warps=warps)
    return slots


if __name__ == "__main__":
    from bench.lookup import main

    main()
