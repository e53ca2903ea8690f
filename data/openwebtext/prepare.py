"""OpenWebText as GPT-2 tokens: 8,013,769 web pages, 40 GB of text, 9.04e9 tokens.

    python data/openwebtext/prepare.py                all 21 archives, a download of 13 GB
    python data/openwebtext/prepare.py --subsets=0    only the first, to try; --subsets=0-4: five
    python data/openwebtext/prepare.py --source=DIR   archives in a folder, or on a mirror (a URL)

The archives (A. Gokaslan and V. Cohen, OpenWebText Corpus, 2019) are kept in archives/, beside
train.bin and val.bin: 31 GB in all. After an interruption the same command continues the download.
Tokenising starts over; it takes about an hour on two cores.

    urlsf_subset00.tar > urlsf_subset00-1_data.xz, ... > (a compressed tar) > a file per document

The text of a document is the same as in the Hugging Face dataset: runs of blank lines become one
blank line, and white space at both ends is removed. A hash of the document decides whether it is
for validation: one in 2,000 is. Downloads are checked by their length, archives by the end mark of
tar files, and their contents by the checksums of xz.
"""

import argparse
import hashlib
import http.client
import io
import json
import lzma
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tarfile
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.dataset import FILES, GPT2_SEPARATOR, GPT2_SIZE, UNFINISHED
from data.dataset import is_unfinished, load_json, make_encoding, write_meta
from runtime.files import atomic_write, explain_errors, fail, folder_argument
from runtime.files import ignore_stream_errors, lock_folder, remove_temporary_files, write_file

REVISION = "f3808c30e817981b845ec549c43e82bb467d8144"  # the files of a revision never change
SOURCE = f"https://huggingface.co/datasets/Skylion007/openwebtext/resolve/{REVISION}/subsets"
VOCABULARY = "gpt2"
ARCHIVES = 21
DOCUMENTS = 8_013_769
VALIDATION = 2000  # one document in this many is for validation
TOKEN_BYTES = 1.5  # a byte of an archive becomes 1.4 bytes of tokens
CONTINUE = "the same command continues the download"
REPLACE = "delete the archive, and run again"


# --- downloading ----------------------------------------------------------------------


def open_url(url, first=0):
    """The response, from byte `first` on if the server can. Raises OSError, naming the URL."""
    headers = {"User-Agent": "nanomem", "Range": f"bytes={first}-"}
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60)
    except urllib.error.URLError as error:
        raise OSError(f"{url}: {error}") from None


def download(url, path, size, bar):
    """Continue where an earlier call broke off. Raises OSError, naming the URL, if the connection
    breaks."""
    partial = Path(f"{path}.partial")
    with open(partial, "ab") as file:
        if file.tell() < size:
            with open_url(url, first=file.tell()) as response:
                if response.status != http.HTTPStatus.PARTIAL_CONTENT:
                    file.truncate(0)  # the server sends all of it
                receive(response, file, url, bar)
        if file.tell() != size:
            raise OSError(f"{url} ended after {file.tell():,} of {size:,} bytes; {CONTINUE}")
    os.replace(partial, path)


def receive(response, file, url, bar):
    try:
        block = response.read(2**20)
        while block:
            file.write(block)
            bar.update(len(block))
            block = response.read(2**20)
    except (OSError, http.client.HTTPException) as error:
        raise OSError(f"{url}: {error}; {CONTINUE}") from None


def download_all(source, names, folder):
    """Download the archives that are missing."""
    folder.mkdir(exist_ok=True)
    sizes = {}
    for name in names:
        if not (folder / name).exists():
            with open_url(f"{source}/{name}") as response:
                sizes[name] = int(response.headers["Content-Length"])
    total = sum(sizes.values())
    check_space(folder, total)
    with tqdm(total=total, unit="B", unit_scale=True, disable=not sizes) as bar:
        for name, size in sizes.items():
            bar.set_description(name)
            download(f"{source}/{name}", folder / name, size, bar)


def check_space(folder, size):
    free = shutil.disk_usage(folder).free
    if size > free:
        needs = f"{size / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are left"
        raise OSError(f"{folder} needs {needs}")


# --- tokens ---------------------------------------------------------------------------


