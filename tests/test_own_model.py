"""The layer in somebody else's model: a transformer on PyTorch's own attention, two memory layers that read one pool. Nothing of
model.py is used."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kernels import RowAdam
from memory import MemoryLayer, ValuePool

V, C, T, SLOTS = 24, 32, 2, 15**2
OPTIONS = {
    "memory+": {},
    "pkm": dict(gate=False, qk_norm=False),
    "no qk-norm, narrow": dict(qk_norm=False, value_dim=20, key_dim=6),
    "no gate, wide": dict(gate=False, value_dim=40, heads=1, topk=15),
}


class Transformer(nn.Module):
    def __init__(self, slots=SLOTS, **options):
        super().__init__()
        options = dict(heads=2, topk=4) | options
        self.embedding = nn.Embedding(V, C)
        self.positions = nn.Parameter(torch.randn(T, C))
        self.attention = nn.ModuleList(
            nn.MultiheadAttention(C, 4, batch_first=True) for _ in range(2)
        )
        self.memory = nn.ModuleList(MemoryLayer(dim=C, slots=slots, **options) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(C) for _ in range(4))
        self.pool = ValuePool(slots=slots, dim=options.get("value_dim", C))
        self.head = nn.Linear(C, V)

    def forward(self, tokens, read=MemoryLayer.forward):
        x = self.embedding(tokens) + self.positions  # (B, T, C)
        future = torch.ones(T, T, dtype=torch.bool).triu(1)
        for i in range(2):
            h = self.norms[2 * i](x)
            x = x + self.attention[i](h, h, h, attn_mask=future, need_weights=False)[0]
            x = x + read(self.memory[i], self.norms[2 * i + 1](x), self.pool)
        return self.head(x)

    def network(self):
        return [p for name, p in self.named_parameters() if name != "pool.values"]


def make(dtype=torch.float32, seed=0, **options):
    torch.manual_seed(seed)
    return Transformer(**options).to(dtype)


def make_optimizers(model, adam=torch.optim.AdamW):
    return adam(model.network(), lr=3e-3), RowAdam(model.pool, lr=1e-2)


def batch(seed, size=256):
    """Pairs of tokens (size, 2); targets (size): what a random table says of them."""
    table = torch.randint(V, (V, V), generator=torch.Generator().manual_seed(99))
    tokens = torch.randint(V, (size, T), generator=torch.Generator().manual_seed(seed))
    return tokens, table[tokens[:, 0], tokens[:, 1]]


def loss_of(model, seed):
    tokens, targets = batch(seed)
    return F.cross_entropy(model(tokens)[:, -1], targets)


def train(model, optimizers, seeds):
    losses = []
    for seed in seeds:
        loss = loss_of(model, seed)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
def test_it_learns_a_table_of_576_entries_by_heart():
    model = make(slots=32**2, topk=8)
    model_without = make(slots=32**2, topk=8)
    model_without.pool.requires_grad_(False).values.zero_()  # no memory
    start = model.pool.values.detach().clone()
    losses = train(model, make_optimizers(model), range(120))
    without = train(
        model_without, [torch.optim.AdamW(model_without.network(), lr=3e-3)], range(120)
    )
    tokens, targets = batch(1000)
    with torch.no_grad():
        right = (model(tokens)[:, -1].argmax(-1) == targets).float().mean().item()
    assert losses[0] > 3 and losses[-1] < 0.3 and right > 0.95, (losses[-1], right)
    assert without[-1] > losses[-1] + 0.5, without[-1]
    assert (model.pool.values - start).norm(dim=1).gt(0.1).float().mean() > 0.5  # values have moved


def dense_read(layer, x, pool):
    """The page at the top of memory.py with all S scores of a token, and a matrix of weights (n, S) that is zero but for the K best of
    each head."""
    shape, x = x.shape, x.reshape(-1, C)
    H, N, K, Q = layer.H, layer.N, layer.K, layer.Q

    def norm(v, weight):
        return v * (v.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight

    q, keys = (x @ layer.query.weight.T).view(-1, 2, H, Q), layer.keys.view(2, H, N, Q)
    scale = 1.0
    if not isinstance(layer.query_norm, nn.Identity):
        q, keys, scale = norm(q, layer.query_norm.weight), norm(keys, layer.key_norm.weight), Q**0.5
    s1, s2 = torch.einsum("nahq,ahkq->ahnk", q, keys) / scale  # (H, n, N)
    every = (s1.unsqueeze(-1) + s2.unsqueeze(-2)).flatten(-2)  # (H, n, S)
    last = every.topk(K).values[..., -1:]
    weights = every.masked_fill(every < last, -torch.inf).softmax(-1).sum(0)
    y = weights @ pool.values
    if layer.gate is not None:
        y = y * F.silu(x @ layer.gate.weight.T)
    if layer.out is not None:
        y = y @ layer.out.weight.T
    return y.view(shape)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_it_equals_a_float64_program_with_all_slots(options, dtype):
    model = make(dtype, **options)
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        for p in (*model.norms.parameters(), *model.memory.parameters()):
            p.mul_(1.2)
    exact.load_state_dict(model.state_dict())
    tokens = torch.randint(V, (5, T))
    model.pool.collect_gradients()
    got, want = model(tokens), exact(tokens, read=dense_read)
    grad = torch.randn(got.shape)
    got.backward(grad.to(dtype))
    want.backward(grad.double())
    tolerance = 1e-10 if dtype == torch.float64 else 2e-4
    assert (got - want).norm() <= tolerance * want.norm()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert gradients["pool.values"] is None
    gradients["pool.values"] = model.pool.take_gradient().to_dense()
    for name, p in exact.named_parameters():
        if "in_proj_bias" not in name:  # that of keys has no gradient
            assert (
                p.grad.norm() > 0 and (gradients[name] - p.grad).norm() <= tolerance * p.grad.norm()
            ), name


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 3, 2), (0,), (2, 0)])
def test_any_leading_shape_is_the_same_tokens(shape):
    torch.manual_seed(0)
    layer, pool = MemoryLayer(dim=C, slots=SLOTS, topk=4), ValuePool(slots=SLOTS, dim=C)
    x = torch.randn(*shape, C)
    y = layer(x, pool)
    one_by_one = [layer(token, pool) for token in x.reshape(-1, C)]
    assert y.shape == x.shape
    if one_by_one:
        torch.testing.assert_close(y.reshape(-1, C), torch.stack(one_by_one))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_layer_and_pool_draw_their_own_values(options):
    """A fresh layer gives an output of a size that depends on its input."""
    torch.manual_seed(0)
    options = dict(topk=4) | options
    layer, pool = (
        MemoryLayer(dim=C, slots=SLOTS, **options),
        ValuePool(slots=SLOTS, dim=options.get("value_dim", C)),
    )
    y = layer(torch.randn(200, C), pool)
    assert y.isfinite().all() and 1e-4 < y.std() < 1 and y.std(0).min() > 1e-5
    for p in (*layer.parameters(), *pool.parameters()):
        p.data.fill_(torch.nan)
    layer.initialize()
    pool.initialize()
    assert all(p.isfinite().all() for p in (*layer.parameters(), *pool.parameters()))


def test_state_dict_and_optimizers_continue_to_the_same_bits(tmp_path):
    model = make()
    optimizers = make_optimizers(model)
    train(model, optimizers, range(4))
    names = list(model.state_dict())
    assert names.count("pool.values") == 1 and not any(
        "gradient" in name or "touched" in name for name in names
    )
    torch.save(
        [model.state_dict(), *(optimizer.state_dict() for optimizer in optimizers)],
        tmp_path / "it.pt",
    )
    want = train(model, optimizers, range(4, 8))
    other = make(seed=1)
    others = make_optimizers(other)
    saved = torch.load(tmp_path / "it.pt", weights_only=True)
    for part, state in zip((other, *others), saved, strict=True):
        part.load_state_dict(state)
    assert train(other, others, range(4, 8)) == want
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )


def test_micro_steps_add_up_and_a_gradient_can_be_dropped():
    model, whole = make(), make()
    for part in (model, whole):
        part.pool.collect_gradients()
    tokens = torch.randint(V, (6, T))
    whole(tokens).square().sum().backward()
    optimizer = RowAdam(model.pool)
    model(tokens[:3] * 0).sum().backward()  # NaN, say
    model.zero_grad()
    optimizer.zero_grad()
    for part in tokens.split(2):
        model(part).square().sum().backward()
    torch.testing.assert_close(
        model.pool.take_gradient().to_dense(),
        whole.pool.take_gradient().to_dense(),
        rtol=1e-4,
        atol=1e-5,
    )


# --- each mistake ---------------------------------------------------------------------------------------------------------


def test_adamw_for_all_parameters_is_refused_at_the_first_step():
    """It would leave the values as they are."""
    model = make()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(RuntimeError, match=r"RowAdam\(pool\).*AdamW"):
        train(model, [optimizer], [0])


ADAMS = {
    "AdamW": torch.optim.AdamW, "fused": partial(torch.optim.AdamW, fused=True), "foreach": partial(torch.optim.AdamW, foreach=True),
    "loop": partial(torch.optim.AdamW, foreach=False), "SGD": torch.optim.SGD,
}  # fmt: skip


ORDERS = {  # of the parts of a training step
    "zero_grad last": "forward backward step zero",
    "zero_grad first": "zero forward backward step",
    "zero_grad between": "forward zero backward step",
    "zeros instead of None": "forward backward step zeros",
    "no zero_grad": "forward backward step",
    "micro-steps": "forward backward forward backward step zero",
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("adam", ADAMS.values(), ids=ADAMS)
def test_a_gradient_that_is_never_taken_out_is_refused_at_the_second_step(adam, order):
    """RowAdam is there, but its step() is forgotten; perhaps because AdamW has the values as well."""
    model = make()
    make_optimizers(model)
    optimizer = adam(model.parameters(), lr=1e-3)
    loss = None

    def run(part):
        nonlocal loss
        if part == "forward":
            loss = loss_of(model, 0)
        elif part == "backward":
            loss.backward()
        elif part == "step":
            optimizer.step()
        else:
            optimizer.zero_grad(set_to_none=part == "zero")

    for part in order.split():
        run(part)
    with torch.no_grad():
        loss_of(model, 1)  # evaluation is possible
    with pytest.raises(
        RuntimeError, match=r"gradient of an earlier step: call step\(\) of RowAdam\(pool\)"
    ):
        for part in order.split():
            run(part)


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_any_order_of_a_step_is_right_with_row_adam(order):
    model = make()
    optimizers = make_optimizers(model)
    before = model.pool.values.detach().clone()
    for part in 3 * order.split():
        if part == "forward":
            loss = loss_of(model, 0)
        elif part == "backward":
            loss.backward()
        else:
            for optimizer in optimizers:
                if part == "step":
                    optimizer.step()
                else:
                    optimizer.zero_grad(set_to_none=part == "zero")
    assert optimizers[1].state[model.pool.values]["step"] == 3
    assert (model.pool.values != before).any(dim=1).sum() > 50


def test_adamw_that_has_the_values_beside_row_adam_does_not_move_them():
    model, other = make(), make()
    first = train(model, make_optimizers(model), range(5))
    _, rows = make_optimizers(other)
    adam = torch.optim.AdamW(
        [{"params": other.network()}, {"params": [other.pool.values]}], lr=3e-3
    )
    assert train(other, [adam, rows], range(5)) == first
    assert torch.equal(model.pool.values, other.pool.values)


def test_loading_weights_between_two_steps_is_no_mistake():
    model = make()
    optimizers = make_optimizers(model)
    model(torch.zeros(1, T, dtype=torch.int64))  # with gradients, but without a backward pass
    model.load_state_dict(make(seed=1).state_dict())
    train(model, optimizers, [0])


def test_activation_checkpointing_is_no_mistake():
    """A layer reads again in the backward pass, when the layer above it has added its gradient."""
    model, other = make(), make()

    def read_again(layer, x, pool):
        return torch.utils.checkpoint.checkpoint(layer, x, pool, use_reentrant=False)

    want = train(model, make_optimizers(model), range(3))
    forward = other.forward
    other.forward = lambda tokens: forward(tokens, read=read_again)
    assert train(other, make_optimizers(other), range(3)) == want


@pytest.mark.parametrize(
    "layer, pool, message",
    [
        (dict(slots=16**2), dict(slots=15**2, dim=C), "slots=256 reads a pool of 225"),
        (dict(slots=15**2), dict(slots=16**2, dim=C), "slots=225 reads a pool of 256"),
        (
            dict(slots=16**2, value_dim=8),
            dict(slots=16**2, dim=C),
            "value_dim=8 reads values of width 32",
        ),
    ],
)
def test_a_pool_of_another_shape_is_refused(layer, pool, message):
    with pytest.raises(ValueError, match=message):
        MemoryLayer(dim=C, topk=4, **layer)(torch.randn(3, C), ValuePool(**pool))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(slots=1000), "slots=1000: must be a square number N \\* N, as 961 is"),
        (dict(slots=0), "slots=0"),
        (dict(slots=16, topk=5), "topk=5: must be from 1 to 4"),
        (dict(slots=256, topk=0), "topk=0"),
        (dict(slots=256, topk=4, key_dim=7), "key_dim=7: must be even"),
        (dict(slots=256, topk=4, heads=0), "heads=0"),
        (dict(slots=256, topk=4, value_dim=0), "value_dim=0"),
    ],
)
def test_a_layer_that_cannot_be_built_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MemoryLayer(dim=C, **options)


def test_frozen_values_need_no_optimizer():
    model = make()
    model.pool.requires_grad_(False)
    losses = train(model, [torch.optim.AdamW(model.network(), lr=3e-3)], [0] * 20)
    assert losses[-1] < losses[0] - 0.5 and model.memory[0].keys.grad is None
    loss_of(model, 0).backward()
    assert model.memory[0].keys.grad.norm() > 0


@pytest.mark.slow
def test_torch_compile_takes_it_in_one_graph():
    model, tokens, gradients = make(), torch.randint(V, (3, T)), []
    model.pool.collect_gradients()
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        run(tokens).square().sum().backward()
        gradients.append(
            torch.cat(
                [
                    model.pool.take_gradient().to_dense().flatten(),
                    *(p.grad.flatten() for p in model.network()),
                ]
            )
        )
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


def test_a_model_that_moves_to_another_type_takes_what_it_collects_along():
    model = make()
    optimizer = RowAdam(model.pool)
    model.to(torch.bfloat16)
    model(torch.zeros(2, T, dtype=torch.int64)).sum().backward()
    before = model.pool.values.detach().clone()
    optimizer.step()
    assert model.pool.values.dtype == torch.bfloat16 and (before != model.pool.values).any()
