"""The lookup: y[i] = sum over j of weights[i, j] * values[indices[i, j]].

This is all that a memory layer does with its memory (Memory Layers at Scale, arXiv:2412.09764, section 3): every
token reads `k` rows of a table of `S` rows and adds them up, each with its own weight. In matrix form y = W V, where
W (n x S) holds k weights a row and zeros elsewhere. Its two gradients are then

    dV = W^T dY        row s of V collects the dY of every token that read it: a lookup with the roles swapped
    dW = dY V^T        wanted only where W is not zero: dweights[i, j] = dY[i] . values[indices[i, j]]

Read in this order: `lookup_reference` (the definition), `torch_forward` and `torch_backward` (the same, fast on a CPU),
the Triton kernels (the same on a GPU), `lookup` (what the model calls). `python kernels.py` checks and times them.

Letters: n bags (tokens), k slots read a bag (heads times top-k), S slots in the table, D width of a value,
R distinct rows touched, P = n * k pairs of bag and slot.
"""

import argparse
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
    triton = tl = types.SimpleNamespace(jit=lambda function: function, constexpr=None)

# PyTorch says once a process that compressed sparse rows are in beta; torch_backward uses them, for one product.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")


def lookup_reference(values, indices, weights):
    """The definition in one line. values (S, D), indices (n, k), weights (n, k) -> (n, D); sums in float32 or wider."""
    wide = torch.promote_types(values.dtype, torch.float32)
    return (values[indices].to(wide) * weights.to(wide).unsqueeze(-1)).sum(1).to(values.dtype)  # (n, k, D) -> (n, D)


def group_by_row(indices):
    """Sort the P pairs by the row they read. indices (n, k) -> order (P,), rows (R,), starts (R + 1,), all int64.

    Pairs `order[starts[r] : starts[r + 1]]` (numbered along indices.flatten()) are those that read `rows[r]`. The sort is
    stable, so each row's pairs stay in the order of the bags: sums over them come out the same, bit for bit, every time.
    """
    slots, order = indices.flatten().sort(stable=True)
    rows, counts = torch.unique_consecutive(slots, return_counts=True)
    return order, rows.long(), F.pad(counts.cumsum(0), (1, 0))


# --- PyTorch ----------------------------------------------------------------------------------------------------------


def torch_forward(values, indices, weights):
    """As lookup_reference, without the (n, k, D) tensor where PyTorch can do without it."""
    if values.device.type == "cpu" and values.dtype in (torch.float32, torch.float64) and indices.numel() > 0:
        return F.embedding_bag(indices, values, per_sample_weights=weights.to(values.dtype), mode="sum")
    return lookup_reference(values, indices, weights)


def torch_backward(values, indices, weights, grad):
    """grad (n, D) -> rows (R,), gradient of those rows of values (R, D), gradient of weights (n, k)."""
    (n, k), (order, rows, starts) = indices.shape, group_by_row(indices)
    bags, pair_weights = order // k, weights.flatten()[order].to(grad.dtype)  # (P,), (P,), grouped by row
    if values.device.type == "cpu" and values.dtype in (torch.float32, torch.float64) and indices.numel() > 0:
        # dV = W^T dY: bag r collects the gradients of the tokens that read row r. The same operator, roles swapped.
        grad_rows = F.embedding_bag(bags, grad, starts[:-1], per_sample_weights=pair_weights, mode="sum")
        # dW = dY V^T where W is not zero: W has k entries in each row, so its row offsets are multiples of k.
        crow = torch.arange(0, n * k + 1, k)
        pattern = torch.sparse_csr_tensor(
            crow, indices.flatten().long(), grad.new_zeros(n * k), (n, len(values)), check_invariants=False
        )
        grad_weights = torch.sparse.sampled_addmm(pattern, grad, values.t(), beta=0.0).values().view(n, k)
    else:
        group = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), starts.diff())  # (P,)
        wide = grad.float()
        grad_rows = torch.zeros(len(rows), values.size(1), device=grad.device)
        grad_rows = grad_rows.index_add_(0, group, wide[bags] * pair_weights.float().unsqueeze(-1)).to(values.dtype)
        grad_weights = torch.einsum("nkd,nd->nk", values[indices].float(), wide)
    return rows, grad_rows, grad_weights


# --- Triton -----------------------------------------------------------------------------------------------------------
# Bytes that must move at width D with e bytes a value (slot numbers and weights, 12 bytes a pair, are small beside a row):
#   forward    P * D * e   rows read (no cache holds a large table)   +  n * D * e  written
#   backward   R * D * e   rows read once, each by its one owner      +  R * D * e  written; dY is read from L2 if it fits
# D is a compile-time constant: the compiler then knows how rows are aligned and loads 16 bytes at once where it may.


