"""data/openwebtext/prepare.py as a user runs it: a miniature corpus in the nested format, served over HTTP by
a server that drops connections, truncates what it sends, and lies; kills at random moments; folders that are
damaged, full, or someone else's."""

import contextlib
import functools
import hashlib
import http.server
import io
import itertools
import json
import lzma
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest

from bench.corpus import pack, tar
from data.dataset import Dataset, describe_vocabulary, make_encoding

ROOT = Path(__file__).resolve().parents[1]
NAMES = [f"urlsf_subset{i:02}.tar" for i in range(3)]

# The program with one byte for one token (GPT-2's vocabulary is not everywhere), and less patience.
DRIVER = """
import json, sys
import data.openwebtext.prepare as prepare
prepare.VOCABULARY, prepare.ATTEMPTS = json.load(open(sys.argv.pop(1))), 4
prepare.main()
"""


def held_out(document):
    """The rule of the split, said once more: the first 64 bits of SHA-256 are a multiple of 2,000."""
    return int(hashlib.sha256(document).hexdigest()[:16], 16) % 2000 == 0


def as_bytes(documents, split):
    """The file of a split, written down independently: 50256 before each document, one byte for one token."""
    ids = []
    for document in documents:
        if held_out(document) == (split == "val"):
            ids += [50256, *re.sub(r"\n{3,}", "\n\n", document.decode()).strip().encode()]
    return np.array(ids, dtype="<u2").tobytes()


@functools.cache
def corpus():
    """{name: archive} of three archives of 80 documents, two in each for validation; all documents."""
    generator, archives, documents = random.Random(0), {}, []
    for number, name in enumerate(NAMES):
        here = [b"", "  über \n\n\n\n\n\U0001f600<|endoftext|>\r\n ".encode()]
        while len(here) < 78:
            here.append(generator.randbytes(700).hex().replace("0", "\n").encode())
        tries = (f"{number} {i}".encode() for i in range(10**6))
        here[5:5] = [next(filter(held_out, tries)), next(filter(held_out, tries))]
        archives[name] = pack(here, number, per_member=9)
        documents += here
    return archives, documents


@pytest.fixture(scope="module")
def whole():
    """What must come out of all three archives."""
    return {split: as_bytes(corpus()[1], split) for split in ("train", "val")}


def assert_result(out, want):
    for split, data in want.items():
        assert (out / f"{split}.bin").read_bytes() == data
    meta = json.loads((out / "meta.json").read_text())
    assert (meta["encoding"], meta["dtype"], meta["vocab_size"]) == ("gpt2", "uint16", 50257)
    assert meta["separator"] == 50256
    assert not list(out.glob("*.partial")) and not list(out.glob("*.tmp"))


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.json"
    path.write_text(
        json.dumps(describe_vocabulary("bytes", r"[\s\S]", [bytes([i]) for i in range(256)], {}))
    )
    return [sys.executable, "-c", DRIVER, str(path)]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "archives").mkdir()
    for name, archive in corpus()[0].items():
        (tmp_path / "archives" / name).write_bytes(archive)
    return tmp_path / "archives"


def run(command, *arguments, **options):
    options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 120} | options
    return subprocess.run([*command, *map(str, arguments)], **options)


def start(command):
    """In a session of its own, to which signals can be sent as a terminal does."""
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )


def assert_refused(done, *words):
    assert done.returncode not in (0, None) and "Traceback" not in done.stderr, done.stderr
    assert all(word in done.stderr for word in words), done.stderr


