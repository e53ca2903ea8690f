"""The folder of a run: log.jsonl; ckpt.pt, its checkpoint; delta.pt, the rows of a table that an update of
another checkpoint has changed. Tensors and plain values only: nothing in them is executed."""

import hashlib
import re
from pathlib import Path

import torch

from data.files import atomic_write, blame, lock, sweep, write_file, writing
from kernels import RowAdam

FORMAT, DELTA = "nanomem-3", "nanomem-delta-1"


def save_checkpoint(path, checkpoint):
    """Tensors and plain values only. Whole or not at all: a full disk or a kill leaves what was there."""
    with writing(path), atomic_write(path) as f:
        torch.save(checkpoint, f)


def read_checkpoint(path, kind="checkpoint", format=FORMAT):
    if not path.exists():
        way_out = "; out_dir= or init_from= must name a folder that has one" * (format == FORMAT)
        raise FileNotFoundError(f"no {kind} {path}{way_out}")
    with blame(f"{path} is damaged or not a {kind}", "give another one"):  # mmap: read what is used
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != format:
        raise ValueError(f"{path} is not a {kind} of this version of nanomem")
    return checkpoint


def restore(optimizers, checkpoint):
    """Give the optimisers their state in the checkpoint; rates and decays stay as they are."""
    for optimizer, saved in zip(optimizers, checkpoint["optimizers"], strict=True):
        optimizer.load_state_dict(saved | {"param_groups": optimizer.state_dict()["param_groups"]})
        names = (
            {"means", "squares"} if isinstance(optimizer, RowAdam) else {"exp_avg", "exp_avg_sq"}
        )
        tables = (
            [] if isinstance(optimizer, torch.optim.SGD) else optimizer.param_groups
        )  # that has no state
        for p in (p for group in tables for p in group["params"] if p.requires_grad):
            state, right = (
                optimizer.state[p],
                dict.fromkeys(names, (p.shape, torch.float32, torch.strided)),
            )
            kinds = {
                name: (m.shape, m.dtype, m.layout) for name, m in state.items() if name != "step"
            }
            if kinds != right or state["step"] != checkpoint["iter"]:
                raise ValueError(
                    "not two moments for each parameter, after as many steps as the run"
                )


def identity(tensors):
    """A hash of {name: tensor}, a string: of a model's state_dict it says what a delta belongs to."""
    digest = hashlib.sha256()
    for name, x in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def save_delta(path, values, rows, base, name):
    """Write the rows of values that may have changed (int64). base: identity of the model that
    it was before, name: its file."""
    parts = {"rows": rows.cpu(), "values": values.detach()[rows].cpu()}
    save_checkpoint(
        path, {"format": DELTA, "base": base, "name": name, "hash": identity(parts), **parts}
    )


def apply_deltas(model, path, files):
    """Put the rows of deltas into a model's table, one after another. They must belong to its checkpoint,
    path, or to what earlier ones made of it. Raises FileNotFoundError or ValueError, naming the file."""
    known = {}
    for made, file in zip([path, *(f"{path} with {file}" for file in files)], files, strict=False):
        known[identity(model.state_dict())] = made
        delta = read_checkpoint(Path(file), "delta", DELTA)
        with blame(f"{file} is damaged", "give another one"):
            base, parts = delta["base"], {"rows": delta["rows"], "values": delta["values"]}
            if delta["hash"] != identity(parts):
                raise ValueError("its rows and values are not those that were saved")
            if base in known:
                table, rows = model.pool.values.detach(), parts["rows"].to(model.pool.values.device)
                if not 0 <= rows.min() <= rows.max() < len(table):
                    raise ValueError(
                        f"rows {rows.min()} to {rows.max()}, of a table of {len(table)}"
                    )
                table[rows] = parts["values"].to(table.device)
        if base not in known:
            here = " or ".join(f"{known[key]} ({key})" for key in known)
            raise ValueError(f"{file} belongs to {delta.get('name')} ({base}), not to {here}")


def hold(config):
    """Lock out_dir, and see that no other run is lost."""
    lock(out_dir := Path(config.out_dir))
    old = [name for name in ("ckpt.pt", "log.jsonl", "delta.pt") if (out_dir / name).exists()]
    if old and not (config.resume or config.overwrite):
        way_out = (
            "go on with --resume, " * ("ckpt.pt" in old)
            + "--overwrite it, or give another --out_dir"
        )
        raise ValueError(f"{out_dir} holds a run already: {way_out}")


def prepare_out_dir(config, it):
    """Make the folder ready for this run, which goes on after step `it`."""
    out_dir, log = Path(config.out_dir), Path(config.out_dir, "log.jsonl")
    out_dir.mkdir(parents=True, exist_ok=True)
    hold(config)
    sweep(out_dir, r"(ckpt|delta|readers)\.pt|log\.jsonl")
    if not config.resume:
        for name in ("log.jsonl", "delta.pt", "ckpt.pt"):
            (out_dir / name).unlink(missing_ok=True)
    elif log.exists():  # without lines of later steps, and one that a kill has cut short
        step = re.compile(rb'{"iter": (\d{1,18}),')
        lines = [
            line for line in log.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")
        ]
        write_file(
            log,
            b"".join(line for line in lines if not ((m := step.match(line)) and int(m[1]) > it)),
        )
