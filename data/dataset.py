"""The dataset folder: what every prepare.py writes and what training and sampling read.

    train.bin, val.bin   token ids one after another, little-endian uint16 (uint32 if meta.json says so)
    meta.json            {"encoding": "gpt2" or the name of a file beside it, "dtype", "vocab_size", "separator"};
                         {"unfinished": true} while a prepare.py is at work
    vocab.json           the vocabulary, if it is not GPT-2's: plain JSON, see describe_vocabulary
    recall.jsonl         if there is one: closed-book questions {"prompt", "answer", "attribute"}, one a line; the model
                         has to continue the prompt with a space and the answer

A folder prepared for nanoGPT with GPT-2's vocabulary (two .bin files and nothing of the others) works as it is.
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


# --- writing ----------------------------------------------------------------------------------------------------------


def claim(folder, overwrite):
    """Hold a folder to write a dataset to. Raises ValueError if there is one, unless it is unfinished or to be overwritten."""
    lock(folder, wait=True)
    old = [name for name in PARTS if (folder / name).exists()]
    if old and not overwrite and not is_unfinished(folder):
        raise ValueError(f"{folder} holds a dataset already ({', '.join(old)}): replace it (--overwrite), or give another --out")
    sweep(folder, "|".join(map(re.escape, PARTS)))


def describe_vocabulary(name, pattern, tokens, special_tokens):
    """What vocab.json holds. tokens: list of bytes, in order of their ids; special_tokens: {text: id}. Bytes become Latin-1."""
    texts = [token.decode("latin-1") for token in tokens]
    return {"name": name, "pattern": pattern, "tokens": texts, "special_tokens": special_tokens}


def write_dataset(folder, train, val, vocabulary, separator, recall=None, overwrite=False, **facts):
    """train, val: sequences of token ids; vocabulary: "gpt2" or that of describe_vocabulary. meta.json says that the folder is
    unfinished until the rest of it is there."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    claim(folder, overwrite)
    vocab_size = size_of(vocabulary)
    dtype = "uint16" if vocab_size <= 2**16 else "uint32"
    write_file(folder / "meta.json", json.dumps(UNFINISHED) + "\n")
    for name in ("recall.jsonl", "vocab.json"):
        (folder / name).unlink(missing_ok=True)
    for name, ids in (("train.bin", train), ("val.bin", val)):
        write_file(folder / name, np.asarray(ids).astype(FORMAT_DTYPES[dtype]).tobytes())
    if recall is not None:
        write_file(folder / "recall.jsonl", "".join(json.dumps(question) + "\n" for question in recall))
    if vocabulary != "gpt2":
        write_file(folder / "vocab.json", json.dumps(vocabulary))
    write_meta(folder, "gpt2" if vocabulary == "gpt2" else "vocab.json", dtype, vocab_size, separator, **facts)


def write_meta(folder, encoding, dtype, vocab_size, separator, **facts):
    """facts: what else is to be known of the dataset."""
    meta = {"encoding": encoding, "dtype": dtype, "vocab_size": vocab_size, "separator": separator, **facts}
    write_file(folder / "meta.json", json.dumps(meta, indent=2) + "\n")


# --- reading ----------------------------------------------------------------------------------------------------------


def load_json(path):
    """Raises ValueError, naming the file, for what is not JSON."""
    with blame(f"{path} is damaged", AGAIN):
        return json.loads(Path(path).read_text(encoding="utf-8"))


def is_unfinished(folder):
    """Whether a prepare.py is at work there, or was ended in the middle of it: what was there before may be gone by half."""
    return (folder / "meta.json").exists() and load_json(folder / "meta.json") == UNFINISHED


def check_ids(path, ids, vocab_size):
    if ids.max() >= vocab_size:
        raise Refused(f"{path} has token id {ids.max()}, but the vocabulary ends at {vocab_size - 1}; prepare it again")


