"""Plain text to tokens: tinyshakespeare by default, or any text of yours. One byte is one token, so nothing else is needed.

    python data/shakespeare/prepare.py                                          download tinyshakespeare (1.1 MB)
    python data/shakespeare/prepare.py --file mine.txt --out data/mine          your own text; train with --dataset=mine

The last tenth of the text is kept for validation.
"""

import argparse
import hashlib
import sys
import urllib.request
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.dataset import save_vocabulary, write_dataset

# The checksum below says whether what arrives is the text everyone else compares on.
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def download():
    """tinyshakespeare as bytes. Exits with a message if it cannot be had, or is not what it should be."""
    way_out = "Download it by hand and give it with --file input.txt"
    try:
        with urllib.request.urlopen(URL, timeout=60) as response:
            text = response.read()
    except OSError as error:  # URLError and HTTPError among them
        sys.exit(f"prepare.py: could not download {URL} ({error}). {way_out}")
    if hashlib.sha256(text).hexdigest() != SHA256:
        sys.exit(f"prepare.py: what came from {URL} ({len(text):,} bytes) is not tinyshakespeare. {way_out}")
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, help="a text file to use in place of tinyshakespeare")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write to (default: this one)")
    args = parser.parse_args()
    try:
        text = args.file.read_bytes() if args.file else download()
    except OSError as error:
        sys.exit(f"prepare.py: cannot read --file={args.file} ({error.strerror})")
    if len(text) < 20:
        sys.exit(f"prepare.py: --file={args.file} has {len(text)} bytes, too few to split")
    ids = np.frombuffer(text, dtype=np.uint8)
    split = len(ids) * 9 // 10
    args.out.mkdir(parents=True, exist_ok=True)
    save_vocabulary(args.out / "vocab.json", "bytes", r"[\s\S]", [bytes([i]) for i in range(256)], {})
    write_dataset(args.out, ids[:split], ids[split:], "vocab.json", vocab_size=256, separator=ord("\n"))
    print(f"{args.out}: {split:,} training tokens and {len(ids) - split:,} validation tokens, one a byte")


if __name__ == "__main__":
    main()
