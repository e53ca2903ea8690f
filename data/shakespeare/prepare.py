"""Turn plain text into tokens: tinyshakespeare, or any text of your own.

    python data/shakespeare/prepare.py                                     download tinyshakespeare
    python data/shakespeare/prepare.py --file mine.txt --out data/mine     your own text
    ... --encoding gpt2           GPT-2's tokens; <|endoftext|> in the text separates documents
    ... --val_file other.txt      validate on that file, not on the last tenth of the text
    ... --vocabulary_of out/RUN   to teach it to that run's model: with its tokens
    ... --questions mine.tsv      questions to measure recall: prompt, tab, answer

A text is UTF-8. A byte order mark is dropped; line ends CR LF and CR become LF. Without --encoding,
each byte is a token, and a file that is not UTF-8, or holds zeros, is taken as it is. Train with
--dataset=mine.

With --vocabulary_of, a text too short for that run's model is repeated. Each of its lines is then a
document of its own, and each repetition has another order. Such a text is also its own validation.
"""

import hashlib
import http.client
import re
import shlex
import string
import sys
import tempfile
import urllib.request
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.dataset import (
    DTYPES,
    GPT2_SEPARATOR,
    check_free,
    describe_vocabulary,
    dtype_name,
    make_encoding,
    vocabulary_size,
    write_dataset,
)
from runtime.arguments import Parser, folder_argument, path_argument
from runtime.checkpoint import read_checkpoint
from runtime.files import explain_errors, fail, ignore_stream_errors, lock_folder, open_text

# The checksum shows whether the download is the text that everyone else uses.
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
BYTES = describe_vocabulary("bytes", r"[\s\S]", [bytes([i]) for i in range(256)], {})
PIECE = 2**20  # characters that are tokenised at a time
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


def find_text(option, path):
    """The path of a text, or the content of a pipe, which can be read only once: bytes. Raises
    OSError or ValueError if it cannot be used."""
    try:
        with open(path, "rb") as f:
            start = f.read(20)
            if len(start) < 20:
                raise ValueError(f"--{option}={path} has {len(start)} bytes: too few to train on")
            if not path.is_file():
                return start + f.read()
    except OSError as error:
        raise OSError(f"cannot read --{option}={path} ({error.strerror})") from None
    return path


def is_text(source):
    """Whether a path or bytes hold UTF-8, and no zeros, as UTF-16 does."""
    try:
        with open_text(source) as f:
            return not any("\0" in piece for piece in read_all(f))
    except UnicodeDecodeError:
        return False


def read_pieces(source):
    """Yield the text of a path or of bytes in pieces. They end before white space that follows
    something else. No token of GPT-2 extends over such a place, so the pieces have the tokens of
    the whole text."""
    text = ""
    with open_text(source) as f:
        for more in read_all(f):
            text += more
            match = re.match(r".*\S(?=[ \n])", text, re.DOTALL)
            if match is not None:
                yield match[0]
                text = text[match.end() :]
    yield text


def read_blocks(source):
    """Yield the content of a path or of bytes in blocks."""
    if isinstance(source, bytes):
        yield source
        return
    with open(source, "rb") as f:
        yield from read_all(f)


def read_all(file):
    """Yield the content of an open file, PIECE characters or bytes at a time."""
    piece = file.read(PIECE)
    while piece:
        yield piece
        piece = file.read(PIECE)


