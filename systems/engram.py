"""N-gram memories: tables whose rows are addressed by the last few tokens, not by the hidden state.

Engram (arXiv:2601.07372) reads J rows for each order n = 2..N of n-grams that end at token t:

    mix_n      = m_0 x_t  xor  m_1 x_{t-1}  xor ... (n terms)      x token ids, m fixed odd numbers
    row_{n,j}  = mix_n mod p_{n,j}, in table (n, j)                p distinct primes, its rows
    e          = the (N - 1) J rows, concatenated
    g          = <RMSNorm(W_k e), RMSNorm(h)> / sqrt(C)            does the row suit its context?
    a          = sigmoid(sign(g) sqrt(|g|))
    h          = h + a W_v e                                       before a block's attention

Not here: token ids merged by their spelling, and a convolution after the gate. The bigram hash of
GPT-2 speedruns is the smallest form: one row for each token, and a learned strength.

Rows are known before the forward pass, so they can be fetched early. But they see no more than N
tokens, and not across the start of a document. Rows of product keys see all that h contains.

Letters: B batch, T time, C model width, V vocabulary, w width of a row, M = (N - 1) J rows of a
token."""

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
    ngram_layers: tuple[int, ...] = option((), "blocks to which an n-gram memory adds, as in 1,2")
    ngram: str = option("engram", "kind of n-gram memory", choices=("engram", "bigram"))
    ngram_rows: int = option(16384, "rows of a table; engram has one for each order and head", 2)
    ngram_order: int = option(3, "engram: longest n-gram N", 2)
    ngram_heads: int = option(8, "engram: rows J for each order", 1)
    ngram_width: int = option(0, "engram: width of a row; 0: n_embd / ((N - 1) J)")


def last_tokens(tokens, order, separator, pad):
    """tokens (B, T) -> (B, T, order): each token and those before it, the latest first. pad stands
    for tokens before the first one, and before a separator, which starts a document."""
    columns = [tokens]
    for _ in range(order - 1):
        shifted = F.pad(columns[-1][:, :-1], (1, 0), value=pad)  # one token earlier
        columns.append(shifted.masked_fill(tokens == separator, pad))
    return torch.stack(columns, dim=-1)


def read_rows(pool, rows):
    """rows (B, T, M) -> their values (B, T, M, w): a lookup of bags of one row with weight 1."""
    ones = torch.ones(rows.numel(), 1, device=rows.device)
    return pool.lookup(rows.view(-1, 1), ones).view(*rows.shape, -1)


