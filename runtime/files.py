"""Files written atomically, folders locked to one process, and errors in one line."""

import codecs
import contextlib
import io
import os
import pickle
import re
import sys
import traceback
from pathlib import Path

try:
    import fcntl
except ImportError:  # on Windows: two processes can then work in one folder
    fcntl = None


# --- errors ---------------------------------------------------------------------------


class UserError(ValueError):
    """The request, a file or the machine is at fault, so a traceback would not help."""


def error_line(error):
    """Return one line that says what went wrong. NANOMEM_DEBUG=1 also prints the traceback."""
    if os.environ.get("NANOMEM_DEBUG", "0") != "0":
        traceback.print_exception(error)
    # a name in a file may have escape sequences, which a terminal would obey
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", describe_error(error))


def describe_error(error):
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    if isinstance(error, (ValueError, OSError)):
        return str(error) or type(error).__name__
    if isinstance(error, pickle.UnpicklingError):  # PyTorch's message tells how to load it anyway
        return "it holds more than tensors and plain values, so it was not loaded"
    first_line = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {first_line[:300]}"


@contextlib.contextmanager
def explain_errors(what, hint):
    """Turn an error inside into a ValueError with the text "what (error); hint". An OSError that
    names its file stays as it is."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # tiktoken's panic is no Exception
        if isinstance(error, OSError) and (error.filename or not error.errno):
            raise
        if is_out_of_memory(error):
            raise
        raise ValueError(f"{what} ({error_line(error)}); {hint}") from None


@contextlib.contextmanager
def explain_out_of_memory(way_out):
    """If memory runs out inside, raise an error that ends in way_out."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory ({error_line(error)}): {way_out}") from None


def is_out_of_memory(error):
    words = "allocate memory|out of memory|not enough memory|ALLOC_"
    is_pytorchs = isinstance(error, RuntimeError) and re.search(words, str(error))
    return isinstance(error, MemoryError) or bool(is_pytorchs)


def fail(error):
    """End the program: exit code 1 and one line on standard error, or 130 after Ctrl-C."""
    if isinstance(error, KeyboardInterrupt):
        sys.exit(130)
    program = Path(sys.argv[0]).name
    sys.exit(f"{program}: {error_line(error)}")


# --- files and folders ----------------------------------------------------------------


@contextlib.contextmanager
def atomic_write(path):
    """Open a temporary file for bytes and rename it at the end. At any moment `path` holds either
    the old or the new content. Raises OSError, naming path."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # PyTorch raises RuntimeError on a full disk
        raise OSError(f"could not write {path} ({error_line(error)})") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_file(path, data):
    """Write data: bytes, text, or a NumPy array."""
    if isinstance(data, str):
        data = data.encode(errors="replace")  # the name of a file may be no text
    with atomic_write(path) as f:
        f.write(data)


def open_text(file):
    """Open a text to read. file: a path, 0 for standard input, or bytes. All programs read text
    like this: it is UTF-8, a byte order mark is dropped, and line ends CR LF and CR become LF."""
    if isinstance(file, bytes):
        return io.TextIOWrapper(io.BytesIO(file), "utf-8-sig")
    return open(file, encoding="utf-8-sig")


def append_to_file(path, data):
    """Append data, bytes or text. Raises OSError, naming path."""
    if isinstance(data, str):
        data = data.encode()
    try:
        with open(path, "ab") as f:
            f.write(data)
    except OSError as error:
        raise OSError(f"could not write {path} ({error.strerror})") from None


locked_folders = {}  # {path: file descriptor}; the system unlocks them when the process ends


def lock_folder(folder, wait=False):
    """Keep other processes out of a folder until this one ends. If another process has locked it,
    wait, or raise ValueError."""
    folder = Path(folder).resolve()
    if fcntl is None or folder in locked_folders:
        return
    handle = os.open(folder, os.O_RDONLY)
    locked_folders[folder] = handle
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            del locked_folders[folder]
            os.close(handle)
            way_out = "wait for it to end, or give another folder"
            raise ValueError(f"another process is at work in {folder}: {way_out}") from None
        print(f"Waiting for another process that is at work in {folder}", file=sys.stderr)
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError:
        pass  # a disk without locks


def remove_temporary_files(folder, names):
    """Remove what atomic_write left in a locked folder when its process was killed. names: of the
    final files"""
    for name in names:
        for path in Path(folder).glob(f"{name}.*.tmp"):
            number = path.name.removeprefix(f"{name}.").removesuffix(".tmp")
            if number.isdecimal():  # a process id
                path.unlink()


# --- standard streams -----------------------------------------------------------------


class TolerantStream(io.FileIO):
    """A standard stream that ignores errors: a closed pipe must not end a run of hours."""

    def write(self, data):
        with contextlib.suppress(OSError):
            return super().write(data)
        return len(data)


def ignore_stream_errors():
    """For programs that write results to files: continue when standard output or error closes."""
    # The next opened file would get the number of a closed stream, so occupy all three first.
    number = os.open(os.devnull, os.O_RDWR)
    while number < 3:
        number = os.open(os.devnull, os.O_RDWR)
    os.close(number)
    sys.stdout = tolerant(1, sys.stdout)
    sys.stderr = tolerant(2, sys.stderr)


def tolerant(number, stream):
    encoding = None
    if stream is not None:  # Python found it open
        encoding = stream.encoding
    raw = io.BufferedWriter(TolerantStream(number, "w", closefd=False))
    return io.TextIOWrapper(raw, encoding, "names_as_they_are", line_buffering=True)


def names_as_they_are(error):
    """An error handler of codecs. The name of a file may be no text; print its bytes, so that a
    printed command can be pasted. Replace all else that cannot be encoded by a question mark."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("replace")(error)


codecs.register_error("names_as_they_are", names_as_they_are)


def print_strictly():
    """For programs that print their results: after ignore_stream_errors(), raise errors of
    standard output again."""
    errors = "names_as_they_are"
    sys.stdout = open(1, "w", buffering=1, errors=errors, closefd=False)  # noqa: SIM115


@contextlib.contextmanager
def explain_output_errors():
    """End the program quietly when the reader of standard output, such as head, closes it."""
    try:
        yield
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # takes what is flushed later
        if not isinstance(error, BrokenPipeError):
            raise OSError(f"standard output: {error}") from None
