"""data/openwebtext/prepare.py on a miniature corpus in the nested format, served over HTTP by a server that breaks
connections, states wrong checksums and sends pages; archives that are damaged; kills."""

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
import resource
import shutil
import signal
import sys
import tarfile
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest

from data.dataset import Dataset, describe_vocabulary, make_encoding
from data.openwebtext import prepare
from helpers import assert_refused, children, refusal, run, start, wait_until

NAMES = [f"urlsf_subset{i:02}.tar" for i in range(3)]
# One byte is one token: GPT-2's vocabulary is not everywhere.
BYTES = describe_vocabulary("bytes", r"[\s\S]", [bytes([i]) for i in range(256)], {})
PROGRAM = f"""
import sys
import data.openwebtext.prepare as prepare
if __name__ == "__main__":
    prepare.VOCABULARY = {BYTES!r}
    prepare.WAITS = [0, 0.5, 0.5]
    prepare.main(sys.argv[1:])
"""


def is_for_validation(document):
    """The rule of the split, said once more: the first 64 bits of SHA-256 are a multiple of 2,000."""
    return int(hashlib.sha256(document).hexdigest()[:16], 16) % 2000 == 0


def expected(documents, split, encode=str.encode):
    """The token ids of a split, written down independently: 50256 before each document."""
    ids = []
    for document in documents:
        if is_for_validation(document) == (split == "val"):
            ids += [50256, *encode(re.sub(r"\n{3,}", "\n\n", document.decode()).strip())]
    return np.array(ids, dtype="<u2").tobytes()


def tar(files):
    """{name: bytes} -> a tar archive, as bytes"""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def pack(documents, number, repeats=1):
    """Documents (bytes) -> urlsf_subset{number}.tar: a tar of xz-compressed tars of one file a document."""
    parts = []
    for first in range(0, len(documents), 9):
        files = {
            f"{first + i:07}.txt": document
            for i, document in enumerate(documents[first : first + 9])
        }
        parts.append(lzma.compress(tar(files)))
    name = f"openwebtext/urlsf_subset{number:02}"
    return tar({f"{name}-{i}_data.xz": part for i, part in enumerate(parts * repeats, 1)})


@functools.cache
def corpus():
    """{name: archive} of three archives of 80 documents, two in each for validation; all documents."""
    generator = random.Random(0)
    archives = {}
    documents = []
    for number, name in enumerate(NAMES):
        here = [b"", "  über \n\n\n\n\n\U0001f600<|endoftext|>\r\n ".encode()]
        while len(here) < 78:
            here.append(generator.randbytes(700).hex().replace("0", "\n").encode())
        tries = (f"{number} {i}".encode() for i in range(10**6))
        here[5:5] = [next(filter(is_for_validation, tries)), next(filter(is_for_validation, tries))]
        archives[name] = pack(here, number)
        documents += here
    return archives, documents


def assert_result(out, documents=None):
    for split in ("train", "val"):
        assert (out / f"{split}.bin").read_bytes() == expected(documents or corpus()[1], split)
    meta = json.loads((out / "meta.json").read_text())
    assert (meta["encoding"], meta["dtype"], meta["vocab_size"]) == ("gpt2", "uint16", 50257)
    assert meta["separator"] == 50256 and not list(out.glob("*.tmp"))


def assert_no_dataset(out):
    with pytest.raises((FileNotFoundError, ValueError)):
        Dataset(out)


@pytest.fixture
def short_waits(monkeypatch):
    monkeypatch.setattr(prepare, "WAITS", [0] * 4)


@pytest.fixture
def quick(monkeypatch, short_waits):
    monkeypatch.setattr(prepare, "VOCABULARY", BYTES)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "archives").mkdir()
    for name, archive in corpus()[0].items():
        (tmp_path / "archives" / name).write_bytes(archive)
    return tmp_path / "archives"


