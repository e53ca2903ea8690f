"""A small GPT whose feed-forward networks can be memory layers, or mixtures of experts.

The block is Llama's: pre-RMSNorm, rotary positions (arXiv:2104.09864), SwiGLU (arXiv:2002.05202), no biases:

    x = x + attention(norm(x))
    x = x + ffn(norm(x))          SwiGLU, or in the blocks of config.mem_layers what config.system says

Letters: B batch, T time, C model width (n_embd), V vocabulary; those of the memory are in memory.py."""

import ctypes
import math
import os
import sys
from dataclasses import dataclass, field, fields

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from data.files import blame
from memory import PEER, MemoryLayer, UltraMem, ValuePool, widen


def option(default, help, low=0, below=2**31, choices=()):
    """A dataclass field with help text and limits, low <= number < below, for train.py's command line."""
    return field(default=default, metadata={"help": help, "low": low, "below": below, "choices": choices})


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a model. Raises ValueError, naming the option, for a shape that cannot be built."""

    vocab_size: int = option(50257, "tokens in the vocabulary (train.py takes it from the dataset)", 1)
    block_size: int = option(1024, "longest context, in tokens", 1)
    n_layer: int = option(12, "blocks", 1, 10_000)
    n_head: int = option(12, "attention heads", 1)
    n_embd: int = option(768, "model width C", 1)
    n_ffn: int = option(0, "hidden width of SwiGLU; 0: 8/3 of n_embd, rounded up to a multiple of 8")
    system: str = option("memory", "what mem_layers are", choices=("memory", "moe", "peer", "ultramem"))
    mem_count: int = option(0, "layers of that system, spread evenly over the depth; 0: a dense model")
    mem_layers: tuple[int, ...] = option((), "blocks with such a layer, as in 2,6,10; overrides mem_count")
    moe_experts: int = option(8, "moe: experts E, each a SwiGLU", 1)
    moe_topk: int = option(1, "moe: experts that a token uses", 1)
    mem_keys: int = option(1024, "sub-keys N of each half; the memory has N * N slots", 1)
    mem_heads: int = option(4, "memory heads H", 1)
    mem_topk: int = option(32, "slots K that each memory head reads", 1)
    mem_key_dim: int = option(0, "width of a full key, two halves; 0: half of n_embd, at most 512")
    mem_value_dim: int = option(0, "width D of a value; 0: n_embd")
    mem_dtype: str = option("float32", "dtype of the values", choices=("float32", "bfloat16"))
    mem_gate: bool = option(True, "multiply what was read by silu(W_g x) and project it (Memory+)")
    mem_qk_norm: bool = option(True, "RMSNorm on queries and sub-keys (Memory+)")
    mem_rank: int = option(0, "ultramem: rank r of row and column scores; 0: their sum, as elsewhere")
    mem_cores: int = option(1, "ultramem: cores h, each of which weights one h-th of a value", 1)
    mem_softmax: bool = option(True, "ultramem: softmax of the scores")
    mem_expand: int = option(1, "ultramem: virtual blocks E, a square number: E times the slots", 1)
    mem_skip: int = option(0, "ultramem: add the output so many blocks later; 0: in place of the FFN")

    def __post_init__(self):
        check_options(self)
        fill_in_and_check(self)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.out = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, cos, sin, cache=None, start=0):
        """x (B, T, C) at positions start to start + T - 1 -> (B, T, C). cache (2, B, heads, block_size,
        C/heads): keys and values of the positions before start; those of x are added."""
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)  # (B, heads, T, C/heads)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            cache[0, :, :, start : start + T], cache[1, :, :, start : start + T] = k, v
            k, v = cache[:, :, :, : start + T]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)  # one query, after a start, sees all
        return self.out(y.transpose(1, 2).reshape(B, T, C))


def rotate(x, cos, sin):
    """Rotary positions: turn (x[c], x[c + half]) at position t by t 10000^(-c / half). x (..., T, 2 half)"""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).type_as(x)


class SwiGLU(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate = nn.Linear(config.n_embd, config.n_ffn, bias=False)
        self.up = nn.Linear(config.n_embd, config.n_ffn, bias=False)
        self.out = nn.Linear(config.n_ffn, config.n_embd, bias=False)

    def forward(self, x, pool):
        """x (B, T, C) -> (B, T, C). The pool is for its sibling, MemoryLayer."""
        return self.out(F.silu(self.gate(x)) * self.up(x))


class MoE(nn.Module):
    """Mixture of E experts, each a SwiGLU, of which a token uses the k that the router finds likeliest
    (arXiv:1701.06538; k = 1 is the Switch Transformer, arXiv:2101.03961). No token is dropped."""

    def __init__(self, config):
        super().__init__()
        C, E, self.k = config.n_embd, config.moe_experts, config.moe_topk
        self.router = nn.Linear(C, E, bias=False)
        self.gate_up = nn.Parameter(torch.empty(E, C, 2 * config.n_ffn))
        self.down = nn.Parameter(torch.empty(E, config.n_ffn, C))

    def forward(self, x, pool):
        """x (B, T, C) -> (B, T, C)"""
        shape, x, E = x.shape, x.flatten(0, 1), len(self.down)
        with torch.autocast(x.device.type, enabled=False):
            p = F.linear(widen(x), self.router.weight).softmax(-1)  # (n, E)
        weights, experts = p.topk(self.k)  # (n, k)
        weights = weights / weights.sum(-1, keepdim=True) if self.k > 1 else weights
        chosen = F.one_hot(experts.flatten(), E)  # (n * k, E)
        # E times the sum of share of pairs times mean probability: 1 if both are even (2101.03961, eq. 4)
        self.imbalance = E * (chosen.float().mean(0) * p.mean(0)).sum()
        order, ends = experts.flatten().argsort(stable=True), chosen.sum(0).cumsum(0).int()  # by expert
        a, b = grouped_product(x.repeat_interleave(self.k, 0)[order], self.gate_up, ends).chunk(2, dim=-1)
        y = grouped_product(F.silu(a) * b, self.down, ends)[order.argsort()]  # (n * k, C)
        return (y.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(1).type_as(y).view(shape)

    def auxiliary(self):
        return 0.01 * self.imbalance


def grouped_product(x, w, ends):
    """x (P, in), rows grouped by expert up to ends (E,); w (E, in, out) -> (P, out)"""
    if torch.is_autocast_enabled(x.device.type):
        x, w = (t.to(torch.get_autocast_dtype(x.device.type)) for t in (x, w))
    traceable = x.dtype == torch.bfloat16  # torch.compile knows the product of these alone
    return (torch._grouped_mm if traceable else torch.compiler.disable(torch._grouped_mm))(x, w, offs=ends)


class Block(nn.Module):
    def __init__(self, config, i):
        super().__init__()
        self.attn_norm, self.ffn_norm = (nn.RMSNorm(config.n_embd, eps=1e-6) for _ in range(2))
        system = {"memory": MemoryLayer, "moe": MoE, "peer": PEER, "ultramem": UltraMem}[config.system]
        layer, self.attn = system(config) if i in config.mem_layers else None, Attention(config)
        self.ffn, self.skip = (SwiGLU(config), layer) if config.mem_skip or not layer else (layer, None)

    def forward(self, x, pool, cos, sin, cache=None, start=0):
        x = x + self.attn(self.attn_norm(x), cos, sin, cache, start)
        return x + self.ffn(self.ffn_norm(x), pool)


class GPT(nn.Module):
    def __init__(self, config, group=None, initialize=True):
        """group: torch.distributed processes that share the table, each with a part of its columns.
        initialize=False: for weights that are about to be loaded. Drawing a large table takes seconds."""
        super().__init__()
        self.config = config
        # Also the output matrix, transposed. Padded with zeros to 32 rows, for fast products on GPUs.
        self.embedding = nn.Embedding(-(-config.vocab_size // 32) * 32, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, eps=1e-6)
        S, dtype, self.pool = config.mem_keys**2, getattr(torch, config.mem_dtype), None
        if config.mem_layers and config.system != "moe":
            h, tables = config.mem_cores, 2 if config.system == "peer" else config.mem_cores
            self.pool = ValuePool(S, config.mem_value_dim // h, dtype, group, tables, config.mem_expand)
        half = config.n_embd // config.n_head // 2
        angle = torch.arange(config.block_size).outer(10000.0 ** (-torch.arange(half) / half))  # (T, half)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        if initialize:
            self.initialize()

    @torch.no_grad()
    def initialize(self):
        """Every parameter. Matrices keep the size of what they multiply (std 1 / sqrt(inputs)); those that
        add to the residual stream are smaller, so that 2 n_layer additions sum to about 1 (GPT-2's rule)."""
        residual = 1 / math.sqrt(2 * self.config.n_layer)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                scale = residual if name.endswith(".out") else 1.0
                nn.init.normal_(module.weight, std=scale / math.sqrt(module.in_features))
            elif isinstance(module, MoE):
                nn.init.normal_(module.gate_up, std=module.gate_up.size(1) ** -0.5)
                nn.init.normal_(module.down, std=residual * module.down.size(1) ** -0.5)
            elif isinstance(module, nn.Embedding):  # keeps the size as output matrix: logits of spread 1
                nn.init.normal_(module.weight[: self.config.vocab_size], std=module.embedding_dim**-0.5)
                nn.init.zeros_(module.weight[self.config.vocab_size :])
            elif isinstance(module, nn.RMSNorm | nn.LayerNorm):
                nn.init.ones_(module.weight)
            elif isinstance(module, MemoryLayer):
                nn.init.normal_(module.keys, std=module.Q**-0.5)
                if getattr(module, "core", None) is not None:  # scores of spread 1 / sqrt(H*K)
                    nn.init.normal_(module.core, std=(module.H * module.K * module.r) ** -0.5)
            elif isinstance(module, ValuePool):
                module.initialize(std=0.02)
                if self.config.system == "peer":  # u . x of spread 1
                    module.values[: module.S] *= 50 * self.config.n_embd**-0.5

    def forward(self, idx, targets=None):
        """idx (B, T), targets (B, T) or None -> logits (B, T, V), cross-entropy in nats or None. Target -1 is
        ignored. Logits beside a loss are detached: a compiled backward pass would read zeros for them. The
        layers' auxiliary losses are in the gradient of the loss, not in its value."""
        logits = self.logits(self.hidden(idx))
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)
        for auxiliary in [m.auxiliary() for m in self.modules() if hasattr(m, "auxiliary")]:
            loss = loss + (auxiliary - auxiliary.detach())
        return logits.detach(), loss

    def hidden(self, idx, cache=None, start=0):
        """idx (B, T) token ids at positions start to start + T - 1 -> (B, T, C), for the output matrix."""
        T = idx.size(1)
        if start + T > self.config.block_size:
            raise ValueError(f"{start + T} tokens are more than block_size={self.config.block_size}")
        cos, sin = self.cos[start : start + T], self.sin[start : start + T]
        x, skips = self.embedding(idx), {}
        for i, block in enumerate(self.blocks):
            if block.skip is not None:
                skips[i + self.config.mem_skip] = block.skip(block.attn_norm(x), self.pool)
            x = block(x, self.pool, cos, sin, None if cache is None else cache[i], start)
            x = x + skips.pop(i) if i in skips else x
        return self.norm(x)

    def logits(self, x):
        """x (..., C) -> (..., V)"""
        return F.linear(x, self.embedding.weight)[..., : self.config.vocab_size]

    # --- generation ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, generator=None):
        """Yield max_new_tokens tensors (B,), one token each, that continue idx (B, T). Temperature 0: greedy.
        Keys and values are cached. When the block is full, its last half is encoded afresh and the cache goes
        on from there: every token has between half a block and a whole block of context."""
        B, c, block, device = len(idx), self.config, self.config.block_size, idx.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else self.embedding.weight.dtype
        cache = idx.new_zeros(c.n_layer, 2, B, c.n_head, block, c.n_embd // c.n_head, dtype=dtype)
        window, start = idx[:, -block:], 0
        for _ in range(max_new_tokens):
            if start + window.size(1) > block:
                window, start = idx[:, -max(1, block // 2) :], 0
            # Not cuDNN's attention, PyTorch's first choice on an H100, which plans anew for each length.
            with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
                x = self.hidden(window, cache, start)[:, -1]  # (B, C)
            start += window.size(1)
            window = sample_token(self.logits(x).float(), temperature, top_k, top_p, generator)  # (B, 1)
            idx = torch.cat((idx[:, -block:], window), dim=1)
            yield window[:, 0]

    def generate(self, idx, max_new_tokens, **options):
        """idx (B, T) -> (B, T + max_new_tokens). Options as in stream()."""
        return torch.column_stack([idx, *self.stream(idx, max_new_tokens, **options)])

    def complete(self, prompts, lengths, batch_size=None):
        """Greedily continue prompts (lists of token ids), by lengths[i] tokens. Returns the new ones."""
        device, new = self.embedding.weight.device, [None] * len(prompts)
        batch_size = batch_size or (512 if device.type == "cpu" else 2048)  # a GPU waits for the CPU
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        while order:  # prompts of one length at a time: no padding
            batch = [i for i in order[:batch_size] if len(prompts[i]) == len(prompts[order[0]])]
            order = order[len(batch) :]
            idx = torch.tensor([prompts[i] for i in batch], device=device)
            rows = self.generate(idx, max(lengths[i] for i in batch), temperature=0)[:, idx.size(1) :]
            for i, row in zip(batch, rows.tolist(), strict=True):
                new[i] = row[: lengths[i]]
        return new

    # --- counts and parameter groups ------------------------------------------------------------------------

    def parameter_groups(self):
        """{"matrices", "norm_weights", "pool"}: lists; each parameter in one of them, by the role it plays.
        Matrices (embedding, projections, sub-keys) are decayed; the pool has its own optimiser."""
        groups = {"matrices": [], "norm_weights": [], "pool": [] if self.pool is None else [self.pool.values]}
        for name, parameter in self.named_parameters():
            if name != "pool.values":
                groups["norm_weights" if parameter.ndim == 1 else "matrices"].append(parameter)
        return groups

    def parameter_counts(self):
        """{"dense": ..., "pool": ...}: numbers in the network, and in the whole table beside it."""
        pool, M = (0, 1) if self.pool is None else (self.pool.values.numel(), self.pool.M)
        return {"dense": sum(p.numel() for p in self.parameters()) - pool, "pool": pool * M}

    def flops_per_token(self, T):
        """{"attention", "ffn", "memory", "head"}: forward FLOPs a token in a sequence of T, 2 for each
        multiply-add of matrix products, attention over the (T + 1) / 2 positions that a token sees on
        average, and the lookup; as usual not norms, softmax, top-k. Training costs three times this."""
        c, L = self.config, self.config.n_layer
        C, H, K, key, r, E = c.n_embd, c.mem_heads, c.mem_topk, c.mem_key_dim, c.mem_rank, c.mem_expand
        ffn, layers, N, D = 3 * C * c.n_ffn, len(c.mem_layers), c.mem_keys * math.isqrt(E), c.mem_value_dim
        if c.system == "moe":
            layer = c.moe_topk * ffn + C * c.moe_experts
        else:  # query, scores of both halves; lookup, PEER's twice; gate and output matrix
            layer = C * H * key + H * N * key + H * K * D * (1 + (c.system == "peer"))
            layer += C * E * D * (c.mem_gate + (c.mem_gate or E * D != C))
            layer += H * r * (2 * N + 2 * K * (r + K) + K * c.mem_cores * (r + 1))  # UltraMem's cores
        adds = {"attention": L * (4 * C * C + C * (T + 1)), "ffn": (L - layers * (c.mem_skip == 0)) * ffn}
        adds |= {"memory": layers * layer, "head": C * self.embedding.num_embeddings}
        return {part: 2 * count for part, count in adds.items()}


    def describe(self):
        counts, c = self.parameter_counts(), self.config
        text, blocks = f"{counts['dense']:,} parameters", ", ".join(map(str, c.mem_layers))
        if counts["pool"]:
            slots = f"{self.pool.S:,} slots of width {counts['pool'] // self.pool.S}, read in block {blocks}"
            text += f" + {counts['pool']:,} in the memory ({slots})"
        elif c.mem_layers:
            text += f" (of {c.moe_experts} experts in block {blocks} a token uses {c.moe_topk})"
        return f"{text}; {sum(self.flops_per_token(c.block_size).values()) / 1e6:.3f} MFLOPs a token forward"


def sample_token(logits, temperature, top_k, top_p, generator):
    """logits (B, V) -> (B, 1). top_k: of the k likeliest; top_p: of the fewest that hold p (nucleus)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits, order = logits.sort(-1, descending=True)
    logits = (logits - logits[:, :1]) / max(temperature, 1e-30)  # the largest is 0; below, 0 in float32
    if top_k is not None:
        logits[:, top_k:] = -math.inf
    probabilities = logits.softmax(-1)
    if top_p is not None:  # keep a token if those before it hold less than top_p; the first always stays
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill((before >= top_p) & (before > 0), 0.0)
    return order.gather(-1, torch.multinomial(probabilities, 1, generator=generator))


# --- checks of a configuration --------------------------------------------------------------------------


def check_options(config):
    """Raises ValueError for an option of another type than its default, or beyond its limits."""
    for f in fields(config):
        value, kind, limits = getattr(config, f.name), type(f.default), f.metadata
        if type(value) is int and kind is float:
            object.__setattr__(config, f.name, value := float(value))
        if type(value) is not kind or (kind is tuple and any(type(item) is not int for item in value)):
            raise ValueError(f"{f.name}={value!r}: must be of type {kind.__name__}")
        if kind in (int, float) and not limits["low"] <= value < limits["below"]:
            raise ValueError(f"{f.name}={value}: must be at least {limits['low']}, below {limits['below']}")
        if limits["choices"] and value not in limits["choices"]:
            raise ValueError(f"{f.name}={value}: must be one of {', '.join(limits['choices'])}")


def fill_in_and_check(c):
    """Fill in what 0 or () stands for. Raises ValueError for options that do not fit together."""

    def check(fits, message):
        if not fits:
            raise ValueError(message)

    L, count, even = c.n_layer, c.mem_count, "rotary positions turn pairs of numbers, so it must be even"
    check(c.n_embd % c.n_head == 0, f"n_embd={c.n_embd} must be divisible by n_head={c.n_head}")
    check(c.n_embd // c.n_head % 2 == 0, f"n_embd / n_head = {c.n_embd // c.n_head}: {even}")
    check(count <= L, f"mem_count={count}: the model has only n_layer={L} blocks")
    # Centred with a stride, as in the paper's ablation: 3 of 24 are 4, 12, 20; 3 of 12 are 2, 6, 10.
    layers = sorted(set(c.mem_layers)) or [(2 * i + 1) * L // (2 * count) for i in range(count)]
    values = dict(n_ffn=c.n_ffn or -(-c.n_embd * 8 // 3 // 8) * 8, mem_value_dim=c.mem_value_dim or c.n_embd)
    values |= dict(mem_key_dim=c.mem_key_dim or max(2, min(c.n_embd // 2, 512) // 2 * 2))
    values |= dict(mem_layers=tuple(layers), mem_count=len(layers))
    for name, value in values.items():
        object.__setattr__(c, name, value)  # the documented way to fill in a frozen dataclass
    for i in layers:
        check(0 <= i < L, f"mem_layers: there is no block {i}; n_layer={L} has blocks 0 to {L - 1}")
    only = dict.fromkeys(("mem_rank", "mem_cores", "mem_softmax", "mem_expand", "mem_skip"), "ultramem")
    for name, system in (only | {"moe_experts": "moe", "moe_topk": "moe"}).items():
        value, off = getattr(c, name), type(c).__dataclass_fields__[name].default
        check(c.system == system or value == off, f"{name}={value}: only system={system} has it")
    if layers and c.system == "moe":
        check(c.moe_topk <= c.moe_experts, f"moe_topk={c.moe_topk}: there are moe_experts={c.moe_experts}")
        check(c.n_embd % 8 == c.n_ffn % 8 == 0, f"n_embd={c.n_embd}, n_ffn={c.n_ffn}: must be multiples of 8")
    elif layers:
        E, D, parts, last = c.mem_expand, c.mem_value_dim, 2 * max(1, c.mem_rank), layers[-1] + c.mem_skip
        N = c.mem_keys * math.isqrt(E)
        most = N // 2 if c.mem_rank else N  # the first pass takes the best and the worst
        check(math.isqrt(E) ** 2 == E, f"mem_expand={E}: must be a square number")
        check(c.mem_topk <= most, f"mem_topk={c.mem_topk}: at most {most} with mem_keys={c.mem_keys}")
        check(c.mem_key_dim % parts == 0, f"mem_key_dim={c.mem_key_dim}: it has {parts} parts of one width")
        thin = c.mem_rank and c.mem_qk_norm and c.mem_key_dim < 3 * parts  # nothing is left of 1 or 2 numbers
        check(not thin, f"mem_key_dim={c.mem_key_dim}: LayerNorm wants 3 in each of {parts} parts")
        check(c.system != "peer" or c.n_embd == D, f"mem_value_dim={D}: peer wants n_embd={c.n_embd}")
        check(c.mem_rank or c.mem_cores == 1, f"mem_cores={c.mem_cores}: there are none with mem_rank=0")
        check(D % c.mem_cores == 0, f"mem_cores={c.mem_cores} must divide mem_value_dim={D}")
        check(last < L, f"mem_skip={c.mem_skip}: there is no block {last}; n_layer={L}")


# --- devices ----------------------------------------------------------------------------------------------


def check_memory(config, group, device):
    """Raises ValueError if this machine cannot hold the model: the system would just end the process."""
    with torch.device("meta"):  # a model that takes no room
        needs = sum(2 * p.nbytes + 8 * p.numel() for p in GPT(config, group, initialize=False).parameters())
    have = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else math.inf
    if device.type == "cpu" and hasattr(os, "sysconf"):
        have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needs > have:
        sizes = f"{needs / 2**30:,.1f} GiB with gradients and moments, {device} has {have / 2**30:,.1f}"
        raise ValueError(f"the model does not fit: {sizes}; lower mem_keys={config.mem_keys} or n_embd")


def choose_device(name, number=0):
    """A torch.device; number: which of several GPUs. Raises ValueError for one that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    with blame(f"device={name} cannot be used here", "try device=cpu"):
        device = torch.device(f"cuda:{number}" if name == "cuda" else name)  # set_device wants it
        torch.zeros(1, device=device).item()
        if device.type == "cuda":
            torch.cuda.set_device(device)
            torch.set_float32_matmul_precision("high")  # what is left in float32 may use TF32
        elif sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
            for threshold in (-3, -1):  # of mmap and trim: else freed blocks fault in again, 8% of a step
                libc.mallopt(threshold, 2**30)
    return device


def precision(name, device):
    """The context to compute in: autocast to bfloat16, or float32 throughout."""
    auto = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    on = auto if name == "auto" else name == "bfloat16"
    return torch.autocast(device.type, torch.bfloat16, enabled=on)
