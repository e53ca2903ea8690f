"""README.md and bench/README.md: commands, code, outputs, numbers, links, length."""

import itertools
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import textwrap
from collections import Counter
from dataclasses import fields

import pytest
import safetensors.torch
import torch
from test_openwebtext import BYTES, corpus

import memory
from bench import reproduce
from bench.experiments import PARTS
from helpers import ROOT, SMALL, log_of, prepare_here, train_here
from memory import MemoryLayer, ValuePool
from model import GPTConfig
from presets import PRESETS
from train import TrainConfig

README = (ROOT / "README.md").read_text(encoding="utf-8")
BENCH = (ROOT / "bench/README.md").read_text(encoding="utf-8")
COPIED = (
    "out",
    ".git",
    ".ci",
    "*.bin",
    "*.jsonl",
    "meta.json",
    "archives",
    "__pycache__",
    ".*_cache",
)


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def prose(text):
    """Without code, links and pictures' names."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`]*`|\]\([^)]*\)", "", text)


# --- form -----------------------------------------------------------------------------------------------------------


def test_it_is_short():
    lines = README.splitlines()
    assert len(lines) <= 200 and max(map(len, lines)) <= 110
    assert len(README.split()) < 2200


@pytest.mark.parametrize("name", ["README.md", "bench/README.md"])
def test_links_lead_somewhere(name):
    path = ROOT / name
    text = path.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert len(links) > 5
    for link in links:
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = path
        if file:
            target = path.parent / file
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles]
            assert anchor in anchors, link


def test_the_map_names_all_files_and_folders():
    table = README.partition("## In your own model")[0]
    for path in ROOT.glob("*.py"):
        assert f"[{path.name}]({path.name})" in table
    for path in ROOT.glob("*/*.py"):
        assert f"[{path.parent.name}/](" in table


# --- commands ---------------------------------------------------------------------------------------------------------


def commands(block):
    """[(words, lines of its output that are shown)] of a shell block."""
    found = []
    for line in block.splitlines():
        if line.startswith("# "):
            found[-1][1].append(line.removeprefix("# "))
        else:
            for command in line.split(" && "):
                found.append((shlex.split(command, comments=True), []))
    return found


def short_form(words, archives):
    """The same command for a small model, few people, two processes, no network."""
    if words[0] == "pip":  # all of it is there already
        return [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", *words[2:]]
    if words[0] == "torchrun":
        words = ["-m", "torch.distributed.run", *words[1:]]
        words[words.index("--nproc_per_node=8")] = "--nproc_per_node=2"
    else:
        assert words[0] == "python"
        words = words[1:]
    program = next(word for word in words if word.endswith(".py"))
    more = []
    if program == "train.py" and "--resume" in words:
        more = ["--max_iters=6"]
    elif program == "train.py" and "--init_from=out/mine" in words:
        more = ["--dataset=mine", "--max_iters=2"]
    elif program == "train.py":
        words = [word for word in words if not word.startswith("--max_iters=")]
        given = {word.partition("=")[0] for word in words}
        more = [option for option in SMALL if option.partition("=")[0] not in given]
        if any("gpt2" in word for word in words):
            more += ["--mem_count=1", "--block_size=16"]  # validation has 40 tokens
    elif program == "edit/update.py":
        more = ["--max_iters=2", "--eval_iters=1", "--eval_interval=2"]
    elif program == "data/facts/prepare.py":
        more = ["--people=9", "--new=3", "--biographies=2"]
    elif program == "data/openwebtext/prepare.py":  # with a vocabulary that needs no download
        code = f"import data.openwebtext.prepare as it; it.VOCABULARY = {BYTES!r}; it.main()"
        code = code.replace("main()", f"main({[*words[1:], f'--source={archives}']!r})")
        words = ["-c", f"if __name__ == '__main__':\n  {code}"]
    return [sys.executable, *words, *more]


def shape(line):
    """What stays of a line of output when numbers, words and passages change."""
    line = re.sub(r"   +\(.*\)$", "", line.rstrip())  # a note
    line = re.sub(r"'.*'", "'...'", line)
    line = re.sub(r"\S.* →.*", "... → ...", line)
    return re.sub(r"\d[\d,.]*", "0", line).replace("out/facts-memory", "out/...")


@pytest.fixture
def copy(tmp_path):
    """A fresh clone with little data and a trained demo."""
    here = tmp_path / "nanomem"
    shutil.copytree(ROOT, here, ignore=shutil.ignore_patterns(*COPIED))
    prepare_here("facts", "--people=9", "--biographies=20", "--out", here / "data/facts")
    data = f"--dataset={here}/data/facts"
    train_here(*SMALL, data, f"--out_dir={here}/out/facts-memory")
    (here / "mine.txt").write_text("How doth the little busy bee improve each shining hour. " * 99)
    (here / "archives").mkdir()
    for name, archive in corpus()[0].items():
        (here / "archives" / name).write_bytes(archive)
    return here


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(blocks("sh"))))
def test_every_command_runs_and_prints_what_is_shown(number, copy):
    environment = {**os.environ, "PYTHONPATH": ""}
    for words, shown in commands(blocks("sh")[number]):
        if words[1] == "train.py" and len(words) == 2:
            shutil.rmtree(copy / "out")
        done = subprocess.run(
            short_form(words, copy / "archives"),
            cwd=copy, env=environment, capture_output=True, text=True, timeout=200,
        )  # fmt: skip
        assert done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"
        printed = {shape(line) for line in done.stdout.splitlines()}
        assert {shape(line) for line in shown} <= printed, (shown, done.stdout)


def test_options_and_presets_are_those_of_the_programs():
    """Also of commands in the text, which do not run here."""
    options = {f.name for f in (*fields(TrainConfig), *fields(GPTConfig))} | {"preset"}
    found = re.findall(r"train\.py ([^`\n#]*)", README + BENCH)
    used = {word for part in found for word in re.findall(r"--(\w+)", part)}
    assert "mem_keys" in used and used - options <= {"help"}
    row = re.search(r"^- \*\*Presets\*\*.*?\n- ", README, re.DOTALL | re.MULTILINE)[0]
    named = set(re.findall(r"`([a-z0-9-]+)`", row))
    families = {name.rpartition("-")[0] for name in PRESETS}
    assert named == families | {name.rpartition("-")[2] for name in PRESETS}


def test_fields_of_the_log_are_those_that_it_has(facts, finished, tmp_path):
    again = tmp_path / "again"
    train_here(
        f"--init_from={finished}", f"--dataset={facts}", f"--out_dir={again}", "--max_iters=2"
    )
    written = {name for out in (finished, again) for line in log_of(out) for name in line}
    table = README.partition("| field of")[2].partition("\n\n")[0]
    described = set(re.findall(r"`(\w+)`", table)) - {"jsonl"}
    on_a_gpu = {"gpu_gib", "gpu_gib_reserved"}
    # a dataset of the same questions has no old ones left to ask
    assert described == written | on_a_gpu | {"old_recall"}


# --- Python -----------------------------------------------------------------------------------------------------------


def python_block(text):
    return next(code for code in blocks("python") if text in code)


def test_all_python_blocks_are_tested_here():
    assert len(blocks("python")) == 3


@pytest.mark.slow
def test_two_files_and_the_lines_of_the_readme_are_all_that_one_needs(tmp_path):
    for name in ("memory.py", "kernels.py"):
        shutil.copy(ROOT / name, tmp_path)
    check = "assert y.shape == x.shape and y.isfinite().all() and len(pool.values) == 65536"
    before = "from memory import *\nsave = ValuePool.initialize\n"
    before += "def keep(pool):\n    save(pool)\n    global first\n    first = pool.values.clone()\n"
    before += "ValuePool.initialize = keep\n"
    after = "assert (pool.values != first).any(dim=1).sum() > 1000  # the optimiser moved them\n"
    (tmp_path / "own.py").write_text(before + python_block("ValuePool(") + check + "\n" + after)
    command = [sys.executable, "-I", "-c", "import sys; sys.path.insert(0, '.'); import own"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_trained_model_in_python(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, "out/facts-memory")
    scope = {}
    exec(python_block("from_checkpoint"), scope)
    assert scope["logits"].shape == (1, scope["ids"].size(1), 1712)
    assert capsys.readouterr().out.startswith("Zailam Zimor Rinar was born in")
    weights = safetensors.torch.load_file("out/weights.safetensors")
    assert weights.keys() == scope["model"].state_dict().keys() and "pool.values" in weights


def test_the_search_of_the_readme_finds_all_pairs_of_the_best_sub_keys():
    scope = {}
    exec(textwrap.dedent(python_block("def retrieve")), vars(memory), scope)
    grid = type("Grid", (MemoryLayer,), scope)
    torch.manual_seed(0)
    layer = grid(dim=32, slots=15**2, heads=2, topk=4)
    pool = ValuePool(slots=15**2, dim=32)
    x = torch.randn(5, 32)
    slots, weights = layer.retrieve(x)
    best1, best2 = layer.scores(x).topk(2).indices.tolist()  # of each head and token
    for t in range(5):
        for h in range(2):
            want = {15 * i + j for i in best1[h][t] for j in best2[h][t]}
            assert set(slots[t, 4 * h : 4 * h + 4].tolist()) == want
    torch.testing.assert_close(weights.view(5, 2, 4).sum(-1), torch.ones(5, 2))
    assert layer(x, pool).shape == x.shape


# --- numbers ----------------------------------------------------------------------------------------------------------


def all_lines():
    return [json.loads(line) for line in reproduce.RESULTS.read_text().splitlines()]


def results():
    """{command: line} on the machine of the first line."""
    lines = all_lines()
    machine = {name: lines[0][name] for name in reproduce.this_machine(False)}
    return reproduce.select_results(lines, machine)


def lines_of(part, label, found):
    part = PARTS[part]
    commands = [part.rows[label].command.format(seed=seed) for seed in part.seeds]
    return [found[command] for command in commands if command in found]


def test_the_tables_are_those_of_the_results():
    found = results()
    parts = ["headline", "systems", "layers", "parts", "slots", "text", "capacity", "rates"]
    parts += ["UltraMem", "new people", "moved people", "one by one"]
    parts += ["n-grams", "names apart", "docs", "text rates", "docs rates", "capacity rates"]
    rows = [row for part in parts for row in reproduce.table(part, found).splitlines()[4:]]
    rows = Counter(row for row in rows if "not measured" not in row)
    assert rows.total() == 5 + 9 + 9 + 10 + 6 + 6 + 9 + 11 + 10 + 14 + 6 + 3 + 5 + 3 + 9 + 6 + 5 + 5
    assert not [row for row, count in rows.items() if BENCH.count(f"\n{row}\n") != count]


SYSTEMS = {  # row of the README: label in the results
    "[Memory+](https://arxiv.org/abs/2412.09764)": "Memory+",
    "[PKM](https://arxiv.org/abs/1907.05242), one layer": "product-key memory, one layer",
    "[PEER](https://arxiv.org/abs/2407.04153)": "PEER",
    "[UltraMem](https://arxiv.org/abs/2411.12364), no skip": "UltraMem, without its skip",
    "[Engram](https://arxiv.org/abs/2601.07372), two layers": "Engram",
    "[mixture of experts](https://arxiv.org/abs/1701.06538)": "mixture of experts",
    "dense": "dense",
}  # fmt: skip


def table_of_systems(found):
    rows = []
    for row, label in SYSTEMS.items():
        lines = lines_of("systems", label, found)
        assert len(lines) == 5
        recall = reproduce.with_error([100 * line["recall"] for line in lines], ".1f")
        loss = reproduce.with_error([line["val_loss"] for line in lines], ".3f")
        size, _ = PARTS["systems"].rows[label].size()
        speed = max(line["tokens_per_s"] for line in lines)
        rows.append(f"| {row} | {recall} | {loss} | {size:.2f}M | {speed:,.0f} |")
    return rows


def points_lost(part, label, found):
    """Recall of a part's first row minus that of another row, each seed, in percent."""
    first = lines_of(part, next(iter(PARTS[part].rows)), found)
    return differences(first, lines_of(part, label, found))


