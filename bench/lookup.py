"""Check kernels.py (lookup, gradient, RowAdam, selection of slots) against float64, then time it.

    python bench/lookup.py                        on a GPU, or with --device=cpu; without a GPU the Triton
                                                  kernels are checked in Triton's interpreter, and not timed
    TRITON_INTERPRET=1 python bench/lookup.py     those checks alone

Times are given as GB/s, the bytes that must move a second, and as a share of what a plain copy reaches.
"""

import os
import subprocess
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import kernels
from kernels import RowAdam, definition, lookup, triton
from memory import ValuePool, candidate_ranks

PATHS = {
    "pytorch": (kernels.torch_forward, kernels.torch_backward, kernels.torch_adam),
    "triton": (kernels.triton_forward, kernels.triton_backward, kernels.triton_adam),
}


def random_problem(n, k, S, D, dtype, device, slots="uniform", seed=0):
    """values, indices, weights, and a gradient (n, D) that arrives from above.

    slots: which are read. "uniform"; "zipf": the r-th most read slot in proportion to 1 / r; "equal": all
    pairs read one."""
    generator = torch.Generator(device).manual_seed(seed)
    values = torch.randn(S, D, generator=generator, device=device).to(dtype)
    u = torch.rand(n, k, generator=generator, device=device, dtype=torch.float64)
    rank = {"uniform": u * S, "zipf": S**u - 1, "equal": 0 * u}[slots].long()
    indices = (
        rank * 0x9E3779B1 % S
    )  # an odd factor scatters the popular slots over a table of 2^i rows
    weights = torch.randn(n, k, generator=generator, device=device).softmax(-1)
    return values, indices, weights, torch.randn(n, D, generator=generator, device=device).to(dtype)


def brute_force(values, indices, weights, grad):
    """The matrix form in the docstring of kernels.py, in float64 and with all of W: y, dV, dweights."""
    values, indices, weights, grad = (t.cpu() for t in (values, indices, weights, grad))
    values, weights, grad = values.double(), weights.double(), grad.double()
    W = weights.new_zeros(len(indices), len(values))  # (n, S)
    W.scatter_add_(1, indices.long(), weights)
    return W @ values, W.T @ grad, (grad @ values.T).gather(1, indices.long())


def brute_force_adam(values, rows, grads, rate, beta1, beta2, eps):
    """A step of RowAdam with zero moments before it, in float64, over the whole table."""
    grad = torch.zeros_like(values, dtype=torch.float64).index_add_(0, rows, grads.double())
    return values.double() - rate * (1 - beta1) * grad / (
        ((1 - beta2) * grad.square()).sqrt() + eps
    )


def check(forward, backward, adam, device, widths=(1, 24, 64, 80, 96, 200, 768, 1024)):
    """Print the errors of forward, backward and adam against float64 at awkward shapes.

    Returns whether all are small and a second run gives the same bits."""
    passed = True
    columns = ("y", "dvalues", "dweights", "adam")
    header = "".join(f"{name:>10}" for name in columns)
    print(f"{'width':>6} {'dtype':9}{header}   relative error against float64")
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        for D in widths:
            values, indices, weights, grad = random_problem(37, 13, 101, D, dtype, device)
            indices[0], indices[1, :5] = 7, 50  # slots that come more than once in a bag
            indices[20:] = 3  # 221 pairs of one row: more than a piece
            first, second = (backward(values, indices, weights, grad) for _ in range(2))
            rows, grad_rows, grad_weights = first
            dvalues = torch.zeros_like(values).index_copy(0, rows, grad_rows)
            moved, rates = values.float().clone(), (0.1, 0.9, 0.98, 1e-15)
            moments = torch.zeros_like(moved), torch.zeros_like(moved)
            adam(
                moved, *moments, rows, grad_rows, rows, *rates
            )  # float32 tables need no random bits
            y = forward(values, indices, weights)
            got = [y, dvalues, grad_weights, moved - values.float()]
            want = [*brute_force(values, indices, weights, grad), None]
            want[3] = (
                brute_force_adam(values, rows, grad_rows, *rates).cpu() - values.cpu().double()
            )
            pairs = zip(got, want, strict=True)
            errors = [((a.cpu().double() - b).norm() / b.norm()).item() for a, b in pairs]
            same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
            same &= torch.equal(y, forward(values, indices, weights))
            passed &= max(errors) < tolerance and same
            verdict = "ok" if max(errors) < tolerance else f"FAILED: more than {tolerance:g}"
            verdict += "" if same else ", FAILED: a second run differs"
            row = "".join(f"{error:10.1e}" for error in errors)
            print(f"{D:6} {str(dtype)[6:]:9}{row}   {verdict}")
    return passed


