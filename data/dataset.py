"""The dataset folder: what every prepare.py writes and what training and sampling read.

    train.bin, val.bin   token ids one after another, little-endian uint16 (uint32 if meta.json says so)
    meta.json            {"encoding": "gpt2" or the name of a file beside it, "dtype", "vocab_size",
                         "separator"}; {"unfinished": true} while a prepare.py is at work
    vocab.json           the vocabulary, if it is not GPT-2's: plain JSON, see describe_vocabulary
    recall.jsonl         optional: closed-book questions {"prompt", "answer", "attribute"}, one per line;
                         the model has to continue the prompt with a space and the answer

A folder prepared for nanoGPT with GPT-2's vocabulary (two .bin files and none of the others) works as it is.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import tiktoken

from data.files import Refused, blame, lock, sweep, write_file

FORMAT_DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
PARTS = ("train.bin", "val.bin", "meta.json", "vocab.json", "recall.jsonl", "progress.json")
UNFINISHED = {"unfinished": True}
GPT2_SIZE = 50257
AGAIN = "run its prepare.py again (--overwrite replaces what is there)"


# --- writing ----------------------------------------------------------------------------------------------


def claim(folder, overwrite):
    """Lock a folder to write a dataset to. Raises ValueError if it holds a finished one, unless overwrite."""
    lock(folder, wait=True)
    old = [name for name in PARTS if (folder / name).exists()]
    if old and not overwrite and not is_unfinished(folder):
        way_out = "replace it (--overwrite), or give another --out"
        raise ValueError(f"{folder} holds a dataset already ({', '.join(old)}): {way_out}")
    sweep(folder, "|".join(map(re.escape, PARTS)))


def describe_vocabulary(name, pattern, tokens, special_tokens):
    """The contents of vocab.json. tokens: list of bytes, in order of ids; special_tokens: {text: id}."""
    texts = [token.decode("latin-1") for token in tokens]
    return {"name": name, "pattern": pattern, "tokens": texts, "special_tokens": special_tokens}


def write_dataset(folder, train, val, vocabulary, separator, recall=None, overwrite=False, **facts):
    """train, val: sequences of token ids; vocabulary: "gpt2" or the result of describe_vocabulary. Until all
    else is written, meta.json marks the folder as unfinished."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    claim(folder, overwrite)
    encoding = "gpt2" if vocabulary == "gpt2" else "vocab.json"
    vocab_size = size_of(vocabulary)
    dtype = "uint16" if vocab_size <= 2**16 else "uint32"
    write_file(folder / "meta.json", json.dumps(UNFINISHED) + "\n")
    for name in ("recall.jsonl", "vocab.json"):
        (folder / name).unlink(missing_ok=True)
    for name, ids in (("train.bin", train), ("val.bin", val)):
        write_file(folder / name, np.asarray(ids).astype(FORMAT_DTYPES[dtype]).tobytes())
    if recall is not None:
        write_file(
            folder / "recall.jsonl", "".join(json.dumps(question) + "\n" for question in recall)
        )
    if encoding != "gpt2":
        write_file(folder / encoding, json.dumps(vocabulary))
    write_meta(folder, encoding, dtype, vocab_size, separator, **facts)


def write_meta(folder, encoding, dtype, vocab_size, separator, **facts):
    """facts: anything else worth recording about the dataset."""
    meta = {
        "encoding": encoding,
        "dtype": dtype,
        "vocab_size": vocab_size,
        "separator": separator,
        **facts,
    }
    write_file(folder / "meta.json", json.dumps(meta, indent=2) + "\n")


# --- reading ----------------------------------------------------------------------------------------------


def load_json(path):
    """Raises ValueError, naming the file, if it is not JSON."""
    with blame(f"{path} is damaged", AGAIN):
        return json.loads(Path(path).read_text(encoding="utf-8"))


def is_unfinished(folder):
    """Whether a prepare.py is writing to a folder, or was interrupted: half of what it held may be gone."""
    return (folder / "meta.json").exists() and load_json(folder / "meta.json") == UNFINISHED


def check_ids(path, ids, vocab_size):
    if ids.max() >= vocab_size:
        what = f"{path} has token id {ids.max()}, but the vocabulary ends at {vocab_size - 1}"
        raise Refused(f"{what}; prepare it again")


