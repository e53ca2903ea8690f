"""The lookup against brute force in float64, at awkward widths, on both paths; and what the compiler makes of the kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels
from kernels import lookup

ROOT = Path(__file__).resolve().parents[1]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WIDTHS = (1, 24, 64, 80, 96, 200)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}

triton = pytest.importorskip("triton", reason="there is no Triton for this platform")


@pytest.fixture(params=["pytorch", "triton"])
def path(request, monkeypatch):
    """Run lookup on either path, whatever the device: Triton's interpreter takes CPU tensors."""
    monkeypatch.setattr(kernels, "uses_triton", lambda values: request.param == "triton")
    return request.param


def problem(n=29, k=11, S=53, D=64, dtype=torch.float32, index_dtype=torch.int64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(S, D, generator=generator)
    indices = torch.randint(S - 9, (n, k), generator=generator)  # the last nine rows are never read
    indices[0], indices[1, :4] = 5, 7  # duplicates within a bag
    weights, grad = torch.randn(n, k, generator=generator), torch.randn(n, D, generator=generator)
    values, grad = values.to(dtype), grad.to(dtype)
    return (t.to(DEVICE) for t in (values, indices.to(index_dtype), weights, grad))


def brute_force(values, indices, weights, grad):
    """Loops over bags and slots in float64."""
    values, weights, grad = values.double(), weights.double(), grad.double()
    y, dvalues, dweights = torch.zeros_like(grad), torch.zeros_like(values), torch.zeros_like(weights)
    for i, row in enumerate(indices.tolist()):
        for j, slot in enumerate(row):
            y[i] += weights[i, j] * values[slot]
            dvalues[slot] += weights[i, j] * grad[i]
            dweights[i, j] = grad[i] @ values[slot]
    return y, dvalues, dweights


def run(values, indices, weights, grad):
    """Output of lookup and its two gradients, that of values still sparse."""
    values, weights = values.detach().requires_grad_(), weights.detach().requires_grad_()
    y = lookup(values, indices, weights)
    return y.detach(), *torch.autograd.grad(y, (values, weights), grad)


def assert_near(got, want, tolerance):
    assert got.shape == want.shape
    assert (got.double() - want).norm() <= tolerance * want.norm()


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("D", WIDTHS)
def test_lookup_and_gradients_equal_brute_force(path, D, dtype, index_dtype):
    inputs = list(problem(D=D, dtype=dtype, index_dtype=index_dtype))
    for got, want in zip(run(*inputs), brute_force(*inputs), strict=True):
        assert_near(got.to_dense(), want, TOLERANCE[dtype])


@pytest.mark.skipif(DEVICE.type == "cuda", reason="float64 is for the CPU")
def test_lookup_is_exact_in_float64():
    values, indices, weights, grad = problem(n=5, k=4, S=13, D=3, dtype=torch.float64)
    weights = weights.double()
    for got, want in zip(run(values, indices, weights, grad), brute_force(values, indices, weights, grad), strict=True):
        assert_near(got.to_dense(), want, 1e-12)


def test_gradient_of_values_is_coalesced_and_holds_only_touched_rows(path):
    values, indices, weights, grad = problem(S=1000)
    _, sparse, _ = run(values, indices, weights, grad)
    assert sparse.is_sparse and sparse.is_coalesced()
    assert torch.equal(sparse.indices()[0], indices.unique())  # sorted, each once
    assert sparse.values().shape == (indices.unique().numel(), values.size(1))


def test_same_bits_every_time(path):
    inputs = list(problem(n=64, k=32, S=40, D=96))
    first, second = run(*inputs), run(*inputs)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.to_dense(), b.to_dense())


def test_paths_agree_inside_a_step_of_a_sparse_optimiser(monkeypatch):
    tables = []
    for triton_path in (False, True):
        monkeypatch.setattr(kernels, "uses_triton", lambda values, chosen=triton_path: chosen)
        values, indices, weights, grad = problem(D=24)
        table = torch.nn.Parameter(values.clone())
        optimizer = torch.optim.SparseAdam([table], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            lookup(table, indices, weights).backward(grad)
            optimizer.step()
        untouched = torch.ones(len(values), dtype=torch.bool)
        untouched[indices.unique().cpu()] = False
        assert torch.equal(table.detach().cpu()[untouched], values.cpu()[untouched])
        tables.append(table.detach())
    torch.testing.assert_close(tables[0], tables[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n, k", [(0, 5), (3, 0)])
def test_nothing_to_look_up_gives_zeros(path, n, k):
    values = torch.randn(10, 24, device=DEVICE)
    empty = torch.zeros(n, k, dtype=torch.int64, device=DEVICE)
    y, dvalues, dweights = run(values, empty, torch.zeros(n, k, device=DEVICE), torch.ones(n, 24, device=DEVICE))
    assert torch.equal(y, torch.zeros_like(y)) and y.shape == (n, 24)
    assert dvalues._nnz() == 0 and dweights.shape == (n, k)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_rows_past_2_to_31_elements_are_addressed_right(path, index_dtype):
    """Row 2^25 + 3 of width 96 begins at element 3.2e9. The table is 12.9 GB of address space, of which a few pages exist."""
    S, D = 2**25 + 8, 96
    values = torch.empty(S, D, device=DEVICE)  # never filled: the operating system gives no memory to untouched pages
    rows = torch.tensor([0, 2**31 // D, 2**31 // D + 1, 2**25 + 3, S - 1], device=DEVICE)
    values[rows] = torch.randn(len(rows), D, device=DEVICE)
    assert rows[2] * D > 2**31
    indices, weights = rows[torch.tensor([[0, 3, 4], [1, 2, 3]])].to(index_dtype), torch.rand(2, 3, device=DEVICE)
    grad = torch.randn(2, D, device=DEVICE)
    y, dvalues, dweights = run(values, indices, weights, grad)
    small = torch.tensor([[0, 3, 4], [1, 2, 3]])
    want = brute_force(values[rows].cpu(), small, weights.cpu(), grad.cpu())
    assert torch.equal(dvalues.indices()[0], rows)
    for got, expected in zip((y, dvalues.values(), dweights), want, strict=True):
        assert_near(got.cpu(), expected, 1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(values=torch.zeros(4)), "wants values"),
        (dict(indices=torch.zeros(2, 4, dtype=torch.int64)), "wants values"),
        (dict(indices=torch.zeros(2, 3)), "int32 or int64"),
        (dict(weights=torch.zeros(2, 3, dtype=torch.int64)), "floating-point"),
        (dict(values=torch.zeros(4, 8, device="meta")), "one device"),
    ],
)
def test_wrong_inputs_are_refused_with_a_reason(change, message):
    inputs = dict(values=torch.zeros(4, 8), indices=torch.zeros(2, 3, dtype=torch.int64), weights=torch.zeros(2, 3)) | change
    with pytest.raises(ValueError, match=message):
        lookup(**inputs)


@pytest.mark.parametrize("D", [96, 768, 1024])
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_without_spills_and_load_16_bytes(capability, D):
    """A second process, because the interpreter is on in this one."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, ROOT / "tests" / "compile_report.py", str(capability), str(D)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in report] == ["forward", "backward"]
    for name, spilled, wide, narrow in report:
        assert spilled == "0", f"{name} spills {spilled} bytes"
        if D == 768:
            assert int(wide) > 0 and narrow == "0", f"{name} has {wide} loads of 16 bytes, and {narrow} of 2 or 4"
