"""Plain text to tokens: tinyshakespeare, or any text of your own.

    python data/shakespeare/prepare.py                                     download tinyshakespeare (1.1 MB)
    python data/shakespeare/prepare.py --file mine.txt --out data/mine     your own; train with --dataset=mine
    ... --encoding gpt2           GPT-2's tokens; <|endoftext|> in the text separates documents
    ... --val_file other.txt      validate on that file, not on the last tenth of the text

Without --encoding a byte is a token.
"""

import argparse
import hashlib
import http.client
import sys
import urllib.request
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.dataset import claim, describe_vocabulary, make_encoding, write_dataset
from data.files import blame, one_line, steady_streams, to_folder

# The checksum shows whether what arrives is the text that everyone else uses.
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
END_OF_TEXT = 50256  # in GPT-2's vocabulary


def download():
    """tinyshakespeare as bytes. Raises OSError if the download fails, ValueError if it is another text."""
    way_out = "Download it by hand and give it with --file input.txt"
    try:
        with urllib.request.urlopen(URL, timeout=60) as response:
            text = response.read()
    except (OSError, http.client.HTTPException) as error:  # URLError and HTTPError among them
        raise OSError(f"could not download {URL} ({error}). {way_out}") from None
    if hashlib.sha256(text).hexdigest() != SHA256:
        raise ValueError(
            f"what came from {URL} ({len(text):,} bytes) is not tinyshakespeare. {way_out}"
        )
    return text


def read(option, path):
    try:
        text = path.read_bytes()
    except OSError as error:
        raise OSError(f"cannot read --{option}={path} ({error.strerror})") from None
    if len(text) < 20:
        raise ValueError(f"--{option}={path} has {len(text)} bytes, too few to train on")
    return text


def tokenize(text, encoding, path):
    """bytes -> token ids; encoding: "bytes" or "gpt2"; path: where the text is from."""
    if encoding == "bytes":
        return np.frombuffer(text, dtype=np.uint8)
    with blame(f"cannot tokenize {path}", "give UTF-8 text, or --encoding=bytes"):
        ids = make_encoding(encoding).encode(text.decode(), allowed_special="all")
    return np.array([END_OF_TEXT, *ids], dtype=np.uint16)  # a document begins after a separator


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--file", type=Path, help="a text file to use instead of tinyshakespeare")
    add(
        "--val_file",
        type=Path,
        help="a text file to validate on (default: the last tenth of the other)",
    )
    add(
        "--encoding",
        choices=["bytes", "gpt2"],
        default="bytes",
        help="of tokens (default: %(default)s)",
    )
    add(
        "--out",
        type=to_folder,
        default=Path(__file__).parent,
        help="folder to write to (default: this one)",
    )
    add("--overwrite", action="store_true", help="replace the dataset in that folder")
    args = parser.parse_args()
    if args.out.is_dir():
        claim(args.out, args.overwrite)
    train = tokenize(read("file", args.file) if args.file else download(), args.encoding, args.file)
    if args.val_file:
        val = tokenize(read("val_file", args.val_file), args.encoding, args.val_file)
    else:
        train, val = np.split(train, [len(train) * 9 // 10])
    vocabulary, separator = "gpt2", END_OF_TEXT
    if args.encoding == "bytes":
        vocabulary = describe_vocabulary("bytes", r"[\s\S]", [bytes([i]) for i in range(256)], {})
        separator = ord("\n")
    write_dataset(args.out, train, val, vocabulary, separator, overwrite=args.overwrite)
    print(
        f"{args.out}: {len(train):,} training tokens and {len(val):,} validation tokens ({args.encoding})"
    )


if __name__ == "__main__":
    steady_streams()
    with one_line("prepare.py"):
        main()
