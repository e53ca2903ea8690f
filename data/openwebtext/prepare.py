"""OpenWebText as GPT-2 tokens: 8,013,769 web pages, 40 GB of text, 9.04e9 tokens (18 GB).

    python data/openwebtext/prepare.py                all 21 archives, a download of 13 GB
    python data/openwebtext/prepare.py --subsets=0    only the first, to try
    python data/openwebtext/prepare.py --source=DIR   archives in a folder, or on a mirror (a URL)

The archives (A. Gokaslan and V. Cohen, OpenWebText Corpus, 2019) are downloaded to archives/ in the
output folder, and stay there. After an interruption, the next call continues the download and
starts tokenising from the beginning. All archives take half an hour on two cores.

    urlsf_subset00.tar > urlsf_subset00-1_data.xz, ... > (a compressed tar) > a file per document

The text of a document is the same as in the Hugging Face dataset: line ends CR LF and CR become LF,
runs of blank lines become one blank line, and white space at both ends is removed. A byte order
mark, which stays there, is dropped here. A hash of the document decides whether it is for
validation: one in 2,000 is.

Damaged archives are refused. A download must have the size and the SHA-256 that the server states.
Before tokenising starts, an archive must have valid headers up to its end mark. A truncated archive
has no end mark. The checksums in the xz-compressed parts must be right.
"""

import argparse
import contextlib
import functools
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

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import runtime.files as files
from data.dataset import (
    FILES,
    GPT2_SEPARATOR,
    GPT2_SIZE,
    UNFINISHED,
    check_free,
    make_encoding,
    write_meta,
)
from runtime.arguments import Parser, folder_argument
from runtime.bars import Bar

REVISION = "f3808c30e817981b845ec549c43e82bb467d8144"  # the files of a revision never change
SOURCE = f"https://huggingface.co/datasets/Skylion007/openwebtext/resolve/{REVISION}/subsets"
ARCHIVES = 21
ARCHIVE_BYTES = 0.63e9  # of one archive, about
TOKEN_BYTES = 1.5  # a byte of archive becomes 1.4 bytes of tokens
DOCUMENTS = 8_013_769
VALIDATION = 2000  # one document in this many is for validation
VOCABULARY = "gpt2"
WAITS = [0, 1, 2, 4, 8, 15, 30, 60, 60]  # seconds before each attempt to download an archive
REFUSALS = [401, 403, 404, 410]  # HTTP errors that are final: no further attempt
WAY_OUT = "delete it, and run this again without --source to download it"


# --- download -------------------------------------------------------------------------


class Redirect(urllib.request.HTTPRedirectHandler):
    """The hub redirects to its storage. Only this redirect states the SHA-256 of the file."""

    sha256 = ""

    def redirect_request(self, request, response, code, message, headers, url):
        self.sha256 = headers.get("X-Linked-Etag", "").strip('"')
        return super().redirect_request(request, response, code, message, headers, url)


def fetch(url, part):
    """Download what is missing and append it to the file `part`. Returns the SHA-256 that the
    server states, or ""."""
    size = 0
    if part.exists():
        size = part.stat().st_size
    headers = {"User-Agent": "nanomem", "Range": f"bytes={size}-"}
    request = urllib.request.Request(url, headers=headers)
    redirect = Redirect()
    with urllib.request.build_opener(redirect).open(request, timeout=30) as response:
        length = response.headers.get("Content-Length")
        if length is None:
            raise ValueError(f"{url}: the server does not state the size of the file")
        if response.status != 206:  # the server sends the whole file again
            part.unlink(missing_ok=True)
            size = 0
        total = size + int(length)
        with Bar(desc=part.stem, total=total, initial=size, unit="B", unit_scale=True) as bar:
            while size < total:
                data = response.read(2**20)
                if not data:
                    raise ConnectionError(f"the connection was closed at byte {size:,}")
                files.append_to_file(part, data)
                size += len(data)
                bar.update(len(data))
    return redirect.sha256


def fetch_patiently(url, part):
    """Call fetch, and try again if the network or the server fails."""
    for wait in WAITS:
        time.sleep(wait)
        try:
            return fetch(url, part)
        except (OSError, http.client.HTTPException) as error:
            code = getattr(error, "code", None)  # of an HTTPError
            if code in REFUSALS:
                raise OSError(f"{url}: {error}") from None
            if code == 416:  # the part is as long as the file, or longer
                part.unlink()
            print(f"{url}: {error}", file=sys.stderr)
    raise OSError(f"{url}: {len(WAITS)} attempts have failed; run this again to continue")


