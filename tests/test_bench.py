"""bench/: the shares of a training step, and parts that fail or hang."""

import inspect
import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from tqdm import tqdm

import kernels
from bench import all_rows, apart, docs, gpu, speed
from bench import kernels as bench_kernels
from data.dataset import Dataset, make_encoding
from helpers import refusal
from memory import ValuePool
from presets import PRESETS

TINY = dict(
    n_layer=2, n_head=2, n_embd=32, block_size=32, batch_size=2, gradient_accumulation_steps=2,
    mem_keys=16, mem_topk=4, mem_heads=2,
)  # fmt: skip


def test_shares_of_a_step_count_each_kernel_once():
    """What torch.profiler's averages look like on a GPU: kernels stand there themselves, in the operation that started them, in the
    ranges around it, and ranges stand there a second time, as the GPU saw them, with the pauses between kernels."""

    def event(key, kind=DeviceType.CPU, own=0, total=0, annotation=False):
        times = dict(self_device_time_total=own, device_time_total=total, cpu_time_total=999)
        return SimpleNamespace(key=key, device_type=kind, is_user_annotation=annotation, **times)

    adam = "RowAdam.update"
    events = [
        event("step", total=100),
        event("step", DeviceType.CUDA, own=130, total=130, annotation=True),
        event("Lookup", total=20),
        event("nanomem::lookup_forward", own=20, total=20),
        event("forward_kernel", DeviceType.CUDA, own=20, total=20),
        event("nanomem::lookup_backward_into", own=10, total=30),
        event("aten::sort", own=20, total=20),
        event("backward_kernel", DeviceType.CUDA, own=10, total=10),
        event("sort_kernel", DeviceType.CUDA, own=20, total=20),
        event(adam, annotation=True),  # its kernel is started outside any operation, unlinked
        event(adam, DeviceType.CUDA, own=25, total=25, annotation=True),
        event("adam_kernel", DeviceType.CUDA, own=10, total=10),
        event("aten::random_", own=5, total=5),
        event("random_kernel", DeviceType.CUDA, own=5, total=5),
        event("aten::mm", own=35, total=35),
        event("gemm", DeviceType.CUDA, own=35, total=35),
    ]
    want = dict.fromkeys(speed.PARTS, 0)
    want |= {"lookup, forward": 0.2, "lookup, backward": 0.3, "RowAdam": 0.15}
    assert speed.shares_of(events, on_gpu=True) == pytest.approx(want)
    with pytest.raises(ValueError, match="no kernels"):  # not a share of nothing
        speed.shares_of(events[:1], on_gpu=True)


MEMORY = {
    "choosing the slots", "lookup, forward", "lookup, backward", "taking out the gradient",
    "RowAdam", "AdamW",
}  # fmt: skip


@pytest.mark.parametrize(
    "preset, parts",
    [
        ("gpt2-dense", {"AdamW"}),
        ("gpt2-memory", MEMORY),
        ("facts-ultramem", MEMORY),
        ("facts-moe", {"products of experts", "AdamW"}),
    ],
)
def test_a_profile_finds_the_parts_of_a_step(preset, parts):
    """PyTorch's names of them; a part that is not found has a share of 0."""
    options = PRESETS[preset]
    if preset.startswith("gpt2"):
        options = {**options, **TINY, "mem_count": int("memory" in preset)}
    training = speed.Training(options, torch.device("cpu"))
    assert training.tokens == options["block_size"] * (2 * 2 if preset.startswith("gpt2") else 16)
    training.step()
    shares = training.shares(steps=1)
    assert {part for part, share in shares.items() if share > 0} == parts
    assert sum(shares.values()) < 1


@pytest.mark.parametrize("systems", [False, True])
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_only_the_dense_models_have_no_memory(kind, systems):
    models = speed.models_to_compare(torch.device(kind), systems)
    for name, options in models.items():
        with torch.device("meta"):
            training = speed.Training(options, torch.device("meta"))
        assert (not training.model.pools()) == (name in ("dense", "dense2x", "moe")), name


@pytest.mark.slow
def test_a_part_that_fails_or_hangs_keeps_its_output_and_is_run_again(tmp_path, capsys):
    program = tmp_path / "program.py"
    program.write_text(
        "import subprocess, sys\nprint('| a row |', flush=True)\n"
        "if sys.argv[1] == 'hang': subprocess.run(['sleep', '60'])\nsys.exit(int(sys.argv[1]))"
    )
    parts = {name: gpu.Part(1, 4, f"{program} {name}") for name in ("hang", "3", "0")}
    out, machine = tmp_path / "results.json", "a card"
    done = {"machine": machine, "parts": {}}
    gpu.run_parts(parts, list(parts), done, out, end=gpu.time.monotonic() + 60)
    saved = json.loads(out.read_text())
    assert saved == done and set(saved["parts"]) == set(parts)
    assert all(part["output"].startswith("| a row |\n") for part in saved["parts"].values())
    failed = {name: part["failed"] for name, part in saved["parts"].items()}
    assert failed == {"hang": "killed after 4 s", "3": "it ended with exit code 3", "0": ""}
    # with less time left than the estimate, a part is not begun
    parts["later"] = gpu.Part(30, 60, f"{program} 0")
    gpu.run_parts(parts, ["later"], done, out, end=gpu.time.monotonic() + 10)
    assert "later" not in done["parts"] and "left for another call" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["forward", "backward", "adam", "repeat"])
