"""The dataset folder: every prepare.py writes it, and training and sampling read it.

    train.bin, val.bin   token ids one after another, little-endian uint16 (uint32 if meta.json
                         says so)
    meta.json            {"encoding": "gpt2" or the name of a file beside it, "dtype",
                         "vocab_size", "separator"}; {"unfinished": true} while a prepare.py
                         runs
    vocab.json           the vocabulary as plain JSON (see describe_vocabulary), if it is not
                         GPT-2's
    recall.jsonl         optional: closed-book questions {"prompt", "answer", "attribute"}, one
                         per line; the model must continue the prompt with a space and the
                         answer

A folder prepared for nanoGPT with GPT-2's vocabulary (only the two .bin files) works as it is.
"""

import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import tiktoken

from runtime.files import (
    UserError,
    explain_errors,
    lock_folder,
    open_text,
    remove_temporary_files,
    write_file,
)

DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
FILES = ("train.bin", "val.bin", "meta.json", "vocab.json", "recall.jsonl")
UNFINISHED = {"unfinished": True}
BLOCK = 2**16  # bytes of a file that are hashed together
BLOCKS = 1024
GPT2_SIZE = 50257
GPT2_SEPARATOR = 50256
PREPARE = "python data/shakespeare/prepare.py --file=TEXT"
PREPARE_AGAIN = "run its prepare.py again (--overwrite replaces what is there)"


# --- writing --------------------------------------------------------------------------


def check_free(folder, overwrite):
    """Raises ValueError if a folder holds a finished dataset and overwrite is false."""
    old = [name for name in FILES if (folder / name).exists()]
    if old and not overwrite and not is_unfinished(folder):
        way_out = "replace it (--overwrite), or give another --out"
        raise ValueError(f"{folder} holds a dataset already ({', '.join(old)}): {way_out}")


def describe_vocabulary(name, pattern, tokens, special_tokens):
    """Return the contents of vocab.json. tokens: list of bytes in order of ids; special_tokens:
    {text: id}."""
    texts = [token.decode("latin-1") for token in tokens]
    return {"name": name, "pattern": pattern, "tokens": texts, "special_tokens": special_tokens}


def write_dataset(folder, train, val, vocabulary, separator, recall=None, overwrite=False, **facts):
    """Write a dataset. meta.json marks the folder as unfinished until all else is written.

    train, val: sequences of token ids; vocabulary: "gpt2" or the result of describe_vocabulary;
    recall: list of questions; facts: anything else for meta.json."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock_folder(folder, wait=True)
    check_free(folder, overwrite)
    remove_temporary_files(folder, FILES)
    encoding = "vocab.json"
    if vocabulary == "gpt2":
        encoding = "gpt2"
    vocab_size = vocabulary_size(vocabulary)
    dtype = dtype_name(vocab_size)
    write_file(folder / "meta.json", json.dumps(UNFINISHED) + "\n")
    for name in ("recall.jsonl", "vocab.json"):
        (folder / name).unlink(missing_ok=True)
    write_file(folder / "train.bin", np.asarray(train).astype(DTYPES[dtype], copy=False))
    write_file(folder / "val.bin", np.asarray(val).astype(DTYPES[dtype], copy=False))
    if recall is not None:
        lines = [json.dumps(question) + "\n" for question in recall]
        write_file(folder / "recall.jsonl", "".join(lines))
    if encoding != "gpt2":
        write_file(folder / encoding, json.dumps(vocabulary))
    write_meta(folder, encoding, dtype, vocab_size, separator, **facts)


def dtype_name(vocab_size):
    """The dtype of token ids, a key of DTYPES."""
    if vocab_size > 2**16:
        return "uint32"
    return "uint16"


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


# --- reading --------------------------------------------------------------------------


def load_json(path):
    """Raises ValueError, naming the file, if it is not JSON."""
    with explain_errors(f"{path} is damaged", PREPARE_AGAIN), open_text(path) as f:
        return json.load(f)


def is_unfinished(folder):
    """Whether a prepare.py is writing to a folder, or was interrupted."""
    return (folder / "meta.json").exists() and load_json(folder / "meta.json") == UNFINISHED


def check_ids(path, ids, vocab_size):
    if ids.max() >= vocab_size:
        last = f"the vocabulary ends at {vocab_size - 1}"
        raise UserError(f"{path} has token id {ids.max()}, but {last}; prepare it again")


def check_two_bytes(path, ids):
    """Raises ValueError if uint16 ids look like uint32 or int64 ones, whose upper halves are 0."""
    if ids.itemsize == 2 and ids[::2].any() and not ids[1::2].any():
        what = f"{path} holds ids of four or eight bytes, it seems: every second uint16 is 0"
        raise ValueError(f"{what}; convert it with NumPy: ids.astype('uint16').tofile(...)")


def check_gpt2(path, ids):
    """Raises ValueError if ids in a folder without meta.json cannot be GPT-2's."""
    if ids.max() < 256:
        what = f"{path} has only ids below 256, so they are not GPT-2's"
        way_out = "decode them with their vocabulary, and prepare the text"
        raise ValueError(f"{what}; {way_out}: {PREPARE} --out=FOLDER")