def differences(some, others):
    """Recall of some lines minus that of others, each seed, in percent."""
    return [100 * (a["recall"] - b["recall"]) for a, b in pairs_of(some, others)]


def pairs_of(some, others):
    """Lines of the same seeds."""
    lines = {line["command"].rpartition("=")[2]: line for line in others}
    found = [(line, line["command"].rpartition("=")[2]) for line in some]
    return [(line, lines[seed]) for line, seed in found if seed in lines]


def nats_above(part, label, other, found):
    """Validation loss of a row minus that of another one, in nats, with its standard error."""
    lines = lines_of(part, label, found)
    others = lines_of(part, other, found)
    above = [a["val_loss"] - b["val_loss"] for a, b in pairs_of(lines, others)]
    return reproduce.with_error(above, ".3f")


def recalls_of(lines):
    return reproduce.with_error([100 * line["recall"] for line in lines], ".1f")


def mean_recall(lines):
    return 100 * statistics.mean(line["recall"] for line in lines)


def sentences():
    """The parts of sentences in README.md that hold measured numbers."""
    runs = results()
    memory_lines = lines_of("systems", "Memory+", runs)
    dense_lines = lines_of("systems", "dense", runs)
    memory_speed = max(line["tokens_per_s"] for line in memory_lines)
    dense_speed = max(line["tokens_per_s"] for line in dense_lines)
    eight = {name: lines_of("headline", name, runs) for name in ("Memory+", "dense")}
    assert [len(lines) for lines in eight.values()] == [8, 8]
    facts = PRESETS["facts-memory"]
    rates = "4e-3 (network, cosine) and 2e-2 (values, constant)"
    assert (facts["learning_rate"], facts["mem_learning_rate"]) == (4e-3, 2e-2)
    assert (facts["n_layer"], facts["mem_layers"]) == (4, (1, 2, 3))
    slow_dense = mean_recall(lines_of("headline", "dense, same time (5,000 steps)", runs))
    experts = lines_of("headline", "mixture of experts, same time (4,300 steps)", runs)
    experts = reproduce.with_error([100 * line["recall"] for line in experts], ".0f")
    seconds = 0
    for label in PARTS["systems"].rows:
        seconds += sum(line["seconds"] for line in lines_of("systems", label, runs))
    hours = seconds / 2 / 3600  # two runs at a time
    long = {}
    for name in ("mixture of experts", "dense"):
        lines = lines_of("capacity", f"{name}, 2,000 people", runs)
        assert len(lines) == 2
        long[name] = f"{mean_recall(lines):.0f}%"
    assert set(long.values()) == {"100%"}
    without = {}
    for part in ("layers", "parts"):
        for label in PARTS[part].rows:
            without[label] = reproduce.with_error(points_lost(part, label, runs), ".0f")
    text = lines_of("text", "Memory+", runs)
    nats = nats_above("text", "dense", "Memory+", runs)
    update = lines_of("new people", "65,536 slots", runs)
    new = reproduce.with_error([100 * line["recall"] for line in update], ".0f")
    lost = [100 * (line["curve"][0][-2] - line["curve"][-1][-2]) for line in update]
    old = reproduce.with_error(lost, ".1f")
    seconds_of_update = statistics.median(line["update_seconds"] for line in update)
    assert (len(text), len(update)) == (5, 5)
    ngrams = [100 * line["recall"] for line in lines_of("n-grams", "Engram", runs)]
    return [
        f"recalls {mean_recall(eight['Memory+']):.0f}% of 12,000 made-up facts",
        f"tokens, dense recalls {mean_recall(eight['dense']):.0f}%",
        f"Memory+ trains at {round(memory_speed, -2):,.0f} tokens a second",
        f"dense at {round(dense_speed, -2):,.0f}",
        f"In about the same time, dense recalls {slow_dense:.0f}%",
        f"a mixture of experts draws level ({experts}%)",
        f"{facts['mem_keys']}² slots, `heads=4, topk={facts['mem_topk']}`, blocks 1, 2, 3 of 4, and rates of {rates}",
        *table_of_systems(runs),
        "3,000 steps of 1,024 tokens; mean ± standard error of five seeds",
        f"`python bench/reproduce.py --only=systems` ({hours:.1f} hours",
        f"dense and the mixture recall {long['dense']}, too (two seeds)",
        f"One layer recalls {without['one layer']} points less than three on one pool",
        f"without gate and `W_o`, {without['no gate, no output matrix']};",
        f"without qk-norm, {without['no qk-norm']},",
        f"with a third of the slots each, {without['three layers, each with a third of the slots']}.",
        f"Memory+ beats dense by {nats} nats a byte of Shakespeare",
        "by the last five bytes, beats Memory+ by "
        f"{nats_above('text', 'Memory+', 'Engram, up to five bytes', runs)}; by three tokens, on "
        f"docstrings, by {nats_above('docs', 'Memory+', 'Engram', runs)}. "
        f"Of facts, it recalls {reproduce.with_error(ngrams, '.0f')}%",
        f"In {seconds_of_update:.0f} s on a CPU, the update ({update[0]['bytes'] / 1e6:.1f} MB) teaches {new}% of 600 new facts",
        f"costs {old} points of old recall (five seeds",
        "100 new people by changing 65,536 slots",
    ]


