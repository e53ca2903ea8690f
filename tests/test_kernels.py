"""The lookup against brute force in float64, at awkward widths, on both paths; and what the compiler makes of the kernels."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import kernels
from kernels import RowAdam, collecting_lookup, lookup
from memory import ValuePool

ROOT = Path(__file__).resolve().parents[1]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WIDTHS = (1, 24, 64, 80, 200)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}

triton = pytest.importorskip("triton", reason="there is no Triton for this platform")


@pytest.fixture(params=["pytorch", "triton"])
def path(request, monkeypatch):
    """Run lookup on either path, whatever the device: Triton's interpreter takes CPU tensors."""
    monkeypatch.setattr(kernels, "uses_triton", lambda values: request.param == "triton")
    return request.param


def problem(n=12, k=11, S=33, D=64, dtype=torch.float32, index_dtype=torch.int64, seed=0):
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
    y, dvalues, dweights = (
        torch.zeros_like(grad),
        torch.zeros_like(values),
        torch.zeros_like(weights),
    )
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


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("D", WIDTHS)
def test_lookup_and_gradients_equal_brute_force(path, D, dtype):
    inputs = list(
        problem(D=D, dtype=dtype, index_dtype=(torch.int32, torch.int64)[WIDTHS.index(D) % 2])
    )
    for got, want in zip(run(*inputs), brute_force(*inputs), strict=True):
        assert_near(got.to_dense(), want, TOLERANCE[dtype])


@pytest.mark.skipif(DEVICE.type == "cuda", reason="float64 is for the CPU")
def test_lookup_is_exact_in_float64():
    values, indices, weights, grad = problem(n=5, k=4, S=13, D=3, dtype=torch.float64)
    weights = weights.double()
    for got, want in zip(
        run(values, indices, weights, grad),
        brute_force(values, indices, weights, grad),
        strict=True,
    ):
        assert_near(got.to_dense(), want, 1e-12)


def test_gradient_of_values_is_coalesced_and_holds_only_touched_rows(path):
    values, indices, weights, grad = problem(n=6, S=1000)
    _, sparse, _ = run(values, indices, weights, grad)
    assert sparse.is_sparse and sparse.is_coalesced()
    assert torch.equal(sparse.indices()[0], indices.unique())  # sorted, each once
    assert sparse.values().shape == (indices.unique().numel(), values.size(1))


def assert_equals_brute_force(inputs):
    got = run(*inputs)
    for a, b in zip(got, brute_force(*inputs), strict=True):
        assert_near(a.to_dense(), b, 1e-5)
    return got


def test_rows_that_very_many_pairs_read_are_cut_into_pieces(path):
    """Row 7 is read by exactly PIECE pairs, row 8 by one more, row 3 by more than two pieces, also by whole bags."""
    values, indices, weights, grad = problem(n=30, k=20, S=18, D=24)
    end = 2 * kernels.PIECE + 1
    indices.view(-1)[: kernels.PIECE] = 7
    indices.view(-1)[kernels.PIECE : end] = 8
    indices.view(-1)[end:] = 3
    indices.view(-1)[end : end + 6] = torch.arange(6, device=DEVICE)
    counts = indices.flatten().bincount(minlength=18)
    assert counts[7] == kernels.PIECE and counts[8] == kernels.PIECE + 1
    assert 2 * kernels.PIECE < counts[3] < 3 * kernels.PIECE
    assert_equals_brute_force((values, indices, weights, grad))


def test_the_gradients_of_very_many_pieces_are_added_in_the_same_order_each_time(path, monkeypatch):
    """All pairs read one row."""
    values, indices, weights, grad = problem(D=24)
    inputs = (values, torch.zeros_like(indices), weights, grad)
    assert_equals_brute_force(inputs)
    monkeypatch.setattr(kernels, "PIECE", 3)  # a sum of 44 pieces
    first = assert_equals_brute_force(inputs)
    for a, b in zip(first, run(*inputs), strict=True):
        assert torch.equal(a.to_dense(), b.to_dense())


