"""A wrong option, a damaged file, an unkind environment: one line that names it, and nothing is written."""

import dataclasses
import json
import random
import shutil

import pytest
import torch

import sample
import train
from data.dataset import Dataset, find_folder
from helpers import ROOT, SMALL, contents, handlers, load, prepare_here, refusal, train_here
from processes import start_program
from runtime import distributed

# --- a wrong option, a wrong file: one line that names it -------------------------------------------------------------

HUGE = "1" + 400 * "0"


def edited(**changes):
    """A change of a checkpoint. None: without that."""

    def edit(folder):
        checkpoint = torch.load(folder / "ckpt.pt", weights_only=True)
        checkpoint = {
            name: value for name, value in (checkpoint | changes).items() if value is not None
        }
        torch.save(checkpoint, folder / "ckpt.pt")

    return edit


def inside(name, change):
    """A change of what is in one of a checkpoint's entries."""

    def edit(folder):
        checkpoint = torch.load(folder / "ckpt.pt", weights_only=True)
        change(checkpoint[name])
        torch.save(checkpoint, folder / "ckpt.pt")

    return edit


def written(name, text):
    return lambda folder: (folder / name).write_bytes(
        text if isinstance(text, bytes) else text.encode()
    )


def meta(**changes):
    return lambda folder: (folder / "meta.json").write_text(
        json.dumps(json.loads((folder / "meta.json").read_text()) | changes)
    )


def vocabulary(**changes):
    return lambda folder: (folder / "vocab.json").write_text(
        json.dumps(json.loads((folder / "vocab.json").read_text()) | changes)
    )