class Handler(http.server.BaseHTTPRequestHandler):
    """/hub/NAME redirects to /storage/NAME, as the hub does; what goes wrong is in server.trouble."""

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        name, trouble = self.path.rsplit("/", 1)[1], self.server.trouble
        body = corpus()[0].get(name)
        if body is None:
            return self.send_error(404)
        if "/hub/" in self.path:
            self.server.asked.append(name)
            if len(self.server.asked) in trouble.refuse:
                return self.send_error(503)
            self.send_response(302)
            self.send_header("Location", f"/storage/{name}")
            self.send_header("X-Linked-Size", trouble.linked_size or len(body))
            self.send_header(
                "X-Linked-Etag", f'"{trouble.sha256 or hashlib.sha256(body).hexdigest()}"'
            )
            self.send_header("Content-Length", "0")
            return self.end_headers()
        asked_for = re.findall(r"bytes=(\d+)-", self.headers.get("Range", ""))
        begin = int(asked_for[0]) if asked_for and trouble.ranges else 0
        if trouble.page:
            body, begin = b"<!DOCTYPE html><p>Log in to use this network." * 300, 0
        self.send_response(206 if begin else 200)
        if begin:
            size = "*" if begin % 2 else len(body)
            self.send_header("Content-Range", f"Bytes {begin}-{len(body) - 1}/{size}")
        if trouble.length:
            self.send_header("Content-Length", len(body) - begin)
        self.end_headers()
        with contextlib.suppress(
            ConnectionError
        ):  # the program looked at the size only, or was killed
            self.wfile.write(body[begin : begin + next(trouble.cuts, len(body))])


def random_cuts():
    """Every answer ends early, somewhere."""
    generator = random.Random(1)
    return iter(lambda: generator.randrange(40_000), None)


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.trouble = types.SimpleNamespace(
            cuts=iter(()),
            ranges=True,
            length=True,
            page=False,
            refuse=(),
            linked_size=None,
            sha256=None,
        )
        server.asked, server.url = [], f"http://127.0.0.1:{server.server_port}/hub"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


# --- the same bytes, whatever happens ---------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_dropped_connections_and_kills_at_any_moment_change_nothing(
    driver, server, tmp_path, whole, workers
):
    server.trouble.cuts = random_cuts()
    generator, kills, finished = random.Random(workers), 0, []
    for seconds in [generator.uniform(0, 0.7) for _ in range(5)] + [60]:
        server.asked.clear()
        command = [*driver, f"--source={server.url}", "--subsets=0-2"]
        process = start([*command, f"--workers={workers}", f"--out={tmp_path}"])
        while (
            len(server.asked) <= 3 - len(finished) and process.poll() is None
        ):  # it looks at the sizes
            time.sleep(0.01)
        try:
            _, errors = process.communicate(timeout=seconds)
            break
        except subprocess.TimeoutExpired:
            process.kill()
            kills += 1
        process.communicate()
        end = time.monotonic() + 20
        with pytest.raises(
            ProcessLookupError
        ):  # its workers end, too: nobody of the process group is left
            while time.monotonic() < end:
                os.killpg(process.pid, 0)
                time.sleep(0.05)
        for split, data in whole.items():  # what has the name of a finished file is one
            file = tmp_path / f"{split}.bin"
            assert not file.exists() or file.read_bytes() == data
        assert not any(
            name in server.asked for name in finished
        )  # what is done is not even asked for
        progress = tmp_path / "progress.json"
        finished = list(json.loads(progress.read_text())) if progress.exists() else []
    assert process.returncode == 0, errors
    assert kills >= 2
    assert_result(tmp_path, whole)


def test_a_killed_finish_is_finished_by_the_next_call(driver, folder, tmp_path, whole):
    """All archives done, one of two files renamed: the narrowest moment."""
    out = tmp_path / "out"
    arguments = (f"--source={folder}", "--subsets=0-2", f"--out={out}")
    assert run(driver, *arguments).returncode == 0
    for renamed in (["train.bin"], ["train.bin", "val.bin"], []):
        (out / "meta.json").unlink()
        for split in {"train.bin", "val.bin"} - set(renamed):
            os.replace(out / split, out / f"{split}.partial")
        assert run(driver, *arguments).returncode == 0
        assert_result(out, whole)


def test_ctrl_c_stops_and_the_next_call_goes_on(driver, server, tmp_path, whole):
    server.trouble.cuts = random_cuts()
    arguments = (f"--source={server.url}", "--subsets=0-2", f"--out={tmp_path}")
    process = start([*driver, *arguments])
    while not (tmp_path / "progress.json").exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to parent and workers
    errors = process.communicate(timeout=60)[1]
    assert (
        process.returncode == 130
        and "Traceback" not in errors
        and "the same command continues" in errors
    )
    assert run(driver, *arguments).returncode == 0
    assert_result(tmp_path, whole)


