"""N-gram memories: rows against numbers by hand, layers against float64 programs of loops, and what they can and cannot learn."""

import json
import math
import re
import shutil
from dataclasses import replace

import pytest
import sympy
import torch
import torch.nn.functional as F

import train
from helpers import SMALL, refusal, train_here
from kernels import RowAdam
from model import GPT, GPTConfig
from systems.engram import NGRAMS, make_ngrams, table_sizes

SEPARATOR = 7
DENSE = GPTConfig(vocab_size=50, block_size=16, n_layer=3, n_head=2, n_embd=16, separator=SEPARATOR)
ENGRAM = replace(
    DENSE, ngram_layers=(0, 2), ngram_rows=20, ngram_order=4, ngram_heads=2, ngram_width=3
)
BIGRAM = replace(DENSE, ngram_layers=(0, 2), ngram="bigram", ngram_rows=30)
BOTH_KINDS = pytest.mark.parametrize("config", [ENGRAM, BIGRAM], ids=["engram", "bigram"])


def make(config, dtype=torch.float64):
    """A model in which nothing is 0 or 1 as at first, so that what is left out would be noticed."""
    torch.manual_seed(0)
    model = GPT(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def text(B=3, T=12, vocabulary=50):
    """Random tokens with separators: alone, two in a row, and at the ends."""
    tokens = torch.randint(vocabulary, (B, T), generator=torch.Generator().manual_seed(1))
    tokens[0, 4] = tokens[1, 0] = tokens[1, 6] = tokens[1, 7] = tokens[2, -1] = SEPARATOR
    return tokens


def history(ids, t, N, pad):
    """Tokens t, t - 1, ... of one text, for one position, by loops."""
    found = []
    for k in range(N):
        starts = SEPARATOR in ids[max(0, t - k + 1) : t + 1]
        found.append(pad if t - k < 0 or starts else ids[t - k])
    return found


# --- rows -------------------------------------------------------------------------------------------------------------


def test_make_ngrams_stop_at_the_start_of_a_document():
    tokens = torch.tensor([[3, 4, SEPARATOR, 5, 6, 8]])
    pad = 50
    want = [
        [3, pad, pad],
        [4, 3, pad],
        [SEPARATOR, pad, pad],  # it starts a document, and belongs to it
        [5, SEPARATOR, pad],
        [6, 5, SEPARATOR],
        [8, 6, 5],
    ]
    assert make_ngrams(tokens, 3, SEPARATOR, pad)[0].tolist() == want
    random = text()
    found = make_ngrams(random, 4, SEPARATOR, pad)
    for b, ids in enumerate(random.tolist()):
        for t in range(len(ids)):
            assert found[b, t].tolist() == history(ids, t, 4, pad)


def test_rows_of_engram_by_hand():
    config = replace(DENSE, vocab_size=10, ngram_layers=(0, 1), ngram_rows=10, ngram_heads=2)
    model = GPT(config)
    assert table_sizes(config) == [11, 13, 17, 19]
    tokens = torch.tensor([[2, 9, 4], [9, 10, 10]])  # the latest first; 10 is the pad
    # 3 * 2 = 6 = 00110, 5 * 9 = 45 = 101101: xor 101011 = 43. 7 * 4 = 28 = 011100: xor 110111 = 55
    # 3 * 9 = 27 = 011011, 5 * 10 = 50 = 110010: xor 101001 = 41. 7 * 10 = 70 = 1000110: xor 1101111 = 111
    want = [
        [43 % 11, 11 + 43 % 13, 24 + 55 % 17, 41 + 55 % 19],
        [41 % 11, 11 + 41 % 13, 24 + 111 % 17, 41 + 111 % 19],
    ]
    for number, block in enumerate(model.blocks[:2]):
        block.ngram.multipliers.copy_(torch.tensor([3, 5, 7]))
        rows = block.ngram.rows(tokens)
        assert (rows - 60 * number).tolist() == want  # each layer has rows of its own
    assert len(model.ngram_pool.values) == 120


def test_rows_of_bigrams_by_hand():
    layer = GPT(replace(BIGRAM, ngram_rows=1000)).blocks[2].ngram
    # 36313 * 9 = 326817 = 1001111110010100001, 27191 * 4 = 108764 = 0011010100011011100
    # xor = 1010101010001111101 = 349309, and 349309 mod 999 = 658
    tokens = torch.tensor([[9, 4, 1], [9, 4, 2], [9, 50, 50]])
    assert layer.rows(tokens).flatten().tolist() == [658, 658, 999]


def test_products_fit_int64():
    config = replace(DENSE, vocab_size=50257, ngram_layers=(1,), ngram_order=3, ngram_rows=999)
    for seed in range(20):
        torch.manual_seed(seed)
        layer = GPT(config).blocks[1].ngram
        m = layer.multipliers.tolist()
        assert all(x % 2 == 1 and 0 < x * 50257 < 2**63 for x in m) and len(set(m)) == 3
        tokens = [50257, 50256, 50257]
        mix = [m[0] * tokens[0] ^ m[1] * tokens[1]]
        mix.append(mix[0] ^ m[2] * tokens[2])
        primes = table_sizes(config)
        want = []
        for i, prime in enumerate(primes):
            want.append(sum(primes[:i]) + mix[i // 8] % prime)
        assert layer.rows(torch.tensor([tokens]))[0].tolist() == want


@pytest.mark.parametrize("least", [2, 20, 1000, 524288])
def test_tables_have_the_next_primes(least):
    config = replace(DENSE, ngram_rows=least, ngram_order=4, ngram_heads=3)
    want = []
    for _ in range(9):
        want.append(sympy.nextprime(max([least - 1, *want])))
    assert table_sizes(config) == want


@BOTH_KINDS
def test_no_row_depends_on_a_later_token_or_an_earlier_document(config):
    layer = GPT(config).blocks[2].ngram

    def rows(tokens):
        return layer.rows(make_ngrams(tokens, config.ngram_order, SEPARATOR, config.vocab_size))

    tokens = text()
    before = rows(tokens)
    for t in range(tokens.size(1)):
        changed = tokens.clone()
        changed[:, t] = (tokens[:, t] + 1) % 50
        after = rows(changed)
        assert torch.equal(before[:, :t], after[:, :t])
        if t > 0:  # the bigram hash has one row for all first tokens
            assert not torch.equal(before[:, t], after[:, t])
    changed = tokens.clone()
    changed[0, :4] = 1  # before a separator
    assert torch.equal(before[0, 4:], rows(changed)[0, 4:])
    assert torch.equal(rows(tokens[:, 3:])[0, 1:], before[0, 4:])  # nor on where the window begins


# --- layers -----------------------------------------------------------------------------------------------------------


def engram_by_loops(h, ids, layer, number, p):
    """The page in the module, a token and a row at a time. ids: of one text"""
    c = ENGRAM
    primes = table_sizes(c)
    m = layer.multipliers.tolist()
    rows = []
    y = []
    for t, x in enumerate(h):
        tokens = history(ids, t, c.ngram_order, c.vocab_size)
        e = []
        first = number * sum(primes)
        for n in range(2, c.ngram_order + 1):
            mix = 0
            for k in range(n):
                mix ^= m[k] * tokens[k]
            for j in range(c.ngram_heads):
                prime = primes[(n - 2) * c.ngram_heads + j]
                rows.append(first + mix % prime)
                e.append(p["values"][rows[-1]])
                first += prime
        e = torch.cat(e)

        def norm(v, weight):
            return v / (v.square().mean() + 1e-6).sqrt() * weight

        key = norm(p["key.weight"] @ e, p["key_norm.weight"])
        g = (key * norm(x, p["query_norm.weight"])).sum() / math.sqrt(len(x))
        sign = 1 if g > 0 else -1
        gate = 1 / (1 + torch.exp(-sign * (sign * g).sqrt()))
        y.append(gate * (p["value.weight"] @ e))
    return torch.stack(y), rows


def bigram_by_loops(h, ids, layer, number, p):
    rows = []
    y = []
    signs = p["signs"]
    for t in range(len(h)):
        now, before = history(ids, t, 2, 50)
        row = ((36313 * now) ^ (27191 * before)) % 29
        if before == 50:
            row = 29
        rows.append(row)
        y.append(p["strength"] * p["values"][row] * signs[(now ^ before) % 8192])
    return torch.stack(y), rows


@pytest.mark.parametrize(
    "config, loops",
    [(ENGRAM, engram_by_loops), (BIGRAM, bigram_by_loops)],
    ids=["engram", "bigram"],
)
def test_a_layer_equals_loops(config, loops):
    """Output and every gradient, in float64."""
    model = make(config)
    pool = model.ngram_pool
    pool.collect_gradients()
    layer = model.blocks[2].ngram  # the second one
    ids = text()
    generator = torch.Generator().manual_seed(2)
    h, grad = torch.randn(2, *ids.shape, 16, generator=generator, dtype=torch.float64)
    names = dict(layer.named_parameters()) | {"values": pool.values}
    exact = {name: p.detach().clone().requires_grad_() for name, p in names.items()}
    if config is BIGRAM:
        exact["signs"] = pool.signs.double()
        assert set(pool.signs.flatten().tolist()) == {-1, 1}
    exact_h = h.clone().requires_grad_()
    outputs = []
    rows = []
    for b in range(len(ids)):
        y, read = loops(exact_h[b], ids[b].tolist(), layer, 1, exact)
        outputs.append(y)
        rows += read
    want = torch.stack(outputs)
    want.backward(grad)

    h.requires_grad_()
    tokens = make_ngrams(ids, config.ngram_order, SEPARATOR, config.vocab_size)
    got = layer(h, tokens, pool)
    got.backward(grad)
    gradient = pool.take_gradient()
    assert gradient.indices()[0].tolist() == sorted(set(rows))
    results = {name: p.grad for name, p in layer.named_parameters()}
    results |= {"output": got, "values": gradient.to_dense()}
    wanted = {name: exact[name].grad for name in names} | {"output": want}
    if config is ENGRAM:  # the bigram hash does not look at h
        results["h"] = h.grad
        wanted["h"] = exact_h.grad
    assert results.keys() == wanted.keys()
    for name, b in wanted.items():
        assert b.norm() > 0, name
        assert (results[name] - b).norm() <= 1e-12 * b.norm(), name


@BOTH_KINDS
def test_it_is_added_before_the_attention_of_its_block(config):
    model, idx = make(config), text()
    tokens = make_ngrams(idx, config.ngram_order, SEPARATOR, config.vocab_size)
    x = model.embedding(idx)
    for i, block in enumerate(model.blocks):
        if i in (0, 2):
            x = x + block.ngram(x, tokens, model.ngram_pool)
        x, _ = block(x, None, model.cos[:12], model.sin[:12])
    torch.testing.assert_close(model.logits(model.norm(x)), model(idx)[0])


@BOTH_KINDS
def test_at_first_it_adds_nothing_and_learns_all_the_same(config):
    torch.manual_seed(0)
    model = GPT(config)
    dense = GPT(DENSE)
    dense.load_state_dict({n: p for n, p in model.state_dict().items() if "ngram" not in n})
    idx = text()
    torch.testing.assert_close(model(idx)[0], dense(idx)[0], rtol=0, atol=0)
    network = [p for n, p in model.named_parameters() if n != "ngram_pool.values"]
    optimizers = [torch.optim.AdamW(network, 1e-2), RowAdam(model.ngram_pool, 1e-2)]
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "ngram" in name}
    for _ in range(3):
        model(idx[:, :-1], idx[:, 1:])[1].backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        if "ngram" in name:
            assert not torch.equal(parameter, before[name]), name


def test_counts_by_hand():
    # tables of 23, 29, 31, 37, 41, 43 rows, in two layers; keys and values of 6 * 3 -> 16, and two norms
    model = GPT(ENGRAM)
    assert model.ngram_pool.values.shape == (2 * 204, 3)
    dense = GPT(DENSE).parameter_counts()["dense"]
    layer = 2 * 18 * 16 + 2 * 16
    assert model.parameter_counts() == {"dense": dense + 2 * layer, "pool": 408 * 3}
    assert model.flops_per_token(12)["memory"] == 2 * 2 * (2 * 18 * 16 + 18)
    model = GPT(BIGRAM)  # layers share rows
    assert model.parameter_counts() == {"dense": dense + 2, "pool": 30 * 16}
    assert model.flops_per_token(12)["memory"] == 2 * 2 * 16
    groups = model.parameter_groups()
    assert [p.shape for p in groups["pool"]] == [(30, 16)]
    assert model.blocks[0].ngram.strength in set(groups["norm_weights"])  # no weight decay


def test_multipliers_and_signs_are_kept(tmp_path):
    """Other ones would read other rows."""
    for config, name in ((ENGRAM, "blocks.2.ngram.multipliers"), (BIGRAM, "ngram_pool.signs")):
        model = make(config, torch.float32)
        torch.save(model.state_dict(), tmp_path / "weights.pt")
        torch.manual_seed(3)
        other = GPT(config)  # as another seed draws it
        assert not torch.equal(other.state_dict()[name], model.state_dict()[name])
        other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
        assert torch.equal(other(text())[0], model(text())[0])
        other.get_buffer(name)[0] *= -1
        assert not torch.equal(other(text())[0], model(text())[0])


@BOTH_KINDS
def test_usage_counts_rows_by_their_gates(config):
    model = make(config)
    with model.ngram_pool.record_usage() as usage:
        model(text())
    reads = torch.zeros(len(model.ngram_pool.values))
    mass = torch.zeros(len(reads))
    tokens = make_ngrams(text(), config.ngram_order, SEPARATOR, config.vocab_size)
    x = model.embedding(text())
    for block in model.blocks:
        if block.ngram is not None:
            rows = block.ngram.rows(tokens)
            if config is ENGRAM:
                e = model.ngram_pool.values[rows].flatten(2)
                gate = block.ngram.gate(x, block.ngram.key(e)).expand(rows.shape)
                assert 0 < gate.min() < 0.4 and 0.6 < gate.max() < 1
            else:
                gate = block.ngram.strength.expand(rows.shape)
            reads.index_put_((rows,), torch.ones(rows.shape), accumulate=True)
            mass.index_put_((rows,), gate.abs().float(), accumulate=True)
            x = x + block.ngram(x, tokens, model.ngram_pool)
        x, _ = block(x, None, model.cos[:12], model.sin[:12])
    assert torch.equal(usage.reads, reads)
    torch.testing.assert_close(usage.mass, mass)


def test_a_row_of_zeros_has_a_finite_gradient():
    """Its key is 0, and so is its agreement with h, where a square root has no derivative."""
    model = make(ENGRAM, torch.float32)
    model.ngram_pool.collect_gradients()
    with torch.no_grad():
        model.ngram_pool.values.zero_()
    model(text(), text())[1].backward()
    assert all(
        p.grad.isfinite().all() for n, p in model.named_parameters() if n != "ngram_pool.values"
    )
    assert model.ngram_pool.take_gradient().values().isfinite().all()


@BOTH_KINDS
def test_a_model_in_bfloat16_and_ids_in_int32(config):
    """float16-like weights throughout, as who loads a model to generate text may want; and ids whose products pass 2^31."""
    model = make(replace(config, vocab_size=100_000), torch.float32)
    model.ngram_pool.requires_grad_(False)
    idx = text(vocabulary=100_000)
    want = model(idx)[0]
    assert torch.equal(model(idx.int())[0], want)
    got = model.bfloat16()(idx)[0]
    assert got.dtype == torch.bfloat16
    assert F.cosine_similarity(got.flatten(), want.flatten(), dim=0) > 0.99


@BOTH_KINDS
def test_bfloat16_autocast_says_nothing(config, recwarn):
    model = make(config, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(text())[0]
    assert not [w for w in recwarn if "dtype" in str(w.message)]
    assert F.cosine_similarity(got.flatten(), model(text())[0].flatten(), dim=0) > 0.99


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(ngram_layers=(3,)), ["ngram_layers", "no block 3", "0 to 2"]),
        (dict(ngram_order=1), ["ngram_order=1", "at least 2"]),
        (dict(ngram="trigram"), ["ngram=trigram", "engram, bigram"]),
        (dict(ngram="bigram", ngram_heads=4, ngram_width=0), ["ngram_heads=4", "ngram=engram"]),
        (dict(ngram="bigram"), ["ngram_width=3", "ngram=engram"]),
        (dict(ngram_order=9), ["ngram_order=9", "block_size=16", "half"]),
        (dict(ngram_heads=1000), ["ngram_heads=1000", "below 1000"]),
        (dict(ngram_rows=2**26), ["ngram_rows=67108864", "2,147,483,648 rows"]),
        (dict(separator=50), ["separator=50", "vocabulary has 50"]),
    ],
)
def test_options_that_do_not_fit_are_refused_by_name(options, words):
    with pytest.raises(ValueError) as error:
        replace(ENGRAM, **{"ngram_order": 3, "ngram_heads": 8, **options})
    assert all(word in str(error.value) for word in words), error.value


