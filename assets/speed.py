"""How fast is the whole layer? Times in one process, in turns, so that all meet the same disturbances.

    python assets/speed.py                  the layer's training step against a straightforward one and against SwiGLU;
                                            tables of 2^14 to 2^20 slots; training and generation against the dense model
    python assets/speed.py --compile        also train with torch.compile (minutes)

On a CPU the shapes are those of the facts presets, on a GPU 16,384 tokens, width 1,024, a million slots, bfloat16.
"""

import argparse
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train
from kernels import RowAdam, lookup, random_problem, timed
from memory import MemoryLayer, ValuePool
from model import GPT, GPTConfig, SwiGLU


class PlainPool(ValuePool):
    def forward(self, slots, weights):  # its gradient has the size of the table
        return bag(self.values, slots, weights)


class PlainLayer(MemoryLayer):
    """The layer as one would first write it: torch.topk, all K * K sums, and autograd for the rest."""

    def retrieve(self, x):
        n, H, K, Q = len(x), self.H, self.K, self.Q
        q = self.query_norm(self.query(x).float().view(n, 2 * H, Q))
        s = torch.bmm(q.transpose(0, 1), self.key_norm(self.keys).transpose(1, 2)) / self.scale  # (2H, n, N)
        (s1, i), (s2, j) = (half.topk(K) for half in s.float().chunk(2))  # (H, n, K)
        best, pair = (s1.unsqueeze(-1) + s2.unsqueeze(-2)).flatten(-2).topk(K)  # of (H, n, K * K)
        slots = i.gather(-1, pair // K) * self.N + j.gather(-1, pair % K)
        return slots.transpose(0, 1).flatten(1), best.softmax(-1).transpose(0, 1).flatten(1)


def in_turns(runs, device, repeats):
    """{name: run} -> {name: median seconds}"""
    times = {name: [] for name in runs}
    for i in range(repeats + 3):
        for name, run in runs.items():
            t = timed(run, device)
            if i >= 3:  # after a warm-up
                times[name].append(t)
    return {name: statistics.median(t) for name, t in times.items()}


def layer_step(config, kind, x, grad, context):
    """A training step of one layer as a function: forward, backward, optimiser. kind: "memory", "plain" or "swiglu"."""
    torch.manual_seed(0)
    layer = {"memory": MemoryLayer, "plain": PlainLayer, "swiglu": SwiGLU}[kind](config)
    pool, optimizers = None, []
    if kind != "swiglu":
        nn.init.normal_(layer.keys, std=layer.Q**-0.5)
        pool = (ValuePool if kind == "memory" else PlainPool)(config.mem_keys**2, config.mem_value_dim)
        nn.init.normal_(pool.values, std=0.02)
        pool = pool.to(x.device, getattr(torch, config.mem_dtype))
        optimizers = [(RowAdam if kind == "memory" else torch.optim.Adam)(pool.parameters(), lr=1e-3)]
    layer = layer.to(x.device)
    optimizers.append(torch.optim.AdamW(layer.parameters(), lr=1e-3))

    def step():
        with context:
            y = layer(x, pool)
        y.backward(grad.to(y.dtype))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def layer_times(config, device, tokens, context, repeats):
    x, grad = (torch.randn(1, tokens, config.n_embd, device=device) for _ in range(2))
    t = in_turns({kind: layer_step(config, kind, x, grad, context) for kind in ("memory", "plain", "swiglu")}, device, repeats)
    t = {kind: 1e3 * seconds for kind, seconds in t.items()}
    print(f"\nTraining step of one layer (forward, backward, optimiser), {tokens:,} tokens of width {config.n_embd:,}:")
    print(f"  Memory+, {config.mem_keys**2:9,} slots       {t['memory']:9.2f} ms")
    print(f"  the same, straightforward       {t['plain']:9.2f} ms, {t['plain'] / t['memory']:.2f} times as long as Memory+")
    ratio = t["memory"] / t["swiglu"]
    print(f"  SwiGLU of width {config.n_ffn:6}          {t['swiglu']:9.2f} ms; Memory+ takes {ratio:.2f} times as long")


def lookup_run(S, n, k, D, dtype, device, run, optimize):
    """lookup or its like, forward and backward, with RowAdam or without; the same reads of a table of any size S."""
    _, slots, weights, grad = random_problem(n, k, 2**14, D, dtype, device, "zipf")
    slots = torch.randperm(S, device=device)[slots]  # the pattern is that of 2^14 slots, strewn over the table
    values, weights = nn.Parameter(torch.randn(S, D, device=device).to(dtype)), weights.requires_grad_()
    optimizer = RowAdam([values])

    def step():
        run(values, slots, weights).backward(grad)
        if optimize:
            optimizer.step()
        values.grad = weights.grad = None

    return step


def bag(values, slots, weights):
    return F.embedding_bag(slots, values, per_sample_weights=weights.to(values.dtype), mode="sum")


def lookup_times(config, device, tokens, repeats):
    """lookup against embedding_bag, and a whole step of a table of two sizes."""
    shape = tokens, config.mem_heads * config.mem_topk, config.mem_value_dim, getattr(torch, config.mem_dtype), device
    kinds = {"lookup": (2**14, lookup, False), "bag": (2**14, bag, False), "14": (2**14, lookup, True), "20": (2**20, lookup, True)}
    t = in_turns({name: lookup_run(S, *shape, run, optimize) for name, (S, run, optimize) in kinds.items()}, device, repeats)
    t = {name: 1e3 * seconds for name, seconds in t.items()}
    print(f"\nThe lookup, {shape[0]:,} tokens read {shape[1]} slots each of width {shape[2]:,} (Zipf):")
    print(f"  forward and backward            {t['lookup']:9.2f} ms; F.embedding_bag {t['bag'] / t['lookup']:.2f} times as long")
    print(f"  and RowAdam, table of 2^14 rows {t['14']:9.2f} ms")
    print(f"  the same rows of 2^20           {t['20']:9.2f} ms, {t['20'] / t['14']:.2f} times as long")


class StrewnPool(ValuePool):
    """A table of 2^20 rows, of which those are read that a smaller one would read: what does its size alone cost?"""

    def __init__(self, S, D, dtype):
        super().__init__(2**20, D, dtype)
        nn.init.normal_(self.values, std=0.02)
        self.places = torch.randperm(2**20)[:S]

    def forward(self, slots, weights):
        return super().forward(self.places[slots], weights)


def model_times(memory, dense, device, tokens, context, repeats, compiled):
    """Training throughput and generation of two models."""
    B, options = max(1, tokens // memory.block_size), train.TrainConfig()
    training, generating = {}, {}
    for name, config in (("memory", memory), ("dense", dense), ("strewn", memory)):
        for form in ("eager", "compiled") if compiled and name != "strewn" else ("eager",):
            torch.manual_seed(0)
            model = GPT(config)
            if name == "strewn":
                model.pool = StrewnPool(config.mem_keys**2, config.mem_value_dim, getattr(torch, config.mem_dtype))
                model.pool.places = model.pool.places.to(device)
            model = model.to(device)
            optimizers = train.make_optimizers(model, options)
            idx = torch.randint(config.vocab_size, (B, config.block_size), device=device)
            run_model = torch.compile(model) if form == "compiled" else model

            def step(run_model=run_model, optimizers=optimizers, idx=idx):
                with context:
                    loss = run_model(idx, idx)[1]
                loss.backward()
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)

            training[name, form] = step
        if name != "strewn":
            generating[name, "eager"] = lambda model=model, idx=idx: model.eval().generate(idx[:1, :8], 64, temperature=0)
    training = in_turns(training, device, repeats)
    generating = in_turns(generating, device, max(5, repeats // 4))
    print(f"\nThe model ({memory.n_layer} blocks of width {memory.n_embd}, one with memory), tokens a second:")
    for what, t, count in (("training", training, B * memory.block_size), ("generating, batch 1", generating, 64)):
        for form in ("eager", "compiled"):
            if ("memory", form) in t:
                a, b = count / t["memory", form], count / t["dense", form]
                label = what + (", torch.compile" if form == "compiled" else "")
                print(f"  {label:31} {a:9,.0f} with memory, {b:9,.0f} dense: ratio {a / b:.2f}")
    growth = training["strewn", "eager"] / training["memory", "eager"]
    print(f"  a training step that reads the same slots of a table of 2^20 rows takes {growth:.2f} times as long")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="cpu or cuda; default: cuda where there is one")
    parser.add_argument("--repeats", type=int, default=30, help="steps that are timed; default: %(default)s")
    parser.add_argument("--compile", action="store_true", help="also train with torch.compile")
    args = parser.parse_args()
    device = train.choose_device(args.device)
    context = train.precision("auto", device)
    if device.type == "cuda":
        shape = dict(n_layer=8, n_head=16, n_embd=1024, block_size=1024, mem_dtype="bfloat16")
        tokens, memory = 16384, GPTConfig(**shape, mem_count=1)
    else:
        preset = {name: value for name, value in train.FACTS.items() if name in GPTConfig.__dataclass_fields__}
        tokens, memory = 1024, GPTConfig(vocab_size=1312, **preset, mem_count=1)
    print(f"PyTorch {torch.__version__}, {torch.cuda.get_device_name() if device.type == 'cuda' else device}", end="")
    print(f", {torch.get_num_threads()} threads; medians of {args.repeats}")
    lookup_times(memory, device, tokens, args.repeats)
    layer_times(memory, device, tokens, context, args.repeats)
    model_times(memory, replace(memory, mem_layers=(), mem_count=0), device, tokens, context, args.repeats, args.compile)


if __name__ == "__main__":
    main()
