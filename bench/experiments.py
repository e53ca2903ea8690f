"""The experiments of the READMEs, in parts. bench/reproduce.py trains them and prints tables."""

import hashlib
import itertools
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.facts.prepare import make_people
from model import GPT, GPTConfig
from presets import PRESETS
from runtime.options import make_configs
from train import TrainConfig

VOCABULARIES = {"shakespeare": 256, "out/docs": 4097}  # tokens


@dataclass(frozen=True)
class Experiment:
    """A run without its seed."""

    command: str  # with {seed}
    options: dict  # the given ones and the preset's

    def settings(self):
        """A hash of all options and some people. Another hash is another experiment."""
        people = []
        if "facts" in self.options["dataset"]:
            people = make_people(99, np.random.default_rng(0))
        text = json.dumps([self.options, people], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def is_update(self):
        return "init_from" in self.options

    def is_one_by_one(self):
        return "one_by_one" in self.options.get("program", "")

    def people(self):
        """People in its data: 2,000 in data/facts, 4,000 in out/facts4000. 0: other data."""
        name = re.fullmatch(r"facts|out/facts(\d+)", self.options["dataset"])
        if name is None:
            return 0
        return int(name[1] or 2000)

    def model(self):
        """The model, without weights."""
        name = self.options["dataset"]
        vocabulary = 1712
        if "facts" not in name:
            vocabulary = VOCABULARIES[name]
        options = {**self.options, "vocab_size": vocabulary}
        options.pop("program", None)
        _, config = make_configs(options, TrainConfig, GPTConfig)
        with torch.device("meta"):
            return GPT(config, initialize=False)

    def size(self):
        """Parameters, and forward FLOPs per token, both in millions."""
        model = self.model()
        parameters = sum(model.parameter_counts().values())
        flops = sum(model.flops_per_token(model.config.block_size).values())
        return parameters / 1e6, flops / 1e6

    def bytes_read(self):
        """Bytes of values that a token reads, with Memory+ and n-grams."""
        model = self.model()
        c = model.config
        total = 0
        if model.pool is not None:
            total += len(c.mem_layers) * c.mem_heads * c.mem_topk * model.pool.values[0].nbytes
        for i in c.ngram_layers:
            layer = model.blocks[i].ngram
            total += len(layer.orders) * layer.J * model.ngram_pool.values[0].nbytes
        return total


@dataclass(frozen=True)
class Part:
    tier: str  # cpu, more or gpu
    question: str
    seeds: range
    rows: dict  # {label: Experiment}
    compared: bool = True  # with the first row, in a column of differences
    bits: bool = False  # a column with the known facts in bits
    reads: bool = False  # columns on the values that are read
    by_rate: bool = False  # a column for each rate of the network

    def runs(self):
        """{command: (experiment, seed)}, all rows of a seed together."""
        pairs = itertools.product(self.seeds, self.rows.values())
        return {row.command.format(seed=seed): (row, seed) for seed, row in pairs}


def command_line(program, options):
    words = ["python", program]
    for name, value in options.items():
        if isinstance(value, tuple):
            value = ",".join(map(str, value))
        words.append(f"--{name}={value}")
    return " ".join([*words, "--seed={seed}"])


def training(preset, program="train.py", **given):
    """A preset with other options over it. The command omits options with the preset's value, so
    that parts share runs."""
    options = PRESETS[preset]
    changes = {name: value for name, value in given.items() if options.get(name) != value}
    command = command_line(program, {"preset": preset, **changes})
    if program != "train.py":
        given = {"program": program, **given}
    return Experiment(command, {**options, **given})


def facts(system, **given):
    return training(f"facts-{system}", **given)


FALLING = dict(mem_learning_rate=2e-3, mem_decay=4.0)  # as in the paper


def ultramem_skip(**given):
    """UltraMem as in the paper: all SwiGLUs stay, and the output is added one block later."""
    return facts("ultramem", **{**dict(mem_layers=(1,), mem_skip=1, n_ffn=120), **given})


BIGRAM = dict(ngram="bigram", ngram_layers=(0, 1, 2, 3), ngram_rows=16384)  # over Engram's preset
HALF_EACH = dict(mem_keys=90, ngram_layers=(0, 1), ngram_rows=4096)  # over the preset of Memory+


def docs(system, **given):
    """Real text: the docstrings of installed packages (bench/docs.py)."""
    options = {"dataset": "out/docs", "learning_rate": 6e-3, "max_iters": 600, **given}
    if system not in ("moe", "dense"):
        options.setdefault("mem_learning_rate", 2e-2)
    return training(f"shakespeare-{system}", **options)


def apart(system, **given):
    """Facts with longer sentences (bench/apart.py): more steps read as many as the demo does."""
    options = dict(dataset="out/facts-apart", max_iters=4300, eval_interval=4300)
    return facts(system, **options, **given)


def more_people(system, count, **given):
    """Each fact is seen 84 times, three times as often as in the demo. The part "capacity rates"
    tells why the longest runs have a lower rate than the demo."""
    options = {"max_iters": 9 * count // 2, "eval_interval": 3 * count // 4}
    if count != 2000:
        options = {"dataset": f"out/facts{count}", **options}
    if count == 8000 or (count == 4000 and system != "memory"):
        options["learning_rate"] = 2.5e-3
    return facts(system, **{**options, **given})


def large(system, **given):
    """For a GPU: 25 times the facts, 11 times the FLOPs."""
    options = dict(dataset="out/facts50000", batch_size=160, max_iters=10000, eval_interval=2500)
    return facts(system, **options, n_embd=256, learning_rate=1.5e-3, **given)


# For updates: in the demo's table every slot is in use. With so many slots, some seeds have learned
# only 87% of the facts after 3,000 steps.
BASE = facts("memory", mem_keys=512, max_iters=4000)


def base_folder(seed):
    return f"out/base-{BASE.settings()}-{seed}"


def update_with(program, given):
    options = {"init_from": base_folder("{seed}"), **given}
    return Experiment(command_line(program, options), {"program": program, **options})


def finetune(kind, **given):
    """Teach BASE 100 new people, or the new homes of 100 people that it knows, in 200 steps."""
    options = dict(max_iters=200, eval_interval=50, warmup_iters=10, dataset=f"out/facts-{kind}")
    return update_with("train.py", {**options, **given})


def update(kind, slots, **given):
    """The same by changing only the rows of `slots` slots. 0: all"""
    options = dict(dataset=f"out/facts-{kind}", slots=slots)
    return update_with("edit/update.py", {**options, **given})


THREE_LAYERS = dict(mem_layers=(1, 2, 3), n_ffn=480)  # over shakespeare-memory, at equal FLOPs
ON_TEXT = {  # system, and options over its shakespeare preset
    "Memory+": ("memory", {}),
    "Memory+, three layers": ("memory", THREE_LAYERS),
    "Engram": ("engram", {}),
    "mixture of experts": ("moe", {}),
    "dense": ("dense", {}),
}
ON_BYTES = {**ON_TEXT, "Engram, up to five bytes": ("engram", dict(ngram_order=5))}
TEXT_RATES = ((1e-3, 1.5e-3), (2e-3, 3e-3), (4e-3, 1e-2), (6e-3, 2e-2))  # network's, values'


def shakespeare(system, **given):
    return training(f"shakespeare-{system}", **given)


def at_rates(kind, systems, rates):
    """Rows of a part by rate. kind: shakespeare or docs"""
    rows = {}
    for name, (system, options) in systems.items():
        for rate, values_rate in rates:
            given = {"learning_rate": rate, **options}
            if system not in ("moe", "dense"):
                given["mem_learning_rate"] = values_rate
            rows[f"{name}, {rate:g}"] = kind(system, **given)
    return rows


def one_by_one(**given):
    """Teach BASE ten new people, each with an update of its own."""
    row = update_with("bench/one_by_one.py", dict(people=10, **given))
    return Experiment(row.command, {"dataset": "facts", **row.options})


RATES = (2.5e-3, 4e-3, 6e-3)  # the presets have 4e-3
COMPARED = {"Memory+": "memory", "mixture of experts": "moe", "dense": "dense"}
THREE_PKM = facts("memory", mem_gate=False, mem_qk_norm=False, n_ffn=288)
HEADLINE = {
    "Memory+": facts("memory"),
    "dense": facts("dense"),
    "dense, twice the FLOPs": facts("dense2x"),
    "dense, same time (5,000 steps)": facts("dense", max_iters=5000),
    "mixture of experts, same time (4,300 steps)": facts("moe", max_iters=4300),
}
PARTS = {
    "headline": Part(
        "cpu", "Memory+ against dense, at equal FLOPs and seconds", range(1, 9), HEADLINE),
    "systems": Part("cpu", "all kinds of layers at equal FLOPs and parameters", range(1, 6), {
        "Memory+": facts("memory"),
        "product-key memory, one layer": facts("pkm"),
        "product-key memory, three layers": THREE_PKM,
        "PEER": facts("peer"),
        "UltraMem, without its skip": facts("ultramem"),
        "UltraMem": ultramem_skip(),
        "Engram": facts("engram"),
        "mixture of experts": facts("moe"),
        "dense": facts("dense"),
    }),
    "layers": Part("cpu", "number and place of layers, and their pools", range(1, 6), {
        "three layers on one pool (Memory+)": facts("memory"),  # n_ffn keeps the FLOPs equal
        "two layers on one pool": facts("memory", mem_layers=(1, 3), n_ffn=176),
        "one layer": facts("memory", mem_layers=(2,), n_ffn=184),
        "none (dense)": facts("dense"),
        "three layers, each with a third of the slots": facts(
            "memory", mem_shared=False, mem_keys=74, n_ffn=264),
        "two layers, each with half of the slots": facts(
            "memory", mem_layers=(1, 3), mem_shared=False, mem_keys=90, n_ffn=200),
        "three layers on one pool, in blocks 0, 1, 2": facts("memory", mem_layers=(0, 1, 2)),
        "one layer, in block 1": facts("memory", mem_layers=(1,), n_ffn=184),
        "one layer, in block 3": facts("memory", mem_layers=(3,), n_ffn=184),
    }),
    "parts": Part("cpu", "the parts of Memory+", range(1, 6), {
        "Memory+": facts("memory"),  # n_ffn keeps the FLOPs equal
        "no gate, no output matrix": facts("memory", mem_gate=False, n_ffn=288),
        "no qk-norm": facts("memory", mem_qk_norm=False),
        "neither (product-key memory)": THREE_PKM,
        "1 head of 64 slots": facts("memory", mem_heads=1, mem_topk=64, mem_key_dim=128),
        "8 heads of 8 slots": facts("memory", mem_heads=8, mem_topk=8, mem_key_dim=16),
        "values' rate 5e-3": facts("memory", mem_learning_rate=5e-3),
        "values' rate 4e-2": facts("memory", mem_learning_rate=4e-2),
        "values' rate on a cosine": facts("memory", mem_decay=1.0),
        "Adam on all rows": facts("memory", program="bench/all_rows.py"),
    }),
    "text": Part("cpu", "tinyshakespeare", range(1, 6), {
        "Memory+": shakespeare("memory"),
        "Memory+, three layers": shakespeare("memory", **THREE_LAYERS),
        "Engram": shakespeare("engram"),
        "Engram, up to five bytes": shakespeare(
            "engram", learning_rate=4e-3, ngram_order=5, mem_learning_rate=1e-2),
        "mixture of experts": shakespeare("moe"),
        "dense": shakespeare("dense"),
    }, reads=True),
    "text rates": Part(
        "more", "tinyshakespeare, learning rates", range(1, 2),
        at_rates(shakespeare, ON_BYTES, TEXT_RATES), by_rate=True),
    "n-grams": Part("more", "rows addressed by content, or by tokens", range(1, 6), {
        "Memory+": facts("memory"),
        "Engram": facts("engram"),
        "bigram hash": facts("engram", n_ffn=184, **BIGRAM),
        "Memory+ and Engram": facts("memory", n_ffn=168, **HALF_EACH),
        "dense": facts("dense"),
    }, reads=True),
    "names apart": Part("more", "names whose words stand apart", range(1, 3), {
        "Memory+": apart("memory"),
        "Engram": apart("engram"),
        "dense": apart("dense"),
    }),
    "docs": Part("more", "real text: docstrings of Python packages", range(1, 6), {
        "Memory+": docs("memory"),
        "Memory+, three layers": docs("memory", **THREE_LAYERS),
        "mixture of experts": docs("moe"),
        "Engram": docs("engram"),
        "Engram, Adam on all rows": docs("engram", program="bench/all_rows.py"),
        "bigram hash": docs("engram", n_ffn=344, **BIGRAM),
        "Memory+ and Engram": docs("memory", n_ffn=304, **HALF_EACH),
        "dense": docs("dense"),
        "dense, same time (640 steps)": docs("dense", max_iters=640),
    }, reads=True),
    "docs rates": Part(
        "more", "docstrings, learning rates", range(1, 2),
        at_rates(docs, ON_TEXT, TEXT_RATES[1:]), by_rate=True),
    "rates": Part("more", "learning rates of the network", range(1, 3), {
        **{f"{system}, {rate:g}": facts(system, learning_rate=rate)
           for system in ("memory", "dense", "dense2x", "moe", "pkm", "peer", "ultramem", "engram")
           for rate in RATES},
        **{f"{system}, {steps:,} steps, {rate:g}": facts(
            system, max_iters=steps, learning_rate=rate)
           for system, steps in (("dense", 5000), ("moe", 4300)) for rate in RATES[:2]},
        **{f"ultramem with skip, {rate:g}": ultramem_skip(learning_rate=rate, **FALLING)
           for rate in RATES},
    }, by_rate=True),
    "UltraMem": Part("more", "UltraMem's skip and values' rate", range(1, 2), {
        "no skip, in block 2, 5e-3": facts("ultramem"),
        "no skip, in block 2, 2e-2": facts("ultramem", mem_learning_rate=2e-2),
        "no skip, in block 2, 2e-3, falling": facts("ultramem", **FALLING),
        "skip from block 1, 2e-3": ultramem_skip(mem_learning_rate=2e-3),
        "skip from block 1, 5e-3": ultramem_skip(),
        "skip from block 1, 2e-2": ultramem_skip(mem_learning_rate=2e-2),
        "skip from block 1, 2e-2, with softmax": ultramem_skip(
            mem_softmax=True, mem_learning_rate=2e-2),
        "skip from block 1, 2e-3, falling": ultramem_skip(**FALLING),
        "skip from block 1, 8e-3, falling": ultramem_skip(mem_learning_rate=8e-3, mem_decay=4.0),
        "skip from block 2, 2e-3, falling": ultramem_skip(mem_layers=(2,), **FALLING),
    }, compared=False),
    "slots": Part("cpu", "more slots", range(1, 6), {
        "16,384 slots": facts("memory"),
        "256 slots": facts("memory", mem_keys=16, n_ffn=384),  # n_ffn keeps the FLOPs equal
        "1,024 slots": facts("memory", mem_keys=32, n_ffn=352),
        "4,096 slots": facts("memory", mem_keys=64, n_ffn=288),
        "36,864 slots": facts("memory", mem_keys=192, n_ffn=32),
        "36,864 slots, 7% more FLOPs": facts("memory", mem_keys=192),
    }),
    "capacity": Part("more", "more people, each fact 84 times", range(1, 3), {
        f"{name}, {count:,} people": more_people(system, count)
        for count in (2000, 4000, 8000) for name, system in COMPARED.items()
    }, compared=False, bits=True),
    "capacity rates": Part("more", "more people, learning rates", range(1, 3), {
        **{f"dense, 4,000 people, {rate:g}": more_people("dense", 4000, learning_rate=rate)
           for rate in (1.5e-3, 2.5e-3, 4e-3)},
        **{f"mixture of experts, 4,000 people, {rate:g}": more_people(
            "moe", 4000, learning_rate=rate) for rate in (2.5e-3, 4e-3)},
        **{f"dense, 8,000 people, {rate:g}": more_people("dense", 8000, learning_rate=rate)
           for rate in (1.5e-3, 2.5e-3)},
        **{f"mixture of experts, 8,000 people, {rate:g}": more_people(
            "moe", 8000, learning_rate=rate) for rate in (1.5e-3, 2.5e-3)},
        **{f"Memory+, 8,000 people, {rate:g}": more_people("memory", 8000, learning_rate=rate)
           for rate in (2.5e-3, 4e-3)},
    }, by_rate=True),
    "new people": Part("more", "learning 100 people, and forgetting 2,000", range(1, 6), {
        "all weights, AdamW 4e-3, RowAdam 2e-2 (as in training)": finetune("new"),
        "all weights, AdamW 3e-4, RowAdam 2e-2": finetune("new", learning_rate=3e-4),
        "all weights, AdamW 1e-4, RowAdam 5e-3": finetune(
            "new", learning_rate=1e-4, mem_learning_rate=5e-3),
        "all rows, RowAdam 1e-2": update("new", slots=0, optimizer="rowadam", learning_rate=1e-2),
        "all rows, SGD": update("new", slots=0),
        **{f"{slots:,} slots": update("new", slots=slots)
           for slots in (256, 1024, 4096, 16384, 32768, 65536)},
        "16,384 slots, chosen by reads": update("new", slots=16384, choose_by="reads"),
        "65,536 slots, and 2 old sequences in each step": update("new", slots=65536, rehearse=2),
        "all rows, and 2 old sequences in each step": update("new", slots=0, rehearse=2),
    }),
    "moved people": Part("more", "unlearning 200 facts, and forgetting 11,800", range(1, 6), {
        "all weights, AdamW 3e-4, RowAdam 2e-2": finetune("moved", learning_rate=3e-4),
        "all rows, SGD": update("moved", slots=0),
        **{f"{slots:,} slots": update("moved", slots=slots) for slots in (256, 1024, 4096, 16384)},
    }),
    "one by one": Part("more", "ten new people, one after another", range(1, 6), {
        "1,024 slots each": one_by_one(slots=1024, max_iters=20),
        "all rows": one_by_one(slots=0, max_iters=20),
        "all rows, and 2 old sequences in each step": one_by_one(
            slots=0, max_iters=20, rehearse=2),
    }),
    "large": Part("gpu", "Memory+ against dense, with 25 times the facts", range(1, 2), {
        "Memory+": large("memory", mem_keys=512, n_ffn=344),
        "dense": large("dense", n_ffn=616),
        "dense, twice the FLOPs": large("dense2x", n_ffn=1736),
    }),
    "large slots": Part("gpu", "and with more slots", range(1, 2), {
        "262,144 slots": large("memory", mem_keys=512, n_ffn=344),
        "16,384 slots": large("memory", mem_keys=128, n_ffn=1112),
        "65,536 slots": large("memory", mem_keys=256, n_ffn=856),
    }),
}  # fmt: skip
