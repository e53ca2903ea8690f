"""Several processes against one: the same losses, weights and optimiser state, through resumes and faults."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from helpers import SYSTEMS
from train import load_checkpoint

ROOT = Path(__file__).resolve().parents[1]
# Two layers read one table; four micro-steps a step, of 64 tokens each.
OPTIONS = (
    "--n_layer=2 --n_head=2 --n_embd=32 --block_size=32 --mem_layers=0,1 --mem_keys=16 --mem_topk=4 --mem_heads=2 --batch_size=2 "
    "--gradient_accumulation_steps=4 --eval_iters=2 --device=cpu --max_iters=20 --eval_interval=8 --log_interval=1"
).split()  # and warmup_iters=50: steps so small that rounding does not decide which slots are best
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def run(command, **options):
    command = [str(part) for part in command]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=200, cwd=ROOT, env=ENVIRONMENT, **options
    )


def torchrun(ranks, *arguments):
    return run([*TORCHRUN, f"--nproc_per_node={ranks}", *arguments])


def start_ranks(count, *arguments, without=()):
    """The processes that torchrun would start, without torchrun, which ends the others when one ends."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    processes = []
    for rank in range(count):
        environment = ENVIRONMENT | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count),
        }
        environment |= {
            name: value
            for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port))
            if name not in without
        }
        command = [sys.executable, "train.py", *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, **pipes))
    return processes


def together(ranks, *arguments):
    """What all of them have said: returns the exit status of each, standard output and errors."""
    processes = start_ranks(ranks, *arguments)
    said = [process.communicate(timeout=200) for process in processes]
    return [process.returncode for process in processes], *(
        "".join(texts) for texts in zip(*said, strict=True)
    )


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "facts"
    assert (
        run(
            [
                sys.executable,
                "data/facts/prepare.py",
                "--people=20",
                "--biographies=30",
                "--out",
                folder,
            ]
        ).returncode
        == 0
    )
    return folder


@pytest.fixture(scope="module")
def alone(facts, tmp_path_factory):
    """The folder of the run in one process."""
    out = tmp_path_factory.mktemp("alone")
    done = run([sys.executable, "train.py", *OPTIONS, f"--dataset={facts}", f"--out_dir={out}"])
    assert done.returncode == 0, done.stderr
    return out


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def assert_equal_runs(one, other):
    """Losses of all steps, final weights, and the state of both optimisers, to 1e-5 of the largest number in each tensor.

    The state counts: Adam takes the same step if a gradient is a multiple of what it should be, but its moments tell."""
    for a, b in zip(log_of(one), log_of(other), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5), f"step {a['iter']}"
        assert a.get("val_loss") == pytest.approx(b.get("val_loss"), abs=1e-5)
    one, other = (load_checkpoint(out / "ckpt.pt") for out in (one, other))
    pairs = {
        name: (tensor, other["model"].state_dict()[name])
        for name, tensor in one["model"].state_dict().items()
    }
    for i, optimizer in enumerate(one["optimizers"]):
        for p, state in optimizer["state"].items():
            pairs |= {
                f"{name} {i} {p}": (state[name], other["optimizers"][i]["state"][p][name])
                for name in state
            }
    assert sum("means" in name or "exp_avg" in name for name in pairs) > 10
    for name, (a, b) in pairs.items():
        a, b = torch.as_tensor(a), torch.as_tensor(b)
        assert a.shape == b.shape and (a - b).abs().max() <= 1e-5 * a.abs().max(), name


def wait_for_step(out, step, processes, seconds=120):
    end = time.monotonic() + seconds
    while not (
        (out / "log.jsonl").exists() and len((out / "log.jsonl").read_text().splitlines()) >= step
    ):
        assert all(p.poll() is None for p in processes) and time.monotonic() < end, [
            p.communicate() for p in processes
        ]
        time.sleep(0.01)


