"""Faults that reports about other projects point to: each was tried here, and was one here, too."""

import inspect
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_openwebtext import pack

import sample
import train
from bench import compare, curves
from data.dataset import Dataset, find_folder, make_encoding
from data.facts import prepare as facts_prepare
from data.openwebtext.prepare import list_parts, tokenize
from data.shakespeare import prepare as text_prepare
from edit import inspect_slots, update
from edit.delta import weights_hash
from helpers import (
    ROOT,
    SMALL,
    contents,
    load,
    log_of,
    prepare_here,
    refusal,
    run,
    steps_done,
    train_here,
    wait_until,
)
from kernels import RowAdam, collecting_lookup
from memory import MemoryLayer, ValuePool
from model import GPT, GPTConfig
from processes import Process, run_train, start_program
from runtime.bars import Bar
from runtime.device import explain_compile_errors
from runtime.files import UserError, open_text

SHORT = ["--num_samples=1", "--max_new_tokens=3", "--device=cpu"]


@pytest.fixture
def out(finished, tmp_path):
    """A copy of a finished run."""
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


def teach(base, data, out, *options):
    """edit/update.py in this process."""
    small = "--batch_size=2 --eval_iters=1 --device=cpu --log_interval=1 --max_iters=2".split()
    names = [f"--init_from={base}", f"--dataset={data}", f"--out_dir={out}"]
    update.main([*small, *names, *options])


@pytest.fixture(scope="module")
def new(tmp_path_factory):
    """A dataset of three other people."""
    folder = tmp_path_factory.mktemp("data") / "new"
    prepare_here("facts", "--people=9", "--new=3", "--out", folder)
    return folder


# --- files ------------------------------------------------------------------------------------------------------------


