"""What users bring: their own facts, a longer run, a model in Python, nanoGPT's habits."""

import json
import os
import re
import shlex
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import safetensors.torch
import torch

import sample
import train
from bench import compare, curves
from data.dataset import Dataset, write_meta
from edit import update
from helpers import (
    SMALL,
    load,
    log_of,
    prepare,
    prepare_here,
    refusal,
    run,
    start,
    train_here,
    wait_until,
)
from model import GPT, GPTConfig
from runtime.distributed import command_to_resume
from train import TrainConfig

CAPITALS = {"Zubrowka": "Lutz", "Ruritania": "Strelsau", "Syldavia": "Klow", "Florin": "Pyrus"}


# --- facts of one's own -----------------------------------------------------------------------


@pytest.fixture
def capitals(tmp_path):
    """A file of sentences, and one of questions."""
    text = tmp_path / "capitals.txt"
    text.write_text("".join(f"The capital of {a} is {b}.\n" for a, b in CAPITALS.items()))
    questions = tmp_path / "capitals.tsv"
    questions.write_text("".join(f"The capital of {a} is\t{b}\n" for a, b in CAPITALS.items()))
    return text, questions


def prepare_capitals(capitals, run, out, capsys):
    text, questions = capitals
    given = [f"--file={text}", f"--questions={questions}", f"--vocabulary_of={run}", f"--out={out}"]
    prepare_here("shakespeare", *given)
    return capsys.readouterr().out


@pytest.mark.slow
def test_a_model_of_bytes_learns_sentences_with_new_words(capitals, tmp_path, capsys):
    mine = tmp_path / "mine.txt"
    mine.write_text("How doth the little busy bee improve each shining hour.\n" * 99)
    prepare_here("shakespeare", f"--file={mine}", f"--out={tmp_path / 'mine'}")
    run = tmp_path / "run"
    train_here(*SMALL, f"--dataset={tmp_path / 'mine'}", f"--out_dir={run}")
    said = prepare_capitals(capitals, run, tmp_path / "capitals", capsys)
    assert "repeated" in said and "4 questions" in said and "hardly" not in said
    options = ["--learning_rate=1e-2", "--mem_learning_rate=1e-2", "--max_iters=150"]
    finetune = [f"--init_from={run}", f"--dataset={tmp_path / 'capitals'}"]
    taught = tmp_path / "taught"
    train_here(*finetune, f"--out_dir={taught}", "--eval_interval=150", *options)
    line = log_of(taught)[-1]
    assert line["recall"] == 1 and line["old_val_loss"] > 0
    sample.main([f"--out_dir={taught}", "--recall", "--device=cpu"])
    assert re.search(r"all +100.0% of 4", capsys.readouterr().out)


@pytest.mark.slow
def test_facts_in_the_words_of_the_demo_are_repeated_as_documents(
    finished, facts, tmp_path, capsys
):
    lines = (facts / "recall.jsonl").read_text().splitlines()[:3]
    questions = [json.loads(line) for line in lines]
    text = "".join(f"{q['prompt']} {q['answer']}.\n" for q in questions)
    (tmp_path / "f.txt").write_text(text)
    pairs = "".join(f"{q['prompt']}\t{q['answer']}\n\n" for q in questions)
    (tmp_path / "f.tsv").write_text(pairs)
    files = (tmp_path / "f.txt", tmp_path / "f.tsv")
    said = prepare_capitals(files, finished, tmp_path / "own", capsys)
    assert "3 questions" in said and "not in the vocabulary" not in said
    dataset = Dataset(tmp_path / "own")
    assert [q["prompt_ids"] for q in dataset.questions()] == [
        q["prompt_ids"] for q in Dataset(facts).questions()[:3]
    ]
    ids = dataset.tokens("train")
    starts = np.flatnonzero(ids == dataset.separator)
    documents = {tuple(part) for part in np.split(ids, starts[1:])}
    assert starts[0] == 0 and len(documents) == 3 and len(ids) >= 20 * 32
    options = re.search(r"python edit/update.py (.*)", said)[1].split()  # the printed command
    assert "--slots=256" in options and "python train.py --init_from" in said
    out = tmp_path / "update"
    update.main([*options, f"--out_dir={out}", "--max_iters=2", "--device=cpu"])
    command = re.search(r"Next: python sample.py (.*)", capsys.readouterr().out)[1]
    sample.main([*shlex.split(command), "--device=cpu"])
    assert "of 3" in capsys.readouterr().out
    options = re.search(r"python train.py (.*)", said)[1].split()
    out = tmp_path / "finetuned"
    train_here(*options, f"--out_dir={out}", "--max_iters=1", "--learning_rate=1e-9")
    said = capsys.readouterr().out
    assert "Many answers are still wrong" in said
    train_here(*re.search(r"twice as long: python train.py (.*)", said)[1].split())
    assert log_of(out)[-1]["iter"] == 2


