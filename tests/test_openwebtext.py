"""data/openwebtext/prepare.py on a miniature corpus in the nested format: from a folder, and from a server that drops
connections and lies; with kills, and with archives that are damaged."""

import contextlib
import functools
import hashlib
import http.server
import io
import json
import lzma
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from data.dataset import Dataset, describe_vocabulary
from data.openwebtext import prepare
from helpers import ROOT, contents, refusal

NAMES = [f"urlsf_subset{i:02}.tar" for i in range(3)]
BYTES = describe_vocabulary("bytes", r"[\s\S]", [bytes([i]) for i in range(256)], {})
DRIVER = f"""
import sys
from data.openwebtext import prepare
prepare.VOCABULARY = {BYTES!r}
if __name__ == "__main__":
    prepare.main(sys.argv[1:])
"""


def held_out(document):
    """The rule of the split, said once more: the first 64 bits of SHA-256 are a multiple of 2,000."""
    return int(hashlib.sha256(document).hexdigest()[:16], 16) % 2000 == 0


def tar(files):
    """{name: bytes} -> a tar archive"""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def pack(documents, number, per_member=27):
    """Documents -> an archive: a tar of xz-compressed tars of a file a document."""
    members = {"openwebtext/README": b"no document"}
    for first in range(0, len(documents), per_member):
        files = {
            f"{i:07}.txt": d for i, d in enumerate(documents) if first <= i < first + per_member
        }
        members[f"urlsf_subset{number:02}-{first}_data.xz"] = lzma.compress(tar(files))
    return tar(members)


@functools.cache
def corpus():
    """{name: archive} of three archives of 80 documents, two in each for validation; all documents."""
    generator = random.Random(0)
    archives, documents = {}, []
    for number, name in enumerate(NAMES):
        here = [b"", "  über \n\n\n\n\n\U0001f600<|endoftext|>\r\n ".encode()]
        while len(here) < 78:
            here.append(generator.randbytes(700).hex().replace("0", "\n").encode())
        tries = (f"{number} {i}".encode() for i in range(10**6))
        here[5:5] = [next(filter(held_out, tries)), next(filter(held_out, tries))]
        archives[name] = pack(here, number)
        documents += here
    return archives, documents


def as_bytes(documents, split):
    """The file of a split: 50256 before each document, one byte for one token."""
    ids = []
    for document in documents:
        if held_out(document) == (split == "val"):
            ids += [50256, *re.sub(r"\n{3,}", "\n\n", document.decode()).strip().encode()]
    return np.array(ids, dtype="<u2").tobytes()


def assert_result(out, documents=None):
    for split in ("train", "val"):
        assert (out / f"{split}.bin").read_bytes() == as_bytes(documents or corpus()[1], split)
    dataset = Dataset(out)
    assert (dataset.encoding_name, dataset.vocab_size, dataset.separator) == ("gpt2", 50257, 50256)
    assert not list(out.rglob("*.partial")) and not list(out.rglob("*.tmp"))


def assert_not_a_dataset(out):
    with pytest.raises((ValueError, FileNotFoundError)):
        Dataset(out)


@pytest.fixture
def archives(tmp_path):
    folder = tmp_path / "archives"
    folder.mkdir()
    for name, archive in corpus()[0].items():
        (folder / name).write_bytes(archive)
    return folder


@pytest.fixture
def byte_tokens(monkeypatch):
    """GPT-2's vocabulary is not everywhere."""
    monkeypatch.setattr(prepare, "VOCABULARY", BYTES)


def arguments(source, out, subsets="0-2"):
    return [f"--source={source}", f"--out={out}", f"--subsets={subsets}", "--workers=1"]


# --- the same bytes ---------------------------------------------------------------------


def test_the_tokens_are_those_of_an_independent_count(archives, tmp_path, byte_tokens, capsys):
    prepare.main(arguments(archives, tmp_path / "out"))
    assert_result(tmp_path / "out")
    assert "240 documents" in capsys.readouterr().out
    before = contents(tmp_path / "out")
    prepare.main(arguments(archives, tmp_path / "out"))
    assert "already" in capsys.readouterr().out and contents(tmp_path / "out") == before
    prepare.main(arguments(archives, tmp_path / "out", "1"))  # another choice replaces it
    assert_result(tmp_path / "out", corpus()[1][80:160])


def test_gpt2_tokens_are_those_of_tiktoken(archives, tmp_path, gpt2):
    import tiktoken

    prepare.main(arguments(archives, tmp_path / "out", "0"))
    encoding, ids = tiktoken.get_encoding("gpt2"), []
    for document in corpus()[1][:80]:
        if not held_out(document):
            text = re.sub(r"\n{3,}", "\n\n", document.decode()).strip()
            ids += [50256, *encoding.encode_ordinary(text)]
    assert Dataset(tmp_path / "out").tokens("train").tolist() == ids