class Engram(nn.Module):
    """number: of this layer among the model's. Each has its own rows of the pool."""

    def __init__(self, config, number):
        super().__init__()
        C = config.n_embd
        primes = torch.tensor(table_sizes(config))  # (M,)
        first_row = number * primes.sum()
        offsets = first_row + primes.cumsum(0) - primes  # first row of each table
        width = len(primes) * config.ngram_width  # of e
        self.orders = range(2, config.ngram_order + 1)
        self.J = config.ngram_heads
        self.largest = (2**63 - 1) // config.vocab_size  # so that products fit int64
        self.key = nn.Linear(width, C, bias=False)
        self.value = nn.Linear(width, C, bias=False)
        self.key_norm = nn.RMSNorm(C, eps=1e-6)
        self.query_norm = nn.RMSNorm(C, eps=1e-6)
        multipliers = torch.empty(config.ngram_order, dtype=torch.int64)
        self.register_buffer("multipliers", multipliers)  # checkpoints hold them
        self.register_buffer("primes", primes.view(-1, self.J), persistent=False)
        self.register_buffer("offsets", offsets, persistent=False)

    @staticmethod
    def make_pool(config):
        rows = len(config.ngram_layers) * sum(table_sizes(config))
        dtype = getattr(torch, config.mem_dtype)
        return ValuePool(rows, config.ngram_width, dtype, initialize=False)

    def initialize(self, residual):
        """Draw the weights. W_v is 0, so that the layer adds nothing at first."""
        half = torch.randint((self.largest + 1) // 2, self.multipliers.shape)
        self.multipliers.copy_(2 * half + 1)
        initialize_linear(self.key)
        nn.init.zeros_(self.value.weight)
        self.key_norm.reset_parameters()
        self.query_norm.reset_parameters()

    def forward(self, h, tokens, pool):
        """h (B, T, C), tokens (B, T, N) from last_tokens -> (B, T, C), to add to h"""
        rows = self.rows(tokens)  # (B, T, M)
        e = read_rows(pool, rows).flatten(2).to(h.dtype)  # (B, T, M * w)
        gate = self.gate(h, self.key(e))  # (B, T, 1)
        if pool.usage is not None:
            pool.usage.add(rows, gate.expand(rows.shape))
        return gate * self.value(e)

    def rows(self, tokens):
        """tokens (B, T, N) -> rows of the pool (B, T, M), all orders of n-grams and heads"""
        terms = tokens * self.multipliers
        mix = terms[..., 0]
        tables = []
        for n in self.orders:
            mix = mix ^ terms[..., n - 1]
            tables.append(mix.unsqueeze(-1) % self.primes[n - 2])  # (B, T, J)
        return torch.cat(tables, dim=-1) + self.offsets

    def gate(self, h, key):
        """h, key (B, T, C) -> a in the text above, (B, T, 1)"""
        agreement = widen(self.key_norm(key)) * widen(self.query_norm(h))
        g = agreement.sum(-1, keepdim=True) / math.sqrt(h.size(-1))
        return (g.sign() * g.abs().clamp(min=1e-6).sqrt()).sigmoid()

    def flops(self):
        """Forward FLOPs per token: two matrices, and the lookup."""
        return 2 * (count_linear(self) + self.key.in_features)


class BigramHash(nn.Module):
    """h = h + strength * E[row] * signs. row: a hash of the last two tokens, the last row at the
    start of a document. The signs, fixed random ones, tell apart most bigrams that share a row."""

    orders = (2,)
    J = 1

    def __init__(self, config, number):
        super().__init__()
        self.C = config.n_embd
        self.R = config.ngram_rows
        self.pad = config.vocab_size
        self.strength = nn.Parameter(torch.empty(1))

    @staticmethod
    def make_pool(config):
        return BigramPool(config.ngram_rows, config.n_embd, getattr(torch, config.mem_dtype))

    def initialize(self, residual):
        nn.init.constant_(self.strength, 0.1)

    def forward(self, h, tokens, pool):
        """h (B, T, C), tokens (B, T, N) from last_tokens -> (B, T, C), to add to h"""
        rows = self.rows(tokens)  # (B, T, 1)
        e = read_rows(pool, rows).squeeze(2)  # (B, T, C)
        if pool.usage is not None:
            pool.usage.add(rows, torch.ones(rows.shape, device=rows.device))
        signs = pool.signs[(tokens[..., 0] ^ tokens[..., 1]) % len(pool.signs)]
        return self.strength * (e * signs).to(h.dtype)

    def rows(self, tokens):
        """tokens (B, T, N) -> rows of the pool (B, T, 1)"""
        now = tokens[..., 0:1]
        before = tokens[..., 1:2]
        rows = ((36313 * now) ^ (27191 * before)) % (self.R - 1)
        return rows.masked_fill(before == self.pad, self.R - 1)

    def flops(self):
        return 2 * self.C


class BigramPool(ValuePool):
    """A table that all layers share. signs (8192, C) are 1 and -1."""

    def __init__(self, rows, dim, dtype):
        super().__init__(rows, dim, dtype, initialize=False)
        self.register_buffer("signs", torch.empty(8192, dim, dtype=torch.int8))

    @torch.no_grad()
    def initialize(self):
        self.values.zero_()
        self.signs.copy_(torch.randint(2, self.signs.shape, device=self.signs.device) * 2 - 1)


NGRAMS = {"engram": Engram, "bigram": BigramHash}


def table_sizes(config):
    """The M smallest primes that are at least ngram_rows."""
    primes = []
    candidate = config.ngram_rows
    while len(primes) < (config.ngram_order - 1) * config.ngram_heads:
        if all(candidate % d != 0 for d in range(2, math.isqrt(candidate) + 1)):
            primes.append(candidate)
        candidate += 1
    return primes
