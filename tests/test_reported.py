"""Faults that reports about other projects point to: each was tried here, and was one here, too."""

import inspect
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from test_openwebtext import pack

import kernels
import sample
import train
from bench import compare, curves
from data.dataset import Dataset, describe_vocabulary, find_folder, make_encoding, write_dataset
from data.facts import prepare as facts_prepare
from data.openwebtext.prepare import list_parts, tokenize
from data.shakespeare import prepare as text_prepare
from edit import inspect_slots, update
from edit.delta import weights_hash
from helpers import (
    ROOT,
    SMALL,
    SYSTEMS,
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
from systems.peer import NeuronPool, dot

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


def test_a_printed_command_works_for_any_folder(facts, tmp_path):
    """Rows 2 and 6: its name is printed as it is."""
    folder = tmp_path / os.fsdecode(b"caf\xe9, 'k=16' \xc3\xa9")
    said, errors = start_program(
        "train.py", *SMALL, f"--dataset={facts}", f"--out_dir={folder}"
    ).communicate()
    command = re.search(r"Next: python (.*)", said)[1]
    process = start_program(*shlex.split(command), "--rows=1", "--device=cpu")
    said, errors = process.communicate()
    assert process.returncode == 0 and "of 54" in said, errors


def test_a_picture_is_well_formed_whatever_the_folder_is_called(finished, tmp_path, capsys):
    """Row 2."""
    folder = tmp_path / "esc\x1b[31m<&>"
    shutil.copytree(finished, folder)
    curves.main([str(folder), f"--out={tmp_path / 'curves.svg'}"])
    xml.etree.ElementTree.parse(tmp_path / "curves.svg")


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


def test_other_files_and_options_are_read_like_texts(facts, tmp_path):
    """Row 3."""
    assert sample.read_text("a\r\nb") == "a\nb"
    shutil.copytree(facts, tmp_path / "data")
    before = Dataset(facts)
    for name in ("meta.json", "vocab.json", "recall.jsonl"):
        path = tmp_path / "data" / name
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    after = Dataset(tmp_path / "data")
    assert after.vocabulary() == before.vocabulary() and after.questions() == before.questions()


def test_lines_end_where_an_editor_ends_them(tmp_path):
    """Row 3: other separators are part of a line."""
    (tmp_path / "questions").write_text("a\x0cb\tc\x85d\u2028\n")
    (question,) = text_prepare.read_questions(tmp_path / "questions")
    assert question == {"prompt": "a\x0cb", "answer": "c\x85d"}


def test_bytes_that_are_no_text_stay_as_they_are(tmp_path):
    """Row 3: the rule is one for text."""
    for number, data in enumerate(
        (bytes(range(256)) + b"\r\n" * 9, "line\r\n".encode("utf-16-le") * 9)
    ):
        out = tmp_path / str(number)
        (tmp_path / "file").write_bytes(data)
        prepare_here("shakespeare", f"--file={tmp_path / 'file'}", "--out", out)
        splits = [Dataset(out).tokens(split).astype(np.uint8) for split in ("train", "val")]
        assert b"".join(map(bytes, splits)) == data


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


@pytest.mark.parametrize("line", ["这是一行没有空格的文字。\n", '{"a":1}\n', "x", " \n "])
def test_pieces_are_short_in_texts_of_all_kinds(tmp_path, monkeypatch, line):
    """Row 10."""
    monkeypatch.setattr(text_prepare, "PIECE", 100)
    (tmp_path / "text").write_text(line * 1000)
    pieces = list(text_prepare.read_pieces(tmp_path / "text"))
    assert "".join(pieces) == line * 1000
    if line.strip() and "\n" in line:
        assert max(map(len, pieces)) <= 120


def test_a_vocabulary_with_tokens_of_several_words_gives_the_tokens_of_the_whole(
    facts, tmp_path, monkeypatch
):
    """Row 10: nobody knows where such tokens end, so the text is not cut."""
    monkeypatch.setattr(text_prepare, "PIECE", 20)
    tokens = [bytes([i]) for i in range(256)] + [
        b"Ne",
        b"New",
        b"New ",
        b"New Y",
        b"New Yo",
        b"New Yor",
        b"New York",
    ]
    vocabulary = describe_vocabulary("own", r"[^,\n]+|[,\n] ?", tokens, {})
    ids = list(range(100)) * 9
    write_dataset(tmp_path / "data", ids, ids, vocabulary, separator=10)
    train_here(
        *SMALL, f"--dataset={tmp_path / 'data'}", f"--out_dir={tmp_path / 'out'}", "--max_iters=1"
    )
    (tmp_path / "text").write_text("New York, " * 999)
    prepare_here(
        "shakespeare",
        f"--file={tmp_path / 'text'}",
        f"--vocabulary_of={tmp_path / 'out'}",
        "--out",
        tmp_path / "own",
    )
    dataset = Dataset(tmp_path / "own")
    got = [*dataset.tokens("train").tolist(), *dataset.tokens("val").tolist()]
    assert got[1:] == make_encoding(vocabulary).encode_ordinary("New York, " * 999)


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
    out = tmp_path / "out"
    options = [*SMALL, f"--dataset={facts}", f"--out_dir={out}", "--max_iters=20"]
    for warmup in (30, 20):  # in 20 steps, the rate of the last one would be 20/21 of the largest
        train_here(
            *options,
            f"--warmup_iters={warmup}",
            "--eval_interval=20",
            "--learning_rate=1e-3",
            "--overwrite",
        )
        said = capsys.readouterr().out
        assert f"--warmup_iters={warmup} does not fit in 20 steps: the warmup has 2" in said
        rates = [line["lr"] for line in log_of(out)]
        assert max(rates) == rates[2] == 1e-3 and rates[0] < rates[1] < rates[2]
    assert load(out / "ckpt.pt")["train_config"]["warmup_iters"] == 20  # for a longer run
    train_here("--resume", f"--out_dir={out}", "--max_iters=80", "--eval_interval=80")
    assert log_of(out)[20]["lr"] == pytest.approx(1e-3)
    capsys.readouterr()
    train_here(*options, "--overwrite", "--warmup_iters=19", "--eval_interval=20")
    assert "--warmup_iters" not in capsys.readouterr().out
    assert log_of(out)[-1]["lr"] == pytest.approx(4e-3)


def test_a_resumed_run_says_that_its_warmup_is_shortened(out, capsys):
    """Row 4."""
    train_here("--resume", f"--out_dir={out}", "--max_iters=8", "--warmup_iters=5000")
    assert (
        "--warmup_iters=5000 does not fit in 8 steps: the warmup has 0" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "options, words",
    [
        (["--mem_decay=0.5"], "--mem_decay=0.5: must be 0, or at least 1"),
        (
            ["--mem_decay=1", "--min_lr=1e-4", "--mem_learning_rate=1e-5"],
            "--min_lr=0.0001: more than --mem_decay times --mem_learning_rate",
        ),
        (["--warmup_iters=-1"], "--warmup_iters=-1: must be at least 0"),
    ],
)
def test_a_rate_that_rises_is_refused(facts, tmp_path, capsys, options, words):
    """Row 4's neighbours: the rate of the memory."""
    names = [f"--dataset={facts}", f"--out_dir={tmp_path / 'out'}"]
    assert words in refusal(train.main, [*SMALL, *names, *options], capsys)


def test_the_command_that_prepare_prints_is_not_refused(facts, tmp_path, capsys):
    """Row 4: for a run with a larger min_lr."""
    base = tmp_path / "base"
    train_here(*SMALL, f"--dataset={facts}", f"--out_dir={base}", "--min_lr=5e-4")
    (tmp_path / "text").write_text("Bordan Fagar is here, as everybody knows. " * 9)
    prepare_here(
        "shakespeare",
        f"--file={tmp_path / 'text'}",
        f"--vocabulary_of={base}",
        "--out",
        tmp_path / "own",
    )
    command = re.search(r"python train.py (.*)", capsys.readouterr().out)[1]
    train_here(*shlex.split(command), f"--out_dir={tmp_path / 'tuned'}")
    assert log_of(tmp_path / "tuned")[-1]["iter"] == 100


@pytest.mark.parametrize("place", ["train", "update"])
def test_a_run_that_diverges_in_an_evaluated_step_says_so(facts, new, tmp_path, capsys, place):
    """Row 5: before the questions are asked, which infinite weights cannot answer."""
    rates = [
        "--learning_rate=1e20",
        "--mem_learning_rate=1e20",
        "--warmup_iters=0",
        "--eval_interval=1",
    ]
    names = [
        f"--dataset={facts}",
        f"--out_dir={tmp_path / 'out'}",
        "--system=peer",
        "--mem_gate=false",
    ]
    if place == "train":
        said = refusal(train.main, [*SMALL, *names, *rates], capsys)
    else:
        train_here(*SMALL, *names)
        (tmp_path / "new").mkdir()
        for path in new.glob("*[!l]"):  # without recall.jsonl
            shutil.copy(path, tmp_path / "new")
        names = [
            f"--init_from={tmp_path / 'out'}",
            f"--dataset={tmp_path / 'new'}",
            f"--out_dir={tmp_path / 'taught'}",
        ]
        said = refusal(
            update.main,
            [*names, "--background=", "--learning_rate=1e30", "--eval_interval=1", "--device=cpu"],
            capsys,
        )
    assert "training has diverged. Try a smaller --learning_rate" in said
    assert ("(now 1e+20) or --mem_learning_rate (now 1e+20)" in said) == (place == "train")


def test_slots_that_were_chosen_by_infinite_scores_are_not_shown(out, capsys):
    """Row 5."""
    checkpoint = load(out / "ckpt.pt")
    checkpoint["model"]["blocks.1.ffn.query.weight"].fill_(3e38)
    torch.save(checkpoint, out / "ckpt.pt")
    for options in (["--recall"], ["--recall", "--json"], ["--start=B"]):
        said = refusal(inspect_slots.main, [f"--out_dir={out}", "--device=cpu", *options], capsys)
        assert "finite" in said


@pytest.mark.parametrize(
    "number, name, value",
    [
        (0, "exp_avg", float("nan")),
        (1, "means", float("inf")),
        (0, "exp_avg_sq", -1.0),
        (1, "squares", float("inf")),
    ],
)
def test_moments_that_are_no_numbers_are_refused(out, capsys, number, name, value):
    """Row 5: the weights are fine, but would not be after a step."""
    checkpoint = load(out / "ckpt.pt")
    checkpoint["optimizers"][number]["state"][0][name].view(-1)[-1] = value
    torch.save(checkpoint, out / "ckpt.pt")
    said = refusal(train.main, ["--resume", f"--out_dir={out}", "--max_iters=9"], capsys)
    assert "its optimisers have a wrong state" in said and name in said


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
    two = f"--delta={folder}/delta.pt,{folder}/delta.pt"
    assert "give --delta again for each file" in refusal(
        sample.main, [f"--out_dir={finished}", two], capsys
    )


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


def test_a_value_may_end_in_two_dashes(finished, capsys):
    """Row 13."""
    sample.main([f"--out_dir={finished}", "--start=a=--", *SHORT])
    assert capsys.readouterr().out.startswith("a=--")


def test_an_empty_name_is_not_the_default(finished, capsys):
    """Row 13's neighbour: an unset variable."""
    for main, option in (
        (sample.main, "--dataset="),
        (inspect_slots.main, "--dataset="),
        (sample.main, "--out_dir="),
    ):
        said = refusal(main, [f"--out_dir={finished}", "--recall", option], capsys)
        assert f"{option[:-1]}: must name" in said


@pytest.mark.parametrize(
    "main, option, hint",
    [
        (sample.main, "--temprature=1", "did you mean --temperature?"),
        (inspect_slots.main, "--rowz=1", "did you mean --rows?"),
        (facts_prepare.main, "--peeple=1", "did you mean --people?"),
        (facts_prepare.main, "--bio=2", "did you mean --biographies?"),
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
    said = refusal(train.main, [*resume, f"--background={new}"], capsys)
    assert f"--background={new}: not what the run in {tmp_path / 'tuned'} was evaluated on" in said
    before = contents(tmp_path / "tuned")
    content = bytearray((tmp_path / "facts" / "val.bin").read_bytes())
    content[-2] ^= 1
    (tmp_path / "facts" / "val.bin").write_bytes(content)
    said = refusal(train.main, resume, capsys)
    assert f"{background}: not what the run" in said and contents(tmp_path / "tuned") == before
    content[-2] ^= 1
    (tmp_path / "facts" / "val.bin").write_bytes(content)
    train_here(*resume)
    shutil.rmtree(tmp_path / "facts")  # one can do without it
    train_here("--resume", out, "--max_iters=6", "--background=")
    assert "old_val_loss" not in log_of(tmp_path / "tuned")[-1]


def test_the_questions_of_a_background_are_the_same(facts, finished, new, tmp_path, capsys):
    """Row 17: or old_recall would mean something else."""
    shutil.copytree(facts, tmp_path / "facts")
    out = f"--out_dir={tmp_path / 'tuned'}"
    background = f"--background={tmp_path / 'facts'}"
    train_here(f"--init_from={finished}", f"--dataset={new}", out, background, "--max_iters=2")
    questions = tmp_path / "facts" / "recall.jsonl"
    whole = questions.read_bytes()
    questions.write_bytes(b"".join(whole.splitlines(keepends=True)[:3]))
    said = refusal(train.main, ["--resume", out, "--max_iters=4"], capsys)
    assert f"{background}: not what the run" in said
    questions.write_bytes(whole)
    train_here("--resume", out, "--max_iters=4")


def test_a_background_is_compared_however_it_is_spelled(facts, new, tmp_path, monkeypatch, capsys):
    """Row 7."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(facts, "mine")
    train_here(*SMALL, "--dataset=mine", "--out_dir=base")
    content = bytearray(Path("mine/val.bin").read_bytes())
    content[-2] ^= 1
    Path("mine/val.bin").write_bytes(content)
    for name in ("mine", "./mine/", str(tmp_path / "mine")):
        options = [
            "--init_from=base",
            f"--dataset={new}",
            f"--background={name}",
            "--out_dir=tuned",
        ]
        for main in (train.main, update.main):
            assert f"--background={name}: not what base was trained on" in refusal(
                main, options, capsys
            )


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


def test_readers_with_the_right_hash_and_wrong_positions_are_made_anew(out, capsys):
    """Row 19: the checkpoint is not blamed."""
    arguments = [f"--out_dir={out}", "--start=B", "--max_new_tokens=2"]
    inspect_slots.main(arguments)
    shown = capsys.readouterr().out
    saved = load(out / "readers.pt")
    for positions in (
        torch.full((256, 8), 9**9),
        torch.full((256, 8), -7),
        torch.zeros(9, 8, dtype=torch.int64),
    ):
        tensors = {"positions": positions, "weights": torch.ones(positions.shape)}
        torch.save({**saved, **tensors, "hash": weights_hash(tensors)}, out / "readers.pt")
        inspect_slots.main(arguments)
        said = capsys.readouterr()
        assert said.out == shown and "readers.pt is damaged" in said.err


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
for i in range(100):
    bar.set_postfix_str("evaluating")
    bar.set_postfix({"loss": i}, more=i)
bar.close()
"""
    done = run("-c", code)
    assert done.returncode == 0 and "\r" not in done.stderr
    lines = done.stderr.splitlines()
    assert (
        len(lines) <= 6 and all(lines) and lines[-1].startswith("  0%") and "loss=99" in lines[-1]
    )
    assert any(line.startswith("work: 100%") for line in lines)
    assert done.stdout == "a word\n"


def test_no_program_has_another_bar():
    """Row 12: they all use the one that knows of files."""
    for path in ROOT.rglob("*.py"):
        if path.parent.name != "tests" and path.name != "bars.py":
            assert "tqdm" not in path.read_text(), path


def test_a_bar_on_a_terminal_is_one_line():
    """Row 12. In a process of its own: a bar that another test has left would put it on line 2."""
    code = """
import io, sys
from runtime.bars import Bar
sys.stderr = io.StringIO()
sys.stderr.isatty = lambda: True
list(Bar(range(9), "work", mininterval=0))
print([sys.stderr.getvalue().count(end) for end in "\\r\\n"])
"""
    done = run("-c", code)
    returns, newlines = json.loads(done.stdout)
    assert returns > 9 and newlines == 1


def test_a_bar_that_ctrl_c_keeps_from_starting_is_quiet():
    """Row 12. Python calls __del__ without __init__, and prints what it raises."""
    bar = Bar.__new__(Bar)
    bar.__del__()


def train_in_a_terminal(*arguments):
    """Also when nohup has started these tests."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    run_train(*arguments)


def train_with_hangup_ignored(*arguments):
    """As nohup starts a program."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    run_train(*arguments)


@pytest.mark.parametrize("function", [train_in_a_terminal, train_with_hangup_ignored])
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


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(temperature=-1), "temperature=-1"),
        (dict(temperature=float("nan")), "temperature=nan"),
        (dict(top_k=0), "top_k=0"),
        (dict(top_p=2), "top_p=2"),
        (dict(top_p=float("nan")), "top_p=nan"),
    ],
)
def test_sampling_that_makes_no_sense_is_refused(options, words):
    config = GPTConfig(vocab_size=50, block_size=8, n_layer=1, n_head=1, n_embd=8)
    with pytest.raises(ValueError, match=words):
        GPT(config).generate(torch.ones(1, 3, dtype=torch.int64), 3, **options)


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


