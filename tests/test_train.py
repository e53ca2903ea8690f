"""Training and sampling as a user runs them: real processes, real folders, kills, full disks and wrong input."""

import json
import pickle
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.cuda._utils import _get_device_index

import sample
import train as program
from helpers import SYSTEMS, refusal
from memory import ValuePool
from model import GPT, GPTConfig
from train import check_memory, choose_device, load_checkpoint

ROOT = Path(__file__).resolve().parents[1]
SMALL = (
    "--n_layer=2 --n_head=2 --n_embd=32 --block_size=32 --mem_keys=16 --mem_topk=4 --mem_heads=2 --batch_size=4 "
    "--eval_iters=2 --device=cpu"
).split()


def run(script, *arguments, **options):
    command = [sys.executable, ROOT / script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def train(data, out, *arguments, **options):
    return run("train.py", f"--dataset={data}", f"--out_dir={out}", *SMALL, *arguments, **options)


def assert_refused(done, *words):
    """Exit code not 0, the words in the message, and no traceback."""
    assert done.returncode != 0 and "Traceback" not in done.stderr, done.stderr
    assert all(word in done.stderr for word in words), done.stderr


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "facts"
    done = run("data/facts/prepare.py", "--people=20", "--biographies=30", "--out", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def finished(facts, tmp_path_factory):
    """The folder of a run that was left alone for 40 steps."""
    out = tmp_path_factory.mktemp("run") / "out"
    done = train(facts, out, *STEPS)
    assert done.returncode == 0, done.stderr
    return out


STEPS = "--max_iters=40 --eval_interval=16 --log_interval=4 --gradient_accumulation_steps=2".split()


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def assert_same_checkpoint(a, b):
    """Weights, both optimisers, random state and log, bit for bit; seconds and folder may differ."""

    def flatten(value, path=""):
        if isinstance(value, dict):
            for key, item in value.items():
                yield from flatten(item, f"{path}/{key}")
        elif isinstance(value, (list, tuple)):
            for i, item in enumerate(value):
                yield from flatten(item, f"{path}/{i}")
        else:
            yield path, value

    one, two = (dict(flatten(torch.load(out / "ckpt.pt", weights_only=True))) for out in (a, b))
    for checkpoint in (one, two):
        for path in ("/seconds", "/train_config/out_dir", "/train_config/resume"):
            del checkpoint[path]
    assert one.keys() == two.keys() and sum(torch.is_tensor(value) for value in one.values()) > 50
    for path, value in one.items():
        assert torch.equal(value, two[path]) if torch.is_tensor(value) else value == two[path], path
    for first, second in zip(log_of(a), log_of(b), strict=True):
        assert first | {"tokens_per_s": 0} == second | {"tokens_per_s": 0}


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, (
            "the process ended, or took too long"
        )
        time.sleep(0.01)


def start_training(facts, out, *arguments):
    command = [
        sys.executable,
        ROOT / "train.py",
        f"--dataset={facts}",
        f"--out_dir={out}",
        *SMALL,
        *arguments,
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def steps_done(out):
    text = (out / "log.jsonl").read_text() if (out / "log.jsonl").exists() else ""
    return text.count("\n") * 4  # log_interval


# --- runs that end early ----------------------------------------------------------------------------------------------


def test_resume_after_a_kill_is_bitwise_identical(facts, finished, tmp_path):
    process = start_training(facts, tmp_path, *STEPS)
    wait_for(lambda: (tmp_path / "ckpt.pt").exists() and steps_done(tmp_path) >= 20, process)
    process.kill()
    process.communicate()
    assert load_checkpoint(tmp_path / "ckpt.pt")["iter"] in (16, 32)
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write('{"iter": 24, "lo')  # as if the kill had come in the middle of a line
    done = run("train.py", "--resume", f"--out_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert_same_checkpoint(finished, tmp_path)


@pytest.mark.parametrize("system", ["memory", "moe", "peer", "ultramem"])
def test_resume_of_each_system_is_bitwise_identical(facts, tmp_path, system):
    """With values in bfloat16, rounded at random, from the seed and the step: the noise, too, must go on where it stopped. Moments
    stay float32."""
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    steps = (
        "--mem_dtype=bfloat16",
        "--max_iters=24",
        "--eval_interval=8",
        "--log_interval=4",
        *SYSTEMS[system],
    )
    assert train(facts, whole, *steps).returncode == 0
    process = start_training(facts, halved, *steps)
    wait_for((halved / "ckpt.pt").exists, process)
    process.kill()
    process.communicate()
    assert run("train.py", "--resume", f"--out_dir={halved}").returncode == 0
    assert_same_checkpoint(whole, halved)
    checkpoint = load_checkpoint(halved / "ckpt.pt")
    if system == "moe":
        return
    assert checkpoint["model"].pool.values.dtype == torch.bfloat16
    assert checkpoint["optimizers"][1]["state"][0]["means"].dtype == torch.float32


def test_micro_steps_add_up_to_the_step_of_a_larger_batch(facts, tmp_path):
    """The same windows, the same mean: only rounding may differ. Eight micro-steps read more rows than the table has."""
    for size in (8, 1):
        options = (
            f"--batch_size={size}",
            f"--gradient_accumulation_steps={8 // size}",
            "--max_iters=12",
            "--log_interval=1",
        )
        done = train(facts, tmp_path / str(size), *options, "--mem_layers=0,1", "--mem_keys=8")
        assert done.returncode == 0, done.stderr
    for one, other in zip(log_of(tmp_path / "8"), log_of(tmp_path / "1"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=2e-5)
    one, other = (
        load_checkpoint(tmp_path / name / "ckpt.pt")["model"].state_dict() for name in ("8", "1")
    )
    for name, weights in one.items():
        assert (weights - other[name]).norm() < 1e-3 * weights.norm(), name


def test_a_folder_of_nanogpt_trains_unchanged_and_its_pickle_is_not_read(tmp_path):
    ids = (
        torch.randint(50257, (3000,), generator=torch.Generator().manual_seed(0))
        .numpy()
        .astype("<u2")
    )
    for split in ("train", "val"):
        ids.tofile(tmp_path / f"{split}.bin")
    done = train(tmp_path, tmp_path / "out", "--max_iters=3")
    assert done.returncode == 0, done.stderr
    checkpoint = load_checkpoint(tmp_path / "out" / "ckpt.pt")
    assert checkpoint["vocabulary"] == "gpt2" and checkpoint["model"].config.vocab_size == 50257
    (tmp_path / "meta.pkl").write_bytes(b"anything")
    assert_refused(train(tmp_path, tmp_path / "other", "--max_iters=3"), "meta.pkl", "pickle")


def test_a_preset_trains_on_real_text_and_writes_some(gpt2, wikitext, tmp_path):
    files = ("--file", wikitext[0], "--val_file", wikitext[1])
    assert (
        run("data/shakespeare/prepare.py", *files, "--encoding=gpt2", "--out", tmp_path).returncode
        == 0
    )
    options = (
        "--preset=shakespeare-memory",
        f"--dataset={tmp_path}",
        f"--out_dir={tmp_path / 'out'}",
        "--n_embd=64",
    )
    done = run("train.py", *options, "--device=cpu", "--max_iters=24", "--eval_iters=2")
    assert done.returncode == 0, done.stderr
    last = log_of(tmp_path / "out")[-1]
    assert (
        last["val_loss"] < 10.2 < log_of(tmp_path / "out")[0]["loss"]
    )  # it begins at log 50,257 = 10.8
    done = run(
        "sample.py",
        f"--out_dir={tmp_path / 'out'}",
        "--num_samples=1",
        "--max_new_tokens=20",
        "--start= The game",
    )
    assert (
        done.returncode == 0
        and done.stdout.startswith(" The game")
        and len(done.stdout.split()) > 5
    ), done.stderr


def test_resume_refuses_the_state_of_another_optimiser(finished, tmp_path):
    checkpoint = torch.load(finished / "ckpt.pt", weights_only=True)
    checkpoint["optimizers"][1]["state"][0] = {"step": 3, "exp_avg": torch.zeros(3)}
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    assert_refused(
        run("train.py", "--resume", f"--out_dir={tmp_path}", "--max_iters=80"),
        "optimisers",
        "ckpt.pt",
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_cleanly_and_resume_goes_on_from_there(facts, finished, tmp_path, number):
    process = start_training(facts, tmp_path, *STEPS)
    wait_for(lambda: steps_done(tmp_path) >= 4, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in err, err
    assert number.name in out and f"--resume --out_dir={tmp_path}" in out
    stopped = load_checkpoint(tmp_path / "ckpt.pt")["iter"]
    assert 4 <= stopped < 40 and log_of(tmp_path)[-1]["iter"] == stopped
    assert run("train.py", "--resume", "--out_dir", tmp_path).returncode == 0
    # The log has one line more, of the step at which it stopped.
    (tmp_path / "log.jsonl").write_text(
        "".join(
            json.dumps(line) + "\n"
            for line in log_of(tmp_path)
            if line["iter"] % 4 == 0 or line["iter"] != stopped
        )
    )
    assert_same_checkpoint(finished, tmp_path)


def test_a_kill_while_a_checkpoint_is_written_leaves_one_that_loads(finished, tmp_path):
    path, program = tmp_path / "ckpt.pt", tmp_path / "writer.py"
    program.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import pathlib, torch\nfrom data.checkpoint import save_checkpoint\n"
        f"checkpoint = torch.load({str(finished / 'ckpt.pt')!r}, weights_only=True)\n"
        "while True:\n    checkpoint['padding'] = torch.zeros(10_000_000)\n"
        f"    save_checkpoint(pathlib.Path({str(path)!r}), checkpoint)\n"
    )
    half_written = 0
    for _ in range(3):
        process = subprocess.Popen([sys.executable, program])
        temporary = Path(f"{path}.{process.pid}.tmp")
        wait_for(lambda path=path: path.exists(), process)
        wait_for(
            lambda temporary=temporary: temporary.exists() and temporary.stat().st_size > 1_000_000,
            process,
        )
        process.kill()
        process.wait()
        half_written += temporary.exists()
        assert load_checkpoint(path)["iter"] == 40
    assert half_written > 0  # at least one of the kills came while it was writing


def test_a_full_disk_keeps_the_checkpoint_before(facts, tmp_path):
    def limit():  # writing past this many bytes fails, as on a disk without room
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = train(facts, tmp_path / "never", "--max_iters=4", preexec_fn=limit)
    assert_refused(done, "could not write", "ckpt.pt", "Start again with --overwrite")
    assert sorted(p.name for p in (tmp_path / "never").iterdir()) == ["log.jsonl"]

    assert train(facts, tmp_path / "out", "--max_iters=4").returncode == 0
    before = (tmp_path / "out" / "ckpt.pt").read_bytes()
    done = run(
        "train.py", "--resume", f"--out_dir={tmp_path / 'out'}", "--max_iters=8", preexec_fn=limit
    )
    assert_refused(done, "could not write", "The last checkpoint is whole")
    assert (tmp_path / "out" / "ckpt.pt").read_bytes() == before
    assert (
        run("train.py", "--resume", f"--out_dir={tmp_path / 'out'}", "--max_iters=8").returncode
        == 0
    )


def test_a_diverging_loss_stops_with_a_message_and_keeps_what_was_there(facts, tmp_path):
    assert train(facts, tmp_path, "--max_iters=4").returncode == 0
    before = (tmp_path / "ckpt.pt").read_bytes()
    diverge = (
        "--max_iters=40",
        "--warmup_iters=0",
        "--learning_rate=1e30",
        "--log_interval=3",
        "--eval_interval=50",
    )
    done = run("train.py", "--resume", f"--out_dir={tmp_path}", *diverge)
    assert_refused(done, "training has diverged", "learning_rate (now 1e+30)")
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    assert all(
        p.isfinite().all() for p in load_checkpoint(tmp_path / "ckpt.pt")["model"].parameters()
    )


def test_resume_takes_new_rates_and_the_folder_it_is_given(facts, tmp_path):
    """A copied run goes on where it now lies, with the options of the command line, in both optimisers."""
    assert train(facts, tmp_path / "first", "--max_iters=4").returncode == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "first").iterdir()}
    shutil.copytree(tmp_path / "first", tmp_path / "copy")
    options = "--max_iters=6", "--mem_learning_rate=0.007", "--weight_decay=0.03", "--beta1=0.8"
    done = run("train.py", "--resume", f"--out_dir={tmp_path / 'copy'}", *options)
    assert done.returncode == 0, done.stderr
    assert {path.name: path.read_bytes() for path in (tmp_path / "first").iterdir()} == before
    network, pool = torch.load(tmp_path / "copy" / "ckpt.pt", weights_only=True)["optimizers"]
    assert [group["weight_decay"] for group in network["param_groups"]] == [0.03, 0.0]
    assert pool["param_groups"][0]["lr"] == 0.007
    assert network["param_groups"][0]["betas"][0] == pool["param_groups"][0]["betas"][0] == 0.8


def test_resume_and_recall_refuse_data_that_have_been_prepared_anew(facts, tmp_path):
    shutil.copytree(facts, tmp_path / "data")
    assert train(tmp_path / "data", tmp_path / "out", "--max_iters=2").returncode == 0
    assert (
        run(
            "data/facts/prepare.py",
            "--people=20",
            "--seed=5",
            "--overwrite",
            "--out",
            tmp_path / "data",
        ).returncode
        == 0
    )
    for done in (
        run("train.py", "--resume", f"--out_dir={tmp_path / 'out'}", "--max_iters=4"),
        run("sample.py", f"--out_dir={tmp_path / 'out'}", "--recall"),
    ):
        assert_refused(done, str(tmp_path / "data"), "trained on")


# --- what only a GPU runs, as far as a machine without one carries ----------------------------------------------------


def test_a_gpu_is_named_by_its_index(monkeypatch):
    """torch.cuda.set_device refuses "cuda": PyTorch's own function that reads a device's index says so, no GPU needed."""
    chosen, zeros = [], torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: zeros(*shape))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: chosen.append(_get_device_index(device))
    )
    devices = [
        choose_device("cuda"),
        choose_device("auto"),
        choose_device("cuda:2"),
        choose_device("cuda", number=3),
    ]
    assert chosen == [0, 0, 2, 3] and [device.index for device in devices] == chosen


def test_a_model_is_built_on_its_device_and_a_table_that_is_loaded_is_not_drawn(
    finished, monkeypatch
):
    config = GPTConfig(mem_count=3, mem_keys=4096)  # 51 GB, were they drawn on the CPU
    with torch.device("meta"):
        model = GPT(config)
    check_memory(model, torch.device("meta"))
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}
    want = torch.load(finished / "ckpt.pt", weights_only=True)["model"]
    monkeypatch.setattr(ValuePool, "initialize", None)
    got = load_checkpoint(finished / "ckpt.pt")["model"].state_dict()
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


# --- what a run reports -----------------------------------------------------------------------------------------------


def test_log_and_summary_say_what_happened(facts, finished):
    log = log_of(finished)
    assert [line["iter"] for line in log] == list(range(4, 41, 4))
    evaluations = [line for line in log if "val_loss" in line]
    assert [line["iter"] for line in evaluations] == [16, 32, 40]
    assert {"train_loss", "recall", "mem_used", "mem_kl", "mem_top1"} <= evaluations[-1].keys()
    assert (
        evaluations[-1]["val_loss"] < evaluations[0]["val_loss"] < 8.0
    )  # log(1712) + 0.5: logits of spread 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_small_model_learns_facts_and_sample_asks_for_them(facts, tmp_path, dtype):
    """20 people in 300 steps. The table that sample.py prints must agree with what training logged."""
    done = train(
        facts, tmp_path, "--n_embd=64", "--max_iters=300", "--batch_size=16", "--learning_rate=8e-3", "--mem_learning_rate=1e-2",
        "--eval_interval=300", f"--mem_dtype={dtype}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    recall = log_of(tmp_path)[-1]["recall"]
    assert f"recall       {recall:.1%} of 120 closed-book questions" in done.stdout
    assert f"python sample.py --out_dir={tmp_path} --recall" in done.stdout
    assert recall > 0.5  # chance is below 1%

    asked = run("sample.py", f"--out_dir={tmp_path}", "--recall", "--rows=0", "--device=cpu")
    assert asked.returncode == 0, asked.stderr
    rows = [line for line in asked.stdout.splitlines() if line.endswith(("right", "wrong"))]
    assert len(rows) == 120 and sum(row.endswith("right") for row in rows) == round(recall * 120)
    for row in rows:
        _, expected, got, verdict = re.split(r"\s{2,}", row)
        assert (expected == got) == (verdict == "right"), row
    assert asked.stdout.splitlines()[-1].split() == ["all", f"{recall:.1%}", "of", "120"]


# --- sampling ---------------------------------------------------------------------------------------------------------


def test_sample_goes_on_from_argument_file_and_standard_input(finished, tmp_path):
    options = [f"--out_dir={finished}", "--max_new_tokens=20", "--num_samples=2", "--device=cpu"]
    start = "Tin was born in"
    (tmp_path / "start.txt").write_text(start)
    by_argument = run("sample.py", *options, f"--start={start}")
    assert by_argument.returncode == 0 and by_argument.stdout.count(start) == 2, by_argument.stderr
    assert "tokens/s" in by_argument.stderr
    assert (
        run("sample.py", *options, f"--start=FILE:{tmp_path / 'start.txt'}").stdout
        == by_argument.stdout
    )
    assert run("sample.py", *options, "--start=-", input=start).stdout == by_argument.stdout
    assert run("sample.py", *options, f"--start={start}", "--seed=2").stdout != by_argument.stdout


def test_sample_streams_what_it_generates(finished):
    command = [
        sys.executable,
        ROOT / "sample.py",
        f"--out_dir={finished}",
        "--max_new_tokens=100000",
        "--device=cpu",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert (
        len(process.stdout.read(300)) == 300 and process.poll() is None
    )  # text arrives long before the end
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err, err
    head = subprocess.run(
        f"{shlex.join(map(str, command))} | head -c 100",
        shell=True,
        capture_output=True,
        timeout=60,
    )
    assert (
        len(head.stdout) == 100
        and b"Traceback" not in head.stderr
        and b"BrokenPipe" not in head.stderr
    )


# --- wrong input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        (["--mem_key=32"], ["--mem_key=32"]),
        (["extra"], ["extra"]),
        (["--n_layer=two"], ["--n_layer", "two"]),
        (["--mem_gate=perhaps"], ["--mem_gate", "perhaps"]),
        (["--mem_layers=1,x"], ["--mem_layers", "1,x"]),
        (["--preset=nothing"], ["--preset", "nothing", "facts-memory"]),
        (["--n_embd=30", "--n_head=4"], ["n_embd=30", "n_head=4"]),
        (["--mem_topk=99"], ["mem_topk=99", "mem_keys=16"]),
        (["--mem_layers=2"], ["no block 2", "0 to 1"]),
        (["--batch_size=0"], ["batch_size=0"]),
        (["--mem_keys=9999999"], ["does not fit", "mem_keys"]),
        (["--seed=99999999999999999999"], ["seed=99999999999999999999"]),
        (["--mem_learning_rate=0"], ["mem_learning_rate=0"]),
        (["--learning_rate=-1"], ["learning_rate=-1"]),
        (["--learning_rate=nan"], ["learning_rate=nan"]),
        (["--device=tpu9"], ["device=tpu9", "device=cpu"]),
        (["--dtype=int8"], ["dtype=int8", "bfloat16"]),
        (["--block_size=100000"], ["too few for block_size=100000"]),
    ],
)
def test_a_wrong_option_is_named_and_nothing_is_written(facts, tmp_path, capsys, options, words):
    said = refusal(
        program.main,
        [f"--dataset={facts}", f"--out_dir={tmp_path / 'out'}", *SMALL, *options],
        capsys,
    )
    assert all(word in said for word in words), said
    assert not (tmp_path / "out").exists()


def test_a_missing_or_broken_dataset_is_named(facts, tmp_path, capsys):
    def refused(folder, *words):
        said = refusal(
            program.main, [f"--dataset={folder}", f"--out_dir={tmp_path / 'out'}", *SMALL], capsys
        )
        assert all(word in said for word in words), said

    refused(tmp_path / "nowhere", "nowhere", "train.bin")
    (tmp_path / "unprepared").mkdir()
    (tmp_path / "unprepared" / "prepare.py").touch()
    refused(tmp_path / "unprepared", "train.bin", f"run: python {tmp_path / 'unprepared'}")
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in facts.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    for content, words in (
        (b"", ["0 bytes"]),
        (b"\1\0\1", ["3 bytes"]),
        (b"\xff\xff" * 99, ["token id 65535", "1711"]),
    ):
        (broken / "train.bin").write_bytes(content)
        refused(broken, str(broken / "train.bin"), *words)
    assert not (tmp_path / "out").exists()


def test_an_occupied_folder_is_not_overwritten_unasked(facts, tmp_path):
    assert train(facts, tmp_path, "--max_iters=2").returncode == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert_refused(
        train(facts, tmp_path, "--max_iters=2"), "holds a run already", "--resume", "--overwrite"
    )
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert train(facts, tmp_path, "--max_iters=3", "--overwrite").returncode == 0
    assert log_of(tmp_path)[-1]["iter"] == 3


@pytest.mark.parametrize(
    "options, words",
    [
        (["--n_embd=64"], ["n_embd=64", "n_embd=32"]),
        (["--seed=9"], ["seed=9", "seed=1"]),
        (["--batch_size=8"], ["batch_size=8", "batch_size=4"]),
        (["--preset=facts-dense"], ["preset"]),
        (["--mem_count=0"], ["mem_count=0", "mem_count=1"]),
        ([], ["complete at step 40", "max_iters"]),
    ],
)
def test_resume_refuses_what_would_make_it_another_run(finished, capsys, options, words):
    before = (finished / "ckpt.pt").read_bytes()
    said = refusal(program.main, ["--resume", f"--out_dir={finished}", *options], capsys)
    assert all(word in said for word in words), said
    assert (finished / "ckpt.pt").read_bytes() == before


class Boom:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def wrong_checkpoints(good, folder):
    """(name, contents, words of the message) of files that are not to be loaded."""
    whole = torch.load(good, weights_only=True)
    yield "truncated", good.read_bytes()[:-1000], ["damaged"]
    yield "empty", b"", ["ckpt.pt"]
    yield "text", b"These are not weights.", ["not a checkpoint"]
    yield "code", pickle.dumps(Boom(folder / "executed")), ["not a checkpoint"]
    yield (
        "code in a zip",
        {"format": "nanomem-3", "model": Boom(folder / "executed")},
        ["was not loaded"],
    )
    yield "another program's", {"state_dict": {}}, ["not a checkpoint of this version of nanomem"]
    yield "wider", whole | {"model_config": whole["model_config"] | {"n_embd": 64}}, ["do not fit"]
    yield (
        "from the future",
        whole | {"model_config": whole["model_config"] | {"n_wings": 2}},
        ["do not fit", "n_wings"],
    )
    yield (
        "without weights",
        {name: value for name, value in whole.items() if name != "model"},
        ["do not fit"],
    )


def test_a_checkpoint_that_is_not_one_is_refused_and_never_executed(finished, tmp_path, capsys):
    for name, contents, words in wrong_checkpoints(finished / "ckpt.pt", tmp_path):
        path = tmp_path / name / "ckpt.pt"
        path.parent.mkdir()
        path.write_bytes(contents) if isinstance(contents, bytes) else torch.save(contents, path)
        before = path.read_bytes()
        with pytest.raises(ValueError) as caught:
            load_checkpoint(path)
        assert str(path) in str(caught.value) and all(
            word in str(caught.value) for word in words
        ), f"{name}: {caught.value}"
        if name in ("truncated", "code", "wider"):
            said = refusal(sample.main, [f"--out_dir={path.parent}"], capsys)
            assert all(word in said for word in (str(path), *words)), said
        if name in ("truncated", "code"):
            said = refusal(program.main, ["--resume", f"--out_dir={path.parent}"], capsys)
            assert all(word in said for word in (str(path), *words)), said
        assert path.read_bytes() == before
    assert not (tmp_path / "executed").exists()
    assert_refused(
        run("sample.py", f"--out_dir={tmp_path / 'nowhere'}"), "no checkpoint", "nowhere"
    )


@pytest.mark.parametrize(
    "options, words",
    [
        (["--temperature=-1"], ["--temperature"]),
        (["--top_p=2"], ["--top_p"]),
        (["--num_samples=none"], ["--num_samples"]),
        (["--start=FILE:nowhere.txt"], ["nowhere.txt"]),
    ],
)
def test_sample_names_a_wrong_option(finished, capsys, options, words):
    said = refusal(sample.main, [f"--out_dir={finished}", *options], capsys)
    assert all(word in said for word in words), said


def test_recall_needs_questions(facts, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time. " * 500)
    assert (
        run("data/shakespeare/prepare.py", "--file", text, "--out", tmp_path / "text").returncode
        == 0
    )
    assert train(tmp_path / "text", tmp_path / "out", "--max_iters=2").returncode == 0
    assert_refused(run("sample.py", f"--out_dir={tmp_path / 'out'}", "--recall"), "recall.jsonl")
    assert (
        run(
            "sample.py", f"--out_dir={tmp_path / 'out'}", "--max_new_tokens=5", "--device=cpu"
        ).returncode
        == 0
    )