def test_the_checks_notice_a_path_that_is_wrong_by_a_thousandth(wrong, monkeypatch):
    forward, backward, adam = bench_kernels.PATHS["pytorch"]
    factors = dict.fromkeys(("forward", "backward", "adam", "repeat"), 1.0)

    def path():
        return (
            lambda *inputs: forward(*inputs) * factors["forward"] + next(noise),
            lambda *inputs: [backward(*inputs)[0], *(x * factors["backward"] for x in backward(*inputs)[1:])],
            lambda *inputs, rate, **options: adam(*inputs, rate=rate * factors["adam"], **options),
        )  # fmt: skip

    noise = iter([0.0] * 99)
    monkeypatch.setitem(bench_kernels.PATHS, "mine", path())
    device = torch.device("cpu")
    assert bench_kernels.check_path("mine", device, widths=(24,))
    if wrong == "repeat":
        noise = iter([0.0, 1e-7] * 9)
    else:
        factors[wrong] = 1.001
    assert not bench_kernels.check_path("mine", device, widths=(24,))


@pytest.mark.skipif(not kernels.HAS_TRITON, reason="there is no Triton for this platform")
@pytest.mark.slow
def test_tiles_are_timed_and_kernels_py_chooses_its_own_again(monkeypatch, capsys):
    once = partial(bench_kernels.median_seconds, repeats=1)
    monkeypatch.setattr(bench_kernels, "median_seconds", once)
    before = kernels.forward_tile, kernels.backward_tile, kernels.adam_warps, kernels.select_tile
    tiny = bench_kernels.Shape("zipf", 16, 16, n=1, k=2, dtype=torch.float32)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench_kernels.time_tiles(device, tiny, N=8, K=2)
    said = capsys.readouterr().out
    assert all(f"| {choose.__name__} |" in said for choose in before)
    assert before == (kernels.forward_tile, kernels.backward_tile, kernels.adam_warps, kernels.select_tile)  # fmt: skip


# --- n-grams against memory layers ------------------------------------------------------------------------------------


def test_docstrings_become_documents(tmp_path, monkeypatch, gpt2, capsys):
    """Of a package that is there: those of every twentieth file are for validation, and no text is in both."""
    monkeypatch.setattr(docs, "PACKAGES", ("tqdm",))
    docs.main(["--out", str(tmp_path)])
    dataset = Dataset(tmp_path)
    encoding = make_encoding(dataset.vocabulary())
    assert dataset.vocab_size == 4097 and dataset.separator == 4096
    documents = {}
    for split in ("train", "val"):
        text = encoding.decode(dataset.tokens(split).tolist())
        first, *documents[split] = text.split("<|endoftext|>")
        assert first == "" and all(len(document) >= 100 for document in documents[split])
    assert not set(documents["train"]) & set(documents["val"])
    everything = documents["train"] + documents["val"]
    assert inspect.cleandoc(tqdm.set_postfix.__doc__) in everything
    assert (
        len(everything) == len(set(everything))
        and f"{len(everything)} docstrings" in capsys.readouterr().out
    )
    assert "--overwrite" in refusal(docs.main, ["--out", tmp_path], capsys)


def test_adam_on_all_rows_is_pytorchs():
    """Rows that a step has not read move, too."""
    torch.manual_seed(0)
    pool = ValuePool(12, 4)
    weights = torch.nn.Parameter(pool.values.detach().clone())
    ours = all_rows.AllRowsAdam(pool, lr=0.1, betas=(0.8, 0.9))
    pytorchs = torch.optim.Adam([weights], lr=0.1, betas=(0.8, 0.9), eps=1e-15)
    for step in range(4):
        rows = torch.randint(12, (3, 2))
        rows[rows == 5] = 6
        before = pool.values[2].clone()
        pool(rows, torch.ones(3, 2)).square().sum().backward()
        weights.grad = None
        weights[rows].sum(1).square().sum().backward()
        ours.step()
        pytorchs.step()
        ours.zero_grad()
        if step > 0 and 2 not in rows:
            assert not torch.equal(before, pool.values[2])
    torch.testing.assert_close(pool.values, weights, rtol=1e-4, atol=1e-6)


def test_names_are_put_apart_and_nothing_else_changes(facts, tmp_path, monkeypatch):
    monkeypatch.setattr(apart, "find_folder", lambda name: facts)
    apart.main(["--out", str(tmp_path)])
    before = Dataset(facts)
    after = Dataset(tmp_path)
    encoding = make_encoding(after.vocabulary())
    assert after.vocabulary() == before.vocabulary() and after.separator == before.separator
    for split in ("train", "val"):
        old = encoding.decode(before.tokens(split).tolist())
        new = encoding.decode(after.tokens(split).tolist())
        assert new.replace(",, ", " ") == old and new.count(",, ") == 2 * new.count(".\n")
        assert all(line.count(",, ") == 2 for line in new.strip().split("\n"))
    for old, new in zip(before.questions(), after.questions(), strict=True):
        assert new["prompt"].replace(",, ", " ") == old["prompt"]
        assert new["prompt"].split(",, ")[2].count(" ") == 3
        assert new["answer_ids"] == old["answer_ids"]
