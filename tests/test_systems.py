"""Mixture of experts, PEER and UltraMem: each against a float64 program of loops, then trained."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import kernels
import train
from helpers import SMALL, log_of, prepare, refusal, train_here
from kernels import lookup
from memory import ValuePool, candidate_ranks, product_topk
from model import GPT, GPTConfig, SwiGLU
from presets import PRESETS
from runtime.options import make_configs
from systems import SYSTEMS as LAYERS
from systems import MemoryPlus
from systems.moe import MoE
from systems.peer import PEER, dot
from systems.ultramem import UltraMem, tucker_topk
from train import TrainConfig, learning_rate, memory_rate

DENSE = GPTConfig(vocab_size=50, block_size=16, n_layer=3, n_head=2, n_embd=16)
MOE = replace(DENSE, system="moe", mem_layers=(1,), moe_experts=5)
SHAPE = dict(mem_layers=(1,), mem_keys=6, mem_heads=3, mem_topk=3, mem_key_dim=12, mem_gate=False)
PEER_SMALL = replace(DENSE, system="peer", **SHAPE)
PARTS = dict(mem_rank=2, mem_cores=2, mem_softmax=False, mem_expand=4, mem_skip=1)
ULTRAMEM = replace(DENSE, system="ultramem", **SHAPE, **PARTS, mem_value_dim=8)


def make(config, dtype=torch.float64):
    """A model with norm weights that are not 1, so that one that is left out would be noticed."""
    torch.manual_seed(0)
    model = GPT(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def assert_equal(got, want, tolerance):
    """got, want: {name: tensor}"""
    assert got.keys() == want.keys()
    for name, b in want.items():
        a = got[name].to_dense().double()
        assert b.norm() > 0, name
        assert (a - b).norm() <= tolerance * b.norm(), f"{name}: {(a - b).norm() / b.norm():.1e}"


def compare_with_loops(layer, pool, loops, auxiliary=0.0, tolerance=1e-11, n=6):
    """Output and every gradient of a layer against loops(x, {name: parameter}) -> (y, auxiliary loss), in float64. A pool
    collects its gradient."""
    dtype = next(layer.parameters()).dtype
    generator = torch.Generator().manual_seed(1)
    x, grad = torch.randn(2, 1, n // 2, 16, generator=generator, dtype=torch.float64).to(dtype)
    names = dict(layer.named_parameters()) | ({} if pool is None else {"values": pool.values})
    exact = {name: p.detach().double().requires_grad_() for name, p in names.items()}
    exact_x = x.double().requires_grad_()
    want, loss = loops(exact_x.view(n // 2, 16), exact)
    ((want * grad.double().view_as(want)).sum() + auxiliary * loss).backward()
    x.requires_grad_()
    if pool is None:
        got, aux = layer.with_loss(x)
    else:
        pool.collect_gradients()
        got, aux = layer.with_loss(x, pool)
    ((got * grad).sum() + auxiliary * aux).backward()
    if pool is not None:
        pool.values.grad = pool.take_gradient()
    results = {"output": got.view_as(want), "x": x.grad} | {
        name: p.grad for name, p in names.items()
    }
    assert_equal(
        results,
        {"output": want, "x": exact_x.grad} | {name: p.grad for name, p in exact.items()},
        tolerance,
    )
    if auxiliary:
        assert aux.item() == pytest.approx(loss.item(), rel=1e-5)


# --- dot ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["pytorch", "triton"])
def path(request, monkeypatch):
    monkeypatch.setattr(kernels, "uses_triton", lambda values: request.param == "triton")


def table(S=40, D=24, dtype=torch.float32):
    return torch.randn(S, D, generator=torch.Generator().manual_seed(0)).to(dtype)


def pool_of(values):
    pool = ValuePool(*values.shape, values.dtype, initialize=False)
    pool.values = torch.nn.Parameter(values)
    pool.collect_gradients()
    return pool


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("D", [1, 24, 80])
def test_dot_and_its_gradients_equal_loops(path, D, dtype, tolerance):
    """The gradient of the table is that of two micro-steps."""
    values, generator = table(D=D, dtype=dtype), torch.Generator().manual_seed(1)
    indices = torch.randint(30, (9, 5), generator=generator)
    indices[0], indices[1, :3] = 3, 7
    x, grad = (
        torch.randn(9, D, generator=generator).to(dtype),
        torch.randn(9, 5, generator=generator),
    )
    exact, exact_x = values.double().requires_grad_(), x.double().requires_grad_()
    want = torch.stack(
        [
            torch.stack([exact[slot] @ row for slot in slots])
            for slots, row in zip(indices, exact_x, strict=True)
        ]
    )
    want.backward(grad.double())
    pool = pool_of(values)
    x.requires_grad_()
    got = dot(pool, indices, x)
    got.backward(grad)
    results = {"z": got, "x": x.grad.clone()}
    dot(pool, indices, x).backward(grad)
    results["values"] = pool.take_gradient()
    assert got.dtype == torch.float32 and torch.equal(
        results["values"].indices()[0], indices.unique()
    )
    assert_equal(results, {"z": want, "x": exact_x.grad, "values": 2 * exact.grad}, tolerance)


def test_tensors_need_not_be_contiguous(path):
    """Expanded weights, a column of a larger tensor, and a gradient that sum() expands."""
    values, indices = table(), torch.randint(40, (6, 2), generator=torch.Generator().manual_seed(0))
    weights = torch.arange(12.0).view(6, 2)
    want = lookup(values, indices, torch.full((6, 2), 0.5))
    torch.testing.assert_close(lookup(values, indices, torch.tensor(0.5).expand(6, 2)), want)
    want = lookup(values, indices[:, :1].clone(), weights[:, :1].clone())
    torch.testing.assert_close(lookup(values, indices[:, :1], weights[:, :1]), want)
    x = torch.randn(6, 24, requires_grad=True)
    dot(pool_of(values), indices, x).sum().backward()
    torch.testing.assert_close(x.grad, values[indices].sum(1))


def test_nothing_to_multiply_and_wrong_slots(path):
    pool = pool_of(table())
    for x, indices in (
        (torch.zeros(3, 5), torch.zeros(3, 2).long()),
        (torch.zeros(2, 24), torch.zeros(3, 2).long()),
    ):
        with pytest.raises(ValueError, match=r"x \(\d, \d+\): must be \(n, 24\)"):
            dot(pool, indices, x)
    with pytest.raises(ValueError, match="int32 or int64"):
        dot(pool, torch.zeros(3, 2), torch.zeros(3, 24))
    assert dot(pool, torch.zeros(0, 5, dtype=torch.int64), torch.zeros(0, 24)).shape == (0, 5)
    with pytest.raises(ValueError, match="the table has slots 0 to 39"):
        dot(pool, torch.tensor([[40]]), torch.zeros(1, 24))


def test_a_neuron_without_an_optimizer_is_refused():
    pool, x = ValuePool(4, 8), torch.randn(3, 8, requires_grad=True)
    z = dot(pool, torch.zeros(3, 2).long(), x)
    with pytest.raises(RuntimeError, match=r"RowAdam\(pool\)"):
        z.sum().backward()


# --- mixture of experts -------------------------------------------------------------------------------------------------


def test_one_expert_is_the_dense_network():
    torch.manual_seed(0)
    dense, moe = (
        SwiGLU(DENSE.n_embd, DENSE.n_ffn),
        MoE(DENSE.n_embd, DENSE.n_ffn, experts=1, topk=1),
    )
    with torch.no_grad():
        moe.gate_up[0] = torch.cat((dense.gate.weight.T, dense.up.weight.T), dim=1)
        moe.down[0] = dense.out.weight.T
        moe.router.weight.normal_()
    x, grad = torch.randn(2, 3, 5, 16)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for layer, z in zip((dense, moe), inputs, strict=True):
        y = layer(z)
        y.backward(grad)
    torch.testing.assert_close(y, dense(x))
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    gate_up = torch.cat((dense.gate.weight.grad.T, dense.up.weight.grad.T), dim=1)
    torch.testing.assert_close(moe.gate_up.grad[0], gate_up)
    torch.testing.assert_close(moe.down.grad[0], dense.out.weight.grad.T)
    assert (
        moe.with_loss(x)[1].item() == pytest.approx(0.01)
        and moe.router.weight.grad.abs().max() == 0
    )  # softmax of one is 1


def loop_over_experts(x, p, k):
    """The page in the class, a token and an expert at a time; and the balance of the load."""
    y, E = [], len(p["down"])
    share, mean = torch.zeros(E, dtype=x.dtype), torch.zeros(E, dtype=x.dtype)
    for row in x:
        probability = (row @ p["router.weight"].T).softmax(0)
        best = probability.detach().argsort(descending=True)[:k]
        total = probability[best].sum() if k > 1 else 1
        out = 0
        for e in best:
            gate, up = (row @ p["gate_up"][e]).chunk(2)
            out = out + probability[e] / total * ((F.silu(gate) * up) @ p["down"][e])
            share[e] += 1 / (k * len(x))
        mean = mean + probability / len(x)
        y.append(out)
    return torch.stack(y), 0.01 * E * (share * mean).sum()


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("E", [5, 40])  # 40: most of them get no token
def test_every_pair_of_token_and_expert_is_computed(k, E):
    layer = make(replace(MOE, moe_topk=k, moe_experts=E), torch.float32).blocks[1].ffn
    compare_with_loops(
        layer, None, lambda x, p: loop_over_experts(x, p, k), auxiliary=3.0, tolerance=1e-5, n=60
    )


def test_imbalance_is_1_where_all_is_even_and_more_elsewhere():
    layer = MoE(16, 48, experts=4, topk=1)
    with torch.no_grad():
        layer.router.weight.copy_(8 * torch.eye(4, 16))  # token e_i is for expert i
        for experts, want in (([0, 1, 2, 3] * 3, 1.0), ([0, 0, 1, 2], None), ([2] * 12, 4.0)):
            loss = layer.with_loss(torch.eye(16)[experts].unsqueeze(0))[1].item()
            if want is None:
                assert 0.012 < loss < 0.02
            else:
                assert loss == pytest.approx(0.01 * want, abs=5e-5)


@pytest.mark.parametrize("config", [MOE, ULTRAMEM], ids=["moe", "ultramem"])
def test_the_auxiliary_loss_is_in_the_gradient_and_not_in_the_value(config):
    model, idx = make(config, torch.float32), torch.randint(50, (2, 16))
    if config.system == "ultramem":
        model.blocks[1].skip.core.data *= 20  # so that a singular value is large enough
        model.pool.collect_gradients()
    gradients = []
    layer = next(layer for layer in model.modules() if isinstance(layer, MoE | UltraMem))
    with_loss = layer.with_loss
    for own in (True, False):
        model.zero_grad()
        losses = []

        def watch(*inputs, losses=losses):
            y, auxiliary = with_loss(*inputs)
            losses.append(auxiliary)
            return y, auxiliary if own else 0.0  # noqa: B023

        layer.with_loss = watch
        loss = model(idx, idx)[1]
        (loss if own else loss + losses[0]).backward()
        cross_entropy = F.cross_entropy(
            model.logits(model.hidden(idx)).flatten(0, 1), idx.flatten()
        )
        assert losses[0] > 0 and loss.item() == pytest.approx(cross_entropy.item(), abs=1e-6)
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        if model.pool is not None:
            gradients[-1]["pool.values"] = model.pool.take_gradient().to_dense()
    assert_equal(gradients[0], {name: g.double() for name, g in gradients[1].items()}, 1e-5)


@pytest.mark.parametrize("k", [1, 2])
def test_flops_of_experts_equal_what_pytorch_counts(k):
    """PyTorch's counter has no entry for the grouped product: each row of one is multiplied by one matrix. The loop over experts,
    which has plain products only, is counted by PyTorch alone."""
    config = replace(MOE, moe_topk=k)
    model, T = make(config, torch.float32), 16
    grouped = {torch.ops.aten._grouped_mm: lambda x, w, *_, **__: 2 * x[0] * w[1] * w[2]}
    x = torch.randn(1, T, 16)
    counts = []
    for run_layer in (
        lambda: model.blocks[1].ffn(x),
        lambda: loop_over_experts(
            x[0], {name: p.detach() for name, p in model.blocks[1].ffn.named_parameters()}, k
        ),
    ):
        with FlopCounterMode(display=False, custom_mapping=grouped) as counter:
            run_layer()
        counts.append(counter.get_total_flops() / T)
    assert counts[0] == counts[1] == model.flops_per_token(T)["memory"]


# --- PEER ---------------------------------------------------------------------------------------------------------------


def scores_by_loops(x, p, config, H, r=1):
    """s[half][head][component][sub-key] of one token."""
    N, Q = p["keys"].shape[1:]
    q = (p["query.weight"] @ x).view(2, H, r, Q)
    keys = p["keys"].view(2, H, r, N, Q)

    def norm(v, name):
        if f"{name}.weight" not in p:
            return v
        if config.mem_rank:  # LayerNorm
            return (
                (v - v.mean())
                / ((v - v.mean()).square().mean() + 1e-6).sqrt()
                * p[f"{name}.weight"]
            )
        return v / (v.square().mean() + 1e-6).sqrt() * p[f"{name}.weight"]

    scale = math.sqrt(Q) if config.mem_qk_norm else 1.0
    return torch.stack([
        torch.stack([
            torch.stack([
                torch.stack([norm(q[a, h, c], "query_norm") @ norm(keys[a, h, c, i], "key_norm") / scale for i in range(N)])
                for c in range(r)
            ]) for h in range(H)
        ]) for a in range(2)
    ])  # fmt: skip


def peer_by_loops(x, p):
    config, y = PEER_SMALL, []
    N, S = config.mem_keys, config.mem_keys**2
    for row in x:
        s1, s2 = scores_by_loops(row, p, config, config.mem_heads)[:, :, 0]
        out = torch.zeros(16, dtype=x.dtype)
        for h in range(config.mem_heads):
            every = torch.stack([s1[h, i] + s2[h, j] for i in range(N) for j in range(N)])
            best = every.detach().argsort(descending=True)[: config.mem_topk]
            for slot, weight in zip(best.tolist(), every[best].softmax(0), strict=True):
                u, v = p["values"][slot], p["values"][S + slot]
                z = u @ row
                out = out + weight * 0.5 * z * (1 + torch.erf(z / math.sqrt(2))) * v
        y.append(out)
    return torch.stack(y), 0.0


def test_peer_equals_loops():
    model = make(PEER_SMALL)
    layer = model.blocks[1].ffn
    assert isinstance(layer, PEER) and model.pool.values.shape == (72, 16)
    compare_with_loops(layer, model.pool, peer_by_loops)
    slots = model.blocks[1].ffn.retrieve(torch.randn(1, 16, dtype=torch.float64))[0]
    x = torch.randn(1, 1, 16, dtype=torch.float64)
    slots = layer.retrieve(x[0])[0].unique()
    layer(x, model.pool).sum().backward()
    assert 3 <= len(slots) < 36  # the rows of both tables that were read, and no others
    assert torch.equal(model.pool.take_gradient().indices()[0], torch.cat((slots, 36 + slots)))
    assert model.parameter_counts()["pool"] == 2 * 36 * 16


# --- UltraMem -----------------------------------------------------------------------------------------------------------


def ultramem_by_loops(x, p, config, permutation):
    """Over the whole virtual grid. -> y, auxiliary loss"""
    H, K, r, h, E = (
        config.mem_heads,
        config.mem_topk,
        max(1, config.mem_rank),
        config.mem_cores,
        config.mem_expand,
    )
    N, S, D, y = config.mem_keys * math.isqrt(E), config.mem_keys**2, config.mem_value_dim, []
    core = p["core"].sum(0) if config.mem_rank else None
    values = p["values"].view(h, S, D // h)
    for row in x:
        s_row, s_col = scores_by_loops(row, p, config, H, r)  # (H, r, N)
        blocks = [torch.zeros(D, dtype=x.dtype) for _ in range(E)]
        for head in range(H):
            a, b = s_row[head], s_col[head]  # (r, N)
            if core is None:
                grids = [
                    torch.stack(
                        [torch.stack([a[0, i] + b[0, j] for j in range(N)]) for i in range(N)]
                    )
                ]
                allowed = torch.ones(N, N, dtype=torch.bool)
            else:
                grids = [
                    torch.stack(
                        [torch.stack([a[:, i] @ one @ b[:, j] for j in range(N)]) for i in range(N)]
                    )
                    for one in p["core"]
                ]
                u, _, w = torch.linalg.svd(core.detach())
                first, second = u[:, 0] @ a.detach(), w[0] @ b.detach()
                allowed = torch.zeros(N, N, dtype=torch.bool)
                for largest in (True, False):
                    i, j = (
                        first.topk(K, largest=largest).indices,
                        second.topk(K, largest=largest).indices,
                    )
                    allowed[i.unsqueeze(1), j] = True
            total = sum(grids).detach().masked_fill(~allowed, -math.inf).flatten()
            best = total.argsort(descending=True)[:K]
            weights = torch.stack([grid.flatten()[best] for grid in grids])  # (cores, K)
            weights = weights.softmax(-1) if config.mem_softmax else weights
            for virtual, weight in zip(best.tolist(), weights.T, strict=True):
                block, slot = divmod(permutation[virtual], S)
                for i in range(h):
                    part = slice(i * D // h, (i + 1) * D // h)
                    blocks[block] = blocks[block].index_add(
                        0, torch.arange(D)[part], weight[i] * values[i, slot]
                    )
        y.append(torch.cat(blocks))
    y = torch.stack(y)
    y = y @ p["out.weight"].T if "out.weight" in p else y
    if core is None:
        return y, torch.zeros(())
    sigma = torch.linalg.svdvals(core)
    return y, 1e-3 / max(1, r - 1) * sum(
        (max(sigma[i] - 0.15, 0 * sigma[i])) ** 2 for i in range(1, r)
    )


@pytest.mark.parametrize(
    "change",
    [
        {}, {"mem_rank": 3, "mem_key_dim": 18, "mem_cores": 4}, {"mem_rank": 0, "mem_cores": 1}, {"mem_cores": 1},
        {"mem_softmax": True}, {"mem_expand": 1}, {"mem_expand": 9}, {"mem_qk_norm": False}, {"mem_value_dim": 16, "mem_expand": 1},
    ],
    ids=["all", "rank 3", "sums", "one core", "softmax", "one block", "nine blocks", "no norms", "whole width"],
)  # fmt: skip
def test_ultramem_equals_loops_over_the_virtual_grid(change):
    config = replace(ULTRAMEM, **change)
    model = make(config)
    permutation = model.pool.permutation.tolist() if config.mem_expand > 1 else range(36)
    auxiliary = 100.0 if config.mem_rank else 0.0
    layer = model.blocks[1].skip
    compare_with_loops(
        layer, model.pool, lambda x, p: ultramem_by_loops(x, p, config, permutation), auxiliary
    )


def test_with_all_parts_off_ultramem_is_pkm():
    off = dict(
        mem_rank=0,
        mem_cores=1,
        mem_softmax=True,
        mem_expand=1,
        mem_skip=0,
        mem_value_dim=16,
        mem_qk_norm=False,
    )
    ultra = make(replace(ULTRAMEM, **off))
    pkm = GPT(replace(DENSE, **SHAPE | dict(mem_qk_norm=False))).double()
    assert type(pkm.blocks[1].ffn) is MemoryPlus and type(ultra.blocks[1].ffn) is UltraMem
    pkm.load_state_dict(ultra.state_dict())
    idx = torch.randint(50, (2, 16))
    for model in (ultra, pkm):
        model.pool.collect_gradients()
        model(idx, idx)[1].backward()
        model.pool.values.grad = model.pool.take_gradient()
    torch.testing.assert_close(ultra(idx)[0], pkm(idx)[0], rtol=0, atol=1e-12)
    want = {name: p.grad.to_dense() for name, p in pkm.named_parameters()}
    assert_equal({name: p.grad for name, p in ultra.named_parameters()}, want, 1e-12)


def grid(s, core):
    return torch.einsum("hrni,rs,hsnj->hnij", s[0], core, s[1]).flatten(-2)  # (H, n, N * N)


def chosen(s, core):
    """The slots that tucker_topk chooses, i * 24 + j: (H, n, 8)"""
    i, j = tucker_topk(s, 8, core)
    return i * 24 + j


def test_the_pass_of_rank_1_misses_nothing_if_the_core_has_rank_1():
    generator = torch.Generator().manual_seed(0)
    s = torch.randn(2, 3, 2, 200, 24, generator=generator, dtype=torch.float64)
    for _ in range(4):
        core = torch.outer(*torch.randn(2, 2, generator=generator, dtype=torch.float64))
        every = grid(s, core)
        slots = chosen(s, core)
        torch.testing.assert_close(
            every.gather(-1, slots), every.topk(8).values, rtol=0, atol=1e-12
        )
        assert all(len(set(row)) == 8 for row in slots.flatten(0, 1).tolist())
    full = torch.randn(
        2, 2, generator=generator, dtype=torch.float64
    )  # elsewhere it is an approximation
    found = grid(s, full).gather(-1, chosen(s, full))
    missed = grid(s, full).topk(8).values.sum(-1) - found.sum(-1)
    assert missed.min() > -1e-9 and missed.max() > 0


def test_a_core_of_1_is_product_key_retrieval_with_products_for_sums():
    s = (
        torch.rand(2, 3, 1, 50, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        + 0.1
    )
    pairs = tucker_topk(s, 8, torch.ones(1, 1, dtype=torch.float64))
    assert torch.equal(pairs, product_topk(s[:, :, 0].log(), 8, candidate_ranks(8)))


def test_slots_do_not_depend_on_the_sign_of_singular_vectors():
    s = torch.randn(
        2, 3, 2, 50, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    core = torch.tensor([[1.0, 0.4], [-0.3, 0.6]], dtype=torch.float64)
    svd, want = torch.linalg.svd, chosen(s, core)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.linalg,
            "svd",
            lambda matrix: tuple(
                sign * part for sign, part in zip((-1, 1, -1), svd(matrix), strict=True)
            ),
        )
        sums = grid(s, core)
        assert torch.equal(sums.gather(-1, want), sums.gather(-1, chosen(s, core)))


def test_the_permutation_is_a_bijection_and_is_kept(tmp_path):
    model = make(ULTRAMEM)
    permutation = model.pool.permutation
    assert torch.equal(permutation.long().sort().values, torch.arange(4 * 36))
    assert not torch.equal(permutation.long(), torch.arange(4 * 36))
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    torch.manual_seed(1)
    other = GPT(ULTRAMEM).double()
    assert not torch.equal(other.pool.permutation, permutation)
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(other.pool.permutation, permutation)


def test_the_rate_of_the_values_falls_to_that_of_the_network():
    config = TrainConfig(
        mem_decay=4.0,
        max_iters=100,
        warmup_iters=10,
        learning_rate=1e-3,
        mem_learning_rate=1e-3,
        min_lr=1e-4,
    )
    ratios = [memory_rate(config, it) / learning_rate(config, it, 1e-3) for it in (0, 50, 100)]
    assert ratios == pytest.approx([4, 2.5, 1])
    assert memory_rate(replace(config, mem_decay=0.0), 50) == config.mem_learning_rate


def test_the_layers_output_comes_after_a_later_block():
    model, idx = make(replace(ULTRAMEM, mem_layers=(0,), mem_skip=2)), torch.randint(50, (1, 16))
    assert all(isinstance(block.ffn, SwiGLU) for block in model.blocks)
    before = model(idx)[0]
    x = model.embedding(idx)
    later = model.blocks[0].skip(model.blocks[0].attn_norm(x), model.pool)
    for block in model.blocks:
        x, _ = block(x, model.pool, model.cos[:16], model.sin[:16])
    torch.testing.assert_close(model.logits(model.norm(x + later)), before)


# --- all of them --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "facts"
    assert prepare("--people=8", "--biographies=30", "--out", folder).returncode == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("system", ["pkm", "moe", "peer", "ultramem", "engram"])
def test_each_system_learns_the_facts_of_8_people(eight, tmp_path, system):
    """Who ignores the name in a question is right one time in eight."""
    options = (
        "--n_layer=2 --n_embd=48 --n_ffn=64 --block_size=64 --mem_keys=16 --mem_topk=4 "
        "--max_iters=180 --eval_interval=180 --eval_iters=1 --warmup_iters=20 --learning_rate=8e-3 --device=cpu"
    ).split()
    options.append("--ngram_layers=0" if system == "engram" else "--mem_layers=0")
    folders = (f"--dataset={eight}", f"--out_dir={tmp_path}")
    train_here(f"--preset=facts-{system}", *folders, *options)
    assert log_of(tmp_path)[-1]["recall"] > 0.6


SYSTEMS = ("memory", "dense", "dense2x", "moe", "pkm", "peer", "ultramem", "engram")
VOCABULARIES = {"facts": 1712, "shakespeare": 256, "gpt2": 50257, "gpt2-small": 50257}
FLOPS = {  # of a token, with each of SYSTEMS, beside the family's memory preset. A width that changes by 8 changes them.
    "facts": (1, 1.000, 1.996, 1.006, 0.994, 0.999, 1.002, 1.013),
    "shakespeare": (1, 1.030, 1.997, 1.018, 0.983, 0.982, 1.002, 1.025),
    "gpt2": (1, 1.016, 2.001, 1.017, 1.001, 0.985, 1.000, 1.017),
    "gpt2-small": (1, 1.018, 2.001, 1.018, 0.999, 0.976, 0.999, 1.023),
}


def preset(family, system):
    """-> its TrainConfig and GPTConfig"""
    options = {**PRESETS[f"{family}-{system}"], "vocab_size": VOCABULARIES[family]}
    return make_configs(options, TrainConfig, GPTConfig)


@pytest.mark.parametrize("family", VOCABULARIES)
def test_presets_of_a_family_have_equal_flops_and_parameters(family):
    flops, parameters = [], []
    for system in SYSTEMS:
        config = preset(family, system)[1]
        with torch.device("meta"):
            model = GPT(config, initialize=False)
        flops.append(sum(model.flops_per_token(config.block_size).values()))
        parameters.append(sum(model.parameter_counts().values()))
    flops, parameters = np.array(flops) / flops[0], np.array(parameters) / parameters[0]
    assert flops.tolist() == pytest.approx(FLOPS[family], abs=6e-4)
    assert flops.tolist() == pytest.approx([1, 1, 2, 1, 1, 1, 1, 1], rel=0.03)
    assert parameters[3:].tolist() == pytest.approx([1] * 5, rel=0.05)


@pytest.mark.parametrize("family", VOCABULARIES)
def test_presets_of_a_family_have_the_same_data_steps_and_size(family):
    """Only the options of the system and its values, and the width of the network beside it, differ."""
    rates = {"mem_learning_rate": 1.0, "mem_decay": 0.0}
    shape = ("n_layer", "n_head", "n_embd", "block_size")
    train_config, model_config = preset(family, "memory")
    for system in SYSTEMS:
        other, other_model = preset(family, system)
        assert replace(other, **rates) == replace(train_config, **rates), system
        for name in shape:
            assert getattr(other_model, name) == getattr(model_config, name), (system, name)


def test_each_family_has_a_preset_of_each_system():
    assert set(PRESETS) == {f"{family}-{system}" for family in VOCABULARIES for system in SYSTEMS}


class WideGate(MemoryPlus):
    """A gate of four parts, whose mean is taken: the kind of change for which somebody opens this repository."""

    def __init__(self, dim, **options):
        super().__init__(dim, **options)
        self.gate = torch.nn.Linear(dim, 4 * self.D, bias=False)

    def forward(self, x, pool):
        y = self.read(x.flatten(0, -2), pool).view(x.shape)
        return self.out(y * F.silu(self.gate(x)).unflatten(-1, (4, -1)).mean(-2))


def test_a_system_of_ones_own_is_a_class_and_a_line_and_counts_its_flops(monkeypatch):
    monkeypatch.setitem(LAYERS, "memory", WideGate)
    torch.manual_seed(0)
    config = replace(DENSE, mem_layers=(1,), mem_keys=6, mem_heads=3, mem_topk=3)
    model, T = GPT(config), 16
    assert (
        isinstance(model.blocks[1].ffn, WideGate)
        and model.blocks[1].ffn.gate.weight.std() < 1.2 * 16**-0.5
    )
    with FlopCounterMode(display=False) as counter:
        model.blocks[1].ffn(torch.randn(1, T, 16), model.pool)
    lookup = 2 * 3 * 3 * 16  # PyTorch does not count it
    assert model.flops_per_token(T)["memory"] == counter.get_total_flops() / T + lookup


@pytest.mark.parametrize(
    "options, words",
    [
        (["--moe_experts=2", "--moe_topk=3", "--system=moe"], ["moe_topk=3", "moe_experts=2"]),
        (["--system=moe", "--n_ffn=12"], ["n_ffn=12", "multiple of 8"]),
        (["--system=peer", "--mem_value_dim=16"], ["mem_value_dim=16", "n_embd=32"]),
        (["--mem_rank=2"], ["mem_rank=2", "system=ultramem"]),
        (["--mem_softmax=false", "--system=peer"], ["mem_softmax=False", "system=ultramem"]),
        (["--mem_skip=1", "--mem_count=0", "--system=moe"], ["mem_skip=1"]),
        (["--system=peer", "--memory_parallel=2"], ["memory_parallel=2", "system=memory", "peer"]),
        (["--system=ultramem", "--mem_skip=1"], ["mem_skip=1", "block 2"]),
        (["--system=ultramem", "--mem_cores=2"], ["mem_cores=2", "mem_rank=0"]),
        (["--system=ultramem", "--mem_rank=1", "--mem_cores=3"], ["mem_cores=3", "mem_value_dim=32"]),
        (["--system=ultramem", "--mem_expand=3"], ["mem_expand=3", "square"]),
        (["--system=ultramem", "--mem_rank=3"], ["mem_key_dim=16", "6"]),
        (["--system=dense"], ["system=dense", "moe"]),
        (["--moe_topk=2"], ["moe_topk=2", "system=moe"]),
        (["--system=ultramem", "--mem_rank=2", "--mem_key_dim=8"], ["mem_key_dim=8", "LayerNorm"]),
        (["--system=ultramem", "--mem_rank=2", "--mem_topk=9"], ["mem_topk=9", "at most 8"]),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_are_refused_by_name(facts, tmp_path, capsys, options, words):
    given = [
        *SMALL,
        "--mem_layers=1",
        f"--dataset={facts}",
        f"--out_dir={tmp_path / 'out'}",
        *options,
    ]
    said = refusal(train.main, given, capsys)
    assert all(word in said for word in words), said
    assert not (tmp_path / "out").exists()