class Dataset:
    """An opened folder. Raises FileNotFoundError or ValueError, with a way out, if it is not a dataset."""

    def __init__(self, folder):
        self.folder = Path(folder)
        for name in ("train.bin", "val.bin"):
            if not (self.folder / name).exists():
                way_out = "dataset= (or background=) must name a folder that has it"
                script = self.folder / "prepare.py"
                if script.exists():
                    way_out = f"run: python {script}"
                raise FileNotFoundError(f"{self.folder / name} not found; {way_out}")
        meta_path = self.folder / "meta.json"
        orphaned = not meta_path.exists() and any(
            (self.folder / name).exists() for name in PARTS[3:]
        )
        if orphaned or is_unfinished(self.folder):
            what = f"{self.folder} is half made: a prepare.py is at work there, or was interrupted"
            raise ValueError(f"{what}; {AGAIN}")
        if meta_path.exists():
            meta = load_json(meta_path)
        elif (self.folder / "meta.pkl").exists():
            raise ValueError(
                f"{self.folder / 'meta.pkl'} is a pickle, which can run code, so it is not read; "
                "prepare the text again: python data/shakespeare/prepare.py --file TEXT --out FOLDER"
            )
        else:  # prepared by nanoGPT with GPT-2's vocabulary
            meta = {
                "encoding": "gpt2",
                "dtype": "uint16",
                "vocab_size": GPT2_SIZE,
                "separator": 50256,
            }
        must = "must give encoding (a name), dtype (uint16 or uint32), vocab_size, and a separator below it"
        with blame(f"{meta_path} {must}", AGAIN):
            self.dtype = FORMAT_DTYPES[meta["dtype"]]
            values = name, size, separator = meta["encoding"], meta["vocab_size"], meta["separator"]
            self.encoding_name, self.vocab_size, self.separator = values
            in_range = [type(v) for v in values] == [str, int, int] and 0 <= separator < size
            if not in_range or size > 256**self.dtype.itemsize or "/" in name:
                raise ValueError(f"not {name!r}, {size!r}, {separator!r}")

    def fingerprint(self):
        """A hash of size and first MiB of each file but recall.jsonl: it shows if they were prepared anew."""
        digest = hashlib.sha256()
        for path in (self.folder / name for name in PARTS[:4] if (self.folder / name).exists()):
            with open(path, "rb") as f:
                digest.update(f.read(2**20) + str(os.fstat(f.fileno()).st_size).encode())
        return digest.hexdigest()

    def tokens(self, split):
        """The token ids of a split as a memory map. split: "train" or "val"."""
        path = self.folder / f"{split}.bin"
        size = path.stat().st_size
        if size == 0 or size % self.dtype.itemsize:
            what = (
                f"{path} has {size} bytes, not a whole number of {self.dtype.name} ids, or no ids"
            )
            raise ValueError(
                f"{what}: is it truncated, or was there too little text? Prepare it again"
            )
        ids = np.memmap(path, dtype=self.dtype, mode="r")
        check_ids(
            path, ids[: 2**24], self.vocab_size
        )  # the rest when it is read: it may exceed memory
        return ids

    def vocabulary(self):
        """What make_encoding takes, and a checkpoint stores: "gpt2" or the contents of vocab.json."""
        path = self.folder / self.encoding_name
        vocabulary = "gpt2" if self.encoding_name == "gpt2" else load_json(path)
        with blame(f"{path} does not fit meta.json", AGAIN):
            if size_of(vocabulary) != self.vocab_size:
                raise ValueError(
                    f"it has {size_of(vocabulary)} tokens, not vocab_size={self.vocab_size}"
                )
        return vocabulary

    def questions(self):
        """The closed-book questions, or None: list of dicts with prompt, answer, and the ids of both."""
        path = self.folder / "recall.jsonl"
        if not path.exists():
            return None
        encode = make_encoding(self.vocabulary()).encode_ordinary
        with blame(f"{path} is damaged", AGAIN):
            lines = path.read_text(encoding="utf-8").split(
                "\n"
            )  # splitlines would also split inside strings
        questions, must = [], "must be a JSON object with prompt and answer, and perhaps attribute"
        for number, line in enumerate(lines, 1):
            if line:
                with blame(f"{path}, line {number}: {must}", AGAIN):
                    question = {"attribute": "questions"} | json.loads(line)
                    if not isinstance(question["attribute"], str):
                        raise ValueError(f"attribute is {question['attribute']!r}")
                    prompt, answer = encode(question["prompt"]), encode(" " + question["answer"])
                    questions.append(question | {"prompt_ids": prompt, "answer_ids": answer})
        return questions