def download(url, archive):
    part = Path(f"{archive}.partial")
    sha256 = fetch_patiently(url, part)
    with open(part, "rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    if sha256 and digest != sha256:
        part.unlink()
        raise ValueError(f"{url}: its SHA-256 is {digest}, and should be {sha256}; run this again")
    if not tarfile.is_tarfile(part):
        part.unlink()
        raise ValueError(f"{url} is not a tar archive; run this again")
    os.replace(part, archive)


def check_space(out, archives):
    """Raises OSError if the disk has no room for the tokens and the missing archives."""
    sizes = [archive.stat().st_size for archive in archives if archive.exists()]
    missing = ARCHIVE_BYTES * (len(archives) - len(sizes))
    needed = missing + TOKEN_BYTES * (missing + sum(sizes))
    free = shutil.disk_usage(out).free
    if needed > free:
        both = f"needs {needed / 1e9:,.1f} GB, but {free / 1e9:,.1f} GB are free"
        raise OSError(f"{out} {both}: give another --out, or fewer --subsets")


def get_archives(source, out, names):
    """Return paths of the archives. If source is a URL, download them to out/archives."""
    folder = Path(source)
    if "://" in source:
        folder = out / "archives"
        folder.mkdir(exist_ok=True)
    archives = [folder / name for name in names]
    check_space(out, archives)
    for archive in archives:
        if "://" in source and not archive.exists():
            download(f"{source.rstrip('/')}/{archive.name}", archive)
    return archives


# --- tokenise -------------------------------------------------------------------------


def list_files(file):
    """List the files in a tar archive, as TarInfo. Raises an error if a header is damaged."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        infos = [info for info in tar if info.isfile()]
        file.seek(tar.offset)  # tarfile stops at the end mark, or at a damaged header
        if file.read(512) != bytes(512):
            raise ValueError(f"truncated, or damaged at byte {tar.offset:,}")
    return infos


def list_parts(archive):
    """List the xz-compressed tars in an archive, as TarInfo."""
    what = f"{archive} is damaged, or not an archive of OpenWebText"
    with files.explain_errors(what, WAY_OUT), open(archive, "rb") as f:
        parts = [info for info in list_files(f) if info.name.endswith("_data.xz")]
        if not parts:
            raise ValueError("it has no *_data.xz files")
    return parts


def tokenize(archive, vocabulary, part):
    """Return training and validation token ids of a part, as bytes, and its number of documents."""
    encoding = make_encoding(vocabulary)
    separator = GPT2_SEPARATOR.to_bytes(2, "little")
    train = []
    val = []
    with files.explain_errors(f"{archive} is damaged in {part.name}", WAY_OUT):
        with open(archive, "rb") as f:
            f.seek(part.offset_data)
            data = lzma.decompress(f.read(part.size))
        infos = list_files(io.BytesIO(data))
        for info in infos:
            document = data[info.offset_data : info.offset_data + info.size]
            text = re.sub("\n\n\n+", "\n\n", files.open_text(document).read()).strip()
            ids = encoding.encode_to_numpy(text, disallowed_special=())
            tokens = separator + ids.astype("<u2").tobytes()
            # The split depends only on the document, not on its place or on --subsets.
            number = int.from_bytes(hashlib.sha256(document).digest()[:8], "big")
            if number % VALIDATION == 0:
                val.append(tokens)
            else:
                train.append(tokens)
    return b"".join(train), b"".join(val), len(infos)


def end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def start_worker():
    """The parent handles Ctrl-C. A killed parent cannot end its workers, so they watch it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


@contextlib.contextmanager
def delay_ctrl_c():
    """Ctrl-C within takes effect at the end: an interrupted pool can keep a lock, and would then
    wait for itself. Processes that start within do not get it, although a terminal sends it to
    them, too."""
    pressed = []
    handler = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    if hasattr(signal, "pthread_sigmask"):  # not on Windows
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # a new process inherits it
    try:
        yield
    finally:
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        signal.signal(signal.SIGINT, handler)
    if pressed:
        raise KeyboardInterrupt


def start_pool(workers):
    context = multiprocessing.get_context("spawn")  # the same on every system
    # This starts a helper process, which unblocks Ctrl-C. So it comes before delay_ctrl_c().
    pool = ProcessPoolExecutor(workers, context, start_worker)
    with delay_ctrl_c():
        for _ in range(workers):
            pool.submit(int)  # starts a process
    return pool


def write_tokens(out, parts, pool):
    """parts: {archive: list of TarInfo}. Returns the number of documents."""
    documents = 0
    size = sum(part.size for archive in parts for part in parts[archive])
    with Bar(desc="tokenise", total=size, unit="B", unit_scale=True) as bar:
        for archive in parts:  # one at a time, because waiting results take memory
            work = functools.partial(tokenize, archive, VOCABULARY)
            with delay_ctrl_c():
                results = pool.map(work, parts[archive])
            for part, (train, val, count) in zip(parts[archive], results, strict=True):
                files.append_to_file(out / "train.bin", train)
                files.append_to_file(out / "val.bin", val)
                documents += count
                bar.set_postfix(documents=f"{documents:,}", refresh=False)
                bar.update(part.size)
    return documents


def prepare(args):
    out = args.out
    make_encoding(VOCABULARY)  # raise an error now if it cannot be fetched
    out.mkdir(parents=True, exist_ok=True)
    files.lock_folder(out)
    check_free(out, args.overwrite)
    names = [f"urlsf_subset{number:02}.tar" for number in args.subsets]
    archives = get_archives(args.source, out, names)
    parts = {archive: list_parts(archive) for archive in archives}
    files.write_file(out / "meta.json", json.dumps(UNFINISHED) + "\n")
    files.remove_temporary_files(out, FILES)
    for name in FILES:
        if name != "meta.json":
            (out / name).unlink(missing_ok=True)
    pool = start_pool(args.workers)
    try:
        documents = write_tokens(out, parts, pool)
    finally:
        pool.shutdown(cancel_futures=True)
    tokens = {}
    for name in ("train.bin", "val.bin"):
        with open(out / name, "rb+") as f:
            os.fsync(f.fileno())
            tokens[name] = f.seek(0, os.SEEK_END) // 2
    write_meta(out, "gpt2", "uint16", GPT2_SIZE, GPT2_SEPARATOR, archives=names)
    counts = f"{tokens['train.bin']:,} training and {tokens['val.bin']:,} validation tokens"
    print(f"{out}: {documents:,} documents, {counts}")
    if args.source == SOURCE and len(names) == ARCHIVES and documents != DOCUMENTS:
        raise ValueError(f"the corpus should have {DOCUMENTS:,} documents: please report this")


# --- command line ---------------------------------------------------------------------


def subsets_argument(text):
    """For argparse: "0,2,5-7" -> [0, 2, 5, 6, 7]"""
    numbers = set()
    for span in text.split(","):
        match = re.fullmatch(r"([0-9]+)(-([0-9]+))?", span)
        if match is None:
            raise argparse.ArgumentTypeError(f"{text} is not a list of numbers, such as 0,1 or 0-4")
        first = int(match[1])
        last = int(match[3] or first)
        if not first <= last < ARCHIVES:
            raise argparse.ArgumentTypeError(f"{span} is not within 0 to {ARCHIVES - 1}")
        numbers.update(range(first, last + 1))
    return sorted(numbers)


def usable_cores():
    """Cores that this process may use: a scheduler or taskset may have left it only some."""
    if hasattr(os, "sched_getaffinity"):  # on Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def parse(argv):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--subsets", type=subsets_argument, default="0-20", help="as in 0,1 or 0-4 (default: all)")
    add(
        "--source",
        type=os.path.expanduser,
        default=SOURCE,
        help="folder or URL of the archives (default: the hub)",
    )
    workers = "processes (default: one for each core that it may use, %(default)s)"
    add("--workers", type=int, default=usable_cores(), help=workers)
    here = Path(__file__).parent
    add("--out", type=folder_argument, default=here, help="folder (default: this one)")
    add("--overwrite", action="store_true", help="replace the dataset in that folder")
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error(f"--workers={args.workers}: must be at least 1")
    return args


def main(argv):
    args = parse(argv)
    try:
        prepare(args)
    except (Exception, KeyboardInterrupt) as error:
        files.fail(error)


if __name__ == "__main__":
    files.ignore_stream_errors()
    main(sys.argv[1:])
