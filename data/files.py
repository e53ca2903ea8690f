"""What all programs here share: how an error becomes one line, a file is written whole, and a folder is held."""

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
    """What was asked for, a file, or the machine is at fault, however late it comes to light: no traceback would help."""


def explain(error):
    """One line that says what went wrong. With NANOMEM_DEBUG=1 the traceback goes to standard error."""
    if os.environ.get("NANOMEM_DEBUG", "0") != "0":
        traceback.print_exception(error)
    if isinstance(error, (ValueError, OSError)):
        return str(error).replace("\n", " ") or type(error).__name__
    if isinstance(error, pickle.UnpicklingError):  # PyTorch says at length how to load it nevertheless
        return "it holds more than tensors and plain values, and was not loaded"
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"


@contextlib.contextmanager
def blame(what, way_out):
    """Whatever goes wrong inside becomes a ValueError that names the file or option at fault. An OSError does that itself."""
    try:
        yield
    except (OSError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in tiktoken is no Exception
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
    """If there is not, say what takes it."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not (isinstance(error, MemoryError) or re.search("allocate memory|out of memory|not enough memory|ALLOC_", str(error))):
            raise
        way_out = "lower batch_size (and raise gradient_accumulation_steps), block_size, or mem_keys"
        raise Refused(f"out of memory ({explain(error)}): {way_out}") from None


class Steady(io.FileIO):
    """A standard stream. That its reader goes away, or its disk is full, does not end what has run for hours."""

    def write(self, data):
        with contextlib.suppress(OSError):
            return super().write(data)
        return len(data)


def steady_streams():
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:  # of a closed stream: else the next file gets it, and what is printed
        pass
    os.close(number)
    for number, name in ((1, "stdout"), (2, "stderr")):
        raw, encoding = io.BufferedWriter(Steady(number, "w", closefd=False)), getattr(getattr(sys, name), "encoding", None)
        setattr(sys, name, io.TextIOWrapper(raw, encoding, "replace", line_buffering=True))


def to_folder(text):
    """For argparse: an empty name, of a variable that is not set perhaps, is not the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("must name a folder")
    return Path(text)


@contextlib.contextmanager
def atomic_write(path):
    """Open a temporary file for writing bytes and rename it at the end: whoever finds `path` finds all of it, or the old one."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # that of a full disk has none
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_file(path, data):
    """data: bytes or text."""
    with atomic_write(path) as f:
        f.write(data.encode() if isinstance(data, str) else data)


@functools.cache  # what one holds one can ask for again
def lock(folder, wait=False):
    """Hold a folder for this process until it ends, however it ends. Raises ValueError if another one does, or waits for that.
    Returns its os.stat, to know it by."""
    with contextlib.suppress(OSError):  # of a disk that has no locks
        handle = fcntl and os.open(folder, os.O_RDONLY)
        try:
            fcntl and fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise ValueError(f"another process is at work in {folder}: let it end, or give another folder") from None
            print(f"Waiting for another process that is at work in {folder}", file=sys.stderr)
            fcntl.flock(handle, fcntl.LOCK_EX)
    return os.stat(folder)


def sweep(folder, names):
    """Remove what killed processes have left of files that they were writing. names: of these files, a regular expression. For the
    one who holds the folder: others may be at work."""
    for path in folder.iterdir():
        if re.fullmatch(rf"({names})\.\d+\.tmp", path.name):
            path.unlink()