def test_nothing_of_the_tables_size_is_made_on_the_way_back():
    """Bytes that PyTorch's allocator hands out in a backward pass, counted by its profiler: the same for 100 times the slots."""
    allocated = []
    for S in (2**12, 100 * 2**12):
        values, indices, weights, grad = problem(S=4096, n=64, k=16, D=32)
        values = torch.zeros(S, 32, device=DEVICE)
        with torch.profiler.profile(profile_memory=True) as profile:
            run(values, indices, weights, grad)
        events = profile.key_averages()
        name = "self_device_memory_usage" if DEVICE.type == "cuda" else "self_cpu_memory_usage"
        allocated.append(sum(max(0, getattr(event, name)) for event in events))
    assert 0 < allocated[1] < 1.01 * allocated[0]


def test_gradients_that_are_collected_are_the_sum_of_the_sparse_ones(path, monkeypatch):
    """Three lookups in one table, of which two read a row that is cut into pieces: what the table of gradients gets, and which rows are marked."""
    monkeypatch.setattr(kernels, "PIECE", 16)
    for dtype in (torch.float32, torch.bfloat16):
        problems = [list(problem(n=5, D=40, dtype=dtype, seed=seed)) for seed in range(3)]
        values, wants, results = problems[0][0], [], []
        for number, (_, indices, weights, grad) in enumerate(problems):
            if number < 2:
                indices[2:4] = 21  # 22 pairs
            wants.append(brute_force(values, indices, weights, grad))
        for _ in range(2):
            leaf = values.clone().requires_grad_()
            into = (
                torch.zeros_like(values),
                torch.zeros(len(values), dtype=torch.uint8, device=DEVICE),
            )
            for (_, indices, weights, grad), (y, _, dweights) in zip(problems, wants, strict=True):
                weights = weights.clone().requires_grad_()
                out = collecting_lookup(leaf, indices, weights, *into)
                out.backward(grad)
                assert_near(out, y, TOLERANCE[dtype])
                assert_near(weights.grad, dweights, TOLERANCE[dtype])
            assert leaf.grad is None
            results.append(into)
        assert_near(into[0], sum(dvalues for _, dvalues, _ in wants), TOLERANCE[dtype])
        read = torch.cat([indices.flatten() for _, indices, _, _ in problems]).unique()
        assert torch.equal(into[1].nonzero().flatten(), read) and len(read) < len(values)
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))  # the same bits


def test_the_pytorch_path_adds_up_in_a_fixed_order():
    """On a GPU index_add_ and scatter_add_ add in any order, embedding_bag and sum do not. Only rows that come once may be added to
    a table otherwise: that is what collects the gradients."""

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.add(function.name())
            return function(*args, **(kwargs or {}))

    for dtype in (torch.float32, torch.bfloat16):
        values, indices, weights, grad = problem(dtype=dtype)
        inputs = values, indices, weights
        for run in (
            partial(kernels.torch_forward, *inputs),
            partial(kernels.torch_backward, *inputs, grad),
        ):
            seen = set()
            with Watch():
                run()
            assert any("embedding_bag" in name or "sum" in name for name in seen), seen
            assert not any(
                name in "".join(seen) for name in ("index_add", "scatter_add", "index_put")
            ), seen


def test_slots_out_of_range_are_named_in_debug_mode(path, monkeypatch):
    monkeypatch.setattr(kernels, "DEBUG", DEVICE.type == "cuda")  # on a CPU they always are
    values, weights = torch.zeros(4, 8, device=DEVICE).bfloat16(), torch.ones(1, 2, device=DEVICE)
    lookup(values, torch.tensor([[0, 3]], device=DEVICE), weights)
    for slots in ([[0, 4]], [[-1, 2]]):
        with pytest.raises(ValueError, match="the table has slots 0 to 3"):
            lookup(values, torch.tensor(slots, device=DEVICE), weights)


