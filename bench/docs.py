"""Make a dataset of real text without a download: the docstrings of installed packages.

    python bench/docs.py               torch, numpy, sympy and networkx, to out/docs

They are there: requirements.txt brings them. The text depends on their versions. Every docstring is
a document. Those of every twentieth file are for validation. Tokens are the first 4,096 of GPT-2's,
which spell any text.
"""

import ast
import importlib.util
import sys
import warnings
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.dataset import (
    check_free,
    describe_vocabulary,
    gpt2_encoding,
    make_encoding,
    write_dataset,
)
from runtime.arguments import Parser, folder_argument
from runtime.bars import Bar
from runtime.files import fail

PACKAGES = ("torch", "numpy", "sympy", "networkx")
VOCABULARY = 4096  # tokens; also the id of the separator, which follows them
SHORTEST = 100  # characters of a docstring


def source_files():
    files = []
    for package in PACKAGES:
        folder = Path(importlib.util.find_spec(package).origin).parent
        files += sorted(folder.rglob("*.py"))
    return files


def docstrings(file):
    """The docstrings of a module, its classes and functions. Long ones only."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on the file's own errors
        try:
            tree = ast.parse(file.read_bytes())
        except SyntaxError:  # written for another Python
            return []
    texts = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            text = ast.get_docstring(node)
            if text is not None and len(text) >= SHORTEST:
                texts.append(text)
    return texts


def vocabulary():
    """GPT-2's tokens in the order in which they were merged, up to VOCABULARY."""
    gpt2 = gpt2_encoding()
    tokens = [gpt2.decode_single_token_bytes(i) for i in range(VOCABULARY)]
    special = {"<|endoftext|>": VOCABULARY}
    return describe_vocabulary(f"gpt2-{VOCABULARY}", gpt2._pat_str, tokens, special)


def prepare(folder, overwrite):
    check_free(folder, overwrite)
    known = set()  # copies are left out
    described = vocabulary()
    encoding = make_encoding(described)
    splits = {"train": [], "val": []}
    characters = 0
    for number, file in enumerate(Bar(source_files(), "docstrings", unit="file")):
        split = splits["train"]
        if number % 20 == 0:
            split = splits["val"]
        for text in docstrings(file):
            if text not in known:
                known.add(text)
                characters += len(text)
                split.append(np.array([VOCABULARY, *encoding.encode_ordinary(text)]))
    train = np.concatenate(splits["train"])
    val = np.concatenate(splits["val"])
    write_dataset(folder, train, val, described, VOCABULARY, overwrite=overwrite)
    counts = f"{len(train):,} training tokens and {len(val):,} validation tokens"
    print(f"{folder}: {counts}, from {characters:,} characters of {len(known):,} docstrings")


def main(argv):
    parser = Parser(__doc__)
    out = "folder to write to (default: %(default)s)"
    parser.add_argument("--out", type=folder_argument, default=Path("out/docs"), help=out)
    parser.add_argument("--overwrite", action="store_true", help="replace the dataset there")
    args = parser.parse_args(argv)
    try:
        prepare(args.out, args.overwrite)
    except (Exception, KeyboardInterrupt) as error:
        fail(error)


if __name__ == "__main__":
    main(sys.argv[1:])