@triton.jit
def forward_kernel(
    values, indices, weights, out, k, D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr
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
    values, weights, grad, order, rows, starts, grad_rows, grad_weights, k, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """One program owns one touched row: it reads it once, and walks over the pairs that read it."""
    r = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)  # (BLOCK_D,), the whole row
    row = tl.load(rows + r).to(tl.int64)
    value = tl.load(values + row * D + column, mask=column < D, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for p in range(tl.load(starts + r), tl.load(starts + r + 1)):
        pair = tl.load(order + p).to(tl.int64)  # = bag * k + j
        weight = tl.load(weights + pair).to(tl.float32)
        dy = tl.load(grad + (pair // k) * D + column, mask=column < D, other=0.0).to(tl.float32)
        total += weight * dy
        tl.store(grad_weights + pair, tl.sum(value * dy, 0).to(grad_weights.dtype.element_ty))
    tl.store(grad_rows + r * D + column, total.to(grad_rows.dtype.element_ty), mask=column < D)


def forward_tile(D):
    """(BLOCK_K, BLOCK_D, warps) of the forward kernel at width D."""
    block_d = min(triton.next_power_of_2(D), 1024)
    return max(4, 1024 // block_d), block_d, 4


def backward_tile(D):
    """(BLOCK_D, warps) of the backward kernel at width D: 8 columns a thread where 1 to 8 warps can give that."""
    block_d = triton.next_power_of_2(D)
    return block_d, min(8, max(1, block_d // 256))


def triton_forward(values, indices, weights):
    """As lookup_reference. All tensors contiguous."""
    (n, k), D = indices.shape, values.size(1)
    out = values.new_empty(n, D)
    if out.numel() > 0:
        block_k, block_d, warps = forward_tile(D)
        grid = (n, triton.cdiv(D, block_d))
        forward_kernel[grid](values, indices, weights, out, k, D, block_k, block_d, num_warps=warps)
    return out


def triton_backward(values, indices, weights, grad):
    """As torch_backward. All tensors contiguous."""
    k, D = indices.size(1), values.size(1)
    order, rows, starts = group_by_row(indices)
    grad_rows, grad_weights = values.new_empty(len(rows), D), torch.empty_like(weights, dtype=torch.float32)
    if len(rows) > 0:
        block_d, warps = backward_tile(D)
        tensors = (values, weights, grad, order, rows, starts, grad_rows, grad_weights)
        backward_kernel[(len(rows),)](*tensors, k, D, block_d, num_warps=warps)
    return rows, grad_rows, grad_weights


# --- what the model calls ---------------------------------------------------------------------------------------------


def uses_triton(values):
    return values.is_cuda and hasattr(triton, "cdiv")  # a GPU, and a system that Triton exists for


class Lookup(torch.autograd.Function):
    """Ties forward and backward together; the gradient of values touches only the rows that were read."""

    @staticmethod
    def forward(ctx, values, indices, weights):
        ctx.save_for_backward(values, indices, weights)
        run = triton_forward if uses_triton(values) else torch_forward
        with torch.cuda.device_of(values):  # Triton launches on the current device
            return run(values, indices, weights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        values, indices, weights = ctx.saved_tensors
        run = triton_backward if uses_triton(values) else torch_backward
        with torch.cuda.device_of(values):
            rows, grad_rows, grad_weights = run(values, indices, weights, grad.contiguous())
        grad_values = torch.sparse_coo_tensor(
            rows.unsqueeze(0), grad_rows, values.shape, is_coalesced=True, check_invariants=False
        )
        return grad_values, None, grad_weights.to(weights.dtype)


@torch.compiler.disable  # opaque to torch.compile: it does not trace sparse gradients
def lookup(values, indices, weights):
    """Weighted sum of table rows: out[i] = sum over j of weights[i, j] * values[indices[i, j]].

    values   (S, D) float32, bfloat16 or float16 (on a CPU also float64)
    indices  (n, k) int32 or int64, each in [0, S): not checked on a GPU
    weights  (n, k) floating point, best float32
    returns  (n, D) of values' dtype, summed in float32 or wider

    Differentiable in values and weights. The gradient of values is a coalesced torch.sparse_coo tensor over the rows that
    `indices` touches, so its size does not depend on S. (Autograd forgets that it is coalesced when it puts it into .grad.)
    The same inputs give the same bits every time. Raises ValueError for shapes, dtypes or devices that do not fit.
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
    return Lookup.apply(values.contiguous(), indices.contiguous(), weights.contiguous())


# --- python kernels.py ------------------------------------------------------------------------------------------------


def random_problem(n, k, S, D, dtype, device, seed=0):
    """values, indices, weights, and a gradient (n, D) that arrives from above."""
    generator = torch.Generator(device).manual_seed(seed)
    values = torch.randn(S, D, generator=generator, device=device).to(dtype)
    indices = torch.randint(S, (n, k), generator=generator, device=device)
    weights = torch.randn(n, k, generator=generator, device=device).softmax(-1)
    return values, indices, weights, torch.randn(n, D, generator=generator, device=device).to(dtype)


def brute_force(values, indices, weights, grad):
    """The matrix form of the first page, in float64 and with all of W: y, dV, dweights. For small problems."""
    values, indices, weights, grad = (t.cpu() for t in (values, indices, weights, grad))
    values, weights, grad = values.double(), weights.double(), grad.double()
    W = weights.new_zeros(len(indices), len(values))  # (n, S)
    W.scatter_add_(1, indices.long(), weights)
    return W @ values, W.T @ grad, (grad @ values.T).gather(1, indices.long())


def check(forward, backward, device):
    """Print the errors of forward and backward against brute_force at awkward shapes. Returns whether all are small."""
    passed = True
    print(f"{'width':>6} {'dtype':9} {'y':>9} {'dvalues':>9} {'dweights':>9}   relative error against float64")
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        for D in (1, 24, 64, 80, 96, 200, 768, 1024):
            values, indices, weights, grad = random_problem(37, 13, 101, D, dtype, device)
            indices[0], indices[1, :5] = 7, 50  # slots that come more than once in a bag
            rows, grad_rows, grad_weights = backward(values, indices, weights, grad)
            dvalues = torch.zeros_like(values).index_copy(0, rows, grad_rows)
            got = [t.cpu() for t in (forward(values, indices, weights), dvalues, grad_weights)]
            want = brute_force(values, indices, weights, grad)
            errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, want, strict=True)]
            passed &= max(errors) < tolerance
            verdict = "ok" if max(errors) < tolerance else f"FAILED: more than {tolerance:g}"
            print(f"{D:6} {str(dtype)[6:]:9} " + " ".join(f"{error:9.1e}" for error in errors) + f"   {verdict}")
    return passed


def seconds(run, device, repeats=20):
    """Median time of run() in seconds, after a warm-up."""
    times = []
    for _ in range(repeats + 3):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return sorted(times[3:])[repeats // 2]


def benchmark(device):
    """Time each implementation, and set the bytes it must move against what a plain copy moves in the same time."""
    cuda = device.type == "cuda"
    n, k, S, D, dtype = (16384, 128, 2**20, 1024, torch.bfloat16) if cuda else (1024, 64, 2**20, 64, torch.float32)
    values, indices, weights, grad = random_problem(n, k, S, D, dtype, device)
    rows, e = indices.unique().numel(), values.element_size()
    source = torch.empty(2**28 if cuda else 2**25, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.numel() * source.element_size() / seconds(lambda: target.copy_(source), device) / 1e9
    print(f"\nn={n:,} tokens, k={k} slots each, S={S:,} slots of width D={D}, {str(dtype)[6:]}; a copy moves {copy:,.0f} GB/s")
    forward_bytes, backward_bytes = (n * k * D + n * D) * e, (2 * rows * D + n * D) * e
    runs = [
        ("forward, definition", forward_bytes, lambda: lookup_reference(values, indices, weights)),
        ("forward, PyTorch", forward_bytes, lambda: torch_forward(values, indices, weights)),
        ("backward, PyTorch", backward_bytes, lambda: torch_backward(values, indices, weights, grad)),
    ]
    if cuda:
        runs += [
            ("forward, Triton", forward_bytes, lambda: triton_forward(values, indices, weights)),
            ("backward, Triton", backward_bytes, lambda: triton_backward(values, indices, weights, grad)),
        ]
    runs.append(("of backward, the sort", 0, lambda: group_by_row(indices)))
    for name, moved, run in runs:
        try:
            t = seconds(run, device, 20 if cuda else 10)
        except torch.OutOfMemoryError:
            print(f"  {name:22}   does not fit")
            continue
        speed = f"{moved / t / 1e9:9,.1f} GB/s = {moved / t / 1e9 / copy:5.1%} of a copy" if moved else ""
        print(f"  {name:22} {t * 1e3:9.3f} ms {speed}")


def main():
    parser = argparse.ArgumentParser(
        description="Check the lookup against float64, then time it. Without a GPU the Triton kernels are checked only if "
        "TRITON_INTERPRET=1 is set, which runs them, slowly, on the CPU."
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    try:
        device = torch.device(parser.parse_args().device)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        sys.exit(f"kernels.py: this --device cannot be used here ({str(error).splitlines()[0]}); try --device=cpu")
    interpreted = device.type == "cpu" and hasattr(triton, "knobs") and triton.knobs.runtime.interpret
    print(f"PyTorch {torch.__version__} on {torch.cuda.get_device_name(device) if device.type == 'cuda' else device}")
    passed = check(torch_forward, torch_backward, device)
    if device.type == "cuda" or interpreted:
        print(f"\nTriton {triton.__version__}" + (", interpreted" if interpreted else ""))
        passed &= check(triton_forward, triton_backward, device)
    else:
        print("\nTriton: not checked (no GPU; set TRITON_INTERPRET=1 to run the kernels on the CPU)")
    if not interpreted:
        benchmark(device)
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
