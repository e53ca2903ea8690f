"""The dataset folder: what every prepare.py writes and what training and sampling read.

    train.bin, val.bin   token ids one after another, little-endian uint16 (uint32 if meta.json says so)
    meta.json            {"encoding": "gpt2" or the name of a file beside it, "dtype", "vocab_size", "separator"}
    vocab.json           the vocabulary, if it is not GPT-2's: plain JSON, see save_vocabulary
    recall.jsonl         if there is one: closed-book questions {"prompt", "answer", "attribute"}, one a line; the model
                         has to continue the prompt with a space and the answer

A folder prepared for nanoGPT with GPT-2's vocabulary (two .bin files, no meta.json) works as it is.
"""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import tiktoken

FORMAT_DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


# --- writing ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_write(path):
    """Open a temporary file for writing bytes and rename it at the end: whoever finds `path` finds all of it, or the old one."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_file(path, data):
    """data: bytes or text."""
    with atomic_write(path) as f:
        f.write(data.encode() if isinstance(data, str) else data)


def save_vocabulary(path, encoding_name, pattern, tokens, special_tokens):
    """tokens: list of bytes, in order of their ids; special_tokens: {text: id}. Bytes are stored as Latin-1 text."""
    texts = [token.decode("latin-1") for token in tokens]
    vocabulary = {"name": encoding_name, "pattern": pattern, "tokens": texts, "special_tokens": special_tokens}
    write_file(path, json.dumps(vocabulary))


def write_dataset(folder, train, val, encoding_file, vocab_size, separator, recall=None, **facts):
    """train, val: sequences of token ids. meta.json comes last: a folder that has one is complete."""
    folder = Path(folder)
    dtype = "uint16" if vocab_size <= 2**16 else "uint32"
    (folder / "meta.json").unlink(missing_ok=True)
    for name, ids in (("train.bin", train), ("val.bin", val)):
        write_file(folder / name, np.asarray(ids).astype(FORMAT_DTYPES[dtype]).tobytes())
    (folder / "recall.jsonl").unlink(missing_ok=True)
    if recall is not None:
        write_file(folder / "recall.jsonl", "".join(json.dumps(question) + "\n" for question in recall))
    write_meta(folder, encoding_file, dtype, vocab_size, separator, **facts)


def write_meta(folder, encoding, dtype, vocab_size, separator, **facts):
    """facts: what else is to be known of the dataset."""
    meta = {"encoding": encoding, "dtype": dtype, "vocab_size": vocab_size, "separator": separator, **facts}
    write_file(folder / "meta.json", json.dumps(meta, indent=2) + "\n")


# --- reading ----------------------------------------------------------------------------------------------------------


def load_json(path):
    """Raises ValueError, naming the file, for what is not JSON."""
    try:
        return json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); run the folder's prepare.py again") from None


def check_ids(path, ids, vocab_size):
    if ids.max() >= vocab_size:
        raise ValueError(f"{path} has token id {ids.max()}, but the vocabulary ends at {vocab_size - 1}; prepare it again")


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
        if meta_path.exists():
            meta = load_json(meta_path)
        elif (self.folder / "meta.pkl").exists():
            raise ValueError(
                f"{self.folder / 'meta.pkl'} is a pickle, which can run code, so it is not read; "
                "prepare the text again: python data/shakespeare/prepare.py --file TEXT --out FOLDER"
            )
        else:  # prepared by nanoGPT with GPT-2's vocabulary
            meta = {"encoding": "gpt2", "dtype": "uint16", "vocab_size": 50257, "separator": 50256}
        try:
            self.encoding_name, self.vocab_size = meta["encoding"], int(meta["vocab_size"])
            self.separator, self.dtype = int(meta["separator"]), FORMAT_DTYPES[meta["dtype"]]
            if not (isinstance(self.encoding_name, str) and 0 <= self.separator < self.vocab_size):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise ValueError(
                f"{meta_path} must give encoding (a name), dtype (uint16 or uint32), vocab_size, and a separator below it"
            ) from None

    def fingerprint(self):
        """A hash of the sizes of both splits and of the first MiB of each: tells a folder that has been prepared anew."""
        digest = hashlib.sha256()
        for name in ("train.bin", "val.bin"):
            with open(self.folder / name, "rb") as f:
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
        """"gpt2", or what save_vocabulary wrote: plain values, to go into a checkpoint. make_encoding() takes either."""
        if self.encoding_name == "gpt2":
            return "gpt2"
        path = self.folder / self.encoding_name
        if not path.exists():
            raise FileNotFoundError(f"the vocabulary {path} not found; run the folder's prepare.py again")
        return load_json(path)

    def questions(self):
        """The closed-book questions, or None: list of dicts with prompt, answer, and the ids of both."""
        path = self.folder / "recall.jsonl"
        if not path.exists():
            return None
        encode = make_encoding(self.vocabulary()).encode_ordinary
        questions = []
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                question = json.loads(line)
                prompt, answer = encode(question["prompt"]), encode(" " + question["answer"])
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{path}, line {number}: must be a JSON object with prompt and answer") from None
            questions.append({**question, "prompt_ids": prompt, "answer_ids": answer})
        return questions


def make_encoding(vocabulary):
    """vocabulary: "gpt2", or the contents of a vocabulary file. Returns a tiktoken.Encoding; nothing in it is executed."""
    if vocabulary != "gpt2":
        try:
            return tiktoken.Encoding(
                vocabulary["name"],
                pat_str=vocabulary["pattern"],
                mergeable_ranks={text.encode("latin-1"): i for i, text in enumerate(vocabulary["tokens"])},
                special_tokens=vocabulary["special_tokens"],
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"the vocabulary is damaged ({type(error).__name__}: {error}); run prepare.py again") from None
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
    folder = data / name if (data / name).is_dir() else Path(name)
    if folder == data / "facts" and not (folder / "meta.json").exists():
        subprocess.run([sys.executable, folder / "prepare.py"], check=True)
    return folder


def open_dataset(folder, block_size, seed):
    """All that training needs of a folder, checked: batches, the questions if there are any, and what goes into a checkpoint."""
    dataset = Dataset(folder)
    train, val = dataset.tokens("train"), dataset.tokens("val")
    return {
        "train": Batches(train, block_size, seed, dataset.vocab_size),
        "train_eval": Batches(train, block_size, 0, dataset.vocab_size),
        "val_eval": Batches(val, block_size, 0, dataset.vocab_size),
        "questions": dataset.questions(),
        "vocabulary": dataset.vocabulary(),
        "separator": dataset.separator,
        "fingerprint": dataset.fingerprint(),
    }


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
