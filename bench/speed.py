"""How fast are the lookup, the whole layer, training and generation, against straightforward or dense ones?

    python bench/speed.py                   all of them, with tables of 2^14 and 2^20 slots
    python bench/speed.py --compile         also train with torch.compile (minutes)
    python bench/speed.py --systems         all systems of the facts presets instead, and what dominates each

On a CPU the shapes are those of the facts presets, on a GPU 16,384 tokens, width 1,024, a million slots,
bfloat16. A CPU times in turns, so that all meet the same disturbances; a GPU, which is steady but has less
memory, one after the other.
"""

import statistics
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train
from bench import training
from bench.lookup import embedding_bag, random_problem, timed
from data.presets import PRESETS, SYSTEMS
from kernels import RowAdam, lookup
from memory import MemoryLayer, ValuePool
from model import GPT, GPTConfig, SwiGLU
from runtime.device import choose_device, precision


class PlainPool(ValuePool):
    def forward(self, slots, weights):  # its gradient has the size of the table
        return embedding_bag(self.values, slots, weights)


class PlainLayer(MemoryLayer):
    """The layer as one would first write it: torch.topk, all K * K sums, and autograd for the rest."""

    def retrieve(self, x):
        n, H, K, Q = len(x), self.H, self.K, self.Q
        q = self.query_norm(self.query(x).float().view(n, 2 * H, Q))
        s = (
            torch.bmm(q.transpose(0, 1), self.key_norm(self.keys).transpose(1, 2)) / self.scale
        )  # (2H, n, N)
        (s1, i), (s2, j) = (half.topk(K) for half in s.float().chunk(2))  # (H, n, K)
        best, pair = (s1.unsqueeze(-1) + s2.unsqueeze(-2)).flatten(-2).topk(K)  # of (H, n, K * K)
        slots = i.gather(-1, pair // K) * self.N + j.gather(-1, pair % K)
        return slots.transpose(0, 1).flatten(1), best.softmax(-1).transpose(0, 1).flatten(1)


def in_turns(makers, device, repeats):
    """{name: function that makes a function to time} -> {name: median seconds}"""
    times = {name: [] for name in makers}
    for names in [list(makers)] if device.type == "cpu" else [[name] for name in makers]:
        runs = {name: makers[name]() for name in names}
        for i in range(repeats + 3):
            for name, run in runs.items():
                t = timed(run, device)
                if i >= 3:  # after a warm-up
                    times[name].append(t)
        del runs, run
        torch.cuda.empty_cache()
    return {name: statistics.median(t) for name, t in times.items()}


def layer_step(config, kind, x, grad, context):
    """Makes a layer's training step: forward, backward, optimiser. kind: "memory", "plain" or "swiglu"."""
    torch.manual_seed(0)
    C, slots, dtype = config.n_embd, config.mem_keys**2, getattr(torch, config.mem_dtype)
    pool, optimizers = None, []
    if kind == "swiglu":
        layer = SwiGLU(C, config.n_ffn)
    else:
        layer = (MemoryLayer if kind == "memory" else PlainLayer)(
            C, slots, config.mem_heads, config.mem_topk, config.mem_key_dim, config.mem_value_dim
        )
        pool = (ValuePool if kind == "memory" else PlainPool)(slots, config.mem_value_dim, dtype)
        pool = pool.to(x.device)
    if kind == "memory":
        optimizers.append(RowAdam(pool, lr=1e-3))
    elif kind == "plain":
        optimizers.append(torch.optim.Adam([pool.values], lr=1e-3))
    layer = layer.to(x.device)
    optimizers.append(torch.optim.AdamW(layer.parameters(), lr=1e-3, fused=True))

    def step():
        x.grad = None  # as in a model, what is below wants a gradient
        with context:
            y = layer(x) if kind == "swiglu" else layer(x, pool)
        y.backward(grad.to(y.dtype))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def layer_times(config, device, tokens, context, repeats):
    x, grad = (torch.randn(1, tokens, config.n_embd, device=device) for _ in range(2))
    x.requires_grad_()
    kinds = "memory", "plain", "swiglu"
    makers = {kind: partial(layer_step, config, kind, x, grad, context) for kind in kinds}
    memory, plain, swiglu = (
        1e3 * seconds for seconds in in_turns(makers, device, repeats).values()
    )
    print("\nTraining step of one layer (forward, backward, optimiser), ", end="")
    print(f"{tokens:,} tokens of width {config.n_embd:,}:")
    print(f"  Memory+, {config.mem_keys**2:9,} slots       {memory:9.2f} ms")
    print(
        f"  the same, straightforward       {plain:9.2f} ms, {plain / memory:.2f} times as long as Memory+"
    )
    print(f"  SwiGLU of width {config.n_ffn:6}          {swiglu:9.2f} ms; ", end="")
    print(f"Memory+ takes {memory / swiglu:.2f} times as long", flush=True)
    return {"memory_ms": memory, "plain_ms": plain, "swiglu_ms": swiglu}


def lookup_run(S, n, k, D, dtype, device, run, optimize):
    """lookup or its like, forward and backward, with RowAdam or without. Any size S, the same reads."""
    _, slots, weights, grad = random_problem(n, k, 2**14, D, dtype, device, "zipf")
    slots = torch.randperm(S, device=device)[
        slots
    ]  # the reads of 2^14 slots, scattered over the table
    pool, weights = ValuePool(S, D, dtype).to(device), weights.requires_grad_()
    optimizer = RowAdam(pool)

    def step():
        (pool(slots, weights) if run is lookup else run(pool.values, slots, weights)).backward(grad)
        if optimize:
            optimizer.step()
        pool.values.grad = weights.grad = None

    return step


def lookup_times(config, device, tokens, repeats):
    """lookup against embedding_bag, and a whole step of a table of two sizes."""
    k, D, dtype = (
        config.mem_heads * config.mem_topk,
        config.mem_value_dim,
        getattr(torch, config.mem_dtype),
    )
    kinds = {"lookup": (2**14, lookup, False), "bag": (2**14, embedding_bag, False)}
    kinds |= {"14": (2**14, lookup, True), "20": (2**20, lookup, True)}
    makers = {
        name: partial(lookup_run, S, tokens, k, D, dtype, device, run, optimize)
        for name, (S, run, optimize) in kinds.items()
    }
    t = {name: 1e3 * seconds for name, seconds in in_turns(makers, device, repeats).items()}
    bag, growth = t["bag"] / t["lookup"], t["20"] / t["14"]
    print(f"\nThe lookup, {tokens:,} tokens read {k} slots each of width {D:,} (Zipf):")
    print(
        f"  forward and backward            {t['lookup']:9.2f} ms; F.embedding_bag {bag:.2f} times as long"
    )
    print(f"  and RowAdam, table of 2^14 rows {t['14']:9.2f} ms")
    print(
        f"  the same rows of 2^20           {t['20']:9.2f} ms, {growth:.2f} times as long",
        flush=True,
    )
    return {f"{name}_ms": ms for name, ms in t.items()}


class ScatteredPool(ValuePool):
    """A table of 2^20 rows, read in the pattern of a smaller one: what does its size alone cost?"""

    def __init__(self, S, D, dtype):
        super().__init__(2**20, D, dtype)
        self.slots = S  # that layers see
        self.places = torch.randperm(2**20)[:S]  # on the device that is the default meanwhile

    def lookup(self, slots, weights):
        return super().lookup(self.places[slots], weights)


def model_step(config, device, idx, context, scattered=False, compiled=False):
    """Makes a training step of a model."""
    torch.manual_seed(0)
    with device:
        model = GPT(config)
        if scattered:
            dtype = getattr(torch, config.mem_dtype)
            model.pool = ScatteredPool(config.mem_keys**2, config.mem_value_dim, dtype)
    optimizers = train.make_optimizers(model, train.TrainConfig())
    run_model = torch.compile(model) if compiled else model

    def step():
        with context:
            loss = run_model(idx, idx)[1]
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def model_times(memory, dense, device, tokens, context, repeats, compiled):
    """Training throughput of two models."""
    T = memory.block_size
    idx = torch.randint(memory.vocab_size, (max(1, tokens // T), T), device=device)
    configs = {"memory": memory, "dense": dense}
    makers = {
        name: partial(model_step, config, device, idx, context) for name, config in configs.items()
    }
    makers["scattered"] = partial(makers["memory"], scattered=True)
    if compiled:
        makers |= {f"{name}, compiled": partial(makers[name], compiled=True) for name in configs}
    t = in_turns(makers, device, repeats)
    rates = {name: idx.numel() / seconds for name, seconds in t.items()}
    shape = f"{memory.n_layer} blocks of width {memory.n_embd}, one with memory"
    print(f"\nThe model ({shape}), tokens a second:")
    for form in ("", ", compiled") if compiled else ("",):
        a, b = rates["memory" + form], rates["dense" + form]
        print(f"  {'training' + form:31} {a:9,.0f} with memory, {b:9,.0f} dense: ratio {a / b:.2f}")
    growth = t["scattered"] / t["memory"]
    print(
        f"  a step with the same slots of a table of 2^20 rows: {growth:.2f} times as long",
        flush=True,
    )
    return rates | {"growth": growth}


def generation_times(memory, dense, device, context, new_tokens, repeats=5):
    """Tokens a second at batch 1. The first text is slower: kernels are compiled or loaded."""
    result = {}
    print(f"\nGenerating {new_tokens} tokens at batch 1, tokens a second:")
    for name, config in (("memory", memory), ("dense", dense)):
        with device:
            model = GPT(config).eval()
        idx = torch.zeros(1, 8, dtype=torch.int64, device=device)
        with context, torch.inference_mode():
            generate = partial(model.generate, idx, new_tokens, temperature=0)
            t = [timed(generate, device) for _ in range(repeats)]
        first, later = new_tokens / t[0], new_tokens / statistics.median(t[1:])
        result |= {f"{name}_first": first, f"{name}_later": later}
        print(f"  {name:8} {first:9,.0f} the first text, {later:9,.0f} those after it", flush=True)
    print(
        f"  ratio of memory to dense, later: {result['memory_later'] / result['dense_later']:.2f}"
    )
    return result


def system_times(device, context, repeats):
    """All systems of the facts presets: training in turns, generation at batch 1, what dominates a step."""
    configs = {}
    for system in SYSTEMS:
        options = PRESETS[f"facts-{system}"] | {"vocab_size": 1712}
        configs[system] = train.make_configs(options)[1]
    idx = torch.randint(1712, (8, 128), device=device)
    makers = {
        name: partial(model_step, config, device, idx, context) for name, config in configs.items()
    }
    rates = {name: idx.numel() / t for name, t in in_turns(makers, device, repeats).items()}
    training.record_parts()
    print(
        "\nTokens a second of the facts presets (relative to dense), and shares of a training step:"
    )
    for name, config in configs.items():
        with device:
            model = GPT(config).eval()
        with context, torch.inference_mode():
            generate = partial(model.generate, idx[:1, :8], 64, temperature=0)
            text = 64 / statistics.median(timed(generate, device) for _ in range(9))
        step, schedule = (
            makers[name](),
            torch.profiler.schedule(wait=2, warmup=1, active=5, repeat=1),
        )
        with torch.profiler.profile(schedule=schedule) as profiler:
            for _ in range(8):
                step()
                profiler.step()
        shares = training.shares_of(profiler.key_averages(), device.type == "cuda")
        largest = sorted(
            ((share, part) for part, share in shares.items() if share > 0.03), reverse=True
        )[:3]
        counts, flops = (
            model.parameter_counts(),
            sum(model.flops_per_token(config.block_size).values()),
        )
        print(
            f"  {name:9}{flops / 1e6:6.3f} MFLOPs{sum(counts.values()):10,} parameters; training",
            end="",
        )
        print(
            f"{rates[name]:8,.0f} ({rates[name] / rates['dense']:.2f}), generating{text:6,.0f}; ",
            end="",
        )
        print(", ".join(f"{part} {share:.0%}" for share, part in largest), flush=True)


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument(
        "--device", default="auto", help="cpu or cuda; default: cuda where there is one"
    )
    parser.add_argument(
        "--repeats", type=int, default=30, help="steps that are timed; default: %(default)s"
    )
    parser.add_argument("--compile", action="store_true", help="also train with torch.compile")
    parser.add_argument(
        "--systems", action="store_true", help="all systems of the facts presets instead"
    )
    args = parser.parse_args()
    device = choose_device(args.device)
    context = precision("auto", device)
    if device.type == "cuda":
        shape = dict(n_layer=8, n_head=16, n_embd=1024, block_size=1024, mem_dtype="bfloat16")
        tokens, memory = 16384, GPTConfig(**shape, mem_count=1)
    else:
        preset, names = PRESETS["facts-memory"], GPTConfig.__dataclass_fields__
        shape = {name: value for name, value in preset.items() if name in names}
        tokens, memory = 1024, GPTConfig(vocab_size=1712, **shape)
    card = torch.cuda.get_device_name() if device.type == "cuda" else device
    threads = f"{torch.get_num_threads()} threads"
    print(f"PyTorch {torch.__version__}, {card}, {threads}; medians of {args.repeats}")
    if args.systems:
        return system_times(device, context, args.repeats)
    lookup_times(memory, device, tokens, args.repeats)
    layer_times(memory, device, tokens, context, args.repeats)
    dense = replace(memory, mem_layers=(), mem_count=0)
    model_times(memory, dense, device, tokens, context, args.repeats, args.compile)
    generation_times(memory, dense, device, context, 64)


if __name__ == "__main__":
    main()
