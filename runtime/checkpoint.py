"""Checkpoints: files of tensors and plain Python values. Nothing in them is executed.

The ckpt.pt of a run holds

    model, optimizers               state_dicts; a table that several processes share is whole here
    model_config, train_config      options
    iter, seconds                   steps done, and the time they took
    vocabulary, separator           of the dataset (data/dataset.py), for sample.py
    fingerprint, background         of the dataset, and of the background or "", to detect that they
                                    were prepared anew
    meta                            meta.json of the dataset
"""

import math
import re
from pathlib import Path

import torch

from runtime.files import atomic_write, explain_errors, remove_temporary_files, write_file

FORMAT = "nanomem-5"
FIELDS = {
    "iter": int,
    "seconds": float,
    "separator": int,
    "fingerprint": str,
    "background": str,
    "meta": dict,
}
DAMAGE = "it was edited or damaged, or is from another version"


def save_tensors(path, content):
    """Write content, a dictionary with a "format", atomically. A full disk or a kill leaves the
    old file as it was."""
    with atomic_write(path) as f:
        torch.save(content, f)


def read_tensors(path, kind, format, hint="give another one"):
    """Read a dictionary that save_tensors wrote. kind, hint: for messages. Raises
    FileNotFoundError or ValueError, naming the file.

    Its tensors are views of the file, so that only what is used is read. While one of them exists,
    the file takes space on the disk, even if another one has replaced it. So copy what you keep."""
    if not path.exists():
        raise FileNotFoundError(f"no {kind} {path}")
    with explain_errors(f"{path} is damaged or not a {kind}", hint):
        mmap = is_utf8(path)  # PyTorch cannot map a file with another name
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    found = None
    if isinstance(content, dict):
        found = content.get("format")
    if found != format:
        formats = f"its format is {found!r}, not {format!r}"
        raise ValueError(f"{path} is not a {kind} of this version of nanomem: {formats}")
    return content


def is_utf8(path):
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def checkpoint_file(path):
    """The folder of a run, or a checkpoint -> the checkpoint's path."""
    path = Path(path)
    if path.is_dir():
        return path / "ckpt.pt"
    return path


def read_checkpoint(path, tensors=False):
    """Read the checkpoint of a run. path: the run's folder, or the file; tensors: whether to
    return "model" and "optimizers", too (see read_tensors). Raises FileNotFoundError or ValueError,
    naming the file, if it is missing, damaged, or not a checkpoint."""
    path = checkpoint_file(path)
    delta = path.parent / "delta.pt"
    if not path.exists() and delta.exists():
        way_out = f"give the folder of the updated run, and --delta={delta}"
        raise FileNotFoundError(f"{path.parent} holds an update, not a run: {way_out}")
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint {path}; give the folder of a run that has one")
    checkpoint = read_tensors(path, "checkpoint", FORMAT)
    with explain_errors(f"{path}: its parts do not fit together", DAMAGE):
        for name, kind in FIELDS.items():
            if type(checkpoint[name]) is not kind:
                raise ValueError(f"{name} is {checkpoint[name]!r}")
        if not math.isfinite(checkpoint["seconds"]):
            raise ValueError(f"seconds is {checkpoint['seconds']}")
        if checkpoint["iter"] <= 0:
            raise ValueError(f"iter is {checkpoint['iter']}")
        if not 0 <= checkpoint["separator"] < checkpoint["model_config"]["vocab_size"]:
            raise ValueError(f"separator is {checkpoint['separator']}")
        if not tensors:
            checkpoint.pop("model", None)
            checkpoint.pop("optimizers", None)
    return checkpoint


# --- the folder of a run --------------------------------------------------------------

RUN_FILES = ("ckpt.pt", "delta.pt", "log.jsonl")


def check_unoccupied(folder, own, overwrite):
    """Raises ValueError if a folder holds a run or an update. own: what the program writes there,
    ckpt.pt of a run or delta.pt of an update; overwrite: whether it may replace its own"""
    for name in RUN_FILES:
        if not (folder / name).exists():
            continue
        if name not in (own, "log.jsonl"):
            raise ValueError(f"{folder} holds another program's {name}: give another --out_dir")
        if overwrite:
            continue
        way_out = "--overwrite it, or give another --out_dir"
        if name == "ckpt.pt":
            way_out = f"continue it with --resume, {way_out}"
        raise ValueError(f"{folder} holds a run already: {way_out}")


def clear_run(folder):
    """Remove the run in a locked folder, and nothing else."""
    remove_temporary_files(folder, RUN_FILES)
    for name in ("log.jsonl", "delta.pt", "ckpt.pt"):
        (folder / name).unlink(missing_ok=True)


def cut_log(folder, last_step):
    """Remove lines of later steps from the log, and a line that a kill has cut short."""
    remove_temporary_files(folder, RUN_FILES)
    log = folder / "log.jsonl"
    if not log.exists():
        return
    lines = []
    for line in log.read_bytes().splitlines(keepends=True):
        step = re.match(rb'{"iter": (\d{1,18}),', line)
        is_later = step is not None and int(step[1]) > last_step
        if line.endswith(b"\n") and not is_later:
            lines.append(line)
    write_file(log, b"".join(lines))