def test_new_words_are_announced_where_a_model_will_hardly_learn_them(
    finished, capitals, tmp_path, capsys
):
    said = prepare_capitals(capitals, finished, tmp_path / "capitals", capsys)
    assert "not in the vocabulary: The, capital, of, Zubrowka, Lutz, Ruritania, " in said
    assert "and 3 more\n  The model hardly learns sentences with them" in said


def test_an_update_on_text_without_questions_prints_a_command_that_works(
    finished, capitals, tmp_path, capsys
):
    text, _ = capitals
    given = [f"--file={text}", f"--vocabulary_of={finished}", f"--out={tmp_path / 'text'}"]
    prepare_here("shakespeare", *given)
    options = [f"--init_from={finished}", f"--dataset={tmp_path / 'text'}", "--slots=16"]
    update.main([*options, f"--out_dir={tmp_path / 'u'}", "--max_iters=2", "--device=cpu"])
    command = re.search(r"Next: python sample.py (.*)", capsys.readouterr().out)[1]
    sample.main([*shlex.split(command), "--device=cpu", "--max_new_tokens=2"])
    assert capsys.readouterr().out.count("-" * 40) == 2


def test_another_vocabulary_names_the_way_out(finished, capitals, tmp_path, capsys):
    text, _ = capitals
    (tmp_path / "long.txt").write_text(text.read_text() * 20)
    prepare_here("shakespeare", f"--file={tmp_path / 'long.txt'}", f"--out={tmp_path / 'bytes'}")
    options = [f"--init_from={finished}", f"--dataset={tmp_path / 'bytes'}"]
    said = refusal(train.main, [*options, f"--out_dir={tmp_path / 'out'}"], capsys)
    assert f"prepare a text with --vocabulary_of={finished}" in said


@pytest.mark.parametrize(
    "lines, words",
    [
        ("no tab\n", "line 1: must be prompt, tab, answer"),
        ("a\tb\n\na\t\n", "line 3: must be prompt, tab, answer"),
        ("\n", "has no questions"),
    ],
)
def test_wrong_questions_are_refused(capitals, tmp_path, capsys, lines, words):
    text, questions = capitals
    questions.write_text(lines)
    out = tmp_path / "out"
    arguments = [f"--file={text}", f"--questions={questions}", f"--out={out}"]
    with pytest.raises(SystemExit) as ended:
        prepare_here("shakespeare", *arguments)
    assert words in ended.value.code and not out.exists()


def test_a_text_of_empty_lines_is_refused(finished, capitals, tmp_path, capsys):
    text, _ = capitals
    text.write_text("\n" * 50)
    with pytest.raises(SystemExit) as ended:
        prepare_here("shakespeare", f"--file={text}", f"--vocabulary_of={finished}", "--out=x")
    assert "has only empty lines" in ended.value.code


# --- a run with another length ----------------------------------------------------------------


def test_a_longer_run_says_how_the_rate_changes(facts, tmp_path, capsys):
    options = [*SMALL, f"--dataset={facts}", f"--out_dir={tmp_path}", "--warmup_iters=0"]
    train_here(*options, "--learning_rate=1e-2")
    assert "Learning rate:" not in capsys.readouterr().out
    again = ["--resume", f"--out_dir={tmp_path}"]
    train_here(*again, "--max_iters=8")
    said = capsys.readouterr().out
    rates = [line["lr"] for line in log_of(tmp_path)]
    assert f"{rates[3]:.1e} in the last step, on the old schedule; {rates[4]:.1e} now" in said
    assert rates[4] > 2 * rates[3] and "--learning_rate=R --min_lr=R" in said
    assert f"--init_from={tmp_path}" in said
    train_here(*again, "--max_iters=10", "--learning_rate=3e-3", "--min_lr=3e-3")
    said = capsys.readouterr().out
    assert "3.0e-03 now" in said and "=R" not in said
    assert [line["lr"] for line in log_of(tmp_path)][8:] == [3e-3, 3e-3]


