"""The GPT around the layer: initialisation, counts, generation, configuration."""

import contextlib
import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from kernels import RowAdam
from model import GPT, GPTConfig, attend, sample_token

DENSE = GPTConfig(vocab_size=61, block_size=24, n_layer=3, n_head=2, n_embd=16)
MEMORY = replace(
    DENSE, mem_layers=(0, 2), mem_keys=9, mem_heads=3, mem_topk=4, mem_key_dim=10, mem_value_dim=12
)
PKM = replace(
    DENSE, mem_layers=(1,), mem_keys=9, mem_heads=3, mem_topk=4, mem_gate=False, mem_qk_norm=False
)
SEPARATE = replace(MEMORY, mem_shared=False)
MOE = replace(DENSE, system="moe", mem_layers=(0, 1, 2), moe_experts=4, moe_topk=2)
PEER = replace(MEMORY, system="peer", mem_gate=False, mem_value_dim=16)
ULTRAMEM = replace(
    MEMORY, system="ultramem", mem_layers=(0, 1), mem_key_dim=12, mem_gate=False, mem_value_dim=8, mem_rank=2, mem_cores=2,
    mem_softmax=False, mem_expand=4, mem_skip=1,
)  # fmt: skip
ENGRAM = replace(
    DENSE, ngram_layers=(0, 2), ngram_rows=30, ngram_heads=2, ngram_width=4, separator=7
)
SYSTEMS = {
    "dense": DENSE,
    "memory": MEMORY,
    "separate": SEPARATE,
    "pkm": PKM,
    "moe": MOE,
    "peer": PEER,
    "ultramem": ULTRAMEM,
    "engram": ENGRAM,
    "bigram": replace(DENSE, ngram_layers=(0, 1, 2), ngram="bigram", ngram_rows=300),
    "both": replace(ENGRAM, mem_layers=(0, 2), mem_keys=9, mem_heads=3, mem_topk=4),
}
BOTH = pytest.mark.parametrize("config", [DENSE, MEMORY], ids=["dense", "memory"])
ALL = pytest.mark.parametrize("config", SYSTEMS.values(), ids=SYSTEMS)