def add_file(digest, path):
    """Add the size and the blocks of a file to a hash."""
    size = path.stat().st_size
    digest.update(str(size).encode())
    with open(path, "rb") as f:
        for start in range(0, size, max(BLOCK, math.ceil(size / BLOCKS))):
            f.seek(start)
            digest.update(f.read(BLOCK))


class Dataset:
    """An opened dataset folder. Raises FileNotFoundError or ValueError, with a fix, if it is not
    one."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.check_files()
        meta_path = self.folder / "meta.json"
        meta = {  # of a folder prepared by nanoGPT with GPT-2's vocabulary
            "encoding": "gpt2",
            "dtype": "uint16",
            "vocab_size": GPT2_SIZE,
            "separator": GPT2_SEPARATOR,
        }
        if meta_path.exists():
            meta = load_json(meta_path)
        self.meta = meta
        must = "must give encoding (a name), dtype (uint16 or uint32), vocab_size, and separator"
        with explain_errors(f"{meta_path} {must} < vocab_size", PREPARE_AGAIN):
            self.dtype = DTYPES[meta["dtype"]]
            self.encoding_name = meta["encoding"]
            self.vocab_size = meta["vocab_size"]
            self.separator = meta["separator"]
            self.check_meta()

    def check_files(self):
        script = self.folder / "prepare.py"
        for name in ("train.bin", "val.bin"):
            if not (self.folder / name).exists():
                way_out = f"make it: {PREPARE} --out={self.folder}"
                if script.exists():
                    way_out = f"run: python {script}"
                raise FileNotFoundError(f"{self.folder / name} not found; {way_out}")
        started = any((self.folder / name).exists() for name in ("vocab.json", "recall.jsonl"))
        has_meta = (self.folder / "meta.json").exists()
        if (started and not has_meta) or is_unfinished(self.folder):
            what = f"{self.folder} is half made: a prepare.py is running there, or was interrupted"
            raise ValueError(f"{what}; {PREPARE_AGAIN}")
        if not has_meta and (self.folder / "meta.pkl").exists():
            what = f"{self.folder / 'meta.pkl'} is a pickle, which can run code, so it is not read"
            raise ValueError(f"{what}; prepare the text again: {PREPARE} --out=FOLDER")

    def check_meta(self):
        name = self.encoding_name
        size = self.vocab_size
        separator = self.separator
        if type(name) is not str or "/" in name:
            raise ValueError(f"encoding is {name!r}")
        if type(size) is not int or not 0 < size <= 256**self.dtype.itemsize:
            raise ValueError(f"vocab_size is {size!r}")
        if type(separator) is not int or not 0 <= separator < size:
            raise ValueError(f"separator is {separator!r}")

    def fingerprint(self):
        """Hash each file but recall.jsonl: whole up to 64 MiB, else 1,024 blocks of it that are
        evenly spread. So the hash changes if they are prepared anew from another text. It does not
        show a change that lies between two blocks of a large file."""
        digest = hashlib.sha256()
        for name in ("train.bin", "val.bin", "meta.json", "vocab.json"):
            path = self.folder / name
            if path.exists():
                add_file(digest, path)
        return digest.hexdigest()

    def tokens(self, split):
        """Return the token ids of a split, "train" or "val", as a memory map."""
        path = self.folder / f"{split}.bin"
        size = path.stat().st_size
        if size == 0 or size % self.dtype.itemsize != 0:
            ids = f"a whole number of {self.dtype.name} ids, or no ids"
            hint = "is it truncated, or was there too little text? Prepare it again"
            raise ValueError(f"{path} has {size} bytes, not {ids}: {hint}")
        ids = np.memmap(path, dtype=self.dtype, mode="r")
        # The rest may exceed memory: batches check it when they read it.
        check_ids(path, ids[: 2**24], self.vocab_size)
        if self.vocab_size > 256:  # bytes of UTF-16 look alike
            check_two_bytes(path, ids[: 2**20])
        if not (self.folder / "meta.json").exists():
            check_gpt2(path, ids[: 2**20])
        return ids

    def vocabulary(self):
        """Return "gpt2" or the contents of vocab.json. make_encoding takes it; checkpoints
        store it."""
        if self.encoding_name == "gpt2":
            vocabulary = "gpt2"
        else:
            vocabulary = load_json(self.folder / self.encoding_name)
        path = self.folder / self.encoding_name
        with explain_errors(f"{path} does not fit meta.json", PREPARE_AGAIN):
            size = vocabulary_size(vocabulary)
            if size != self.vocab_size:
                raise ValueError(f"it has {size} tokens, not vocab_size={self.vocab_size}")
        return vocabulary

    def questions(self):
        """Return the closed-book questions: dicts with prompt, answer, attribute, prompt_ids and
        answer_ids. The list is empty if the dataset has none."""
        path = self.folder / "recall.jsonl"
        if not path.exists():
            return []
        encoding = make_encoding(self.vocabulary())
        with explain_errors(f"{path} is damaged", PREPARE_AGAIN), open_text(path) as f:
            lines = f.read().split("\n")  # splitlines has more separators
        questions = []
        must = "must be a JSON object with prompt and answer, and perhaps attribute"
        for number, line in enumerate(lines, 1):
            if line:
                with explain_errors(f"{path}, line {number}: {must}", PREPARE_AGAIN):
                    questions.append(read_question(line, encoding))
        return questions


def read_question(line, encoding):
    question = json.loads(line)
    question.setdefault("attribute", "questions")
    if not isinstance(question["attribute"], str):
        raise ValueError(f"attribute is {question['attribute']!r}")
    question["prompt_ids"] = encoding.encode_ordinary(question["prompt"])
    question["answer_ids"] = encoding.encode_ordinary(" " + question["answer"])
    return question


def answer_questions(model, questions, separator):
    """Return a GPT's greedy answers to closed-book questions (Dataset.questions): token lists."""
    prompts = [[separator, *question["prompt_ids"]] for question in questions]
    lengths = [len(question["answer_ids"]) for question in questions]
    return model.complete(prompts, lengths)


