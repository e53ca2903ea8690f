"""OpenWebText to GPT-2 tokens: 8,013,769 web pages, 40 GB of text, 9.04e9 tokens, 18 GB as uint16.

    python data/openwebtext/prepare.py                    all 21 archives: 13 GB to download
    python data/openwebtext/prepare.py --subsets=0        one of them, enough to try; --subsets=0-4 later adds four
    python data/openwebtext/prepare.py --source=DIR       archives that lie in a folder, or on a mirror (a URL)

The archives (A. Gokaslan and V. Cohen, OpenWebText Corpus, 2019) are read as they arrive and not kept. Interrupt it whenever you
like: the next call goes on with the archive that it was at, and writes the same bytes as if nothing had happened.

    urlsf_subset00.tar  >  urlsf_subset00-1_data.xz, ...  >  (an xz-compressed tar)  >  one text file a document

A document is its text as everyone has it who uses the dataset from the hub: runs of blank lines shortened to one, no white
space at the ends. Its hash says whether it is for validation: one in 2,000 is, about 4,000 documents of all.
Read from the bottom: main, convert, then tokenize (what a worker does) and Download.
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
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.dataset import PARTS, load_json, make_encoding, write_meta
from data.files import atomic_write, explain, lock, steady_streams, sweep, to_folder, write_file

REVISION = "f3808c30e817981b845ec549c43e82bb467d8144"  # the files of a revision never change
SOURCE = f"https://huggingface.co/datasets/Skylion007/openwebtext/resolve/{REVISION}/subsets"
ARCHIVES, DOCUMENTS = 21, 8_013_769
VOCABULARY, SEPARATOR = "gpt2", 50256
VALIDATION = 2000  # one document in so many
TOKEN_BYTES = 1.5  # a byte of archive becomes 1.4 bytes of tokens
ANEW = "to begin anew, delete progress.json and what begins with train.bin and val.bin"
ATTEMPTS = 12  # at reading on without getting a byte, over about four minutes


# --- reading ----------------------------------------------------------------------------------------------------------


class Redirect(urllib.request.HTTPRedirectHandler):
    """The hub answers with a redirect to its storage; size and SHA-256 of the file stand in that answer, not in the next."""

    linked_size = linked_sha256 = None

    def redirect_request(self, request, response, code, message, headers, url):
        self.linked_size = headers.get("X-Linked-Size", self.linked_size)
        self.linked_sha256 = headers.get("X-Linked-Etag", self.linked_sha256)
        return super().redirect_request(request, response, code, message, headers, url)


class Download:
    """A file behind a URL, read once from beginning to end. Where a connection breaks, another one goes on.

    size: in bytes. sha256: as the server states it, or None. Raises OSError when a server refuses, stays away, or offers another
    file than before."""

    def __init__(self, url, attempts):
        self.url, self.attempts, self.failures = url, attempts, 0
        self.position, self.size, self.sha256, self.response = 0, None, None, None
        while self.response is None:
            try:
                self.connect()
            except (OSError, http.client.HTTPException) as error:
                self.pause(error)

    def connect(self):
        redirect = Redirect()
        request = urllib.request.Request(self.url, headers={"User-Agent": "nanomem"})
        if self.position:
            request.add_header("Range", f"bytes={self.position}-")
        self.response = urllib.request.build_opener(redirect).open(request, timeout=30)
        # 200 and all of it, or 206 and "bytes FIRST-LAST/SIZE"
        partial = re.fullmatch(r"(?i)bytes (\d+)-\d+/(\d+|\*)", self.response.headers.get("Content-Range", ""))
        first, size = partial.groups() if partial else (0, self.response.headers.get("Content-Length"))
        sizes = {int(s) for s in (size, self.size, redirect.linked_size) if s not in (None, "*")}
        if len(sizes) != 1:
            self.attempts = 1  # it will not get better
            raise OSError(f"it should have one size, not {' and '.join(map(str, sorted(sizes))) or 'none'}")
        self.size, sha256 = sizes.pop(), (redirect.linked_sha256 or "").strip('"')
        self.sha256 = sha256 if re.fullmatch("[0-9a-f]{64}", sha256) else self.sha256
        to_skip = self.position - int(first)  # by a server that begins anew
        while to_skip > 0 and (skipped := self.response.read(min(to_skip, 2**20))):
            to_skip -= len(skipped)
        if to_skip:
            raise ConnectionError("the server does not go on where it stopped")

    def read(self, n):
        """n bytes; fewer at the end of the file only."""
        parts, n = [], min(n, self.size - self.position)
        while n > 0:
            try:
                if self.response is None:
                    self.connect()
                part = self.response.read(n)
                if not part:
                    raise ConnectionError("the connection was closed")
            except (OSError, http.client.HTTPException) as error:
                self.pause(error)
                continue
            self.position, n, self.failures = self.position + len(part), n - len(part), 0
            parts.append(part)
        return b"".join(parts)

    def pause(self, error):
        """Wait before another attempt, longer each time. Raises the error if that is of no use."""
        self.close()
        self.failures += 1
        refused = isinstance(error, urllib.error.HTTPError) and error.code < 500 and error.code not in (408, 429)
        if refused or self.failures == self.attempts:
            raise OSError(f"{self.url}: {error}") from None
        if self.failures > 1:
            tqdm.write(f"{self.url}: {error} at byte {self.position:,}; attempt {self.failures} of {self.attempts}", sys.stderr)
        time.sleep(min(60, 0.1 * 2**self.failures))

    def close(self):
        if self.response is not None:
            self.response.close()
        self.response = None


def tar_files(file):
    """Yield name and content of each file in a tar. Raises ValueError for one that is damaged or ends early.

    (The tarfile module takes a damaged header, or the lack of an end, for the end of the archive. It is slower, too.)"""

    def read(n):
        data = file.read(n)
        if len(data) < n:
            raise ValueError("it ends early")
        return data

    while (header := read(512)) != bytes(512):
        # octal numbers: the size, and the sum of all bytes with blanks in the place of the sum itself
        size, checksum = (re.fullmatch(rb"[ 0]*([0-7]*)[ \0]*", header[a:b]) for a, b in ((124, 136), (148, 156)))
        if not (size and checksum and int(b"0" + checksum[1], 8) == sum(header) - sum(header[148:156]) + 8 * ord(" ")):
            raise ValueError("a header is not one of a tar archive")
        size, kind = int(b"0" + size[1], 8), header[156:157]
        content, name = read(-(-size // 512) * 512)[:size], header[:100].rstrip(b"\0").decode(errors="replace")
        if kind in b"LKS" or (kind in b"xg" and re.search(rb"\d+ (path|size|GNU.sparse\S*)=", content)):
            raise ValueError(f"{name} is of a kind that this reader does not know: a long name, or a sparse file")
        if kind in b"0\0" and not name.endswith("/"):  # a file; folders, and notes on times and owners, are passed over
            yield name, content


# --- what a worker does -----------------------------------------------------------------------------------------------


def start_worker(vocabulary):
    global encoding
    encoding = make_encoding(vocabulary)

    def follow():  # a parent that was killed cannot end them
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@contextlib.contextmanager
def deaf_to_ctrl_c():
    """For processes that are started meanwhile, which inherit it: else Ctrl-C would have each of them print a traceback."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def is_validation(content):
    """Whether a document is held out: by its own bytes, so that neither order nor company matters. content: bytes"""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") % VALIDATION == 0


