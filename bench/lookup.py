"""Check the lookup, RowAdam and the choice of slots against float64, then set the bytes they must move against a plain copy.

    python kernels.py                   the same as python bench/lookup.py
    TRITON_INTERPRET=1 python kernels.py     the checks of the Triton kernels alone, in Triton's interpreter
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from kernels import (
    RowAdam,
    group_by_row,
    lookup,
    lookup_backward_into,
    lookup_forward,
    lookup_reference,
    torch_adam,
    torch_backward,
    torch_forward,
    triton,
    triton_adam,
    triton_backward,
    triton_forward,
    triton_select,
)  # fmt: skip
from memory import candidate_pairs


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
            slots = triton_select(scores, candidate_pairs(K).to(device), K)
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
    """One row of the benchmark's table: {name: number}. copy: bytes a second that a plain copy moves."""
    values, indices, weights, grad = random_problem(n, k, S, D, dtype, device, slots)
    values.requires_grad_()
    weights.requires_grad_()
    optimizer, into = RowAdam([values]), (torch.zeros_like(values), torch.zeros(S, dtype=torch.uint8, device=device))

    def train(run):  # forward and backward
        values.grad = weights.grad = None
        run(values, indices, weights).backward(grad)

    def times(run, repeats=9):  # of forward alone, of both
        with torch.no_grad():
            alone = seconds(lambda: run(values, indices, weights), device, repeats)
        return alone, seconds(lambda: train(run), device, repeats)

    def own(values, indices, weights):  # as the model does
        return lookup(values, indices, weights, into)

    train(lookup)
    values.grad = values.grad.coalesce()  # as the model's is
    R, e = values.grad._nnz(), values.element_size()
    row = {"slots": slots, "S": S, "D": D, "R/S": R / S}
    with torch.no_grad():  # bytes as counted above the kernels, and the time in which they move
        parts = {
            "forward": ((n * k * D + n * D) * e, lambda: lookup_forward(values, indices, weights)),
            "backward": ((3 * R * D + n * D) * e, lambda: lookup_backward_into(values, indices, weights, grad, *into)),
            "RowAdam": ((3 * e + 16) * R * D, optimizer.step),
        }
        for name, (moved, run) in parts.items():
            t = seconds(run, device)
            row |= {f"{name}_ms": 1e3 * t, f"{name}_GB/s": moved / t / 1e9, f"{name}_share": moved / t / copy}
        row["sort_share"] = 1e3 * seconds(lambda: group_by_row(indices), device) / row["backward_ms"]
    del optimizer, parts, run  # and the moments
    ours = times(own)
    for name, run in (("definition", lookup_reference), ("embedding_bag", embedding_bag), ("sparse", embedding_bag_sparse)):
        try:
            row[name] = [theirs / mine for theirs, mine in zip(times(run, repeats=3), ours, strict=True)]
        except torch.OutOfMemoryError:
            row[name] = None
    if device.type == "cuda":
        values.grad = weights.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        train(own)
        row["memory"] = (torch.cuda.max_memory_allocated() - before) / (R * D * e)
    return row


def copy_speed(elements, dtype, device):
    """Bytes a second that a plain copy reads and writes: what no lookup can beat, unless a cache helps it."""
    source = torch.empty(elements, dtype=dtype, device=device).normal_()
    target = torch.empty_like(source)
    return 2 * elements * source.element_size() / seconds(lambda: target.copy_(source), device)


SHAPES = {  # tokens n, slots k that each reads, type, elements that the copy moves, and (which slots, S, D) of each row
    "cuda": dict(n=16384, k=128, dtype=torch.bfloat16, elements=2**29, cases=[
        *((slots, 2**20, 1024) for slots in ("uniform", "zipf", "equal")),
        *(("zipf", S, 1024) for S in (2**16, 2**18, 2**22)), *(("zipf", 2**20, D) for D in (256, 512, 2048)),
    ]),
    "cpu": dict(n=1024, k=64, dtype=torch.float32, elements=2**25, cases=[
        *((slots, 2**16, 64) for slots in ("uniform", "zipf", "equal")),
        *(("zipf", S, 64) for S in (2**14, 2**18, 2**20)), ("zipf", 2**16, 256),
    ]),
}  # fmt: skip


def benchmark(device, n, k, dtype, elements, cases):
    """Print the bytes that each part must move against what a plain copy moves in the same time, and the times of PyTorch's ways
    to do the same against those of lookup(). Returns the rows of the table as dictionaries."""
    copy, cuda, rows = copy_speed(elements, dtype, device), device.type == "cuda", []
    print(f"\n{n:,} tokens read {k} slots each, {str(dtype)[6:]}; a copy moves {copy / 1e9:,.0f} GB/s.")
    print(f"\n{'':28} |{'GB/s and share of that copy':^48} | times as long as lookup: forward alone / with backward")
    print(f"{'slots':8}{'S':>10}{'D':>5}  R/S |{'forward':>14}{'backward':>14}{'RowAdam':>14}  sort |", end="")
    print(f"{'definition':>15}{'embedding_bag':>15}{'its sparse':>15}" + (f"{'memory':>8}" if cuda else ""))
    for slots, S, D in cases:
        print(f"{slots:8}{S:10,}{D:5}", end="")
        try:
            row = measure(n, k, S, D, dtype, device, slots, copy)
        except torch.OutOfMemoryError:
            print("      | does not fit on this device", flush=True)
            torch.cuda.empty_cache()
            continue
        rows.append(row | {"copy_GB/s": copy / 1e9})
        line = f"{row['R/S']:5.0%} |"
        line += "".join(f"{row[f'{name}_GB/s']:9,.1f}{row[f'{name}_share']:5.0%}" for name in ("forward", "backward", "RowAdam"))
        line += f"{row['sort_share']:6.0%} |"
        for name in ("definition", "embedding_bag", "sparse"):
            cell = "does not fit" if row[name] is None else " / ".join(f"{ratio:.1f}" for ratio in row[name])
            line += f"{cell:>15}"
        print(line + (f"{row['memory']:8.2f}" if cuda else ""), flush=True)
    print("\nR/S: share of the slots that are read. sort: its share of backward. its sparse: embedding_bag(sparse=True).")
    if cuda:
        print("memory: peak of what lookup allocates forward and backward, in sizes of the rows that are read.")
    return rows


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
        benchmark(device, **SHAPES["cuda" if cuda else "cpu"])
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
