"""Check kernels.py (lookup, gradient, RowAdam, selection of slots) against float64, and time it.

    python bench/kernels.py                       on a GPU if there is one; or --device=cpu
    python bench/kernels.py --only=tiles          on a GPU: time Triton's kernels with other tiles
    TRITON_INTERPRET=1 python bench/kernels.py    without a GPU: only check the Triton kernels

A speed is the number of bytes that must move (kernels.py counts them), divided by the time. It is
printed in GB/s and as a share of the speed of a plain copy. kernels.py and memory.py explain the
letters.
"""

import contextlib
import os
import sys
import time
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench/ has a kernels.py, too
import kernels
from kernels import RowAdam, triton
from memory import ValuePool, candidate_ranks
from runtime.arguments import Parser
from runtime.device import choose_device
from runtime.files import fail

PATHS = {
    "pytorch": (kernels.torch_forward, kernels.torch_backward, kernels.torch_adam),
    "triton": (kernels.triton_forward, kernels.triton_backward, kernels.triton_adam),
}
WIDTHS = (1, 80, 200, 1024)
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
VERDICT = {True: "ok", False: "FAILED: too large, or a second run differs"}
ADAM = {"rate": 1.0, "beta1": 0.9, "beta2": 0.98, "eps": 1e-15}


def random_problem(n, k, S, D, dtype, device, reads="uniform"):
    """Make values (S, D), indices (n, k), weights (n, k), and a gradient of the output (n, D).
    reads: "uniform", or "zipf": the r-th most read slot in proportion to 1 / r."""
    generator = torch.Generator(device).manual_seed(0)
    values = torch.randn(S, D, generator=generator, device=device).to(dtype)
    rank = torch.rand(n, k, generator=generator, device=device, dtype=torch.float64)
    if reads == "uniform":
        rank = rank * S
    else:
        rank = S**rank - 1
    indices = rank.long() * 0x9E3779B1 % S  # an odd factor scatters the ranks over 2^i slots
    weights = torch.randn(n, k, generator=generator, device=device).softmax(-1)
    grad = torch.randn(n, D, generator=generator, device=device).to(dtype)
    return values, indices, weights, grad


# --- checks ---------------------------------------------------------------------------


def check_path(path, device, widths):
    """Print the errors of a path at awkward shapes. Returns True if all are small and a second
    run gives the same bits."""
    print(f"\n{path}: relative errors against float64")
    passed = True
    for dtype, D in product(TOLERANCES, widths):
        problem = random_problem(37, 13, 101, D, dtype, device)
        indices = problem[1]
        indices[0] = 7  # a token reads a slot more than once
        indices[1, :5] = 50
        indices[20:] = 3  # 221 pairs of one row, more than a piece
        got = results(path, *problem)
        again = results(path, *problem)
        want = brute_force(*problem, got["dV"])
        errors = {name: relative_error(got[name], want[name]) for name in want}
        same = all(torch.equal(got[name], again[name]) for name in want)
        ok = max(errors.values()) < TOLERANCES[dtype] and same
        passed = passed and ok
        numbers = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
        print(f"  {str(dtype)[6:]:8} width {D:4}: {numbers}  {VERDICT[ok]}", flush=True)
    return passed


def results(path, values, indices, weights, grad):
    """Return the results of a path: y, dV, dW, and how far RowAdam moves float32 values."""
    forward, backward, adam = PATHS[path]
    rows, grad_rows, dW = backward(values, indices, weights, grad)
    before = values.float()
    moved = before.clone()
    moments = (torch.zeros_like(moved), torch.ones_like(moved))
    adam(moved, *moments, rows, grad_rows, grad_rows, **ADAM)  # float32 needs no random bits
    return {
        "y": forward(values, indices, weights),
        "dV": torch.zeros_like(values).index_copy(0, rows, grad_rows),
        "dW": dW,
        "RowAdam": moved - before,
    }


def brute_force(values, indices, weights, grad, dV):
    """The same in float64, by the matrix form in kernels.py. dV: the gradient that RowAdam gets"""
    values, weights, grad, dV = (x.cpu().double() for x in (values, weights, grad, dV))
    indices = indices.cpu()
    W = torch.zeros(len(indices), len(values), dtype=torch.float64)  # (n, S)
    W.scatter_add_(1, indices, weights)
    mean = (1 - ADAM["beta1"]) * dV
    square = ADAM["beta2"] + (1 - ADAM["beta2"]) * dV**2
    return {
        "y": W @ values,
        "dV": W.T @ grad,
        "dW": (grad @ values.T).gather(1, indices),
        "RowAdam": -ADAM["rate"] * mean / (square.sqrt() + ADAM["eps"]),
    }


