"""Turn plain text into tokens: tinyshakespeare, or any text of your own.

    python data/shakespeare/prepare.py                                     download tinyshakespeare
    python data/shakespeare/prepare.py --file mine.txt --out data/mine     your own text
    ... --encoding gpt2           GPT-2's tokens; <|endoftext|> in the text separates documents
    ... --val_file other.txt      validate on that file, not on the last tenth of the text
    ... --vocabulary_of out/RUN   to teach it to that run's model: with its tokens
    ... --questions mine.tsv      questions to measure recall: prompt, tab, answer

Without --encoding, each byte is a token. Train with --dataset=mine.

With --vocabulary_of, a text too short for that run's model is repeated. Each of its lines is then a
document of its own, and each repetition has another order. Such a text is also its own validation.
"""

import argparse
import hashlib
import http.client
import shlex
import string
import sys
import urllib.request
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.dataset import (
    GPT2_SEPARATOR,
    check_free,
    describe_vocabulary,
    make_encoding,
    write_dataset,
)
from runtime.checkpoint import read_checkpoint
from runtime.files import (
    explain_errors,
    fail,
    folder_argument,
    ignore_stream_errors,
    lock_folder,
)

# The checksum shows whether the download is the text that everyone else uses.
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
BYTES = describe_vocabulary("bytes", r"[\s\S]", [bytes([i]) for i in range(256)], {})
WINDOWS = 20  # a short text is repeated to this many windows of the model
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def download():
    """Return tinyshakespeare as bytes. Raises OSError if the download fails, ValueError if it is
    another text."""
    way_out = "Download it by hand and give it with --file input.txt"
    try:
        with urllib.request.urlopen(URL, timeout=60) as response:
            text = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise OSError(f"could not download {URL} ({error}). {way_out}") from None
    if hashlib.sha256(text).hexdigest() != SHA256:
        what = f"the download from {URL} ({len(text):,} bytes) is not tinyshakespeare"
        raise ValueError(f"{what}. {way_out}")
    return text


def read(option, path):
    try:
        text = path.read_bytes()
    except OSError as error:
        raise OSError(f"cannot read --{option}={path} ({error.strerror})") from None
    if len(text) < 20:
        raise ValueError(f"--{option}={path} has {len(text)} bytes: too few to train on")
    return text


def read_questions(path):
    """Lines "prompt<TAB>answer" -> questions for recall.jsonl"""
    with explain_errors(f"--questions={path}", "it must be UTF-8 text"):
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    questions = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        prompt, _, answer = line.partition("\t")
        if not prompt.strip() or not answer.strip():
            raise ValueError(f"--questions={path}, line {number}: must be prompt, tab, answer")
        questions.append({"prompt": prompt.strip(), "answer": answer.strip()})
    if not questions:
        raise ValueError(f"--questions={path} has no questions")
    return questions


class Tokenizer:
    """A vocabulary, its separator, and the tokens of texts. encoding: bytes or gpt2; run: the
    folder of a run, whose vocabulary is used instead, or None"""

    def __init__(self, encoding, run):
        self.name = encoding
        self.least = 0  # tokens to which a shorter text is repeated
        self.slots = 0  # of the run's memory
        if run is not None:
            checkpoint = read_checkpoint(run)
            self.name = f"vocabulary of {run}"
            self.vocabulary = checkpoint["vocabulary"]
            self.separator = checkpoint["separator"]
            model_config = checkpoint["model_config"]
            self.least = WINDOWS * model_config["block_size"]
            if model_config["mem_layers"]:
                self.slots = model_config["mem_keys"] ** 2
        elif encoding == "gpt2":
            self.vocabulary = "gpt2"
            self.separator = GPT2_SEPARATOR
        else:
            self.vocabulary = BYTES
            self.separator = ord("\n")
        self.encoding = make_encoding(self.vocabulary)
        self.of_words = self.vocabulary not in (BYTES, "gpt2")  # which can spell new words

    def tokens(self, text, path):
        """bytes -> token ids, and whether the text was repeated. path: of the text, for messages"""
        if self.vocabulary == BYTES:  # no UTF-8 needed
            ids = np.frombuffer(text, dtype=np.uint8)
        else:
            with explain_errors(f"cannot tokenize {path}", "give UTF-8 text, or --encoding=bytes"):
                ids = self.encoding.encode(text.decode(), allowed_special="all")
            ids = np.array([self.separator, *ids])  # a separator precedes each document
        if len(ids) >= self.least:
            return ids, False
        return self.repeat(text, path), True

    def repeat(self, text, path):
        with explain_errors(f"cannot tokenize {path}", "give UTF-8 text"):
            lines = text.decode().splitlines()
        documents = []
        for line in lines:
            if line.strip():
                words = self.encoding.encode(line + "\n", allowed_special="all")
                documents.append(np.array([self.separator, *words]))
        if not documents:
            raise ValueError(f"{path} has only empty lines")
        generator = np.random.default_rng(0)
        ids = []
        while sum(map(len, ids)) < self.least:
            ids += [documents[i] for i in generator.permutation(len(documents))]
        return np.concatenate(ids)


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--file", type=Path, help="a text file to use instead of tinyshakespeare")
    add("--val_file", type=Path, help="validate on this file, not on the last tenth of --file")
    add("--encoding", choices=["bytes", "gpt2"], help="default: bytes")
    add("--vocabulary_of", type=Path, metavar="RUN", help="folder of the run to finetune or update")
    add("--questions", type=Path, help="file of closed-book questions: prompt, tab, answer")
    here = Path(__file__).parent
    add("--out", type=folder_argument, default=here, help="folder to write to (default: this one)")
    add("--overwrite", action="store_true", help="replace the dataset in that folder")
    args = parser.parse_args(argv)
    if args.vocabulary_of is not None and args.encoding is not None:
        parser.error("--vocabulary_of gives the encoding: leave out --encoding")
    return args