def list_tar(file):
    """[(name, first byte, size)] of the files in a tar archive. tarfile takes a damaged header
    for the end of the archive, so the end mark must follow what it has found."""
    members = []
    end = 0
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for member in archive:
            size = 0
            if member.isreg():
                size = member.size
                members.append((member.name, member.offset_data, size))
            end = member.offset_data + -(-size // 512) * 512
    file.seek(end)
    if file.read(512) != bytes(512):
        raise ValueError(f"damaged or truncated after byte {end:,}")
    return members


def start_worker(vocabulary):
    global encoding
    encoding = make_encoding(vocabulary)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    """A parent that is killed cannot end its workers."""
    multiprocessing.parent_process().join()
    os._exit(1)


def tokenize(archive, name, first, size):
    """A member of an archive -> {split: token ids as bytes}, documents, bytes of text."""
    with open(archive, "rb") as file:
        file.seek(first)
        data = file.read(size)
    ids = {"train": [], "val": []}
    text_bytes = 0
    with explain_errors(f"{archive}: {name} is damaged", REPLACE):
        data = lzma.decompress(data)
        documents = list_tar(io.BytesIO(data))
        for _, start, length in documents:
            content = data[start : start + length]
            text = re.sub("\n\n\n+", "\n\n", content.decode()).strip()
            tokens = encoding.encode_to_numpy(text, disallowed_special=()).astype("<u2")
            ids[split_of(content)] += [
                np.array([GPT2_SEPARATOR], "<u2").tobytes(),
                tokens.tobytes(),
            ]
            text_bytes += length
    joined = {split: b"".join(parts) for split, parts in ids.items()}
    return joined, len(documents), text_bytes


def split_of(content):
    """It depends on the document alone: not on its place, nor on how many archives there are."""
    number = int.from_bytes(hashlib.sha256(content).digest()[:8], "big")
    if number % VALIDATION == 0:
        return "val"
    return "train"


def list_members(archive):
    """The jobs of an archive: arguments of tokenize."""
    with explain_errors(f"{archive} is damaged, or no archive of OpenWebText", REPLACE):
        with open(archive, "rb") as file:
            members = [member for member in list_tar(file) if member[0].endswith("_data.xz")]
        if not members:
            raise ValueError("it has no *_data.xz")
    return [(archive, *member) for member in members]


def start_pool(workers):
    context = multiprocessing.get_context("spawn")  # the same on every system
    pool = ProcessPoolExecutor(workers, context, start_worker, (VOCABULARY,))
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # only the parent handles Ctrl-C
    for _ in range(workers):
        pool.submit(int)  # starts a worker, which inherits that
    signal.signal(signal.SIGINT, handler)
    return pool


def tokenize_all(jobs, out, workers):
    """Write train.bin and val.bin. Returns documents and bytes of text."""
    documents = 0
    text_bytes = 0
    size = sum(job[-1] for job in jobs)
    check_space(out, TOKEN_BYTES * size)
    pool = start_pool(workers)
    with (
        atomic_write(out / "train.bin") as train,
        atomic_write(out / "val.bin") as val,
        tqdm(total=size, unit="B", unit_scale=True, desc="tokens") as bar,
    ):
        try:
            results = pool.map(tokenize, *zip(*jobs, strict=True))
            for job, (ids, count, length) in zip(jobs, results, strict=True):
                train.write(ids["train"])
                val.write(ids["val"])
                documents += count
                text_bytes += length
                bar.update(job[-1])
        finally:
            pool.shutdown(cancel_futures=True)
    return documents, text_bytes


# --- the whole ------------------------------------------------------------------------


def is_complete(out, names):
    """Whether a folder has these archives. Raises ValueError if it holds another dataset."""
    if is_unfinished(out):
        return False
    if (out / "meta.json").exists():
        archives = load_json(out / "meta.json").get("archives")
        if archives is not None:
            return archives == names
    elif not any((out / name).exists() for name in FILES):
        return False
    raise ValueError(f"{out} holds a dataset that this program has not made; give another --out")


def prepare(args):
    out = args.out
    out.mkdir(parents=True, exist_ok=True)
    lock_folder(out)
    names = [f"urlsf_subset{i:02}.tar" for i in args.subsets]
    if is_complete(out, names):
        print(f"{out} has these archives already")
        return
    make_encoding(VOCABULARY)  # an error now if it cannot be had; workers find it in a cache
    remove_temporary_files(out, FILES)
    folder = Path(args.source)
    if "://" in args.source:
        folder = out / "archives"
        download_all(args.source.rstrip("/"), names, folder)
    jobs = []
    for name in names:
        jobs += list_members(folder / name)
    write_file(out / "meta.json", json.dumps(UNFINISHED))
    began = time.perf_counter()
    documents, text_bytes = tokenize_all(jobs, out, args.workers)
    write_meta(out, "gpt2", "uint16", GPT2_SIZE, GPT2_SEPARATOR, archives=names)
    seconds = time.perf_counter() - began
    megabytes = text_bytes / 1e6
    train = (out / "train.bin").stat().st_size // 2
    val = (out / "val.bin").stat().st_size // 2
    tokens = f"{train:,} training tokens and {val:,} validation tokens"
    print(f"{out}: {documents:,} documents, {tokens}")
    print(f"{megabytes:,.1f} MB of text in {seconds:,.1f} s: {megabytes / seconds:,.1f} MB/s")
    if len(names) == ARCHIVES and args.source == SOURCE and documents != DOCUMENTS:
        raise ValueError(f"the corpus should have {DOCUMENTS:,} documents: please report this")


def subsets_argument(text):
    """For argparse: "0,2,5-7" -> [0, 2, 5, 6, 7]"""
    numbers = set()
    for part in text.split(","):
        span = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if span is None or not int(span[1]) <= int(span[2] or span[1]) < ARCHIVES:
            must = f"a list of numbers from 0 to {ARCHIVES - 1}, as in 0,1 or 0-4"
            raise argparse.ArgumentTypeError(f"{text} is not {must}")
        numbers.update(range(int(span[1]), int(span[2] or span[1]) + 1))
    return sorted(numbers)


def main(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--subsets", type=subsets_argument, default="0-20", help="as in 0,1 or 0-4 (default: all)")
    add("--source", default=SOURCE, help="folder or URL with the archives (default: %(default)s)")
    cores = os.cpu_count()
    add("--workers", type=int, default=cores, help="processes (default: one per core, %(default)s)")
    here = Path(__file__).parent
    add("--out", type=folder_argument, default=here, help="folder to write to (default: this one)")
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error(f"--workers={args.workers}: must be at least 1")
    try:
        prepare(args)
    except (Exception, KeyboardInterrupt) as error:
        fail(error)


if __name__ == "__main__":
    ignore_stream_errors()
    main(sys.argv[1:])
