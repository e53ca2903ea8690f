"""A small GPT whose feed-forward networks can be memory layers, or other systems.

The block is Llama's: pre-RMSNorm, rotary positions (arXiv:2104.09864), SwiGLU
(arXiv:2002.05202), no biases:

    x = x + attention(norm(x))
    x = x + ffn(norm(x))          SwiGLU. In the blocks config.mem_layers it is a layer of
                                  config.system: Memory+, or another one of systems/

The input of the blocks config.ngram_layers also gets what an n-gram memory (systems/engram.py)
reads.

Letters: B batch, T time, C model width (n_embd), V vocabulary. memory.py lists the letters of
the memory."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from memory import default_key_dim, initialize_linear
from runtime.checkpoint import DAMAGE, checkpoint_file, read_checkpoint
from runtime.files import UserError, explain_errors
from runtime.options import check_options, option
from runtime.sharded_pool import ShardedPool, own_columns
from systems import SYSTEMS, SystemOptions, check_system
from systems.engram import NGRAMS, default_ngram_width, make_ngrams


@dataclass(frozen=True)
class GPTConfig(SystemOptions):
    """Shape of a model. Raises ValueError, naming the option, if it cannot be built."""

    vocab_size: int = option(50257, "size of the vocabulary; train.py takes it from the dataset", 1)
    separator: int = option(-1, "token before a document, -1: none; from the dataset", -1)
    block_size: int = option(1024, "longest context, in tokens", 1)
    n_layer: int = option(12, "blocks", 1, 10_000)
    n_head: int = option(12, "attention heads", 1)
    n_embd: int = option(768, "model width C", 1)
    n_ffn: int = option(0, "width of SwiGLU; 0: 8/3 of n_embd, rounded up to a multiple of 8")
    system: str = option("memory", "kind of layer in mem_layers", choices=tuple(SYSTEMS))
    mem_count: int = option(0, "layers of that system, evenly spread; 0: a dense model")
    mem_layers: tuple[int, ...] = option((), "block numbers, as in 2,6,10; overrides mem_count")
    mem_keys: int = option(1024, "sub-keys N of each half; the memory has N * N slots", 1)
    mem_heads: int = option(4, "memory heads H", 1)
    mem_topk: int = option(32, "slots K that each memory head reads", 1)
    mem_key_dim: int = option(0, "width of a key, two halves; 0: half of n_embd, at most 512")
    mem_value_dim: int = option(0, "width D of a value; 0: n_embd")
    mem_dtype: str = option("float32", "dtype of the values", choices=("float32", "bfloat16"))
    mem_gate: bool = option(True, "multiply the lookup by silu(W_g x) and project it (Memory+)")
    mem_qk_norm: bool = option(True, "RMSNorm on queries and sub-keys (Memory+)")

    def __post_init__(self):
        check_options(self)
        self.check_heads()
        self.fill_in()
        self.check_layers()
        check_system(self)

    def check_heads(self):
        if self.n_embd % self.n_head != 0:
            raise ValueError(f"--n_embd={self.n_embd} must be divisible by --n_head={self.n_head}")
        width = self.n_embd // self.n_head
        if width % 2 != 0:
            reason = "rotary positions turn pairs of numbers, so it must be even"
            raise ValueError(f"--n_embd / --n_head = {width}: {reason}")
        if self.mem_count > self.n_layer:
            blocks = f"the model has only --n_layer={self.n_layer} blocks"
            raise ValueError(f"--mem_count={self.mem_count}: {blocks}")

    def fill_in(self):
        """Fill in what 0 and () mean."""
        if self.n_ffn == 0:
            self.set("n_ffn", math.ceil(self.n_embd / 3) * 8)
        if self.mem_key_dim == 0:
            self.set("mem_key_dim", default_key_dim(self.n_embd))
        if self.mem_value_dim == 0:
            self.set("mem_value_dim", self.n_embd)
        layers = sorted(set(self.mem_layers))
        if not layers:
            layers = spread_evenly(self.mem_count, self.n_layer)
        self.set("mem_layers", tuple(layers))
        self.set("mem_count", len(layers))
        self.set("ngram_layers", tuple(sorted(set(self.ngram_layers))))
        if self.ngram_layers and self.ngram_width == 0:
            self.set("ngram_width", default_ngram_width(self))

    def set(self, name, value):
        object.__setattr__(self, name, value)  # the way to fill in a frozen dataclass

    def check_layers(self):
        if self.separator >= self.vocab_size:
            raise ValueError(f"--separator={self.separator}: the vocabulary has {self.vocab_size}")
        for name in ("mem_layers", "ngram_layers"):
            for i in getattr(self, name):
                if not 0 <= i < self.n_layer:
                    blocks = f"--n_layer={self.n_layer} has blocks 0 to {self.n_layer - 1}"
                    raise ValueError(f"--{name}: there is no block {i}; {blocks}")


def spread_evenly(count, n_layer):
    """Space layers evenly and centred, as in the paper's ablation: 4, 12, 20 of 24 blocks."""
    return [(2 * i + 1) * n_layer // (2 * count) for i in range(count)]


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.out = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def initialize(self, residual):
        initialize_linear(self.qkv)
        initialize_linear(self.out, residual)

    def forward(self, x, cos, sin, cache=None, start=0):
        """x (B, T, C) at positions start to start + T - 1 -> (B, T, C). cache (2, B, heads,
        block_size, C/heads) holds keys and values of earlier positions, and gets those of x.
        T must be 1 if start > 0."""
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
        qk, v = qkv.split((2, 1))
        q, k = rotate(qk, cos, sin)  # (B, heads, T, C/heads) each
        v = v.squeeze(0)
        if cache is not None:
            cache[0, :, :, start : start + T] = k
            cache[1, :, :, start : start + T] = v
            k, v = cache[:, :, :, : start + T]
        y = attend(q, k, v)
        return self.out(y.transpose(1, 2).reshape(B, T, C))

    def flops(self, T):
        """Forward FLOPs per token, which sees (T + 1) / 2 positions on average."""
        C = self.out.in_features
        return 2 * (4 * C * C + C * (T + 1))


def attend(q, k, v):
    """Causal attention of queries q to keys k and values v, (B, heads, T, C/heads) each. A single
    query sees all keys."""
    _, _, T, width = q.shape
    if q.device.type != "cpu" or T == 1 or T > 128:
        return F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)
    # The same in plain operations. For short sequences it takes half the time on two cores.
    later = torch.full((T, T), -math.inf, dtype=q.dtype).triu(
        diagonal=1
    )  # -inf for later positions
    scores = q @ k.transpose(2, 3) / math.sqrt(width) + later
    return scores.softmax(dim=-1) @ v


