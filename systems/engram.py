"""N-gram memories: tables whose rows are chosen by the last few tokens, not by the hidden state.

Engram (arXiv:2601.07372) reads J rows for each order n = 2..N of n-grams that end at token t. Table
(n, j) of a layer has p_{n,j} rows. The p are distinct primes, the same in each layer. The m are odd
numbers that each layer draws once:

    mix_n   = m_0 x_t  xor  m_1 x_{t-1}  xor ...  m_{n-1} x_{t-n+1}       x token ids
    rows    = mix_n mod p_{n,j}, for each n and j
    e       = the values of these M = (N - 1) J rows, concatenated
    g       = <RMSNorm(W_k e), RMSNorm(h)> / sqrt(C)                do they suit the context?
    a       = sigmoid(sign(g) sqrt(|g|))                            gate
    h       = h + a W_v e                                           before a block's attention

Each layer has tables of its own, all in one pool. Not here: token ids merged by their spelling, and
a convolution after the gate. The bigram hash of GPT-2 speedruns is the smallest form: one table for
all layers, of which a token reads one row, and a learned strength instead of a gate. RowAdam trains
the rows, AdamW all else.

The tokens alone determine the rows, so a program could fetch them before the forward pass (this one
does not). The hash sees at most N tokens of one document. Product keys choose by h, which can hold
more. But attention can carry what a row holds to later tokens.

Letters: B batch, T time, C model width, w width of a row, R rows of the bigram table E."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from kernels import widen
from memory import ValuePool, count_linear, initialize_linear
from runtime.options import option


@dataclass(frozen=True)
class NgramOptions:
    """mem_dtype, mem_learning_rate and mem_decay hold for n-gram memories, too."""

    ngram_layers: tuple[int, ...] = option((), "blocks to which an n-gram memory adds, as in 1,2")
    ngram: str = option("engram", "kind of n-gram memory", choices=("engram", "bigram"))
    ngram_rows: int = option(16384, "rows of a table, at least; engram: (N-1) J tables a layer", 2)
    ngram_order: int = option(3, "engram: longest n-gram N", 2)
    ngram_heads: int = option(8, "engram: rows J for each order", 1, 1000)
    ngram_width: int = option(0, "engram: width of a row; 0: n_embd / ((N - 1) J)")


def default_ngram_width(config):
    if config.ngram == "bigram":
        return config.n_embd
    return max(1, config.n_embd // ((config.ngram_order - 1) * config.ngram_heads))


def check_ngrams(config):
    """Raises ValueError for options that do not fit together."""
    c = config
    if c.ngram == "bigram":
        check_bigram(c)
        return
    # generation goes on with half a block, which must hold an n-gram
    if c.ngram_order > max(2, c.block_size // 2):
        context = f"a text that exceeds --block_size={c.block_size} keeps only half of it"
        raise ValueError(f"--ngram_order={c.ngram_order}: {context}")
    rows = len(c.ngram_layers) * (c.ngram_order - 1) * c.ngram_heads * c.ngram_rows
    if rows >= 2**31:
        raise ValueError(f"--ngram_rows={c.ngram_rows}: {rows:,} rows in all, 2^31 or more")


def check_bigram(config):
    """Options that have no effect must be the defaults."""
    if config.ngram_order != NgramOptions.ngram_order:
        raise ValueError(f"--ngram_order={config.ngram_order}: only --ngram=engram has it")
    if config.ngram_heads != NgramOptions.ngram_heads:
        raise ValueError(f"--ngram_heads={config.ngram_heads}: only --ngram=engram has it")
    if config.ngram_width != config.n_embd:
        raise ValueError(f"--ngram_width={config.ngram_width}: only --ngram=engram has it")


def table_sizes(config):
    """The (N - 1) J smallest primes that are at least ngram_rows."""
    primes = []
    candidate = config.ngram_rows
    while len(primes) < (config.ngram_order - 1) * config.ngram_heads:
        if all(candidate % d != 0 for d in range(2, math.isqrt(candidate) + 1)):
            primes.append(candidate)
        candidate += 1
    return primes


def make_ngrams(tokens, order, separator, pad):
    """tokens (B, T) -> (B, T, order): each token and those before it, the latest first. pad stands
    for tokens of an earlier document, or before all. A separator is the first token of its
    document."""
    tokens = tokens.long()
    columns = [tokens]
    for _ in range(order - 1):
        # one token earlier; pads of the last column move along
        shifted = F.pad(columns[-1][:, :-1], (1, 0), value=pad)
        columns.append(shifted.masked_fill(tokens == separator, pad))
    return torch.stack(columns, dim=-1)


def read_rows(pool, rows):
    """rows (B, T, M) -> their values (B, T, M, w). The pool sums rows by weight: here one row, with
    weight 1."""
    ones = torch.ones(rows.numel(), 1, device=rows.device)
    return pool.lookup(rows.view(-1, 1), ones).view(*rows.shape, -1)


class Engram(nn.Module):
    """config: a GPTConfig; number: 0 for the first such layer of a model, 1 for the next, ..."""

    def __init__(self, config, number):
        super().__init__()
        C = config.n_embd
        primes = torch.tensor(table_sizes(config))  # (M,)
        first_row = number * primes.sum()  # where this layer's rows start in the pool
        offsets = first_row + primes.cumsum(0) - primes  # where each of its tables starts, (M,)
        width = len(primes) * config.ngram_width
        self.J = config.ngram_heads
        self.orders = range(2, config.ngram_order + 1)
        # a larger multiplier could overflow int64: the pad's id is vocab_size
        self.largest = (2**63 - 1) // config.vocab_size
        self.key = nn.Linear(width, C, bias=False)  # W_k
        self.value = nn.Linear(width, C, bias=False)  # W_v
        self.key_norm = nn.RMSNorm(C, eps=1e-6)
        self.query_norm = nn.RMSNorm(C, eps=1e-6)
        multipliers = torch.empty(config.ngram_order, dtype=torch.int64)
        self.register_buffer("multipliers", multipliers)  # random, so checkpoints hold them
        self.register_buffer("primes", primes.view(-1, self.J), persistent=False)  # (N - 1, J)
        self.register_buffer("offsets", offsets, persistent=False)

    @staticmethod
    def make_pool(config):
        rows = len(config.ngram_layers) * sum(table_sizes(config))
        dtype = getattr(torch, config.mem_dtype)
        return ValuePool(rows, config.ngram_width, dtype, initialize=False)

    def initialize(self, residual):
        """Draw the weights. W_v is 0, so that the layer adds nothing at first, whatever residual
        is."""
        half = torch.randint((self.largest + 1) // 2, self.multipliers.shape)
        self.multipliers.copy_(2 * half + 1)
        initialize_linear(self.key)
        nn.init.zeros_(self.value.weight)
        self.key_norm.reset_parameters()
        self.query_norm.reset_parameters()

    def forward(self, h, ngrams, pool):
        """h (B, T, C), ngrams (B, T, N) from make_ngrams -> (B, T, C), to add to h"""
        rows = self.rows(ngrams)  # (B, T, M)
        e = read_rows(pool, rows).flatten(2).to(h.dtype)  # (B, T, M * w)
        gate = self.gate(h, self.key(e))  # (B, T, 1)
        if pool.usage is not None:  # for statistics, or edit/inspect_slots.py
            pool.usage.add(rows, gate.expand(rows.shape))
        return (gate * self.value(e)).to(h.dtype)

    def rows(self, ngrams):
        """ngrams (B, T, N) -> rows of the pool (B, T, M): J of order 2, then J of order 3, ..."""
        terms = ngrams * self.multipliers
        mix = terms[..., 0]
        tables = []
        for n in self.orders:
            mix = mix ^ terms[..., n - 1]
            tables.append(mix.unsqueeze(-1) % self.primes[n - 2])  # (B, T, J)
        return torch.cat(tables, dim=-1) + self.offsets

    def gate(self, h, key):
        """h, key (B, T, C) -> a in the text above, (B, T, 1)"""
        agreement = self.key_norm(widen(key)) * self.query_norm(widen(h))
        g = agreement.sum(-1, keepdim=True) / math.sqrt(h.size(-1))
        root = g.abs().clamp(min=1e-6).sqrt()  # at 0 its gradient is infinite
        return (g.sign() * root).sigmoid()

    def flops(self):
        """Forward FLOPs per token: two matrices, and the lookup."""
        return 2 * (count_linear(self) + self.key.in_features)


class BigramHash(nn.Module):
    """h = h + strength * E[row] * signs. The last two tokens choose the row and its signs, -1 or 1.
    Most bigrams that share a row have other signs. The first token of a document or window has the
    last row.

    config: a GPTConfig; number: without effect, as all layers share the table"""

    J = 1  # J and orders: for edit/ngrams.py, as in Engram
    orders = (2,)

    def __init__(self, config, number):
        super().__init__()
        self.C = config.n_embd
        self.R = config.ngram_rows
        self.pad = config.vocab_size  # as GPT gives to make_ngrams
        self.strength = nn.Parameter(torch.empty(1))

    @staticmethod
    def make_pool(config):
        return BigramPool(config.ngram_rows, config.n_embd, getattr(torch, config.mem_dtype))

    def initialize(self, residual):
        nn.init.constant_(self.strength, 0.1)

    def forward(self, h, ngrams, pool):
        """h (B, T, C), ngrams (B, T, N) from make_ngrams -> (B, T, C), to add to h"""
        rows = self.rows(ngrams)  # (B, T, 1)
        e = read_rows(pool, rows).squeeze(2)  # (B, T, C)
        if pool.usage is not None:
            pool.usage.add(rows, self.strength.expand(rows.shape))
        signs = pool.signs[(ngrams[..., 0] ^ ngrams[..., 1]) % len(pool.signs)]
        return (self.strength * e * signs).to(h.dtype)

    def rows(self, ngrams):
        """ngrams (B, T, N) -> rows of the pool (B, T, 1)"""
        now = ngrams[..., 0:1]
        before = ngrams[..., 1:2]
        rows = ((36313 * now) ^ (27191 * before)) % (self.R - 1)
        return rows.masked_fill(before == self.pad, self.R - 1)

    def flops(self):
        """Forward FLOPs per token: the lookup."""
        return 2 * self.C


class BigramPool(ValuePool):
    """The rows E, and 8,192 rows of signs. E is 0 at first."""

    def __init__(self, rows, dim, dtype):
        super().__init__(rows, dim, dtype, initialize=False)
        self.register_buffer("signs", torch.empty(8192, dim, dtype=torch.int8))

    @torch.no_grad()
    def initialize(self):
        self.values.zero_()
        self.signs.copy_(torch.randint(2, self.signs.shape, device=self.signs.device) * 2 - 1)


NGRAMS = {"engram": Engram, "bigram": BigramHash}