class Dataset:
    """One folder, opened. Raises FileNotFoundError or ValueError with the way out for what is missing or wrong."""

    def __init__(self, folder):
        self.folder = Path(folder)
        for name in ("train.bin", "val.bin"):
            if not (self.folder / name).exists():
                script = self.folder / "prepare.py"
                way_out = f"run: python {script}" if script.exists() else "dataset= must name a folder that has it"
                raise FileNotFoundError(f"{self.folder / name} not found; {way_out}")
        meta_path = self.folder / "meta.json"
        if is_unfinished(self.folder) or (not meta_path.exists() and any((self.folder / name).exists() for name in PARTS[3:])):
            raise ValueError(f"{self.folder} is half made: a prepare.py is at work there, or was interrupted; {AGAIN}")
        if meta_path.exists():
            meta = load_json(meta_path)
        elif (self.folder / "meta.pkl").exists():
            raise ValueError(
                f"{self.folder / 'meta.pkl'} is a pickle, which can run code, so it is not read; "
                "prepare the text again: python data/shakespeare/prepare.py --file TEXT --out FOLDER"
            )
        else:  # prepared by nanoGPT with GPT-2's vocabulary
            meta = {"encoding": "gpt2", "dtype": "uint16", "vocab_size": GPT2_SIZE, "separator": 50256}
        must = f"{meta_path} must give encoding (a name), dtype (uint16 or uint32), vocab_size, and a separator below it"
        with blame(must, AGAIN):
            self.encoding_name, self.dtype = meta["encoding"], FORMAT_DTYPES[meta["dtype"]]
            self.vocab_size, self.separator = meta["vocab_size"], meta["separator"]
            kinds, most = (type(self.encoding_name), type(self.vocab_size), type(self.separator)), 256**self.dtype.itemsize
            if kinds != (str, int, int) or "/" in self.encoding_name or not 0 <= self.separator < self.vocab_size <= most:
                raise ValueError(f"not {self.encoding_name!r}, {self.vocab_size!r}, {self.separator!r}")

    def fingerprint(self):
        """A hash of the sizes and first MiB of tokens, meta.json and vocabulary: tells a folder that has been prepared anew."""
        digest = hashlib.sha256()
        for path in (self.folder / name for name in PARTS[:4] if (self.folder / name).exists()):
            with open(path, "rb") as f:
                digest.update(f.read(2**20) + str(os.fstat(f.fileno()).st_size).encode())
        return digest.hexdigest()

    def tokens(self, split):
        """The split's token ids as a memory map. split: "train" or "val"."""
        path = self.folder / f"{split}.bin"
        size = path.stat().st_size
        if size == 0 or size % self.dtype.itemsize:
            raise ValueError(f"{path} has {size} bytes, not a whole number of {self.dtype.name} ids: truncated? Prepare it again")
        ids = np.memmap(path, dtype=self.dtype, mode="r")
        check_ids(path, ids[: 2**24], self.vocab_size)  # the file may be larger than memory: the rest as it is read
        return ids

    def vocabulary(self):
        """"gpt2", or what describe_vocabulary gave: plain values, to go into a checkpoint. make_encoding() takes either."""
        path = self.folder / self.encoding_name
        vocabulary = "gpt2" if self.encoding_name == "gpt2" else load_json(path)
        with blame(f"{path} does not fit meta.json", AGAIN):
            if size_of(vocabulary) != self.vocab_size:
                raise ValueError(f"it has {size_of(vocabulary)} tokens, not vocab_size={self.vocab_size}")
        return vocabulary

    def questions(self):
        """The closed-book questions, or None: list of dicts with prompt, answer, and the ids of both."""
        path = self.folder / "recall.jsonl"
        if not path.exists():
            return None
        encode = make_encoding(self.vocabulary()).encode_ordinary
        with blame(f"{path} is damaged", AGAIN):
            lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: there are other line ends that JSON may hold
        questions = []
        for number, line in enumerate(lines, 1):
            with blame(f"{path}, line {number}: must be a JSON object with prompt and answer, and perhaps attribute", AGAIN):
                if line:
                    question = {"attribute": "questions"} | json.loads(line)
                    prompt, answer, attribute = (question[name] for name in ("prompt", "answer", "attribute"))
                    questions.append(question | {"prompt_ids": encode(prompt), "answer_ids": encode(" " + answer)})
                    if not isinstance(attribute, str):
                        raise ValueError(f"attribute is {attribute!r}")
        return questions