def check_select(device):
    """The same for triton_select: the scores of its slots against a top-k over all N * N sums in float64."""
    passed = True
    for n, H, N, K in ((5, 2, 24, 5), (3, 4, 128, 16), (2, 1, 500, 32)):
        for dtype in (torch.float32, torch.bfloat16):
            generator = torch.Generator(device).manual_seed(0)
            scores = torch.randn(2, H, n, N, generator=generator, device=device).to(dtype)
            slots = kernels.triton_select(scores, candidate_ranks(K).to(device), K)
            s1, s2 = scores.double()
            got = s1.gather(-1, slots // N) + s2.gather(-1, slots % N)  # (H, n, K)
            want = (s1.unsqueeze(-1) + s2.unsqueeze(-2)).flatten(-2).topk(K).values
            repeated = sum(len(set(row)) < K for row in slots.flatten(0, 1).tolist())
            error = ((got - want).norm() / want.norm()).item()
            ok = error < 1e-6 and not repeated
            passed &= ok
            verdict = (
                "ok" if ok else f"FAILED: more than 1e-06, or {repeated} rows with a slot twice"
            )
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
    """PyTorch's operator. Its gradient has the table's size, or is sparse and not yet summed over pairs."""
    weights = weights.to(values.dtype)
    return F.embedding_bag(indices, values, per_sample_weights=weights, mode="sum", sparse=sparse)


def measure(n, k, S, D, dtype, device, slots, copy):
    """One row of the benchmark's table: {name: number}. copy: bytes a second that a plain copy moves."""
    table, indices, weights, grad = random_problem(n, k, S, D, dtype, device, slots)
    pool = ValuePool(S, D, dtype, initialize=False)
    pool.values = torch.nn.Parameter(table)
    values = pool.values
    weights.requires_grad_()
    optimizer = RowAdam(pool)

    def train(run):  # forward and backward
        values.grad = weights.grad = None
        run(values, indices, weights).backward(grad)

    def times(run, repeats=9):  # of forward alone, of both
        with torch.no_grad():
            alone = seconds(lambda: run(values, indices, weights), device, repeats)
        return alone, seconds(lambda: train(run), device, repeats)

    def own(values, indices, weights):  # as the model does
        return pool.lookup(indices, weights)

    train(lookup)
    gradient = values.grad.coalesce()
    rows, grads = gradient.indices()[0], gradient.values()
    state, options = optimizer.state[values], optimizer.param_groups[0]
    R, e = len(rows), values.element_size()
    row = {"slots": slots, "S": S, "D": D, "R/S": R / S}
    tensors = values, indices, weights
    into = pool.gradient, pool.touched
    step = kernels.lookup_backward_into
    update = partial(optimizer.update, values, rows, grads, state, options)
    with torch.no_grad():  # bytes as counted above the kernels, and the time in which they move
        parts = {
            "forward": ((n * k * D + n * D) * e, lambda: kernels.lookup_forward(*tensors)),
            "backward": ((3 * R * D + n * D) * e, lambda: step(*tensors, grad, *into)),
            "RowAdam": ((3 * e + 16) * R * D, update),
        }
        for name, (moved, run) in parts.items():
            t = seconds(run, device)
            row |= {
                f"{name}_ms": 1e3 * t,
                f"{name}_GB/s": moved / t / 1e9,
                f"{name}_share": moved / t / copy,
            }
        sort = seconds(lambda: kernels.group_by_row(indices), device)
        row["sort_share"] = 1e3 * sort / row["backward_ms"]
    del optimizer, state, rows, grads, update, parts, run  # and the moments
    ours, sparse = times(own), partial(embedding_bag, sparse=True)
    others = {"definition": definition, "embedding_bag": embedding_bag, "sparse": sparse}
    for name, run in others.items():
        try:
            row[name] = [
                theirs / mine for theirs, mine in zip(times(run, repeats=3), ours, strict=True)
            ]
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
    """Bytes a second that a plain copy reads and writes: the limit of a lookup that no cache helps."""
    source = torch.empty(elements, dtype=dtype, device=device).normal_()
    target = torch.empty_like(source)
    return 2 * elements * source.element_size() / seconds(lambda: target.copy_(source), device)


SHAPES = {  # n tokens, k slots each, dtype, elements of the copy, and (which slots, S, D) of each row
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
    """Print what each part reaches against a plain copy, and other implementations against lookup().

    Returns the rows of the table as dictionaries."""
    copy, cuda, rows = copy_speed(elements, dtype, device), device.type == "cuda", []
    names = "forward", "backward", "RowAdam"
    print(
        f"\n{n:,} tokens read {k} slots each, {str(dtype)[6:]}; a copy moves {copy / 1e9:,.0f} GB/s."
    )
    print(f"\n{'':28} |{'GB/s and share of that copy':^48} | ", end="")
    print("times as long as lookup: forward alone / with backward")
    print(
        f"{'slots':8}{'S':>10}{'D':>5}  R/S |" + "".join(f"{name:>14}" for name in names),
        end="  sort |",
    )
    print(
        f"{'definition':>15}{'embedding_bag':>15}{'its sparse':>15}"
        + (f"{'memory':>8}" if cuda else "")
    )
    for slots, S, D in cases:
        print(f"{slots:8}{S:10,}{D:5}", end="")
        try:
            row = measure(n, k, S, D, dtype, device, slots, copy)
        except torch.OutOfMemoryError:
            print("      | does not fit on this device", flush=True)
            torch.cuda.empty_cache()
            continue
        rows.append(row | {"copy_GB/s": copy / 1e9})
        line = "".join(f"{row[f'{name}_GB/s']:9,.1f}{row[f'{name}_share']:5.0%}" for name in names)
        line = f"{row['R/S']:5.0%} |{line}{row['sort_share']:6.0%} |"
        for name in ("definition", "embedding_bag", "sparse"):
            cell = (
                "does not fit"
                if row[name] is None
                else " / ".join(f"{ratio:.1f}" for ratio in row[name])
            )
            line += f"{cell:>15}"
        print(line + (f"{row['memory']:8.2f}" if cuda else ""), flush=True)
    print(
        "\nR/S: share of the slots that are read. sort: its share of backward. its sparse: sparse=True."
    )
    if cuda:
        print(
            "memory: peak of what lookup allocates forward and backward, in sizes of the rows read."
        )
    return rows


def tiles(device, n, k, S, widths, dtype, N, K, repeats=9):
    """Time each kernel with its own tile and with others: what forward_tile, backward_tile, adam_warps and
    select_tile of kernels.py are to be chosen by. Left out: few numbers a thread, or hundreds.

    Prints the best, and returns {kernel: [[tile, milliseconds], ...]}, the fastest first."""
    powers, result = [2**i for i in range(6)], {}
    scores, pairs = torch.randn(2, 4, n, N, device=device), candidate_ranks(K).to(device)
    groups = [
        (N, K, group, warps) for group in powers[1:] for warps in powers[:3] if N // group >= K
    ]
    select = partial(kernels.triton_select, scores, pairs, K)
    jobs = []
    for D in widths:
        values, indices, weights, grad = random_problem(n, k, S, D, dtype, device, "zipf")
        rows = kernels.group_by_row(indices)[1]
        state = values, *(torch.zeros(S, D, device=device) for _ in range(2)), rows, values[rows]
        bits = torch.zeros(len(rows), D, dtype=torch.int16, device=device)
        step = partial(kernels.triton_adam, *state, bits, 1e-6, 0.9, 0.98, 1e-15)
        forward = partial(kernels.triton_forward, values, indices, weights)
        backward = partial(kernels.triton_backward, values, indices, weights, grad)
        blocks = [(p, d, w) for d in (D // 4, D // 2, D) for p in powers for w in powers]
        blocks = [(p, d, w) for p, d, w in blocks if 4 <= p * d // 32 // w <= 64]
        whole = [(p, d, w) for p, d, w in blocks if d == D]
        jobs.append((f"forward, width {D}", "forward_tile", (D,), forward, blocks))
        jobs.append((f"backward, width {D}", "backward_tile", (D,), backward, whole))
        jobs.append((f"RowAdam, width {D}", "adam_warps", (D,), step, powers))
    jobs.append((f"select {K} of {N}", "select_tile", (N, K), select, groups))  # slow to compile
    for label, name, arguments, run, others in jobs:
        choose = getattr(kernels, name)
        own, times = choose(*arguments), []
        for tile in dict.fromkeys([own, *others]):
            setattr(kernels, name, lambda *_, tile=tile: tile)
            try:
                times.append([tile, 1e3 * seconds(run, device, repeats)])
            except (RuntimeError, triton.errors.TritonError) as error:
                print(f"{label}: {tile} cannot be used ({str(error).splitlines()[0]})")
        setattr(kernels, name, choose)
        result[label] = times = sorted(times, key=lambda pair: pair[1])
        best = ", ".join(f"{tile} {ms:.3f}" for tile, ms in times[:4])
        print(f"{label}: own {own} {dict(times)[own]:.3f} ms; the fastest {best}", flush=True)
    return result


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help="default: %(default)s")
    try:
        device = torch.device(parser.parse_args().device)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        sys.exit(f"lookup.py: this --device cannot be used here ({reason}); try --device=cpu")
    cuda, interpreted = device.type == "cuda", os.environ.get("TRITON_INTERPRET") == "1"
    passed = True
    if cuda or not interpreted:
        print(
            f"PyTorch {torch.__version__} on {torch.cuda.get_device_name(device) if cuda else device}"
        )
        passed = check(*PATHS["pytorch"], device)
    if not kernels.HAS_TRITON:
        print(
            "\nTriton: not installed, and not there for every system; its kernels are not checked"
        )
    elif cuda or interpreted:
        print(
            f"\nTriton {triton.__version__}" + ("" if cuda else ", interpreted on the CPU"),
            flush=True,
        )
        widths = (
            {} if cuda else {"widths": (1, 24, 96)}
        )  # the interpreter is slow; tests have the others
        passed &= check(*PATHS["triton"], device, **widths)
        passed &= check_select(device)
    else:  # the interpreter has to be asked for before Triton is imported: in another process
        sys.stdout.flush()
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        passed &= subprocess.run([sys.executable, __file__], env=environment).returncode == 0
    if not interpreted:
        benchmark(device, **SHAPES["cuda" if cuda else "cpu"])
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
