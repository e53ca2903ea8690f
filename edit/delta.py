"""Deltas: files with the table rows that an update of a checkpoint has changed. sample.py --delta
applies them. They hold only tensors and plain values, so nothing in them is executed."""

import hashlib
from pathlib import Path

import torch

from runtime.checkpoint import read_tensors, save_tensors
from runtime.files import explain_errors

FORMAT = "nanomem-delta-1"


def weights_hash(tensors):
    """Hash {name: tensor}. A delta names its model by the hash of the model's state_dict."""
    digest = hashlib.sha256()
    for name, x in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def save_delta(path, values, rows, base, base_name):
    """Write the rows (int64) of values that may have changed. base: weights_hash of the model
    before the update; base_name: its file, for messages."""
    tensors = {"rows": rows.cpu(), "values": values.detach()[rows].cpu()}
    delta = {
        "format": FORMAT,
        "base": base,
        "name": base_name,
        "hash": weights_hash(tensors),
        **tensors,
    }
    save_tensors(path, delta)


def apply_deltas(model, path, files):
    """Write the rows of deltas into a model's table, one delta after another. files: their paths,
    or the folders of updates. Each must belong to the model's checkpoint, path, or to a result of
    the earlier deltas. Returns the numbers of all rows that were written, increasing,
    int64, on the CPU. Raises FileNotFoundError or ValueError, naming the file."""
    known = {}  # {weights_hash: name}
    written = [torch.empty(0, dtype=torch.int64)]
    name = str(path)
    for file in files:
        if Path(file).is_dir():
            file = Path(file, "delta.pt")
        if "," in str(file) and not Path(file).exists():
            raise FileNotFoundError(f"no delta {file}; give --delta again for each file")
        known[weights_hash(model.state_dict())] = name
        name = f"{path} with {file}"
        delta = read_tensors(Path(file), "delta", FORMAT)
        with explain_errors(f"{file} is damaged", "give another one"):
            check_delta(delta)
        if delta["base"] not in known:
            here = " or ".join(f"{name} ({base})" for base, name in known.items())
            theirs = f"{delta['name']} ({delta['base']})"
            raise ValueError(f"{file} belongs to {theirs}, not to {here}")
        table = model.pool.values.detach()
        with explain_errors(f"{file} is damaged", "give another one"):
            check_rows(delta["rows"], delta["values"], table)
        table[delta["rows"].to(table.device)] = delta["values"].to(table.device)
        written.append(delta["rows"])
    return torch.cat(written).unique()


def check_delta(delta):
    """Raises ValueError or KeyError if a delta has changed since it was saved."""
    tensors = {"rows": delta["rows"], "values": delta["values"]}
    if delta["hash"] != weights_hash(tensors):
        raise ValueError("its rows and values are not those that were saved")
    if type(delta["base"]) is not str or type(delta["name"]) is not str:
        raise ValueError("it does not say what it belongs to")


def check_rows(rows, values, table):
    """Raises ValueError unless save_delta writes such rows and values for a table."""
    if rows.ndim != 1 or rows.dtype != torch.int64 or (rows.diff() <= 0).any():
        raise ValueError("its rows are not increasing numbers")
    if len(rows) == 0 or rows[0] < 0 or rows[-1] >= len(table):
        raise ValueError(f"its rows are out of range of a table of {len(table)}")
    if values.shape != (len(rows), table.size(1)) or values.dtype != table.dtype:
        have = f"{tuple(values.shape)} {values.dtype}"
        raise ValueError(f"its values are {have}, the table's {table.size(1)} wide {table.dtype}")
    if not values.isfinite().all():
        raise ValueError("its values are not finite")