OPTIONS = [
    (["--learning_rate=1e300"], "learning_rate=1e+300"),
    (["--mem_learning_rate=1e39"], "mem_learning_rate=1e+39"),
    (["--weight_decay=inf"], "weight_decay=inf"),
    (["--beta2=1"], "beta2=1"),
    ([f"--batch_size={HUGE}"], "batch_size=1"),
    ([f"--warmup_iters={HUGE}"], "warmup_iters=1"),
    (["--n_layer=1000000000"], "n_layer=1000000000"),
    (["--mem_layers=99999999999999999999"], "mem_layers: there is no block 99999999999999999999"),
    (["--mem_heads=1000000000"], "does not fit"),
    (["--mem_keys=60000"], "mem_keys=60000"),
    (["--n_embd=2000000"], "n_embd"),
    (["--block_size=1000000000"], "too few for block_size=1000000000"),
    (["--device=hpu"], "device=hpu cannot be used here"),
    (["--device=cuda:77"], "device=cuda:77 cannot be used here"),
    (["--device=meta"], "device=meta cannot be used here"),
    (["--device="], "device= cannot be used here"),
    (["--out_dir= "], "out_dir=: must name a folder"),
    (["--out_dir=/dev/null/x"], "/dev/null/x"),
    (["--dataset=/dev/null"], "/dev/null"),
]
DATA = [
    (written("meta.json", "[" * 100_000), "meta.json is damaged"),
    (written("meta.json", "null"), "meta.json must give"),
    (written("meta.json", b'{"encoding": "\xe4"}'), "meta.json is damaged"),
    (meta(vocab_size=float("inf")), "meta.json must give"),
    (meta(vocab_size=10**30), "meta.json must give"),
    (meta(vocab_size="1712"), "meta.json must give"),
    (meta(separator=True), "meta.json must give"),
    (meta(dtype=["uint16"]), "meta.json must give"),
    (meta(encoding={}), "meta.json must give"),
    (meta(vocab_size=2000), "vocab.json does not fit meta.json"),
    (written("vocab.json", "[]"), "vocab.json does not fit"),
    (written("vocab.json", b"\xff"), "vocab.json is damaged"),
    (vocabulary(tokens=["a", "b"]), "is no token"),
    (vocabulary(tokens=[chr(i) for i in range(256)] + ["aa", "aa"]), "two tokens are the same"),
    (vocabulary(tokens=[chr(i) for i in range(999)]), "vocab.json does not fit"),
    (vocabulary(pattern="("), "vocab.json does not fit"),
    (vocabulary(special_tokens={"<|endoftext|>": -1}), "vocab.json does not fit"),
    (
        vocabulary(special_tokens={"": 1311}),
        "a token is empty",
    ),  # with which tiktoken would never come to an end
    (meta(encoding="../vocab.json"), "meta.json must give"),
    (lambda folder: (folder / "vocab.json").unlink(), "vocab.json"),
    (written("recall.jsonl", "null\n"), "recall.jsonl, line 1"),
    (
        written("recall.jsonl", '{"prompt": "a", "answer": "b"}\n\n{"prompt": 1, "answer": "b"}\n'),
        "recall.jsonl, line 3",
    ),
    (
        written("recall.jsonl", '{"prompt": "a", "answer": "b", "attribute": [1]}\n'),
        "recall.jsonl, line 1",
    ),
    (written("recall.jsonl", "[" * 100_000), "recall.jsonl, line 1"),
    (written("recall.jsonl", b"\xe4\n"), "recall.jsonl is damaged"),
    (written("train.bin", b""), "train.bin has 0 bytes"),
]
CHECKPOINTS = [
    *(
        (edited(**{name: None}), "ckpt.pt")
        for name in ("iter", "seconds", "separator", "fingerprint")
    ),
    *((edited(**{name: None}), "ckpt.pt") for name in ("model", "model_config")),
    (edited(iter="4"), "iter is '4'"),
    (edited(iter=-4), "iter is -4"),
    (edited(separator=10**9), "separator is 1000000000"),
    (edited(seconds=None), "'seconds'"),
    (inside("model_config", lambda config: config.update(n_embd="32")), "n_embd='32'"),
    (inside("model_config", lambda config: config.update(n_layer=10**30)), "n_layer=1000"),
    (inside("model_config", lambda config: config.update(mem_layers=5)), "mem_layers=5"),
]
OPTIONS_OF_RUNS = [
    (edited(train_config=None), "ckpt.pt"),
    (inside("train_config", lambda config: config.update(dataset=5)), "dataset=5"),
    (inside("train_config", lambda config: config.update(learning_rate=[])), "learning_rate=[]"),
]
RESUMED = [
    (edited(optimizers=[]), "ckpt.pt"),
    (edited(optimizers=None), "optimisers"),
    (inside("optimizers", lambda optimizers: optimizers[0]["state"].pop(3)), "optimisers"),
    (
        inside("optimizers", lambda optimizers: optimizers[0]["state"][3].pop("exp_avg")),
        "optimisers",
    ),
    (
        inside(
            "optimizers",
            lambda optimizers: optimizers[0]["state"][3].update(step=torch.tensor(7.0)),
        ),
        "optimisers",
    ),
    (
        inside(
            "optimizers",
            lambda optimizers: optimizers[1]["state"][0].update(means=torch.zeros(3, 3)),
        ),
        "ckpt.pt",
    ),
    (
        inside("optimizers", lambda optimizers: optimizers[1]["state"][0].update(step="x")),
        "optimisers",
    ),
    (
        inside(
            "optimizers",
            lambda optimizers: optimizers[1]["state"][0].update(
                means=torch.zeros(256, 32).double()
            ),
        ),
        "optimisers",
    ),
    (
        inside(
            "optimizers",
            lambda optimizers: optimizers[0]["state"][0].update(
                x=optimizers[0]["state"][0].pop("step")
            ),
        ),
        "optim",
    ),
    (lambda folder: (folder / "log.jsonl").unlink() or (folder / "log.jsonl").mkdir(), "log.jsonl"),
    (lambda folder: (folder / "ckpt.pt").unlink(), "no checkpoint"),
]
SAMPLED = [
    (edited(vocabulary=5), [], "ckpt.pt"),
    (
        edited(vocabulary="gpt2"),
        [],
        "",
    ),  # where it can be had: tokens of another vocabulary; elsewhere: it cannot
    (
        inside("vocabulary", lambda vocabulary: vocabulary["tokens"].clear()),
        [],
        "is no token",
    ),
    (inside("vocabulary", lambda vocabulary: vocabulary["tokens"].pop()), [], "ckpt.pt"),
    (
        inside("vocabulary", lambda vocabulary: vocabulary.update(pattern="a*")),
        ["--start=hello"],
        "ckpt.pt cannot take it",
    ),
    (
        inside("model", lambda weights: weights["norm.weight"].fill_(3e38)),
        [],
        "cannot be sampled from",
    ),
    (
        inside("model", lambda weights: weights["norm.weight"].fill_(float("nan"))),
        [],
        "norm.weight holds nan",
    ),
    (
        inside("model", lambda weights: weights["pool.values"].fill_(float("inf"))),
        [],
        "pool.values holds inf",
    ),
    (edited(), [f"--top_k={HUGE}"], ""),
    (edited(), ["--temperature=1e400"], ""),
    (edited(), ["--start=FILE:."], ".: Is a directory"),
    (edited(), [f"--start=FILE:{torch.__file__[:-11]}/lib/libtorch.so"], "libtorch.so"),
    (edited(), ["--recall", "--device=hpu"], "device=hpu"),
    (edited(train_config={"dataset": 5}), ["--recall"], "names no dataset"),
]
ENVIRONMENTS = [
    ({"RANK": "abc"}, "RANK"),
    ({"RANK": "²"}, "RANK"),
    ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK"),
    ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE"),
    ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR"),
    (
        {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "x",
            "MASTER_PORT": "http",
        },
        "'http'",
    ),
    (
        {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "x",
            "MASTER_PORT": "99999",
        },
        "do not find each other",
    ),
]