def test_same_bits_every_time(path):
    n = 64 if DEVICE.type == "cuda" else 4  # the interpreter takes one program at a time
    inputs = list(problem(n=n, k=32, S=40, D=96))
    first, second = run(*inputs), run(*inputs)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.to_dense(), b.to_dense())


# --- RowAdam ----------------------------------------------------------------------------------------------------------


def pool_of(values):
    pool = ValuePool(*values.shape, values.dtype, initialize=False)
    pool.values = torch.nn.Parameter(values.to(DEVICE))
    return pool


def give(pool, gradient):
    """What a backward pass does to a pool."""
    rows, grads = gradient.coalesce().indices()[0], gradient.coalesce().values()
    pool.gradient.index_add_(0, rows, grads)
    pool.touched[rows] = 1


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sparse_gradient(table, seed, n=20, dtype=None):
    """Not coalesced: some rows have several gradients, some none."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(
        len(table) - 3, (n,), generator=generator
    )  # the last three rows are never read
    grads = torch.randn(n, table.size(1), generator=generator).to(table.dtype)
    return torch.sparse_coo_tensor(rows[None], grads, table.shape, check_invariants=False).to(
        DEVICE
    )


def test_row_adam_equals_its_formulas_in_float64(path):
    """Its three lines, a row at a time, in float64; rows sleep, and wake with several gradients."""
    beta1, beta2, eps, lr, D = 0.8, 0.95, 1e-8, 0.05, 24
    pool = pool_of(drawn(30, D))
    table = pool.values
    start = table.detach().clone()
    want, (m, v), last = (
        start.double(),
        torch.zeros(2, 30, D, dtype=torch.float64, device=DEVICE),
        [0] * 30,
    )
    optimizer = RowAdam(pool, lr=lr, betas=(beta1, beta2), eps=eps)
    for t in range(1, 9):
        gradient = sparse_gradient(table, seed=t)
        give(pool, gradient)
        rows, grads = gradient._indices()[0].tolist(), gradient._values().double()
        for r in set(rows):
            g = sum(grads[i] for i, row in enumerate(rows) if row == r)
            m[r] = beta1 * m[r] + (1 - beta1) * g
            v[r] = beta2 * v[r] + (1 - beta2) * g.square()
            last[r] = t
            want[r] -= lr * m[r] / (1 - beta1**t) / ((v[r] / (1 - beta2**t)).sqrt() + eps)
        optimizer.step()
    assert max(last[:27]) == 8 and min(last[:27]) < 8  # some rows have slept
    assert_near(table.detach() - start, want - start.double(), 1e-5)
    assert torch.equal(table[27:], start[27:])


@pytest.mark.parametrize("scale", [1e-4, 1e-9, 1e9])
def test_row_adam_does_not_depend_on_the_scale_of_the_loss(path, scale):
    """A loss that is a mean over 491,520 tokens gives a row gradients of 1e-9."""
    tables = []
    for factor in (1.0, scale):
        pool = pool_of(drawn(30, 24))
        optimizer = RowAdam(pool, lr=0.1)
        for t in range(4):
            give(pool, sparse_gradient(pool.values, seed=t) * factor)
            optimizer.step()
        tables.append(pool.values.detach())
    moved = tables[0] - drawn(30, 24).to(DEVICE)
    assert (tables[0] - tables[1]).norm() < 1e-3 * moved.norm() and moved[:27].abs().mean() > 0.05


def test_row_adam_is_sparse_adam_and_adam_when_no_row_sleeps(path):
    for other in (torch.optim.SparseAdam, torch.optim.Adam):
        pool, table = (
            pool_of(torch.ones(30, 40)),
            torch.nn.Parameter(torch.ones(30, 40, device=DEVICE)),
        )
        options = dict(lr=0.1, betas=(0.9, 0.98), eps=1e-8)
        optimizers = [RowAdam(pool, **options), other([table], **options)]
        for t in range(6):
            grad = sparse_gradient(table, seed=t)
            if other is torch.optim.Adam:  # every row has a gradient
                grad = drawn(30, 40, seed=t).to(DEVICE)
            give(pool, grad if grad.is_sparse else grad.to_sparse(1))
            table.grad = grad.clone()
            for optimizer in optimizers:
                optimizer.step()
        torch.testing.assert_close(pool.values, table, rtol=1e-5, atol=1e-6)


def test_row_adam_rounds_at_random_without_bias(path):
    """A change of a thousandth of a number of 8 bits is lost by rounding to nearest; over many draws it must arrive in the mean."""
    pool = pool_of(torch.ones(400, 64).bfloat16())
    table, optimizer = pool.values, RowAdam(pool, lr=1e-3, betas=(0.0, 0.0))
    give(pool, torch.ones_like(table).to_sparse(1))
    optimizer.step()  # beta = 0: each element moves by exactly lr
    share = (
        (table == 1).float().mean().item()
    )  # the others went to the next number below, 2^-8 away
    assert set(table.unique().tolist()) == {1.0, 1 - 2**-8}
    error = (1 - 1e-3 * 2**8) - share
    assert (
        abs(error) < 4 * (share * (1 - share) / table.numel()) ** 0.5
    )  # four standard deviations of a fair coin
    columns = (table == 1).float().mean(0)
    assert (
        columns.std() < 2 * (share * (1 - share) / 400) ** 0.5
    )  # neither rows nor columns share their draws
    assert (table == 1).float().mean(1).std() < 2 * (share * (1 - share) / 64) ** 0.5


def test_row_adam_noise_depends_on_seed_and_step_only(path):
    def run(seed):
        pool = pool_of(torch.ones(40, 24).bfloat16())
        optimizer = RowAdam(pool, lr=1e-3, seed=seed)
        for t in range(3):
            give(pool, sparse_gradient(pool.values, seed=t))
            optimizer.step()
        return pool.values.detach()

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_row_adam_does_not_hide_numbers_that_are_not_finite(path):
    pool = pool_of(torch.ones(2, 24).bfloat16())
    table, optimizer = pool.values, RowAdam(pool)
    for _ in range(2):
        give(pool, torch.ones_like(table).to_sparse(1))
        optimizer.step()
        # the NaN of NVIDIA's arithmetic; with bits added to it, it would turn to -0
        table.data.view(torch.int16)[0, 0] = 0x7FFF
        optimizer.state[table]["means"].view(torch.int32)[0, 1] = 0x7FFFFFFF
        table.data[1, 0] = float("inf")
    assert table[0, 0].isnan() and table[0, 1].isnan() and table[1, 0].isinf()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_adam_on_both_paths_and_through_a_checkpoint(dtype, monkeypatch, tmp_path):
    """Three steps, saved, loaded into a new optimiser, three more, on each path: the same numbers; moments stay float32."""
    tables = []
    for triton_path in (False, True):
        monkeypatch.setattr(kernels, "uses_triton", lambda values, chosen=triton_path: chosen)
        pool = pool_of(drawn(30, 40).to(dtype))
        table, optimizer = pool.values, RowAdam(pool, lr=0.01)
        for t in range(6):
            if t == 3:
                torch.save(optimizer.state_dict(), tmp_path / "state.pt")
                optimizer = RowAdam(pool, lr=0.01)
                optimizer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
                state = optimizer.state[table]
                assert (
                    state["means"].dtype == state["squares"].dtype == torch.float32
                    and state["step"] == 3
                )
            give(pool, sparse_gradient(table, seed=t))
            optimizer.step()
        tables.append(table.detach())
    if dtype == torch.float32:
        torch.testing.assert_close(tables[0], tables[1], rtol=1e-5, atol=1e-6)
    else:  # the same noise: the sums before it differ in the last bit, which tips few roundings
        assert (tables[0] == tables[1]).float().mean() > 0.99


def test_row_adam_takes_the_gradient_out_of_its_pool_and_refuses_what_is_no_pool():
    pool = pool_of(torch.randn(50, 8))
    slots, weights = torch.tensor([[3, 3, 9]], device=DEVICE), torch.ones(1, 3, device=DEVICE)
    table, optimizer, before = pool.values, RowAdam(pool, lr=0.1), pool.values.detach().clone()
    pool(slots, weights).sum().backward()
    optimizer.step()
    moved = (table != before).all(1).nonzero().flatten().tolist()
    assert moved == [3, 9] and (table != before).any(1).sum() == 2
    assert pool.touched.sum() == 0 and pool.gradient.abs().max() == 0
    pool(slots, weights).sum().backward()
    optimizer.zero_grad()  # drops it
    after = table.detach().clone()
    optimizer.step()
    assert (
        torch.equal(table[10:], after[10:])
        and pool.gradient.abs().max() == 0
        and optimizer.state[table]["step"] == 2
    )
    assert torch.equal(table, after)  # lazy: rows without a gradient stay
    with pytest.raises(ValueError, match=r"wants a memory\.ValuePool, not a list"):
        RowAdam([table])
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        RowAdam(ValuePool(4, 4, torch.float16))


def test_sparse_adam_of_pytorch_takes_the_gradient_of_a_lookup_alone():
    tables = [torch.nn.Parameter(drawn(50, 8).to(DEVICE)) for _ in range(2)]
    optimizers = [
        torch.optim.SparseAdam(tables[:1], 0.1, eps=1e-12),
        torch.optim.Adam(tables[1:], 0.1, eps=1e-12),
    ]
    slots, weights = torch.arange(50, device=DEVICE).view(10, 5), torch.rand(10, 5, device=DEVICE)
    for _ in range(3):
        (lookup(tables[0], slots, weights) ** 2).sum().backward()
        (kernels.definition(tables[1], slots, weights) ** 2).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(*tables)


@pytest.mark.parametrize("collect", [False, True])
def test_rows_of_weight_0_add_nothing_and_their_weights_have_a_gradient(path, collect):
    """UltraMem reads a part of the rows of each token that way. Whole bags, and rows that are cut into pieces, have weight 0."""
    values, indices, weights, grad = problem(n=20, k=20, S=33, D=24)
    weights[torch.rand(20, 20, generator=torch.Generator().manual_seed(1)).to(DEVICE) < 0.75] = 0
    weights[3] = 0
    indices[10:18] = 4  # 160 pairs
    want = brute_force(values, indices, weights, grad)
    if not collect:
        got = run(values, indices, weights, grad)
    else:
        pool, leaf = pool_of(values), weights.clone().requires_grad_()
        pool.collect_gradients()
        y = pool.lookup(indices, leaf)
        y.backward(grad)
        got = y, pool.take_gradient(), leaf.grad
    for a, b in zip(got, want, strict=True):
        assert_near(a.detach().to_dense(), b, 1e-5)
    assert got[0][3].abs().max() == 0 and got[2][3].abs().min() > 0


@pytest.mark.parametrize("n, k", [(0, 5), (3, 0)])
def test_nothing_to_look_up_gives_zeros(path, n, k):
    values = torch.randn(10, 24, device=DEVICE)
    empty = torch.zeros(n, k, dtype=torch.int64, device=DEVICE)
    y, dvalues, dweights = run(
        values, empty, torch.zeros(n, k, device=DEVICE), torch.ones(n, 24, device=DEVICE)
    )
    assert torch.equal(y, torch.zeros_like(y)) and y.shape == (n, 24)
    assert dvalues._nnz() == 0 and dweights.shape == (n, k)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_rows_past_2_to_31_elements_are_addressed_right(path, index_dtype):
    """The table is 4.3 GB of address space, of which a CPU gives a few pages; a GPU has to have them."""
    S, D = 2**31 // 96 + 9, 96
    try:
        values = torch.empty(S, D, device=DEVICE, dtype=torch.bfloat16)  # never filled
    except torch.OutOfMemoryError:
        pytest.skip("needs 4.3 GB of free memory on the GPU")
    rows = torch.tensor([0, 2**31 // D, 2**31 // D + 1, S - 2, S - 1], device=DEVICE)
    values[rows] = torch.randn(len(rows), D, device=DEVICE).bfloat16()
    assert rows[2] * D > 2**31
    small = torch.tensor([[0, 3, 4], [1, 2, 3]], device=DEVICE)
    indices, weights = rows[small].to(index_dtype), torch.rand(2, 3, device=DEVICE)
    grad = torch.randn(2, D, device=DEVICE).bfloat16()
    y, dvalues, dweights = run(values, indices, weights, grad)
    want = brute_force(values[rows], small, weights, grad)
    assert torch.equal(dvalues.indices()[0], rows)
    for got, expected in zip((y, dvalues.values(), dweights), want, strict=True):
        assert_near(got, expected, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(values=torch.zeros(4)), r"values \(4,\) .* must be \(S, D\)"),
        (dict(values=torch.zeros(4, 8, dtype=torch.int64)), "values .* floating point"),
        (
            dict(indices=torch.zeros(3, dtype=torch.int64), weights=torch.zeros(3)),
            r"indices \(3,\) .* must be \(n, k\)",
        ),
        (
            dict(indices=torch.zeros(2, 4, dtype=torch.int64)),
            r"weights \(2, 3\) .* shape of indices",
        ),
        (dict(indices=torch.zeros(2, 3)), "indices .* torch.float32 on cpu: .* int32 or int64"),
        (
            dict(weights=torch.zeros(2, 3, dtype=torch.int64)),
            "weights .* torch.int64 on cpu: must be floating point",
        ),
        (dict(values=torch.zeros(4, 8, device="meta")), "one device, not meta, cpu, cpu"),
        (
            dict(values=torch.zeros(1).expand(2**31, 1)),
            r"values \(2147483648, 1\) .* fewer than 2\^31 rows",
        ),
        (
            dict(
                indices=torch.zeros(1).long().expand(2**31, 1),
                weights=torch.zeros(1).expand(2**31, 1),
            ),
            "n \\* k must be below 2",
        ),
    ],
)
def test_wrong_inputs_are_refused_with_a_reason(change, message):
    inputs = (
        dict(
            values=torch.zeros(4, 8),
            indices=torch.zeros(2, 3, dtype=torch.int64),
            weights=torch.zeros(2, 3),
        )
        | change
    )
    with pytest.raises(ValueError, match=message):
        lookup(**inputs)
    with pytest.raises(ValueError, match=message):
        collecting_lookup(**inputs, gradient=None, touched=None)


@pytest.mark.slow
@pytest.mark.parametrize("capability, D, types", [(80, 1024, ["fp32"]), (90, 768, ["bf16"])])
def test_kernels_compile_without_spills_and_load_16_bytes(capability, D, types):
    """A second process, because the interpreter is on in this one."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [
        sys.executable,
        ROOT / "tests" / "compile_report.py",
        str(capability),
        str(D),
        *types,
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout)  # registers and loads of each kernel: pytest -rP shows them
    report = [line.split() for line in done.stdout.splitlines()]
    assert {"forward", "backward", "pieces", "sum", "adam", "select-1024"} <= {
        line[0] for line in report
    }
    for name, dtype, registers, spilled, wide, narrow in report:
        assert int(registers) <= 168 and spilled == "0", f"{name} of {dtype} spills {spilled} bytes"
        if "select" not in name:
            few = "1" if name == "sum" else "0"  # a program of which reads a row of the table, once
            assert int(wide) > 0 and narrow <= few, (
                f"{name} of {dtype} has {wide} loads of 16 bytes, and {narrow} of 2"
            )