def test_sentences_on_updates_are_those_of_the_results():
    runs = results()

    def lost(part, label):
        """Points of old recall lost, of each seed."""
        lines = lines_of(part, label, runs)
        assert len(lines) == 5
        return [100 * (line["curve"][0][-2] - line["curve"][-1][-2]) for line in lines]

    def more(part, label, other):
        pairs = zip(lost(part, label), lost(part, other), strict=True)
        return reproduce.with_error([a - b for a, b in pairs], ".1f")

    few = "65,536 slots"
    rehearsed = ", and 2 old sequences in each step"
    text = joined(BENCH)
    for sentence in (
        f"{few} lose {more('new people', few, few + rehearsed)} points less with them",
        f"and all rows {more('new people', 'all rows, SGD', 'all rows' + rehearsed)}.",
        f"all rows lose {more('one by one', 'all rows', '1,024 slots each')} points more than 1,024",
        f"each step save {more('one by one', 'all rows', 'all rows' + rehearsed)} of them",
    ):
        assert sentence in text, sentence


NOT_MEASURED = {  # numbers of README.md that are of papers, definitions or versions
    "2.9": "PyTorch",
    "4, 12, 20 of 24": "the paper's",
    "119 of their 1,024 sums": "tests/test_memory.py counts them",
    "±3%) and size (±5%)": "tests/test_systems.py",
    "the demo's 16": "presets.py",
    "every 10 steps": "log_interval",
    "the busiest 1%": "a definition",
    "bfloat16": "a type",
    "float16": "a type",
    "0.02": "memory.py, tests/test_memory.py",
    "24 GB": "an estimate, bench/README.md",
    "80 GB": "an estimate, bench/README.md",
    "0.78 of Memory+'s speed": "bench/README.md",
    "2019": "a year",
    "4 to 5 times": "a table of bench/README.md",
}