CASES = [
    *(("train", None, options, word) for options, word in OPTIONS),
    *(("train", damage, [], word) for damage, word in DATA),
    *(
        (program, damage, [], word)
        for damage, word in CHECKPOINTS
        for program in ("resume", "sample")
    ),
    *(("resume", damage, [], word) for damage, word in OPTIONS_OF_RUNS),
    *(("resume", damage, [], word) for damage, word in RESUMED),
    *(("sample", damage, options, word) for damage, options, word in SAMPLED),
    *(("train", None, variables, word) for variables, word in ENVIRONMENTS),
]


@pytest.mark.parametrize("program, damage, options, word", CASES)
def test_what_is_wrong_is_named_in_one_line(
    facts, finished, tmp_path, capsys, monkeypatch, program, damage, options, word
):
    """In this process: each of the hundred would else spend seconds on imports."""
    folder, out = tmp_path / "it", tmp_path / "out"
    if damage:
        shutil.copytree(facts if program == "train" else finished, folder)
        damage(folder)
    if isinstance(options, dict):
        for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in options.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(distributed, "WAIT_FOR_RANK_0", 0)
        options = ["--seed=1"]
    before = contents(folder)
    if program == "train":
        said = refusal(
            train.main,
            [*SMALL, f"--dataset={folder if damage else facts}", f"--out_dir={out}", *options],
            capsys,
        )
    elif program == "resume":
        said = refusal(train.main, ["--resume", f"--out_dir={folder}", "--max_iters=9"], capsys)
    else:
        said = refusal(sample.main, ["--device=cpu", f"--out_dir={folder}", *options], capsys)
    assert word in said and ("usage: " in said or said.count("\n") == 1), said
    assert options or not word or str(folder) in said, said
    assert not out.exists() and contents(folder) == before


def test_weights_that_are_no_numbers_do_not_train(finished, tmp_path, capsys):
    for name in ("norm.weight", "pool.values"):
        shutil.copytree(finished, tmp_path / name)
        inside("model", lambda weights, name=name: weights[name].fill_(float("inf")))(
            tmp_path / name
        )
        before = contents(tmp_path / name)
        with handlers():
            said = refusal(
                train.main, ["--resume", f"--out_dir={tmp_path / name}", "--max_iters=9"], capsys
            )
        assert f"{name} holds inf" in said and contents(tmp_path / name) == before


@pytest.mark.parametrize(
    "line", [b"\n", b"\xff\x00\n", b"null\n", b"{}\n", b"[" * 100_000 + b"\n", b'{"iter": "9"}\n']
)
def test_a_damaged_log_does_not_stop_a_resume_and_keeps_what_is_in_it(finished, tmp_path, line):
    log = tmp_path / "out" / "log.jsonl"
    shutil.copytree(finished, log.parent)
    whole = log.read_bytes()
    log.write_bytes(
        whole[:-40] + b"\n" + line + whole + b'{"iter": 9}\n{"iter": 5, "lo'
    )  # of a later step, and cut by a kill
    train_here("--resume", f"--out_dir={log.parent}", "--max_iters=5")
    assert log.read_bytes().startswith(whole[:-40] + b"\n" + line + whole)
    assert (
        json.loads(log.read_bytes().splitlines()[-1])["iter"] == 5
        and log.read_bytes().count(b'"iter": 5,') == 1
    )