# --- several processes equal one --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ranks, M", [(4, 1), (2, 2), (4, 2)]
)  # two ranks with a table each: the test of a killed rank
def test_several_ranks_equal_one(facts, alone, tmp_path, ranks, M):
    status, said, errors = together(
        ranks, *OPTIONS, f"--dataset={facts}", f"--out_dir={tmp_path}", f"--memory_parallel={M}"
    )
    assert status == [0] * ranks, errors
    assert_equal_runs(alone, tmp_path)
    assert (
        said.count("MFLOPs a token") == 2 and said.count("Next:") == 1
    )  # said once, not once a rank
    if ranks == M == 2:  # one process samples from what several have written
        done = run(
            [
                sys.executable,
                "sample.py",
                f"--out_dir={tmp_path}",
                "--num_samples=1",
                "--max_new_tokens=5",
            ]
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("system", ["moe", "peer", "ultramem"])
def test_two_ranks_equal_one_for_each_system(facts, tmp_path, system):
    options = [
        *OPTIONS,
        *SYSTEMS[system],
        "--max_iters=8",
        "--eval_interval=4",
        f"--dataset={facts}",
    ]
    for ranks, out in ((1, tmp_path / "one"), (2, tmp_path / "two")):
        status, _, errors = together(ranks, *options, f"--out_dir={out}")
        assert status == [0] * ranks, errors
    assert_equal_runs(tmp_path / "one", tmp_path / "two")
    if system == "ultramem":  # its permutation is not drawn anew
        status, _, errors = together(
            1, "--resume", f"--out_dir={tmp_path / 'two'}", "--max_iters=9"
        )
        assert status == [0], errors
        weights = [
            load_checkpoint(tmp_path / name / "ckpt.pt")["model"].pool.permutation
            for name in ("one", "two")
        ]
        assert torch.equal(*weights) and torch.equal(
            weights[0].long().sort().values, torch.arange(4 * 256)
        )


CHECK = """
import os, torch, torch.distributed as dist
from memory import ValuePool
from runtime.sharded_pool import ShardedPool
dist.init_process_group("gloo")
sent, exchange, reduce = [0], dist.all_to_all_single, dist.all_reduce
def count_exchange(out, x, group):  # all but one of M blocks go to others
    sent[0] += x[1:].nbytes
    return exchange(out, x, group=group)
def count_reduce(x, *operation, group=None):  # by the ring algorithm: twice all but one of M parts
    sent[0] += 2 * x.nbytes // 2
    return reduce(x, *operation, group=group)
dist.all_to_all_single, dist.all_reduce = count_exchange, count_reduce
rank, D, k, n = dist.get_rank(), 6, 5, 7
everyone = [torch.Generator().manual_seed(r) for r in range(2)]
for S in (50, 5000):
    draw = lambda g: (torch.randint(50, (n, k), generator=g), torch.rand(n, k, generator=g), torch.randn(n, D, generator=g))
    tokens = [draw(g) for g in everyone]
    torch.manual_seed(0); whole = ValuePool(S, D)
    torch.manual_seed(0); shard = ShardedPool(S, D, torch.float32, group=dist.group.WORLD)
    whole.collect_gradients()
    shard.collect_gradients()
    mine = slice(3 * rank, 3 * rank + 3)
    assert torch.equal(shard.values, whole.values[:, mine])
    weights = [w.clone().requires_grad_() for _, w, _ in tokens]
    y = shard(tokens[rank][0], weights[rank])
    y.backward(tokens[rank][2])
    want = [w.clone().requires_grad_() for _, w, _ in tokens]
    for (slots, _, grad), w in zip(tokens, want): whole(slots, w).backward(grad)
    assert torch.allclose(y, whole(tokens[rank][0], want[rank]))
    assert torch.allclose(weights[rank].grad, want[rank].grad, atol=1e-6)
    # both hold the sum over the tokens of the two ranks; taken out, it is the mean over ranks
    assert torch.allclose(shard.take_gradient().to_dense() * 2, whole.gradient[:, mine], atol=1e-6)
    # as counted in bench/README.md: slots, weights and results, forward and backward
    assert sent[0] == n * (8 * k + 4 * D // 2) + n * (4 * k + 4 * D // 2), sent

    pool = ValuePool(S, D)
    pool.collect_gradients()
    sent[0] = 0
    for turn in range(2):  # the second finds nothing of the first
        last = S - 1
        mine, other = ([1, 5, last], [5, 9]) if rank == 0 else ([5, 9], [1, 5, last])
        grads = torch.randn(2, 3, D, generator=torch.Generator().manual_seed(turn))
        pool.gradient[mine] = grads[rank, : len(mine)]
        pool.touched[mine] = 1
        gradient = pool.take_gradient()
        want = torch.zeros(S, D)
        want[mine] += grads[rank, : len(mine)] / 2
        want[other] += grads[1 - rank, : len(other)] / 2
        assert torch.allclose(gradient.to_dense(), want)
        assert gradient.indices().tolist() == [[1, 5, 9, last]]
    assert sent[0] == 2 * (S + 4 * D * 4), sent  # a byte a slot, and four rows in all
    sent[0] = 0
print("checked", flush=True)
dist.destroy_process_group()
os._exit(0)  # as train.py ends, and why
"""


def test_a_sharded_lookup_and_a_combined_gradient_equal_those_of_one_table(tmp_path):
    (tmp_path / "check.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{CHECK}")
    done = torchrun(2, tmp_path / "check.py")
    assert done.returncode == 0 and done.stdout.count("checked") == 2, done.stderr


DDP = """
import copy, os, torch, torch.distributed as dist
from torch import nn
from kernels import RowAdam
from memory import MemoryLayer, ValuePool
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.pool, self.head = MemoryLayer(16, 64, topk=4), ValuePool(64, 16), nn.Linear(16, 16)
    def forward(self, x):
        return self.head(x + self.layer(x, self.pool))
model = Model()
alone = copy.deepcopy(model)
alone.pool.collect_gradients()
optimizers = [RowAdam(model.pool), torch.optim.AdamW([*model.layer.parameters(), *model.head.parameters()])]
parallel = nn.parallel.DistributedDataParallel(model)
draw = lambda i: torch.randn(5, 16, generator=torch.Generator().manual_seed(i))
for i in range(3):
    parallel(draw(2 * i + rank)).square().mean().backward()
for i in range(6):  # the tokens of both
    (alone(draw(i)).square().mean() / 2).backward()
copied = copy.deepcopy(model)
want = alone.pool.take_gradient().to_dense()
assert want.norm() > 0 and torch.allclose(copied.pool.take_gradient().to_dense(), want, atol=1e-7)
for optimizer in optimizers: optimizer.step()
sums = torch.stack([p.detach().double().sum() for p in model.parameters()])
both = [torch.empty_like(sums) for _ in range(2)]
dist.all_gather(both, sums)
assert torch.equal(*both)
print("checked", flush=True)
os._exit(0)
"""


def test_a_model_of_ones_own_in_distributed_data_parallel_has_the_mean_gradient(tmp_path):
    """Three micro-steps. The pool averages over ranks by itself; DistributedDataParallel must not touch what it collects."""
    (tmp_path / "ddp.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{DDP}")
    done = torchrun(2, tmp_path / "ddp.py")
    assert done.returncode == 0 and done.stdout.count("checked") == 2, done.stderr


# --- runs that end early ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before, after", [((4, 2), (1, 1)), ((1, 1), (4, 2))])
def test_a_resume_with_another_number_of_ranks_equals_one_run(
    facts, alone, tmp_path, before, after
):
    """Killed after its first checkpoint, whatever its rest was doing."""
    options = [
        *OPTIONS,
        f"--dataset={facts}",
        f"--out_dir={tmp_path}",
        f"--memory_parallel={before[1]}",
    ]
    processes = start_ranks(before[0], *options)
    wait_for_step(tmp_path, 10, processes)
    for process in processes:
        process.kill()
        process.communicate()
    status, _, errors = together(
        after[0], "--resume", f"--out_dir={tmp_path}", f"--memory_parallel={after[1]}"
    )
    assert status == [0] * after[0], errors
    assert_equal_runs(alone, tmp_path)


def test_a_killed_rank_ends_the_others_with_a_message_and_the_run_goes_on(facts, alone, tmp_path):
    processes = start_ranks(
        2, *OPTIONS, f"--dataset={facts}", f"--out_dir={tmp_path}", "--timeout=20"
    )
    wait_for_step(tmp_path, 10, processes)
    processes[1].kill()
    began = time.monotonic()
    errors = processes[0].communicate(timeout=40)[1]
    assert time.monotonic() - began < 30 and processes[0].returncode == 1
    assert (
        errors.count("train.py: another process is lost") == 1
        and "--resume" in errors
        and "Traceback" not in errors
    )
    processes[1].communicate()
    status, _, errors = together(2, "--resume", f"--out_dir={tmp_path}")
    assert status == [0, 0], errors
    assert_equal_runs(alone, tmp_path)


def test_a_rank_that_hangs_is_given_up_after_the_timeout(facts, tmp_path):
    processes = start_ranks(
        2,
        *OPTIONS,
        f"--dataset={facts}",
        f"--out_dir={tmp_path}",
        "--timeout=5",
        "--max_iters=100000",
    )
    wait_for_step(tmp_path, 10, processes)
    processes[0].send_signal(signal.SIGSTOP)
    errors = processes[1].communicate(timeout=40)[1]
    assert (
        processes[1].returncode == 1
        and "rank 1: another process is lost" in errors
        and "Traceback" not in errors
    )
    processes[0].kill()
    processes[0].communicate()


def test_sigterm_to_the_job_saves_one_step_on_all_ranks(facts, alone, tmp_path):
    command = [
        *TORCHRUN,
        "--nproc_per_node=2",
        "train.py",
        *OPTIONS,
        f"--dataset={facts}",
        f"--out_dir={tmp_path}",
    ]
    command += ["--memory_parallel=2", "--eval_interval=1000"]
    job = subprocess.Popen(
        command,
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_step(tmp_path, 5, [job])
    job.send_signal(signal.SIGTERM)
    said = job.communicate(timeout=60)[0]
    step = int(re.search(r"Stopped by SIGTERM after step (\d+)", said).group(1))
    checkpoint = load_checkpoint(tmp_path / "ckpt.pt")
    assert (
        5 <= step < 20
        and checkpoint["iter"] == step
        and checkpoint["optimizers"][1]["state"][0]["step"] == step
    )
    status, _, errors = together(2, "--resume", f"--out_dir={tmp_path}", "--eval_interval=8")
    assert status == [0, 0], errors
    assert [line["loss"] for line in log_of(tmp_path)] == pytest.approx(
        [line["loss"] for line in log_of(alone)], abs=1e-5
    )


# --- wrong input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        (["--memory_parallel=3"], ["memory_parallel=3", "2 processes"]),
        (["--memory_parallel=2", "--mem_value_dim=33"], ["memory_parallel=2", "33"]),
        (["--memory_parallel=2", "--system=peer"], ["memory_parallel=2", "system=memory", "peer"]),
        (["--gradient_accumulation_steps=3"], ["gradient_accumulation_steps=3", "2"]),
        (["--memory_paralel=2"], ["--memory_paralel=2"]),
        (["--dataset=nowhere"], ["nowhere", "train.bin"]),
    ],
)
def test_wrong_input_is_said_once_and_by_name(facts, tmp_path, options, words):
    done = torchrun(
        2, "train.py", *OPTIONS, f"--dataset={facts}", f"--out_dir={tmp_path / 'out'}", *options
    )
    lines = [line for line in done.stderr.splitlines() if "train.py: " in line]
    assert len(lines) == 1 and all(word in lines[0] for word in words), done.stderr
    assert (
        done.returncode != 0
        and 'train.py", line' not in done.stderr
        and not (tmp_path / "out").exists()
    )