@pytest.mark.parametrize(
    "options, unused",
    [
        (
            ["--mem_count=0", "--mem_learning_rate=7", "--system=peer"],
            "--mem_learning_rate, --system",
        ),
        (["--system=moe", "--mem_layers=1", "--mem_keys=7", "--moe_topk=2"], "--mem_keys"),
        (["--mem_layers=1", "--mem_keys=16", "--mem_topk=4"], None),
        (["--mem_layers=1", "--mem_keys=16", "--mem_topk=4", "--ngram_order=2"], "--ngram_order"),
        (["--ngram_layers=1", "--mem_gate=false", "--mem_learning_rate=1e-3"], "--mem_gate"),
        (["--ngram_layers=", "--ngram=bigram"], "--ngram"),
    ],
)
def test_options_without_effect_are_named(facts, tmp_path, capsys, options, unused):
    """Row 15's neighbours: compare.py gives the same options to all systems, so they are no error."""
    small = [option for option in SMALL if not option.startswith("--mem")]
    train_here(
        *small,
        f"--dataset={facts}",
        f"--out_dir={tmp_path}",
        "--preset=facts-dense",
        "--max_iters=1",
        *options,
    )
    said = capsys.readouterr().out
    if unused is None:
        assert "Without effect" not in said
    else:
        assert f"Without effect in this model: {unused}\n" in said


