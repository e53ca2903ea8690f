"""How fast is data/openwebtext/prepare.py? Packs a text as OpenWebText is packed, and times the program on it.

    python bench/corpus.py TEXT [TEXT ...]      text files; English ones, 1 MB or more

Against tiktoken alone on the same documents in as many processes, which neither decompresses nor writes anything.
"""

import argparse
import concurrent.futures
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
    """Documents (bytes) -> urlsf_subset{number}.tar as bytes: a tar of xz-compressed tars of one file a document."""
    parts = []
    for first in range(0, len(documents), per_member):
        part = enumerate(documents[first : first + per_member], first)
        parts.append(lzma.compress(tar({f"{i:07}-{len(d):x}.txt": d for i, d in part})))
    return tar({f"openwebtext/urlsf_subset{number:02}-{i}_data.xz": part for i, part in enumerate(parts * repeats, 1)})


def cut(text, size=5000):
    """Into documents of about `size` characters, which is the mean of OpenWebText, at the ends of lines."""
    documents = [""]
    for line in text.splitlines(keepends=True):
        if len(documents[-1]) > size:
            documents.append("")
        documents[-1] += line
    return [d.encode() for d in documents]


def encode_all(parts):
    """The seconds that tiktoken alone takes for the documents of some parts (bytes) of an archive: to lists, to numpy arrays."""
    documents = []
    for part in parts:
        with tarfile.open(fileobj=io.BytesIO(lzma.decompress(part))) as files:
            documents += [files.extractfile(file).read().decode() for file in files]
    encoding, seconds = tiktoken.get_encoding("gpt2"), []
    for encode in (encoding.encode_ordinary, lambda text: encoding.encode_to_numpy(text, disallowed_special=())):
        encode("ready")
        began = time.perf_counter()
        for document in documents:
            encode(document)
        seconds.append(time.perf_counter() - began)
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, nargs="+")
    parser.add_argument("--megabytes", type=int, default=1900, help="repeat the text to this size; as one archive: %(default)s")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="each, in turns (default: %(default)s)")
    args = parser.parse_args()
    documents = cut("".join(path.read_text(encoding="utf-8") for path in args.text))
    documents = [b"%d\n" % i + d for i in range(20) for d in documents]  # no two the same: some must be for validation
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
            context = multiprocessing.get_context("spawn")
            with concurrent.futures.ProcessPoolExecutor(workers, context) as pool:
                times = pool.map(encode_all, [parts[w::workers] for w in range(workers)])
                alone.append([max(column) for column in zip(*times, strict=True)])
            command = [sys.executable, ROOT / "data/openwebtext/prepare.py", "--subsets=0", f"--source={folder}"]
            command += [f"--workers={workers}", f"--out={folder}/{i}"]
            printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
            whole.append(float(re.search(r"text in ([\d,.]+) s", printed).group(1).replace(",", "")))
    a, numpy, b = (*map(statistics.median, zip(*alone, strict=True)), statistics.median(whole))
    print(f"{size:.0f} MB of text in {repeats * len(documents):,} documents, {workers} processes")
    print(f"  tiktoken alone   {a:6.2f} s, {size / a:5.1f} MB/s (encode_ordinary)")
    print(f"  the same         {numpy:6.2f} s, {size / numpy:5.1f} MB/s (encode_to_numpy, as prepare.py)")
    ratios = f"{a / b:.2f} and {numpy / b:.2f} of these, start of processes included"
    print(f"  prepare.py       {b:6.2f} s, {size / b:5.1f} MB/s: {ratios}")
    share = f"{decompression / b:.0%} of one core while prepare.py runs"
    print(f"  decompression    {decompression:6.2f} s, {size / decompression:5.1f} MB/s: {share}")


if __name__ == "__main__":
    main()