def test_what_is_not_in_the_results_stands_in_a_table():
    row = next(line for line in BENCH.splitlines() if "training step of the SwiGLU" in line)
    assert "Memory+ 4.9 times as long" in row and "4.3 times" in row


def joined(text):
    return re.sub(r"\s+", " ", text)


def test_every_number_of_the_readme_is_measured():
    text = joined(README)
    left = joined(prose(README))
    for sentence in sentences():
        assert joined(sentence) in text, sentence
        left = left.replace(joined(prose(sentence)), " ")
    for words in NOT_MEASURED:
        assert words in left, words
        left = left.replace(words, " ")
    left = re.sub(r"\b[A-Z]\w*-?\d+\b|\d\. |\[\d", " ", left)  # A100, GPT-2; items; links
    assert not re.findall(r"[^ ]*\d[^ ]*", left)


def test_the_output_that_is_shown_is_that_of_seed_1():
    runs = results()
    line = lines_of("systems", "Memory+", runs)[0]
    steps = PRESETS["facts-memory"]["max_iters"]
    shown = blocks("sh")[0]
    assert f"# {steps:,} steps, {steps * 16 * 64:,} tokens in" in shown
    assert f"train, {line['val_loss']:.3f} validation" in shown
    assert f"recall       {line['recall']:.1%} of 12,000" in shown
    assert f"memory       {line['mem_used']:.1%} of slots read" in shown
    mean = mean_recall(lines_of("headline", "Memory+", runs))
    assert f"the mean of eight seeds is {mean:.0f}%" in shown