def mapped(*names):
    """Files with these names that this process has mapped."""
    maps = Path("/proc/self/maps").read_text()
    return {name for name in names if name in maps}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_program_keeps_a_file_mapped_that_another_may_have_replaced(
    out, new, tmp_path, monkeypatch, capsys
):
    """Row 1: a deleted file that is mapped takes space, so a disk would need room for three checkpoints."""
    names = ("ckpt.pt", "delta.pt", "readers.pt", "train.bin.")
    kept = []
    save = train.save

    def note_and_save(run):
        kept.append(mapped(*names))
        save(run)

    monkeypatch.setattr(train, "save", note_and_save)
    train_here("--resume", f"--out_dir={out}", "--max_iters=8")
    train_here(
        f"--init_from={out}", f"--dataset={new}", f"--out_dir={tmp_path / 'tuned'}", "--max_iters=2"
    )
    assert len(kept) == 3 and not any(kept)

    train_rows = update.train.report
    monkeypatch.setattr(
        update.train, "report", lambda *a, **k: kept.append(mapped(*names)) or train_rows(*a, **k)
    )
    teach(out, new, tmp_path / "taught")
    delta = f"--delta={tmp_path / 'taught' / 'delta.pt'}"
    for module, options in ((sample, []), (inspect_slots, [])):
        sampler = sample.Sampler

        class Noting(sampler):
            def stream(self, *arguments, **settings):
                kept.append(mapped(*names))
                return super().stream(*arguments, **settings)

        with monkeypatch.context() as patch:
            patch.setattr(module, "Sampler", Noting)
            few = SHORT if module is sample else ["--max_new_tokens=1"]
            for _ in range(2):  # the second call finds readers.pt
                module.main([f"--out_dir={out}", delta, "--start=B", *few, *options])
    assert len(kept) > 8 and not any(kept), kept


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
def test_a_resumed_run_needs_no_more_room_than_an_unbroken_one(facts, tmp_path):
    """Row 1, on a real disk of 2.6 checkpoints."""
    disk = tmp_path / "disk"
    disk.mkdir()
    options = [*SMALL, f"--dataset={facts}", f"--out_dir={disk}/out", "--mem_keys=32"]
    train_here(*[o for o in options if "out_dir" not in o], f"--out_dir={tmp_path}/size")
    size = int(2.6 * (tmp_path / "size" / "ckpt.pt").stat().st_size)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a disk")
    try:
        train_here(*options)
        train_here("--resume", f"--out_dir={disk}/out", "--max_iters=12")
        assert load(disk / "out" / "ckpt.pt")["iter"] == 12
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.slow
def test_a_folder_whose_name_is_no_utf_8_is_a_folder(facts, new, tmp_path):
    """Row 2."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    shutil.copytree(facts, folder / "facts")
    shutil.copytree(new, folder / "new")
    base = folder / "base"
    update = [f"--init_from={base}", f"--dataset={folder / 'new'}", "--max_iters=1"]
    for program, *options in (
        ["train.py", *SMALL, f"--dataset={folder / 'facts'}", f"--out_dir={base}"],
        ["train.py", "--resume", f"--out_dir={base}", "--max_iters=5"],
        ["sample.py", f"--out_dir={base}", *SHORT],
        ["sample.py", f"--out_dir={base}", "--recall"],
        ["edit/update.py", *update, f"--out_dir={folder / 'taught'}", "--slots=9"],
        ["sample.py", f"--out_dir={base}", f"--delta={folder / 'taught'}", *SHORT],
        ["edit/inspect_slots.py", f"--out_dir={base}", "--start=B", "--max_new_tokens=1"],
        ["train.py", *update, f"--out_dir={folder / 'tuned'}"],
        [
            "data/shakespeare/prepare.py",
            "--file=README.md",
            f"--vocabulary_of={base}",
            "--out",
            folder / "own",
        ],
        ["bench/curves.py", str(base), f"--out={folder / 'curves.svg'}"],
    ):
        process = start_program(program, *options)
        _, errors = process.communicate()
        assert process.returncode == 0, (program, errors)


TEXTS = {  # bytes of a file: what every program reads
    b"Hello\r\n\r\n\r\n\r\nworld": "Hello\n\n\n\nworld",
    b"\xef\xbb\xbfOne\rtwo\nthree\r\n": "One\ntwo\nthree\n",
}


@pytest.mark.parametrize("data", TEXTS)
def test_all_programs_read_the_same_text(data, finished, tmp_path, monkeypatch):
    """Row 3."""
    text = TEXTS[data] + "and more than twenty bytes"
    data += b"and more than twenty bytes"
    file = tmp_path / "text"
    file.write_bytes(data)
    assert sample.read_text(f"FILE:{file}") == text
    with open_text(os.open(file, os.O_RDONLY)) as f:  # a number, as that of standard input
        assert f.read() == text
    for source, option in ((file, "--encoding=bytes"), (file, f"--vocabulary_of={finished}")):
        prepare_here(
            "shakespeare",
            f"--file={source}",
            f"--val_file={source}",
            option,
            "--out",
            tmp_path / "data",
            "--overwrite",
        )
        dataset = Dataset(tmp_path / "data")
        ids = dataset.tokens("val").tolist()
        decoded = make_encoding(dataset.vocabulary()).decode(ids)
        if option == "--encoding=bytes":
            assert decoded == text
        else:  # its lines are repeated as documents
            lines = [line for line in text.splitlines() if line]
            assert set(filter(None, re.split(r"<\|endoftext\|>|\n", decoded))) == set(lines)


def test_documents_are_those_of_the_hugging_face_loader(tmp_path):
    """Row 3: open(path, encoding="utf-8"), then re.sub("\\n\\n\\n+", "\\n\\n", text).strip()"""
    document = b"Hello\r\n\r\n\r\n\r\nworld"
    (tmp_path / "document").write_bytes(document)
    with open(tmp_path / "document", encoding="utf-8") as f:
        want = re.sub("\n\n\n+", "\n\n", f.read()).strip()
    assert want == "Hello\n\nworld"
    (tmp_path / "archive").write_bytes(pack([document], 0))
    (part,) = list_parts(tmp_path / "archive")
    train_ids, val_ids, count = tokenize(tmp_path / "archive", text_prepare.BYTES, part)
    ids = np.frombuffer(train_ids + val_ids, "<u2")
    assert count == 1 and bytes(ids[1:].astype(np.uint8)) == want.encode()


def test_bytes_that_are_no_text_stay_as_they_are(tmp_path):
    """Row 3: the rule is one for text."""
    data = bytes(range(256)) + b"\r\n" * 9
    (tmp_path / "file").write_bytes(data)
    prepare_here("shakespeare", f"--file={tmp_path / 'file'}", "--out", tmp_path / "data")
    dataset = Dataset(tmp_path / "data")
    assert b"".join(bytes(dataset.tokens(s).astype(np.uint8)) for s in ("train", "val")) == data


def test_a_text_tokenised_in_pieces_has_the_tokens_of_the_whole(gpt2, tmp_path, monkeypatch):
    """Row 10: at any size of the pieces."""
    encoding = make_encoding("gpt2")
    parts = [
        "It's",
        "  ",
        " ",
        "\n",
        "\n\n",
        "\t",
        "x",
        "déjà",
        "12",
        "3",
        "...",
        "'s",
        "，",
        "\x1c",
        "<|endoftext|>",
        "_",
        "\xa0",
    ]
    generator = np.random.default_rng(0)
    for size in (1, 2, 3, 5, 17, 100):
        text = "".join(generator.choice(parts, 500))
        (tmp_path / "text").write_text(text, newline="")
        monkeypatch.setattr(text_prepare, "PIECE", size)
        tokenizer = text_prepare.Tokenizer("gpt2", None, tmp_path)
        ids, _ = tokenizer.tokens(tmp_path / "text", "text")
        want = encoding.encode(text.replace("\r", "\n"), allowed_special="all")
        assert ids.tolist() == [50256, *want]
        pieces = list(text_prepare.read_pieces(tmp_path / "text"))
        assert len(pieces) > 9 and max(map(len, pieces)) < 400


def peak_of_preparing(file, out):
    """Print by how much the largest memory of this process grows, in bytes."""
    make_encoding("gpt2").encode("warm up")
    before = memory_peak()
    prepare_here("shakespeare", f"--file={file}", "--encoding=gpt2", "--out", out)
    print("grew by", memory_peak() - before)


def memory_peak():
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
def test_preparing_a_large_text_takes_little_memory(gpt2, tmp_path):
    """Row 10: it took 13 bytes for each of the text."""
    size = 12_000_000
    line = "The quick brown fox jumps over the lazy dog, and then it sleeps until noon.\n"
    (tmp_path / "text").write_text(line * (size // len(line)))
    said, errors = Process(peak_of_preparing, tmp_path / "text", tmp_path / "out").communicate()
    assert int(re.search(r"grew by (\d+)", said)[1]) < 3 * size, errors


# --- options ----------------------------------------------------------------------------------------------------------


def test_a_warmup_longer_than_the_run_is_shortened_and_said(facts, tmp_path, capsys):
    """Row 4. min_lr above learning_rate: test_jobs.py"""
    options = [*SMALL, f"--dataset={facts}", f"--out_dir={tmp_path / 'out'}", "--max_iters=20"]
    train_here(*options, "--warmup_iters=30", "--eval_interval=20", "--learning_rate=1e-3")
    said = capsys.readouterr().out
    assert "--warmup_iters=30 is more than --max_iters=20: it is 2 in this run" in said
    rates = [line["lr"] for line in log_of(tmp_path / "out")]
    assert max(rates) == rates[2] == 1e-3 and rates[0] < rates[1] < rates[2]
    assert load(tmp_path / "out" / "ckpt.pt")["train_config"]["warmup_iters"] == 2
    train_here(*options, "--overwrite", "--warmup_iters=20", "--eval_interval=20")
    assert "--warmup_iters" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["norm.weight", "pool.values", "blocks.0.attn.qkv.weight"])
def test_weights_that_are_no_numbers_are_refused_by_every_program(out, new, name, capsys):
    """Row 5."""
    checkpoint = load(out / "ckpt.pt")
    checkpoint["model"][name].view(-1)[-1] = float("nan")
    torch.save(checkpoint, out / "ckpt.pt")
    run = f"--out_dir={out}"
    other = f"--out_dir={out / 'other'}"
    for main, arguments in (
        (sample.main, [run, "--temperature=0"]),
        (sample.main, [run, "--recall"]),
        (inspect_slots.main, [run, "--recall"]),
        (inspect_slots.main, [run, "--start=B"]),
        (train.main, ["--resume", run, "--max_iters=9"]),
        (train.main, [f"--init_from={out}", f"--dataset={new}", other]),
        (update.main, [f"--init_from={out}", f"--dataset={new}", other]),
    ):
        said = refusal(main, [*arguments, "--device=cpu"], capsys)
        assert f"{out / 'ckpt.pt'} cannot be used: {name} holds nan" in said


def test_finite_weights_with_infinite_results_are_refused_at_temperature_0(out, capsys):
    """Row 5: as at any other temperature."""
    checkpoint = load(out / "ckpt.pt")
    checkpoint["model"]["norm.weight"].fill_(3e38)
    torch.save(checkpoint, out / "ckpt.pt")
    for options in (["--temperature=0"], ["--temperature=0.8"], ["--recall"]):
        said = refusal(sample.main, [f"--out_dir={out}", "--device=cpu", *options], capsys)
        assert "cannot be sampled from (the logits are not finite)" in said


def test_a_path_may_have_a_comma(finished, new, tmp_path, capsys):
    """Row 6: the printed command works."""
    folder = tmp_path / "lr=1e-3,k=16"
    teach(finished, new, folder, "--slots=9")
    command = re.search(r"Next: python sample.py (.*)", capsys.readouterr().out)[1]
    sample.main(shlex.split(command))
    assert "of 18" in capsys.readouterr().out


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs Linux")
def test_as_many_workers_as_cores_that_may_be_used():
    """Row 8."""
    command = ["taskset", "-c", "0", sys.executable, "data/openwebtext/prepare.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "one for each core that it may use, 1)" in " ".join(done.stdout.split()), done.stderr


@pytest.mark.slow
def test_a_tilde_is_the_home_folder_in_every_path(facts, new, tmp_path, monkeypatch, capsys):
    """Row 9: the shell does not expand it after --option="""
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    shutil.copytree(facts, tmp_path / "home" / "facts")
    shutil.copytree(new, tmp_path / "home" / "new")
    (tmp_path / "home" / "text").write_text("Bordan Fagar is here, as everybody knows. " * 9)
    (tmp_path / "home" / "questions").write_text("Bordan is\there\n")
    train_here(*SMALL, "--dataset=~/facts", "--out_dir=~/run")
    train_here(
        "--init_from=~/run",
        "--dataset=~/new",
        "--background=~/facts",
        "--out_dir=~/tuned",
        "--max_iters=1",
    )
    teach("~/run", "~/new", "~/taught", "--background=~/facts", "--slots=9")
    sample.main(["--out_dir=~/run", "--delta=~/taught/delta.pt", "--start=FILE:~/text", *SHORT])
    sample.main(["--out_dir=~/run", "--recall", "--dataset=~/facts"])
    inspect_slots.main(["--out_dir=~/run", "--dataset=~/facts", "--max_new_tokens=1"])
    prepare_here("facts", "--people=3", "--out=~/three")
    files = [
        "--file=~/text",
        "--val_file=~/text",
        "--questions=~/questions",
        "--vocabulary_of=~/run",
    ]
    prepare_here("shakespeare", *files, "--out=~/own")
    given = "--batch_size=2 --block_size=32 --n_layer=2 --n_head=2 --n_embd=32 --max_iters=2 --eval_iters=1"
    systems = ["--systems=dense", "--seeds=1", "--device=cpu", *given.split()]
    compare.main(["--dataset=~/facts", "--out_dir=~/compared", *systems])
    assert not list((tmp_path / "here").iterdir())
    names = {path.name for path in (tmp_path / "home").iterdir()}
    assert {"run", "tuned", "taught", "three", "own", "compared"} <= names


def train_without_a_compiler(*arguments):
    os.environ["PATH"] = str(Path(sys.executable).parent)
    os.environ["CXX"] = "no-such-compiler"
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(arguments[-1]))
    run_train(*arguments[:-1])


@pytest.mark.slow
def test_a_missing_compiler_is_one_line(facts, tmp_path):
    """Row 11."""
    options = [*SMALL, f"--dataset={facts}", f"--out_dir={tmp_path / 'out'}", "--compile=true"]
    process = Process(train_without_a_compiler, *options, tmp_path / "cache")
    _, errors = process.communicate()
    last = errors.strip().splitlines()[-1]
    assert process.returncode == 1 and "Traceback" not in errors
    assert "torch.compile failed" in last and "compiler" in last and "--compile=false" in last


def test_a_missing_compiler_of_triton_is_one_line(tmp_path, monkeypatch):
    """Row 11's neighbour: Triton needs a C compiler, with and without torch.compile."""
    build = pytest.importorskip("triton.runtime.build")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    parameters = inspect.signature(build._build).parameters.values()
    lists = [() for parameter in parameters if parameter.default is parameter.empty][3:]
    with pytest.raises(UserError, match="install one, such as gcc"), explain_compile_errors():
        build._build("name", "name.c", str(tmp_path), *lists)


