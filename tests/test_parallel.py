"""Several processes against one: the same losses, weights and optimiser state, through resumes and faults."""

import copy
import functools
import os
import re
import shutil
import signal
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

import train
from helpers import (
    SYSTEMS,
    load,
    log_of,
    prepare,
    steps_done,
    train_here,
)
from kernels import RowAdam
from memory import MemoryLayer, ValuePool
from processes import run_program, run_train, start_program, start_ranks, start_torchrun
from runtime.sharded_pool import ShardedPool

# Two layers read one table; four micro-steps a step, of 64 tokens each. The learning rate is still
# rising at the end: steps so small that rounding does not decide which slots are best.
OPTIONS = (
    "--n_layer=2 --n_head=2 --n_embd=32 --block_size=32 --mem_layers=0,1 --mem_keys=16 --mem_topk=4 --mem_heads=2 --batch_size=2 "
    "--gradient_accumulation_steps=4 --eval_iters=2 --device=cpu --max_iters=16 --eval_interval=6 --log_interval=1"
).split()


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """OPTIONS with a dataset."""
    folder = tmp_path_factory.mktemp("data") / "facts"
    done = prepare("--people=20", "--biographies=30", "--out", folder)
    assert done.returncode == 0, done.stderr
    return [*OPTIONS, f"--dataset={folder}"]


@pytest.fixture(scope="module")
def alone(options, tmp_path_factory):
    """The folder of the run in one process."""
    out = tmp_path_factory.mktemp("alone")
    train_here(*options, f"--out_dir={out}")
    return out


def start_training(ranks, *arguments):
    return start_ranks(ranks, run_program, "train.py", *arguments)


def ends_of(processes):
    """The exit codes of processes, and what all of them have said."""
    said = [process.communicate() for process in processes]
    codes = [process.returncode for process in processes]
    return codes, "".join(out for out, _ in said), "".join(errors for _, errors in said)


def train_with(ranks, *arguments):
    """Returns standard output of all ranks."""
    codes, said, errors = ends_of(start_training(ranks, *arguments))
    assert codes == [0] * ranks, errors
    return said


def end_like_torchrun(processes):
    """When one rank has ended, torchrun ends the others by SIGTERM. Returns all standard error."""
    while all(process.poll() is None for process in processes):
        time.sleep(0.01)
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    codes, _, errors = ends_of(processes)
    assert 0 not in codes
    return errors


def wait_for_step(out, step, processes):
    end = time.monotonic() + 60
    while steps_done(out) < step:
        assert all(process.poll() is None for process in processes) and time.monotonic() < end
        time.sleep(0.01)


def assert_equal_runs(one, other, tolerance=1e-5):
    """Losses of all steps to 1e-5, final weights and the state of the optimisers to 1e-5 of the largest number in each tensor.

    The state counts: Adam takes the same step if a gradient is a multiple of what it should be, but its moments tell."""
    for a, b in zip(log_of(one), log_of(other), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5), f"step {a['iter']}"
        assert a.get("val_loss") == pytest.approx(b.get("val_loss"), abs=1e-5)
    one = tensors_of(one)
    other = tensors_of(other)
    assert one.keys() == other.keys()
    assert sum("means" in name or "exp_avg" in name for name in one) > 10
    for name, a in one.items():
        b = other[name]
        assert a.shape == b.shape and (a - b).abs().max() <= tolerance * a.abs().max(), name


def tensors_of(out):
    """{name: tensor} of weights and moments in a run's checkpoint"""
    checkpoint = load(out / "ckpt.pt")
    tensors = dict(checkpoint["model"])
    for i, optimizer in enumerate(checkpoint["optimizers"]):
        for p, state in optimizer["state"].items():
            for name, value in state.items():
                tensors[f"{name} {i} {p}"] = torch.as_tensor(value)
    return tensors