def test_an_early_ctrl_c_is_quiet(driver, folder, tmp_path):
    for seconds in (0, 0.1, 0.2, 0.3):  # while workers start
        out = tmp_path / str(seconds)
        process = start(
            [*driver, f"--source={folder}", "--subsets=0-2", "--workers=4", f"--out={out}"]
        )
        while not out.exists():
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGINT)
        errors = process.communicate(timeout=60)[1]
        assert process.returncode in (0, 130) and "Traceback" not in errors, errors


def test_what_is_kept_is_what_was_sent_and_a_source(driver, server, tmp_path, whole):
    server.trouble.cuts = random_cuts()
    kept, out = tmp_path / "kept", tmp_path / "out"
    done = run(driver, f"--source={server.url}", "--subsets=0-2", f"--keep={kept}", f"--out={out}")
    assert done.returncode == 0 and f"{len(corpus()[1])} documents" in done.stdout, done.stderr
    assert_result(out, whole)
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == corpus()[0]
    done = run(
        driver, f"--source={kept}", "--subsets=0-2", "--workers=3", f"--out={tmp_path / 'again'}"
    )
    assert done.returncode == 0
    assert_result(tmp_path / "again", whole)


def test_a_server_that_begins_anew_is_read_on_where_it_broke(driver, server, tmp_path, whole):
    server.trouble.ranges = False
    server.trouble.cuts = iter([0, 0, 0, 9_000, 4_000, 40_000])  # the first three: sizes
    done = run(driver, f"--source={server.url}", "--subsets=0-2", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert_result(tmp_path, whole)


def test_one_archive_can_be_followed_by_more(driver, folder, tmp_path, whole):
    out = tmp_path / "out"
    assert run(driver, f"--source={folder}", "--subsets=0", f"--out={out}").returncode == 0
    assert_result(out, {split: as_bytes(corpus()[1][:80], split) for split in ("train", "val")})
    done = run(driver, f"--source={folder}", "--subsets=1,2", f"--out={out}")
    assert_refused(
        done, "begins with urlsf_subset00.tar", "--subsets must name these, too", "--out"
    )
    assert_result(out, {split: as_bytes(corpus()[1][:80], split) for split in ("train", "val")})
    (folder / NAMES[0]).unlink()  # it is not needed again
    damaged = (folder / NAMES[2]).read_bytes()[:-30_000]
    (folder / NAMES[2]).write_bytes(damaged)
    assert_refused(run(driver, f"--source={folder}", "--subsets=0-2", f"--out={out}"), NAMES[2])
    done = run(
        driver, f"--source={folder}", "--subsets=0-1", f"--out={out}"
    )  # gives back what there was
    assert done.returncode == 0, done.stderr
    assert_result(out, {split: as_bytes(corpus()[1][:160], split) for split in ("train", "val")})
    (folder / NAMES[2]).write_bytes(corpus()[0][NAMES[2]])
    done = run(driver, f"--source={folder}", "--subsets=2,0-1", f"--out={out}")
    assert done.returncode == 0, done.stderr
    assert_result(out, whole)
    shutil.rmtree(folder)
    done = run(
        driver, f"--source={folder}", "--subsets=0-2", f"--out={out}"
    )  # there is nothing left to do
    assert done.returncode == 0, done.stderr
    assert_result(out, whole)


def test_gpt2_tokens_are_those_of_tiktoken(folder, tmp_path, gpt2):
    command = [sys.executable, "data/openwebtext/prepare.py"]
    done = run(command, f"--source={folder}", "--subsets=0,1", f"--out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    dataset = Dataset(tmp_path / "out")
    for split in ("train", "val"):
        want = []
        for document in corpus()[1][:160]:
            if held_out(document) == (split == "val"):
                text = re.sub(r"\n{3,}", "\n\n", document.decode()).strip()
                want += [50256, *make_encoding("gpt2").encode_ordinary(text)]
        assert dataset.tokens(split).tolist() == want


# --- what cannot be taken for data ------------------------------------------------------------------------


def members(archive):
    """{name: content} of an archive, by the tarfile module."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as file:
        return {name: file.extractfile(name).read() for name in file.getnames()}


def with_member(number, content):
    parts = members(corpus()[0][NAMES[1]])
    return tar(parts | {list(parts)[number]: content(parts[list(parts)[number]])})


def end_of_first_member(archive):
    return 512 + -(-len(next(iter(members(archive).values()))) // 512) * 512


def damage_second_header(archive):
    begin = end_of_first_member(archive)
    return archive[:begin] + b"?" + archive[begin + 1 :]


FLIP = 2_000  # a byte in the middle of a compressed member


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda a: a[:30_000], ["incomplete", "truncated file (30,000 of 30,000 bytes read)"]),
        (lambda a: a[:30_720], ["incomplete", "truncated file (30,720 of 30,720 bytes read)"]),
        (lambda a: a[:700], ["incomplete", "truncated file (700 of 700 bytes read)"]),
        (lambda a: a[:200], ["incomplete", "truncated header (200 of 200 bytes read)"]),
        (lambda a: a[: end_of_first_member(a)], ["incomplete", "empty header ("]),
        (lambda a: b"", ["incomplete", "empty header (0 of 0 bytes read)"]),
        (
            lambda a: b"<html>" + bytes(600),
            ["not an archive of OpenWebText: bad checksum (512 of 606"],
        ),
        (lambda a: a[:100] + b"9" + a[101:], ["damaged", "bad checksum (512 of"]),
        (damage_second_header, ["damaged", "bad checksum ("]),
        (lambda a: a[:FLIP] + bytes([a[FLIP] ^ 1]) + a[FLIP + 1 :], ["urlsf_subset01-1_data.xz"]),
        (lambda a: with_member(3, lambda xz: xz[:-20]), ["urlsf_subset01-4_data.xz"]),
        (
            lambda a: with_member(2, lambda xz: lzma.compress(tar({"bad": b"\xff"}))),
            ["bad is not UTF-8"],
        ),
        (
            lambda a: with_member(8, lambda xz: lzma.compress(b"no tar" * 100)),
            ["urlsf_subset01-9_data.xz"],
        ),
        (lambda a: tar({"readme.txt": b"hello"}), ["no documents"]),
        (lambda a: tar({"a" * 120 + "_data.xz": b"hello"}), ["a long name"]),
    ],
)
def test_a_damaged_archive_is_named_and_nothing_of_it_is_kept(
    driver, folder, tmp_path, whole, damage, words
):
    good, out = corpus()[0][NAMES[1]], tmp_path / "out"
    (folder / NAMES[1]).write_bytes(damage(good))
    done = run(driver, f"--source={folder}", "--subsets=0-2", f"--out={out}")
    assert_refused(done, NAMES[1], *words)
    assert not (out / "train.bin").exists() and not (out / "meta.json").exists()
    assert list(json.loads((out / "progress.json").read_text())) == NAMES[:1]
    with pytest.raises(FileNotFoundError):
        Dataset(out)
    (folder / NAMES[1]).write_bytes(good)
    assert run(driver, f"--source={folder}", "--subsets=0-2", f"--out={out}").returncode == 0
    assert_result(out, whole)


@pytest.mark.parametrize(
    "trouble, words",
    [
        ({"page": True}, ["urlsf_subset00.tar: it should have one size"]),
        ({"linked_size": 5}, ["urlsf_subset00.tar: it should have one size"]),
        ({"sha256": "0" * 64}, ["urlsf_subset00.tar is incomplete, damaged,", "its SHA-256 is"]),
        ({"refuse": [1]}, ["urlsf_subset00.tar", "503"]),
    ],
)
def test_what_a_server_says_must_be_true(driver, server, tmp_path, whole, trouble, words):
    kept, out = tmp_path / "kept", tmp_path / "out"
    vars(server.trouble).update(trouble)
    arguments = (f"--source={server.url}", "--subsets=0-2", f"--keep={kept}", f"--out={out}")
    assert_refused(run(driver, *arguments), *words)
    assert not (out / "train.bin").exists() and not list(kept.iterdir())
    vars(server.trouble).update(page=False, length=True, linked_size=None, sha256=None)
    assert run(driver, *arguments).returncode == 0
    assert_result(out, whole)


def test_a_server_without_checksums_will_do(driver, server, tmp_path, whole):
    url = server.url.replace("/hub", "/storage")
    assert run(driver, f"--source={url}", "--subsets=0-2", f"--out={tmp_path}").returncode == 0
    assert_result(tmp_path, whole)
    server.trouble.page = True  # a page instead of data, and nothing to compare its size with
    done = run(driver, f"--source={url}", "--subsets=0", f"--out={tmp_path / 'page'}")
    assert_refused(
        done, "urlsf_subset00.tar is incomplete, damaged, or not an archive", "invalid header"
    )
    server.trouble.length = False
    done = run(driver, f"--source={url}", "--subsets=0", f"--out={tmp_path / 'page'}")
    assert_refused(done, "urlsf_subset00.tar: it should have one size, not none")


def test_a_busy_server_is_asked_again_and_then_given_up(driver, server, tmp_path, whole):
    server.trouble.cuts = itertools.repeat(
        50_000
    )  # two requests an archive, after three for the sizes
    arguments = (
        f"--source={server.url}",
        "--subsets=0-2",
        f"--keep={tmp_path}",
        f"--out={tmp_path}",
    )
    server.trouble.refuse = range(5, 100)
    done = run(driver, *arguments)
    assert_refused(done, "attempt 3 of 4", "at byte 50,000")
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"prepare.py: {server.url}/urlsf_subset00.tar: ") and "503" in last
    server.asked.clear()
    server.trouble.refuse = (5, 6, 8, 9)  # in the middle of an archive, and at the beginning of one
    assert run(driver, *arguments).returncode == 0
    assert len(server.asked) == 3 + 3 * 2 + 4
    assert_result(tmp_path, whole)


def test_a_file_that_changes_during_its_download_is_refused(driver, server, tmp_path):
    def cuts():
        yield 0  # its size
        server.trouble.linked_size = 5
        yield 20_000

    server.trouble.cuts = cuts()
    done = run(driver, f"--source={server.url}", "--subsets=0", f"--out={tmp_path}")
    assert_refused(done, "urlsf_subset00.tar: it should have one size, not [5, ")


def test_no_server_and_no_such_file_are_said_at_once(driver, server, tmp_path):
    began = time.monotonic()
    done = run(driver, f"--source={server.url}", "--subsets=1-3", f"--out={tmp_path}")
    assert_refused(done, "urlsf_subset03.tar", "404")
    done = run(driver, "--source=http://127.0.0.1:9/x", "--subsets=0", f"--out={tmp_path}")
    assert_refused(done, "127.0.0.1:9/x/urlsf_subset00.tar", "refused")
    done = run(driver, f"--source={tmp_path}/no", "--subsets=0", f"--out={tmp_path}")
    assert_refused(done, "No such file", "urlsf_subset00.tar")
    assert time.monotonic() - began < 30
    assert not list(tmp_path.glob("*.bin*"))


def test_a_full_disk_is_foreseen_and_one_that_fills_up_loses_nothing(
    driver, server, folder, tmp_path, whole
):
    server.trouble.linked_size, server.trouble.length = 10**16, False
    out = tmp_path / "out"
    done = run(driver, f"--source={server.url}", "--subsets=0", f"--out={out}")
    assert_refused(done, "needs 15,000,000.0 GB", "left")
    assert not list(out.glob("*.bin*"))
    limit = 2 * len(whole["train"]) // 5 * 2  # room for two archives, not for three

    def little_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = run(
        driver, f"--source={folder}", "--subsets=0-2", f"--out={out}", preexec_fn=little_room
    )
    assert_refused(done, "File too large", str(out))
    assert list(json.loads((out / "progress.json").read_text())) == NAMES[:2]
    assert not (out / "train.bin").exists()
    assert run(driver, f"--source={folder}", "--subsets=0-2", f"--out={out}").returncode == 0
    assert_result(out, whole)


def test_a_vocabulary_that_cannot_be_fetched_is_said_before_anything_else(folder, tmp_path):
    proxies = ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")
    nowhere = {name: "http://127.0.0.1:9" for name in proxies}
    environment = os.environ | nowhere | {"NO_PROXY": "", "no_proxy": ""}
    environment["TIKTOKEN_CACHE_DIR"] = str(tmp_path / "empty")
    command = [sys.executable, "data/openwebtext/prepare.py"]
    done = run(
        command, f"--source={folder}", "--subsets=0", f"--out={tmp_path / 'out'}", env=environment
    )
    assert_refused(done, "GPT-2's vocabulary could not be fetched", "TIKTOKEN_CACHE_DIR")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "option, words",
    [
        ("--subsets=21", ["--subsets", "0 to 20"]),
        ("--subsets=0,-1", ["--subsets"]),
        ("--subsets=", ["--subsets"]),
        ("--subsets=3-1", ["--subsets", "0 to 20"]),
        ("--subsets=0,3-1", ["--subsets", "0 to 20"]),
        ("--subsets=1-", ["--subsets", "0 to 20"]),
        ("--subsets=0-99999999999", ["--subsets", "0 to 20"]),
        ("--subsets=all", ["--subsets", "0 to 20"]),
        ("--workers=0", ["--workers=0"]),
        ("--keep=kept", ["--keep", "--source"]),
    ],
)
def test_an_option_that_makes_no_sense_is_named(driver, folder, tmp_path, option, words):
    done = run(driver, f"--source={folder}", option, f"--out={tmp_path / 'out'}")
    assert_refused(done, *words)
    assert done.returncode == 2 and not (tmp_path / "out").exists()


def test_a_folder_that_is_not_ours_is_left_alone(driver, folder, tmp_path):
    arguments = (f"--source={folder}", "--subsets=0", f"--out={tmp_path}")
    (tmp_path / "train.bin").write_bytes(b"precious")
    (tmp_path / "mine.tmp").write_text("not ours to delete")
    assert_refused(run(driver, *arguments), "has not made", "--out")
    assert (tmp_path / "train.bin").read_bytes() == b"precious"
    (tmp_path / "train.bin").unlink()
    for name in ("meta.json", "vocab.json", "recall.jsonl"):
        (tmp_path / name).write_text("{}")
        assert_refused(run(driver, *arguments), "has not made", "--out")
        assert (tmp_path / name).read_text() == "{}"
        (tmp_path / name).unlink()
    for text in ("{", "[]", '{"urlsf_subset00.tar": {"bytes": "many"}}'):
        (tmp_path / "progress.json").write_text(text)
        assert_refused(run(driver, *arguments), "progress.json is damaged", "delete")
    (tmp_path / "progress.json").unlink()
    assert run(driver, *arguments).returncode == 0
    val = (tmp_path / "val.bin").read_bytes()
    for contents in (b"", val + b"00", None):  # not what progress.json says
        (tmp_path / "val.bin").unlink()
        if contents is not None:
            (tmp_path / "val.bin").write_bytes(contents)
        for subsets in ("0", "0,1"):
            done = run(driver, f"--source={folder}", f"--subsets={subsets}", f"--out={tmp_path}")
            assert_refused(done, "val.bin", "to start over, delete progress.json and all files")
    (tmp_path / "val.bin").write_bytes(val)
    (tmp_path / "meta.json").write_text('{"encoding": "gpt2"}')  # written over by another program
    assert_refused(run(driver, *arguments), "has not made", "--out")
    assert (tmp_path / "val.bin").read_bytes() == val
    assert (tmp_path / "mine.tmp").read_text() == "not ours to delete"


def test_two_at_once_do_not_write_to_one_folder(driver, server, folder, tmp_path, whole):
    server.trouble.cuts = random_cuts()
    command = [*driver, f"--source={server.url}", "--subsets=0-2", f"--out={tmp_path}"]
    first = start(command)
    while not (tmp_path / "train.bin.partial").exists():
        assert first.poll() is None
        time.sleep(0.01)
    done = run(driver, f"--source={folder}", "--subsets=0-2", f"--out={tmp_path}")
    assert_refused(done, "another process is at work")
    assert first.wait(60) == 0
    first.communicate()
    assert_result(tmp_path, whole)