@pytest.mark.parametrize(
    "main, option",
    [
        (sample.main, "--start=--"),
        (inspect_slots.main, "--start=--"),
        (train.main, "--out_dir=--"),
        (update.main, "--dataset=--"),
        (text_prepare.main, "--file=--"),
        (facts_prepare.main, "--out=--"),
        (curves.main, "--out=--"),
        (compare.main, "--systems=--"),
    ],
)
def test_two_dashes_are_no_value(main, option, capsys):
    """Row 13."""
    assert f"{option}: -- cannot be a value" in refusal(main, [option], capsys)


@pytest.mark.parametrize(
    "main, option, hint",
    [
        (sample.main, "--temprature=1", "did you mean --temperature?"),
        (inspect_slots.main, "--rowz=1", "did you mean --rows?"),
        (facts_prepare.main, "--peeple=1", "did you mean --people?"),
        (text_prepare.main, "--fil=x", "did you mean --file?"),  # not taken for --file
    ],
)
def test_unknown_options_get_a_hint(main, option, hint, capsys):
    """Row 13's neighbours: all programs share a parser."""
    assert f"there is no option {option}; {hint}" in refusal(main, [option], capsys)


def test_the_folder_above_is_not_one_in_data(facts, tmp_path, monkeypatch):
    """Row 13."""
    shutil.copytree(facts, tmp_path / "above")
    (tmp_path / "above" / "here").mkdir()
    monkeypatch.chdir(tmp_path / "above" / "here")
    assert find_folder("..").resolve() == (tmp_path / "above").resolve()