def test_a_run_and_an_update_do_not_replace_each_other(finished, new, taught, tmp_path, capsys):
    """Row 15's neighbour: --overwrite replaces what the program itself has written."""
    for kind, main, file in ((finished, update.main, "ckpt.pt"), (taught, train.main, "delta.pt")):
        folder = tmp_path / file
        shutil.copytree(kind, folder)
        before = contents(folder)
        names = [
            f"--init_from={finished}",
            f"--dataset={new}",
            f"--out_dir={folder}",
            "--overwrite",
        ]
        said = refusal(main, names, capsys)
        assert f"{folder} holds another program's {file}" in said and contents(folder) == before


@pytest.mark.parametrize("option", ["--moved=1", "--new=1", "--moved=2", "--people=1"])
@pytest.mark.parametrize("more", [[], ["--biographies=1"]])
def test_facts_are_long_enough_at_any_count(tmp_path, option, more):
    """Row 16: for the block of the facts presets."""
    if "people" not in option:
        more = [*more, "--people=9"]
    prepare_here("facts", *more, option, "--out", tmp_path)
    for split in ("train", "val"):
        assert len(Dataset(tmp_path).tokens(split)) >= 20 * 64
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


def test_a_delta_of_another_run_is_not_called_damaged(facts, finished, taught, tmp_path, capsys):
    """Row 18: although it does not fit this run's table."""
    for option in ("--mem_dtype=bfloat16", "--mem_keys=8"):
        other = tmp_path / option
        train_here(*SMALL, f"--dataset={facts}", f"--out_dir={other}", option)
        said = refusal(sample.main, [f"--out_dir={other}", f"--delta={taught}"], capsys)
        assert f"belongs to {finished}/ckpt.pt" in said and "damaged" not in said