def read_questions(path):
    """Lines "prompt<TAB>answer" -> questions for recall.jsonl"""
    with explain_errors(f"--questions={path}", "it must be UTF-8 text"), open_text(path) as f:
        lines = f.read().split("\n")
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
    folder of a run, whose vocabulary is used instead, or None; folder: for temporary files"""

    def __init__(self, encoding, run, folder):
        self.name = encoding
        self.folder = folder
        self.least = 0  # tokens to which a shorter text is repeated
        self.slots = 0  # of the run's memory
        self.min_lr = 0.0  # of the run
        if run is not None:
            checkpoint = read_checkpoint(run)
            self.name = f"vocabulary of {run}"
            self.vocabulary = checkpoint["vocabulary"]
            self.separator = checkpoint["separator"]
            self.min_lr = checkpoint["train_config"]["min_lr"]
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
        self.dtype = DTYPES[dtype_name(vocabulary_size(self.vocabulary))]

    def tokens(self, source, path):
        """The text of a path or of bytes -> token ids, and whether the text was repeated. path:
        for messages"""
        ids = self.write(self.pieces(source, path))
        if len(ids) >= self.least:
            return ids, False
        return self.repeat(source, path), True

    def pieces(self, source, path):
        """Yield the token ids of a text in arrays. path: for messages"""
        if self.vocabulary == BYTES and not is_text(source):
            for block in read_blocks(source):
                yield np.frombuffer(block, dtype=np.uint8)
            return
        if self.vocabulary != BYTES:
            yield np.array([self.separator])  # it precedes each document
        with explain_errors(f"cannot tokenize {path}", "give UTF-8 text, or --encoding=bytes"):
            for text in self.texts(source):
                yield self.encode(text)

    def texts(self, source):
        """Yield a text in pieces. In another vocabulary, a token may extend over any place, so
        yield the whole."""
        if self.of_words:
            with open_text(source) as f:
                yield f.read()
        else:
            yield from read_pieces(source)

    def encode(self, text):
        if self.vocabulary == BYTES:  # tiktoken takes fifty times as long
            return np.frombuffer(text.encode(), dtype=np.uint8)
        return self.encoding.encode_to_numpy(text, allowed_special="all")

    def write(self, pieces):
        """Arrays of token ids -> one array, in a temporary file: it can exceed the memory."""
        with tempfile.TemporaryFile(dir=self.folder) as file:
            for ids in pieces:
                self.append(file, ids)
            return np.memmap(file, dtype=self.dtype, mode="r")

    def append(self, file, ids):
        try:
            file.write(ids.astype(self.dtype))
            file.flush()
        except OSError as error:
            raise OSError(f"could not write to {self.folder} ({error.strerror})") from None

    def repeat(self, source, path):
        with explain_errors(f"cannot tokenize {path}", "give UTF-8 text"), open_text(source) as f:
            lines = f.read().split("\n")
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
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--file", type=path_argument, help="a text file to use instead of tinyshakespeare")
    val_file = "validate on this file, not on the last tenth of --file"
    add("--val_file", type=path_argument, help=val_file)
    add("--encoding", choices=["bytes", "gpt2"], help="default: bytes")
    run = "folder of the run to finetune or update"
    add("--vocabulary_of", type=path_argument, metavar="RUN", help=run)
    questions = "file of closed-book questions: prompt, tab, answer"
    add("--questions", type=path_argument, help=questions)
    here = Path(__file__).parent
    add("--out", type=folder_argument, default=here, help="folder to write to (default: this one)")
    add("--overwrite", action="store_true", help="replace the dataset in that folder")
    args = parser.parse_args(argv)
    if args.vocabulary_of is not None and args.encoding is not None:
        parser.error("--vocabulary_of gives the encoding: leave out --encoding")
    return args


def prepare(args):
    if args.file is None:
        source = download()
    else:
        source = find_text("file", args.file)
    questions = None
    if args.questions is not None:
        questions = read_questions(args.questions)
    folder = args.out.resolve()
    while not folder.exists():  # its disk has room for a temporary file
        folder = folder.parent
    tokenizer = Tokenizer(args.encoding or "bytes", args.vocabulary_of, folder)
    train, repeated = tokenizer.tokens(source, args.file or URL)
    if args.val_file is not None:
        val, val_repeated = tokenizer.tokens(find_text("val_file", args.val_file), args.val_file)
        repeated = repeated or val_repeated
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
        report_new_words(tokenizer, source)
        print_next(args, tokenizer)


def report_new_words(tokenizer, source):
    """Name the words that a vocabulary of words spells in letters. Its model has hardly seen
    letters."""
    if not tokenizer.of_words:
        return
    words = {}  # in order
    for text in read_pieces(source):
        words.update(dict.fromkeys(spelled_words(tokenizer, text)))
    words = list(words)
    if words:
        shown = ", ".join(words[:8])
        if len(words) > 8:
            shown += f", and {len(words) - 8} more"
        print(f"  Words that are not in the vocabulary: {shown}")
        print("  The model hardly learns sentences with them; one of bytes can (bench/README.md)")


def spelled_words(tokenizer, text):
    """Words of a text that its tokens spell in letters."""
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
    return words


def print_next(args, tokenizer):
    """Print how to teach the text to the run's model, the better way first."""
    dataset = args.out
    if dataset.resolve().parent == Path(__file__).resolve().parents[1]:
        dataset = dataset.name
    words = shlex.join([f"--init_from={args.vocabulary_of}", f"--dataset={dataset}"])
    finetune = f"python train.py {words} --max_iters=100 --learning_rate=1e-4"
    if tokenizer.min_lr > 1e-4:
        finetune += " --min_lr=0"
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