# --- what it can learn ------------------------------------------------------------------------------------------------


def loss_after_training(config, texts, targets, steps):
    torch.manual_seed(0)
    model = GPT(config)
    network = model.parameter_groups()
    optimizers = [torch.optim.AdamW(network["matrices"] + network["norm_weights"], 3e-3)]
    optimizers += [RowAdam(pool, 3e-2) for pool in model.pools().values()]
    for _ in range(steps):
        loss = model(texts, targets)[1]
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return loss.item()


@pytest.mark.slow
@pytest.mark.parametrize("kind", NGRAMS)
def test_it_remembers_what_follows_two_tokens_together_and_not_apart(kind):
    """Pairs of tokens, each with a random next token. Then the same with other tokens between the two: no n-gram holds both."""
    generator = torch.Generator().manual_seed(0)
    pairs = torch.randint(8, 50, (2000, 2), generator=generator).unique(dim=0)
    answer = torch.randint(8, 50, (len(pairs), 1), generator=generator)
    first, second = pairs.split(1, dim=1)
    apart = torch.cat((first, torch.full((len(pairs), 3), 5), second), dim=1)
    config = replace(
        DENSE, n_layer=1, ngram_layers=(0,), ngram=kind, ngram_rows=20_000, block_size=8
    )
    losses = {}
    for name, texts in (("together", pairs), ("apart", apart)):
        targets = torch.full_like(texts, -1)
        targets[:, -1:] = answer
        losses[name] = loss_after_training(config, texts, targets, 120)
    assert losses["together"] < 0.3 and losses["apart"] > 1, losses  # knowing nothing: log 42 = 3.7