def sample_in_little_memory(out):
    """In less than the table takes."""
    limit = 1024 * int(re.search(r"VmData:\s*(\d+)", Path("/proc/self/status").read_text())[1])
    resource.setrlimit(resource.RLIMIT_DATA, (limit + 2**27, limit + 2**27))
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(sample, "choose_device", torch.device)  # which raises the limit
    sample.main([f"--out_dir={out}", "--device=cpu", *SHORT[:2]])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_checkpoint_is_not_blamed_for_short_memory(facts, tmp_path):
    """Row 18."""
    train_here(
        *SMALL,
        f"--dataset={facts}",
        f"--out_dir={tmp_path}",
        "--mem_keys=1200",
        "--max_iters=1",
        "--eval_iters=1",
    )
    process = Process(sample_in_little_memory, tmp_path)
    _, errors = process.communicate()
    assert process.returncode == 1 and "allocate memory" in errors, errors
    assert "damaged" not in errors and "fit together" not in errors and "Traceback" not in errors


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
            assert f"--dataset={data} was made with --people={people} --seed={seed}" in said
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


def test_the_constant_rate_that_is_advised_is_accepted(facts, tmp_path):
    """Row 4: for UltraMem, too, whose values have a rate of their own."""
    options = [
        *SMALL,
        *SYSTEMS["ultramem"],
        f"--dataset={facts}",
        f"--out_dir={tmp_path}",
        "--mem_learning_rate=2e-3",
    ]
    train_here(*options)
    train_here(
        "--resume",
        f"--out_dir={tmp_path}",
        "--max_iters=6",
        "--learning_rate=4e-3",
        "--min_lr=4e-3",
    )