def tokenize(data):
    """An xz-compressed tar -> {"train": ids as bytes, "val": ids as bytes}, counts of what was in it."""
    ids, text_bytes, separator = {"train": [], "val": []}, [], np.array([SEPARATOR], "<u2")
    for name, content in tar_files(io.BytesIO(lzma.decompress(data))):
        try:
            text = re.sub("\n\n\n+", "\n\n", content.decode()).strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"{name} is not UTF-8 text: {error}") from None
        split = "val" if is_validation(content) else "train"
        ids[split] += [separator, encoding.encode_to_numpy(text, disallowed_special=()).astype("<u2")]
        text_bytes.append(len(content))
    ids = {split: b"".join(parts) for split, parts in ids.items()}
    counts = {"documents": len(text_bytes), "text_bytes": sum(text_bytes)}
    return ids, counts | {f"{split}_tokens": len(data) // 2 for split, data in ids.items()}


# --- the whole --------------------------------------------------------------------------------------------------------


class Tee:
    """A file of which all that is read is counted, hashed, and copied if there is a file for the copy."""

    def __init__(self, file, copy):
        self.file, self.copy, self.position, self.digest = file, copy, 0, hashlib.sha256()

    def read(self, n):
        data = self.file.read(n)
        self.position += len(data)
        self.digest.update(data)
        if self.copy:
            self.copy.write(data)
        return data


def open_archive(source, name, attempts):
    """-> file, its size in bytes, its SHA-256 or None. source: a folder, or a URL and then how often to try again."""
    if "://" in source:
        file = Download(f"{source.rstrip('/')}/{name}", attempts)
        return file, file.size, file.sha256
    path = Path(source) / name
    return path.open("rb"), path.stat().st_size, None


def convert(name, source, keep, pool, workers):
    """Yield ({"train": bytes, "val": bytes}, counts) of one archive part by part, in its order whatever the number of workers.
    Raises ValueError, at the end perhaps, if it is not whole: nothing that was yielded before may be used then."""
    waiting, documents, begin = collections.deque(), 0, 0  # two members a worker wait at most: memory is bounded
    file, size, sha256 = open_archive(source, name, ATTEMPTS)
    with contextlib.closing(file), atomic_write(keep / name) if keep else contextlib.nullcontext() as copy:
        archive = Tee(file, copy)
        members = tar_files(archive)
        while True:
            try:
                member, data = next(members, (None, None))
            except ValueError as error:
                raise ValueError(f"{name} is not a whole tar archive: {error} (byte {archive.position:,} of {size:,})") from None
            if data is not None and member.endswith("_data.xz"):
                waiting.append((member, archive.position, pool.submit(tokenize, data)))
            while len(waiting) > (0 if data is None else 2 * workers):
                part, end, future = waiting.popleft()
                try:
                    ids, counts = future.result()
                except (lzma.LZMAError, ValueError) as error:
                    raise ValueError(f"{name} is damaged: {part}: {error}") from None
                documents += counts["documents"]
                yield ids, counts | {"bytes": end - begin}
                begin = end
            if data is None:
                break
        while archive.read(2**20):  # what comes after the end mark belongs to the file, too
            pass
        digest = archive.digest.hexdigest()
        if sha256 not in (None, digest):
            raise ValueError(f"{name} has arrived damaged: its SHA-256 is {digest} and should be {sha256}")
        if not documents:
            raise ValueError(f"{name} has no documents: there is no *_data.xz with a text file in it")
    yield {}, {"bytes": size - begin}


def to_subsets(text):
    """"0,2,5-7" -> [0, 2, 5, 6, 7]"""
    subsets = set()
    for part in text.split(","):
        numbers = re.fullmatch(r"(\d{1,2})(?:-(\d{1,2}))?", part)
        first, last = (int(n or numbers[1]) for n in numbers.groups()) if numbers else (1, 0)
        if not first <= last < ARCHIVES:
            raise argparse.ArgumentTypeError(f"{text} are not numbers from 0 to {ARCHIVES - 1}, as in 0,1 or 0-4")
        subsets |= set(range(first, last + 1))
    return sorted(subsets)


def read_progress(path):
    """{name of archive: counts}, of those that are done, in order."""
    try:
        progress = {name: collections.Counter(counts) for name, counts in json.loads(path.read_text()).items()}
        if not all(isinstance(n, int) and n >= 0 for counts in progress.values() for n in counts.values()):
            raise ValueError
        return progress
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, AttributeError):
        raise ValueError(f"{path} is damaged; {ANEW}") from None