class Handler(http.server.BaseHTTPRequestHandler):
    """/hub/NAME redirects to /storage/NAME, as the hub does; server.trouble says what goes wrong."""

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        trouble = self.server.trouble
        name = self.path.rsplit("/", 1)[1]
        body = self.server.archives.get(name)
        if body is None:
            self.send_error(404)
        elif "/hub/" in self.path:
            self.server.asked.append(name)
            if len(self.server.asked) in trouble.busy:
                return self.send_error(503)
            self.send_response(302)
            self.send_header("Location", f"/storage/{name}")
            self.send_header(
                "X-Linked-Etag", f'"{trouble.sha256 or hashlib.sha256(body).hexdigest()}"'
            )
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self.send_body(trouble, trouble.page or body)

    def send_body(self, trouble, body):
        asked_for = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1])
        if asked_for >= len(body):
            return self.send_error(416)
        begin = asked_for if trouble.ranges else 0
        self.server.begins.append(begin)
        self.send_response(206 if trouble.ranges else 200)
        if trouble.length:
            self.send_header("Content-Length", len(body) - begin)
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # the program was killed
            self.wfile.write(body[begin : begin + next(trouble.cuts, len(body))])


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.trouble = types.SimpleNamespace(
            cuts=iter(()), ranges=True, length=True, page=None, busy=(), sha256=None
        )
        server.archives = corpus()[0]
        server.asked = []  # names
        server.begins = []  # bytes at which answers have begun
        server.url = f"http://127.0.0.1:{server.server_port}/hub"
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()


# --- tokens ---------------------------------------------------------------------------


def test_downloaded_archives_become_the_tokens_of_an_independent_computation(
    quick, server, tmp_path, capsys
):
    server.trouble.cuts = iter([9_000, 4_000, 40_000])
    command = [f"--source={server.url}", "--workers=2", f"--out={tmp_path}"]
    prepare.main([*command, "--subsets=0"])
    assert_result(tmp_path, corpus()[1][:80])
    server.asked.clear()
    assert "holds a dataset already" in refusal(prepare.main, [*command, "--subsets=0-2"], capsys)
    prepare.main([*command, "--subsets=2,0-1", "--overwrite"])
    assert_result(tmp_path)
    assert set(server.asked) == set(NAMES[1:])  # an archive that is there is not downloaded again
    assert f"{len(corpus()[1])} documents" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in (tmp_path / "archives").iterdir()} == corpus()[
        0
    ]


def test_gpt2_tokens_are_those_of_tiktoken(folder, tmp_path, gpt2):
    prepare.main([f"--source={folder}", "--subsets=1", "--workers=1", f"--out={tmp_path}"])
    for split in ("train", "val"):
        want = expected(corpus()[1][80:160], split, make_encoding("gpt2").encode_ordinary)
        assert Dataset(tmp_path).tokens(split).tobytes() == want


# --- downloads ------------------------------------------------------------------------


def test_a_broken_download_continues_where_it_broke(short_waits, server, tmp_path):
    server.trouble.cuts = iter([9_000, 0, 4_000])
    prepare.download(f"{server.url}/{NAMES[0]}", tmp_path / NAMES[0])
    assert server.begins == [0, 9_000, 9_000, 13_000]
    assert (tmp_path / NAMES[0]).read_bytes() == corpus()[0][NAMES[0]]


def test_a_server_that_cannot_continue_begins_anew(short_waits, server, tmp_path):
    server.trouble.ranges = False
    server.trouble.cuts = iter([9_000, 40_000])
    prepare.download(f"{server.url}/{NAMES[0]}", tmp_path / NAMES[0])
    assert server.begins == [0, 0, 0]
    assert (tmp_path / NAMES[0]).read_bytes() == corpus()[0][NAMES[0]]


def test_a_whole_part_whose_process_was_killed_does_not_stop_the_next_call(
    short_waits, server, tmp_path
):
    (tmp_path / f"{NAMES[0]}.partial").write_bytes(corpus()[0][NAMES[0]])
    prepare.download(f"{server.url}/{NAMES[0]}", tmp_path / NAMES[0])
    assert [path.name for path in tmp_path.iterdir()] == [NAMES[0]]


def test_a_busy_server_is_asked_again_and_then_given_up(short_waits, server, tmp_path, capsys):
    server.trouble.busy = range(2, 5)
    server.trouble.cuts = iter([9_000])
    with pytest.raises(
        OSError, match=f"{NAMES[0]}: 4 attempts have failed; run this again to continue"
    ):
        prepare.download(f"{server.url}/{NAMES[0]}", tmp_path / NAMES[0])
    assert "503" in capsys.readouterr().err
    prepare.download(f"{server.url}/{NAMES[0]}", tmp_path / NAMES[0])
    assert server.begins == [0, 9_000]
    assert (tmp_path / NAMES[0]).read_bytes() == corpus()[0][NAMES[0]]