def test_people_are_compared_with_those_that_the_model_knows(finished, facts, tmp_path, capsys):
    """Row 20: not with those of a background, which may be another one, or none."""
    for people in (9, 10):
        prepare_here(
            "facts", f"--people={people}", "--moved=4", "--out", tmp_path / f"moved{people}"
        )
    prepare_here("facts", "--people=10", "--out", tmp_path / "ten")
    right, wrong = (f"--dataset={tmp_path / name}" for name in ("moved9", "moved10"))
    tuned = tmp_path / "tuned"
    train_here(
        f"--init_from={finished}",
        right,
        f"--background={tmp_path / 'ten'}",
        f"--out_dir={tuned}",
        "--max_iters=1",
    )
    for base in (finished, tuned):  # tuned knows moved people of the same
        names = [f"--init_from={base}", wrong, f"--out_dir={tmp_path / 'out'}"]
        for more in ([], ["--background="], [f"--background={tmp_path / 'ten'}"]):
            for main in (train.main, update.main):
                assert "prepare it again with --people=9 --seed=0" in refusal(
                    main, [*names, *more], capsys
                )
        said = refusal(sample.main, [f"--out_dir={base}", "--recall", wrong], capsys)
        assert "prepare it again with --people=9 --seed=0" in said
    train_here(f"--init_from={tuned}", right, f"--out_dir={tmp_path / 'again'}", "--max_iters=1")


