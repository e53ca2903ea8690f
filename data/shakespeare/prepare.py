"""Turn plain text into tokens: tinyshakespeare, or any text of your own.

    python data/shakespeare/prepare.py                                     download tinyshakespeare
    python data/shakespeare/prepare.py --file mine.txt --out data/mine     your own text
    ... --encoding gpt2           GPT-2's tokens; <|endoftext|> in the text separates documents
    ... --val_file other.txt      validate on that file, not on the last tenth of the text

Without --encoding, each byte is a token. Train with --dataset=mine.
"""

import argparse
import hashlib
import http.client
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
from runtime.files import (
    explain_errors,
    fail,
    folder_argument,
    ignore_stream_errors,
    lock_folder,
)

# The checksum shows whether the download is the text that everyone else uses.
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
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


def tokenize(text, encoding, path):
    """bytes -> token ids. encoding: "bytes" or "gpt2"; path: of the text, for messages"""
    if encoding == "bytes":
        return np.frombuffer(text, dtype=np.uint8)
    with explain_errors(f"cannot tokenize {path}", "give UTF-8 text, or --encoding=bytes"):
        ids = make_encoding(encoding).encode(text.decode(), allowed_special="all")
    return np.array([GPT2_SEPARATOR, *ids], dtype=np.uint16)  # a separator precedes each document


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--file", type=Path, help="a text file to use instead of tinyshakespeare")
    add("--val_file", type=Path, help="validate on this file, not on the last tenth of --file")
    add("--encoding", choices=["bytes", "gpt2"], default="bytes", help="default: %(default)s")
    here = Path(__file__).parent
    add("--out", type=folder_argument, default=here, help="folder to write to (default: this one)")
    add("--overwrite", action="store_true", help="replace the dataset in that folder")
    return parser.parse_args(argv)


def prepare(args):
    if args.file is None:
        text = download()
    else:
        text = read("file", args.file)
    train = tokenize(text, args.encoding, args.file or URL)
    if args.val_file is None:
        train, val = np.split(train, [len(train) * 9 // 10])
    else:
        val = tokenize(read("val_file", args.val_file), args.encoding, args.val_file)
    vocabulary = "gpt2"
    separator = GPT2_SEPARATOR
    if args.encoding == "bytes":
        vocabulary = describe_vocabulary("bytes", r"[\s\S]", [bytes([i]) for i in range(256)], {})
        separator = ord("\n")
    write_dataset(args.out, train, val, vocabulary, separator, overwrite=args.overwrite)
    counts = f"{len(train):,} training tokens and {len(val):,} validation tokens"
    print(f"{args.out}: {counts} ({args.encoding})")


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