def prepare(args):
    if args.file is None:
        text = download()
    else:
        text = read("file", args.file)
    questions = None
    if args.questions is not None:
        questions = read_questions(args.questions)
    tokenizer = Tokenizer(args.encoding or "bytes", args.vocabulary_of)
    train, repeated = tokenizer.tokens(text, args.file or URL)
    if args.val_file is not None:
        val, _ = tokenizer.tokens(read("val_file", args.val_file), args.val_file)
    elif repeated:
        val = train
    else:
        train, val = np.split(train, [len(train) * 9 // 10])
    vocabulary = tokenizer.vocabulary
    separator = tokenizer.separator
    write_dataset(args.out, train, val, vocabulary, separator, questions, args.overwrite)
    counts = f"{len(train):,} training tokens and {len(val):,} validation tokens"
    print(f"{args.out}: {counts} ({tokenizer.name})")
    if repeated:
        print("  The text is short: its lines are repeated in changing order, as documents.")
    if repeated and args.val_file is None:
        print("  It is also the validation text.")
    if questions is not None:
        print(f"  {len(questions):,} questions")
    if args.vocabulary_of is not None:
        report_new_words(tokenizer, text.decode(errors="replace"))
        print_next(args, tokenizer)


def report_new_words(tokenizer, text):
    """Name the words that a vocabulary of words spells in letters. Its model has hardly seen
    letters."""
    if not tokenizer.of_words:
        return
    encoding = tokenizer.encoding
    words = []
    word = b""
    ids = [*encoding.encode_ordinary(text), tokenizer.separator]
    for token in encoding.decode_tokens_bytes(ids):
        if len(token) == 1 and not token.isspace() and token not in string.punctuation.encode():
            word += token
            continue
        if len(word) > 1:
            words.append(word.decode(errors="replace"))
        word = b""
    words = list(dict.fromkeys(words))
    if words:
        shown = ", ".join(words[:8])
        if len(words) > 8:
            shown += f", and {len(words) - 8} more"
        print(f"  Words that are not in the vocabulary: {shown}")
        print("  The model hardly learns sentences with them; one of bytes can (bench/README.md)")


def print_next(args, tokenizer):
    """Print how to teach the text to the run's model, the better way first."""
    dataset = args.out
    if dataset.resolve().parent == Path(__file__).resolve().parents[1]:
        dataset = dataset.name
    words = shlex.join([f"--init_from={args.vocabulary_of}", f"--dataset={dataset}"])
    finetune = f"python train.py {words} --max_iters=100 --learning_rate=1e-4"
    ways = {"all weights, which learns more and forgets more": finetune}
    if tokenizer.slots > 0:
        slots = min(tokenizer.slots, 1024)
        update = f"python edit/update.py {words} --slots={slots} --max_iters=20"
        ways["some slots of the memory, which learns less and forgets less"] = update
    names = list(ways)
    if tokenizer.of_words:
        names.reverse()
    for name in names:
        print(f"Next, to change {name}:\n  {ways[name]}")


def main(argv):
    args = parse(argv)
    try:
        if args.out.is_dir():
            lock_folder(args.out, wait=True)
            check_free(args.out, args.overwrite)
        prepare(args)
    except (Exception, KeyboardInterrupt) as error:
        fail(error)


if __name__ == "__main__":
    ignore_stream_errors()
    main(sys.argv[1:])