def relative_error(got, want):
    return ((got.cpu().double() - want).norm() / want.norm()).item()


def check_select(device):
    """Same as check_path, for triton_select. Compares its scores with a top-k over all sums."""
    print("\nselection in Triton: relative errors against float64")
    passed = True
    for (n, H, N, K), dtype in product(((3, 4, 128, 16), (2, 1, 500, 32)), TOLERANCES):
        scores = torch.randn(2, H, n, N, device=device).to(dtype)
        i, j = kernels.triton_select(scores, candidate_ranks(K).to(device), K).cpu()
        slots = i * N + j
        s1, s2 = scores.cpu().double()
        sums = (s1.unsqueeze(-1) + s2.unsqueeze(-2)).flatten(-2)  # (H, n, N * N)
        error = relative_error(sums.gather(-1, slots), sums.topk(K).values)
        ok = error < 1e-6 and all(len(set(row)) == K for row in slots.flatten(0, 1).tolist())
        passed = passed and ok
        print(f"  {str(dtype)[6:]:8} {K} of {N}: {error:.1e}  {VERDICT[ok]}", flush=True)
    return passed


# --- times ----------------------------------------------------------------------------


@dataclass
class Shape:
    """A problem to time. reads: as in random_problem"""

    reads: str
    S: int
    D: int
    n: int = 16384
    k: int = 128
    dtype: torch.dtype = torch.bfloat16


GPU_SHAPES = [
    Shape("zipf", 2**20, 1024),
    Shape("uniform", 2**20, 1024),
    Shape("zipf", 2**16, 1024),
    Shape("zipf", 2**20, 256),
]
CPU_SHAPES = [
    Shape("zipf", 2**20, 64, n=1024, k=64, dtype=torch.float32),
    Shape("uniform", 2**16, 64, n=1024, k=64, dtype=torch.float32),
    Shape("zipf", 2**16, 64, n=1024, k=64, dtype=torch.float32),
    Shape("zipf", 2**16, 256, n=1024, k=64, dtype=torch.float32),
]


def timed(run, device):
    """Seconds that run() takes, including its work on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def median_seconds(run, device, repeats=9):
    """Median time of run(), after two runs to warm up."""
    times = [timed(run, device) for _ in range(2 + repeats)]
    return sorted(times[2:])[repeats // 2]


def print_row(*cells):
    """Print a row of a Markdown table."""
    print(f"| {' | '.join(cells)} |", flush=True)


def print_header(*cells):
    print()
    print_row(*cells)
    print("|---" * len(cells) + "|")


def embedding_bag(values, indices, weights):
    """PyTorch's lookup. Its gradient has the size of the table."""
    weights = weights.to(values.dtype)
    return F.embedding_bag(indices, values, per_sample_weights=weights, mode="sum")


class Lookups:
    """A table, its optimiser, and one batch of reads."""

    def __init__(self, shape, device):
        sizes = (shape.n, shape.k, shape.S, shape.D)
        problem = random_problem(*sizes, shape.dtype, device, shape.reads)
        values, self.indices, self.weights, self.grad = problem
        self.pool = ValuePool(shape.S, shape.D, shape.dtype, initialize=False)
        self.pool.values = torch.nn.Parameter(values)
        self.weights.requires_grad_()
        self.optimizer = RowAdam(self.pool)
        self.state = {}
        _, self.rows, _ = kernels.group_by_row(self.indices)  # (R,)
        self.grad_rows = torch.ones_like(values[self.rows])

    def forward(self):
        return self.pool.lookup(self.indices, self.weights)

    def backward(self):
        tensors = (self.pool.values, self.indices, self.weights, self.grad)
        kernels.lookup_backward_into(*tensors, self.pool.gradient, self.pool.touched)

    def update(self):
        options = self.optimizer.param_groups[0]
        self.optimizer.update(self.pool.values, self.rows, self.grad_rows, self.state, options)

    def with_backward(self, forward):
        self.pool.values.grad = None
        self.weights.grad = None
        forward().backward(self.grad)