def vocabulary_size(vocabulary):
    if vocabulary == "gpt2":
        return GPT2_SIZE
    return make_encoding(vocabulary).n_vocab


def make_encoding(vocabulary):
    """Return a tiktoken.Encoding. vocabulary: "gpt2" or the contents of vocab.json. Nothing is
    executed."""
    if vocabulary == "gpt2":
        return gpt2_encoding()
    with explain_errors("the vocabulary is damaged", "run prepare.py again"):
        special = vocabulary["special_tokens"]
        ranks = {token.encode("latin-1"): i for i, token in enumerate(vocabulary["tokens"])}
        for i in range(256):
            if bytes([i]) not in ranks:
                raise ValueError(f"the byte {i} is no token")
        if b"" in ranks or "" in special:
            raise ValueError("a token is empty")
        ids = [*ranks.values(), *special.values()]
        if sorted(ids) != list(range(len(vocabulary["tokens"]) + len(special))):
            raise ValueError("two tokens are the same, or ids are missing")
        return tiktoken.Encoding(
            vocabulary["name"],
            pat_str=vocabulary["pattern"],
            mergeable_ranks=ranks,
            special_tokens=special,
        )


def gpt2_encoding():
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # tiktoken passes on whatever its download raised
        what = f"GPT-2's vocabulary could not be fetched ({type(error).__name__})"
        fetch = "on a machine with a network, run tiktoken once with TIKTOKEN_CACHE_DIR=FOLDER"
        copy = "then copy the folder here and set the same variable"
        raise FileNotFoundError(f"{what}; {fetch}; {copy}") from None


def locate(name):
    """The name of a folder in data/, or a path -> a path"""
    data = Path(__file__).resolve().parent
    if name in os.listdir(data) and (data / name).is_dir():  # .. is not in the list
        return data / name
    return Path(name)


def find_folder(name):
    """Find a folder in data/, or at a path. Generate data/facts, the default, if it is missing."""
    data = Path(__file__).resolve().parent
    folder = locate(name)
    if folder == data / "facts" and (is_unfinished(folder) or not (folder / "meta.json").exists()):
        subprocess.run([sys.executable, folder / "prepare.py"])
        if not (folder / "meta.json").exists():
            elsewhere = f"python {folder / 'prepare.py'} --out FOLDER"
            raise OSError(
                f"{folder} could not be made, see above; to make it elsewhere: {elsewhere}"
            )
    if folder.is_file():
        command = PREPARE.replace("TEXT", str(folder))
        more = "for a trained model, also --vocabulary_of=RUN"
        raise ValueError(f"{folder} is a file; make a dataset: {command} --out=FOLDER ({more})")
    if not folder.exists():
        if folder.name == name:
            folder = Path("data", name)
        raise FileNotFoundError(f"there is no dataset {folder}; make it: {PREPARE} --out={folder}")
    return folder


