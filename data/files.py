"""What all programs here share: errors in one line, files that are written whole, folders that are locked."""

import argparse
import contextlib
import functools
import io
import os
import pickle
import re
import sys
import traceback
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two processes from writing to one folder
    fcntl = None


class Refused(ValueError):  # noqa: N818
    """The request, a file or the machine is at fault, however late that shows: a traceback does not help."""


def explain(error):
    """One line that says what went wrong. With NANOMEM_DEBUG=1 the traceback goes to standard error."""
    if os.environ.get("NANOMEM_DEBUG", "0") != "0":
        traceback.print_exception(error)
    if isinstance(error, (ValueError, OSError)):
        return str(error).replace("\n", " ") or type(error).__name__
    if isinstance(
        error, pickle.UnpicklingError
    ):  # PyTorch says at length how to load it nevertheless
        return "it holds more than tensors and plain values, and was not loaded"
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"


@contextlib.contextmanager
def blame(what, way_out):
    """An error inside becomes a ValueError that names the file or option at fault, as most OSErrors do."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in tiktoken is no Exception
        if isinstance(error, OSError) and (error.filename or not error.errno):
            raise
        raise ValueError(f"{what} ({explain(error)}); {way_out}") from None


@contextlib.contextmanager
def one_line(program, kinds=Exception, speaks=True):
    """An error of these kinds ends the program with one line and exit code 1; Ctrl-C with 130."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except kinds as error:
        sys.exit(f"{program}: {explain(error)}" if speaks else 1)


@contextlib.contextmanager
def enough_memory():
    """If there is not, the error says which options to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        words = "allocate memory|out of memory|not enough memory|ALLOC_"
        if not (isinstance(error, MemoryError) or re.search(words, str(error))):
            raise
        way_out = (
            "lower batch_size (and raise gradient_accumulation_steps), block_size, or mem_keys"
        )
        raise Refused(f"out of memory ({explain(error)}): {way_out}") from None


class Steady(io.FileIO):
    """A standard stream that ignores errors: a closed pipe or a full disk must not end a run of hours."""

    def write(self, data):
        with contextlib.suppress(OSError):
            return super().write(data)
        return len(data)


def steady_streams():
    # else the next file to be opened would get the number of a closed stream, and what is printed to it
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(number)
    for number, name in ((1, "stdout"), (2, "stderr")):
        raw = io.BufferedWriter(Steady(number, "w", closefd=False))
        encoding = getattr(getattr(sys, name), "encoding", None)
        setattr(sys, name, io.TextIOWrapper(raw, encoding, "replace", line_buffering=True))


def to_folder(text):
    """For argparse: an empty name, perhaps of an unset variable, does not mean the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("must name a folder")
    return Path(text)


@contextlib.contextmanager
def writing(path):
    """Every error names the file. (That of a full disk does not, and PyTorch's is a RuntimeError.)"""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise OSError(f"could not write {path} ({explain(error)})") from None


@contextlib.contextmanager
def atomic_write(path):
    """Open a temporary file for bytes and rename it at the end: at any moment `path` is whole, new or old."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno and not error.filename:  # a full disk
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_file(path, data):
    """data: bytes or text."""
    with atomic_write(path) as f:
        f.write(data.encode() if isinstance(data, str) else data)


@functools.cache  # a process may lock a folder again
def lock(folder, wait=False):
    """Lock a folder for this process until it ends, in whatever way. If another process has locked it, raise
    ValueError or wait."""
    with contextlib.suppress(OSError):  # of a disk without locks
        handle = fcntl and os.open(folder, os.O_RDONLY)
        try:
            fcntl and fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                way_out = "let it end, or give another folder"
                raise ValueError(f"another process is at work in {folder}: {way_out}") from None
            print(f"Waiting for another process that is at work in {folder}", file=sys.stderr)
            fcntl.flock(handle, fcntl.LOCK_EX)


def sweep(folder, names):
    """Remove the temporary files of killed processes. names: a regular expression for the names of the files
    proper. Only for a process that has locked the folder, as another one might be writing."""
    for path in folder.iterdir():
        if re.fullmatch(rf"({names})\.\d+\.tmp", path.name):
            path.unlink()