def size_of(vocabulary):
    return GPT2_SIZE if vocabulary == "gpt2" else make_encoding(vocabulary).n_vocab


def make_encoding(vocabulary):
    """vocabulary: "gpt2" or the contents of vocab.json, of which nothing is executed -> tiktoken.Encoding"""
    if vocabulary != "gpt2":
        with blame("the vocabulary is damaged", "run prepare.py again"):
            tokens, special = vocabulary["tokens"], vocabulary["special_tokens"]
            ranks = {token.encode("latin-1"): i for i, token in enumerate(tokens)}
            if (
                not {bytes([i]) for i in range(256)} <= ranks.keys()
                or b"" in ranks
                or "" in special
            ):
                raise ValueError("single bytes are missing, or a token is empty")
            if sorted([*ranks.values(), *special.values()]) != list(
                range(len(tokens) + len(special))
            ):
                raise ValueError("two tokens are the same, or ids are missing")
            options = {
                "pat_str": vocabulary["pattern"],
                "mergeable_ranks": ranks,
                "special_tokens": special,
            }
            return tiktoken.Encoding(vocabulary["name"], **options)
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # tiktoken passes on whatever its download raised
        raise FileNotFoundError(
            f"GPT-2's vocabulary could not be fetched ({type(error).__name__}); where there is a network, "
            "run tiktoken once with TIKTOKEN_CACHE_DIR=FOLDER; then copy the folder here and set the variable"
        ) from None


def find_folder(name):
    """A folder in data/, or a path. data/facts, the default dataset, is made if it is missing."""
    data = Path(__file__).resolve().parent
    folder = data / name if Path(name).name == name and (data / name).is_dir() else Path(name)
    if folder == data / "facts" and (is_unfinished(folder) or not (folder / "meta.json").exists()):
        subprocess.run([sys.executable, folder / "prepare.py"])
        if not (folder / "meta.json").exists():
            elsewhere = f"python {folder / 'prepare.py'} --out FOLDER"
            raise OSError(f"{folder} could not be made, see above; elsewhere: {elsewhere}")
    return folder


def open_dataset(folder, block_size, seed):
    """What training needs of a folder, checked: batches, questions or None, and facts for a checkpoint."""
    dataset = Dataset(folder)
    fingerprint, train, val = dataset.fingerprint(), dataset.tokens("train"), dataset.tokens("val")
    data = {
        "train": Batches(train, block_size, seed, dataset.vocab_size),
        "train_eval": Batches(train, block_size, 0, dataset.vocab_size),
        "val_eval": Batches(val, block_size, 0, dataset.vocab_size),
        "questions": dataset.questions(),
        "vocabulary": dataset.vocabulary(),
        "separator": dataset.separator,
        "fingerprint": fingerprint,
    }
    if Dataset(folder).fingerprint() != fingerprint:
        raise ValueError(f"{folder} was prepared anew while it was read: start again")
    return data


class Batches:
    """Windows of block_size + 1 tokens in shuffled order. An epoch has each token once, except for a part of
    a window at either end. What step t gets depends only on the seed and t: any process can compute it."""

    def __init__(self, ids, block_size, seed, vocab_size):
        self.path = getattr(ids, "filename", "the data")
        if len(ids) < 2 * block_size + 1:
            what = f"{len(ids)} tokens are too few for block_size={block_size}"
            raise ValueError(f"{self.path}: {what}: {2 * block_size + 1} are needed")
        self.ids, self.block_size, self.seed, self.vocab_size = (
            np.asarray(ids),
            block_size,
            seed,
            vocab_size,
        )
        self.epoch = None

    def __len__(self):
        """Windows in an epoch."""
        return (
            len(self.ids) - self.block_size - 1
        ) // self.block_size  # one less: room for the shift

    def start(self, number):
        """Where window `number` (counted from the start of training) begins."""
        epoch, position = divmod(number, windows := len(self))
        if epoch != self.epoch:  # draw the order of its windows, and a shift common to all of them
            generator = np.random.default_rng([self.seed, epoch])
            self.order, self.epoch = generator.permutation(windows), epoch
            self.shift = int(generator.integers(self.block_size))
        return int(self.order[position]) * self.block_size + self.shift

    def __call__(self, numbers):
        """numbers: of windows -> int64 (len(numbers), block_size + 1), the inputs and one more target."""
        starts = [self.start(number) for number in numbers]
        windows = np.stack([self.ids[s : s + self.block_size + 1] for s in starts])
        check_ids(self.path, windows, self.vocab_size)
        return windows.astype(np.int64)