# --- runs -------------------------------------------------------------------------------------------------------------


def test_the_checkpoint_is_as_large_as_announced(facts, tmp_path, capsys):
    """With all that it holds: signs are numbers, too."""
    options = ["--n_embd=256", "--ngram=bigram", "--ngram_rows=3000", "--ngram_layers=0,1"]
    train_here(*SMALL, "--mem_layers=", *options, f"--dataset={facts}", f"--out_dir={tmp_path}")
    announced = re.search(r"a checkpoint of (\d+) MB", capsys.readouterr().out)[1]
    size = (tmp_path / "ckpt.pt").stat().st_size
    signs = 8192 * 256
    assert abs(size - int(announced) * 1e6) < 0.6e6 < signs


def test_a_table_that_does_not_fit_is_named(tmp_path, capsys, facts):
    options = ["--ngram_layers=0", "--ngram_rows=100000000", "--ngram_width=64"]
    given = [*SMALL, *options, f"--dataset={facts}", f"--out_dir={tmp_path}"]
    said = refusal(train.main, given, capsys)
    assert "does not fit" in said and "less than --ngram_rows=100000000" in said


def test_a_dataset_with_another_separator_is_refused(finished, facts, tmp_path, capsys):
    """N-grams would run across its documents."""
    other = tmp_path / "other"
    shutil.copytree(facts, other)
    meta = json.loads((other / "meta.json").read_text())
    (other / "meta.json").write_text(json.dumps(meta | {"separator": 5}))
    given = [f"--init_from={finished}", f"--dataset={other}", f"--out_dir={tmp_path / 'out'}"]
    said = refusal(train.main, given, capsys)
    assert (
        f"--dataset={other}: its separator is token 5" in said and not (tmp_path / "out").exists()
    )