def make(config, seed=0):
    """A model in which n-gram memories add something, too: at first they add 0."""
    torch.manual_seed(seed)
    model = GPT(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if starts_at_0(model, name):
                parameter.normal_()
    return model


def starts_at_0(model, name):
    """So that an n-gram memory adds nothing at first."""
    bigram = model.config.ngram == "bigram" and name == "ngram_pool.values"
    return bigram or name.endswith("ngram.value.weight")


def collecting(model):
    """As an optimizer of the pool does."""
    for pool in model.pools().values():
        pool.collect_gradients()
    return model


def gradients_of(model, idx, targets):
    collecting(model)(idx, targets)[1].backward()
    return taken(model)


def taken(model):
    """{name: gradient} of all parameters, dense."""
    gradients = {name: p.grad for name, p in model.named_parameters()}
    for name in list(gradients):
        if name.endswith("pool.values"):
            assert gradients[name] is None
            pool = model.get_submodule(name.removesuffix(".values"))
            gradients[name] = pool.take_gradient().to_dense()
    return {name: gradient.clone() for name, gradient in gradients.items()}


def tokens(B, T, seed=0):
    return torch.randint(61, (B, T), generator=torch.Generator().manual_seed(seed))


# --- initialisation and gradients -------------------------------------------------------------------------------------


@ALL
def test_every_parameter_is_initialised(config):
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    model.initialize()
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        if not starts_at_0(model, name):
            assert parameter.ndim == 1 or parameter.std() > 0, name


@ALL
def test_every_parameter_receives_a_gradient(config):
    model = make(config)
    for name, gradient in gradients_of(model, tokens(8, 24), tokens(8, 24, 1)).items():
        assert gradient is not None and gradient.norm() > 0, name


@ALL
def test_rows_that_pad_the_vocabulary_stay_zero_and_are_never_drawn(config):
    model = collecting(make(config))
    assert model.embedding.weight.shape == (64, 16) and model.embedding.weight[61:].abs().max() == 0
    logits, loss = model(tokens(8, 24), tokens(8, 24, 1))
    loss.backward()
    assert logits.size(-1) == 61 and model.embedding.weight.grad[61:].abs().max() == 0
    with torch.no_grad():
        model.embedding.weight[61:] = 100 * model.norm(
            torch.ones(16)
        )  # even if they had the largest logits
    assert model.generate(tokens(4, 5), 30, temperature=100.0).max() < 61


@ALL
def test_first_loss_is_that_of_a_guess(config):
    loss = make(config)(tokens(32, 24), tokens(32, 24, 1))[1].item()
    assert abs(loss - math.log(61)) < 0.8


def test_pool_appears_once():
    model = make(MEMORY)
    assert [name for name in model.state_dict() if "values" in name] == ["pool.values"]
    assert sum(p is model.pool.values for p in model.parameters()) == 1
    assert model.parameter_counts()["pool"] == 81 * 12


def test_each_parameter_is_in_one_group():
    groups = make(MEMORY).parameter_groups()
    dimensions = {name: {p.ndim for p in group} for name, group in groups.items()}
    assert dimensions == {"matrices": {2, 3}, "norm_weights": {1}, "pool": {2}}
    everything = [id(p) for group in groups.values() for p in group]
    assert len(everything) == len(set(everything)) == len(list(make(MEMORY).parameters()))
    assert [p.shape for p in groups["pool"]] == [(81, 12)]
    assert make(DENSE).parameter_groups()["pool"] == []


def test_loss_is_mean_cross_entropy_and_ignores_minus_one():
    model, idx, targets = make(MEMORY), tokens(2, 24), tokens(2, 24, 1)
    targets[0, :20] = -1
    logits, loss = model(idx, targets)
    kept = targets != -1
    want = -logits.double().log_softmax(-1)[kept].gather(1, targets[kept].unsqueeze(1)).mean()
    assert logits.shape == (2, 24, 61) and loss.item() == pytest.approx(want.item(), rel=1e-5)


@ALL
def test_no_token_sees_what_follows(config):
    model, idx = make(config), tokens(2, 24)
    changed = idx.clone()
    changed[:, 15:] = (changed[:, 15:] + 1) % 61
    before, after = model(idx)[0], model(changed)[0]
    torch.testing.assert_close(before[:, :15], after[:, :15], rtol=0, atol=1e-5)
    assert (before[:, 15:] - after[:, 15:]).abs().max() > 1e-2


def test_positions_matter_and_are_relative():
    """A token's attention to what is before it depends on the distance, not on where both are."""
    model = make(replace(DENSE, n_layer=1))
    x = torch.randn(1, 5, 16)
    attention = model.blocks[0].attn
    here = attention(x, model.cos[:5], model.sin[:5])
    there = attention(x, model.cos[11:16], model.sin[11:16])
    torch.testing.assert_close(here, there, rtol=0, atol=1e-5)
    swapped = attention(x[:, [1, 0, 2, 3, 4]], model.cos[:5], model.sin[:5])
    assert (here[:, 4] - swapped[:, 4]).abs().max() > 1e-3


@pytest.mark.parametrize("T", [1, 2, 64, 128, 129])
def test_attention_equals_its_formula_in_float64(T):
    q, k, v = torch.randn(3, 2, 4, T, 8)
    scores = q.double() @ k.double().mT / math.sqrt(8)
    seen = torch.ones(T, T, dtype=torch.bool).tril()
    want = scores.masked_fill(~seen, -math.inf).softmax(-1) @ v.double()
    torch.testing.assert_close(attend(q, k, v).double(), want, rtol=0, atol=1e-5)
    rounded = attend(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert rounded.dtype == torch.bfloat16 and (rounded - want).abs().max() < 0.05
    torch.testing.assert_close(
        attend(q[:, :, -1:], k, v)[:, :, 0].double(), want[:, :, -1], rtol=0, atol=1e-5
    )


def shallow(config, n_layer, mem_layers=(), **options):
    """Each block takes a second to compile."""
    return replace(
        config, n_layer=n_layer, mem_layers=mem_layers, mem_count=len(mem_layers), **options
    )


SHALLOW = {
    "memory": shallow(MEMORY, 2, (0, 1)),
    "one slot": shallow(MEMORY, 1, (0,), mem_topk=1),  # then weights are a view of other strides
    "dense": shallow(DENSE, 1),
    "moe": shallow(MOE, 1, (0,)),
    "peer": shallow(PEER, 1, (0,)),
    "ultramem": shallow(ULTRAMEM, 2, (0,)),
    "engram": replace(SYSTEMS["both"], n_layer=1, mem_layers=(0,), mem_count=1, ngram_layers=(0,)),
    "bigram": replace(SYSTEMS["bigram"], n_layer=1, ngram_layers=(0,)),
}


def as_is_and_compiled(model, fullgraph=True):
    """Traced, with gradients, but without a C++ compiler; fullgraph=True refuses a break."""
    torch._dynamo.reset()  # it counts what other tests have compiled, and gives up after eight
    return model, torch.compile(model, backend="aot_eager", fullgraph=fullgraph)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHALLOW)
def test_torch_compile_changes_nothing_and_has_one_graph(name):
    """Two micro-steps: gradients add up."""
    model, idx, targets = collecting(make(SHALLOW[name])), tokens(2, 24), tokens(2, 24, 1)
    gradients = []
    bfloat16 = torch.autocast("cpu", torch.bfloat16, enabled=name == "moe")  # see grouped_product
    for run in as_is_and_compiled(model):
        model.zero_grad()
        for part in (slice(0, 1), slice(1, 2)):
            with bfloat16:
                loss = run(idx[part], targets[part])[1]
            loss.backward()
        gradients.append(taken(model).values())
    tolerance = 0.05 if name == "moe" else 1e-4
    for plain, compiled in zip(*gradients, strict=True):
        assert (plain - compiled).norm() <= tolerance * plain.norm()


@pytest.mark.slow
@pytest.mark.parametrize("learns", ["values", "network"])
@pytest.mark.parametrize("name", ["memory", "peer", "ultramem"])
def test_torch_compile_takes_a_model_that_learns_in_part(name, learns):
    """Values alone, as edit/update.py does: the compiled backward pass then gives no gradient to anybody, but still fills the accumulator."""
    model, idx, gradients = make(SHALLOW[name]), tokens(2, 24), []
    model.requires_grad_(learns == "network").pool.requires_grad_(learns == "values")
    if learns == "values":
        model.pool.collect_gradients()
    for run in as_is_and_compiled(model):
        model.zero_grad()
        run(idx, idx)[1].backward()
        got = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        if learns == "values":
            assert got == {"pool.values": None}
            got = {"pool.values": model.pool.take_gradient().to_dense()}
        gradients.append(got)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert all(gradient.norm() > 0 for gradient in gradients[0].values())
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_torch_compile_takes_experts_in_float32():
    """They break the graph, and change nothing."""
    model, idx, gradients = make(SHALLOW["moe"]), tokens(2, 24), []
    for run in as_is_and_compiled(model, fullgraph=False):
        model.zero_grad()
        run(idx, idx)[1].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@ALL
def test_a_model_can_be_copied_after_a_training_step(config):
    """copy.deepcopy refuses tensors that autograd made: nothing is kept of a forward pass."""
    model, idx = collecting(make(config)), tokens(2, 24)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    )
    model(idx, idx)[1].backward()
    for other in (copy.deepcopy(model), average.module):
        torch.testing.assert_close(other(idx)[0], model(idx)[0])
    before = {name: p.detach().clone() for name, p in average.module.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    average.update_parameters(model)  # the first update copies
    average.update_parameters(model)
    for name, p in average.module.named_parameters():
        torch.testing.assert_close(p, before[name] + 1.0)


def test_logits_beside_a_loss_carry_no_gradient():
    """Or a compiled backward pass would read a gradient of theirs: (B, T, V) zeros."""
    model, idx = make(MEMORY), tokens(2, 24)
    logits, loss = model(idx, idx)
    assert not logits.requires_grad and loss.requires_grad
    assert model(idx)[0].requires_grad


# --- what only a GPU runs, as far as a machine without one carries ----------------------------------------------------


@ALL
@pytest.mark.parametrize("device", ["cuda:0", "meta"])
def test_a_training_step_on_a_gpu_mixes_no_devices(config, device):
    """Tensors on a GPU that need not be there: PyTorch's fake ones have shapes, dtypes and devices, and no numbers. Its CPU build
    cannot slice them, and the backward pass asks for a driver: so meta tensors do the same, on a device that is no GPU."""
    if config.system == "moe" and device == "meta":
        pytest.skip("a router leaves autocast, of which meta tensors have none")
    with FakeTensorMode() if device == "cuda:0" else contextlib.nullcontext():
        if device == "cuda:0":
            try:
                torch.empty(2, device=device)[:1].contiguous()
            except RuntimeError as error:
                pytest.skip(f"this build of PyTorch needs a GPU for fake tensors on one: {error}")
        with torch.device(device):
            model = GPT(replace(config, mem_dtype="bfloat16"))
            idx = torch.zeros(2, 24, dtype=torch.int64)
        collecting(model)
        assert {t.device for t in (*model.parameters(), *model.buffers())} == {torch.device(device)}
        torch.set_autocast_dtype("cuda", torch.bfloat16)  # torch.autocast would look for a GPU
        torch.set_autocast_enabled("cuda", config.system == "moe")
        try:
            logits, loss = model(idx, idx)
        finally:
            torch.set_autocast_enabled("cuda", False)
        assert logits.shape == (2, 24, 61) and loss.shape == ()
        if device == "meta":  # on a GPU autograd asks the driver
            loss.backward()
            network = [
                p for name, p in model.named_parameters() if not name.endswith("pool.values")
            ]
            assert all(p.grad.device == p.device and p.grad.shape == p.shape for p in network)
            torch.optim.AdamW(network, fused=False).step()
        if model.pool is not None:  # a resume: the state comes from a file
            optimizer = RowAdam(model.pool)
            state = {"step": 1} | {
                name: torch.zeros(model.pool.values.shape) for name in ("means", "squares")
            }
            optimizer.load_state_dict(
                {"state": {0: state}, "param_groups": optimizer.state_dict()["param_groups"]}
            )
            loaded = optimizer.state[model.pool.values]
            assert (
                loaded["means"].device == torch.device(device)
                and loaded["means"].dtype == torch.float32
            )


def test_generation_asks_for_attention_that_needs_no_plan(monkeypatch):
    """cuDNN's plans anew for each number of keys. Which kinds PyTorch may take, at each call of it while generating, and after."""
    model, allowed, attend = make(DENSE), [], F.scaled_dot_product_attention

    def watch(*inputs, **options):
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attend(*inputs, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watch)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    stream = model.stream(tokens(1, 1), 4)  # one token at a time, also on a CPU with this function
    next(stream)
    assert torch.backends.cuda.cudnn_sdp_enabled() == before  # also between two tokens
    list(stream)
    assert allowed == [False] * 4 * 3 and torch.backends.cuda.cudnn_sdp_enabled() == before
    model(tokens(1, 1))
    assert allowed[-1] == before and torch.backends.cuda.flash_sdp_enabled()


# --- counts -----------------------------------------------------------------------------------------------------------


def test_counts_of_a_dense_model_equal_those_by_hand():
    # A vocabulary of 61 is padded to 64. SwiGLU width: 8/3 * 16 = 42.7, rounded up to 48.
    # Attention 4 * 16 * 16 = 1,024; SwiGLU 3 * 16 * 48 = 2,304; two norms of 16.
    assert DENSE.n_ffn == 48
    model = GPT(DENSE)
    assert model.parameter_counts() == {"dense": 64 * 16 + 3 * (1024 + 2304 + 32) + 16, "pool": 0}
    # A multiply-add is 2 FLOPs. In a sequence of 9, attention sees 5 positions on average: 2 * (q.k and p.v) 2 * 16 * 5.
    want = {
        "attention": 3 * (2 * 1024 + 2 * 2 * 16 * 5),
        "ffn": 3 * 2 * 2304,
        "memory": 0,
        "head": 2 * 16 * 64,
    }
    assert model.flops_per_token(9) == want


def test_counts_of_a_memory_model_equal_those_by_hand():
    # A memory layer: query 16 x (3 heads * 10); keys 2 halves * 3 heads * 9 * 5; two norms of 5; gate 16 x 12; output 12 x 16.
    layer = 16 * 30 + 2 * 3 * 9 * 5 + 10 + 16 * 12 + 12 * 16
    model = GPT(MEMORY)
    dense = 64 * 16 + 3 * (1024 + 32) + 2304 + 2 * layer + 16
    assert model.parameter_counts() == {"dense": dense, "pool": 81 * 12}
    # Query 480; scores 2 * 3 * 9 * 5 = 270; lookup 12 slots * 12; gate and output 192 each.
    memory = 2 * 2 * (480 + 270 + 144 + 192 + 192)
    want = {
        "attention": 3 * (2 * 1024 + 2 * 2 * 16 * 5),
        "ffn": 2 * 2304,
        "memory": memory,
        "head": 2 * 16 * 64,
    }
    assert model.flops_per_token(9) == want


@pytest.mark.parametrize(
    "config", [DENSE, MEMORY, PKM, PEER], ids=["dense", "memory", "pkm", "peer"]
)
def test_flops_equal_what_pytorch_counts_while_running(config):
    """All but the lookup, which PyTorch does not count, and attention, which also computes positions that causality leaves out."""
    B, T = 2, 24
    model = make(config)
    with FlopCounterMode(display=False) as counter:
        model(tokens(B, T))
    counted = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    products = sum(counted.values())
    flops = model.flops_per_token(T)
    c = config
    lookup = (
        len(c.mem_layers)
        * 2
        * c.mem_heads
        * c.mem_topk
        * c.mem_value_dim
        * (2 if c.system == "peer" else 1)
    )
    attention = c.n_layer * 2 * c.n_embd * (T + 1)
    with_later = c.n_layer * 2 * c.n_embd * 2 * T
    assert products == B * T * (sum(flops.values()) - lookup - attention + with_later)


def test_counts_of_ultramem_equal_those_by_hand():
    # Query 16 x (3 heads * 12); keys 2 halves * 3 heads * 2 components * 18 * 3; norms of 3; 2 cores 2 x 2; output 4 * 8 x 16.
    layer = 16 * 36 + 2 * 3 * 2 * 18 * 3 + 2 * 3 + 2 * 4 + 32 * 16
    model = GPT(ULTRAMEM)
    dense = 64 * 16 + 3 * (1024 + 2304 + 32) + 16 + 2 * layer
    assert model.parameter_counts() == {"dense": dense, "pool": 81 * 8}
    # Query 576, scores 3 * 2 * 2 * 18 * 3 = 648, lookup 12 * 8, output 512. For each head: first pass 2 * 18 * 2; second pass twice
    # 4 * 2 * 2 and 4 * 4 * 2; weights of 4 slots: for 2 cores 2 * 2 and 2.
    memory = 2 * 2 * (576 + 648 + 96 + 512 + 3 * (72 + 2 * (16 + 32) + 4 * 2 * (4 + 2)))
    assert model.flops_per_token(9)["memory"] == memory
    assert model.flops_per_token(9)["ffn"] == 3 * 2 * 2304  # none is replaced


def test_memory_layers_are_centred_with_a_stride():
    def layers(n_layer, count):
        return GPTConfig(n_layer=n_layer, mem_count=count).mem_layers

    assert layers(24, 3) == (4, 12, 20) and layers(12, 3) == (
        2,
        6,
        10,
    )  # the paper's, and design by the same rule
    assert layers(4, 1) == (2,) and layers(3, 3) == (0, 1, 2) and layers(12, 0) == ()
    model = GPT(replace(DENSE, n_layer=4, mem_layers=(3, 1)))
    assert [type(block.ffn).__name__ for block in model.blocks] == [
        "SwiGLU",
        "MemoryPlus",
        "SwiGLU",
        "MemoryPlus",
    ]


# --- generation -------------------------------------------------------------------------------------------------------


@ALL
def test_cache_gives_the_logits_of_the_full_forward(config):
    model, idx = make(config), tokens(2, 24)
    full = model(idx)[0]
    cache = model.make_cache(idx)
    parts = [model.hidden(idx[:, :7], cache)]
    parts += [model.hidden(idx[:, t : t + 1], cache, start=t) for t in range(7, 24)]
    cached = model.logits(torch.cat(parts, dim=1))
    assert (full - cached).abs().max() < 1e-4


def greedy_without_cache(model, idx, steps):
    for _ in range(steps):
        idx = torch.cat((idx, model(idx)[0][:, -1].argmax(-1, keepdim=True)), dim=1)
    return idx


@ALL
def test_greedy_text_is_the_same_with_and_without_cache(config):
    model, idx = make(config), tokens(3, 4)
    assert torch.equal(model.generate(idx, 20, temperature=0), greedy_without_cache(model, idx, 20))


@BOTH
def test_past_the_block_the_last_half_is_the_context(config):
    """Within the block (24) all tokens are context; then the last 12 are encoded again, and context grows to 24 once more."""
    model, start = make(config), tokens(2, 10)
    got = model.generate(start, 50, temperature=0)
    idx, context = start, 10
    for _ in range(50):
        if context > 24:
            context = 12
        idx = torch.cat((idx, model(idx[:, -context:])[0][:, -1].argmax(-1, keepdim=True)), dim=1)
        context += 1
    assert torch.equal(got, idx)


def test_prompt_longer_than_the_block_is_cut_to_its_end():
    model, idx = make(MEMORY), tokens(1, 40)
    assert torch.equal(
        model.generate(idx, 1, temperature=0)[:, -1], model(idx[:, -24:])[0][:, -1].argmax(-1)
    )
    with pytest.raises(ValueError, match="40 tokens are more than block_size=24"):
        model(idx)
    with pytest.raises(ValueError, match="start=4: after the first tokens, one at a time"):
        model.hidden(idx[:, :4], torch.zeros(3, 2, 1, 2, 24, 8), start=4)


def test_complete_equals_one_prompt_at_a_time():
    model = make(MEMORY)
    prompts = [tokens(1, length, seed=length)[0].tolist() for length in (3, 7, 3, 1, 7, 3)]
    lengths = [4, 2, 6, 5, 9, 1]
    alone = [
        model.generate(torch.tensor([prompt]), length, temperature=0)[0, len(prompt) :].tolist()
        for prompt, length in zip(prompts, lengths, strict=True)
    ]
    assert (
        model.complete(prompts, lengths, batch_size=2) == model.complete(prompts, lengths) == alone
    )


def draws(logits, number=4000, **options):
    options = {"temperature": 1.0, "top_k": None, "top_p": None} | options
    generator = torch.Generator().manual_seed(0)
    ids = sample_token(torch.tensor([logits]).expand(number, -1), generator=generator, **options)
    return torch.bincount(ids.flatten(), minlength=len(logits)) / number


def test_draws_follow_temperature_top_k_and_top_p():
    p = torch.tensor([0.1, 0.4, 0.2, 0.3])
    logits = p.log().tolist()
    torch.testing.assert_close(draws(logits), p, rtol=0, atol=0.03)
    torch.testing.assert_close(
        draws(logits, temperature=0.5), p**2 / (p**2).sum(), rtol=0, atol=0.03
    )
    torch.testing.assert_close(
        draws(logits, top_k=2), torch.tensor([0, 0.4, 0, 0.3]) / 0.7, rtol=0, atol=0.03
    )
    torch.testing.assert_close(draws(logits, top_k=99), p, rtol=0, atol=0.03)
    torch.testing.assert_close(
        draws(logits, top_p=0.65), torch.tensor([0, 0.4, 0, 0.3]) / 0.7, rtol=0, atol=0.03
    )
    assert draws(logits, temperature=1e-40)[1] == 1
    assert (
        draws(logits, top_p=0.0)[1] == 1
        and draws(logits, temperature=0)[1] == 1
        and draws(logits, top_k=1)[1] == 1
    )


def test_generation_is_repeatable_from_its_generator():
    model, idx = make(MEMORY), tokens(2, 4)
    first, second = (
        model.generate(idx, 30, generator=torch.Generator().manual_seed(5)) for _ in range(2)
    )
    other = model.generate(idx, 30, generator=torch.Generator().manual_seed(6))
    assert torch.equal(first, second) and not torch.equal(first, other)


# --- configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(n_embd=10, n_head=3), "--n_embd=10 must be divisible by --n_head=3"),
        (dict(n_embd=6, n_head=2), "must be even"),
        (dict(n_layer=0), "n_layer=0: must be at least 1"),
        (dict(mem_layers=(1,), mem_keys=8, mem_topk=9), "mem_topk=9: at most 8 with --mem_keys=8"),
        (dict(mem_layers=(1,), mem_topk=0), "mem_topk=0"),
        (
            dict(mem_layers=(1,), mem_dtype="float16"),
            "mem_dtype=float16: must be one of float32, bfloat16",
        ),
        (dict(mem_layers=(1, 12)), "no block 12; --n_layer=12 has blocks 0 to 11"),
        (dict(mem_layers=(-1,)), "no block -1"),
        (dict(mem_count=13), "mem_count=13"),
        (dict(mem_count=1, mem_key_dim=9), "mem_key_dim=9"),
        (dict(mem_count=1, mem_heads=0), "mem_heads=0"),
        (dict(n_ffn=-8), "n_ffn=-8"),
    ],
)
def test_a_shape_that_cannot_be_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        GPTConfig(**options)