@pytest.mark.parametrize("known", [5, {}, {"people": "9"}, [9]])
def test_a_meta_json_that_names_no_people_is_no_error(finished, new, tmp_path, known):
    """Row 20's neighbour."""
    shutil.copytree(new, tmp_path / "new")
    meta = json.loads((new / "meta.json").read_text())
    (tmp_path / "new" / "meta.json").write_text(json.dumps({**meta, "known": known}))
    names = [f"--init_from={finished}", f"--dataset={tmp_path / 'new'}"]
    train_here(*names, f"--out_dir={tmp_path / 'out'}", "--max_iters=1")
    assert log_of(tmp_path / "out")[-1]["iter"] == 1


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


@pytest.mark.parametrize("system", ["memory", "peer", "ultramem"])
def test_frozen_values_of_any_system_collect_nothing(system):
    """Row 21: frozen between the passes, and free again before the step."""
    options = dict(
        vocab_size=64,
        n_layer=2,
        n_head=2,
        n_embd=32,
        block_size=16,
        mem_keys=8,
        mem_topk=4,
        mem_heads=2,
    )
    special = {
        "memory": dict(mem_layers=(1,)),
        "peer": dict(system="peer", mem_gate=False, mem_layers=(1,)),
        "ultramem": dict(
            system="ultramem",
            mem_gate=False,
            mem_softmax=False,
            mem_rank=2,
            mem_cores=2,
            mem_expand=4,
            mem_layers=(0,),
            mem_skip=1,
            mem_value_dim=16,
        ),
    }
    model = GPT(GPTConfig(**options, **special[system]))
    optimizer = RowAdam(model.pool, lr=0.1)
    idx = torch.randint(64, (2, 16))
    before = model.pool.values.clone()
    _, loss = model(idx, idx)
    model.pool.requires_grad_(False)
    loss.backward()
    model.pool.requires_grad_(True)
    assert not model.pool.touched.any() and not model.pool.gradient.any()
    optimizer.step()
    assert torch.equal(model.pool.values, before)