# --- several processes equal one --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("ranks, M", [(4, 1), (2, 2), (4, 2)])
def test_several_ranks_equal_one(options, alone, tmp_path, ranks, M):
    said = train_with(ranks, *options, f"--out_dir={tmp_path}", f"--memory_parallel={M}")
    assert_equal_runs(alone, tmp_path)
    # said once, not once a rank
    assert said.count("MFLOPs a token") == 1 and said.count("Next:") == 1
    if ranks == M == 2:  # one process samples from what several have written
        sampling = start_program("sample.py", f"--out_dir={tmp_path}", "--max_new_tokens=5")
        assert ends_of([sampling])[0] == [0]


@pytest.mark.slow
def test_two_ranks_equal_one_in_the_demo(options, tmp_path):
    """The first and the sixth step, each from the same weights. Over several steps the runs part: sums in another order differ in their last bits, and where
    two slots score the same to these bits (in some of 25,000 selections a step), the other slot is read."""
    one = tmp_path / "one"
    two = tmp_path / "two"
    demo = [
        "--preset=facts-memory",
        options[-1],
        "--gradient_accumulation_steps=2",
        "--log_interval=1",
        "--device=cpu",
    ]
    train_here(*demo, "--max_iters=1", f"--out_dir={one}")
    train_with(2, *demo, "--max_iters=1", f"--out_dir={two}")
    assert_equal_runs(one, two)

    train_here("--resume", "--max_iters=5", f"--out_dir={one}")
    shutil.rmtree(two)
    shutil.copytree(one, two)
    train_here("--resume", "--max_iters=6", f"--out_dir={one}")
    train_with(2, "--resume", "--max_iters=6", f"--out_dir={two}")
    assert_equal_runs(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("system", ["moe", "peer", "ultramem", "engram", "both"])
def test_two_ranks_equal_one_for_each_system(options, tmp_path, system):
    one = tmp_path / "one"
    two = tmp_path / "two"
    options = [*options, *SYSTEMS[system], "--max_iters=8", "--eval_interval=4"]
    train_here(*options, f"--out_dir={one}")
    train_with(2, *options, f"--out_dir={two}")
    # an n-gram memory adds nothing at first: Adam makes full steps of its tiny gradients, and of their last bits
    tolerance = 1e-3 if system in ("engram", "both") else 1e-5
    assert_equal_runs(one, two, tolerance)
    if system == "ultramem":  # its permutation is not drawn anew
        train_here("--resume", f"--out_dir={two}", "--max_iters=9")
        permutations = [load(out / "ckpt.pt")["model"]["pool.permutation"] for out in (one, two)]
        assert torch.equal(*permutations)
        assert torch.equal(permutations[0].long().sort().values, torch.arange(4 * 256))


class SentBytes:
    """Counts the bytes that this rank of two sends to the other one."""

    def __init__(self):
        self.count = 0
        self.exchange = dist.all_to_all_single
        self.reduce = dist.all_reduce
        dist.all_to_all_single = self.count_exchange
        dist.all_reduce = self.count_reduce

    def count_exchange(self, out, x, group):
        self.count += x[1:].nbytes  # one of the two blocks goes to the other rank
        return self.exchange(out, x, group=group)

    def count_reduce(self, x, *operation, group=None):
        self.count += x.nbytes  # by the ring algorithm: twice a half
        return self.reduce(x, *operation, group=group)


def check_pools():
    """On each of two ranks: lookups and gradients against those of one table."""
    dist.init_process_group("gloo")
    sent = SentBytes()
    for S in (50, 5000):
        check_sharded_lookup(S, sent)
        check_combined_gradient(S, sent)


def check_sharded_lookup(S, sent):
    rank, D, k, n = dist.get_rank(), 6, 5, 7
    tokens = []
    for r in range(2):
        g = torch.Generator().manual_seed(r)
        slots = torch.randint(50, (n, k), generator=g)
        weights = torch.rand(n, k, generator=g)
        tokens.append((slots, weights, torch.randn(n, D, generator=g)))
    torch.manual_seed(0)
    whole = ValuePool(S, D)
    torch.manual_seed(0)
    shard = ShardedPool(S, D, torch.float32, group=dist.group.WORLD)
    whole.collect_gradients()
    shard.collect_gradients()
    mine = slice(3 * rank, 3 * rank + 3)
    assert torch.equal(shard.values, whole.values[:, mine])

    sent.count = 0
    weights = [w.clone().requires_grad_() for _, w, _ in tokens]
    y = shard(tokens[rank][0], weights[rank])
    y.backward(tokens[rank][2])
    # what ShardedPool promises: (M - 1) n (8 k + e D / M), and (M - 1) n (e D / M + 4 k) back
    assert sent.count == n * (8 * k + 4 * D // 2) + n * (4 * D // 2 + 4 * k)
    want = [w.clone().requires_grad_() for _, w, _ in tokens]
    for (slots, _, grad), w in zip(tokens, want, strict=True):
        whole(slots, w).backward(grad)
    assert torch.allclose(y, whole(tokens[rank][0], want[rank]))
    assert torch.allclose(weights[rank].grad, want[rank].grad, atol=1e-6)
    # both hold the sum over the tokens of the two ranks; taken out, it is the mean over ranks
    gradient = shard.take_gradient().to_dense() * 2
    assert torch.allclose(gradient, whole.gradient[:, mine], atol=1e-6)


def check_combined_gradient(S, sent):
    rank, D, last = dist.get_rank(), 6, S - 1
    pool = ValuePool(S, D)
    pool.collect_gradients()
    sent.count = 0
    both = ([1, 5, last], [5, 9])
    for turn in range(2):  # the second finds nothing of the first
        grads = torch.randn(2, 3, D, generator=torch.Generator().manual_seed(turn))
        rows = both[rank]
        pool.gradient[rows] = grads[rank, : len(rows)]
        pool.touched[rows] = 1
        gradient = pool.take_gradient()
        want = torch.zeros(S, D)
        for r in range(2):
            want[both[r]] += grads[r, : len(both[r])] / 2
        assert torch.allclose(gradient.to_dense(), want)
        assert gradient.indices().tolist() == [[1, 5, 9, last]]
    assert sent.count == 2 * (S + 4 * D * 4)  # a byte a slot, and four rows in all


def test_a_sharded_lookup_and_a_combined_gradient_equal_those_of_one_table():
    codes, _, errors = ends_of(start_ranks(2, check_pools))
    assert codes == [0, 0], errors


class OwnModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = MemoryLayer(16, 64, topk=4)
        self.pool = ValuePool(64, 16)
        self.head = nn.Linear(16, 16)

    def forward(self, x):
        return self.head(x + self.layer(x, self.pool))


def check_mean_gradient():
    """On each of two ranks, three micro-steps."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = OwnModel()
    alone = OwnModel()
    alone.load_state_dict(model.state_dict())
    alone.pool.collect_gradients()
    network = [*model.layer.parameters(), *model.head.parameters()]
    optimizers = [RowAdam(model.pool), torch.optim.AdamW(network)]
    parallel = nn.parallel.DistributedDataParallel(model)
    inputs = [torch.randn(5, 16, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    for i in range(3):
        parallel(inputs[2 * i + rank]).square().mean().backward()
    for x in inputs:  # the tokens of both ranks
        (alone(x).square().mean() / 2).backward()
    want = alone.pool.take_gradient().to_dense()  # the same on both ranks, so their mean as well
    gradient = copy.deepcopy(model).pool.take_gradient().to_dense()
    assert want.norm() > 0 and torch.allclose(gradient, want, atol=1e-7)
    for optimizer in optimizers:
        optimizer.step()
    sums = torch.stack([p.detach().double().sum() for p in model.parameters()])
    both = [torch.empty_like(sums) for _ in range(2)]
    dist.all_gather(both, sums)
    assert torch.equal(*both)


def test_a_model_of_ones_own_in_distributed_data_parallel_has_the_mean_gradient():
    """The pool averages over ranks by itself; DistributedDataParallel must not touch what it collects."""
    codes, _, errors = ends_of(start_ranks(2, check_mean_gradient))
    assert codes == [0, 0], errors


def train_compiled(*arguments):
    """Traced, but without a C++ compiler."""
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    run_train(*arguments, "--compile=true")


@pytest.mark.slow
def test_a_compiled_model_trains_on_several_ranks_as_alone(options, tmp_path):
    options = [*options, "--n_layer=1", "--mem_layers=0", "--max_iters=3", "--eval_interval=2"]
    one = tmp_path / "one"
    two = tmp_path / "two"
    train_here(*options, f"--out_dir={one}")
    codes, _, errors = ends_of(start_ranks(2, train_compiled, *options, f"--out_dir={two}"))
    assert codes == [0, 0], errors
    assert_equal_runs(one, two)


# --- runs that end early ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("before, after", [((4, 2), (1, 1)), ((1, 1), (4, 2))])
def test_a_resume_with_another_number_of_ranks_equals_one_run(
    options, alone, tmp_path, before, after
):
    """Killed after its first checkpoint, whatever its rest was doing."""
    ranks, M = before
    processes = start_training(ranks, *options, f"--out_dir={tmp_path}", f"--memory_parallel={M}")
    wait_for_step(tmp_path, 7, processes)
    for process in processes:
        process.kill()
    ends_of(processes)
    assert steps_done(tmp_path) < 16
    ranks, M = after
    train_with(ranks, "--resume", f"--out_dir={tmp_path}", f"--memory_parallel={M}")
    assert_equal_runs(alone, tmp_path)


@pytest.mark.slow
def test_a_killed_rank_ends_the_others_with_a_message_and_the_run_goes_on(options, alone, tmp_path):
    processes = start_training(2, *options, f"--out_dir={tmp_path}", "--timeout=20")
    wait_for_step(tmp_path, 7, processes)
    processes[1].kill()
    began = time.monotonic()
    codes, _, errors = ends_of(processes)
    assert time.monotonic() - began < 15 and codes == [1, -signal.SIGKILL]
    assert errors.count("\ntrain.py: another process is lost") == 1
    assert "--resume" in errors and "Traceback" not in errors
    train_with(2, "--resume", f"--out_dir={tmp_path}")
    assert_equal_runs(alone, tmp_path)


@pytest.mark.slow
def test_a_rank_that_hangs_is_given_up_after_the_timeout(options, tmp_path):
    endless = ["--timeout=4", "--max_iters=100000", "--eval_interval=100000"]
    processes = start_training(2, *options, *endless, f"--out_dir={tmp_path}")
    wait_for_step(tmp_path, 2, processes)
    processes[1].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    errors = processes[0].communicate()[1]
    assert 2 < time.monotonic() - began < 15 and processes[0].returncode == 1
    assert "train.py: another process is lost" in errors and "Traceback" not in errors
    processes[1].kill()


@pytest.mark.slow
def test_sigterm_to_one_rank_saves_the_same_step_on_all(options, alone, tmp_path):
    """torchrun passes it on to all of them: test_faults.py."""
    arguments = [f"--out_dir={tmp_path}", "--memory_parallel=2", "--eval_interval=1000"]
    processes = start_training(2, *options, *arguments)
    wait_for_step(tmp_path, 3, processes)
    processes[1].send_signal(signal.SIGTERM)
    codes, said, errors = ends_of(processes)
    assert codes == [128 + signal.SIGTERM] * 2, errors
    step = int(re.search(r"Stopped by SIGTERM after step (\d+)", said).group(1))
    checkpoint = load(tmp_path / "ckpt.pt")
    assert 3 <= step < 16 and checkpoint["iter"] == step
    assert checkpoint["optimizers"][1]["state"][0]["step"] == step
    train_with(2, "--resume", f"--out_dir={tmp_path}", "--eval_interval=6")
    losses = [line["loss"] for line in log_of(tmp_path)]
    assert losses == pytest.approx([line["loss"] for line in log_of(alone)], abs=1e-5)


# --- wrong input ------------------------------------------------------------------------------------------------------

WRONG = [
    (["--memory_parallel=3"], ["memory_parallel=3", "2 processes"]),
    (["--memory_parallel=2", "--mem_value_dim=33"], ["memory_parallel=2", "33"]),
    (["--memory_parallel=2", "--system=peer"], ["memory_parallel=2", "system=memory", "peer"]),
    (["--memory_parallel=2", "--mem_shared=false"], ["memory_parallel=2", "mem_shared=true"]),
    (["--gradient_accumulation_steps=3"], ["gradient_accumulation_steps=3", "2"]),
    (["--memory_paralel=2"], ["--memory_paralel=2"]),
    (["--dataset=nowhere"], ["nowhere", "no dataset"]),
]


def assert_said_once(errors, words, out):
    lines = [line for line in errors.splitlines() if "train.py: " in line]
    assert len(lines) == 1 and all(word in lines[0] for word in words), errors
    assert 'train.py", line' not in errors and not out.exists()


@pytest.mark.parametrize("wrong, words", WRONG)
def test_wrong_input_is_said_once_and_by_name(options, tmp_path, wrong, words):
    out = tmp_path / "out"
    errors = end_like_torchrun(start_training(2, *options, f"--out_dir={out}", *wrong))
    assert_said_once(errors, words, out)


@pytest.mark.slow
def test_torchrun_shows_wrong_input_once(options, tmp_path):
    out = tmp_path / "out"
    wrong, words = WRONG[0]
    torchrun = start_torchrun(2, "train.py", *options, f"--out_dir={out}", *wrong)
    codes, _, errors = ends_of([torchrun])
    assert codes == [1]
    assert_said_once(errors, words, out)


def train_slow_rank_0(*arguments):
    """Rank 0 is late: torchrun could end it before it has said what is wrong."""
    if os.environ["RANK"] == "0":
        time.sleep(0.4)
    run_program("train.py", *arguments)


def test_a_wrong_option_is_said_even_if_rank_0_is_late(options, tmp_path):
    out = tmp_path / "out"
    wrong, words = WRONG[4]
    arguments = [*options, f"--out_dir={out}", *wrong]
    assert_said_once(end_like_torchrun(start_ranks(2, train_slow_rank_0, *arguments)), words, out)


def test_help_is_shown_once():
    codes, said, _ = ends_of(start_training(2, "--help"))
    assert codes == [0, 0] and said.count("usage:") == 1


def test_missing_rendezvous_variables_are_named_once(options, tmp_path):
    variables = ("MASTER_ADDR", "MASTER_PORT")
    arguments = ["train.py", *options, f"--out_dir={tmp_path / 'out'}"]
    processes = start_ranks(2, run_program, *arguments, without=variables)
    errors = end_like_torchrun(processes)
    assert_said_once(errors, ["MASTER_ADDR", "torchrun"], tmp_path / "out")
    assert errors.count("\n") == 1


def train_without_data_on_rank_1(*arguments):
    if os.environ["RANK"] == "1":
        arguments = [*arguments, "--dataset=nowhere"]
    run_program("train.py", *arguments)


@pytest.mark.slow
def test_an_error_of_one_rank_is_said_with_its_number_and_ends_the_others(options, tmp_path):
    processes = start_ranks(2, train_without_data_on_rank_1, *options, f"--out_dir={tmp_path}")
    codes, _, errors = ends_of(processes)
    assert codes == [1, 1] and "Traceback" not in errors
    assert "train.py: rank 1: there is no dataset data/nowhere" in errors
    assert "train.py: another process is lost" in errors


def train_out_of_step(*arguments):
    """One bit of one weight of one rank differs after the first step."""
    make_optimizers = train.make_optimizers

    def make_and_spoil(model, config):
        def spoil(*_):
            if os.environ["RANK"] == "1":
                model.norm.weight.data[3] += 1e-6

        optimizers = make_optimizers(model, config)
        optimizers[0].register_step_post_hook(spoil)
        return optimizers

    train.make_optimizers = make_and_spoil
    run_train(*arguments)


def test_a_rank_out_of_step_is_found(options, tmp_path):
    processes = start_ranks(2, train_out_of_step, *options, f"--out_dir={tmp_path}")
    assert end_like_torchrun(processes).count("rank 1 is out of step") == 1
