"""Times data/openwebtext/prepare.py on a text that is packed as OpenWebText is.

    python bench/corpus.py TEXT [TEXT ...]      text files; English ones, 1 MB or more

Against tiktoken alone on the same documents in as many processes, without decompression and writing.
"""

import io
import lzma
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import tiktoken

ROOT = Path(__file__).resolve().parents[1]


def tar(files):
    """{name: bytes} -> a tar archive, as bytes"""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def pack(documents, number, per_member, repeats=1):
    """Documents (bytes) -> urlsf_subset{number}.tar: a tar of xz-compressed tars of one file a document."""
    parts = []
    for first in range(0, len(documents), per_member):
        part = enumerate(documents[first : first + per_member], first)
        parts.append(lzma.compress(tar({f"{i:07}-{len(d):x}.txt": d for i, d in part})))
    name = f"openwebtext/urlsf_subset{number:02}"
    return tar({f"{name}-{i}_data.xz": part for i, part in enumerate(parts * repeats, 1)})


def cut(text, size=5000):
    """Into documents of about `size` characters, which is the mean of OpenWebText, at the ends of lines."""
    documents = [""]
    for line in text.splitlines(keepends=True):
        if len(documents[-1]) > size:
            documents.append("")
        documents[-1] += line
    return [d.encode() for d in documents]


def encode_all(parts):
    """Seconds of tiktoken alone for the documents of parts (bytes) of an archive: to lists, to arrays."""
    documents = []
    for part in parts:
        with tarfile.open(fileobj=io.BytesIO(lzma.decompress(part))) as files:
            documents += [files.extractfile(file).read().decode() for file in files]
    encoding, seconds = tiktoken.get_encoding("gpt2"), []
    for encode in (
        encoding.encode_ordinary,
        partial(encoding.encode_to_numpy, disallowed_special=()),
    ):
        encode("ready")
        began = time.perf_counter()
        for document in documents:
            encode(document)
        seconds.append(time.perf_counter() - began)
    return seconds


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, nargs="+")
    add = parser.add_argument
    add(
        "--megabytes",
        type=int,
        default=1900,
        help="repeat the text to this size (default: %(default)s)",
    )
    add("--workers", type=int, default=os.cpu_count(), help="(default: %(default)s)")
    add("--repeats", type=int, default=5, help="each, in turns (default: %(default)s)")
    args = parser.parse_args()
    documents = cut("".join(path.read_text(encoding="utf-8") for path in args.text))
    documents = [
        b"%d\n" % i + d for i in range(20) for d in documents
    ]  # no two equal: a hash splits them
    repeats, workers = -(-args.megabytes * 10**6 // sum(map(len, documents))), args.workers
    size = repeats * sum(map(len, documents)) / 1e6
    alone, whole = [], []
    with tempfile.TemporaryDirectory() as folder:
        archive = pack(documents, 0, 389, repeats)  # as many documents a member as in the original
        (Path(folder) / "urlsf_subset00.tar").write_bytes(archive)
        with tarfile.open(fileobj=io.BytesIO(archive)) as members:
            parts = [members.extractfile(member).read() for member in members]
        began = time.perf_counter()
        for part in parts:
            lzma.decompress(part)
        decompression = time.perf_counter() - began
        for i in range(args.repeats):
            with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
                times = pool.map(encode_all, [parts[w::workers] for w in range(workers)])
                alone.append([max(column) for column in zip(*times, strict=True)])
            command = [sys.executable, ROOT / "data/openwebtext/prepare.py", "--subsets=0"]
            command += [f"--source={folder}", f"--workers={workers}", f"--out={folder}/{i}"]
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            whole.append(
                float(re.search(r"text in ([\d,.]+) s", printed).group(1).replace(",", ""))
            )
    a, numpy, b = (*map(statistics.median, zip(*alone, strict=True)), statistics.median(whole))
    print(f"{size:.0f} MB of text in {repeats * len(documents):,} documents, {workers} processes")
    print(f"  tiktoken alone   {a:6.2f} s, {size / a:5.1f} MB/s (encode_ordinary)")
    print(
        f"  the same         {numpy:6.2f} s, {size / numpy:5.1f} MB/s (encode_to_numpy, as prepare.py)"
    )
    print(f"  prepare.py       {b:6.2f} s, {size / b:5.1f} MB/s: ", end="")
    print(f"{a / b:.2f} and {numpy / b:.2f} of these, start of processes included")
    print(f"  decompression    {decompression:6.2f} s, {size / decompression:5.1f} MB/s: ", end="")
    print(f"{decompression / b:.0%} of one core while prepare.py runs")


if __name__ == "__main__":
    main()
