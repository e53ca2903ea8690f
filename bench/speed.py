"""Time the layer, training and generation, and show where the time goes.

    python bench/speed.py              a memory layer, and the demo, against dense ones
    python bench/speed.py --systems    all systems of the facts presets
    python bench/speed.py --preset=gpt2-dense --preset=gpt2-memory --compile

Models train on random tokens, which read the rows more evenly than text does. Without --preset,
the things that are compared take turns, so that other load on the machine affects all of them.
"""

import gc
import statistics
import sys
from functools import partial
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.nn.utils import clip_grad_norm_
from torch.profiler import ProfilerActivity, profile, record_function

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench/ has a kernels.py, too
import train
from bench.kernels import embedding_bag, print_header, print_row, timed
from kernels import RowAdam
from memory import MemoryLayer, ValuePool
from model import GPT, GPTConfig, SwiGLU
from presets import PRESETS
from runtime.arguments import Parser
from runtime.device import choose_device, explain_compile_errors, precision
from runtime.files import fail
from runtime.options import make_configs

VOCABULARY = {"facts": 1712, "shakespeare": 256, "openwebtext": 50257}
GPU_MODEL = dict(
    dataset="openwebtext", batch_size=16, n_layer=8, n_head=16, n_embd=1024, block_size=1024,
    mem_count=1, mem_dtype="bfloat16",
)  # fmt: skip
# bfloat16 FLOPs a second, from data sheets
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
# Parts of a step that do not overlap, and how torch.profiler calls them. The rest is attention,
# networks, the products of queries and sub-keys, and the loss.
PARTS = {
    "choosing the slots": ("nanomem::select", "nanomem::tucker_select"),
    "lookup, forward": ("nanomem::lookup_forward",),
    "lookup, backward": ("nanomem::lookup_backward_into",),
    "taking out the gradient": ("take_gradient",),
    "products of experts": ("aten::_grouped_mm",),
    "RowAdam": ("RowAdam.update",),
    "AdamW": ("aten::_fused_adamw_",),
}


def in_turns(runs, device, repeats):
    """{name: run} -> {name: median seconds}, after three rounds to warm up"""
    times = {name: [] for name in runs}
    for _ in range(3 + repeats):
        for name, run in runs.items():
            times[name].append(timed(run, device))
    return {name: statistics.median(t[3:]) for name, t in times.items()}


# --- a layer --------------------------------------------------------------------------


class PlainPool(ValuePool):
    def forward(self, slots, weights):  # its gradient has the size of the table
        return embedding_bag(self.values, slots, weights)


