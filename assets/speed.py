"""How fast is the whole layer? Times in one process, in turns, so that all meet the same disturbances.

    python assets/speed.py                  the layer's training step against a straightforward one and against SwiGLU;
                                            tables of 2^14 to 2^20 slots; training and generation against the dense model
    python assets/speed.py --compile        also train with torch.compile (minutes)

On a CPU the shapes are those of the facts presets, on a GPU 16,384 tokens, width 1,024, a million slots, bfloat16.
"""

import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train
from kernels import RowAdam, lookup, random_problem
from memory import MemoryLayer, ValuePool
from model import GPT, GPTConfig, SwiGLU


class PlainPool(ValuePool):
    def forward(self, slots, weights):  # its gradient has the size of the table
        return F.embedding_bag(slots, self.values, per_sample_weights=weights.to(self.values.dtype), mode="sum")


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
            if device.type == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if i >= 3:
                times[name].append(time.perf_counter() - began)
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
    print(f"\nTraining step of one layer (forward, backward, optimiser), {tokens:,} tokens of width {config.n_embd:,}:")
    print(f"  Memory+, {config.mem_keys**2:,} slots          {t['memory'] * 1e3:9.2f} ms")
    print(f"  the same, straightforward       {t['plain'] * 1e3:9.2f} ms = {t['plain'] / t['memory']:.2f} times as long")
    print(f"  SwiGLU of width {config.n_ffn:,}            {t['swiglu'] * 1e3:9.2f} ms; Memory+ takes {t['memory'] / t['swiglu']:.2f} times as long")


def lookup_times(config, device, tokens, repeats):
    """lookup and RowAdam on the same slots of tables of two sizes; and lookup against embedding_bag on the smaller one."""
    n, k, D, dtype = tokens, config.mem_heads * config.mem_topk, config.mem_value_dim, getattr(torch, config.mem_dtype)
    runs = {}
    for S in (2**14, 2**20):
        _, slots, weights, grad = random_problem(n, k, 2**14, D, dtype, device, "zipf")
        values = nn.Parameter(torch.randn(S, D, device=device).to(dtype))
        places = torch.randperm(S, device=device)[: 2**14]  # the same pattern of reads, strewn over the table
        slots, weights, optimizer = places[slots], weights.requires_grad_(), RowAdam([values])

        def step(values=values, slots=slots, weights=weights, optimizer=optimizer):
            lookup(values, slots, weights).backward(grad)
            optimizer.step()
            values.grad = weights.grad = None

        runs[S] = step
        if S == 2**14:

            def both(run, values=values, slots=slots, weights=weights):
                run(values, slots, weights).backward(grad)
                values.grad = weights.grad = None

            runs["lookup"] = lambda both=both: both(lookup)
            runs["bag"] = lambda both=both: both(
                lambda v, s, w: F.embedding_bag(s, v, per_sample_weights=w.to(v.dtype), mode="sum")
            )
    touched, t = slots.unique().numel(), in_turns(runs, device, repeats)
    print(f"\nlookup, {n:,} tokens read {k} slots each of width {D:,}, {touched:,} different ones (Zipf):")
    print(f"  forward and backward, 2^14 slots{t['lookup'] * 1e3:9.2f} ms; F.embedding_bag {t['bag'] / t['lookup']:.2f} times as long")
    print(f"  with RowAdam, 2^14 slots        {t[2**14] * 1e3:9.2f} ms")
    print(f"  the same of 2^20 slots          {t[2**20] * 1e3:9.2f} ms = {t[2**20] / t[2**14]:.2f} times as long")


def model_times(memory, dense, device, tokens, context, repeats, compiled):
    """Training throughput and generation of two models."""
    runs, B = {}, max(1, tokens // memory.block_size)
    options = train.TrainConfig()
    for name, config in (("memory", memory), ("dense", dense)):
        for form in ("eager", "compiled") if compiled else ("eager",):
            torch.manual_seed(0)
            model = GPT(config).to(device)
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

            runs[name, form] = step
            if form == "eager":
                runs[name, "generate"] = lambda model=model, idx=idx: model.eval().generate(idx[:1, :8], 64, temperature=0)
    training = in_turns({key: run for key, run in runs.items() if key[1] != "generate"}, device, repeats)
    generating = in_turns({key: run for key, run in runs.items() if key[1] == "generate"}, device, max(5, repeats // 4))
    print(f"\nThe model ({memory.n_layer} blocks of width {memory.n_embd}, memory in block {memory.mem_layers}), tokens a second:")
    for what, t, count in (("training", training, B * memory.block_size), ("generating, batch 1", generating, 64)):
        for form in dict.fromkeys(key[1] for key in t):
            a, b = count / t["memory", form], count / t["dense", form]
            label = what + (", torch.compile" if form == "compiled" else "")
            print(f"  {label:31} {a:9,.0f} with memory, {b:9,.0f} dense: ratio {a / b:.2f}")


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