@pytest.mark.parametrize("name", ["facts", "shakespeare", "openwebtext"])
@pytest.mark.slow
def test_prepare_py_names_a_folder_that_it_cannot_write_to(request, tmp_path, name):
    if name == "openwebtext":
        request.getfixturevalue("gpt2")
    file = tmp_path / "file"
    file.write_text("a text that is long enough to train on")
    options = {
        "facts": ["--people=9"],
        "shakespeare": [f"--file={file}"],
        "openwebtext": [f"--source={tmp_path}", "--subsets=0"],
    }
    for out in (file, file / "below"):
        process = start_program(f"data/{name}/prepare.py", *options[name], "--out", out)
        _, errors = process.communicate()
        last = errors.splitlines()[-1]
        assert process.returncode in (1, 2) and "Traceback" not in errors, errors
        assert last.startswith("prepare.py: ") and str(file) in last
    assert file.read_text() == "a text that is long enough to train on"


def test_a_negative_seed_is_named(tmp_path, capsys):
    options = ["--seed=-1", "--out", tmp_path / "out"]
    said = refusal(lambda options: prepare_here("facts", *options), options, capsys)
    assert "--seed=-1" in said
    assert not (tmp_path / "out").exists()


def test_a_very_low_temperature_is_greedy(finished, capsys):
    said = []
    for temperature in ("0", "1e-46", "1e-30"):
        sample.main(
            [
                f"--out_dir={finished}",
                "--device=cpu",
                "--num_samples=1",
                f"--temperature={temperature}",
            ]
        )
        said.append(capsys.readouterr().out)
    assert len(said[0]) > 20 and said[0] == said[1] == said[2]


def test_tracebacks_are_there_for_who_asks_and_for_errors_of_our_own(
    facts, tmp_path, capsys, monkeypatch
):
    options = [*SMALL, f"--dataset={facts}", f"--out_dir={tmp_path / 'out'}"]
    with monkeypatch.context() as patch:
        patch.setenv("NANOMEM_DEBUG", "1")
        with pytest.raises(SystemExit):
            train.main([*options, "--block_size=1000000"])
        said = capsys.readouterr().err
        assert "Traceback" in said and "too few for block_size" in said.splitlines()[-1]
    monkeypatch.setattr(train, "evaluate", lambda *_: {}["an error of our own"])
    with handlers(), pytest.raises(KeyError, match="an error of our own"):
        train.main(options)


def test_a_resume_and_recall_refuse_another_vocabulary(facts, finished, tmp_path, capsys):
    shutil.copytree(facts, tmp_path / "data")
    shutil.copytree(finished, tmp_path / "out")
    words = json.loads((tmp_path / "data" / "vocab.json").read_text())["tokens"]
    vocabulary(tokens=words[:256] + words[:255:-1])(tmp_path / "data")
    inside("train_config", lambda config: config.update(dataset=str(tmp_path / "data")))(
        tmp_path / "out"
    )
    assert "trained on" in refusal(
        train.main, ["--resume", f"--out_dir={tmp_path / 'out'}", "--max_iters=5"], capsys
    )
    assert "trained on" in refusal(
        sample.main, ["--recall", f"--out_dir={tmp_path / 'out'}"], capsys
    )


