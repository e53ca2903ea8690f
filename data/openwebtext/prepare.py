"""OpenWebText as GPT-2 tokens: 8,013,769 web pages, 40 GB of text, 9.04e9 tokens, 18 GB as uint16.

    python data/openwebtext/prepare.py                all 21 archives, a download of 13 GB
    python data/openwebtext/prepare.py --subsets=0    only the first, to try; --subsets=0-4 later adds four
    python data/openwebtext/prepare.py --source=DIR   archives in a folder, or on a mirror (a URL)

The archives (A. Gokaslan and V. Cohen, OpenWebText Corpus, 2019) are read as they arrive and not stored. The
program may be interrupted or killed at any time: the next call starts again with the archive that was being
read, and the files come out the same, byte for byte.

    urlsf_subset00.tar > urlsf_subset00-1_data.xz, ... > (an xz-compressed tar) > one text file per document

The text of a document is the same as in the Hugging Face dataset: runs of blank lines become one blank line,
and white space at both ends is removed. A hash of the document decides whether it is for validation: one in
2,000 is. The code reads from top to bottom: reading an archive, what a worker does, the whole.
"""

import argparse
import collections
import contextlib
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
import urllib.request
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.dataset import PARTS, load_json, make_encoding, write_meta
from data.files import (
    atomic_write,
    blame,
    lock,
    one_line,
    steady_streams,
    sweep,
    to_folder,
    writing,
)

REVISION = "f3808c30e817981b845ec549c43e82bb467d8144"  # the files of a revision never change
SOURCE = f"https://huggingface.co/datasets/Skylion007/openwebtext/resolve/{REVISION}/subsets"
ARCHIVES, DOCUMENTS = 21, 8_013_769
VOCABULARY, SEPARATOR = "gpt2", 50256
FILES = TRAIN, VAL = "train.bin", "val.bin"
VALIDATION = 2000  # one document in this many is for validation
TOKEN_BYTES = 1.5  # a byte of archive becomes 1.4 bytes of tokens
ATTEMPTS = 12  # that fail in a row before a download is given up: about four minutes
START_OVER = (
    "to start over, delete progress.json and all files whose names begin with train.bin or val.bin"
)


# --- reading ----------------------------------------------------------------------------------------------


class Redirect(urllib.request.HTTPRedirectHandler):
    """The hub redirects to its storage. Only this redirect states the size and SHA-256 of the file."""

    size = sha256 = None

    def redirect_request(self, request, response, code, message, headers, url):
        self.size = headers.get("X-Linked-Size", self.size)
        self.sha256 = headers.get("X-Linked-Etag", self.sha256)
        return super().redirect_request(request, response, code, message, headers, url)