@pytest.mark.slow
def test_kills_and_ctrl_c_leave_no_half_made_dataset(archives, tmp_path):
    (tmp_path / "driver.py").write_text(DRIVER)
    command = [sys.executable, tmp_path / "driver.py", *arguments(archives, tmp_path / "out")]
    options = dict(cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for number, seconds in ((signal.SIGKILL, 0.5), (signal.SIGINT, 0.8), (signal.SIGKILL, 1.1)):
        process = subprocess.Popen(command, env=environment, **options)
        time.sleep(seconds)
        os.killpg(process.pid, number)
        said = process.communicate(timeout=20)[1]
        assert "Traceback" not in said, said
        if process.returncode == 0:
            assert_result(tmp_path / "out")
        else:
            assert_not_a_dataset(tmp_path / "out")
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_result(tmp_path / "out")


# --- a server ---------------------------------------------------------------------------


class Handler(http.server.BaseHTTPRequestHandler):
    """What goes wrong is in server.trouble."""

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        trouble = self.server.trouble
        body = corpus()[0].get(self.path.rsplit("/", 1)[1])
        if trouble.code is not None or body is None:
            return self.send_error(trouble.code or 404)
        first = int(re.findall(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[0])
        self.server.asked.append(first)
        if not trouble.ranges:
            first = 0
        self.send_response(206 if trouble.ranges else 200)
        self.send_header("Content-Length", str(len(body) - first + trouble.too_long))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # the program looked at the size only
            self.wfile.write(body[first : first + trouble.cut])


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.trouble = SimpleNamespace(code=None, ranges=True, cut=10**9, too_long=0)
        server.asked = []
        server.url = f"http://127.0.0.1:{server.server_port}/subsets"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_that_breaks_off_is_continued_to_the_same_bytes(
    server, tmp_path, byte_tokens, capsys, ranges
):
    server.trouble.cut = 30_000
    server.trouble.ranges = ranges
    for _ in range(9):
        said = refusal(prepare.main, arguments(server.url, tmp_path), capsys)
        assert server.url in said and "the same command continues" in said
        assert_not_a_dataset(tmp_path)
        if not ranges:
            break
        if sum(path.suffix == ".tar" for path in (tmp_path / "archives").iterdir()) == 2:
            break
    assert (max(server.asked) > 0) == ranges
    server.trouble.cut = 10**9
    prepare.main(arguments(server.url, tmp_path))
    assert_result(tmp_path)
    for name, archive in corpus()[0].items():
        assert (tmp_path / "archives" / name).read_bytes() == archive


@pytest.mark.parametrize("trouble", [{"code": 404}, {"code": 503}, {"too_long": 9}])
def test_what_a_server_cannot_give_is_named(server, tmp_path, byte_tokens, capsys, trouble):
    vars(server.trouble).update(trouble)
    said = refusal(prepare.main, arguments(server.url, tmp_path), capsys)
    assert f"{server.url}/{NAMES[0]}" in said and str(trouble.get("code", "")) in said
    assert not (tmp_path / "archives" / NAMES[0]).exists()
    assert_not_a_dataset(tmp_path)


def test_no_server_is_said_at_once(tmp_path, byte_tokens, capsys):
    said = refusal(prepare.main, arguments("http://127.0.0.1:9", tmp_path), capsys)
    assert "http://127.0.0.1:9" in said


# --- what is wrong ----------------------------------------------------------------------


def damaged_member():
    files = {"a.txt": b"text", "b.txt": b"\xff\xfe"}
    return tar({"x-1_data.xz": lzma.compress(tar(files))})


def flipped(archive, place):
    data = bytearray(archive)
    data[place] ^= 0xFF
    return bytes(data)


DAMAGES = {
    "truncated": lambda archive: archive[: len(archive) // 2],
    "without its end": lambda archive: archive.rstrip(b"\0"),
    "a header": lambda archive: flipped(archive, archive.index(b"urlsf_subset01-54")),
    "compressed data": lambda archive: flipped(archive, archive.index(b"\xfd7zXZ") + 3000),
    "a page": lambda archive: b"<!DOCTYPE html><p>Log in to use this network." * 300,
    "empty": lambda archive: b"",
    "no documents": lambda archive: tar({"README": b"nothing"}),
    "not UTF-8": lambda archive: damaged_member(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_archive_is_named_and_makes_no_dataset(
    archives, tmp_path, byte_tokens, capsys, damage
):
    path = archives / NAMES[1]
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    said = refusal(prepare.main, arguments(archives, tmp_path / "out"), capsys)
    assert str(path) in said and "delete the archive, and run again" in said
    assert_not_a_dataset(tmp_path / "out")
    path.write_bytes(corpus()[0][NAMES[1]])
    prepare.main(arguments(archives, tmp_path / "out"))
    assert_result(tmp_path / "out")


def test_a_disk_that_is_too_small_is_foreseen(archives, tmp_path, byte_tokens, capsys, monkeypatch):
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    said = refusal(prepare.main, arguments(archives, tmp_path / "out"), capsys)
    assert str(tmp_path / "out") in said and "are left" in said


@pytest.mark.parametrize(
    "option, words",
    [
        ("--subsets=3-1", "3-1"),
        ("--subsets=0,21", "from 0 to 20"),
        ("--subsets=", "from 0 to 20"),
        ("--workers=0", "--workers=0"),
        ("--out=", "folder"),
        ("--source=/nowhere", "/nowhere"),
    ],
)
def test_an_option_that_makes_no_sense_is_named(tmp_path, byte_tokens, capsys, option, words):
    given = [f"--out={tmp_path}", "--subsets=0", option]
    assert words in refusal(prepare.main, given, capsys)


def test_another_dataset_is_left_alone(archives, tmp_path, byte_tokens, capsys):
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "train.bin").write_bytes(b"\1\0")
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "meta.json").write_text(json.dumps({"encoding": "gpt2"}))
    for name in ("ours", "meta"):
        before = contents(tmp_path / name)
        said = refusal(prepare.main, arguments(archives, tmp_path / name), capsys)
        assert "another --out" in said and contents(tmp_path / name) == before


def test_two_at_once_do_not_write_to_one_folder(archives, tmp_path, byte_tokens, capsys):
    out = tmp_path / "out"
    out.mkdir()
    code = f"from runtime.files import lock_folder; lock_folder({str(out)!r}); print(1, flush=True); input()"
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as other:
        assert other.stdout.readline() == "1\n"
        said = refusal(prepare.main, arguments(archives, out), capsys)
        assert "another process is at work" in said and not list(Path(out).iterdir())
        other.communicate("\n")