def check_disk(out, keep, size):
    """size: bytes of the archives that are to come."""
    needs = collections.Counter({os.stat(out).st_dev: TOKEN_BYTES * size})
    for folder in dict.fromkeys((out, keep) if keep else (out,)):
        disk, free = os.stat(folder).st_dev, shutil.disk_usage(folder).free
        needs[disk] += size if folder == keep else 0
        if needs[disk] > free:
            raise OSError(f"{folder} needs {needs[disk] / 1e9:,.1f} GB, and its disk has {free / 1e9:,.1f} GB left")


def open_output(path, committed):
    """Open path.partial to append to what finished archives have left there, or in `path` itself. committed: bytes of these"""
    partial = Path(f"{path}.partial")
    if path.exists():
        os.replace(path, partial)
    file = partial.open("ab")
    file.truncate(committed)
    return file


def prepare(args):
    """Returns the counts of the whole dataset, and of what this call has added to it."""
    out, keep = args.out, args.keep
    make_encoding(VOCABULARY)  # says what to do if it cannot be had, and leaves it where the workers find it
    for folder in dict.fromkeys((out, keep) if keep else (out,)):
        folder.mkdir(parents=True, exist_ok=True)
        lock(folder)

    progress, added = read_progress(out / "progress.json"), collections.Counter()
    names = [f"urlsf_subset{i:02}.tar" for i in args.subsets]
    paths = {split: out / f"{split}.bin" for split in ("train", "val")}
    total, meta = sum(progress.values(), collections.Counter()), out / "meta.json"
    finished = {split: path.exists() for split, path in paths.items()}
    ours = progress and (not meta.exists() or load_json(meta).get("archives") == list(progress))
    if any((out / name).exists() for name in PARTS) and not ours:
        raise ValueError(f"{out} holds a dataset that this program has not made; give another --out")
    for split, path in paths.items():  # what is finished has its length; to what is not, archives may have been added in part
        file, committed = path if finished[split] else Path(f"{path}.partial"), 2 * total[f"{split}_tokens"]
        size = file.stat().st_size if file.exists() else 0
        if size < committed or (finished[split] and size > committed):
            raise ValueError(f"{file} has {size:,} bytes, and should have {committed:,}; {ANEW}")
    if names[: len(progress)] != list(progress):
        raise ValueError(
            f"{out} begins with {', '.join(progress)}: --subsets must name these, too, and only later ones beside them; or give "
            "another --out"
        )
    for folder in (out, keep or out):
        sweep(folder, r"(meta|progress)\.json|urlsf_subset\d\d\.tar")
    if names == list(progress) and meta.exists() and all(finished.values()):
        return total, added
    size = 0
    for name in names[len(progress) :]:  # all of them are looked at before the work of hours begins: whatever lacks is said at once
        file, file_size, _ = open_archive(args.source, name, attempts=1)
        file.close()
        size += file_size
    check_disk(out, keep, size)

    meta.unlink(missing_ok=True)  # a folder that has one is complete
    outputs = {split: open_output(path, 2 * total[f"{split}_tokens"]) for split, path in paths.items()}
    context = multiprocessing.get_context("spawn")  # the same on every system
    bar = tqdm(total=total["bytes"] + size, initial=total["bytes"], unit="B", unit_scale=True, dynamic_ncols=True)
    with bar, ProcessPoolExecutor(args.workers, context, start_worker, (VOCABULARY,)) as pool:
        with deaf_to_ctrl_c():
            for _ in range(args.workers):
                pool.submit(int)  # an empty task for each: they start now
        for name in names[len(progress) :]:
            bar.set_description(name)
            counts = collections.Counter()
            for ids, part in convert(name, args.source, keep, pool, args.workers):
                for split, data in ids.items():
                    outputs[split].write(data)
                counts.update(part)
                total.update(part)
                tokens = total["train_tokens"] + total["val_tokens"]
                bar.set_postfix_str(f"{total['documents']:,} documents, {tokens / 1e6:,.1f}M tokens", refresh=False)
                bar.update(part["bytes"])
            for file in outputs.values():
                file.flush()
                os.fsync(file.fileno())
            progress[name] = counts
            write_file(out / "progress.json", json.dumps(progress, indent=2) + "\n")  # from here on the archive is done
            added.update(counts)
    for split, file in outputs.items():
        file.close()
        if not total[f"{split}_tokens"]:
            raise ValueError(f"too little text: no document of it has gone into {split}.bin")
    for path in paths.values():
        os.replace(f"{path}.partial", path)
    write_meta(out, "gpt2", "uint16", 50257, SEPARATOR, archives=names)
    return total, added


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--subsets", type=to_subsets, default="0-20", help=f"which of the {ARCHIVES} archives, as in 0,1 or 0-4 (default: all)")
    add("--source", default=SOURCE, help="folder or URL that holds the archives (default: the hub, %(default)s)")
    add("--keep", type=to_folder, metavar="DIR", help="keep what is downloaded there, as a --source for later (default: nothing)")
    add("--workers", type=int, default=os.cpu_count(), help="processes that tokenize (default: one a core, %(default)s here)")
    add("--out", type=to_folder, default=Path(__file__).parent, help="folder to write to (default: this one)")
    args = parser.parse_args()
    if args.workers < 1:
        parser.error(f"--workers={args.workers}: must be at least 1")
    if args.keep and "://" not in args.source:
        parser.error(f"--keep is for downloads: the archives in --source={args.source} are kept anyway")
    began, again = time.perf_counter(), "Call it again when that is put right: finished archives are not repeated"
    try:
        total, added = prepare(args)
    except Exception as error:
        nameless = isinstance(error, OSError) and error.errno and not error.filename  # a full disk
        sys.exit(f"prepare.py: {f'{args.out}: ' if nameless else ''}{explain(error)}. {again}")
    except KeyboardInterrupt:
        print("Stopped. Call it again to go on: finished archives are not repeated", file=sys.stderr)
        sys.exit(130)
    print(
        f"{args.out}: {total['documents']:,} documents, {total['train_tokens']:,} training tokens and {total['val_tokens']:,} "
        "validation tokens"
    )
    if added:
        seconds, size = time.perf_counter() - began, added["text_bytes"] / 1e6
        print(f"{size:,.1f} MB of text in {seconds:,.1f} s: {size / seconds:,.1f} MB/s in {args.workers} processes")
    if args.source == SOURCE and len(args.subsets) == ARCHIVES and total["documents"] != DOCUMENTS:
        sys.exit(f"prepare.py: the corpus should have {DOCUMENTS:,} documents: please report this")


if __name__ == "__main__":
    steady_streams()
    main()