# --- what was prepared anew -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A dataset of 3 MiB, and a run that was trained on it."""
    folder = tmp_path_factory.mktemp("large")
    ids = np.random.default_rng(0).integers(0, 256, 3 * 2**19).astype("<u2")
    (folder / "data").mkdir()
    ids.tofile(folder / "data" / "train.bin")
    ids[:9000].tofile(folder / "data" / "val.bin")
    meta = {"encoding": "vocab.json", "dtype": "uint16", "vocab_size": 256, "separator": 10}
    (folder / "data" / "meta.json").write_text(json.dumps(meta))
    (folder / "data" / "vocab.json").write_text(json.dumps(text_prepare.BYTES))
    (folder / "data" / "recall.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    train_here(*SMALL, f"--dataset={folder / 'data'}", f"--out_dir={folder / 'out'}")
    return folder


@pytest.mark.parametrize("place", [2**20 + 5, 3 * 2**20 - 2])
def test_data_of_the_same_size_and_beginning_are_other_data(large, tmp_path, capsys, place):
    """Row 7: one token after the first MiB."""
    data = tmp_path / "data"
    out = tmp_path / "out"
    shutil.copytree(large / "data", data)
    train_here(*SMALL, f"--dataset={data}", f"--out_dir={out}")
    content = bytearray((data / "train.bin").read_bytes())
    content[place // 2 * 2] ^= 1
    (data / "train.bin").write_bytes(content)
    tuned = [f"--init_from={out}", f"--dataset={large / 'data'}", f"--out_dir={tmp_path / 'tuned'}"]
    for main, arguments in (
        (train.main, ["--resume", f"--out_dir={out}", "--max_iters=6"]),
        (sample.main, ["--recall", f"--out_dir={out}"]),
        (inspect_slots.main, ["--start=B", f"--out_dir={out}"]),
        (train.main, tuned),  # data is its background
        (update.main, tuned),
    ):
        assert "trained on" in refusal(main, arguments, capsys)


def test_a_large_file_is_hashed_in_blocks_all_over_it(tmp_path, monkeypatch):
    """Row 7: a text that changes once has other tokens from there on."""
    import data.dataset as it

    monkeypatch.setattr(it, "BLOCK", 64)
    monkeypatch.setattr(it, "BLOCKS", 100)
    ids = np.random.default_rng(0).integers(0, 256, 100_000).astype("<u2")
    ids.tofile(tmp_path / "val.bin")
    ids.tofile(tmp_path / "train.bin")
    before = it.Dataset(tmp_path).fingerprint()
    for place in (0, 40_000, 98_500):
        np.concatenate([ids[:place], [7], ids[place:-1]]).astype("<u2").tofile(
            tmp_path / "train.bin"
        )
        assert it.Dataset(tmp_path).fingerprint() != before
    ids.tofile(tmp_path / "train.bin")
    assert it.Dataset(tmp_path).fingerprint() == before


def test_the_background_of_a_resumed_run_is_the_same(facts, finished, new, tmp_path, capsys):
    """Row 17."""
    shutil.copytree(facts, tmp_path / "facts")
    out = f"--out_dir={tmp_path / 'tuned'}"
    background = f"--background={tmp_path / 'facts'}"
    train_here(f"--init_from={finished}", f"--dataset={new}", out, background, "--max_iters=2")
    resume = ["--resume", out, "--max_iters=4"]
    for other in (f"--background={new}", "--background="):
        said = refusal(train.main, [*resume, other], capsys)
        assert f"{other}: not what the run in {tmp_path / 'tuned'} was evaluated on" in said
    before = contents(tmp_path / "tuned")
    content = bytearray((tmp_path / "facts" / "val.bin").read_bytes())
    content[-2] ^= 1
    (tmp_path / "facts" / "val.bin").write_bytes(content)
    said = refusal(train.main, resume, capsys)
    assert f"{background}: not what the run" in said and contents(tmp_path / "tuned") == before
    content[-2] ^= 1
    (tmp_path / "facts" / "val.bin").write_bytes(content)
    train_here(*resume)


def flip_numbers(path):
    """Change one number in a file of torch.save, and not its format."""
    saved = load(path)
    content = bytearray(path.read_bytes())
    place = content.find(saved["positions"][3].numpy().tobytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_readers_that_changed_on_the_disk_are_made_anew(out, capsys):
    """Row 19."""
    arguments = [f"--out_dir={out}", "--start=B", "--max_new_tokens=2"]
    inspect_slots.main(arguments)
    shown = capsys.readouterr().out
    whole = (out / "readers.pt").read_bytes()
    for damage in (flip_numbers, lambda path: path.write_bytes(whole[: len(whole) // 2])):
        damage(out / "readers.pt")
        inspect_slots.main(arguments)
        said = capsys.readouterr()
        assert said.out == shown and "readers.pt is damaged" in said.err
        assert (out / "readers.pt").read_bytes() == whole


# --- while programs run -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_bar_in_a_file_is_a_line_now_and_then():
    """Row 12."""
    code = """
import time
from runtime.bars import Bar
for _ in Bar(range(150), "work"):
    time.sleep(0.01)
for _ in Bar(range(30), "short", leave=False):
    time.sleep(0.01)
bar = Bar(total=3)
bar.write("a word")
bar.close()
"""
    done = run("-c", code)
    assert done.returncode == 0 and "\r" not in done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) <= 6 and all(lines) and lines[-1].startswith("  0%")
    assert any(line.startswith("work: 100%") for line in lines)
    assert done.stdout == "a word\n"


def test_no_program_has_another_bar():
    """Row 12: they all use the one that knows of files."""
    for path in ROOT.rglob("*.py"):
        if path.parent.name != "tests" and path.name != "bars.py":
            assert "tqdm" not in path.read_text(), path


def test_a_bar_on_a_terminal_is_one_line(monkeypatch, capsys):
    """Row 12."""
    with monkeypatch.context() as patch:
        patch.setattr(sys.stderr, "isatty", lambda: True)
        list(Bar(range(9), "work", mininterval=0))
    assert capsys.readouterr().err.count("\n") == 1


def train_with_hangup_ignored(*arguments):
    """As nohup starts a program."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    run_train(*arguments)


@pytest.mark.parametrize("function", [run_train, train_with_hangup_ignored])
def test_a_closed_terminal_ends_a_run_as_sigterm_does(facts, tmp_path, function):
    """Row 14."""
    options = [
        *SMALL,
        f"--dataset={facts}",
        f"--out_dir={tmp_path}",
        "--max_iters=1000000",
        "--eval_interval=1000000",
    ]
    process = Process(function, *options)
    wait_until(lambda: steps_done(tmp_path) > 2, process)
    process.send_signal(signal.SIGHUP)
    if function is train_with_hangup_ignored:
        steps = steps_done(tmp_path)
        wait_until(lambda: steps_done(tmp_path) > steps + 2, process)
        process.kill()
        process.communicate()
        return
    said, errors = process.communicate()
    assert process.returncode == 128 + signal.SIGHUP and "Stopped by SIGHUP" in said, errors
    assert load(tmp_path / "ckpt.pt")["iter"] == steps_done(tmp_path)


# --- updates ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option, words",
    [
        ("--mem_learning_rate=1", "did you mean --learning_rate?"),
        ("--grad_clip=1", "there is no option --grad_clip"),
        ("--min_lr=1", "there is no option --min_lr"),
        ("--choose_by=reads", "--choose_by=reads: without --slots, all slots can change"),
    ],
)
def test_an_option_without_effect_is_refused(finished, new, tmp_path, capsys, option, words):
    """Row 15."""
    names = [f"--init_from={finished}", f"--dataset={new}", f"--out_dir={tmp_path / 'out'}"]
    assert words in refusal(update.main, [*names, option], capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "main, options",
    [
        (sample.main, ["--recall", "--start=B"]),
        (sample.main, ["--recall", "--max_new_tokens=3"]),
        (sample.main, ["--recall", "--temperature=0.5"]),
        (sample.main, ["--recall", "--top_k=3"]),
        (sample.main, ["--rows=3"]),
        (sample.main, ["--dataset=facts"]),
        (inspect_slots.main, ["--recall", "--start=B"]),
        (inspect_slots.main, ["--recall", "--max_new_tokens=3"]),
        (inspect_slots.main, ["--rows=3"]),
    ],
)
def test_an_option_without_effect_is_refused_elsewhere(finished, capsys, main, options):
    """Row 15's neighbours."""
    said = refusal(main, [f"--out_dir={finished}", *options], capsys)
    assert f"{options[-1]}: " in said and "--recall" in said


@pytest.mark.parametrize(
    "options, rate",
    [
        ([], 1.0),
        (["--learning_rate=0.25"], 0.25),
        (["--optimizer=rowadam"], 0.02),  # of the run
        (["--optimizer=rowadam", "--learning_rate=0.25"], 0.25),
    ],
)
def test_the_log_of_an_update_has_the_rate_that_moves_the_values(
    finished, new, tmp_path, options, rate
):
    """Row 15."""
    teach(finished, new, tmp_path / "out", *options)
    first, *lines = log_of(tmp_path / "out")
    assert "lr" not in first and [line["lr"] for line in lines] == [rate, rate]


@pytest.mark.parametrize("option", ["--moved=1", "--new=1", "--moved=2", "--people=1"])
def test_facts_are_long_enough_at_any_count(tmp_path, option):
    """Row 16: for the block of the facts presets."""
    prepare_here(
        "facts", *([] if "people" in option else ["--people=9"]), option, "--out", tmp_path
    )
    val = Dataset(tmp_path).tokens("val")
    assert len(val) >= 20 * 64
    train_here(
        *SMALL,
        f"--dataset={tmp_path}",
        f"--out_dir={tmp_path / 'out'}",
        "--block_size=64",
        "--max_iters=1",
    )


@pytest.fixture(scope="module")
def taught(finished, new, tmp_path_factory):
    out = tmp_path_factory.mktemp("taught") / "out"
    teach(finished, new, out, "--slots=9")
    return out


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda rows, values: (rows[[0, 0, *range(2, 9)]], values), "not increasing"),
        (lambda rows, values: (rows.flip(0), values), "not increasing"),
        (
            lambda rows, values: (
                torch.zeros(256, dtype=torch.bool).index_fill(0, rows, True),
                values,
            ),
            "not increasing",
        ),
        (lambda rows, values: (rows[None], values), "not increasing"),
        (lambda rows, values: (rows.int(), values), "not increasing"),
        (lambda rows, values: (rows[:0], values[:0]), "out of range"),
        (lambda rows, values: (rows, values[:1]), "its values are"),
        (lambda rows, values: (rows, values[:, :1]), "its values are"),
        (lambda rows, values: (rows, values[0]), "its values are"),
        (lambda rows, values: (rows, values.double()), "its values are"),
        (lambda rows, values: (rows, values * float("inf")), "not finite"),
    ],
)
def test_a_delta_with_the_right_hash_and_wrong_contents_is_refused(
    finished, taught, tmp_path, capsys, change, words
):
    """Row 18."""
    delta = load(taught / "delta.pt")
    rows, values = change(delta["rows"], delta["values"])
    tensors = {"rows": rows, "values": values}
    path = tmp_path / "wrong.pt"
    torch.save({**delta, **tensors, "hash": weights_hash(tensors)}, path)
    for main in (sample.main, inspect_slots.main):
        said = refusal(main, [f"--out_dir={finished}", f"--delta={path}", "--start=B"], capsys)
        assert f"{path} is damaged" in said and words in said


def test_a_name_cannot_command_a_terminal(finished, taught, tmp_path, capsys):
    """Row 18: nor any other text of an error."""
    delta = load(taught / "delta.pt")
    path = tmp_path / "wrong.pt"
    torch.save({**delta, "base": "other", "name": "\x1b[2Jtaught\x9b\x07\r"}, path)
    said = refusal(sample.main, [f"--out_dir={finished}", f"--delta={path}"], capsys)
    assert "taught" in said and not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", said)


def test_a_delta_may_be_a_folder(finished, taught, capsys):
    """Row 18."""
    said = []
    for delta in (taught, taught / "delta.pt"):
        sample.main([f"--out_dir={finished}", f"--delta={delta}", "--temperature=0", *SHORT])
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != ""


@pytest.mark.parametrize("option", ["--moved=4", "--new=4"])
def test_people_that_belong_to_others_are_refused(finished, tmp_path, capsys, option):
    """Row 20."""
    for number, (people, seed) in enumerate(((10, 0), (9, 1))):
        data = tmp_path / f"data{number}"
        prepare_here("facts", f"--people={people}", f"--seed={seed}", option, "--out", data)
        names = [f"--init_from={finished}", f"--dataset={data}", f"--out_dir={tmp_path / 'out'}"]
        for main in (train.main, update.main):
            said = refusal(main, names, capsys)
            theirs = f"belongs to facts of {people} people with --seed={seed}"
            assert f"{theirs}, not of 9 people with --seed=0" in said
            assert "prepare it again with --people=9 --seed=0" in said
    assert not (tmp_path / "out" / "ckpt.pt").exists()


# --- neighbours without a row -----------------------------------------------------------------------------------------


def test_a_missing_file_is_named_without_its_number(finished, tmp_path, capsys):
    arguments = [f"--out_dir={finished}", f"--start=FILE:{tmp_path}/none"]
    assert f"{tmp_path}/none: No such file" in refusal(sample.main, arguments, capsys)


def test_a_shape_that_cannot_change_is_named_first(finished, new, tmp_path, capsys):
    """Although its memory would not fit either."""
    names = [f"--init_from={finished}", f"--dataset={new}", f"--out_dir={tmp_path / 'out'}"]
    said = refusal(train.main, [*names, "--n_layer=1"], capsys)
    assert "--n_layer=1: the run in" in said and "keeps --n_layer=2" in said
    assert "--batch_size=0: must be" in refusal(train.main, [*names, "--batch_size=0"], capsys)


@pytest.mark.parametrize(
    "prompt, words",
    [
        ([[1, 2]], "must be a tensor"),
        (torch.ones(3, dtype=torch.int64), r"must be token ids \(B, T\)"),
        (torch.ones(1, 3), "int64, not .*float32"),
        (torch.ones(1, 0, dtype=torch.int64), "has no tokens"),
        (torch.full((1, 3), 50), "the last token is 49"),  # its embedding has 64 rows
        (torch.tensor([[3, -1]]), "ids -1 to 3"),
    ],
)
def test_a_prompt_that_is_none_is_refused(prompt, words):
    config = GPTConfig(vocab_size=50, block_size=8, n_layer=1, n_head=1, n_embd=8)
    with pytest.raises(ValueError, match=words):
        GPT(config).generate(prompt, 3)


# --- kernels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
def test_frozen_values_get_no_gradient(compiled):
    """Row 21: frozen between forward and backward pass, or before the step."""
    torch._dynamo.reset()
    pool = ValuePool(64, 8)
    layer = MemoryLayer(8, 64, heads=1, topk=2)
    optimizer = RowAdam(pool, lr=0.1)

    def loss(x):
        return layer(x, pool).square().sum()

    if compiled:
        loss = torch.compile(loss, backend="aot_eager")
    x = torch.randn(5, 8)
    before = pool.values.clone()

    y = loss(x)
    pool.requires_grad_(False)
    y.backward()
    assert compiled or not pool.touched.any()
    optimizer.step()
    assert torch.equal(pool.values, before) and not pool.touched.any()

    pool.requires_grad_(True)
    loss(x).backward()
    assert pool.touched.any()
    pool.requires_grad_(False)
    optimizer.step()
    assert torch.equal(pool.values, before) and not pool.touched.any()
    assert not pool.gradient.any()

    pool.requires_grad_(True)
    loss(x).backward()
    optimizer.step()
    assert not torch.equal(pool.values, before)


def wrong_accumulators():
    yield torch.zeros(8, 16).t(), torch.zeros(16, dtype=torch.uint8)
    yield torch.zeros(16, 9)[:, :8], torch.zeros(16, dtype=torch.uint8)
    yield torch.zeros(15, 8), torch.zeros(16, dtype=torch.uint8)
    yield torch.zeros(16, 8, dtype=torch.bfloat16), torch.zeros(16, dtype=torch.uint8)
    yield torch.zeros(16, 8, device="meta"), torch.zeros(16, dtype=torch.uint8)
    yield torch.zeros(16, 8), torch.zeros(16)
    yield torch.zeros(16, 8), torch.zeros(15, dtype=torch.uint8)
    yield torch.zeros(16, 8), torch.zeros(32, dtype=torch.uint8)[::2]


@pytest.mark.parametrize("gradient, touched", list(wrong_accumulators()))
def test_an_accumulator_that_does_not_fit_is_refused(gradient, touched):
    """Row 22: the Triton path would add to wrong places."""
    values = torch.randn(16, 8, requires_grad=True)
    indices = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"(gradient|touched) \(.*must be \(16"):
        collecting_lookup(values, indices, torch.ones(2, 3), gradient, touched)


def test_values_that_are_not_contiguous_are_refused():
    """Row 22's neighbour: the optimiser's kernel writes to wrong places."""
    pool = ValuePool(16, 8)
    pool.values = torch.nn.Parameter(torch.randn(8, 16).t())
    with pytest.raises(ValueError, match="contiguous"):
        RowAdam(pool)
