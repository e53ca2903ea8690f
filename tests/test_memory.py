"""Retrieval against brute force over all slots; the layer and all its gradients against a float64 program of loops."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import memory
from kernels import RowAdam, lookup, topk_indices
from memory import MemoryLayer, Usage, ValuePool, candidate_ranks, product_topk, select
from model import GPT, GPTConfig

ROOT = Path(__file__).resolve().parents[1]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONFIG = GPTConfig(
    vocab_size=50, block_size=16, n_layer=3, n_head=2, n_embd=16, mem_layers=(1,), mem_keys=9, mem_heads=3, mem_topk=4,
    mem_key_dim=10, mem_value_dim=12,
)  # fmt: skip
PKM = replace(CONFIG, mem_gate=False, mem_qk_norm=False, mem_value_dim=16)


def scores(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("N, K", [(8, 8), (16, 4), (61, 32), (128, 16), (40, 1)])
def test_product_topk_equals_brute_force(N, K, dtype):
    s = scores(2, 3, 20, N, seed=1, dtype=dtype)
    pairs = product_topk(s, K, candidate_ranks(K))
    s1, s2 = s.double()
    every = (s1[..., :, None] + s2[..., None, :]).flatten(2)  # (3, 20, N * N): all S sums
    best = every.topk(K)
    assert pairs.shape == (2, 3, 20, K) and torch.equal(pairs[0] * N + pairs[1], best.indices)
    assert torch.equal(s.double().gather(-1, pairs).sum(0), best.values)
    rows = (pairs[0] * N + pairs[1]).flatten(0, 1).tolist()
    assert all(len(set(row)) == K for row in rows)  # never the same slot twice


def test_candidate_list_is_pruned_and_complete():
    a, b = candidate_ranks(32)
    assert len(a) == 119
    # A pair that is left out is beaten, or equalled, by at least K others: all those of lower ranks.
    listed = set(zip(a.tolist(), b.tolist(), strict=True))
    assert all(
        ((x + 1) * (y + 1) - 1 >= 32) == ((x, y) not in listed)
        for x in range(32)
        for y in range(32)
    )


def test_topk_indices_equals_torch_topk():
    shapes = [((5, 7, 128), 16), ((3, 4), 4), ((2, 1), 1), ((4, 1000), 32), ((4, 300), 300)]
    shapes += [((3, 50), 50), ((2, 64), 64), ((2, 65), 64)]
    shapes += [((2, 3, 500, 65), 16), ((2, 140_000), 16)]  # several parts; a row longer than a part
    for shape, K in shapes:
        x = scores(*shape) * 10 ** scores(
            *shape[:-1], 1, seed=3
        )  # large and small numbers, both signs
        best = topk_indices(x, K)
        assert torch.equal(x.gather(-1, best), x.topk(K).values)
        if x.size(-1) <= 1000:  # longer rows have ties
            assert torch.equal(best, x.topk(K).indices)
        x = x.sort().values  # the best are neighbours
        assert torch.equal(x.gather(-1, topk_indices(x, K)), x.topk(K).values)
    tied = torch.zeros(2, 9)
    assert all(len(set(row)) == 4 for row in topk_indices(tied, 4).tolist())
    tied = torch.zeros(2, 99)
    assert all(len(set(row)) == 4 for row in topk_indices(tied, 4).tolist())
    special = torch.tensor([[0.0, -3e38, -1e-38, 1e-38, -1.0, 3e38]])
    assert topk_indices(special, 6).tolist() == [[5, 3, 0, 2, 4, 1]]


@pytest.mark.parametrize("path", ["pytorch", "triton"])
@pytest.mark.parametrize(
    "n, H, N, K",
    [(2, 2, 24, 5), (1, 1, 128, 16), (1, 2, 33, 32), (2, 1, 7, 1), (1, 1, 1, 1), (0, 2, 8, 4)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_select_equals_brute_force(path, n, H, N, K, dtype, monkeypatch):
    """Against a top-k over all N * N sums in float64. Rounded scores are full of ties: then the slots may differ, the sums not."""
    monkeypatch.setattr(memory, "uses_triton", lambda scores: path == "triton")
    s = (scores(2, H, n, N) * 3).to(DEVICE, dtype)
    s1, s2 = s.double()
    want, want_slots = (s1[..., :, None] + s2[..., None, :]).flatten(-2).topk(K)  # (H, n, K)
    i, j = select(s, candidate_ranks(K).to(DEVICE), K)
    slots = i * N + j
    if dtype == torch.float32:
        assert torch.equal(slots, want_slots)
    torch.testing.assert_close(s1.gather(-1, i) + s2.gather(-1, j), want, rtol=1e-6, atol=1e-6)
    assert slots.shape == (H, n, K) and all(
        len(set(row)) == K for row in slots.flatten(0, 1).tolist()
    )


@pytest.mark.slow
def test_triton_sorts_large_and_small_negative_and_equal_scores(monkeypatch):
    """Bits of floats as integers: signs, exponents, zeros, rows in which all scores are equal; half of the columns are padding."""
    monkeypatch.setattr(memory, "uses_triton", lambda scores: True)
    s = scores(2, 1, 5, 33) * 10 ** (3 * scores(2, 1, 5, 33, seed=1))
    s[:, :, 0], s[:, :, 1], s[:, :, 2] = 0.0, -5.0, -s[:, :, 2].abs()
    for dtype in (torch.float32, torch.bfloat16):
        rounded = s.to(DEVICE, dtype)
        i, j = select(rounded, candidate_ranks(8).to(DEVICE), 8)[:, 0]
        s1, s2 = rounded[:, 0].float()
        want = (s1[:, :, None] + s2[:, None, :]).flatten(1).topk(8).values
        assert torch.equal(s1.gather(-1, i) + s2.gather(-1, j), want)
        assert all(len(set(row)) == 8 for row in (i * 33 + j).tolist())


def brute_force_layer(x, p, config):
    """The page at the top of memory.py, a token, a head and a slot at a time, over all S slots. x (n, C); p: parameters."""
    n, H, N, K, Q = (
        len(x),
        config.mem_heads,
        config.mem_keys,
        config.mem_topk,
        config.mem_key_dim // 2,
    )

    def rms(v, gain):
        return v / (v.square().mean() + 1e-6).sqrt() * gain

    rows = []
    for t in range(n):
        y = torch.zeros(p["values"].size(1), dtype=x.dtype)
        q = (p["query"] @ x[t]).view(2, H, Q)
        for h in range(H):
            score = []
            for i in range(N):
                for j in range(N):
                    total = 0
                    for half, number in ((0, i), (1, j)):
                        query, key = q[half, h], p["keys"][half * H + h, number]
                        if config.mem_qk_norm:
                            query, key = rms(query, p["query_norm"]), rms(key, p["key_norm"])
                        total = total + query @ key / (math.sqrt(Q) if config.mem_qk_norm else 1)
                    score.append(total)
            score = torch.stack(score)
            best = score.detach().argsort(descending=True)[:K]
            weight = score[best].exp() / score[best].exp().sum()
            for w, slot in zip(weight, best, strict=True):
                y = y + w * p["values"][slot]
        if config.mem_gate:
            gate = p["gate"] @ x[t]
            y = p["out"] @ (y * gate * torch.sigmoid(gate))
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize(
    "config", [CONFIG, PKM, replace(CONFIG, mem_qk_norm=False), replace(CONFIG, mem_gate=False, mem_value_dim=16)],
    ids=["memory+", "pkm", "no qk-norm", "no gate"],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_layer_and_every_gradient_equal_float64_brute_force(config, dtype):
    config = replace(config, mem_keys=6)
    torch.manual_seed(0)
    model = GPT(config)
    # norm weights that are not 1, so that a norm without them would be noticed
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    layer, pool = model.blocks[1].ffn.to(dtype), model.pool.to(dtype)
    pool.collect_gradients()
    x = torch.randn(2, 2, config.n_embd, dtype=dtype, requires_grad=True)
    grad = torch.randn(2, 2, config.n_embd, dtype=dtype)

    names = {f"{name.removesuffix('.weight')}": p for name, p in layer.named_parameters()} | {
        "values": pool.values
    }
    exact = {name: p.detach().double().requires_grad_() for name, p in names.items()}
    exact_x = x.detach().double().requires_grad_()
    want = brute_force_layer(exact_x.view(4, -1), exact, config).view(2, 2, -1)
    want.backward(grad.double())
    got = layer(x, pool)
    got.backward(grad)
    pool.values.grad = pool.take_gradient()

    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    assert set(names) >= {"query", "keys", "values"} | (
        {"gate", "out"} if config.mem_gate else set()
    )
    pairs = {"output": (got, want), "x": (x.grad, exact_x.grad)} | {
        name: (p.grad, exact[name].grad) for name, p in names.items()
    }
    for name, (a, b) in pairs.items():
        a = a.to_dense() if a.is_sparse else a
        assert b.norm() > 0, name
        assert (a.double() - b).norm() <= tolerance * b.norm(), (
            f"{name}: {(a.double() - b).norm() / b.norm():.1e}"
        )


def test_layers_share_one_pool_and_its_gradient_is_the_sum_over_them():
    model = GPT(replace(CONFIG, mem_layers=(0, 2)))
    idx = torch.randint(50, (2, 16))
    model.pool.collect_gradients()
    model(idx, idx)[1].backward()
    together = model.pool.take_gradient().to_dense()

    # The same model, but each layer with a copy of the pool: the two gradients must add up to that of the shared one.
    copies = [ValuePool(81, 12), ValuePool(81, 12)]
    for copy in copies:
        copy.load_state_dict(model.pool.state_dict())
        copy.collect_gradients()
    x = model.embedding(idx)
    for i, block in enumerate(model.blocks):
        x, _ = block(x, copies[i // 2], model.cos[:16], model.sin[:16])
    logits = model.logits(model.norm(x))
    F.cross_entropy(logits.flatten(0, 1), idx.flatten()).backward()
    apart = [copy.take_gradient().to_dense() for copy in copies]
    assert all(gradient.norm() > 0 for gradient in apart)
    torch.testing.assert_close(sum(apart), together)

    # mem_shared=False: the rows of the second layer follow those of the first one in the table.
    separate = GPT(replace(CONFIG, mem_layers=(0, 2), mem_shared=False))
    weights = model.state_dict()
    separate.load_state_dict(weights | {"pool.values": weights["pool.values"].repeat(2, 1)})
    separate.pool.collect_gradients()
    separate(idx, idx)[1].backward()
    torch.testing.assert_close(separate.pool.take_gradient().to_dense(), torch.cat(apart))


def test_more_slots_do_not_cost_more_gradient():
    for N in (9, 90):
        model = GPT(replace(CONFIG, mem_keys=N))
        model.pool.collect_gradients()
        idx = torch.randint(50, (2, 16))
        model(idx, idx)[1].backward()
        assert model.pool.take_gradient().indices().size(1) <= 2 * 16 * 3 * 4


def test_usage_statistics_equal_counts_by_hand():
    usage = Usage(200, "cpu")
    usage.add(
        torch.tensor([[0, 0, 1], [2, 0, 1]]), torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]])
    )
    usage.add(torch.tensor([[0]]), torch.tensor([[1.0]]))
    got = usage.summary()
    reads, mass = np.array([4, 2, 1]) / 7, np.array([1.75, 0.25, 1.0]) / 3
    assert got["used"] == pytest.approx(3 / 200)
    assert got["kl"] == pytest.approx((reads * np.log(reads * 200)).sum())
    assert got["kl_weighted"] == pytest.approx((mass * np.log(mass * 200)).sum())
    assert got["top1"] == pytest.approx(6 / 7)  # the two busiest of 200 slots

    even = Usage(100, "cpu")
    even.add(torch.arange(100)[None], torch.full((1, 100), 0.01))
    assert even.summary() == pytest.approx(
        {"used": 1.0, "kl": 0.0, "kl_weighted": 0.0, "top1": 0.01}, abs=1e-6
    )


def test_usage_is_recorded_on_request_only():
    model = GPT(replace(CONFIG, mem_layers=(0, 2)))
    idx = torch.randint(50, (2, 16))
    model(idx)
    with model.pool.record_usage() as usage:
        model(idx)
    reads = usage.reads.clone()
    model(idx)
    assert reads.sum() == 2 * 2 * 16 * 3 * 4 and torch.equal(
        usage.reads, reads
    )  # two layers, 32 tokens, 12 slots each
    assert usage.mass.sum().item() == pytest.approx(2 * 2 * 16 * 3, rel=1e-4)  # a softmax a head


def test_autocast_moves_few_slots_and_weights_little():
    """bfloat16 rounds the scores, so near ties can change sides; sums of scores and softmax stay in float32."""
    torch.manual_seed(0)
    layer, x = GPT(replace(CONFIG, mem_keys=64)).blocks[1].ffn, torch.randn(500, 16)
    assert isinstance(layer, MemoryLayer)
    exact_slots, exact_weights = layer.retrieve(x)
    with torch.autocast("cpu", torch.bfloat16):
        slots, weights = layer.retrieve(x)
    assert weights.dtype == torch.float32 and slots.dtype == torch.int64
    torch.testing.assert_close(weights.view(500, 3, 4).sum(-1), torch.ones(500, 3))
    best, exact_best = slots.view(1500, 4)[:, 0], exact_slots.view(1500, 4)[:, 0]
    assert (best == exact_best).float().mean() > 0.95
    assert (weights - exact_weights).abs().max() < 0.03


def test_scores_have_a_spread_of_about_one_with_and_without_norms():
    for config in (CONFIG, PKM):
        torch.manual_seed(0)
        config = replace(config, n_embd=64, mem_key_dim=32, mem_keys=128, mem_value_dim=64)
        layer = GPT(config).blocks[1].ffn
        assert 0.8 < layer.scores(torch.randn(100, 64)).std() < 1.25


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_collected_gradients_are_those_that_autograd_sums(dtype):
    """Two layers, two micro-steps: what take_gradient() gives against autograd's sum of sparse gradients, by lookup(); then once
    more, to see that nothing is left of the first."""
    torch.manual_seed(0)
    model = GPT(replace(CONFIG, mem_layers=(0, 2), mem_dtype=dtype))
    values, grads = model.pool.values, []

    def micro_steps(seed):
        model.zero_grad()
        for part in torch.randint(50, (2, 2, 16), generator=torch.Generator().manual_seed(seed)):
            model(part, part)[1].backward()

    collecting, model.pool.lookup = model.pool.lookup, partial(lookup, values)
    for seed in (1, 2):
        micro_steps(seed)
        grads.append((values.grad.coalesce(), model.blocks[0].ffn.keys.grad.clone()))
    model.pool.lookup = collecting
    model.pool.collect_gradients()
    for seed, (want, want_keys) in zip((1, 2), grads, strict=True):
        micro_steps(seed)
        assert values.grad is None
        got = model.pool.take_gradient()
        assert got.is_coalesced() and torch.equal(got.indices(), want.indices())
        error = (got.values().float() - want.values().float()).norm() / want.values().float().norm()
        assert error < (1e-2 if dtype == "bfloat16" else 1e-6)
        torch.testing.assert_close(model.blocks[0].ffn.keys.grad, want_keys)


@pytest.mark.parametrize("dtype, e", [("float32", 4), ("bfloat16", 2)])
def test_a_table_takes_the_memory_that_bench_readme_counts(dtype, e):
    shape = dict(vocab_size=50, n_layer=2, n_head=2, n_embd=24, block_size=16, mem_dtype=dtype)
    config = GPTConfig(**shape, mem_keys=9, mem_topk=4, mem_heads=2, mem_layers=(0, 1))
    model = GPT(config)
    optimizer = RowAdam(model.pool)
    idx = torch.randint(50, (2, 16))
    model(idx, idx)[1].backward()
    S, D = 81, 24
    R = int(model.pool.touched.sum())
    assert model.parameter_counts()["pool"] == S * D and model.pool.values.nbytes == S * D * e
    assert model.pool.gradient.nbytes + model.pool.touched.nbytes == S * (D * e + 1)
    assert model.pool.take_gradient().values().nbytes == R * D * e
    optimizer.step()
    state = optimizer.state[model.pool.values]
    assert state["means"].nbytes + state["squares"].nbytes == 8 * S * D


def test_the_papers_largest_table_is_built_without_memory():
    shape = dict(n_layer=24, n_head=16, n_embd=2048, mem_count=3, mem_keys=8192)
    with torch.device("meta"):
        model = GPT(GPTConfig(**shape, mem_dtype="bfloat16"), initialize=False)
    assert model.pool.values.shape == (67_108_864, 2048)
    assert model.parameter_counts()["pool"] == 137_438_953_472