@pytest.mark.parametrize(
    "options, words",
    [
        (
            ["--learning_rate=1e-4", "--min_lr=1e-3"],
            "--min_lr=0.001 (given, or of the earlier run): more than",
        ),
        (["--batch_size=6"], "keeps --batch_size=2; leave it out"),
        (["--init_from=out/other"], "--init_from starts a new run, --resume does not"),
        (["--preset=facts-memory"], "--resume takes the options of the earlier run"),
        (["--max_iter=8"], "there is no option --max_iter=8; did you mean --max_iters?"),
        (["--epochs=8"], "there is no option --epochs=8; --help lists all"),
    ],
)
def test_what_a_longer_run_cannot_change_is_refused(finished, capsys, options, words):
    before = (finished / "ckpt.pt").read_bytes()
    again = ["--resume", f"--out_dir={finished}", "--max_iters=9", *options]
    assert words in refusal(train.main, again, capsys)
    assert (finished / "ckpt.pt").read_bytes() == before


# --- a model in Python ------------------------------------------------------------------------


def test_a_model_is_loaded_from_a_folder_or_a_file(finished, tmp_path):
    idx = torch.zeros(1, 3, dtype=torch.int64)
    results = []
    for path in (finished, str(finished), finished / "ckpt.pt", f"{finished}/ckpt.pt"):
        model = GPT.from_checkpoint(path)
        assert not model.training
        results.append(model(idx)[0])
    assert all(torch.equal(result, results[0]) for result in results)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "it.safetensors")
    loaded = safetensors.torch.load_file(tmp_path / "it.safetensors")
    assert all(torch.equal(loaded[name], x) for name, x in model.state_dict().items())
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*/ckpt.pt; give the folder"):
        GPT.from_checkpoint(tmp_path)


def test_a_config_survives_json():
    config = GPTConfig(n_layer=3, mem_layers=(0, 2), n_embd=24, n_head=2)
    again = GPTConfig(**json.loads(json.dumps(asdict(config))))
    assert again == config and again.mem_layers == (0, 2)
    with pytest.raises(ValueError, match="--mem_layers"):
        GPTConfig(mem_layers=[0, "x"])


# --- what is said -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "word, way_out",
    [
        ("config/train_gpt2.py", "--preset=NAME"),
        ("--eval_only=True", "log.jsonl"),
        ("--wandb_log=True", "bench/curves.py"),
        ("--wandb_project=owt", "no such option here"),
        ("--dropout=0.2", "there is no dropout"),
        ("--init_from=resume", "--resume --out_dir=FOLDER"),
        ("--init_from=gpt2-xl", "give the folder of a run"),
        ("--decay_lr=False", "--min_lr"),
    ],
)
def test_habits_of_nanogpt_get_a_hint(word, way_out, capsys):
    with pytest.raises(SystemExit) as ended:
        train.main([word])
    assert ended.value.code == 2
    assert f"{word}: " in (said := capsys.readouterr().err) and way_out in said