class Archive:
    """A file at a URL (https or file), read once from start to end. Reconnects when a connection breaks.

    size: in bytes. sha256: as the server states it, or None. copy: a file to write what is read to, or None.
    Raises OSError if a server refuses or cannot be reached, ValueError if size or SHA-256 are wrong."""

    def __init__(self, url, attempts):
        self.url, self.attempts, self.failures, self.response = url, attempts, 0, None
        self.position, self.size, self.sha256 = 0, None, None
        self.digest, self.copy = hashlib.sha256(), None
        self.read(0)  # connects

    def connect(self):
        redirect = Redirect()
        request = urllib.request.Request(self.url, headers={"User-Agent": "nanomem"})
        if self.position:
            request.add_header("Range", f"bytes={self.position}-")
        self.response = urllib.request.build_opener(redirect).open(request, timeout=30)
        headers = (
            self.response.headers
        )  # "bytes FIRST-LAST/SIZE", or else the whole file is sent again
        partial = re.fullmatch(r"(?i)bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
        first, size = partial.groups() if partial else (0, headers.get("Content-Length"))
        sizes = {int(s) for s in (size, self.size, redirect.size) if s not in (None, "*")}
        if len(sizes) != 1:
            raise ValueError(f"{self.url}: it should have one size, not {sorted(sizes) or 'none'}")
        self.size, sha256 = sizes.pop(), (redirect.sha256 or "").strip('"')
        self.sha256 = sha256 if re.fullmatch("[0-9a-f]{64}", sha256) else self.sha256
        for start in range(int(first), self.position, 2**20):  # what has been read before
            self.response.read(min(2**20, self.position - start))

    def read(self, n):
        """n bytes, or fewer at the end of the file."""
        parts = []
        while self.response is None or (n > 0 and self.position < self.size):
            try:
                if self.response is None:
                    self.connect()
                elif part := self.response.read(min(n, self.size - self.position)):
                    parts.append(part)
                    self.position, n, self.failures = self.position + len(part), n - len(part), 0
                else:
                    raise ConnectionError("the connection was closed")
            except (OSError, http.client.HTTPException) as error:
                self.pause(error)
        data = b"".join(parts)
        self.digest.update(data)
        if self.copy:
            self.copy.write(data)
        if self.position == self.size and self.sha256 not in (None, self.digest.hexdigest()):
            raise ValueError(
                f"its SHA-256 is {self.digest.hexdigest()}, and should be {self.sha256}"
            )
        return data

    def pause(self, error):
        """Wait before the next attempt, longer each time. Raises OSError if there is to be none."""
        self.close()
        self.failures += 1
        code = getattr(error, "code", 500)  # of an HTTPError
        if self.failures == self.attempts or (code < 500 and code not in (408, 429)):
            raise OSError(f"{self.url}: {error}") from None
        if self.failures > 1:
            attempt = f"attempt {self.failures} of {self.attempts}"
            tqdm.write(f"{self.url}: {error} at byte {self.position:,}; {attempt}", sys.stderr)
        time.sleep(min(60, 0.1 * 2**self.failures))

    def close(self):
        if self.response is not None:
            self.response.close()
        self.response = None


def tar_files(file):
    """Yield name and content of each file in a tar archive. Raises ValueError or TarError if it is damaged.

    (tarfile.open takes a damaged header, or the lack of an end mark, for the end. It is slower, too.)"""
    while (header := file.read(512)) != bytes(512):
        entry = tarfile.TarInfo.frombuf(header, "utf-8", "replace")
        content = file.read(-(-entry.size // 512) * 512)[: entry.size]
        if len(content) < entry.size:
            raise ValueError("truncated file")
        if entry.type in b"LKS" or (
            entry.type in b"xg" and re.search(rb"\d+ (path|GNU\.sparse)", content)
        ):
            raise ValueError(f"{entry.name}: a long name or a sparse file, which is not supported")
        if entry.isreg():  # neither a folder nor a header with times and owners
            yield entry.name, content


# --- what a worker does -----------------------------------------------------------------------------------


def start_worker(vocabulary):
    global encoding
    encoding = make_encoding(vocabulary)

    def follow():  # a parent that is killed cannot end its workers
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def tokenize(member, data):
    """An xz-compressed tar -> {TRAIN: token ids as bytes, VAL: the same}, counts. member: its name."""
    ids, sizes, separator = {TRAIN: [], VAL: []}, [], np.array([SEPARATOR], "<u2")
    with blame(f"{member} is damaged", "get the archive again"):
        for name, content in tar_files(io.BytesIO(lzma.decompress(data))):
            try:
                text = re.sub("\n\n\n+", "\n\n", content.decode()).strip()
            except UnicodeDecodeError as error:
                raise ValueError(f"{name} is not UTF-8 text: {error}") from None
            tokens = encoding.encode_to_numpy(text, disallowed_special=()).astype("<u2")
            # the split depends on the document alone: not on its place, nor on how many archives there are
            number = int.from_bytes(hashlib.sha256(content).digest()[:8], "big")
            ids[TRAIN if number % VALIDATION else VAL] += [separator, tokens]
            sizes.append(len(content))
    ids = {file: b"".join(parts) for file, parts in ids.items()}
    counts = {file: len(data) for file, data in ids.items()}
    return ids, counts | {"documents": len(sizes), "text_bytes": sum(sizes)}


def tokenize_all(archive, pool, limit):
    """Yield what tokenize returns for each member of an archive, in order. limit: members held in memory."""
    waiting = collections.deque()
    for name, data in tar_files(archive):
        if name.endswith("_data.xz"):
            waiting.append(pool.submit(tokenize, name, data))
        if len(waiting) > limit:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


# --- the whole --------------------------------------------------------------------------------------------


def read_progress(out, names):
    """{archive: counts} of the finished archives, in order, and the sum of the counts. names: of the archives
    that are asked for. Raises ValueError if the folder `out` holds anything else, or is damaged."""
    file, meta = out / "progress.json", out / "meta.json"
    with blame(f"{file} is damaged", START_OVER):
        progress = json.loads(file.read_text()) if file.exists() else {}
        total = sum(map(collections.Counter, progress.values()), collections.Counter())
    finished = list(progress)
    archives = load_json(meta).get("archives") if meta.exists() else finished
    if archives != finished or (not finished and any((out / name).exists() for name in PARTS)):
        raise ValueError(
            f"{out} holds a dataset that this program has not made; give another --out"
        )
    for name in FILES:
        file = out / name if (out / name).exists() else out / f"{name}.partial"
        size = file.stat().st_size if file.exists() else 0
        # a partial file may be longer, by what was added of an unfinished archive
        if size < total[name] or (size > total[name] and file.name == name):
            raise ValueError(
                f"{file} has {size:,} bytes, and should have {total[name]:,}; {START_OVER}"
            )
    if names[: len(finished)] != finished:
        way_out = (
            "--subsets must name these, too, and otherwise only later ones; or give another --out"
        )
        raise ValueError(f"{out} begins with {', '.join(finished)}: {way_out}")
    return progress, total


def add_archive(archive, outputs, pool, limit, bar):
    """Append the tokens of an archive to the outputs. Returns its counts."""
    counts, start = collections.Counter(bytes=archive.size), bar.n
    for ids, part in tokenize_all(archive, pool, limit):
        for name, data in ids.items():
            with writing(outputs[name].name):
                outputs[name].write(data)
        counts.update(part)
        bar.set_postfix(documents=f"{counts['documents']:,}", refresh=False)
        bar.update(start + archive.position - bar.n)
    while archive.read(2**20):  # what follows the end mark counts for the SHA-256
        pass
    if not counts["documents"]:
        raise ValueError("no documents: it has no *_data.xz with a text file in it")
    for file in outputs.values():
        file.flush()
        os.fsync(file.fileno())
    return counts


def prepare(args):
    """Returns the counts of the whole dataset, and how many bytes of text this call has added."""
    out, keep, added = args.out, args.keep, 0
    make_encoding(
        VOCABULARY
    )  # an error now if it cannot be had; later workers find it in tiktoken's cache
    for folder in (out, keep or out):
        folder.mkdir(parents=True, exist_ok=True)
        lock(folder)
        sweep(folder, r"(meta|progress)\.json|urlsf_subset\d\d\.tar")
    names, meta = [f"urlsf_subset{i:02}.tar" for i in args.subsets], out / "meta.json"
    progress, total = read_progress(out, names)
    missing = names[len(progress) :]
    if not missing and meta.exists():
        return total, added
    source = (
        args.source.rstrip("/") if "://" in args.source else Path(args.source).resolve().as_uri()
    )
    size = 0
    for name in missing:  # an archive that cannot be had is an error now, not hours later
        with contextlib.closing(Archive(f"{source}/{name}", attempts=1)) as archive:
            size += archive.size
    needs = collections.Counter()  # per disk
    for folder, bytes_there in ((out, TOKEN_BYTES * size), (keep or out, size if keep else 0)):
        disk, free = os.stat(folder).st_dev, shutil.disk_usage(folder).free
        needs[disk] += bytes_there
        if needs[disk] > free:
            raise OSError(
                f"{folder} needs {needs[disk] / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are left"
            )

    print(
        "If interrupted, the same command continues after the last finished archive",
        file=sys.stderr,
    )
    meta.unlink(missing_ok=True)  # only a complete folder has one
    outputs = {}
    for name in FILES:
        partial = out / f"{name}.partial"
        if (out / name).exists():
            os.replace(out / name, partial)
        outputs[name] = partial.open("ab")
        outputs[name].truncate(total[name])
    context = multiprocessing.get_context("spawn")  # the same on every system
    bar = tqdm(total=total["bytes"] + size, initial=total["bytes"], unit="B", unit_scale=True)
    with bar, ProcessPoolExecutor(args.workers, context, start_worker, (VOCABULARY,)) as pool:
        handler = signal.signal(
            signal.SIGINT, signal.SIG_IGN
        )  # inherited: only the parent handles Ctrl-C
        for _ in range(args.workers):
            pool.submit(int)  # starts a worker
        signal.signal(signal.SIGINT, handler)
        for name in missing:
            bar.set_description(name)
            copy = atomic_write(keep / name) if keep else contextlib.nullcontext()
            with (
                contextlib.closing(Archive(f"{source}/{name}", ATTEMPTS)) as archive,
                copy as archive.copy,
            ):
                try:
                    counts = add_archive(archive, outputs, pool, 2 * args.workers, bar)
                except (ValueError, tarfile.TarError) as error:
                    what = f"{name} is incomplete, damaged, or not an archive of OpenWebText"
                    where = f"{archive.position:,} of {archive.size:,} bytes read"
                    raise ValueError(f"{what}: {error} ({where})") from None
            progress[name] = counts
            with atomic_write(
                out / "progress.json"
            ) as file:  # from here on this archive is finished
                file.write(json.dumps(progress, indent=2).encode())
            total, added = total + counts, added + counts["text_bytes"]
    for name, file in outputs.items():
        file.close()
        os.replace(out / f"{name}.partial", out / name)
    write_meta(out, "gpt2", "uint16", 50257, SEPARATOR, archives=names)
    return total, added


def to_subsets(text):
    """For argparse: "0,2,5-7" -> [0, 2, 5, 6, 7]"""
    spans = {f"{a}-{b}": range(a, b + 1) for a in range(ARCHIVES) for b in range(a, ARCHIVES)}
    spans |= {str(a): [a] for a in range(ARCHIVES)}
    try:
        return sorted({i for part in text.split(",") for i in spans[part]})
    except KeyError:
        message = f"{text} is not a list of numbers from 0 to {ARCHIVES - 1}, as in 0,1 or 0-4"
        raise argparse.ArgumentTypeError(message) from None


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add(
        "--subsets",
        type=to_subsets,
        default="0-20",
        help="which archives, as in 0,1 or 0-4 (default: all)",
    )
    add(
        "--source",
        default=SOURCE,
        help="folder or URL with the archives (default: the hub, %(default)s)",
    )
    add(
        "--keep",
        type=to_folder,
        metavar="DIR",
        help="store the archives there, for --source (default: no)",
    )
    add(
        "--workers",
        type=int,
        default=os.cpu_count(),
        help="processes (default: one per core, %(default)s)",
    )
    add(
        "--out",
        type=to_folder,
        default=Path(__file__).parent,
        help="folder to write to (default: this one)",
    )
    args = parser.parse_args()
    if args.workers < 1:
        parser.error(f"--workers={args.workers}: must be at least 1")
    if args.keep and "://" not in args.source:
        parser.error(
            f"--keep is for downloads: the archives in --source={args.source} are kept anyway"
        )
    start = time.perf_counter()
    with one_line("prepare.py"):
        total, added = prepare(args)
    tokens = f"{total[TRAIN] // 2:,} training tokens and {total[VAL] // 2:,} validation tokens"
    print(f"{args.out}: {total['documents']:,} documents, {tokens}")
    if added:
        seconds, size = time.perf_counter() - start, added / 1e6
        print(f"{size:,.1f} MB of text in {seconds:,.1f} s: {size / seconds:,.1f} MB/s")
    if args.source == SOURCE and len(args.subsets) == ARCHIVES and total["documents"] != DOCUMENTS:
        sys.exit(f"prepare.py: the corpus should have {DOCUMENTS:,} documents: please report this")


if __name__ == "__main__":
    steady_streams()
    main()