def test_a_path_is_a_path_and_a_name_is_a_folder_of_data(facts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(facts, tmp_path / "shakespeare")
    assert (
        find_folder("./shakespeare").resolve() == tmp_path / "shakespeare"
        and find_folder(".").resolve() == tmp_path
    )
    assert find_folder("shakespeare") == ROOT / "data" / "shakespeare"


def test_a_resume_may_repeat_an_option_that_stands_for_another_value(finished, tmp_path):
    """0 hidden units are a default, and blocks are put in order."""
    shutil.copytree(finished, tmp_path / "out")
    options = "--n_ffn=0", "--mem_layers=1,1", "--mem_count=2"
    train_here("--resume", f"--out_dir={tmp_path / 'out'}", "--max_iters=5", *options)
    assert load(tmp_path / "out" / "ckpt.pt")["iter"] == 5


def test_questions_may_hold_any_character(facts, tmp_path):
    shutil.copytree(facts, tmp_path / "data")
    question = {"prompt": "a\u2028b \U0001f600\x85", "answer": "c\u2029"}
    line = json.dumps(question, ensure_ascii=False)  # which splitlines() would take for three
    (tmp_path / "data" / "recall.jsonl").write_text(line, encoding="utf-8")
    assert [q["prompt"] for q in Dataset(tmp_path / "data").questions()] == [question["prompt"]]


def test_a_run_without_a_checkpoint_is_not_said_to_be_resumable(facts, finished, tmp_path, capsys):
    """As a death before the first ckpt.pt leaves it."""
    shutil.copy(finished / "log.jsonl", tmp_path)
    said = refusal(train.main, [*SMALL, f"--dataset={facts}", f"--out_dir={tmp_path}"], capsys)
    assert "--overwrite" in said and "--resume" not in said


# --- a hundred random mutations ---------------------------------------------------------------------------------------

ODD = [
    "",
    " ",
    "0",
    "-1",
    "1",
    "3",
    "1.5",
    "nan",
    "-inf",
    "1e300",
    "1e-46",
    HUGE,
    "99999999999",
    "true",
    "x",
    "../x",
    "☃",
    "1,1",
]
VALUES = [
    None,
    True,
    0,
    -1,
    3,
    1.5,
    float("nan"),
    float("inf"),
    10**30,
    "",
    "x",
    "1",
    [],
    [1],
    {},
    {"a": 1},
    (0,),
    b"x",
]
LONG = {
    "max_iters",
    "eval_iters",
    "batch_size",
    "gradient_accumulation_steps",
    "compile",
    "out_dir",
}  # some would run for long


def mutations(facts, finished, folder):
    """Yield what to call, with which arguments: seeds fixed."""
    generator = random.Random(12)
    names = sorted(
        {f.name for cls in (train.TrainConfig, train.GPTConfig) for f in dataclasses.fields(cls)}
        - LONG
    )
    for number in range(100):
        mine = folder / f"{number}"
        mine.mkdir(parents=True)
        options, kind = [], number % 3
        if kind == 0:
            options = [
                f"--{name}={generator.choice(ODD)}"
                for name in generator.sample(names, generator.choice([1, 1, 2]))
            ]
            yield (
                train.main,
                [
                    *SMALL,
                    f"--dataset={facts}",
                    f"--out_dir={mine / 'out'}",
                    "--max_iters=1",
                    *options,
                ],
                mine,
            )
        elif kind == 1:
            shutil.copytree(facts, mine / "data")
            values = json.loads((mine / "data" / "meta.json").read_text())
            for name in generator.sample(sorted(values), generator.choice([1, 1, 2])):
                values[name] = generator.choice(VALUES[:-1])
            text = json.dumps(values)
            if generator.random() < 0.3:
                place = generator.randrange(len(text))
                text = text[:place] + generator.choice(["", "\x00", '"', "}"]) + text[place + 1 :]
            (mine / "data" / "meta.json").write_text(text)
            yield (
                train.main,
                [
                    *SMALL,
                    f"--dataset={mine / 'data'}",
                    f"--out_dir={mine / 'out'}",
                    "--max_iters=1",
                ],
                mine,
            )
        else:
            shutil.copytree(finished, mine / "out")
            checkpoint = torch.load(mine / "out" / "ckpt.pt", weights_only=True)
            place = checkpoint
            while True:  # down into the plain values
                key = (
                    generator.choice(sorted(place, key=str))
                    if isinstance(place, dict)
                    else generator.randrange(len(place))
                )
                if (
                    not isinstance(place[key], (dict, list))
                    or not place[key]
                    or generator.random() < 0.2
                ):
                    break
                place = place[key]
            if key not in ("max_iters", "eval_iters", "dataset"):
                place[key] = generator.choice(VALUES)
            torch.save(checkpoint, mine / "out" / "ckpt.pt")
            yield (
                sample.main,
                [
                    f"--out_dir={mine / 'out'}",
                    "--device=cpu",
                    "--max_new_tokens=3",
                    "--num_samples=1",
                ],
                mine,
            )
            yield train.main, ["--resume", f"--out_dir={mine / 'out'}", "--max_iters=5"], mine


@pytest.mark.slow
def test_random_mutations_end_in_one_line_and_write_to_out_dir_only(
    facts, finished, tmp_path, capsys, monkeypatch
):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    others, ended, went_on = contents(facts, finished, ROOT / "data"), 0, 0
    for main, arguments, mine in mutations(facts, finished, tmp_path / "all"):
        data = contents(mine / "data")
        with handlers():
            try:
                main(arguments)
                went_on += 1
            except SystemExit as error:
                assert error.code != 0, arguments
                ended += 1
        assert "Traceback" not in capsys.readouterr().err, arguments
        assert contents(mine / "data") == data and {path.name for path in mine.iterdir()} <= {
            "out",
            "data",
        }, arguments
    assert contents(facts, finished, ROOT / "data") == others and not list(
        (tmp_path / "here").iterdir()
    )
    assert ended > 60 and went_on > 10