def test_a_compiled_model_trains_on_several_ranks_as_alone(facts, alone, tmp_path):
    """Traced, but without a C++ compiler."""
    script = (
        "import functools, sys, torch, train\n"
        "torch.compile = functools.partial(torch.compile, backend='aot_eager')\n"
        "train.main(sys.argv[1:])\n"
    )
    (tmp_path / "compiled.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{script}"
    )
    done = torchrun(
        2,
        tmp_path / "compiled.py",
        *OPTIONS,
        f"--dataset={facts}",
        f"--out_dir={tmp_path / 'out'}",
        "--compile=true",
    )
    assert done.returncode == 0, done.stderr
    assert_equal_runs(alone, tmp_path / "out")


def test_missing_rendezvous_variables_are_named_once(facts, tmp_path):
    processes = start_ranks(
        2, *OPTIONS, f"--out_dir={tmp_path / 'out'}", without=("MASTER_ADDR", "MASTER_PORT")
    )
    said = [process.communicate(timeout=100)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    assert all(word in said[0] for word in ("MASTER_ADDR", "torchrun"))
    assert all(text.count("\n") == 1 for text in said)


def test_a_rank_out_of_step_is_found(facts, tmp_path):
    """One bit of one weight of one rank, after the first step."""
    script = (
        "import os, sys, torch, train\n"
        "def spoil(*_):\n"
        "    if os.environ['RANK'] == '1': model.norm.weight.data[3] += 1e-6\n"
        "make = train.make_optimizers\n"
        "def make_optimizers(m, config):\n"
        "    global model; model = m\n"
        "    optimizers = make(m, config); optimizers[0].register_step_post_hook(spoil); return optimizers\n"
        "train.make_optimizers = make_optimizers\n"
        "train.main(sys.argv[1:])\n"
    )
    (tmp_path / "spoiled.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{script}")
    done = torchrun(
        2, tmp_path / "spoiled.py", *OPTIONS, f"--dataset={facts}", f"--out_dir={tmp_path / 'out'}"
    )
    assert done.returncode != 0 and done.stderr.count("train.py: rank 1 is out of step") == 1