def size_of(vocabulary):
    return GPT2_SIZE if vocabulary == "gpt2" else make_encoding(vocabulary).n_vocab


def make_encoding(vocabulary):
    """vocabulary: "gpt2", or the contents of a vocabulary file. Returns a tiktoken.Encoding; nothing in it is executed."""
    if vocabulary != "gpt2":
        with blame("the vocabulary is damaged", "run prepare.py again"):
            ranks, special = {t.encode("latin-1"): i for i, t in enumerate(vocabulary["tokens"])}, vocabulary["special_tokens"]
            if not {bytes([i]) for i in range(256)} <= ranks.keys() or b"" in ranks or "" in special:
                raise ValueError("single bytes are missing, or a token is empty")
            if sorted([*ranks.values(), *special.values()]) != list(range(len(vocabulary["tokens"]) + len(special))):
                raise ValueError("two tokens are the same, or ids are missing")
            options = {"pat_str": vocabulary["pattern"], "mergeable_ranks": ranks, "special_tokens": special}
            return tiktoken.Encoding(vocabulary["name"], **options)
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # tiktoken passes on whatever its download raised
        raise FileNotFoundError(
            f"GPT-2's vocabulary could not be fetched ({type(error).__name__}); on a machine with a network, "
            "run tiktoken once with TIKTOKEN_CACHE_DIR=FOLDER, then bring that folder here and set the same variable"
        ) from None


def find_folder(name):
    """A folder in data/, or a path. The facts, which are the default, are made if they are not there."""
    data = Path(__file__).resolve().parent
    folder = data / name if Path(name).name == name and (data / name).is_dir() else Path(name)
    if folder == data / "facts" and (is_unfinished(folder) or not (folder / "meta.json").exists()):
        subprocess.run([sys.executable, folder / "prepare.py"])
        if not (folder / "meta.json").exists():
            raise OSError(f"{folder} could not be made, see above; elsewhere: python {folder / 'prepare.py'} --out FOLDER")
    return folder


def open_dataset(folder, block_size, seed):
    """All that training needs of a folder, checked: batches, the questions if there are any, and what goes into a checkpoint."""
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
    """Windows of block_size + 1 tokens in shuffled order, each token once an epoch (but for a partial window at either end).

    What step t gets depends on the seed and on t alone: it can be computed in any process, at any time.
    """

    def __init__(self, ids, block_size, seed, vocab_size):
        self.path = getattr(ids, "filename", "the data")
        if len(ids) < 2 * block_size + 1:
            message = f"{self.path}: {len(ids)} tokens are too few for block_size={block_size}: {2 * block_size + 1} are needed"
            raise ValueError(message)
        self.ids, self.block_size, self.seed, self.vocab_size = np.asarray(ids), block_size, seed, vocab_size
        self.epoch = None

    def start(self, number):
        """Where window `number` (counted from the start of training) begins."""
        windows = (len(self.ids) - self.block_size - 1) // self.block_size  # one fewer than fit: room for the shift
        epoch, position = divmod(number, windows)
        if epoch != self.epoch:  # the first windows of an epoch draw its order and a shift of all its windows
            generator = np.random.default_rng([self.seed, epoch])
            self.order, self.shift, self.epoch = generator.permutation(windows), int(generator.integers(self.block_size)), epoch
        return int(self.order[position]) * self.block_size + self.shift

    def __call__(self, numbers):
        """numbers: window numbers -> int64 array (len(numbers), block_size + 1): inputs, and targets one further on."""
        starts = [self.start(number) for number in numbers]
        windows = np.stack([self.ids[s : s + self.block_size + 1] for s in starts])
        check_ids(self.path, windows, self.vocab_size)
        return windows.astype(np.int64)