def test_a_gradient_of_values_that_were_then_frozen_stops_nothing():
    """Row 21: the network goes on without them."""
    pool = ValuePool(64, 8)
    layer = MemoryLayer(8, 64, heads=1, topk=2)
    optimizer = RowAdam(pool)
    sgd = torch.optim.SGD(layer.parameters(), 0.1)
    x = torch.randn(5, 8)
    layer(x, pool).sum().backward()
    pool.requires_grad_(False)
    for _ in range(2):
        sgd.step()
        sgd.zero_grad()
        layer(x, pool).sum().backward()
    optimizer.step()
    assert not optimizer.state[pool.values] and not pool.touched.any()


def wrong_accumulators():
    yield torch.zeros(8, 16).t(), torch.zeros(16, dtype=torch.uint8)
    yield torch.zeros(16, 9)[:, :8], torch.zeros(16, dtype=torch.uint8)
    yield torch.zeros(15, 8), torch.zeros(16, dtype=torch.uint8)
    yield torch.zeros(16, 8, dtype=torch.bfloat16), torch.zeros(16, dtype=torch.uint8)
    yield torch.zeros(16, 8, device="meta"), torch.zeros(16, dtype=torch.uint8)
    yield torch.zeros(16, 8), torch.zeros(16)
    yield torch.zeros(16, 8), torch.zeros(15, dtype=torch.uint8)
    yield torch.zeros(16, 8), torch.zeros(32, dtype=torch.uint8)[::2]
    yield torch.zeros(16, 8), None
    yield None, torch.zeros(16, dtype=torch.uint8)
    yield torch.zeros(16, 8), [0] * 16


@pytest.mark.parametrize("gradient, touched", list(wrong_accumulators()))
def test_an_accumulator_that_does_not_fit_is_refused(gradient, touched):
    """Row 22: the Triton path would add to wrong places."""
    values = torch.randn(16, 8, requires_grad=True)
    indices = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"(gradient|touched) (\(.*must be \(16|must be a tensor)"):
        collecting_lookup(values, indices, torch.ones(2, 3), gradient, touched)


def test_an_accumulator_of_peer_that_does_not_fit_is_refused():
    """Row 22."""
    pool = NeuronPool(16, 8, tables=2)
    RowAdam(pool)
    indices = torch.zeros(2, 3, dtype=torch.int64)
    pool.gradient = torch.zeros(8, 32).t()
    with pytest.raises(ValueError, match=r"gradient .* contiguous"):
        dot(pool, indices, torch.ones(2, 8))


def read_row_0(pool):
    indices = torch.zeros(2, 3, dtype=torch.int64)
    weights = torch.ones(2, 3)
    return collecting_lookup(pool.values, indices, weights, pool.gradient, pool.touched)


def test_moments_of_another_table_are_refused():
    """Row 22's neighbour."""
    pool = ValuePool(16, 8)
    optimizer = RowAdam(pool)
    read_row_0(pool).sum().backward()
    optimizer.step()
    saved = optimizer.state_dict()
    for shape in ((32, 4), (8, 8)):
        other = RowAdam(ValuePool(*shape))
        with pytest.raises(ValueError, match=r"means have the shape \(16, 8\)"):
            other.load_state_dict(saved)


def test_values_that_are_not_contiguous_are_refused(monkeypatch):
    """Row 22's neighbour: the optimiser's kernel writes to wrong places."""
    pool = ValuePool(16, 8)
    pool.values = torch.nn.Parameter(torch.randn(8, 16).t())
    optimizer = RowAdam(pool)  # on a CPU they will do
    read_row_0(pool).sum().backward()
    before = pool.values.detach().clone()
    optimizer.step()
    assert (before != pool.values).any(dim=1).tolist() == [True] + [False] * 15
    monkeypatch.setattr(kernels, "uses_triton", lambda tensor: True)
    with pytest.raises(ValueError, match="contiguous"):
        RowAdam(pool)
    pool = ValuePool(16, 8)
    optimizer = RowAdam(pool)
    pool.values.data = torch.randn(8, 16).t()
    with pytest.raises(ValueError, match="contiguous"):
        optimizer.step()