def rotate(x, cos, sin):
    """Rotary positions: turn (a, b) = (x[c], x[c + half]) at position t by t 10000^(-c / half),
    to (a cos - b sin, b cos + a sin). x (..., T, 2 half); cos, sin from rotary_angles()"""
    swapped = x.roll(x.size(-1) // 2, dims=-1)  # (b, a)
    return (x * cos + swapped * sin).type_as(x)


def rotary_angles(block_size, width):
    """For rotate(): (cos, cos) and (-sin, sin), (block_size, width) each."""
    half = width // 2
    angle = torch.arange(block_size).outer(10000.0 ** (-torch.arange(half) / half))
    cos = torch.cat((angle.cos(), angle.cos()), dim=1)
    sin = torch.cat((-angle.sin(), angle.sin()), dim=1)
    return cos, sin


class SwiGLU(nn.Module):
    uses_pool = False

    def __init__(self, dim, hidden):
        super().__init__()
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.out = nn.Linear(hidden, dim, bias=False)

    def initialize(self, residual):
        initialize_linear(self.gate)
        initialize_linear(self.up)
        initialize_linear(self.out, residual)

    def forward(self, x):
        """x (B, T, C) -> (B, T, C)"""
        return self.out(F.silu(self.gate(x)) * self.up(x))

    def with_loss(self, x):
        """x (B, T, C) -> (B, T, C), and no auxiliary loss"""
        return self(x), 0.0

    def flops(self):
        """Forward FLOPs per token."""
        return 2 * 3 * self.gate.weight.numel()


class Block(nn.Module):
    def __init__(self, config, i):
        super().__init__()
        layer = None
        if i in config.mem_layers:
            layer = SYSTEMS[config.system].from_config(config)
        self.attn_norm = nn.RMSNorm(config.n_embd, eps=1e-6)
        self.ffn_norm = nn.RMSNorm(config.n_embd, eps=1e-6)
        self.attn = Attention(config)
        self.skip = None  # a layer whose output GPT adds after a later block
        self.ngram = None  # a layer whose output GPT adds to the input of this block
        if i in config.ngram_layers:
            number = config.ngram_layers.index(i)
            self.ngram = NGRAMS[config.ngram](config, number)
        if layer is None:
            self.ffn = SwiGLU(config.n_embd, config.n_ffn)
        elif config.mem_skip == 0:  # an option of UltraMem; 0 in other systems
            self.ffn = layer
        else:
            self.ffn = SwiGLU(config.n_embd, config.n_ffn)
            self.skip = layer

    def initialize(self, residual):
        self.attn_norm.reset_parameters()
        self.ffn_norm.reset_parameters()
        self.attn.initialize(residual)
        self.ffn.initialize(residual)
        if self.skip is not None:
            self.skip.initialize(residual)
        if self.ngram is not None:
            self.ngram.initialize(residual)

    def forward(self, x, pool, cos, sin, cache=None, start=0):
        """x (B, T, C) -> (B, T, C), auxiliary loss"""
        x = x + self.attn(self.attn_norm(x), cos, sin, cache, start)
        y, loss = run_layer(self.ffn, self.ffn_norm(x), pool)
        return x + y, loss


def run_layer(layer, x, pool):
    """x (B, T, C) -> (B, T, C), auxiliary loss: a scalar, 0.0 where the layer has none"""
    if layer.uses_pool:
        return layer.with_loss(x, pool)
    return layer.with_loss(x)


@dataclass
class Cache:
    """What GPT keeps of earlier positions while it generates text."""

    attention: torch.Tensor  # (n_layer, 2, B, heads, block_size, C/heads), keys and values
    tokens: torch.Tensor  # (B, block_size), for n-gram memories


class GPT(nn.Module):
    """config: a GPTConfig. Use initialize=False before loading weights.

    If a torch.distributed group is given, its processes share the table and each holds a part
    of the columns. replicas: the processes in other groups that hold the same part."""

    def __init__(self, config, initialize=True, group=None, replicas=None):
        super().__init__()
        self.config = config
        # Also the output matrix, transposed. Padding to a multiple of 16 makes it fast on GPUs.
        padded = math.ceil(config.vocab_size / 16) * 16
        self.embedding = nn.Embedding(padded, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, eps=1e-6)
        self.pool = None
        if config.mem_layers and SYSTEMS[config.system].uses_pool:
            self.pool = make_pool(config, group, replicas)
        self.ngram_pool = None
        if config.ngram_layers:
            self.ngram_pool = NGRAMS[config.ngram].make_pool(config)
        if not config.mem_shared:
            for number, i in enumerate(config.mem_layers):
                self.blocks[i].ffn.first_row = number * self.pool.slots
        cos, sin = rotary_angles(config.block_size, config.n_embd // config.n_head)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        if initialize:
            self.initialize()

    @classmethod
    def from_checkpoint(cls, path, device="cpu", group=None, replicas=None):
        """Load the model from a checkpoint of train.py onto a device, in eval mode. path: the
        folder of a run, or its ckpt.pt; group, replicas: as above, for any number of processes
        that wrote the file. Raises FileNotFoundError or ValueError, naming the file, if it is
        missing, damaged, or not a checkpoint."""
        path = checkpoint_file(path)
        checkpoint = read_checkpoint(path, tensors=True)
        with explain_errors(f"{path}: its parts do not fit together", DAMAGE):
            weights = checkpoint["model"]
            config = GPTConfig(**checkpoint["model_config"])
            with torch.device(device):
                model = cls(config, initialize=False, group=group, replicas=replicas)
            if model.pool is not None:
                weights["pool.values"] = own_columns(model.pool, weights["pool.values"])
            model.load_state_dict(weights)
        check_finite(model, path)
        return model.eval()

    @torch.no_grad()
    def initialize(self):
        """Draw every parameter. Matrices are N(0, 1 / inputs), which keeps the spread of their
        input. Matrices that add to the residual stream are smaller, so that 2 n_layer additions
        sum to about 1 (GPT-2's rule)."""
        c = self.config
        residual = 1 / math.sqrt(2 * c.n_layer)
        # as output matrix the embedding gives logits of spread 1
        nn.init.normal_(self.embedding.weight[: c.vocab_size], std=c.n_embd**-0.5)
        nn.init.zeros_(self.embedding.weight[c.vocab_size :])
        for block in self.blocks:
            block.initialize(residual)
        self.norm.reset_parameters()
        for pool in self.pools().values():
            pool.initialize()

    def pools(self):
        """The tables of values that the model has, each with an optimiser of its own: {"mem": of
        memory layers, "ngram": of n-gram memories}. Fields of the log begin with these names."""
        pools = {"mem": self.pool, "ngram": self.ngram_pool}
        return {name: pool for name, pool in pools.items() if pool is not None}

    def forward(self, idx, targets=None):
        """idx (B, T), targets (B, T) or None -> logits (B, T, V), cross-entropy in nats or None.

        Target -1 is ignored. With a loss, logits are detached, because a compiled backward pass
        would read zeros for them. The loss has the gradient of the auxiliary losses, but not
        their value.
        """
        x, auxiliary = self.run_blocks(idx)
        logits = self.logits(x)
        if targets is None:
            return logits, None
        flat = logits.flatten(0, 1).float()
        loss = F.cross_entropy(flat, targets.flatten(), ignore_index=-1)
        if torch.is_tensor(auxiliary):  # or 0.0, where no layer has such a loss
            loss = loss + (auxiliary - auxiliary.detach())
        return logits.detach(), loss

    def hidden(self, idx, cache=None, start=0):
        """idx (B, T) token ids at positions start to start + T - 1 -> (B, T, C), for the output
        matrix. T must be 1 if start > 0."""
        x, _ = self.run_blocks(idx, cache, start)
        return x

    def run_blocks(self, idx, cache=None, start=0):
        """hidden(), and the sum of the auxiliary losses."""
        end = start + idx.size(1)
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens are more than block_size={self.config.block_size}")
        if start > 0 and idx.size(1) > 1:
            raise ValueError(f"start={start}: after the first tokens, one at a time")
        cos = self.cos[start:end]
        sin = self.sin[start:end]
        x = self.embedding(idx)
        ngrams = None
        if self.ngram_pool is not None:
            ngrams = self.ngrams(idx, cache, start)
        auxiliary = 0.0
        skips = {}  # {block: output to add after it}
        for i, block in enumerate(self.blocks):
            if block.ngram is not None:
                x = x + block.ngram(x, ngrams, self.ngram_pool)
            if block.skip is not None:
                y, loss = run_layer(block.skip, block.attn_norm(x), self.pool)
                skips[i + self.config.mem_skip] = y
                auxiliary = auxiliary + loss
            block_cache = None
            if cache is not None:
                block_cache = cache.attention[i]
            x, loss = block(x, self.pool, cos, sin, block_cache, start)
            auxiliary = auxiliary + loss
            if i in skips:
                x = x + skips[i]
        return self.norm(x), auxiliary

    def ngrams(self, idx, cache, start):
        """idx (B, T) -> (B, T, N), each token and the N - 1 before it, the latest first"""
        c = self.config
        tokens = idx
        if cache is not None:
            end = start + idx.size(1)
            cache.tokens[:, start:end] = idx
            tokens = cache.tokens[:, max(0, start - c.ngram_order + 1) : end]
        ngrams = make_ngrams(tokens, c.ngram_order, c.separator, pad=c.vocab_size)
        return ngrams[:, -idx.size(1) :]

    def logits(self, x):
        """x (..., C) -> (..., V)"""
        return F.linear(x, self.embedding.weight)[..., : self.config.vocab_size]

    # --- generation -----------------------------------------------------------------

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, generator=None):
        """Continue idx (B, T). Yields max_new_tokens tensors (B,), one token each. Temperature 0
        is greedy.

        Keys and values are cached. When the block is full, its last half is encoded again and
        the cache continues from there. So every token sees half a block to a whole block. Raises
        ValueError if idx does not hold token ids, or for an option that makes no sense."""
        self.check_prompt(idx)
        check_sampling(temperature, top_k, top_p)
        block = self.config.block_size
        cache = self.make_cache(idx)
        window = idx[:, -block:]  # tokens that are not in the cache
        start = 0
        for _ in range(max_new_tokens):
            if start + window.size(1) > block:
                window = idx[:, -max(1, block // 2) :]
                start = 0
            # Avoid cuDNN's attention, PyTorch's first choice on an H100. It plans for each length.
            with sdpa_kernel(
                [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
            ):
                x = self.hidden(window, cache, start)[:, -1]  # (B, C)
            start += window.size(1)
            logits = self.logits(x).float()
            window = sample_token(logits, temperature, top_k, top_p, generator)  # (B, 1)
            idx = torch.cat((idx[:, -block:], window), dim=1)
            yield window[:, 0]

    def check_prompt(self, idx):
        if not torch.is_tensor(idx):
            raise ValueError(f"idx must be a tensor (B, T), not a {type(idx).__name__}")
        if idx.numel() == 0:
            raise ValueError("idx has no tokens; start with a separator, such as <|endoftext|>")
        if idx.ndim != 2 or idx.dtype not in (torch.int32, torch.int64):
            has = f"not {tuple(idx.shape)}, {idx.dtype}"
            raise ValueError(f"idx must be token ids (B, T), int64, {has}")
        if idx.min() < 0 or idx.max() >= self.config.vocab_size:
            last = self.config.vocab_size - 1
            raise ValueError(f"idx has ids {idx.min()} to {idx.max()}; the last token is {last}")

    def make_cache(self, idx):
        """Make a Cache with room for a block. Keys and values are in attention's precision."""
        c = self.config
        device = idx.device.type
        dtype = self.embedding.weight.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        shape = (c.n_layer, 2, len(idx), c.n_head, c.block_size, c.n_embd // c.n_head)
        attention = torch.zeros(shape, dtype=dtype, device=idx.device)
        return Cache(attention, tokens=idx.new_zeros(len(idx), c.block_size))

    def generate(self, idx, max_new_tokens, **options):
        """idx (B, T) -> (B, T + max_new_tokens). Options as in stream()."""
        new = self.stream(idx, max_new_tokens, **options)
        return torch.column_stack([idx, *new])

    def complete(self, prompts, lengths, batch_size=None):
        """Greedily continue prompts (lists of token ids) by lengths[i] tokens. Returns the new
        tokens."""
        device = self.embedding.weight.device
        if batch_size is None:
            batch_size = 128  # on a CPU, larger batches do not fit into the cache
            if device.type == "cuda":
                batch_size = 2048  # so that a GPU waits less for the CPU
        new = [None] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), lengths[i]))
        while order:  # prompts of one length at a time, without padding
            length = len(prompts[order[0]])
            batch = [i for i in order[:batch_size] if len(prompts[i]) == length]
            order = order[len(batch) :]
            idx = torch.tensor([prompts[i] for i in batch], device=device)
            longest = max(lengths[i] for i in batch)
            rows = self.generate(idx, longest, temperature=0)[:, length:].tolist()
            for i, row in zip(batch, rows, strict=True):
                new[i] = row[: lengths[i]]
        return new

    # --- counts and parameter groups ------------------------------------------------

    def parameter_groups(self):
        """Lists of parameters by role: {"matrices", "norm_weights", "pool"}. Each parameter is in
        one of them. Matrices (embedding, projections, sub-keys) get weight decay. Pools have
        optimisers of their own."""
        groups = {"matrices": [], "norm_weights": [], "pool": []}
        for name, parameter in self.named_parameters():
            if name in ("pool.values", "ngram_pool.values"):
                groups["pool"].append(parameter)
            elif parameter.ndim == 1:
                groups["norm_weights"].append(parameter)
            else:
                groups["matrices"].append(parameter)
        return groups

    def parameter_counts(self):
        """{"dense", "pool"}: parameters in the network, and in all tables of values."""
        counts = {"dense": sum(p.numel() for p in self.parameters()), "pool": 0}
        for pool in self.pools().values():
            counts["dense"] -= pool.values.numel()  # of this process; others may have other columns
            counts["pool"] += len(pool.values) * pool.dim
        return counts

    def flops_per_token(self, T):
        """{"attention", "ffn", "memory", "head"}: forward FLOPs per token in a sequence of T: 2
        for each multiply-add of matrix products, attention and lookup. Elementwise products,
        norms, softmax and top-k are not counted. Training costs three times this. Each module
        counts its own FLOPs. An n-gram memory is a memory."""
        flops = {"attention": 0, "ffn": 0, "memory": 0}
        for block in self.blocks:
            flops["attention"] += block.attn.flops(T)
            if isinstance(block.ffn, SwiGLU):
                flops["ffn"] += block.ffn.flops()
            else:
                flops["memory"] += block.ffn.flops()
            for layer in (block.skip, block.ngram):
                if layer is not None:
                    flops["memory"] += layer.flops()
        flops["head"] = 2 * self.embedding.weight.numel()
        return flops

    def describe(self):
        """One line: parameters, memory, FLOPs."""
        c = self.config
        text = f"{self.parameter_counts()['dense']:,} parameters"
        blocks = ", ".join(map(str, c.mem_layers))
        if self.pool is not None:
            slots = self.pool.slots
            if not c.mem_shared:
                slots *= c.mem_count
            numbers = len(self.pool.values) * self.pool.dim
            text += f" + {numbers:,} in the memory"
            text += f" ({slots:,} slots of width {numbers // slots}, read in block {blocks})"
        elif c.mem_layers and c.system == "moe":
            experts = f"of {c.moe_experts} experts in block {blocks}"
            text += f" ({experts} a token uses {c.moe_topk})"
        if self.ngram_pool is not None:
            rows, width = self.ngram_pool.values.shape
            blocks = ", ".join(map(str, c.ngram_layers))
            text += f" + {rows * width:,} of n-grams"
            text += f" ({rows:,} rows of width {width}, added before block {blocks})"
        flops = sum(self.flops_per_token(c.block_size).values())
        return f"{text}; {flops / 1e6:.3f} MFLOPs a token forward"


def make_pool(config, group, replicas):
    """Make the pool that all memory layers of a GPT read. A group is only for Memory+ and PKM.
    train.py refuses it for other systems."""
    if group is None:
        return SYSTEMS[config.system].make_pool(config)
    return ShardedPool(
        slots=config.mem_keys**2,
        dim=config.mem_value_dim,
        dtype=getattr(torch, config.mem_dtype),
        group=group,
        replicas=replicas,
        initialize=False,
    )


def check_finite(model, path):
    """Raises ValueError if a weight is infinite or not a number. path: of the checkpoint"""
    for name, parameter in model.named_parameters():
        largest = parameter.detach().norm(math.inf).item()  # NaN if one is NaN
        if not math.isfinite(largest):
            raise ValueError(f"{path} cannot be used: {name} holds {largest}")


def check_sampling(temperature, top_k, top_p):
    """Raises ValueError for options of stream() that make no sense."""
    if not temperature >= 0:
        raise ValueError(f"temperature={temperature}: must be at least 0")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k}: must be at least 1")
    if top_p is not None and not 0 <= top_p <= 1:
        raise ValueError(f"top_p={top_p}: must be from 0 to 1")


def sample_token(logits, temperature, top_k, top_p, generator):
    """logits (B, V) -> (B, 1). top_k keeps the k likeliest tokens, top_p the fewest that hold p
    (nucleus). Raises ValueError unless all are finite: else the token would have no meaning."""
    if not logits.isfinite().all():
        raise UserError("the logits are not finite")
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits, order = logits.sort(-1, descending=True)
    # the largest becomes 0, the others less, even for a temperature that is 0 in float32
    logits = (logits - logits[:, :1]) / max(temperature, 1e-30)
    if top_k is not None:
        logits[:, top_k:] = -math.inf
    probabilities = logits.softmax(-1)
    if top_p is not None:  # keep a token if those before it hold less than top_p
        before = probabilities.cumsum(-1) - probabilities
        beyond = (before >= top_p) & (before > 0)  # the first always stays
        probabilities = probabilities.masked_fill(beyond, 0.0)
    return order.gather(-1, torch.multinomial(probabilities, 1, generator=generator))