@pytest.mark.parametrize(
    "trouble, words",
    [
        ({"sha256": "0" * 64}, "its SHA-256 is [0-9a-f]{64}, and should be 000"),
        ({"length": False}, "does not state the size"),
        ({"page": b"<!DOCTYPE html><p>Log in to use this network."}, "SHA-256"),
    ],
)
def test_a_download_that_is_not_as_stated_is_refused(short_waits, server, tmp_path, trouble, words):
    vars(server.trouble).update(trouble)
    with pytest.raises(ValueError, match=f"{server.url}/{NAMES[0]}.*{words}"):
        prepare.download(f"{server.url}/{NAMES[0]}", tmp_path / NAMES[0])
    assert not list(tmp_path.iterdir())


def test_a_server_without_checksums_will_do_but_must_send_archives(short_waits, server, tmp_path):
    url = server.url.replace("/hub", "/storage")
    prepare.download(f"{url}/{NAMES[0]}", tmp_path / NAMES[0])
    assert (tmp_path / NAMES[0]).read_bytes() == corpus()[0][NAMES[0]]
    server.trouble.page = b"<!DOCTYPE html><p>Log in to use this network." * 300
    with pytest.raises(ValueError, match=f"{NAMES[1]} is not a tar archive; run this again"):
        prepare.download(f"{url}/{NAMES[1]}", tmp_path / NAMES[1])
    assert [path.name for path in tmp_path.iterdir()] == [NAMES[0]]


def test_no_server_and_no_such_file_are_named(quick, server, tmp_path, capsys):
    said = refusal(
        prepare.main, [f"--source={server.url}", "--subsets=3", f"--out={tmp_path}"], capsys
    )
    assert f"{server.url}/urlsf_subset03.tar: HTTP Error 404" in said
    said = refusal(
        prepare.main, ["--source=http://127.0.0.1:9/x", "--subsets=0", f"--out={tmp_path}"], capsys
    )
    assert "127.0.0.1:9/x/urlsf_subset00.tar" in said and "refused" in said
    said = refusal(
        prepare.main, [f"--source={tmp_path}/no", "--subsets=0", f"--out={tmp_path}"], capsys
    )
    assert "No such file" in said and f"{tmp_path}/no/urlsf_subset00.tar" in said
    assert not list(tmp_path.glob("*.bin"))


# --- damage ---------------------------------------------------------------------------