def test_the_command_to_resume_can_be_pasted(monkeypatch):
    config = TrainConfig(out_dir="out/my run", timeout=60)
    monkeypatch.setattr("sys.argv", ["train.py", "--max_iters=9"])
    for name in ("RANK", "GROUP_WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    end = ["train.py", "--resume", "--out_dir=out/my run", "--timeout=60"]
    assert shlex.split(command_to_resume(config)) == ["python", *end]
    monkeypatch.setitem(os.environ, "RANK", "0")
    monkeypatch.setitem(os.environ, "LOCAL_WORLD_SIZE", "2")
    torchrun = ["torchrun", "--standalone", "--nproc_per_node=2"]
    assert shlex.split(command_to_resume(config)) == [*torchrun, *end]


def test_ids_of_four_bytes_are_noticed_in_a_folder_of_nanogpt(tmp_path):
    ids = np.arange(1, 3000)
    ids.astype("<u2").tofile(tmp_path / "train.bin")
    ids.astype("<u4").tofile(tmp_path / "val.bin")
    dataset = Dataset(Path(tmp_path))
    assert len(dataset.tokens("train")) == 2999
    with pytest.raises(ValueError, match=r"val.bin holds ids of four or eight bytes"):
        dataset.tokens("val")
    write_meta(tmp_path, "gpt2", "uint16", 50257, 50256)  # of another dataset
    with pytest.raises(ValueError, match=r"val.bin holds ids of four or eight bytes"):
        Dataset(tmp_path).tokens("val")
    (tmp_path / "meta.json").unlink()
    (ids % 60).astype("<u2").tofile(tmp_path / "val.bin")  # characters, whose meta.pkl is lost
    with pytest.raises(ValueError, match=r"val.bin has only ids below 256, so they are not GPT-2"):
        dataset.tokens("val")


def test_bytes_of_utf_16_are_not_taken_for_ids_of_four_bytes(tmp_path):
    (tmp_path / "text").write_bytes(("Nothing of note. " * 99).encode("utf-16-le"))
    prepare_here("shakespeare", f"--file={tmp_path / 'text'}", f"--out={tmp_path / 'data'}")
    ids = Dataset(tmp_path / "data").tokens("train")
    assert bytes(ids[:4].tolist()) == b"N\0o\0"


# --- comparing systems, and curves ------------------------------------------------------------


def compare_options(facts, out):
    small = [word for word in SMALL if not word.startswith("--mem_layers")]
    names = ["--systems=dense,memory", "--seeds=2", "--base=facts"]
    return [*names, f"--dataset={facts}", f"--out_dir={out}", *small, "--mem_layers=1"]


@pytest.mark.slow
def test_systems_are_compared_stopped_and_continued(facts, tmp_path, capsys):
    out = tmp_path / "compared"
    options = [*compare_options(facts, out), "--max_iters=150", "--eval_interval=50"]
    command = [sys.executable, "bench/compare.py", *options]
    process = start(*command)
    wait_until(lambda: len([*out.glob("*/log.jsonl")]) == 2, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 130 and "the same command continues" in errors, errors
    saved = {path: load(path)["iter"] for path in out.glob("*/ckpt.pt")}
    assert len(saved) == 2 and 0 < min(saved.values()) < 150
    done = run(*command[1:])
    assert done.returncode == 0, done.stderr
    losses = {}
    for system in ("dense", "memory"):
        losses[system] = [log_of(out / f"{system}-{seed}")[-1]["val_loss"] for seed in (1, 2)]
        error = abs(losses[system][0] - losses[system][1]) / 2
        row = f"| {system} | {np.mean(losses[system]):.3f} ± {error:.3f} |"
        assert row in done.stdout, done.stdout
    best, other = sorted(losses, key=lambda system: np.mean(losses[system]))
    difference = np.subtract(losses[other], losses[best]).mean()
    assert f"{best} has the lowest loss" in done.stdout
    assert f"  {other:10} {difference:+.3f} (" in done.stdout
    assert (out / "table.md").read_text() in done.stdout
    assert (out / "curves.svg").read_text().startswith("<svg")
    for path in out.glob("*/ckpt.pt"):  # of an earlier version, which had fewer options
        checkpoint = load(path)
        for name in [n for n in checkpoint["model_config"] if n.startswith("ngram")]:
            del checkpoint["model_config"][name]
        torch.save(checkpoint, path)
    logs = {path: path.read_bytes() for path in out.glob("*/log.jsonl")}
    again = run(*command[1:])
    assert again.stdout == done.stdout and logs == {path: path.read_bytes() for path in logs}
    said = refusal(compare.main, [*options, "--learning_rate=1e-3"], capsys)
    way_out = f"remove {out}, or give another --out_dir"
    assert "--learning_rate=0.001: the run in" in said and way_out in said
    shorter = [word for word in options if not word.startswith("--max_iters")]
    said = refusal(compare.main, shorter, capsys)
    assert f"--max_iters=3000: the run in {out}/dense-1 has --max_iters=150" in said
    prepare("--seed=5", "--out", tmp_path / "others")
    said = refusal(compare.main, [*options, f"--dataset={tmp_path / 'others'}"], capsys)
    assert "was trained on other data" in said


@pytest.mark.parametrize(
    "options, words",
    [
        (["--systems=dense,nothing"], "nothing is none of memory, dense, "),
        (["--seeds=0"], "--seeds=0"),
        (["--resume"], "--resume: compare.py sets it"),
        (["--mem_kays=3"], "--mem_kays=3"),
        (["--dataset=nowhere"], "nowhere"),
        (["--n_head=5"], "--n_head=5"),
    ],
)
def test_what_cannot_be_compared_is_refused(facts, tmp_path, capsys, options, words):
    said = refusal(compare.main, [*compare_options(facts, tmp_path / "out"), *options], capsys)
    assert words in said and not (tmp_path / "out").exists()


def test_differences_within_the_error_are_said():
    def logs(*losses):
        return [[{"val_loss": loss}] for loss in losses]

    # 95% of Student's t with 2 degrees of freedom lie within 4.303
    systems = {"dense": logs(1.2, 1.3, 1.1), "memory": logs(1.1, 1.1, 1.1), "moe": logs(2, 2.1, 2)}
    best, dense, moe, _ = compare.verdicts(systems).splitlines()
    assert best.startswith("memory has the lowest loss") and "3 seeds" in best
    error = 4.30 * 0.1 / 3**0.5
    interval = f"({0.1 - error:+.3f} to {0.1 + error:+.3f})"
    assert f"+0.100 {interval}: within the error, so they cannot be told apart" in dense
    assert moe == "  moe        +0.933 (+0.790 to +1.077)"
    assert "one seed" in compare.verdicts({"dense": logs(1.0), "memory": logs(1.1)})


def test_curves_have_the_points_of_the_logs(finished, tmp_path, capsys):
    picture = tmp_path / "new" / "curves.svg"
    curves.main([str(finished), f"--out={picture}"])
    evaluations = [line for line in log_of(finished) if "val_loss" in line]
    said = capsys.readouterr().out
    assert f"validation loss {evaluations[-1]['val_loss']:.3f}" in said
    assert f"after {evaluations[-1]['tokens']:,} tokens" in said
    text = picture.read_text()
    root = ElementTree.fromstring(text)
    rings = [x for x in root.iter() if x.tag.endswith("circle")]
    assert len(rings) == 4 * len(evaluations)  # loss and recall, against tokens and seconds
    heights = [float(ring.get("cy")) for ring in rings[: len(evaluations)]]
    losses = [line["val_loss"] for line in evaluations]
    assert (np.argsort(heights) == np.argsort(losses)[::-1]).all()
    assert str(finished) in text and "recall" in text
    curves.main([str(finished.parent), f"--out={tmp_path / 'all.svg'}"])  # all runs in a folder
    assert (tmp_path / "all.svg").read_text() == text
    said = refusal(curves.main, [finished / "log.jsonl"], capsys)
    assert "log.jsonl is not a folder; give the folder of a run" in said
    said = refusal(curves.main, [finished, "--out=fig.png"], capsys)
    assert "--out=fig.png: the picture is an SVG" in said


@pytest.mark.parametrize(
    "log, words",
    [
        (None, "give the folder of a run"),
        ('{"iter": 1, "loss": 2}\n', "has no evaluation yet"),
        ('{"iter": 1, "val_loss": 2}\n', "has no tokens: an earlier version"),
        ('{"iter"', "is damaged"),
    ],
)
def test_a_log_that_cannot_be_drawn_is_named(tmp_path, capsys, log, words):
    if log is not None:
        (tmp_path / "log.jsonl").write_text(log)
    out = tmp_path / "curves.svg"
    said = refusal(curves.main, [tmp_path, f"--out={out}"], capsys)
    assert words in said and "log.jsonl" in said and not out.exists()


@pytest.mark.parametrize("low, high", [(0, 1), (2.21, 4.47), (0, 3_072_000), (1.5, 1.5), (0, 0)])
def test_ticks_are_round_and_enclose_the_numbers(low, high):
    found = curves.ticks(low, high)
    assert found[0] <= low <= high <= found[-1] and 2 <= len(found) <= 8
    steps = np.diff(found)
    np.testing.assert_allclose(steps, steps[0])
    assert f"{steps[0]:.0e}"[0] in "125"