def open_dataset(folder, block_size, seed):
    """Check a folder, and return what training needs: batches, questions, and facts for
    checkpoints."""
    dataset = Dataset(folder)
    fingerprint = dataset.fingerprint()
    train = dataset.tokens("train")
    val = dataset.tokens("val")
    data = {
        "train": Batches(train, block_size, seed, dataset.vocab_size),
        "train_eval": Batches(train, block_size, 0, dataset.vocab_size),
        "val_eval": Batches(val, block_size, 0, dataset.vocab_size),
        "questions": dataset.questions(),
        "vocabulary": dataset.vocabulary(),
        "separator": dataset.separator,
        "fingerprint": fingerprint,
        "meta": dataset.meta,
    }
    if Dataset(folder).fingerprint() != fingerprint:
        raise ValueError(f"{folder} was prepared anew while it was read: start again")
    return data


def check_suits(checkpoint, data, option, config):
    """Raises ValueError if a dataset does not suit the model of a run. checkpoint: of the run
    config.init_from; data: from open_dataset; option: dataset or background"""
    name = getattr(config, option)
    run = config.init_from
    if data["vocabulary"] != checkpoint["vocabulary"]:
        way_out = f"prepare a text with --vocabulary_of={run}"
        raise ValueError(f"--{option}={name}: its vocabulary differs from {run}'s; {way_out}")
    if data["separator"] != checkpoint["separator"]:
        theirs = f"its separator is token {data['separator']}"
        raise ValueError(f"--{option}={name}: {theirs}, {run}'s {checkpoint['separator']}")
    check_people(f"--{option}={name}", data["meta"], checkpoint["meta"])
    trained_on = locate(checkpoint["train_config"]["dataset"])
    is_same = locate(name).resolve() == trained_on.resolve()
    if option == "background" and is_same and data["fingerprint"] != checkpoint["fingerprint"]:
        way_out = "restore it, or give another --background"
        raise ValueError(f"--background={name}: not what {run} was trained on; {way_out}")


def check_people(option, meta, trained_on):
    """Raises ValueError if facts about new or moved people (data/facts/prepare.py) are not about
    the people that a model knows. meta, trained_on: meta.json of the dataset, and of the one that
    the model was trained on; option: names the dataset"""
    theirs = people_of(meta)
    ours = people_of(trained_on)
    if "known" not in meta or None in (theirs, ours) or theirs == ours:
        return
    what = f"{option} was made with {theirs}, unlike the data of the model"
    raise ValueError(f"{what}; prepare it again with {ours}")


def people_of(meta):
    """The options of data/facts/prepare.py that determine the people of a dataset, or None."""
    known = meta.get("known", meta)  # to whom new people were added, or of whom some moved
    if isinstance(known, dict) and {"people", "seed"} <= known.keys():
        return f"--people={known['people']} --seed={known['seed']}"
    return None


def hash_questions(questions):
    """Hash the questions of Dataset.questions()."""
    return hashlib.sha256(json.dumps(questions).encode()).hexdigest()


class Batches:
    """Windows of block_size + 1 tokens in shuffled order. An epoch has each token once, except
    part of a window at either end. The data of step t depend only on the seed and t, so any
    process can compute them."""

    def __init__(self, ids, block_size, seed, vocab_size):
        self.path = getattr(ids, "filename", "the data")
        if len(ids) < 2 * block_size + 1:
            what = f"{len(ids)} tokens are too few for block_size={block_size}"
            needs = f"{2 * block_size + 1} are needed"
            way_out = "lower --block_size, or give more text. To teach it to a trained model"
            way_out += ", prepare it with --vocabulary_of=RUN, which repeats it"
            raise ValueError(f"{self.path}: {what}: {needs}; {way_out}")
        self.ids = np.asarray(ids)
        self.block_size = block_size
        self.seed = seed
        self.vocab_size = vocab_size
        self.epoch = None

    def __len__(self):
        """The number of windows in an epoch."""
        room = len(self.ids) - self.block_size - 1  # one window less leaves room for the shift
        return room // self.block_size

    def start(self, number):
        """Where window `number` begins. Windows are counted from the start of training."""
        epoch, position = divmod(number, len(self))
        if epoch != self.epoch:  # draw the order of its windows, and a shift common to them all
            generator = np.random.default_rng([self.seed, epoch])
            self.order = generator.permutation(len(self))
            self.shift = int(generator.integers(self.block_size))
            self.epoch = epoch
        return int(self.order[position]) * self.block_size + self.shift

    def windows(self, numbers):
        """Return the numbered windows, int64 (len(numbers), block_size + 1): the inputs and one
        more target."""
        starts = [self.start(number) for number in numbers]
        windows = np.stack([self.ids[s : s + self.block_size + 1] for s in starts])
        check_ids(self.path, windows, self.vocab_size)
        return windows.astype(np.int64)