def members(archive):
    """{name: content} of an archive."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as file:
        return {name: file.extractfile(name).read() for name in file.getnames()}


def with_member(number, change):
    parts = members(corpus()[0][NAMES[1]])
    name = list(parts)[number]
    return tar(parts | {name: change(parts[name])})


def end_of_first_member(archive):
    return 512 + -(-len(next(iter(members(archive).values()))) // 512) * 512


def flip(archive, position):
    return archive[:position] + bytes([archive[position] ^ 1]) + archive[position + 1 :]


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda a: a[:30_000], "unexpected end of data"),
        (lambda a: a[:700], "unexpected end of data"),
        (lambda a: a[:200], "truncated header"),
        (lambda a: a[: end_of_first_member(a)], "truncated, or damaged at byte"),
        (lambda a: a[: end_of_first_member(a) + 200], "truncated, or damaged at byte"),
        (lambda a: b"", "empty"),
        (lambda a: b"<html>" + bytes(600), "not an archive of OpenWebText"),
        (lambda a: flip(a, 100), "bad checksum"),
        (lambda a: flip(a, end_of_first_member(a) + 100), "truncated, or damaged at byte"),
        (lambda a: flip(a, 2_000), "openwebtext/urlsf_subset01-1_data.xz"),
        (lambda a: with_member(3, lambda xz: xz[:-20]), "urlsf_subset01-4_data.xz"),
        (lambda a: with_member(2, lambda xz: lzma.compress(tar({"bad": b"\xff"}))), "-3_data.xz .*utf-8"),
        (lambda a: with_member(8, lambda xz: lzma.compress(b"no tar" * 100)), "urlsf_subset01-9_data.xz"),
        (lambda a: tar({"readme.txt": b"hello"}), "it has no .*_data.xz"),
    ],
)  # fmt: skip
def test_a_damaged_archive_is_named_with_the_way_out(folder, damage, words):
    archive = folder / NAMES[1]
    archive.write_bytes(damage(corpus()[0][NAMES[1]]))
    with pytest.raises(
        ValueError, match=f"{archive} is damaged.*{words}.*; delete it, and run this again"
    ):
        for part in prepare.list_parts(archive):
            prepare.tokenize(archive, BYTES, part)


def test_each_truncation_of_an_archive_is_noticed(tmp_path):
    whole = tar({f"{i}_data.xz": bytes(300 + i) for i in range(3)})
    end_mark = whole.rindex(b"ustar") - 257 + 1024  # after the last header and its content
    for size in range(0, end_mark + 512, 64):
        (tmp_path / "a.tar").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"a\.tar is damaged"):
            prepare.list_parts(tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(whole[: end_mark + 512])
    assert len(prepare.list_parts(tmp_path / "a.tar")) == 3


def test_damage_leaves_no_dataset_and_the_mended_archive_gives_the_whole(
    quick, folder, tmp_path, capsys
):
    out = tmp_path / "out"
    command = [f"--source={folder}", "--subsets=0-2", "--workers=1", f"--out={out}"]
    good = corpus()[0][NAMES[2]]
    (folder / NAMES[2]).write_bytes(good[:-30_000])
    assert str(folder / NAMES[2]) in refusal(prepare.main, command, capsys)
    assert not list(out.iterdir())  # noticed before tokenising
    (folder / NAMES[2]).write_bytes(flip(good, 2_000))
    said = refusal(prepare.main, command, capsys)
    assert f"{folder / NAMES[2]} is damaged in openwebtext/urlsf_subset02-1_data.xz" in said
    assert_no_dataset(out)
    (folder / NAMES[2]).write_bytes(good)
    prepare.main(command)
    assert_result(out)


# --- the folder and the options -------------------------------------------------------


def test_a_dataset_is_not_replaced_unless_asked(quick, folder, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    command = [f"--source={folder}", "--subsets=0-2", "--workers=1", f"--out={out}"]
    for name in ("train.bin", "vocab.json", "recall.jsonl"):
        (out / name).write_text("precious")
        assert f"holds a dataset already ({name}" in refusal(prepare.main, command, capsys)
        assert (out / name).read_text() == "precious"
        os.replace(out / name, out / f"old-{name}")
    for name in ("train.bin", "vocab.json", "recall.jsonl"):
        os.replace(out / f"old-{name}", out / name)
    (out / "mine.tmp").write_text("not ours to delete")
    prepare.main([*command, "--overwrite"])
    (out / "mine.tmp").unlink()
    assert_result(out)
    assert {path.name for path in out.iterdir()} == {"train.bin", "val.bin", "meta.json"}


def test_a_full_disk_is_foreseen(quick, server, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prepare, "ARCHIVE_BYTES", 1e16)
    command = [f"--source={server.url}", "--subsets=0,1", f"--out={tmp_path}"]
    said = refusal(prepare.main, command, capsys)
    assert "needs 50,000,000.0 GB" in said and "--subsets" in said
    assert not server.asked
    (tmp_path / "archives" / NAMES[0]).write_bytes(corpus()[0][NAMES[0]])
    assert "needs 25,000,000.0 GB" in refusal(prepare.main, command, capsys)


@pytest.mark.parametrize(
    "option",
    "--subsets=21 --subsets=0,-1 --subsets= --subsets=3-1 --subsets=0,3-1 --subsets=1- --subsets=0-99999999999 "
    "--subsets=all --workers=0 --out=".split(),
)
def test_an_option_that_makes_no_sense_is_named(tmp_path, option, capsys):
    with pytest.raises(SystemExit) as ended:
        prepare.main([f"--out={tmp_path / 'out'}", option])
    assert (
        ended.value.code == 2 and option.split("=")[0] in capsys.readouterr().err.splitlines()[-1]
    )
    assert not (tmp_path / "out").exists()


def test_subsets_are_numbers_and_spans():
    assert prepare.subsets_argument("0-20") == list(range(21))
    assert prepare.subsets_argument("7,0-2,1-3") == [0, 1, 2, 3, 7]


# --- processes ------------------------------------------------------------------------


def start_program(*arguments):
    """In a session of its own: signals can be sent to all its processes, as a terminal does."""
    return start(sys.executable, "-c", PROGRAM, *arguments, start_new_session=True)


def running_in_group(group):
    """Processes of a group that have not ended. (Nobody may have waited for those that have.)"""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, its_group, *_ = path.read_text().rpartition(") ")[2].split()
            if int(its_group) == group and state not in "ZX":
                found.append(path)
    return found


def assert_group_ends(group):
    end = time.monotonic() + 20
    while running_in_group(group):
        if time.monotonic() > end:
            os.killpg(group, signal.SIGKILL)
            pytest.fail("the workers of a killed program go on")
        time.sleep(0.02)


def is_larger(path, size):
    return path.exists() and path.stat().st_size > size


@pytest.mark.slow
def test_kills_at_any_moment_change_nothing(quick, server, tmp_path, capsys):
    """Killed while it downloads, and while it tokenises an archive that is 100 times as large."""
    server.trouble.cuts = iter([9_000, 4_000, 10**6, 20_000])
    documents = corpus()[1] + 100 * corpus()[1][:80]
    server.archives = corpus()[0] | {"urlsf_subset03.tar": pack(corpus()[1][:80], 3, repeats=100)}
    command = [f"--source={server.url}", "--subsets=0-3", "--workers=2", f"--out={tmp_path}"]
    archives = tmp_path / "archives"
    moments = [
        lambda: is_larger(archives / f"{NAMES[0]}.partial", 0),
        lambda: is_larger(archives / f"{NAMES[1]}.partial", 0),
        lambda: is_larger(tmp_path / "train.bin", 2**20),
    ]
    finished = []
    for moment in moments:
        server.asked.clear()
        process = start_program(*command)
        wait_until(moment, process)
        assert "another process is at work" in refusal(prepare.main, command, capsys)
        process.kill()
        process.wait()
        assert_group_ends(process.pid)  # its workers end, too
        process.communicate()
        assert_no_dataset(tmp_path)
        assert not set(finished) & set(server.asked)
        finished = [path.name for path in archives.glob("*.tar")]
    assert len(finished) == 4
    prepare.main(command)
    assert_result(tmp_path, documents)


@pytest.mark.slow
def test_ctrl_c_is_quiet(folder, tmp_path):
    (folder / "urlsf_subset03.tar").write_bytes(pack(corpus()[1][:80], 3, repeats=500))
    out = tmp_path / "out"
    moments = [
        lambda: len(children(process)) == 3,  # two of them are workers that are starting
        lambda: is_larger(out / "train.bin", 2**20),
    ]
    for moment in moments:
        process = start_program(f"--source={folder}", "--subsets=3", "--workers=2", f"--out={out}")
        wait_until(moment, process)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to parent and workers
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 130 and "Traceback" not in errors, errors
        assert_no_dataset(out)
        shutil.rmtree(out)


@pytest.mark.slow
def test_a_disk_that_fills_up_is_named(quick, folder, tmp_path):
    out = tmp_path / "out"

    def little_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    command = [f"--source={folder}", "--subsets=0-2", "--workers=1", f"--out={out}"]
    done = run("-c", PROGRAM, *command, preexec_fn=little_room)
    assert_refused(done, f"could not write {out / 'train.bin'}", "File too large")
    assert_no_dataset(out)
    prepare.main(command)
    assert_result(out)


def test_a_vocabulary_that_cannot_be_fetched_is_said_before_anything_else(folder, tmp_path):
    proxies = ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")
    nowhere = dict.fromkeys(proxies, "http://127.0.0.1:9") | {"NO_PROXY": "", "no_proxy": ""}
    environment = os.environ | nowhere | {"TIKTOKEN_CACHE_DIR": str(tmp_path / "empty")}
    command = ["data/openwebtext/prepare.py", f"--source={folder}", f"--out={tmp_path / 'out'}"]
    done = run(*command, env=environment)
    assert_refused(
        done, "prepare.py: GPT-2's vocabulary could not be fetched", "TIKTOKEN_CACHE_DIR"
    )
    assert not (tmp_path / "out").exists()