def measure(shape, device, copy):
    """Print a row of the table. copy: bytes a second"""
    lookups = Lookups(shape, device)
    R = len(lookups.rows)
    D = shape.D
    e = shape.dtype.itemsize
    parts = (  # bytes as counted above the kernels
        (lookups.forward, (shape.n * shape.k + shape.n) * D * e),
        (lookups.backward, (3 * R + shape.n) * D * e),
        (lookups.update, (3 * e + 16) * R * D),
    )
    cells = [f"{shape.reads}, {shape.S:,} slots of {D}", f"{R / shape.S:.0%}"]
    for run, moved in parts:
        with torch.no_grad():
            speed = moved / median_seconds(run, device)
        cells.append(f"{speed / 1e9:,.1f} ({speed / copy:.0%})")
    bag = partial(embedding_bag, lookups.pool.values, lookups.indices, lookups.weights)
    with torch.no_grad():
        ratio = median_seconds(bag, device) / median_seconds(lookups.forward, device)
    theirs = median_seconds(partial(lookups.with_backward, bag), device)
    ours = median_seconds(partial(lookups.with_backward, lookups.forward), device)
    print_row(*cells, f"{ratio:.1f} / {theirs / ours:.1f}")


def measure_all(device, shapes, elements):
    """elements: of the copy"""
    source = torch.zeros(elements, dtype=shapes[0].dtype, device=device)
    target = torch.ones_like(source)
    copy = 2 * source.nbytes / median_seconds(lambda: target.copy_(source), device)
    title = f"GB/s, and share of a copy, which moves {copy / 1e9:,.0f}"
    bag = "`F.embedding_bag` / ours: forward / with backward"
    print_header(title, "slots read", "forward", "backward", "`RowAdam`", bag)
    for shape in shapes:
        measure(shape, device, copy)


@torch.no_grad()
def time_tiles(device, shape, N, K):
    """Print the fastest tiles of each kernel, among those that kernels.py chooses and others."""
    D = shape.D
    x = Lookups(shape, device)
    tensors = (x.pool.values, x.indices, x.weights)
    scores = torch.randn(2, 4, shape.n, N, device=device)
    forward = partial(kernels.triton_forward, *tensors)
    backward = partial(kernels.triton_backward, *tensors, x.grad)
    select = partial(kernels.triton_select, scores, candidate_ranks(K).to(device), K)
    print_header("function that chooses the tile", "fastest tiles, ms")
    for name, run, candidates in (
        ("forward_tile", forward, product((1, 2, 4, 8), (D // 4, D // 2, D), (2, 4, 8))),
        ("backward_tile", backward, product((1, 2, 4, 8), (D,), (2, 4, 8, 16))),
        ("adam_warps", x.update, (1, 2, 4, 8, 16)),
        ("select_tile", select, product((N,), (K,), (2, 4), (1, 2, 4))),
    ):
        times = {"its own": median_seconds(run, device)}
        choose = getattr(kernels, name)
        for tile in candidates:
            setattr(kernels, name, lambda *_, tile=tile: tile)
            with contextlib.suppress(triton.errors.TritonError):  # one that does not fit the GPU
                times[tile] = median_seconds(run, device)
        setattr(kernels, name, choose)
        best = sorted(times, key=times.get)[:5]
        print_row(name, ", ".join(f"{tile} {1e3 * times[tile]:.3f}" for tile in best))


def main():
    parser = Parser(__doc__)
    parser.add_argument("--device", default="auto", help="cpu or cuda; default: a GPU if possible")
    parser.add_argument("--only", choices=("checks", "times", "tiles"), help="one part")
    args = parser.parse_args()
    device = choose_device(args.device)
    on_gpu = device.type == "cuda"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    paths = {"pytorch": WIDTHS}
    if on_gpu and kernels.HAS_TRITON:
        paths["triton"] = WIDTHS
    if interpreted:
        paths = {"triton": (1, 24, 96)}  # the interpreter is slow
    passed = []
    if args.only in ("checks", None):
        torch.set_float32_matmul_precision("highest")  # TF32 would spoil PyTorch's products
        passed = [check_path(path, device, widths) for path, widths in paths.items()]
        if "triton" in paths:
            passed.append(check_select(device))
    if args.only in ("times", None) and not interpreted:
        if on_gpu:
            measure_all(device, GPU_SHAPES, elements=2**29)
        else:
            measure_all(device, CPU_SHAPES, elements=2**25)
    if args.only == "tiles":
        if not on_gpu and not interpreted:
            raise ValueError("--only=tiles: is for a GPU")
        if on_gpu:
            time_tiles(device, GPU_SHAPES[0], N=1024, K=32)
        else:  # does the command work?
            time_tiles(device, Shape("zipf", 16, 16, n=1, k=2, dtype=torch.float32), N=8, K=2)
    if not all(passed):
        raise ValueError("a check has failed")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, KeyboardInterrupt) as error:
        fail(error)