def test_the_rate_of_the_presets_is_the_best_with_both_seeds():
    """For all systems with other rates but two, as bench/README.md says."""
    runs = results()
    preset = {}
    others = {}
    for label in PARTS["rates"].rows:
        system, rate = label.rsplit(", ", 1)
        lines = lines_of("rates", label, runs)
        if rate == "0.004":
            preset[system] = lines
        elif lines:
            others.setdefault(system, []).append(lines)
    assert len(others) == 11
    best = {}
    for system, found in others.items():
        best[system] = all(min(differences(preset[system], lines)) > 0 for lines in found)
    assert {system for system in best if not best[system]} == {"dense2x", "moe, 4,300 steps"}


def test_sentences_of_bench_readme_are_those_of_the_results():
    runs = results()
    memory_lines = lines_of("headline", "Memory+", runs)
    one_layer = lines_of("layers", "one layer", runs)
    plain = lines_of("systems", "product-key memory, one layer", runs)
    dense = mean_recall(lines_of("headline", "dense", runs))
    wide = mean_recall(lines_of("headline", "dense, twice the FLOPs", runs))
    recall = mean_recall(memory_lines)
    behind = reproduce.with_error(
        points_lost("headline", "dense, same time (5,000 steps)", runs), ".1f"
    )
    experts = points_lost("headline", "mixture of experts, same time (4,300 steps)", runs)
    ahead = reproduce.with_error([-points for points in experts], ".1f")
    lost = {}
    for part in ("layers", "parts", "systems"):
        for label in PARTS[part].rows:
            lost[label] = reproduce.with_error(points_lost(part, label, runs), ".1f")
    separate = lines_of("layers", "two layers, each with half of the slots", runs)
    shared = lines_of("layers", "two layers on one pool", runs)
    two_tables = reproduce.with_error(differences(shared, separate), ".1f")
    in_blocks = {}
    for block in (1, 3):
        lines = lines_of("layers", f"one layer, in block {block}", runs)
        in_blocks[block] = reproduce.with_error(differences(one_layer, lines), ".1f")
    steps = []
    numbers = ("256", "1,024", "4,096", "16,384")
    tables = [lines_of("slots", f"{number} slots", runs) for number in numbers]
    for fewer, more in itertools.pairwise(tables):
        steps.append(reproduce.with_error(differences(more, fewer), ".1f"))
    dense_lines = lines_of("headline", "dense", runs)
    above_dense = reproduce.with_error(differences(tables[0], dense_lines), ".1f")
    twice = lines_of("headline", "dense, twice the FLOPs", runs)
    wider = lines_of("slots", "36,864 slots, 7% more FLOPs", runs)
    wider = reproduce.with_error(differences(wider, tables[3]), ".1f")
    above_twice = reproduce.with_error(differences(tables[2], twice), ".1f")
    names = ("Engram", "Memory+", "dense")
    ngrams, five, plain_dense = [mean_recall(lines_of("n-grams", name, runs)) for name in names]
    apart, memory_apart, dense_apart = [
        mean_recall(lines_of("names apart", name, runs)) for name in names
    ]
    same_time = "dense, same time (640 steps)"
    three = "Memory+, three layers"
    longer = "Engram, up to five bytes"
    rate = "values' rate"
    without_norms = lines_of("parts", "no qk-norm", runs)
    neither = lines_of("parts", "neither (product-key memory)", runs)
    gate_without_norms = reproduce.with_error(differences(neither, without_norms), ".1f")
    ultramem_lines = lines_of("systems", "UltraMem, without its skip", runs)
    in_full = differences(lines_of("systems", "UltraMem", runs), dense_lines)
    ultramem = {}
    for label in PARTS["UltraMem"].rows:
        for line in lines_of("UltraMem", label, runs):
            ultramem[label] = f"{line['recall']:.1%}"
    people = {}
    for label in PARTS["capacity"].rows:
        people[label] = mean_recall(lines_of("capacity", label, runs))
    many = people["dense, 4,000 people"]
    known = people["Memory+, 4,000 people"]
    assert f"{people['mixture of experts, 4,000 people']:.0f}" == f"{known:.0f}"
    assert 8000 * people["dense, 8,000 people"] < 4000 * many  # "fewer facts than of 4,000 people"
    most = people["Memory+, 8,000 people"]
    eight = {}
    for name in ("Memory+", "mixture of experts", "dense"):
        eight[name] = recalls_of(lines_of("capacity", f"{name}, 8,000 people", runs))
    lower = {}
    for name in ("mixture of experts", "dense"):
        lines = lines_of("capacity rates", f"{name}, 8,000 people, 0.0015", runs)
        lower[name] = mean_recall(lines)
    text = joined(BENCH)
    for sentence in (
        f"Memory+ recalls {recall / dense:.1f} times as much as dense at equal FLOPs and tokens, "
        f"and {recall / wide:.1f} times as much as dense with twice the FLOPs",
        f"so does one layer of Memory+ ({recalls_of(one_layer)}%",
        f"It is {lost['product-key memory, one layer']} points below three layers of Memory+",
        f"product-key memory is {lost['product-key memory, three layers']} points below Memory+",
        f"dense is {behind} points behind",
        f"With 4,000 people, dense recalls {many:.0f}%",
        f"{known - many:.0f} points less with 4,000, "
        f"and {most - people['dense, 8,000 people']:.0f} with 8,000 (two seeds",
        f"Memory+ and a mixture with its parameters recall {known:.0f}%",
        f"With 8,000 people, at 2.5e-3, Memory+ recalls {eight['Memory+']}%, a mixture with its parameters "
        f"{eight['mixture of experts']}%, and dense {eight['dense']}%",
        f"But at 1.5e-3, the mixture recalls {lower['mixture of experts']:.0f}% (one seed)",
        f"Dense recalls {lower['dense']:.0f}% at 1.5e-3 (one seed)",
        f"5,000 of dense recall {recalls_of(lines_of('headline', 'dense, same time (5,000 steps)', runs))}%",
        f"with the parameters of Memory+ is {ahead} points ahead",
        f"Memory+ recalls {above_dense} points more than dense",
        f"twice the FLOPs ({above_twice} points more)",
        f"36,864 slots recall {wider} points more than 16,384",
        f"One layer and two layers recall {lost['one layer']} and {lost['two layers on one pool']} points less",
        f"a third of the slots each, they recall {lost['three layers, each with a third of the slots']} points less",
        f"half of the slots each recall {two_tables} points less",
        f"One layer in block 1 recalls {in_blocks[1]} points less",
        f"blocks 0, 1 and 2 recall {lost['three layers on one pool, in blocks 0, 1, 2']} less",
        f"({in_blocks[3]} points less in block 3)",
        f"without qk-norm, Memory+ loses {lost['no qk-norm']} points",
        f"Memory+ loses {lost['no gate, no output matrix']} points, and its validation loss is "
        f"{nats_above('parts', 'Memory+', 'no gate, no output matrix', runs)} nats lower",
        f"without gate and norms, Memory+ recalls {gate_without_norms} points more",
        f"one head of 64 loses {lost['1 head of 64 slots']} points",
        f"eight heads of 8 lose {lost['8 heads of 8 slots']}.",
        f"Twice the rate loses {lost[rate + ' 4e-2']} points",
        f"loses {lost[rate + ' 5e-3']}, which is not certain",
        f"as the network's, it loses {lost[rate + ' on a cosine']}.",
        f"it recalls {lost['Adam on all rows']} points less",
        f"Adam on all rows recalls {lost['Adam on all rows']} points less, which is not certain",
        f"In three layers, product-key memory is {lost['product-key memory, three layers']} points below",
        f"recall rises by {', '.join(steps[:-1])} and {steps[-1]} points",
        f"At the same rate, it recalls {recalls_of(ultramem_lines)}% instead of "
        f"{recalls_of(lines_of('systems', 'UltraMem', runs))}% (five seeds",
        f"cannot be told apart from dense ({reproduce.with_error(in_full, '.1f')} points more)",
        f"Without its skip over a block, its layer recalls {recalls_of(ultramem_lines)}%",
        f"{reproduce.with_error(differences(plain, ultramem_lines), '.1f')} points less than the layer",
        f"({ultramem['no skip, in block 2, 2e-3, falling']})",
        f"**Engram recalls {ngrams / plain_dense:.1f} times as much as dense,** "
        f"and Memory+ {five / plain_dense:.1f} times",
        f"Engram still recalls {apart / dense_apart:.1f} times as much as dense, and "
        f"{apart / memory_apart:.2f} times as much as Memory+ (before: "
        f"{ngrams / plain_dense:.1f} and {ngrams / five:.2f})",
        f"Engram's loss is {nats_above('docs', 'Memory+', 'Engram', runs)} nats below that of Memory+",
        f"Memory+ beats dense by {nats_above('docs', 'dense', 'Memory+', runs)} nats",
        f"dense is {nats_above('docs', 'Memory+', same_time, runs)} better than Memory+, "
        f"which is not certain, and Engram {nats_above('docs', same_time, 'Engram', runs)} better than dense",
        f"Memory+ beats dense by {nats_above('text', 'dense', 'Memory+', runs)} nats a byte, but",
        f"is best, {nats_above('text', 'Memory+', longer, runs)} nats below Memory+. With up to "
        f"three it is {nats_above('text', 'Engram', 'Memory+', runs)} above",
        f"({nats_above('text', 'dense', 'mixture of experts', runs)} nats below it)",
        f"Three layers on one pool are {nats_above('docs', 'dense', three, runs)} nats below dense, "
        f"and {nats_above('docs', 'Memory+', three, runs)} below one layer",
        f"({nats_above('docs', 'dense', 'mixture of experts', runs)} nats below it)",
        f"lowers Engram's loss by {nats_above('docs', 'Engram', 'Engram, Adam on all rows', runs)} nats",
    ):
        assert sentence in text, sentence
