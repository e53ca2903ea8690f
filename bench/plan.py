"""Does a table fit, and what limits it? Counts memory of one GPU and traffic of one token.

python bench/plan.py --slots 67108864 --width 2048 --gpus 64        137e9 numbers on 64 GPUs
"""

import math
from argparse import ArgumentParser, RawDescriptionHelpFormatter


def plan(
    slots,
    width,
    gpus=1,
    memory_parallel=1,
    layers=3,
    heads=4,
    topk=32,
    tokens=16384,
    bytes_per_number=2,
):
    """{name: count or bytes}. tokens: in a micro-step of one GPU. Memory is of one GPU, traffic of one token
    in all layers, forward and backward; combine is of a step. Tests compare it with real tensors."""
    M, k, row = memory_parallel, heads * topk, width // memory_parallel * bytes_per_number
    reads = tokens * M * k * layers  # rows that a micro-step of the group reads, with repetitions
    return {
        "parameters": slots * width,
        "values": slots * row,
        "moments": slots * width // M * 8,  # two of RowAdam, in float32
        "gradient": slots * row
        + slots
        + min(slots, reads) * row,  # ValuePool.gradient, touched; rows taken out
        "lookup": layers * 2 * (k + 1) * width * bytes_per_number,  # rows read twice; y and dY
        "exchange": layers * (M - 1) * (12 * k + 2 * row),  # ShardedPool
        "combine": 2 * slots * (row + 1) if gpus > M else 0,  # take_gradient, if all rows were read
    }


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--slots", type=int, default=2**20, help="rows S, a square number (default: %(default)s)")
    add("--width", type=int, default=1024, help="numbers D in a row (default: %(default)s)")
    add("--gpus", type=int, default=1, help="in all (default: %(default)s)")
    add("--memory_parallel", type=int, help="GPUs that share one table (default: all)")
    add("--layers", type=int, default=3, help="memory layers that read it (default: %(default)s)")
    add("--heads", type=int, default=4, help="memory heads (default: %(default)s)")
    add("--topk", type=int, default=32, help="slots that a head reads (default: %(default)s)")
    add(
        "--tokens",
        type=int,
        default=16384,
        help="of a micro-step on one GPU (default: %(default)s)",
    )
    size = {"bfloat16": 2, "float32": 4}
    add(
        "--dtype",
        choices=list(size),
        default="bfloat16",
        help="of the values (default: %(default)s)",
    )
    add("--gpu_memory", type=float, default=80, help="of one GPU, GB (default: %(default)s)")
    add(
        "--memory_speed",
        type=float,
        default=3350,
        help="of it, GB/s (default: %(default)s, of an H100)",
    )
    add(
        "--link_speed",
        type=float,
        default=50,
        help="GB/s (default: %(default)s, 400 Gb/s; NVLink: 450)",
    )
    args = parser.parse_args()
    M = args.memory_parallel or args.gpus
    for name, value in vars(args).items():
        if isinstance(value, (int, float)) and value <= 0:
            parser.error(f"--{name}={value}: must be above 0")
    if math.isqrt(args.slots) ** 2 != args.slots:
        square = math.isqrt(args.slots) ** 2
        parser.error(f"--slots={args.slots}: product keys address N * N slots; {square} would do")
    for name in ("gpus", "width"):
        if getattr(args, name) % M:
            parser.error(f"--memory_parallel={M} does not divide --{name}={getattr(args, name)}")
    shape = args.slots, args.width, args.gpus, M, args.layers, args.heads, args.topk, args.tokens
    p = plan(*shape, size[args.dtype])
    total = p["values"] + p["moments"] + p["gradient"]
    keys = math.isqrt(args.slots)
    print(
        f"{p['parameters'] / 1e9:,.1f}e9 parameters: {args.slots:,} slots of width {args.width:,}",
        end="",
    )
    print(
        f" ({keys:,} sub-keys a half)\n{args.gpus} GPUs in {args.gpus // M} groups of {M}", end=""
    )
    print(f", each GPU {args.width // M} of the {args.width} columns\n")
    print("memory of one GPU, for the table alone")
    for name in ("values", "moments", "gradient"):
        print(f"  {name:22}{p[name] / 1e9:10,.2f} GB" + ("  at most" if name == "gradient" else ""))
    share = total / args.gpu_memory / 1e9
    verdict = "fits" if share < 1 else "DOES NOT FIT"
    print(
        f"  {'all':22}{total / 1e9:10,.2f} GB  {verdict} in {args.gpu_memory:g} GB, {share:.0%} of it"
    )
    print(f"\ntraffic of one GPU in {args.layers} layers, forward and backward")
    for name, speed in (("lookup", args.memory_speed), ("exchange", args.link_speed)):
        ms = 1e3 * args.tokens * p[name] / (speed * 1e9)
        print(f"  {name:22}{p[name] / 1e3:10,.1f} KB a token, {ms:8.2f} ms ", end="")
        print(f"for {args.tokens:,} tokens at {speed:g} GB/s")
    if p["combine"]:
        ms = p["combine"] / args.link_speed / 1e6
        print(
            f"  {'combine, once a step':22}{p['combine'] / 1e9:10,.2f} GB at most, {ms:8.2f} ms ",
            end="",
        )
        print(f"at {args.link_speed:g} GB/s")


if __name__ == "__main__":
    main()