class PlainLayer(MemoryLayer):
    """A straightforward layer: torch.topk, all K * K sums, and autograd."""

    def retrieve(self, x):
        s1, s2 = self.scores(x).float()  # (H, n, N)
        best1, i = s1.topk(self.K)  # (H, n, K)
        best2, j = s2.topk(self.K)
        sums = best1.unsqueeze(-1) + best2.unsqueeze(-2)  # (H, n, K, K)
        best, pair = sums.flatten(-2).topk(self.K)  # (H, n, K)
        slots = i.gather(-1, pair // self.K) * self.N + j.gather(-1, pair % self.K)
        weights = best.softmax(-1)
        return slots.transpose(0, 1).flatten(1), weights.transpose(0, 1).flatten(1)


def layer_step(layer, inputs, optimizers, device):
    """Return a function that does a training step of a layer: forward, backward, optimizers."""
    adamw = torch.optim.AdamW(layer.parameters(), lr=1e-3, fused=True)

    def step():
        inputs[0].grad = None  # as in a model, the blocks below want a gradient
        with precision("auto", device):
            y = layer(*inputs)
        y.backward(torch.ones_like(y))
        for optimizer in [adamw, *optimizers]:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def layer_times(models, device, repeats):
    """Print the time of a training step of a memory layer, and of the SwiGLU of the dense model."""
    config, shape = make_configs(models["memory"], train.TrainConfig, GPTConfig)
    _, dense_shape = make_configs(models["dense"], train.TrainConfig, GPTConfig)
    tokens = config.batch_size * shape.block_size
    C = shape.n_embd
    slots = shape.mem_keys**2
    dtype = getattr(torch, shape.mem_dtype)
    with device:
        x = torch.randn(1, tokens, C, requires_grad=True)
        pool = ValuePool(slots, C, dtype)
        plain_pool = PlainPool(slots, C, dtype)
        memory = MemoryLayer(C, slots, shape.mem_heads, shape.mem_topk)
        plain = PlainLayer(C, slots, shape.mem_heads, shape.mem_topk)
        swiglu = SwiGLU(C, dense_shape.n_ffn)
    adam = torch.optim.Adam([plain_pool.values], lr=1e-3)
    runs = {
        "Memory+": layer_step(memory, [x, pool], [RowAdam(pool)], device),
        "straightforward": layer_step(plain, [x, plain_pool], [adam], device),
        "SwiGLU": layer_step(swiglu, [x], [], device),
    }
    seconds = in_turns(runs, device, repeats)
    print_header(f"{tokens:,} tokens of width {C}, {slots:,} slots", "ms a step", "of SwiGLU's")
    for name, t in seconds.items():
        print_row(name, f"{1e3 * t:.2f}", f"{t / seconds['SwiGLU']:.2f}")


# --- a model --------------------------------------------------------------------------


class Training:
    """The steps of train.py. micro_steps: of a step, 0: as many as the options say"""

    def __init__(self, options, device, compiled=False, micro_steps=0):
        options = {"vocab_size": VOCABULARY[options["dataset"]], **options}
        self.config, self.shape = make_configs(options, train.TrainConfig, GPTConfig)
        self.micro_steps = micro_steps
        if micro_steps == 0:
            self.micro_steps = self.config.gradient_accumulation_steps
        self.tokens = self.micro_steps * self.config.batch_size * self.shape.block_size
        self.device = device
        with device:
            self.model = GPT(self.shape)
        self.run_model = self.model
        if compiled:
            self.run_model = torch.compile(self.model)
        self.optimizers = train.make_optimizers(self.model, self.config)
        self.network = [p for group in self.optimizers[0].param_groups for p in group["params"]]
        for row_adam in self.optimizers[1:]:  # names for the profiler
            pool = row_adam.pool
            pool.take_gradient = record_function("take_gradient")(pool.take_gradient)
            row_adam.update = record_function("RowAdam.update")(row_adam.update)

    def step(self):
        size = (self.config.batch_size, self.shape.block_size + 1)
        for _ in range(self.micro_steps):
            ids = torch.randint(self.shape.vocab_size, size, device=self.device)
            with precision("auto", self.device):
                _, loss = self.run_model(ids[:, :-1], ids[:, 1:])
            (loss / self.micro_steps).backward()
        clip_grad_norm_(self.network, self.config.grad_clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def shares(self, steps):
        """{part: share of the time of a step}"""
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        with profile(activities=activities) as profiler:
            for _ in range(steps):
                with record_function("step"):
                    timed(self.step, self.device)
        return shares_of(profiler.key_averages(), self.device.type == "cuda")

    @torch.inference_mode()
    def generation(self, new_tokens, repeats=5):
        """Tokens a second at batch 1: [of the first text, of later ones]. For the first one
        kernels are compiled or loaded."""
        idx = torch.zeros(1, 8, dtype=torch.int64, device=self.device)
        generate = partial(self.model.generate, idx, new_tokens, temperature=0)
        with precision("auto", self.device):
            times = [timed(generate, self.device) for _ in range(1 + repeats)]
        return [new_tokens / times[0], new_tokens / statistics.median(times[1:])]


def shares_of(events, on_gpu):
    """{part: share of the time of a step}, from torch.profiler's averages.

    On a GPU the profiler counts the time of a kernel several times: for the kernel, for the
    operation that started it, and for the ranges around it, once for the CPU and once for the GPU.
    So a step is the sum of its kernels, and a part is the sum of the kernels that the CPU started
    in the range of that name. RowAdam starts its kernel outside any operation, so the profiler
    links it to no range."""
    parts = dict(PARTS)
    times = {}
    step = 0
    for event in events:
        if not on_gpu:
            times[event.key] = event.cpu_time_total
        elif event.device_type == DeviceType.CPU:
            times[event.key] = event.device_time_total
        elif not event.is_user_annotation:
            times[event.key] = event.self_device_time_total
            step += event.self_device_time_total
    if on_gpu:
        parts["RowAdam"] = ("adam_kernel", "aten::random_")  # and the bits to round by
    else:
        step = times["step"]
    if step == 0:
        raise ValueError("the profiler has found no kernels")
    shares = {}
    for part, names in parts.items():
        shares[part] = sum(times.get(name, 0) for name in names) / step
    return shares


def preset_speed(name, device, compiled, micro_steps, repeats):
    """Print the speed of a preset, the memory it takes, and the shares of a step."""
    if device.type == "cuda":
        gc.collect()  # the model before this one
        torch.cuda.reset_peak_memory_stats()
    training = Training(PRESETS[name], device, compiled, micro_steps)
    times = [timed(training.step, device) for _ in range(1 + repeats)]
    rate = training.tokens / statistics.median(times[1:])
    print_header(name, f"{training.micro_steps} micro-steps a step")
    print_row("tokens a second", f"{rate:,.0f}")
    print_row("first step, seconds", f"{times[0]:.1f}")
    if device.type == "cuda":
        print_row("peak memory, GiB", f"{torch.cuda.max_memory_allocated() / 2**30:.1f}")
        flops = 3 * sum(training.model.flops_per_token(training.shape.block_size).values())
        for card, peak in PEAK_FLOPS.items():
            if card in torch.cuda.get_device_name():
                print_row("MFU", f"{rate * flops / peak:.1%}")
    for part, share in training.shares(steps=1).items():
        print_row(part, f"{share:.1%}")


def models_to_compare(device, systems):
    """{name: options of a model}, one of them "dense". systems: all of the facts presets"""
    if systems:
        names = [name for name in PRESETS if name.startswith("facts-")]
        return {name.removeprefix("facts-"): PRESETS[name] for name in names}
    if device.type == "cuda":
        return {"memory": GPU_MODEL, "dense": {**GPU_MODEL, "mem_count": 0}}
    return {"memory": PRESETS["facts-memory"], "dense": PRESETS["facts-dense"]}


def compare(trainings, repeats):
    """Print speeds of training and generation, and what takes more than 3% of a step. trainings:
    {name: Training}, one of them "dense" """
    device = trainings["dense"].device
    seconds = in_turns({name: x.step for name, x in trainings.items()}, device, repeats)
    training = "training, tokens a second (of dense)"
    generation = "generating at batch 1: first text / later ones"
    print_header("", training, generation, "more than 3% of a step")
    for name, x in trainings.items():
        rate = f"{x.tokens / seconds[name]:,.0f} ({seconds['dense'] / seconds[name]:.2f})"
        first, later = x.generation(new_tokens=64)
        large = [f"{part} {share:.0%}" for part, share in x.shares(5).items() if share > 0.03]
        print_row(name, rate, f"{first:,.0f} / {later:,.0f}", ", ".join(large))


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--device", default="auto", help="cpu or cuda; default: a GPU if possible")
    add("--repeats", type=int, default=30, help="steps that are timed; default: %(default)s")
    add("--compile", action="store_true", help="train with torch.compile")
    add("--systems", action="store_true", help="all systems of the facts presets")
    add("--preset", choices=PRESETS, action="append", default=[], metavar="NAME", help="or several")
    add("--micro_steps", type=int, default=0, help="of a preset's step; default: the preset's")
    args = parser.parse_args()
    with explain_compile_errors():
        measure(args)


def measure(args):
    device = choose_device(args.device)
    print(f"PyTorch {torch.__version__}, {device}, {torch.get_num_threads()} threads", flush=True)
    for name in args.preset:
        preset_speed(name, device, args.compile, args.micro_steps, args.repeats)
    if args.preset:
        return
    models = models_to_compare(device, args.systems)
    if not args.systems:
        layer_times(models, device, args.repeats)
    compare({name: Training(x, device, args.compile) for name, x in models.items()}, args.repeats)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, KeyboardInterrupt) as error:
        fail(error)
